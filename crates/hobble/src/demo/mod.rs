//! `hobble demo`: a live SQLite database is hooked, slowed down, made to fail and given back, and nothing is lost.
//!
//! Owns the order of the acts and the judgement at the end. Invariants: the hook is taken away before the writer is ended and
//! before the directory is removed, whatever happens and whoever interrupts; a claim of the summary is a [`Check`] that can
//! fail, and one that fails makes the exit code 1.

mod child;
mod descriptors;
mod hook;
mod place;
mod protocol;
mod report;
mod writer;

use std::time::{Duration, Instant};

use anyhow::Context;
use hobble_api::exit::ExitCode;

use crate::cli::{Demo, Global};
use crate::fail::{Fail, Outcome};
use crate::out::{Out, human_duration};
use crate::signals::Signals;

use child::{Totals, Writer};
use descriptors::Descriptor;
use hook::Hook;
use place::Place;
use protocol::PhaseReport;
use report::{Check, Reporter};

pub(crate) use writer::run as run_writer;

/// The rule of the third phase.
const SLOW_SYNC: &str = "latency=20ms op=fsync path=*-wal";
/// What [`SLOW_SYNC`] adds to a commit.
const SLOW_SYNC_LATENCY: Duration = Duration::from_millis(20);
/// The rule of the fourth phase.
const FAILING_WRITES: &str = "errno=EIO percent=10 op=write";
/// How often waits look for interruptions and events.
const LOOK: Duration = Duration::from_millis(50);

/// Runs the demo.
pub(crate) fn run(args: &Demo, global: &Global, out: &mut Out) -> Outcome<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Fail::usage(
            "the demo attaches to a running process and mounts a filesystem: it needs root",
        )
        .hint(format!("sudo {} demo", report::program()))
        .exiting(ExitCode::Failed.code()));
    }
    let signals = Signals::install()?;
    let place = Place::find(args.dir.as_deref()).map_err(Fail::failed)?;
    let mut stage = Stage {
        hook: None,
        writer: None,
        signals,
    };
    let mut reporter = Reporter::new(out);
    let judged = stage.perform(args, global, &place, &mut reporter);
    // The curtain: hook off first, then the writer, then the directory.
    let put_back = stage.hook.take().map_or(Ok(()), |hook| hook.abandon());
    drop(stage.writer.take());
    if let Err(error) = put_back {
        let left = place.keep();
        return Err(Fail::failed(error)
            .step("demo")
            .context("the demo could not put everything back")
            .hint(format!(
                "{} recover --all; then remove {}",
                report::program(),
                left.display()
            ))
            .exiting(ExitCode::NeedsRecovery.code()));
    }
    match judged {
        Ok(true) => place.remove().map_err(Fail::failed),
        Ok(false) => {
            let left = place.keep();
            Err(
                Fail::failed(anyhow::anyhow!("the demo did not go as it should"))
                    .step("demo")
                    .hint(format!("the database is kept in {}", left.display())),
            )
        }
        Err(_) if stage.signals.count() > 0 => Err(Fail::failed(anyhow::anyhow!(
            "interrupted; everything has been put back"
        ))
        .step("demo")),
        Err(error) => Err(Fail::failed(error)
            .step("demo")
            .context("the demo was broken off; everything has been put back")
            .hint(format!("{} doctor", report::program()))),
    }
}

/// What is running.
struct Stage {
    hook: Option<Hook>,
    writer: Option<Writer>,
    signals: Signals,
}

/// What the phases brought to light.
struct Findings {
    native: Vec<Descriptor>,
    hooked: Vec<Descriptor>,
    given_back: Vec<Descriptor>,
    same_process: bool,
    phases: Vec<PhaseReport>,
    attach_pause: Duration,
    attach_gap: Duration,
    recover_pause: Duration,
    recover_gap: Duration,
    slow_injected: u64,
    failing_injected: u64,
    left: usize,
}

