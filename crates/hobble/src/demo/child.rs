//! The demo's end of its writer: start, orders, answers, end.
//!
//! Invariant: the writer does not outlive this value; it is killed and reaped when dropped, and the writer itself asks the
//! kernel to be killed with the demo.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::protocol::{Answer, Order, PhaseReport};

/// How long an answer may take: an order is taken between two commits, and a commit may have to wait for many delayed syncs.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// How often a wait looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(50);

/// A running writer.
#[derive(Debug)]
pub(crate) struct Writer {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<anyhow::Result<Answer>>,
}

/// What the writer counted over its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Rows whose commit was acknowledged.
    pub(crate) committed: u64,
    /// Rows found although their commit had been reported as failed.
    pub(crate) phantoms: u64,
    /// Looks at the table that found a wrong number of rows.
    pub(crate) misreads: u64,
}

impl Writer {
    /// Starts the writer on a database in `directory` and waits until it commits.
    pub(crate) fn start(
        directory: &Path,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("demo-writer")
            .arg("--driven")
            .arg("--dir")
            .arg(directory)
            // Its working directory stays outside, and Ctrl-C at the terminal goes to the demo alone.
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("start the writer")?;
        let (Some(orders), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            anyhow::bail!("the writer was started without pipes");
        };
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let answer = line.context("read from the writer").and_then(|line| {
                    serde_json::from_str(&line).with_context(|| format!("the writer says {line:?}"))
                });
                if sender.send(answer).is_err() {
                    return;
                }
            }
        });
        let mut writer = Self {
            child,
            orders,
            answers,
        };
        match writer.answer(interrupted)? {
            Answer::Ready => Ok(writer),
            other => anyhow::bail!("the writer says {other:?} instead of being ready"),
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the phase under way, begins another, and returns what the writer saw during the one that ended.
    pub(crate) fn phase(
        &mut self,
        next: &str,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> anyhow::Result<PhaseReport> {
        self.order(&Order::Phase(next.to_owned()))?;
        match self.answer(interrupted)? {
            Answer::Phase(report) => Ok(report),
            other => anyhow::bail!("the writer says {other:?} instead of reporting a phase"),
        }
    }

    /// Ends the writer in good order: what it saw during its last phase, and its totals.
    pub(crate) fn finish(
        mut self,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> anyhow::Result<(PhaseReport, Totals)> {
        self.order(&Order::Stop)?;
        let report = match self.answer(interrupted)? {
            Answer::Phase(report) => report,
            other => anyhow::bail!("the writer says {other:?} instead of reporting a phase"),
        };
        let totals = match self.answer(interrupted)? {
            Answer::Done {
                committed,
                phantoms,
                misreads,
            } => Totals {
                committed,
                phantoms,
                misreads,
            },
            other => anyhow::bail!("the writer says {other:?} instead of being done"),
        };
        let status = self.child.wait().context("wait for the writer")?;
        anyhow::ensure!(status.success(), "the writer ended with {status}");
        Ok((report, totals))
    }

    fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        let sent = self
            .orders
            .write_all(order.to_line().as_bytes())
            .and_then(|()| self.orders.flush());
        sent.with_context(|| format!("tell the writer (pid {}) what to do", self.child.id()))
    }

    fn answer(&mut self, interrupted: &mut dyn FnMut() -> bool) -> anyhow::Result<Answer> {
        let until = Instant::now() + ANSWER_WITHIN;
        loop {
            match self.answers.recv_timeout(LOOK) {
                Ok(Ok(Answer::Broken { cause })) => anyhow::bail!("the writer gives up: {cause}"),
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().context("wait for the writer")?;
                    anyhow::bail!("the writer ended unexpectedly ({status})");
                }
                Err(RecvTimeoutError::Timeout) => {
                    anyhow::ensure!(!interrupted(), "interrupted");
                    anyhow::ensure!(
                        Instant::now() < until,
                        "the writer (pid {}) did not answer within {} s",
                        self.child.id(),
                        ANSWER_WITHIN.as_secs()
                    );
                }
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Errors mean that it has ended and been reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
