//! The holder: the process that keeps every descriptor of an attachment alive when the server dies.
//!
//! Invariant: the holder is cloned from before any thread exists and shares the server's descriptor table, so the original open
//! file descriptions of the target, their locks, unlinked files and the FUSE connection outlive the server by any way it may die. It
//! does nothing but wait, and it ends only when the attachment is over or somebody else has undone it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hobble_mirror::Legacy;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::session::ServeConfig;
use crate::sys::{self, Side};

/// The server has ended the attachment; nothing is left.
pub(crate) const DONE: i32 = 0;
/// The server could not put everything back; the holder must stay for `hobble recover`.
pub(crate) const NEEDS_RECOVERY: i32 = 5;

/// Nobody can put back what is left, and without the attachment's directory nobody will ask for it: the holder stays until it is told to end.
pub(crate) const KEEP: i32 = 6;

const SIGNALS: [i32; 4] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// How often a recovery that failed is tried again before the holder only waits for `hobble recover`.
const RECOVERY_TRIES: u32 = 5;
/// How often is looked whether the server is dead without having ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A server that lived no longer is as good as none: what it was asked may be what kills it.
const SHORT_LIFE: Duration = Duration::from_millis(150);
/// So many of those in a row, and the hook is undone instead.
const SHORT_LIVES: u32 = 10;
/// How long a server may give no sign of life: one that is stopped, or has no memory left to run in.
const SILENCE: Duration = Duration::from_secs(10);
/// How long after its deadline a server gets to have recovered.
const GRACE: Duration = Duration::from_secs(60);
/// How long a successor gets to serve, or to begin to undo.
const QUIET: Duration = Duration::from_secs(5);
/// How long a server that is ending gets to end.
const LAST_BREATH: Duration = Duration::from_millis(150);

/// What the hidden command `__serve` runs: becomes the holder, clones the server, and returns the exit status of the process it finds
/// itself in. Its standard input is the lifeline, which first says what to do; its standard error is the attachment's log.
#[must_use]
pub fn serve_entry() -> i32 {
    match prepare() {
        Ok((config, lifeline)) => hold(config, lifeline),
        Err(problem) => {
            tracing::error!(problem, "the server cannot start");
            1
        }
    }
}

fn prepare() -> Result<(ServeConfig, UnixStream), String> {
    let lifeline = UnixStream::from(
        std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| format!("standard input: {error}"))?,
    );
    let mut line = String::new();
    lifeline
        .set_read_timeout(Some(Duration::from_secs(10)))
        .map_err(|error| format!("standard input is not a socket: {error}"))?;
    BufReader::new(&lifeline)
        .read_line(&mut line)
        .map_err(|error| format!("read the configuration: {error}"))?;
    let config: ServeConfig =
        serde_json::from_str(&line).map_err(|error| format!("the configuration: {error}"))?;
    crate::fault_point::arm_from_environment(config.target())?;
    // Whatever leads a terminal or a service must not take the holder with it.
    let _ = rustix::process::setsid();
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| format!("open /dev/null: {error}"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| format!("detach standard input: {error}"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_descriptor_limit();
    // The target must not lose its files because the machine ran out of memory; needs CAP_SYS_RESOURCE, done where it can be.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    Ok((config, lifeline))
}

/// Moves the soft limit to the hard one: an attachment keeps one descriptor for every one it moves.
fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

fn hold(config: ServeConfig, lifeline: UnixStream) -> i32 {
    sys::block_signals(&SIGNALS);
    let holder = rustix::process::getpid();
    // Before the clone: it is the same memory for all of us.
    let legacy = match Legacy::new() {
        Ok(legacy) => Some(legacy),
        Err(error) => {
            tracing::warn!(%error, "no memory to share: should the server die, the hook is undone, and operations under way fail");
            None
        }
    };
    let own = crate::takeover::open_numbers();
    let mut server = match sys::clone_sharing_descriptors() {
        Ok(Side::Child) => {
            sys::unblock_signals(&SIGNALS);
            return crate::server::run(config, lifeline, holder, legacy);
        }
        Ok(Side::Parent(server)) => server,
        Err(error) => {
            tracing::error!(%error, "the server cannot be cloned");
            return 1;
        }
    };
    // The lifeline stays open in the shared table; the holder itself has no use for its copy and must not close it.
    std::mem::forget(OwnedFd::from(lifeline));
    let first = server;
    let mut tries = 0;
    let mut told_to_end = false;
    let mut short_lives = 0;
    let mut since = Instant::now();
    loop {
        let serves = |process| match &legacy {
            Some(legacy) => legacy.server() == i32::unsigned_abs(process),
            None => process == first,
        };
        let code = wait_for(server, legacy.as_ref(), &serves, &mut told_to_end);
        if serves(server) && code != Some(NEEDS_RECOVERY) {
            // It had taken over, or was the first: whoever comes next has all tries.
            tries = 0;
        }
        short_lives = if serves(server) && since.elapsed() >= SHORT_LIFE {
            0
        } else {
            short_lives + 1
        };
        match code {
            Some(DONE) => return DONE,
            Some(code) => tracing::warn!(code, "the server could not put everything back"),
            None => tracing::warn!("the server was killed"),
        }
        if told_to_end && directory_is_gone(&config) {
            // By the recovery that has removed the directory: what it has left is left by force.
            return NEEDS_RECOVERY;
        }
        if code == Some(KEEP) {
            tracing::error!(
                id = config.id,
                "the target is not native, and there is no journal to recover it by; its files are kept until SIGTERM"
            );
            return wait_for_the_end();
        }
        // What a server that gave up has left is not a state to go on from.
        let may_take_over = code.is_none() && short_lives < SHORT_LIVES;
        if !may_take_over {
            if tries == RECOVERY_TRIES {
                tracing::error!(id = config.id, "recovery failed; run `hobble recover`");
                return wait_until_undone(&config);
            }
            if tries > 0 {
                std::thread::sleep(Duration::from_millis(200) * tries);
            }
            tries += 1;
        }
        since = Instant::now();
        match sys::clone_sharing_descriptors() {
            Ok(Side::Child) => {
                sys::unblock_signals(&SIGNALS);
                let legacy = legacy.filter(|_| may_take_over);
                return crate::takeover::successor(&config, holder, legacy, &own);
            }
            Ok(Side::Parent(successor)) => server = successor,
            Err(error) => tracing::error!(%error, "no successor can be cloned"),
        }
    }
}

/// Waits for the end of the server or of its successor: `None` when a signal killed it. Who serves gets the holder's signals, which ask it to recover. Who undoes
/// is recovering, which a signal would only cut in two; that SIGTERM came, and to nobody that could act on it, is remembered in `told_to_end`.
///
/// Who serves and gives no sign of life for [`SILENCE`], or has not ended long after its deadline, is killed.
///
/// A server that was killed while one of its own threads waits for an answer from itself never ends, and nobody hears of its death: it is looked for.
///
/// `serves` says whether a process that was cloned from the holder serves the hook, and is not undoing it.
fn wait_for(
    server: i32,
    legacy: Option<&Legacy>,
    serves: &dyn Fn(i32) -> bool,
    told_to_end: &mut bool,
) -> Option<i32> {
    let pid = Pid::from_raw(server)?;
    // Whoever takes over closes what is open and nobody's: until it serves, nothing is opened here, in the same table.
    let quiet = Instant::now() + QUIET;
    let mut process = None;
    let mut is_ending = || {
        if !serves(server) && Instant::now() < quiet {
            return false;
        }
        let process = *process.get_or_insert_with(|| {
            hobble_graft::ids::Pid::new(server)
                .and_then(|pid| hobble_graft::ids::ProcessId::of(pid).ok())
        });
        process.is_some_and(|process| process.is_ending().unwrap_or(false))
    };
    let mut ending: Option<Instant> = None;
    let mut watch = Watch::new();
    loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) if status.exited() => return status.exit_status(),
            Ok(Some((_, status))) if status.signaled() => return None,
            Err(rustix::io::Errno::CHILD) => return None,
            _ => {}
        }
        if ending.is_some_and(|since| since.elapsed() > LAST_BREATH) {
            return None;
        }
        if ending.is_none() && is_ending() {
            ending = Some(Instant::now());
        }
        if ending.is_none()
            && serves(server)
            && let Some(why) = legacy.and_then(|legacy| watch.look(legacy))
        {
            tracing::error!(
                server,
                why,
                "the server is killed, so that another can take over"
            );
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        match sys::wait_signal(&SIGNALS, LOOK_EVERY) {
            Some(signal) if signal != libc::SIGCHLD => {
                if !serves(server) || is_ending() {
                    *told_to_end |= signal == libc::SIGTERM;
                } else if let Some(signal) = Signal::from_named_raw(signal) {
                    let _ = rustix::process::kill_process(pid, signal);
                }
            }
            _ => {}
        }
    }
}