impl Stage {
    /// All acts; whether every claim held.
    fn perform(
        &mut self,
        args: &Demo,
        global: &Global,
        place: &Place,
        reporter: &mut Reporter<'_>,
    ) -> anyhow::Result<bool> {
        let directory = place.path();
        let signals = self.signals.clone();
        let mut interrupted = || signals.count() > 0;
        let writer = Writer::start(directory, &mut interrupted)?;
        let pid = writer.pid();
        let started = descriptors::start_time(pid)?;
        self.writer = Some(writer);
        reporter.started(pid, place);
        let native = descriptors::below(pid, directory)?;
        reporter.descriptors("native", pid, &native);

        let mut phases = Vec::new();
        self.order("native")?;
        phases.push(self.act("native", args.phase, "attaching", reporter)?);

        let options = hook::options(pid, directory, global, args.seed);
        self.hook = Some(Hook::attach(&options, reporter, &mut interrupted)?);
        let attach_gap = gap(&self.order("attached")?);
        let hooked = descriptors::below(pid, directory)?;
        reporter.descriptors("hooked", pid, &hooked);
        phases.push(self.act("attached", args.phase, "between", reporter)?);

        let slow_injected = self.faulty_act("slow-sync", SLOW_SYNC, args, &mut phases, reporter)?;
        let failing_injected = self.faulty_act(
            "failing-writes",
            FAILING_WRITES,
            args,
            &mut phases,
            reporter,
        )?;

        self.order("recovering")?;
        let hook = self.hook.as_mut().context("the hook is gone")?;
        let attach_pause = hook.attach_pause();
        let recovered = hook.recover(reporter)?;
        self.hook = None;
        let recover_gap = gap(&self.order("recovered")?);
        let given_back = descriptors::below(pid, directory)?;
        reporter.descriptors("native again", pid, &given_back);
        phases.push(self.act("recovered", args.phase, "end", reporter)?);
        let same_process = descriptors::start_time(pid).is_ok_and(|time| time == started);

        let writer = self.writer.take().context("the writer is gone")?;
        let (_, totals) = writer.finish(&mut interrupted)?;
        let verification = writer::verify(directory)?;
        let findings = Findings {
            native,
            hooked,
            given_back,
            same_process,
            phases,
            attach_pause,
            attach_gap,
            recover_pause: Duration::from_micros(recovered.pause_us),
            recover_gap,
            slow_injected,
            failing_injected,
            left: recovered.left.len(),
        };
        let checks = findings.judge(totals, &verification);
        Ok(reporter.finished(&findings, &checks, directory, args.seed))
    }

    /// Puts one rule in force, runs a phase under it, and says how often it fired.
    fn faulty_act(
        &mut self,
        name: &str,
        fault: &str,
        args: &Demo,
        phases: &mut Vec<PhaseReport>,
        reporter: &mut Reporter<'_>,
    ) -> anyhow::Result<u64> {
        let hook = self.hook.as_mut().context("the hook is gone")?;
        hook.update(fault, args.seed, reporter)?;
        self.order(name)?;
        let report = self.act(name, args.phase, "between", reporter)?;
        phases.push(report);
        self.hook.as_mut().context("the hook is gone")?.injected()
    }

    /// Begins a window of the writer and returns the one that ended.
    fn order(&mut self, next: &str) -> anyhow::Result<PhaseReport> {
        let signals = self.signals.clone();
        let writer = self.writer.as_mut().context("the writer is gone")?;
        writer.phase(next, &mut || signals.count() > 0)
    }

    /// Lets the writer work for a while, then ends its window and prints what it saw.
    fn act(
        &mut self,
        name: &str,
        length: Duration,
        next: &str,
        reporter: &mut Reporter<'_>,
    ) -> anyhow::Result<PhaseReport> {
        let until = Instant::now() + length;
        loop {
            let now = Instant::now();
            if now >= until {
                break;
            }
            anyhow::ensure!(self.signals.count() == 0, "interrupted");
            reporter.waiting(now, name, until - now);
            match self.hook.as_mut() {
                Some(hook) => hook.watch(LOOK.min(until - now), reporter)?,
                None => std::thread::sleep(LOOK.min(until - now)),
            }
        }
        let report = self.order(next)?;
        reporter.phase(&report);
        Ok(report)
    }
}

fn gap(report: &PhaseReport) -> Duration {
    Duration::from_micros(report.longest_gap_us)
}

impl Findings {
    fn phase(&self, name: &str) -> Option<&PhaseReport> {
        self.phases.iter().find(|phase| phase.name == name)
    }

