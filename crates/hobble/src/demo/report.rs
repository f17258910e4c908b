//! What the demo prints: a running commentary and a summary for people, or one JSON object a line.

use std::path::Path;
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind};
use serde::Serialize;

use super::descriptors::Descriptor;
use super::place::Place;
use super::protocol::PhaseReport;
use super::writer::{DATABASE, latency_histogram, per_second};
use super::{FAILING_WRITES, Findings, SLOW_SYNC};
use crate::out::{Out, Style, Table, human_duration};
use crate::render::{self, Line};

/// Upper bounds of the histogram's columns, in microseconds; one more column takes the rest.
const BUCKETS_US: [u64; 8] = [500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000];

/// The phases, as people call them.
fn title(phase: &str) -> &str {
    match phase {
        "native" => "native",
        "attached" => "attached, no rules",
        "slow-sync" => "20 ms on WAL syncs",
        "failing-writes" => "EIO on 10 % of writes",
        "recovered" => "recovered",
        other => other,
    }
}

/// A claim of the summary, and whether it held.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    name: &'static str,
    ok: bool,
    text: String,
}

impl Check {
    pub(super) fn new(name: &'static str, ok: bool, text: String) -> Self {
        Self { name, ok, text }
    }
}

/// The JSON lines of the demo, beside those of the attachment.
#[derive(Debug, Serialize)]
#[serde(tag = "event")]
pub(super) enum DemoEvent<'a> {
    /// The writer commits.
    #[serde(rename = "demo_started")]
    Started {
        pid: u32,
        directory: &'a Path,
        filesystem: &'a str,
        disk: bool,
    },
    /// What the writer has open.
    #[serde(rename = "demo_descriptors")]
    Descriptors {
        state: &'a str,
        pid: u32,
        descriptors: &'a [Descriptor],
    },
    /// A phase is over.
    #[serde(rename = "demo_phase")]
    Phase(PhaseLine<'a>),
    /// The judgement.
    #[serde(rename = "demo_finished")]
    Finished {
        ok: bool,
        checks: &'a [Check],
        pause_us: Change,
        longest_gap_us: Gaps,
        commands: Vec<String>,
    },
}

/// Two figures: attaching and recovering.
#[derive(Debug, Serialize)]
pub(super) struct Change {
    attach: u64,
    recover: u64,
}

/// The longest gaps that the writer's clock saw.
#[derive(Debug, Serialize)]
pub(super) struct Gaps {
    native: u64,
    attach: u64,
    recover: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct PhaseLine<'a> {
    #[serde(flatten)]
    report: &'a PhaseReport,
    commits_per_second: f64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

/// Quantiles of a phase in microseconds: median, 99 %, and the maximum.
fn quantiles(report: &PhaseReport) -> (u64, u64, u64) {
    let Ok(mut histogram) = latency_histogram() else {
        return (0, 0, 0);
    };
    for &(value, times) in &report.latencies_us {
        histogram.saturating_record_n(value, times);
    }
    (
        histogram.value_at_quantile(0.5),
        histogram.value_at_quantile(0.99),
        histogram.max(),
    )
}

/// The median latency of a commit.
pub(super) fn median(report: &PhaseReport) -> Duration {
    Duration::from_micros(quantiles(report).0)
}

/// How this program was called, for commands to be typed.
pub(super) fn program() -> String {
    std::env::args()
        .next()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "hobble".to_owned())
}

