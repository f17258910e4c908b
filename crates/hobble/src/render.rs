//! Events, status and verdicts as text for people. Pure: a value goes in, lines come out.

use std::time::Duration;

use hobble_api::Timestamp;
use hobble_api::event::{Attached, Event, EventKind, Failed, Recovered, Retrying, Rules};
use hobble_api::status::{NotCovered, Preflight, Reason, RuleCounts, Status, Verdict};

use crate::out::{Table, count, human_duration, printable};

/// A line and how it is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// Part of the result.
    Plain(String),
    /// Something that works less well than it should; goes to standard error.
    Warning(String),
    /// What to do about the line before; goes to standard error.
    Hint(String),
}

impl Line {
    fn plain(text: impl Into<String>) -> Self {
        Line::Plain(text.into())
    }
}

fn micros(us: u64) -> String {
    human_duration(Duration::from_micros(us))
}

/// An event of an attachment in the foreground.
pub(crate) fn event(event: &Event) -> Vec<Line> {
    match &event.kind {
        EventKind::Preflight(preflight) => preflight_warnings(preflight),
        EventKind::Attaching(_) => Vec::new(),
        EventKind::Attached(attached) => self::attached(attached),
        EventKind::Injecting(rules) => vec![Line::plain(in_force("injecting", rules))],
        EventKind::Updated(rules) => vec![Line::plain(in_force("updated", rules))],
        EventKind::Paused {} => vec![Line::plain("paused: no rule is in force")],
        EventKind::Resumed {} => vec![Line::plain("resumed")],
        EventKind::TakenOver(taken) => vec![Line::Warning(format!(
            "the server was killed; process {} has taken over after {}: {}",
            taken.server_pid,
            micros(taken.gap_us),
            if taken.goes_on {
                "the experiment goes on"
            } else {
                "the target is recovered"
            }
        ))],
        EventKind::NotCovered(uncovered) => self::uncovered(&uncovered.not_covered),
        EventKind::Recovering { why } => {
            vec![Line::plain(format!("recovering: {}", why.meaning()))]
        }
        EventKind::Retrying(retrying) => self::retrying(retrying),
        EventKind::Recovered(recovered) => self::recovered(recovered),
        EventKind::Failed(failed) => self::failed(failed),
        other => vec![Line::plain(format!(
            "{} (unknown to this version)",
            printable(other.name())
        ))],
    }
}

fn retrying(retrying: &Retrying) -> Vec<Line> {
    let when = if retrying.in_ms == 0 {
        "by the holder, at once".to_owned()
    } else {
        format!(
            "in {}",
            human_duration(Duration::from_millis(retrying.in_ms))
        )
    };
    let mut lines = vec![Line::Warning(format!(
        "not everything could be put back; it is tried again {when}: {}",
        printable(&retrying.cause)
    ))];
    lines.extend(retrying.hint.iter().map(|hint| Line::Hint(printable(hint))));
    lines
}

fn preflight_warnings(preflight: &Preflight) -> Vec<Line> {
    if preflight.verdict == Verdict::Refuse {
        // The failure that follows says why.
        return Vec::new();
    }
    preflight
        .reasons
        .iter()
        .flat_map(|reason| reason_lines("degraded", reason))
        .collect()
}

fn reason_lines(word: &str, reason: &Reason) -> Vec<Line> {
    let mut lines = vec![Line::Warning(format!(
        "{word}: {} [{}]",
        printable(&reason.text),
        printable(&reason.code)
    ))];
    lines.extend(reason.hint.iter().map(|hint| Line::Hint(printable(hint))));
    lines
}

fn attached(attached: &Attached) -> Vec<Line> {
    let moved = [
        (attached.processes, "process"),
        (attached.descriptors, "descriptor"),
        (attached.mappings, "mapping"),
        (attached.locks, "lock"),
    ];
    let moved: Vec<String> = moved
        .into_iter()
        .filter(|&(number, noun)| number > 0 || noun == "process" || noun == "descriptor")
        .map(|(number, noun)| count(number, noun))
        .collect();
    let mut lines = vec![Line::plain(format!(
        "attached: {} moved; the target stood still for {}",
        moved.join(", "),
        micros(attached.pause_us)
    ))];
    lines.extend(
        attached
            .degraded
            .iter()
            .flat_map(|reason| reason_lines("degraded", reason)),
    );
    lines.extend(attached.not_covered.iter().map(uncovered_line));
    lines
}

fn uncovered(items: &[NotCovered]) -> Vec<Line> {
    if items.is_empty() {
        return vec![Line::plain("covered: the rules see every open file again")];
    }
    items.iter().map(uncovered_line).collect()
}

fn uncovered_line(item: &NotCovered) -> Line {
    Line::Warning(format!("not covered: {}", not_covered(item)))
}

