//! The server process: signals, lifeline and control socket around the engine.
//!
//! Invariant: every way in which somebody may want the attachment to end (a request, SIGINT, SIGTERM or SIGHUP, the session's end, the deadline,
//! the target's exit) becomes one [`Command`] to the engine, which works them off one after the other on one thread, the only
//! thread of this process that traces.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::event::{EventKind, Failed, Why};
use hobble_api::status::{Phase, Status, TargetProcess};
use hobble_mirror::Legacy;
use rustix::process::Pid;

use crate::board::Board;
use crate::control::{self, Command, Front};
use crate::engine::{Engine, Means};
use crate::error::{AttachError, Step};
use crate::holder::{DONE, NEEDS_RECOVERY};
use crate::journal::{Journal, Record, Who};
use crate::ledger::Ledger;
use crate::session::ServeConfig;
use crate::state_dir::{AttachmentDir, StateDir};
use crate::{inspect, sys};

/// How often a sign of life is given.
const PULSE: Duration = Duration::from_millis(250);

const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// How long followers get to connect and to read the last event before the process ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// What this process is, for the journal.
pub(crate) fn who(pid: Pid) -> Result<Who, AttachError> {
    let pid = pid.as_raw_nonzero().get();
    Ok(Who {
        pid,
        start: inspect::start_time(pid)?,
    })
}

/// Opens a fresh journal: who holds, who serves, which boot; and the ledger beside it.
fn open_journal(
    dir: &AttachmentDir,
    id: &str,
    holder: Pid,
) -> Result<(Journal, Ledger), AttachError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        AttachError::new(Step::Journal, "the journal cannot be written")
            .because(error)
            .hinting(
                "the state directory needs a few MiB of space; name another one with --state-dir",
            )
    };
    let file = dir
        .create_own(&dir.journal(), true)
        .map_err(|error| failed(error.into()))?;
    let mut journal = Journal::new(file);
    journal.reserve().map_err(|error| failed(error.into()))?;
    let boot_id = hobble_graft::ids::BootId::current().map_err(|error| failed(error.into()))?;
    let created = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
    journal
        .append(&Record::Opened {
            v: 1,
            id: id.to_owned(),
            boot_id: boot_id.as_str().to_owned(),
            created,
        })
        .and_then(|()| journal.append(&Record::Holder(who(holder).map_err(foreign)?)))
        .and_then(|()| {
            journal.append(&Record::Server(
                who(rustix::process::getpid()).map_err(foreign)?,
            ))
        })
        .map_err(|error| failed(error.into()))?;
    let ledger = dir
        .create_own(&dir.ledger(), false)
        .map_err(|error| failed(error.into()))?;
    Ok((
        journal,
        Ledger::new(ledger, &std::collections::BTreeMap::new()),
    ))
}

fn foreign(error: AttachError) -> crate::journal::JournalError {
    crate::journal::JournalError::Foreign {
        problem: error.to_string(),
    }
}

/// What a process that is going to serve does first.
pub(crate) fn settle_in() {
    // Blocked before any thread is made, so that only the signal thread takes them.
    sys::block_signals(&SIGNALS);
    // A file size limit that this process inherited is not the target's: a write past it would end the server.
    sys::block_signals(&[libc::SIGXFSZ]);
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Fsize,
        rustix::process::Rlimit {
            current: None,
            maximum: None,
        },
    );
}

/// The whole life of the server; gives back the exit status that tells the holder what is left.
pub(crate) fn run(
    config: ServeConfig,
    lifeline: UnixStream,
    holder: Pid,
    legacy: Option<Legacy>,
) -> i32 {
    settle_in();
    let dir = match StateDir::open(&config.state_dir, false)
        .and_then(|state| state.attachment(&config.id))
    {
        Ok(dir) => dir,
        Err(error) => return give_up(&lifeline, &error.to_string()),
    };
    let (journal, ledger) = match open_journal(&dir, &config.id, holder) {
        Ok(opened) => opened,
        Err(error) => return give_up(&lifeline, &format!("{error}: {}", error.cause_chain())),
    };
    crate::fault_point::pass("journal-opened");
    if let Some(legacy) = &legacy {
        legacy.set_server(std::process::id());
    }
    let board = Arc::new(Board::new(first_status(&config, holder), legacy.clone()));
    let (engine_in, commands) = mpsc::channel();
    let means = Means {
        journal,
        ledger,
        board: Arc::clone(&board),
        commands,
        to_myself: engine_in.clone(),
        legacy,
    };
    let mut engine = Engine::new(config.clone(), means, Vec::new());
    if let Err(error) = open_front(&dir, &mut engine, &board, &engine_in)
        .and_then(|()| watch(&config, &mut engine, &lifeline, engine_in))
    {
        return give_up(&lifeline, &error.to_string());
    }
    if (&lifeline).write_all(b"ready\n").is_err() {
        let _ = dir.remove();
        return DONE;
    }
    drop(lifeline);
    let code = engine.live();
    part(&dir, &board, code)
}

/// The rest of the life of a server that has taken over.
pub(crate) fn serve_to_the_end(
    config: &ServeConfig,
    dir: &AttachmentDir,
    mut engine: Engine,
    board: &Arc<Board>,
    engine_in: mpsc::Sender<Command>,
    lifeline: Option<UnixStream>,
) -> i32 {
    // The dead server's, on which nobody listens.
    let _ = std::fs::remove_file(dir.socket());
    let front = open_front(dir, &mut engine, board, &engine_in);
    let watched = match &lifeline {
        Some(lifeline) => watch(config, &mut engine, lifeline, engine_in),
        None => watch_signals(engine_in),
    };
    if let Err(error) = front.and(watched) {
        // It serves; who cannot ask for a recovery has the deadline and the holder.
        tracing::error!(%error, "this server cannot be asked for anything; it recovers");
        engine.ask_to_recover(Why::LostServer);
    }
    drop(lifeline);
    let code = engine.go_on();
    part(dir, board, code)
}