/// Text as one word of a shell command.
fn shell_word(text: &str) -> String {
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "/._-+:@%".contains(character);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Shares of the histogram's columns in percent.
fn shares(report: &PhaseReport) -> Vec<String> {
    let mut counts = vec![0_u64; BUCKETS_US.len() + 1];
    for &(value, times) in &report.latencies_us {
        let column = BUCKETS_US.partition_point(|&bound| bound < value);
        if let Some(count) = counts.get_mut(column) {
            *count += times;
        }
    }
    let all: u64 = counts.iter().sum();
    counts
        .into_iter()
        .map(|count| match (count, count * 200 >= all) {
            (0, _) => "·".to_owned(),
            (_, false) => "<1".to_owned(),
            // Rounded to the nearest.
            (_, true) => ((count * 200 + all) / (2 * all)).to_string(),
        })
        .collect()
}

/// Prints.
pub(super) struct Reporter<'a> {
    out: &'a mut Out,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(out: &'a mut Out) -> Self {
        Self { out }
    }

    fn demo_event(&mut self, id: &str, event: &DemoEvent<'_>) {
        #[derive(Serialize)]
        struct Line<'a> {
            time: Timestamp,
            id: &'a str,
            #[serde(flatten)]
            event: &'a DemoEvent<'a>,
        }
        self.out.object(&Line {
            time: Timestamp::now(),
            id,
            event,
        });
    }

    /// An event of the attachment: a JSON line; people read the demo's own words, and what was moved.
    pub(super) fn event(&mut self, event: &Event) {
        self.out.event(event);
        if matches!(event.kind, EventKind::Attached(_)) {
            self.out.line("");
            for line in render::event(event) {
                match line {
                    Line::Plain(text) | Line::Warning(text) => self.out.line(text),
                    Line::Hint(_) => {}
                }
            }
        }
    }

    pub(super) fn started(&mut self, pid: u32, place: &Place) {
        let directory = place.path();
        self.demo_event(
            "demo",
            &DemoEvent::Started {
                pid,
                directory,
                filesystem: &place.filesystem,
                disk: place.is_disk(),
            },
        );
        let heading = self.out.paint(
            Style::Bold,
            "A live SQLite database, hooked, broken on purpose, and given back",
        );
        self.out.line(heading);
        self.out.line(format!(
            "pid {pid} commits row after row to {} (WAL, synchronous=FULL, on {})",
            directory.join(DATABASE).display(),
            place.filesystem
        ));
        if !place.is_disk() {
            self.out.warn(
                "note:",
                &format!(
                    "{} is no disk: native syncs cost nothing there (--dir names another place)",
                    place.filesystem
                ),
            );
        }
    }

    pub(super) fn descriptors(&mut self, state: &str, pid: u32, descriptors: &[Descriptor]) {
        self.demo_event(
            "demo",
            &DemoEvent::Descriptors {
                state,
                pid,
                descriptors,
            },
        );
        self.out.line("");
        let heading = self
            .out
            .paint(Style::Bold, &format!("What pid {pid} has open, {state}"));
        self.out.line(heading);
        let mut table = Table::new(&["FD", "FILE", "MOUNT", "FILESYSTEM"]).right(&[0, 2]);
        for descriptor in descriptors {
            let name = descriptor
                .path
                .file_name()
                .unwrap_or(descriptor.path.as_os_str());
            table.row([
                descriptor.fd.to_string(),
                name.to_string_lossy().into_owned(),
                descriptor.mount.to_string(),
                descriptor.filesystem.clone(),
            ]);
        }
        for line in table.indented() {
            self.out.line(line);
        }
    }

    pub(super) fn rule(&mut self, fault: &str) {
        self.out.line("");
        let rule = self.out.paint(Style::Warn, fault);
        self.out.line(format!("Rule now in force: {rule}"));
    }

    pub(super) fn waiting(&mut self, now: Instant, phase: &str, left: Duration) {
        self.out.progress(
            now,
            &format!("{}: {:.0} s to go", title(phase), left.as_secs_f64()),
        );
    }

    pub(super) fn phase(&mut self, report: &PhaseReport) {
        self.out.progress_done();
        let (p50_us, p99_us, max_us) = quantiles(report);
        let commits_per_second = per_second(report);
        self.demo_event(
            "demo",
            &DemoEvent::Phase(PhaseLine {
                report,
                commits_per_second,
                p50_us,
                p99_us,
                max_us,
            }),
        );
        let human = |micros| human_duration(Duration::from_micros(micros));
        self.out.line(format!(
            "{}: {commits_per_second:.0} commits/s, median {}, 99 % {}",
            title(&report.name),
            human(p50_us),
            human(p99_us),
        ));
        for (name, times) in &report.errors {
            self.out.line(format!(
                "  the application got {name} {times} times and tried again"
            ));
        }
    }

    /// The summary; whether every claim held.
    pub(super) fn finished(
        &mut self,
        findings: &Findings,
        checks: &[Check],
        directory: &Path,
        seed: u64,
    ) -> bool {
        let ok = checks.iter().all(|check| check.ok);
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let native_gap = findings
            .phase("native")
            .map_or(0, |phase| phase.longest_gap_us);
        let commands = by_hand(directory, seed);
        self.demo_event(
            "demo",
            &DemoEvent::Finished {
                ok,
                checks,
                pause_us: Change {
                    attach: micros(findings.attach_pause),
                    recover: micros(findings.recover_pause),
                },
                longest_gap_us: Gaps {
                    native: native_gap,
                    attach: micros(findings.attach_gap),
                    recover: micros(findings.recover_gap),
                },
                commands: commands.clone(),
            },
        );
        self.histogram(&findings.phases);
        self.standstill(findings, Duration::from_micros(native_gap));
        self.out.line("");
        for check in checks {
            let mark = if check.ok {
                self.out.paint(Style::Good, "ok  ")
            } else {
                self.out.paint(Style::Bad, "FAIL")
            };
            self.out.line(format!("{mark}  {}", check.text));
        }
        self.out.line("");
        let heading = self.out.paint(Style::Bold, "The same by hand, as root");
        self.out.line(heading);
        for command in &commands {
            self.out.line(format!("  {command}"));
        }
        self.out.line("");
        let verdict = if ok {
            self.out.paint(
                Style::Good,
                "Everything was put back, and nothing was lost.",
            )
        } else {
            self.out
                .paint(Style::Bad, "Something is off: see the lines marked FAIL.")
        };
        self.out.line(verdict);
        ok
    }

    fn histogram(&mut self, phases: &[PhaseReport]) {
        self.out.line("");
        let heading = self.out.paint(
            Style::Bold,
            "Latency of a commit, retries included: percent of commits up to so many ms",
        );
        self.out.line(heading);
        let mut table = Table::new(&[
            "PHASE",
            "COMMITS/S",
            "MEDIAN",
            "99 %",
            "ERRORS",
            "0.5",
            "1",
            "2",
            "5",
            "10",
            "20",
            "50",
            "100",
            "MORE",
        ])
        .right(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        for phase in phases {
            let (p50, p99, _) = quantiles(phase);
            let mut cells = vec![
                title(&phase.name).to_owned(),
                format!("{:.0}", per_second(phase)),
                human_duration(Duration::from_micros(p50)),
                human_duration(Duration::from_micros(p99)),
                phase.error_count().to_string(),
            ];
            cells.extend(shares(phase));
            table.row(cells);
        }
        for line in table.indented() {
            self.out.line(line);
        }
    }

    fn standstill(&mut self, findings: &Findings, native_gap: Duration) {
        self.out.line("");
        let heading = self
            .out
            .paint(Style::Bold, "How long the program stood still");
        self.out.line(heading);
        let mut table = Table::new(&[
            "",
            "MEASURED BY HOBBLE",
            "LONGEST GAP ON THE PROGRAM'S OWN CLOCK",
        ])
        .right(&[1, 2]);
        let native = [
            String::from("native"),
            "-".to_owned(),
            human_duration(native_gap),
        ];
        table.row(native);
        table.row([
            "attaching".to_owned(),
            human_duration(findings.attach_pause),
            human_duration(findings.attach_gap),
        ]);
        table.row([
            "recovering".to_owned(),
            human_duration(findings.recover_pause),
            human_duration(findings.recover_gap),
        ]);
        for line in table.indented() {
            self.out.line(line);
        }
    }
}