    /// Every claim of the summary.
    fn judge(&self, totals: Totals, found: &writer::Verification) -> Vec<Check> {
        let numbers = |descriptors: &[Descriptor]| -> Vec<(u32, std::path::PathBuf)> {
            descriptors
                .iter()
                .map(|descriptor| (descriptor.fd, descriptor.path.clone()))
                .collect()
        };
        let median = |name| self.phase(name).map_or(Duration::ZERO, report::median);
        let errors = |name| self.phase(name).map_or(0, PhaseReport::error_count);
        let abandoned: u64 = self.phases.iter().map(|phase| phase.abandoned).sum();
        let idle: Vec<&str> = self
            .phases
            .iter()
            .filter(|phase| phase.commits == 0)
            .map(|phase| phase.name.as_str())
            .collect();
        let failing = self.phase("failing-writes");
        let retried = failing.map_or(0, |phase| phase.retried);
        let io_errors: u64 = failing.map_or(0, |phase| {
            phase
                .errors
                .iter()
                .filter(|(name, _)| name.starts_with("SQLITE_IOERR"))
                .map(|(_, times)| times)
                .sum()
        });
        let stray =
            errors("native") + errors("attached") + errors("slow-sync") + errors("recovered");
        vec![
            Check::new(
                "same process and descriptors",
                self.same_process
                    && !self.native.is_empty()
                    && numbers(&self.native) == numbers(&self.hooked)
                    && numbers(&self.native) == numbers(&self.given_back),
                "same pid, same descriptor numbers, same files: native, hooked, native again"
                    .to_owned(),
            ),
            Check::new(
                "all hooked",
                !self.hooked.is_empty() && self.hooked.iter().all(Descriptor::is_hooked),
                format!(
                    "{} of {} descriptors went through the hook while attached",
                    self.hooked
                        .iter()
                        .filter(|descriptor| descriptor.is_hooked())
                        .count(),
                    self.hooked.len()
                ),
            ),
            Check::new(
                "all given back",
                self.left == 0
                    && self.given_back.len() == self.native.len()
                    && self
                        .given_back
                        .iter()
                        .zip(&self.native)
                        .all(|(now, then)| now.mount == then.mount),
                "every descriptor is back on the mount it came from".to_owned(),
            ),
            Check::new(
                "it never stopped working",
                idle.is_empty() && abandoned == 0,
                if idle.is_empty() {
                    "the application committed in every phase and gave no row up".to_owned()
                } else {
                    format!(
                        "no commits during: {}; {abandoned} rows given up",
                        idle.join(", ")
                    )
                },
            ),
            Check::new(
                "slow sync",
                median("slow-sync") >= SLOW_SYNC_LATENCY
                    && self.slow_injected > 0
                    && median("attached") < SLOW_SYNC_LATENCY,
                format!(
                    "`{SLOW_SYNC}` fired {} times: median commit {} instead of {}",
                    self.slow_injected,
                    human_duration(median("slow-sync")),
                    human_duration(median("attached")),
                ),
            ),
            Check::new(
                "failing writes",
                self.failing_injected > 0 && io_errors > 0 && retried > 0,
                format!(
                    "`{FAILING_WRITES}` fired {} times: the application saw {io_errors} SQLITE_IOERR, and {retried} of its commits \
                     succeeded on a further attempt",
                    self.failing_injected,
                ),
            ),
            Check::new(
                "nothing but what the rules say",
                stray == 0 && median("recovered") < SLOW_SYNC_LATENCY,
                format!(
                    "{stray} errors in the phases without a failing rule; median commit after recovery {}",
                    human_duration(median("recovered"))
                ),
            ),
            Check::new(
                "integrity",
                found.integrity == "ok",
                format!("PRAGMA integrity_check says {:?}", found.integrity),
            ),
            Check::new(
                "nothing lost",
                found.rows == totals.committed && totals.phantoms == 0 && totals.misreads == 0,
                format!(
                    "{} rows committed, {} rows found{}",
                    totals.committed,
                    found.rows,
                    match (totals.phantoms, totals.misreads) {
                        (0, 0) => String::new(),
                        (phantoms, misreads) => format!(
                            "; {phantoms} committed though reported as failed, {misreads} wrong looks meanwhile"
                        ),
                    }
                ),
            ),
        ]
    }
}
