//! Driving the built `hobble` binary as its users do.
//!
//! Owns one state directory and what runs in it. Invariant: what was attached is recovered with the guard, or by the reaper
//! once this process is gone; no command is waited for without a limit.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::{self, wait_for};
use crate::process::{self, Identity};
use crate::program::{target_directory, workspace};
use crate::reaper::{self, Action, Ticket};
use crate::scratch::Scratch;

/// Any single step of an attachment, on a busy machine.
pub const STEP: Duration = Duration::from_secs(60);

/// Characters of a line of a log that are worth showing: lists of thousands of descriptors are not.
const LOG_LINE: usize = 400;

/// The binary under test: `$HOBBLE_BIN`, or else built once by Cargo in the profile of the tests.
///
/// # Errors
/// When it does not build.
pub fn binary() -> Result<PathBuf> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || -> Result<PathBuf> {
        if let Some(given) = std::env::var_os("HOBBLE_BIN") {
            return fs::canonicalize(&given)
                .with_context(|| format!("HOBBLE_BIN: no {}", Path::new(&given).display()));
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let target = target_directory();
        command::run(
            Command::new(cargo)
                .args([
                    "build",
                    "--quiet",
                    "--locked",
                    "--package",
                    "hobble",
                    "--features",
                    "hobble/demo",
                    "--target-dir",
                ])
                .arg(&target)
                .current_dir(workspace()),
            Duration::from_secs(540),
        )?;
        fs::canonicalize(target.join("debug/hobble")).context("cargo built no hobble")
    };
    BINARY
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

/// A state directory and the commands run in it.
#[derive(Debug)]
pub struct Hobble {
    binary: PathBuf,
    state: PathBuf,
    environment: Vec<(String, String)>,
    scratch: Scratch,
    ticket: Option<Ticket>,
}

impl Hobble {
    /// A fresh state directory; nothing runs yet.
    ///
    /// # Errors
    /// When the binary does not build.
    pub fn new() -> Result<Hobble> {
        Hobble::with_binary(&binary()?)
    }

    /// As [`Hobble::new`] with a binary of the caller's.
    ///
    /// # Errors
    /// When no directory can be made for it.
    pub fn with_binary(binary: &Path) -> Result<Hobble> {
        let binary = binary.to_owned();
        let scratch = Scratch::new()?;
        let state = scratch.path().join("state");
        let ticket = reaper::register(&Action::Recover(&binary, &state))?;
        Ok(Hobble {
            binary,
            state,
            environment: Vec::new(),
            scratch,
            ticket: Some(ticket),
        })
    }

    /// As [`Hobble::new`], with the state directory elsewhere.
    ///
    /// # Errors
    /// When the binary does not build.
    pub fn with_state_dir(state: &Path) -> Result<Hobble> {
        let mut hobble = Hobble::new()?;
        if let Some(ticket) = hobble.ticket.take() {
            ticket.done();
        }
        hobble.ticket = Some(reaper::register(&Action::Recover(&hobble.binary, state))?);
        hobble.state = state.to_owned();
        Ok(hobble)
    }

    /// Sets an environment variable for every command started from now on.
    pub fn env(&mut self, name: &str, value: &str) -> &mut Hobble {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Takes an environment variable of [`Hobble::env`] back.
    pub fn unset(&mut self, name: &str) -> &mut Hobble {
        self.environment.retain(|(known, _)| known != name);
        self
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// A directory for files of the test, outside every volume.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The command with the state directory and environment set.
    pub fn command<I, S>(&self, arguments: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            // By environment, which tells whose a command is.
            .env("HOBBLE_STATE_DIR", &self.state)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            // A test's own directory may be what it hooks: commands run from elsewhere.
            .current_dir("/");
        command
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it does not end within two minutes; its status is for the caller to judge.
    pub fn output<I, S>(&self, arguments: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        command::output(&mut self.command(arguments), STEP * 2)
    }

    /// Runs a command that must succeed, and returns its standard output.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn run<I, S>(&self, arguments: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        command::run(&mut self.command(arguments), STEP * 2)
    }

    /// Runs a command with `--json` that must succeed, and parses what it printed.
    ///
    /// # Errors
    /// As [`Hobble::run`], and when that is not JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(arguments.iter().chain(&["--json"]))?;
        serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text:?}"))
    }

    /// Starts `hobble inject --json` in the foreground; returns at once.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn inject<I, S>(&self, arguments: I) -> Result<Injection>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.command(["inject", "--json"]);
        command.args(arguments);
        Injection::start(command)
    }

    /// Attaches to `pid` at `path` and waits until the rules are on.
    ///
    /// # Errors
    /// With the `failed` event if there is one.
    pub fn attach(&self, pid: u32, path: &Path, more: &[&str]) -> Result<Injection> {
        let pid = pid.to_string();
        let mut arguments = vec![OsStr::new("--pid"), OsStr::new(&pid), OsStr::new("--path")];
        arguments.push(path.as_os_str());
        arguments.extend(more.iter().map(OsStr::new));
        // An emulated machine may not keep the default; a test that names a bound of its own means it.
        let bound = std::env::var_os("HOBBLE_TEST_MAX_PAUSE");
        if let Some(bound) = bound.as_ref().filter(|_| !more.contains(&"--max-pause")) {
            arguments.extend([OsStr::new("--max-pause"), bound.as_os_str()]);
        }
        let mut injection = self.inject(arguments)?;
        injection.wait_event("injecting", STEP)?;
        Ok(injection)
    }

    /// Processes of this state directory: commands, which have it in their environment, servers and holders, which
    /// have not, but keep files of it open (the journal, the log).
    pub fn processes(&self) -> Vec<u32> {
        let state = self.state.as_os_str().as_encoded_bytes();
        process::numbers("/proc")
            .into_iter()
            .filter(|pid| {
                *pid != std::process::id()
                    && fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| {
                        // A rebuilt binary shows up as "… (deleted)".
                        exe.as_os_str()
                            .as_encoded_bytes()
                            .starts_with(self.binary.as_os_str().as_encoded_bytes())
                    })
                    && (fs::read(format!("/proc/{pid}/environ"))
                        .is_ok_and(|line| contains(&line, state))
                        || has_open(*pid, &self.state))
            })
            .collect()
    }

    /// The holders: processes started by `__serve` that no other of these has for its parent.
    pub fn holders(&self) -> Vec<u32> {
        let serving = self.serving();
        serving
            .iter()
            .filter(|(_, parent)| !serving.iter().any(|(pid, _)| pid == parent))
            .map(|(pid, _)| *pid)
            .collect()
    }

    /// The servers: children of the holders.
    pub fn servers(&self) -> Vec<u32> {
        let serving = self.serving();
        serving
            .iter()
            .filter(|(_, parent)| serving.iter().any(|(pid, _)| pid == parent))
            .map(|(pid, _)| *pid)
            .collect()
    }

    /// Running processes of `__serve` with their parents.
    fn serving(&self) -> Vec<(u32, u32)> {
        self.processes()
            .into_iter()
            .filter(|pid| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| contains(&line, b"__serve"))
            })
            .filter_map(|pid| process::stat(&pid.to_string()).ok().map(|stat| (pid, stat)))
            .filter(|(_, stat)| stat.state != 'Z')
            .map(|(pid, stat)| (pid, stat.parent))
            .collect()
    }

    /// Keeps the logs and journals of the attachments that there are now beyond their end, for [`Hobble::logs`].
    pub fn keep_logs(&self) {
        for (directory, name) in self.log_files(&self.state) {
            let id = directory.file_name().unwrap_or_default();
            let kept = self.scratch.path().join("kept").join(id);
            // Links: what is written to them later is kept too. Best effort, nothing depends on it.
            let _ = fs::create_dir_all(&kept);
            let _ = fs::hard_link(directory.join(name), kept.join(name));
        }
    }

    fn log_files(&self, below: &Path) -> Vec<(PathBuf, &'static str)> {
        fs::read_dir(below)
            .into_iter()
            .flatten()
            .flatten()
            .flat_map(|entry| ["log", "journal"].map(|name| (entry.path(), name)))
            .filter(|(directory, name)| directory.join(name).exists())
            .collect()
    }

    /// What the servers of attachments that are still there, or were kept, have logged, and which steps their journals tell of: for whoever looks into a
    /// failed test.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut files = self.log_files(&self.scratch.path().join("kept"));
        files.extend(self.log_files(&self.state));
        for (directory, name) in files {
            let file = directory.join(name);
            let all = fs::read_to_string(&file).unwrap_or_default();
            text.push_str(&format!("── {}\n", file.display()));
            for line in all.lines() {
                text.extend(line.chars().take(LOG_LINE));
                text.push('\n');
            }
        }
        text
    }

    /// Recovers everything, and fails unless that works and nothing is left in the state directory.
    ///
    /// # Errors
    /// What the command said.
    pub fn recover_all(&self) -> Result<String> {
        self.run(["recover", "--all", "--json"])
    }
}

