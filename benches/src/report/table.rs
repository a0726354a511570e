//! The table of all goals, for benches/README.md: every cell has its figure, or says that none was measured.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Report;
use super::goals::{Goal, MODES, ROWS};

const BEGIN: &str = "<!-- goals: written by shunt-bench -->\n";
const END: &str = "<!-- goals: end -->\n";

/// Puts the table of these results between the marks in a file. Each result is judged by its own references;
/// where two have the same figure, the first one's counts.
pub(crate) fn put<P: AsRef<Path>>(into: &Path, results: &[P]) -> Result<()> {
    let mut reports = Vec::new();
    for path in results {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let report: Report = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        reports.push(report);
    }
    let text = std::fs::read_to_string(into).with_context(|| into.display().to_string())?;
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("no {BEGIN:?} in the file"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("no {END:?} in the file"))?;
    std::fs::write(into, format!("{before}{BEGIN}\n{}\n{END}{after}", table(&reports)))?;
    Ok(())
}

/// These results, with those of the same day that were made by another command: the guest's and this machine's.
pub(crate) fn beside(results: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = results.to_vec();
    for path in results {
        let name = path.file_stem().and_then(|name| name.to_str()).context("results without a name")?;
        let other = name.strip_suffix("-guest").map_or_else(|| format!("{name}-guest"), str::to_owned);
        let other = path.with_file_name(format!("{other}.json"));
        if other.exists() && !found.contains(&other) {
            found.push(other);
        }
    }
    Ok(found)
}

fn table(reports: &[Report]) -> String {
    let mut out = String::new();
    for report in reports {
        let machine = &report.machine;
        _ = writeln!(
            out,
            "{}, {}: Linux {}, load average at the start {}, {}.\n",
            machine.date, machine.name, machine.kernel, machine.load_average, machine.shunt
        );
    }
    let goals: Vec<Goal> = reports.iter().flat_map(super::goals::all).collect();
    _ = writeln!(out, "| | figure | {} |\n|---|---|{}", MODES.join(" | "), "---|".repeat(MODES.len()));
    for row in ROWS {
        let cells = MODES.into_iter().zip(row.at_most).map(|(mode, at_most)| {
            if !at_most.is_finite() {
                return String::new();
            }
            let same = |goal: &&Goal| (goal.id, goal.what, goal.mode) == (row.id, row.what, mode);
            let goal = goals.iter().find(same);
            match goal.map(|goal| (number(goal.value), goal.at_most)) {
                Some((value, None)) => value,
                Some((value, Some(at_most))) if goal.is_some_and(Goal::met) => {
                    format!("{value} ≤ {}", number(at_most))
                }
                Some((value, Some(at_most))) => format!("**{value}** > {}", number(at_most)),
                None => "to be filled by the run".to_owned(),
            }
        });
        _ = writeln!(out, "| {} | {} | {} |", row.id, row.what, cells.collect::<Vec<_>>().join(" | "));
    }
    out
}

/// Two decimals where they say something.
pub(super) fn number(value: f64) -> String {
    if value.abs() >= 100.0 {
        return format!("{value:.0}");
    }
    format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned()
}