fn not_covered(item: &NotCovered) -> String {
    let owner = item
        .pid
        .map_or_else(String::new, |pid| format!("pid {pid}, "));
    format!(
        "{owner}{}: {}",
        printable(&item.what),
        printable(&item.reason)
    )
}

fn in_force(word: &str, rules: &Rules) -> String {
    if rules.rules.is_empty() {
        format!("{word}: no rules (seed {})", rules.seed)
    } else {
        let names: Vec<String> = rules.rules.iter().map(|name| printable(name)).collect();
        format!("{word}: {} (seed {})", names.join(", "), rules.seed)
    }
}

fn recovered(recovered: &Recovered) -> Vec<Line> {
    let mut stood_still = micros(recovered.pause_us);
    if recovered.stops > 1 {
        stood_still.push_str(&format!(
            " at most, {} times, for {} descriptors and {} mappings",
            recovered.stops, recovered.descriptors, recovered.mappings
        ));
    }
    let mut lines = vec![Line::plain(format!(
        "recovered: everything is back; the target stood still for {stood_still}"
    ))];
    if !recovered.left.is_empty() {
        lines = vec![Line::plain(format!(
            "recovered, but for what follows; the target stood still for {stood_still}"
        ))];
        lines.extend(
            recovered
                .left
                .iter()
                .map(|item| Line::Warning(format!("left: {}", not_covered(item)))),
        );
    }
    lines.extend(counters(&recovered.rules));
    lines
}

/// The table of counters, and a word on rules that did nothing.
pub(crate) fn counters(rules: &[RuleCounts]) -> Vec<Line> {
    if rules.is_empty() {
        return Vec::new();
    }
    let mut table = Table::new(&["RULE", "EVALUATED", "MATCHED", "INJECTED"]).right(&[1, 2, 3]);
    for rule in rules {
        table.row([
            printable(&rule.name),
            rule.evaluated.to_string(),
            rule.matched.to_string(),
            rule.injected.to_string(),
        ]);
    }
    let mut lines: Vec<Line> = table.lines().into_iter().map(Line::Plain).collect();
    lines.extend(rules.iter().filter_map(idle_rule));
    lines
}

/// Why a rule did nothing, if it did nothing.
fn idle_rule(rule: &RuleCounts) -> Option<Line> {
    let name = printable(&rule.name);
    let text = match (rule.evaluated, rule.matched, rule.injected) {
        (0, 0, _) => format!("rule `{name}` never matched: no operation of its kinds happened"),
        (evaluated, 0, _) => format!(
            "rule `{name}` never matched: its path, caller or range let none of {} through",
            count(evaluated, "operation")
        ),
        (_, matched, 0) => format!(
            "rule `{name}` never fired: its trigger let none of {} through",
            matches(matched)
        ),
        _ => return None,
    };
    Some(Line::Warning(text))
}

fn matches(number: u64) -> String {
    if number == 1 {
        "1 match".to_owned()
    } else {
        format!("{number} matches")
    }
}

fn failed(failed: &Failed) -> Vec<Line> {
    let state = if failed.rolled_back {
        "the target is as it was"
    } else {
        "`hobble recover` is needed"
    };
    let mut lines = vec![Line::Warning(format!(
        "failed at {}: {}; {state}",
        printable(&failed.step),
        printable(&failed.cause)
    ))];
    lines.extend(failed.hint.iter().map(|hint| Line::Hint(printable(hint))));
    lines
}

/// An event as a line of history.
pub(crate) fn history(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::Preflight(preflight) => format!("preflight: {}", preflight.verdict.as_str()),
        EventKind::Attaching(progress) if progress.total > 0 => {
            format!(
                "attaching: {} {}/{}",
                printable(&progress.phase),
                progress.done,
                progress.total
            )
        }
        EventKind::Attaching(progress) => format!("attaching: {}", printable(&progress.phase)),
        _ => match self::event(event).into_iter().next() {
            Some(Line::Plain(text) | Line::Warning(text) | Line::Hint(text)) => text,
            None => event.kind.name().to_owned(),
        },
    };
    format!("{:.3}  {what}", event.time)
}

