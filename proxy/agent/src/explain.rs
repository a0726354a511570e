//! `shunt explain`: offline from manifests, or from the running agent; from the table, or from a
//! mode's rules and compared with the table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use shunt_core::compile::Compiler;
use shunt_core::explain::{Cause, Fate, explain as explain_packet};
use shunt_core::id::IpFamily;
use shunt_core::store::Store;
use shunt_core::table::ForwardingTable;
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::Mode;
use shunt_mode::driver::{Driver, Traces};

use crate::admin::{self, Request};
use crate::cli::{DumpOutput, ExplainArgs, SettingArgs};
use crate::offline::Offline;
use crate::pods::{Directory, PodSource};
use crate::questions::{Asked, Expect, Question, of_arguments};

/// Exit status when answers differ from each other or from what was expected.
const DIFFER: u8 = 3;

/// What is asked, as it is also sent to the running agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ExplainRequest {
    /// Whose rules are to answer; `None` for the table alone.
    pub mode: Option<String>,
    pub questions: Vec<Question>,
}

/// The answers to a request, in its order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Answers {
    /// The mode that the node is in, or would be.
    mode: String,
    answers: Vec<Answer>,
}

/// What becomes of one packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Answer {
    /// The packet.
    packet: String,
    /// The explanation, in lines.
    text: String,
    /// What is said to programs.
    entry: Entry,
    /// What the mode's rules say, when they were asked.
    rules: Option<Rules>,
}

/// One answer for programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    #[serde(flatten)]
    fate: Fate,
    /// `address:port/protocol` or `node:port/protocol`, if any matched.
    frontend: Option<String>,
    reason: String,
    /// Whose frontend it is.
    service: Option<String>,
    /// What kind of frontend it is.
    kind: Option<String>,
    /// Endpoints that may not be chosen.
    left_out: Vec<LeftOut>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct LeftOut {
    endpoint: String,
    reason: String,
}

/// What a mode's rules say of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Rules {
    mode: String,
    /// What the table says, in words.
    table: String,
    /// What the rules say, in words; or why they cannot be followed.
    says: std::result::Result<String, String>,
    /// Where the two differ first.
    difference: Option<String>,
}

pub(crate) fn explain(args: &ExplainArgs) -> Result<ExitCode> {
    let compare = args.settings.mode.is_some();
    let asked = of_arguments(args)?;
    let answers = match &args.manifests {
        Some(path) => {
            let node = args.node.as_deref().unwrap_or_default();
            let Offline { store, compiler, settings, pods } = Offline::read(path, node, &args.settings)?;
            let (mode, pods) = (settings.mode, PodSource::Manifests(&pods));
            answer(&store, &compiler, pods, mode, compare, &questions(&asked), |table, packets| {
                Ok(shunt_modes::trace(mode, table, packets)?)
            })?
        }
        None => ask(args, &asked)?,
    };
    report(args.output, &asked, &answers, compare)
}

fn questions(asked: &[Asked]) -> Vec<Question> {
    asked.iter().map(|a| a.question.clone()).collect()
}

/// Asks the running agent.
fn ask(args: &ExplainArgs, asked: &[Asked]) -> Result<Answers> {
    ensure!(
        SettingArgs { mode: None, ..args.settings.clone() } == SettingArgs::default(),
        "the settings are those of the running agent: --config and the like need --manifests"
    );
    let mode = args.settings.mode.clone();
    let request = Request::Explain(ExplainRequest { mode, questions: questions(asked) });
    let text = admin::ask(&args.admin_socket, &request)?;
    let answers: Answers = serde_json::from_str(&text).context("cannot understand the running agent")?;
    ensure!(answers.answers.len() == asked.len(), "the running agent answered something else");
    Ok(answers)
}

/// Answers what a running agent is asked, from its table and from what the kernel holds.
pub(crate) fn live(
    store: &Store,
    compiler: &Compiler,
    drivers: &mut [&mut Box<dyn Driver>],
    request: &ExplainRequest,
) -> Result<String> {
    let mode = drivers.first().context("no family is served here")?.mode();
    if let Some(asked) = &request.mode {
        let asked: Mode = asked.parse()?;
        ensure!(asked == mode, "the running agent is in {mode} mode, not {asked}");
    }
    let compare = request.mode.is_some();
    let pods = PodSource::Endpoints(store);
    let answers = answer(store, compiler, pods, mode, compare, &request.questions, |table, packets| {
        let driver = drivers
            .iter_mut()
            .find(|driver| driver.family() == table.family())
            .with_context(|| format!("{} is not served here", table.family()))?;
        Ok(driver.trace(table, packets)?)
    })?;
    Ok(serde_json::to_string(&answers)?)
}

