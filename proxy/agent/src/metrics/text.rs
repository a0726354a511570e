//! Prometheus' text format 0.0.4, out of `OpenMetrics`, which is what `prometheus-client` writes. Both
//! have the same samples; 0.0.4 names counters by their samples, and has no end mark.

/// Content type of the text format.
pub(crate) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Content type of `OpenMetrics`.
pub(crate) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Turns `OpenMetrics` into the text format.
pub(crate) fn classic(openmetrics: &str) -> String {
    let counters: std::collections::BTreeSet<&str> = openmetrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        if line.starts_with("# EOF") || line.starts_with("# UNIT ") {
            continue;
        }
        let described = ["# HELP ", "# TYPE "].into_iter().find_map(|what| {
            let (name, rest) = line.strip_prefix(what)?.split_once(' ')?;
            Some((what, name, rest))
        });
        match described {
            Some((what, name, rest)) => {
                let suffix = if counters.contains(name) { "_total" } else { "" };
                // The library ends every help with a full stop.
                let rest = if what == "# HELP " { rest.strip_suffix('.').unwrap_or(rest) } else { rest };
                text.push_str(&[what, name, suffix, " ", rest].concat());
            }
            None => push_sample(&mut text, line),
        }
        text.push('\n');
    }
    text
}

/// Bounds of buckets are written as Go writes them: `le="1"` and not `le="1.0"`.
fn push_sample(text: &mut String, line: &str) {
    const LE: &str = "le=\"";
    let bound = line.find(LE).and_then(|at| {
        let start = at + LE.len();
        let end = start + line[start..].find('"')?;
        Some((start, end))
    });
    match bound {
        Some((start, end)) => {
            text.push_str(&line[..start]);
            text.push_str(line[start..end].strip_suffix(".0").unwrap_or(&line[start..end]));
            text.push_str(&line[end..]);
        }
        None => text.push_str(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_keep_the_names_of_their_samples() {
        let openmetrics = "# HELP a Ways.\n# TYPE a counter\na_total{code=\"200\"} 3\n# HELP h Time.\n# TYPE h histogram\n\
            h_sum 1.5\nh_count 1\nh_bucket{le=\"0.25\",x=\"y\"} 0\nh_bucket{le=\"1.0\",x=\"y\"} 0\nh_bucket{le=\"+Inf\"} 1\n# EOF\n";
        assert_eq!(
            classic(openmetrics),
            "# HELP a_total Ways\n# TYPE a_total counter\na_total{code=\"200\"} 3\n# HELP h Time\n# TYPE h histogram\n\
             h_sum 1.5\nh_count 1\nh_bucket{le=\"0.25\",x=\"y\"} 0\nh_bucket{le=\"1\",x=\"y\"} 0\nh_bucket{le=\"+Inf\"} 1\n"
        );
    }
}