/// The commands that do the same step by step.
fn by_hand(directory: &Path, seed: u64) -> Vec<String> {
    let program = shell_word(&program());
    let parent = directory.parent().unwrap_or(directory);
    let place = parent.join("hobble-by-hand");
    let place = shell_word(&place.to_string_lossy());
    vec![
        format!("{program} demo-writer --dir {place} &"),
        format!("{program} inject --pid $! --path {place} --no-rules --detach"),
        format!("{program} update --fault '{SLOW_SYNC}'"),
        format!("{program} update --fault '{FAILING_WRITES}' --seed {seed}"),
        format!("{program} show"),
        format!("{program} recover"),
        "kill $!    # the writer then counts its rows".to_owned(),
        format!("rm -r {place}"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(latencies_us: Vec<(u64, u64)>) -> PhaseReport {
        PhaseReport {
            name: "native".into(),
            seconds: 2.0,
            commits: 4,
            latencies_us,
            ..PhaseReport::default()
        }
    }

    #[test]
    fn columns_of_the_histogram_hold_what_is_up_to_their_bound() {
        let report = phase(vec![(500, 1), (501, 1), (20_000, 1), (1_000_000, 1)]);
        assert_eq!(
            shares(&report),
            ["25", "25", "·", "·", "·", "25", "·", "·", "25"]
        );
        let report = phase(vec![(1, 999), (60_000, 1)]);
        assert_eq!(
            shares(&report),
            ["100", "·", "·", "·", "·", "·", "·", "<1", "·"]
        );
        assert_eq!(shares(&phase(vec![])).len(), 9);
    }

    #[test]
    fn the_median_is_that_of_the_recorded_latencies() {
        let report = phase(vec![(1_000, 3), (30_000, 1)]);
        assert!(median(&report).abs_diff(Duration::from_millis(1)) < Duration::from_micros(20));
    }

    #[test]
    fn words_for_the_shell() {
        assert_eq!(shell_word("/var/tmp/a-b"), "/var/tmp/a-b");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
    }

    #[test]
    fn commands_by_hand_use_the_rules_of_the_demo() {
        let commands = by_hand(Path::new("/var/tmp/hobble-demo-x"), 7).join("\n");
        assert!(
            commands.contains(SLOW_SYNC) && commands.contains(FAILING_WRITES),
            "{commands}"
        );
        assert!(
            commands.contains("--path /var/tmp/hobble-by-hand"),
            "{commands}"
        );
    }
}