impl Drop for Hobble {
    fn drop(&mut self) {
        let clean = fs::read_dir(&self.state).map_or(0, Iterator::count) == 0
            && self.processes().is_empty();
        let recovered = clean
            || match self.output(["recover", "--all", "--force"]) {
                Ok(output) => output.status.success(),
                Err(error) => {
                    eprintln!("warning: {error:#}");
                    false
                }
            };
        if !clean {
            for pid in self.processes() {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
        }
        if recovered && let Some(ticket) = self.ticket.take() {
            ticket.done();
        }
    }
}

/// Whether a process has a file below `directory` open.
fn has_open(pid: u32, directory: &Path) -> bool {
    process::numbers(&format!("/proc/{pid}/fd"))
        .into_iter()
        .any(|number| {
            fs::read_link(format!("/proc/{pid}/fd/{number}"))
                .is_ok_and(|link| link.starts_with(directory))
        })
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty()
        && haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

/// A `hobble inject --json` in the foreground.
#[derive(Debug)]
pub struct Injection {
    child: Child,
    identity: Identity,
    lines: Receiver<String>,
    stderr: Arc<Mutex<Vec<u8>>>,
    events: Vec<Value>,
    ticket: Option<Ticket>,
}

impl Injection {
    fn start(mut command: Command) -> Result<Injection> {
        let name = command::describe(&command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let identity = process::identify(child.id())?;
        let ticket = reaper::register(&Action::Kill(identity))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let mut errors = child.stderr.take().context("no standard error")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&stderr);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = errors.read(&mut buffer) {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(buffer.iter().take(length));
            }
        });
        Ok(Injection {
            child,
            identity,
            lines,
            stderr,
            events: Vec::new(),
            ticket: Some(ticket),
        })
    }