/// Answers questions from the table and, to `compare`, from the mode's rules.
fn answer(
    store: &Store,
    compiler: &Compiler,
    pods: PodSource<'_>,
    mode: Mode,
    compare: bool,
    questions: &[Question],
    mut trace: impl FnMut(&ForwardingTable, &[Packet]) -> Result<Traces>,
) -> Result<Answers> {
    let pods = Directory::new(pods, questions.iter().filter_map(Question::pod));
    let packet = |(i, question): (usize, &Question)| {
        let packet = question.packet(compiler, &pods);
        match &question.name {
            Some(name) => packet.with_context(|| format!("packet {name}")),
            None if questions.len() > 1 => packet.with_context(|| format!("packet [{i}]")),
            None => packet,
        }
    };
    let packets: Vec<Packet> = questions.iter().enumerate().map(packet).collect::<Result<_>>()?;
    let mut traces: BTreeMap<usize, std::result::Result<Outcome, String>> = BTreeMap::new();
    if compare {
        // Each family's rules are read once, however many packets there are.
        for family in IpFamily::ALL {
            let (places, of_family): (Vec<usize>, Vec<Packet>) = packets
                .iter()
                .enumerate()
                .filter(|(_, p)| IpFamily::of(p.destination) == family)
                .map(|(i, p)| (i, p.clone()))
                .unzip();
            if !of_family.is_empty() {
                traces.extend(places.into_iter().zip(trace(compiler.table(family), &of_family)?));
            }
        }
    }
    let answers = questions.iter().zip(&packets).enumerate().map(|(i, (question, packet))| {
        let rules = traces.remove(&i).map(|of_rules| (mode, of_rules));
        answer_one(store, compiler, question, packet, rules)
    });
    let answers = answers.collect();
    Ok(Answers { mode: mode.to_string(), answers })
}

fn answer_one(
    store: &Store,
    compiler: &Compiler,
    question: &Question,
    packet: &Packet,
    rules: Option<(Mode, std::result::Result<Outcome, String>)>,
) -> Answer {
    let explanation = explain_packet(store, compiler, packet);
    let (service, kind, left_out) = match &explanation.cause {
        Cause::Frontend(matched) => (
            Some(matched.service.to_string()),
            Some(matched.kind.to_string()),
            matched
                .left_out
                .iter()
                .map(|(target, reason)| LeftOut { endpoint: target.to_string(), reason: reason.to_string() })
                .collect(),
        ),
        _ => (None, None, Vec::new()),
    };
    let mut entry = Entry {
        name: question.name.clone().unwrap_or_else(|| packet.to_string()),
        fate: Fate::from(&explanation.outcome),
        frontend: explanation.frontend(),
        reason: explanation.reason(),
        service,
        kind,
        left_out,
    };
    let rules = rules.map(|(mode, of_rules)| {
        if let Ok(outcome) = &of_rules {
            entry.fate = Fate::from(outcome);
        }
        let difference =
            of_rules.as_ref().ok().and_then(|of_rules| difference(mode, &explanation.outcome, of_rules));
        if let Some(difference) = &difference {
            entry.reason = format!("rules and table differ: {difference}; the table says: {}", entry.reason);
        }
        Rules {
            mode: mode.to_string(),
            table: explanation.outcome.to_string(),
            says: of_rules.map(|outcome| outcome.to_string()),
            difference,
        }
    });
    Answer { packet: packet.to_string(), text: explanation.to_string(), entry, rules }
}

/// Where what the rules say differs first from what the table says.
fn difference(mode: Mode, table: &Outcome, rules: &Outcome) -> Option<String> {
    let (Outcome::Forward(of_table), Outcome::Forward(of_rules)) = (table, rules) else {
        let verdict = |outcome: &Outcome| match outcome {
            Outcome::Forward(_) => "forward",
            Outcome::Reject => "reject",
            Outcome::Drop => "drop",
            Outcome::None => "none",
        };
        return (table != rules).then(|| {
            format!("verdict: {} by the table, {} by the rules of {mode}", verdict(table), verdict(rules))
        });
    };
    let map = |list: &[(SocketAddr, bool)]| list.iter().copied().collect::<BTreeMap<_, _>>();
    let (of_table, of_rules) = (map(of_table), map(of_rules));
    let all: BTreeMap<_, _> = of_table.iter().chain(&of_rules).collect();
    all.into_keys().find_map(|endpoint| match (of_table.get(endpoint), of_rules.get(endpoint)) {
        (Some(_), None) => Some(format!("endpoint {endpoint}: in the table, not in the rules of {mode}")),
        (None, Some(_)) => Some(format!("endpoint {endpoint}: in the rules of {mode}, not in the table")),
        (Some(t), Some(r)) if t != r => Some(format!(
            "masquerade to {endpoint}: {} by the table, {} by the rules of {mode}",
            yes(*t),
            yes(*r)
        )),
        _ => None,
    })
}

const fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// Where an answer differs from what was expected.
fn disappointments(expect: &Expect, fate: &Fate) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(verdict) = expect.verdict.filter(|v| *v != fate.verdict) {
        found.push(format!("verdict: expected {}, got {}", word(verdict), word(fate.verdict)));
    }
    if let Some(endpoints) = &expect.endpoints {
        let mut endpoints: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
        endpoints.sort_unstable();
        if endpoints != fate.endpoints {
            let list = |l: &[String]| if l.is_empty() { "none".to_owned() } else { l.join(", ") };
            found.push(format!("endpoints: expected {}, got {}", list(&endpoints), list(&fate.endpoints)));
        }
    }
    if let Some(masquerade) = expect.masquerade.filter(|m| *m != fate.masquerade) {
        found.push(format!("masquerade: expected {}, got {}", yes(masquerade), yes(fate.masquerade)));
    }
    found
}

/// A word as it stands in JSON.
fn word(verdict: shunt_core::explain::VerdictKind) -> String {
    serde_json::to_value(verdict).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Prints answers, and says by the exit status whether all is as it should be.
fn report(output: DumpOutput, asked: &[Asked], answers: &Answers, compare: bool) -> Result<ExitCode> {
    let Answers { mode, answers } = answers;
    let mut text = String::new();
    let (mut expected, mut wrong, mut lost) = (0_usize, 0_usize, Vec::new());
    for (i, (asked, answer)) in asked.iter().zip(answers).enumerate() {
        let mut problems: Vec<String> = Vec::new();
        if let Some(rules) = &answer.rules {
            problems.extend(rules.difference.clone());
            if let Err(error) = &rules.says {
                lost.push(format!(
                    "{}: the rules of {} cannot be followed: {error}",
                    answer.entry.name, rules.mode
                ));
            }
        }
        if let Some(expect) = asked.expect(mode) {
            expected += 1;
            problems.extend(disappointments(expect, &answer.entry.fate));
        }
        wrong += usize::from(!problems.is_empty());
        if output == DumpOutput::Json {
            for problem in &problems {
                eprintln!("shunt: {}: {problem}", answer.entry.name);
            }
            continue;
        }
        if i > 0 {
            text.push('\n');
        }
        if let Some(name) = &asked.question.name {
            writeln!(text, "{name}")?;
        }
        text.push_str(&answer.text);
        if let Some(rules) = &answer.rules {
            let of_rules = match &rules.says {
                Ok(of_rules) => of_rules.clone(),
                Err(error) => format!("cannot be followed: {error}"),
            };
            writeln!(text, "  {:<11} {}", "table", rules.table)?;
            writeln!(text, "  {:<11} {of_rules}", rules.mode)?;
        }
        for problem in &problems {
            writeln!(text, "  {:<11} {problem}", "DIFFERS")?;
        }
    }
    if output == DumpOutput::Json {
        let entries: Vec<&Entry> = answers.iter().map(|a| &a.entry).collect();
        writeln!(text, "{}", serde_json::to_string_pretty(&entries)?)?;
    } else if answers.len() > 1 {
        let mut compared = Vec::new();
        if expected > 0 {
            compared.push(format!("{expected} with an expectation"));
        }
        if compare {
            compared.push(format!("compared with the rules of {mode}"));
        }
        let compared = match compared.as_slice() {
            [] => String::new(),
            parts => format!(", {}: {wrong} differ", parts.join(", ")),
        };
        writeln!(text, "\n{} packets{compared}", answers.len())?;
    }
    print!("{text}");
    if !lost.is_empty() {
        bail!("{}", lost.join("; "));
    }
    Ok(if wrong > 0 { ExitCode::from(DIFFER) } else { ExitCode::SUCCESS })
}
