//! Starting an attachment, and the session that owns it.
//!
//! Invariant: an attachment that was not told to stay outlives its session by no more than a recovery. The session holds one end of a
//! socket pair, the *lifeline*; the server recovers when it reads its end-of-file, whatever ended the session.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hobble_api::event::Event;
use hobble_api::exit::ExitCode;
use hobble_api::status::Scope;
use hobble_graft::ids::{Pid, ProcessId};
use serde::{Deserialize, Serialize};

use crate::client::{Client, Events};
use crate::error::{AttachError, Step};
use crate::journal::Who;
use crate::options::{Failover, InjectOptions, Lifetime};
use crate::own::Own;
use crate::state_dir::{AttachmentDir, StateDir};

/// The hidden first argument that turns the program into holder and server.
pub const SERVE_ARGUMENT: &str = "__serve";

/// The server binds its socket before it does anything else.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// What holder and server are told, in one line of JSON on their standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServeConfig {
    pub(crate) id: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
    /// Who asks for the attachment, and is no target of it.
    pub(crate) caller: Who,
    pub(crate) scope: Scope,
    /// Bytes of the path as the target sees it.
    pub(crate) path: Vec<u8>,
    pub(crate) document: Option<serde_json::Value>,
    pub(crate) lifetime_ms: Option<u64>,
    pub(crate) seed: Option<u64>,
    pub(crate) max_pause_us: u64,
    pub(crate) detach: bool,
    pub(crate) failover: Failover,
    pub(crate) lease_ms: Option<u64>,
}

impl ServeConfig {
    /// The process that was named.
    pub(crate) fn target(&self) -> Option<ProcessId> {
        Pid::new(self.pid).map(|pid| ProcessId {
            pid,
            start_time: self.start_time,
        })
    }

    /// The processes that are no targets.
    pub(crate) fn own(&self) -> Own {
        Own::new(Pid::new(self.caller.pid).map(|pid| ProcessId {
            pid,
            start_time: self.caller.start,
        }))
    }

    pub(crate) fn lifetime(&self) -> Lifetime {
        self.lifetime_ms.map_or(Lifetime::Forever, |ms| {
            Lifetime::For(Duration::from_millis(ms))
        })
    }
}

/// A running attachment that this process made.
#[derive(Debug)]
pub struct Session {
    id: String,
    socket: PathBuf,
    events: Events,
    /// Held for its end-of-file alone: see the module's invariant.
    #[expect(dead_code, reason = "what it is for happens when it is dropped")]
    lifeline: Option<UnixStream>,
}

/// Eight characters that are easy to type and to tell apart.
fn fresh_id() -> Result<String, AttachError> {
    const LETTERS: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";
    let mut random = [0_u8; 8];
    let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| AttachError::io(Step::Journal, "draw an id", error))?;
    let id: String = random
        .iter()
        .take(got)
        .filter_map(|byte| {
            LETTERS
                .get(usize::from(*byte) % LETTERS.len())
                .map(|letter| char::from(*letter))
        })
        .collect();
    if id.len() == random.len() {
        Ok(id)
    } else {
        Err(AttachError::new(
            Step::Journal,
            "too little randomness for an id",
        ))
    }
}

/// Starts holder and server, and with them the attachment; its events tell how that goes, from `preflight` on to `injecting` or `failed`.
///
/// Side effects before it returns: the attachment's directory and its two processes; the target has not been touched.
///
/// # Errors
/// When the state directory cannot be used, or the server does not come up.
pub fn inject(options: &InjectOptions) -> Result<Session, AttachError> {
    let start_time = crate::inspect::start_time(options.pid)?;
    let id = fresh_id()?;
    let state_hint = "name another one with --state-dir";
    let dir = StateDir::open(&options.state_dir, true)
        .and_then(|state| state.create(&id))
        .map_err(|error| {
            AttachError::new(Step::Journal, "the state directory cannot be used")
                .because(error)
                .hinting(state_hint)
        })?;
    let config = ServeConfig {
        id: id.clone(),
        state_dir: options.state_dir.clone(),
        pid: options.pid,
        start_time,
        caller: crate::server::who(rustix::process::getpid())?,
        scope: options.scope,
        path: std::os::unix::ffi::OsStrExt::as_bytes(options.path.as_os_str()).to_vec(),
        document: options
            .document
            .as_ref()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|error| {
                AttachError::new(Step::Options, "the rules cannot be written as JSON")
                    .because(error)
            })?,
        lifetime_ms: match options.lifetime {
            Lifetime::For(time) => Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            Lifetime::Forever => None,
        },
        seed: options.seed,
        max_pause_us: u64::try_from(options.max_pause.as_micros()).unwrap_or(u64::MAX),
        detach: options.detach,
        failover: options.failover,
        lease_ms: options
            .lease
            .map(|lease| u64::try_from(lease.as_millis()).unwrap_or(u64::MAX)),
    };
    let ready = start(options, &dir, &config).inspect_err(|_| {
        // Nothing of the server is left when it did not come up.
        let _ = dir.remove();
    })?;
    // From here on the directory is the server's: without it nobody could ask it anything.
    join(ready, &dir, &config)
}

/// A holder whose server is ready.
struct Ready {
    holder: Child,
    lifeline: UnixStream,
}