/// Opens the control socket and begins to give signs of life.
fn open_front(
    dir: &AttachmentDir,
    engine: &mut Engine,
    board: &Arc<Board>,
    engine_in: &mpsc::Sender<Command>,
) -> std::io::Result<()> {
    let counters = engine.counters();
    let targets = engine.targets();
    let passthrough = engine.passthrough();
    let front = Front {
        board: Arc::clone(board),
        refresh: Box::new(move |status| {
            status.rules = counters();
            if let Some(passthrough) = passthrough() {
                status.passthrough = passthrough;
            }
            status.targets = targets()
                .into_iter()
                .filter_map(|pid| {
                    Some(TargetProcess {
                        pid: u32::try_from(pid).ok()?,
                        comm: inspect::comm(pid),
                    })
                })
                .collect();
        }),
        engine: engine_in.clone(),
    };
    if let Some(legacy) = engine.legacy.clone() {
        std::thread::Builder::new()
            .name("hobble-pulse".into())
            .spawn(move || {
                loop {
                    legacy.beat();
                    // It is the time itself that is told.
                    std::thread::sleep(PULSE);
                }
            })?;
    }
    control::bind(&dir.socket()).and_then(|listener| control::serve(listener, Arc::new(front)))
}

fn watch(
    config: &ServeConfig,
    engine: &mut Engine,
    lifeline: &UnixStream,
    engine_in: mpsc::Sender<Command>,
) -> std::io::Result<()> {
    watch_signals(engine_in.clone())?;
    if !config.detach {
        engine.lifeline = Some(watch_lifeline(lifeline, engine_in)?);
    }
    Ok(())
}

/// The end of a server.
fn part(dir: &AttachmentDir, board: &Board, code: i32) -> i32 {
    board.close();
    let farewell = Instant::now() + FAREWELL;
    while control::is_listened_to() && Instant::now() < farewell {
        // Clients hang up by themselves, and nothing tells when the last has.
        std::thread::sleep(Duration::from_millis(5));
    }
    if code == DONE
        && let Err(error) = dir.remove()
    {
        tracing::warn!(%error, "the attachment's directory stays behind");
    }
    code
}

pub(crate) use crate::hook::probe;

/// Publishes the failure of an attachment.
pub(crate) fn publish_failure(board: &Board, error: &AttachError) {
    board.edit(|status| status.phase = Phase::Failed);
    board.publish(EventKind::Failed(Failed {
        step: error.step().name().to_owned(),
        cause: error.whole(),
        hint: error.hint().map(str::to_owned),
        rolled_back: error.rolled_back(),
        exit: Some(error.exit_code()),
    }));
}

/// The exit status that a failure leaves the holder with.
pub(crate) fn failure_code(error: &AttachError) -> i32 {
    if error.rolled_back() {
        DONE
    } else {
        NEEDS_RECOVERY
    }
}

/// What the server says when it cannot even begin: the whole chain, on one line.
fn give_up(mut lifeline: &UnixStream, problem: &str) -> i32 {
    tracing::error!(problem, "the server cannot start");
    let _ = lifeline.write_all(format!("{}\n", problem.replace('\n', " ")).as_bytes());
    // Nothing has been touched: the holder has nothing to keep.
    DONE
}

pub(crate) fn first_status(config: &ServeConfig, holder: Pid) -> Status {
    let now = Timestamp::now();
    Status {
        id: config.id.clone(),
        phase: Phase::Pending,
        paused: false,
        targets: Vec::new(),
        scope: config.scope,
        path: String::from_utf8_lossy(&config.path).into_owned(),
        started: now,
        deadline: None,
        lease: None,
        seed: config.seed.unwrap_or(0),
        rules: Vec::new(),
        server_pid: Some(std::process::id()),
        holder_pid: u32::try_from(holder.as_raw_nonzero().get()).ok(),
        passthrough: false,
        degraded: Vec::new(),
        not_covered: Vec::new(),
    }
}

fn watch_signals(engine: mpsc::Sender<Command>) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("hobble-signals".into())
        .spawn(move || {
            loop {
                if sys::wait_signal(&SIGNALS, Duration::from_secs(3600)).is_some()
                    && engine
                        .send(Command::Recover {
                            why: Why::Signal,
                            force: false,
                            answer: None,
                        })
                        .is_err()
                {
                    return;
                }
            }
        })
        .map(drop)
}

/// Gives the number of our end of the lifeline.
fn watch_lifeline(lifeline: &UnixStream, engine: mpsc::Sender<Command>) -> std::io::Result<RawFd> {
    let mut lifeline = lifeline.try_clone()?;
    let number = lifeline.as_raw_fd();
    lifeline.set_read_timeout(None)?;
    std::thread::Builder::new()
        .name("hobble-lifeline".into())
        .spawn(move || {
            let mut byte = [0_u8; 16];
            loop {
                match lifeline.read(&mut byte) {
                    Ok(0) => break,
                    Err(error) if error.kind() != std::io::ErrorKind::Interrupted => break,
                    _ => {}
                }
            }
            let _ = engine.send(Command::Recover {
                why: Why::LostLease,
                force: false,
                answer: None,
            });
        })
        .map(|_| number)
}