/// The verdict, the plan and who is affected.
pub(crate) fn preflight(preflight: &Preflight) -> Vec<Line> {
    let mut lines = vec![Line::plain(match preflight.verdict {
        Verdict::Ok => "verdict: ok",
        Verdict::Degraded => "verdict: degraded",
        Verdict::Refuse => "verdict: refuse",
    })];
    for reason in &preflight.reasons {
        lines.push(Line::plain(format!(
            "  {} [{}]",
            printable(&reason.text),
            printable(&reason.code)
        )));
        lines.extend(
            reason
                .hint
                .iter()
                .map(|hint| Line::plain(format!("    hint: {}", printable(hint)))),
        );
    }
    if !preflight.steps.is_empty() {
        lines.push(Line::plain("plan:"));
        let steps = preflight.steps.iter().enumerate();
        lines.extend(
            steps.map(|(number, step)| {
                Line::plain(format!("  {}. {}", number + 1, printable(step)))
            }),
        );
    }
    if !preflight.processes.is_empty() {
        lines.push(Line::plain("affected:"));
        let mut table =
            Table::new(&["PID", "NAME", "DESCRIPTORS", "MAPPINGS", "LOCKS"]).right(&[0, 2, 3, 4]);
        for process in &preflight.processes {
            table.row([
                process.pid.to_string(),
                printable(&process.comm),
                process.descriptors.to_string(),
                process.mappings.to_string(),
                process.locks.to_string(),
            ]);
        }
        lines.extend(table.indented().map(Line::Plain));
    }
    lines
}

/// How long something lasts from now on, or `-`.
fn left(deadline: Option<Timestamp>, now: Timestamp) -> String {
    match deadline {
        None => "forever".to_owned(),
        Some(deadline) if deadline <= now => "0 s".to_owned(),
        Some(deadline) => human_duration(deadline.duration_since(now).unsigned_abs()),
    }
}

fn phase(status: &Status) -> String {
    if status.paused {
        format!("{} (paused)", status.phase.as_str())
    } else {
        status.phase.as_str().to_owned()
    }
}

/// One row for each attachment; of those whose server does not answer there is only the id.
pub(crate) fn list<'a>(
    attachments: impl Iterator<Item = (&'a str, Option<&'a Status>)>,
    now: Timestamp,
) -> Vec<String> {
    let mut table = Table::new(&[
        "ID", "PHASE", "PID", "NAME", "PATH", "SCOPE", "RULES", "INJECTED", "LEFT",
    ])
    .right(&[2, 6, 7]);
    for (id, status) in attachments {
        match status {
            Some(status) => {
                let target = status.targets.first();
                table.row([
                    printable(id),
                    phase(status),
                    target.map_or_else(|| "-".to_owned(), |target| target.pid.to_string()),
                    target.map_or_else(|| "-".to_owned(), |target| printable(&target.comm)),
                    printable(&status.path),
                    status.scope.as_str().to_owned(),
                    status.rules.len().to_string(),
                    status
                        .rules
                        .iter()
                        .map(|rule| rule.injected)
                        .sum::<u64>()
                        .to_string(),
                    left(status.deadline, now),
                ]);
            }
            None => table.row([
                printable(id),
                "lost".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
            ]),
        }
    }
    table.lines()
}

/// Everything about one attachment.
pub(crate) fn status(status: &Status, now: Timestamp) -> Vec<Line> {
    let targets: Vec<String> = status
        .targets
        .iter()
        .map(|target| format!("{} ({})", target.pid, printable(&target.comm)))
        .collect();
    let alive =
        |pid: Option<u32>| pid.map_or_else(|| "dead".to_owned(), |pid| format!("pid {pid}"));
    let deadline = match status.deadline {
        None => "never (until `hobble recover`)".to_owned(),
        Some(at) => format!("{at:.0} (in {})", left(Some(at), now)),
    };
    let deadline = match status.lease {
        None => deadline,
        Some(_) => format!(
            "{deadline}, or in {} unless the lease is renewed",
            left(status.lease, now)
        ),
    };
    let facts = [
        ("id", printable(&status.id)),
        ("phase", phase(status)),
        ("path", printable(&status.path)),
        ("scope", status.scope.as_str().to_owned()),
        (
            "targets",
            if targets.is_empty() {
                "none".to_owned()
            } else {
                targets.join(", ")
            },
        ),
        ("started", format!("{:.0}", status.started)),
        ("recovers", deadline),
        ("seed", status.seed.to_string()),
        ("server", alive(status.server_pid)),
        ("holder", alive(status.holder_pid)),
        (
            "data path",
            if status.passthrough {
                "in the kernel where no rule applies"
            } else {
                "through the server"
            }
            .to_owned(),
        ),
    ];
    let mut lines: Vec<Line> = facts
        .into_iter()
        .map(|(name, value)| Line::plain(format!("{name:<10} {value}")))
        .collect();
    for reason in &status.degraded {
        lines.push(Line::plain(format!(
            "degraded   {} [{}]",
            printable(&reason.text),
            printable(&reason.code)
        )));
    }
    for item in &status.not_covered {
        lines.push(Line::plain(format!("uncovered  {}", not_covered(item))));
    }
    lines.extend(counters(&status.rules));
    lines
}

#[cfg(test)]
mod tests;