fn start(
    options: &InjectOptions,
    dir: &AttachmentDir,
    config: &ServeConfig,
) -> Result<Ready, AttachError> {
    let spawn = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| AttachError::io(Step::Spawn, what, error)
    };
    let (ours, theirs) = UnixStream::pair().map_err(spawn("make the lifeline"))?;
    let log = dir
        .create_own(&dir.log(), true)
        .map_err(|error| AttachError::new(Step::Journal, "create the log").because(error))?;
    let program = options
        .server_program
        .clone()
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(&program);
    command
        .arg0("hobble")
        .arg(SERVE_ARGUMENT)
        .arg(&config.id)
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| {
            matches!(
                name.to_str(),
                Some("HOBBLE_LOG" | "HOBBLE_MASK" | "HOBBLE_FAULT_POINT" | "RUST_BACKTRACE")
            )
        }))
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .process_group(0);
    let mut child = command
        .spawn()
        .map_err(spawn(&format!("start {}", program.display())))?;
    drop(command);
    let mut line = serde_json::to_vec(config).map_err(|error| {
        AttachError::new(Step::Spawn, "write the server's configuration").because(error)
    })?;
    line.push(b'\n');
    (&ours)
        .write_all(&line)
        .map_err(spawn("tell the server its configuration"))?;
    ours.set_read_timeout(Some(READY_WITHIN))
        .map_err(spawn("bound the wait for the server"))?;
    let mut answer = String::new();
    let read = BufReader::new(&ours).read_line(&mut answer);
    if read.is_err() || answer != "ready\n" {
        let _ = child.kill();
        let _ = child.wait();
        let log = std::fs::read_to_string(dir.log()).unwrap_or_default();
        let said = log
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it left no message")
            .to_owned();
        let cause = if answer.is_empty() {
            said
        } else {
            answer.trim().to_owned()
        };
        return Err(AttachError::new(
            Step::Spawn,
            format!("the server did not come up: {cause}"),
        ));
    }
    Ok(Ready {
        holder: child,
        lifeline: ours,
    })
}

/// Listens to a server that is ready. Without `--detach` it recovers when this fails, because its lifeline ends.
fn join(ready: Ready, dir: &AttachmentDir, config: &ServeConfig) -> Result<Session, AttachError> {
    let Ready {
        mut holder,
        lifeline,
    } = ready;
    // The holder leads a session of its own and is nobody's to wait for; a thread reaps it should this process live on. Where no thread can be had, init does
    // once this process has ended.
    let reaper = std::thread::Builder::new().name("hobble-reap".into());
    if let Err(error) = reaper.spawn(move || holder.wait()) {
        tracing::debug!(%error, "nobody reaps the holder");
    }
    let events = Client::connect(&config.id, &dir.socket())
        .and_then(|client| client.events(true, None))
        .map_err(|error| {
            error
                .hinting(format!(
                    "`hobble recover {}` takes back what it does",
                    config.id
                ))
                .needing_recovery()
        })?;
    Ok(Session {
        id: config.id.clone(),
        socket: dir.socket(),
        events,
        lifeline: (!config.detach).then_some(lifeline),
    })
}

impl Session {
    /// The attachment's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The next event; `Ok(None)` when none came in time or, see [`Session::ended`], none will come.
    ///
    /// # Errors
    /// When the server dies: its holder then recovers, which `hobble ps` shows; this session can no longer see how.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, AttachError> {
        self.events.next(timeout)
    }

    /// Whether the attachment has come to its end.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.events.ended()
    }

    /// Asks for recovery; the events tell how it goes.
    ///
    /// # Errors
    /// When the server is gone or refuses; it need not be called twice.
    pub fn recover(&self, force: bool) -> Result<(), AttachError> {
        Client::connect(&self.id, &self.socket)?
            .recover(force)
            .map(drop)
    }

    /// A connection for other requests.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn client(&self) -> Result<Client, AttachError> {
        Client::connect(&self.id, &self.socket)
    }

    /// Waits until faults are on (or the hook is, without rules).
    ///
    /// # Errors
    /// With what the attachment failed on.
    pub fn wait_injecting(&mut self, mut each: impl FnMut(&Event)) -> Result<(), AttachError> {
        use hobble_api::event::EventKind;
        while !self.ended() {
            let Some(event) = self.next_event(Duration::from_secs(1))? else {
                continue;
            };
            each(&event);
            match event.kind {
                EventKind::Injecting(_) => return Ok(()),
                EventKind::Failed(failed) => return Err(failure(failed)),
                EventKind::Recovered(_) => break,
                _ => {}
            }
        }
        Err(
            AttachError::new(Step::Inject, "the attachment ended before faults were on")
                .exiting(ExitCode::TargetVanished),
        )
    }
}

/// A `failed` event as an error.
#[must_use]
pub fn failure(failed: hobble_api::event::Failed) -> AttachError {
    let step = Step::ALL
        .into_iter()
        .find(|step| step.name() == failed.step)
        .unwrap_or(Step::Control);
    let error = AttachError::new(step, failed.cause);
    let error = match failed.hint {
        Some(hint) => error.hinting(hint),
        None => error,
    };
    if failed.rolled_back {
        let touched = !matches!(
            step,
            Step::Options | Step::Preflight | Step::Journal | Step::Spawn | Step::Serve
        );
        let told = failed
            .exit
            .filter(|exit| matches!(exit, ExitCode::Usage | ExitCode::TargetVanished));
        error.exiting(told.unwrap_or(if touched {
            ExitCode::RolledBack
        } else {
            ExitCode::Failed
        }))
    } else {
        error.needing_recovery()
    }
}