/// Looks after a server that may hang.
struct Watch {
    beats: u64,
    /// Looks since the last sign of life: not time, which also passes while this process is frozen together with the server.
    silent: u32,
    is_told: bool,
}

impl Watch {
    fn new() -> Self {
        Self {
            beats: 0,
            silent: 0,
            is_told: false,
        }
    }

    /// Why the server is to be killed, if it is; said once.
    fn look(&mut self, legacy: &Legacy) -> Option<&'static str> {
        let beats = legacy.beats();
        // Before its first sign of life it is still starting, which has its own bounds.
        if beats != self.beats || beats == 0 {
            self.beats = beats;
            self.silent = 0;
        } else {
            self.silent += 1;
        }
        let deadline = legacy.deadline();
        let grace = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
        let is_overdue =
            deadline > 0 && crate::takeover::boot_time() > deadline.saturating_add(grace);
        let why = if LOOK_EVERY * self.silent > SILENCE {
            "it gives no sign of life"
        } else if is_overdue {
            "it has not recovered when it was to"
        } else {
            return None;
        };
        // A dead one is seen to be so; to kill it again would change nothing.
        (!std::mem::replace(&mut self.is_told, true)).then_some(why)
    }
}

/// Keeps the descriptors until the attachment's directory is gone, which is the last thing that `hobble recover` does, or until told to end.
fn wait_until_undone(config: &ServeConfig) -> i32 {
    loop {
        let gone = directory_is_gone(config)
            && crate::volume::find_by_source(&crate::hook::source(&config.id)).is_none();
        if gone
            || matches!(
                sys::wait_signal(&SIGNALS, Duration::from_secs(1)),
                Some(libc::SIGTERM)
            )
        {
            return NEEDS_RECOVERY;
        }
    }
}

/// Keeps the descriptors until told to end.
fn wait_for_the_end() -> i32 {
    while sys::wait_signal(&SIGNALS, Duration::from_secs(3600)) != Some(libc::SIGTERM) {}
    NEEDS_RECOVERY
}

fn directory_is_gone(config: &ServeConfig) -> bool {
    matches!(std::fs::symlink_metadata(config.state_dir.join(&config.id)), Err(error) if error.kind() == std::io::ErrorKind::NotFound)
}
