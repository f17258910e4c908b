//! A running target program and the line protocol spoken with it.
//!
//! Owns the process. Invariant: it does not outlive its guard or this process: dropping kills it and all its
//! descendants, end of file on its standard input makes it leave, and the reaper kills it otherwise.
//!
//! Protocol: the program answers on standard output with one JSON object a line. The first is
//! `{"ready":true,"pids":[…]}`; then every command line written to its standard input gets exactly one answer.
//! An answer with a non-empty `errors` list says what the program found wrong with its own files.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::wait_for;
use crate::process::{self, Identity};
use crate::program::Program;
use crate::reaper::{self, Action, Ticket};

/// A JVM on a busy machine takes seconds to say that it is ready.
const START: Duration = Duration::from_secs(60);

/// A running target program.
#[derive(Debug)]
pub struct Target {
    name: String,
    child: Child,
    identity: Identity,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    ready: Value,
    ticket: Option<Ticket>,
}

impl Target {
    /// Starts `program` with `arguments` and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be built or started, or is not ready in a minute.
    pub fn start<I, S>(program: Program, arguments: I) -> Result<Target>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = program.command()?;
        command.args(arguments);
        Target::start_command(command)
    }

    /// Starts any command that speaks the protocol.
    ///
    /// # Errors
    /// As [`Target::start`].
    pub fn start_command(mut command: Command) -> Result<Target> {
        let name = crate::command::describe(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let identity = process::identify(child.id())?;
        let ticket = reaper::register(&Action::Kill(identity))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no standard output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut target = Target {
            name,
            child,
            identity,
            stdin,
            lines,
            ready: Value::Null,
            ticket: Some(ticket),
        };
        target.ready = target.answer(START)?;
        if target.ready.get("ready") != Some(&Value::Bool(true)) {
            bail!("{} did not get ready: {}", target.name, target.ready);
        }
        Ok(target)
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Pid and start time.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its pid and those of the processes that it said to have forked.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.pid()];
        if let Some(list) = self.ready.get("pids").and_then(Value::as_array) {
            pids.extend(
                list.iter()
                    .filter_map(Value::as_u64)
                    .map(|pid| pid as u32)
                    .filter(|pid| *pid != self.identity.pid),
            );
        }
        pids
    }

    /// What it said when it was ready.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// Sends a command without waiting for its answer; [`Target::answer`] gets that.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("{} takes no command", self.name))
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// When none comes within `limit`, the program ends, or the line is not JSON.
    pub fn answer(&mut self, limit: Duration) -> Result<Value> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => {
                serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
            }
            Err(RecvTimeoutError::Timeout) => {
                let state = process::stat(&self.pid().to_string()).map_or('-', |stat| stat.state);
                bail!(
                    "{} gave no answer within {limit:?} (state {state})",
                    self.name
                )
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = wait_for(&mut self.child, Duration::from_secs(5))?;
                bail!("{} ended: {status:?}", self.name)
            }
        }
    }

    /// Sends a command and waits for its answer, at most a minute.
    ///
    /// # Errors
    /// As [`Target::tell`] and [`Target::answer`].
    pub fn ask(&mut self, line: &str) -> Result<Value> {
        self.tell(line)?;
        self.answer(Duration::from_secs(60))
            .with_context(|| format!("asked {line:?}"))
    }

    /// As [`Target::ask`], and fails when the answer lists errors.
    ///
    /// # Errors
    /// Those, in the program's words.
    pub fn expect(&mut self, line: &str) -> Result<Value> {
        let answer = self.ask(line)?;
        no_errors(&answer).with_context(|| format!("{} on {line:?}", self.name))?;
        Ok(answer)
    }

    /// Asks it to leave and waits for a status of 0.
    ///
    /// # Errors
    /// When it reports errors, ends otherwise, or does not end within 20 seconds.
    pub fn finish(mut self) -> Result<Value> {
        let answer = self.expect("quit")?;
        drop(self.stdin.take());
        match wait_for(&mut self.child, Duration::from_secs(20))? {
            Some(status) if status.success() => Ok(answer),
            Some(status) => bail!("{} ended with {status}", self.name),
            None => bail!("{} did not end", self.name),
        }
    }

    /// Sends a signal to its main process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits until its main process has ended, and how long that took; `None` when it still runs after `limit`.
    ///
    /// # Errors
    /// When its status cannot be read.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<(ExitStatus, Duration)>> {
        let start = Instant::now();
        Ok(wait_for(&mut self.child, limit)?.map(|status| (status, start.elapsed())))
    }

    /// Whether the main process runs and no thread of any of its processes is stopped or traced.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn assert_running(&self) -> Result<()> {
        for pid in self.pids() {
            for tid in process::numbers(&format!("/proc/{pid}/task")) {
                let Ok(stat) = process::stat(&format!("{pid}/task/{tid}")) else {
                    continue;
                };
                if matches!(stat.state, 'T' | 't') {
                    bail!(
                        "thread {tid} of {} is left in state {}",
                        self.name,
                        stat.state
                    );
                }
            }
            let tracer = process::status_field(pid, "TracerPid")?;
            if tracer != "0" {
                bail!("{} is left traced by {tracer}", self.name);
            }
        }
        if !process::is_running(self.identity) {
            bail!("{} has died", self.name);
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let pids = process::tree(self.identity.pid);
        if process::is_running(self.identity) {
            for pid in pids.iter().rev() {
                // A process that has ended meanwhile is no error.
                let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            }
        }
        match wait_for(&mut self.child, Duration::from_secs(10)) {
            Ok(Some(_)) => {
                if let Some(ticket) = self.ticket.take() {
                    ticket.done();
                }
            }
            // Stuck in the kernel: the reaper goes on trying once this process is gone.
            Ok(None) => eprintln!("warning: {} survives SIGKILL", self.name),
            Err(error) => eprintln!("warning: {error:#}"),
        }
    }
}

/// Fails with the `errors` of an answer, if there are any.
///
/// # Errors
/// Those, in the program's words.
pub fn no_errors(answer: &Value) -> Result<()> {
    match answer.get("errors").and_then(Value::as_array) {
        Some(list) if list.is_empty() => Ok(()),
        Some(list) => bail!(
            "errors: {}",
            Value::Array(list.iter().take(10).cloned().collect())
        ),
        None => bail!("no list of errors in {answer}"),
    }
}

/// A number in an answer.
///
/// # Errors
/// When it is not there.
pub fn number(answer: &Value, key: &str) -> Result<u64> {
    answer
        .get(key)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number {key} in {answer}"))
}

/// A path as an argument on a target's command line.
///
/// # Errors
/// When it is not UTF-8.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