    /// The pid of the command itself.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Every event so far.
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    /// The event of this name, if it has been seen.
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.events
            .iter()
            .find(|event| event.get("event").and_then(Value::as_str) == Some(name))
    }

    /// The id of the attachment.
    ///
    /// # Errors
    /// Before the first event.
    pub fn id(&self) -> Result<&str> {
        self.events
            .iter()
            .filter_map(|event| event.get("id").and_then(Value::as_str))
            .find(|id| !id.is_empty())
            .context("no event has named the attachment yet")
    }

    /// What it has said on standard error.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap_or_else(PoisonError::into_inner))
            .into_owned()
    }

    /// Waits for the next event; `None` when the command has closed its standard output.
    ///
    /// # Errors
    /// When none comes within `limit`, or a line is no JSON object with `v`, `time`, `id` and `event`.
    pub fn next_event(&mut self, limit: Duration) -> Result<Option<Value>> {
        let line = match self.lines.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("no event within {limit:?}; {}", self.said()),
        };
        let event: Value = serde_json::from_str(&line)
            .with_context(|| format!("`inject --json` printed {line:?}"))?;
        for key in ["v", "time", "id", "event"] {
            if event.get(key).is_none() {
                bail!("no {key} in {line}");
            }
        }
        self.events.push(event.clone());
        Ok(Some(event))
    }

    /// Waits for an event of this name.
    ///
    /// # Errors
    /// When the command fails or ends first, or `limit` passes.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        if let Some(event) = self.event(name) {
            return Ok(event.clone());
        }
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self
                .next_event(left)
                .with_context(|| format!("waiting for `{name}`"))?
            {
                Some(event) if event.get("event").and_then(Value::as_str) == Some(name) => {
                    return Ok(event);
                }
                Some(event) if event.get("event").and_then(Value::as_str) == Some("failed") => {
                    bail!("waiting for `{name}`: {event}; {}", self.said())
                }
                Some(_) => {}
                None => bail!(
                    "ended before `{name}` ({:?}): {}",
                    wait_for(&mut self.child, STEP)?,
                    self.said()
                ),
            }
        }
    }

    /// Sends a signal to the command.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).context("the command is gone")
    }

    /// Interrupts it as Ctrl-C does, waits for `recovered` and for a status of 0; returns that event.
    ///
    /// # Errors
    /// When recovery fails or anything is left.
    pub fn recover(mut self) -> Result<Value> {
        self.signal(Signal::SIGINT)?;
        let event = self.wait_event("recovered", STEP)?;
        let status = self.status(STEP)?;
        if !status.success() {
            bail!("recovered, but ended with {status}: {}", self.said());
        }
        if let Some(left) = event.get("left").and_then(Value::as_array)
            && !left.is_empty()
        {
            bail!("recovery left {left:?}");
        }
        Ok(event)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn status(&mut self, limit: Duration) -> Result<ExitStatus> {
        let status = wait_for(&mut self.child, limit)?.context("the command does not end")?;
        if let Some(ticket) = self.ticket.take() {
            ticket.done();
        }
        Ok(status)
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        if self.ticket.is_none() {
            return;
        }
        // First as a user would, so that the target is put back; then by force.
        for (signal, limit) in [(Signal::SIGINT, 20), (Signal::SIGKILL, 10)] {
            if matches!(self.child.try_wait(), Ok(None)) {
                let _ = self.signal(signal);
            }
            if matches!(
                wait_for(&mut self.child, Duration::from_secs(limit)),
                Ok(Some(_))
            ) {
                if let Some(ticket) = self.ticket.take() {
                    ticket.done();
                }
                return;
            }
        }
        eprintln!("warning: hobble inject ({}) survives SIGKILL", self.pid());
    }
}
