//! A process that cleans up after a test process that can no longer do it itself.
//!
//! Owns the list of what exists because of this test process: processes, directories, state directories of
//! Hobble. Invariant: every entry is either taken down by its guard, which then crosses it off, or by the
//! reaper once this process is gone, in reverse order of registration.
//!
//! The reaper is a shell in a process group of its own that reads the list from a pipe. The pipe's only writer is this
//! process (the descriptor is CLOEXEC), so end of file means that we are dead, by whatever cause, SIGKILL included.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};

use crate::process::Identity;

/// Reads `add ID KIND A B` and `done ID` lines until end of file, then acts on what is left.
const SCRIPT: &str = r#"
trap '' INT TERM HUP QUIT
declare -A what
order=()
while IFS=$'\t' read -r verb id rest; do
    case $verb in
        add) what[$id]=$rest; order+=("$id") ;;
        done) unset "what[$id]" ;;
    esac
done
same() { # PID START: is this still the process that was registered?
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    set -- $stat "$2"
    [ "${20}" = "${!#}" ]
}
for ((i = ${#order[@]} - 1; i >= 0; i--)); do
    entry=${what[${order[$i]}]-}
    [ -n "$entry" ] || continue
    IFS=$'\t' read -r kind a b <<<"$entry"
    case $kind in
        kill) if same "$a" "$b"; then kill -KILL "$a"; fi ;;
        recover)
            timeout -k 5 30 "$a" --state-dir "$b" recover --all --force
            for process in /proc/[0-9]*; do
                case $(readlink "$process/exe") in "$a"*) ;; *) continue ;; esac
                if ls -l "$process/fd" | grep -qF -- "-> $b/"; then kill -KILL "${process#/proc/}"; fi
            done
            # A server that was killed while it waited for itself ends only when its connection is ended for it.
            timeout -k 5 30 "$a" --state-dir "$b" recover --all --force
            ;;
        remove) for _ in 1 2 3 4 5; do rm -rf --one-file-system -- "$a" && break; sleep 0.2; done ;;
    esac
done
"#;

/// Something to take down when this process can no longer do it.
#[derive(Debug)]
pub enum Action<'a> {
    /// SIGKILL for this very process; a re-used pid is left alone.
    Kill(Identity),
    /// `hobble recover --all --force` with this binary and state directory, then SIGKILL for what of it still runs there.
    Recover(&'a Path, &'a Path),
    /// Remove this directory and what is in it, on its own filesystem.
    Remove(&'a Path),
}

/// An entry in the reaper's list; crossed off by [`Ticket::done`], otherwise carried out once this process ends.
#[derive(Debug)]
#[must_use = "an entry that is not crossed off is carried out by the reaper"]
pub struct Ticket(u64);

impl Ticket {
    /// Crosses the entry off: its owner has taken the thing down.
    pub fn done(self) {
        // A dead reaper cannot be told, and has nothing left to do either.
        let _ = with(|state| state.send(&format!("done\t{}\n", self.0)));
    }
}

struct State {
    pipe: ChildStdin,
    next: u64,
}

impl State {
    fn start() -> Result<State> {
        let mut child = Command::new("bash")
            .args(["-c", SCRIPT, "hobble-test-reaper"])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Signals for the group of the test, as a runner's time-out sends them, must not reach it.
            .process_group(0)
            .spawn()
            .context("cannot start the reaper (bash)")?;
        let pipe = child
            .stdin
            .take()
            .context("the reaper has no standard input")?;
        // It outlives this process by design; init reaps it.
        drop(child);
        Ok(State { pipe, next: 1 })
    }

    fn send(&mut self, line: &str) -> Result<()> {
        self.pipe
            .write_all(line.as_bytes())
            .context("cannot write to the reaper")
    }
}

fn with<T>(act: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
    static STATE: OnceLock<Mutex<Option<State>>> = OnceLock::new();
    let mut slot: MutexGuard<'_, Option<State>> = STATE
        .get_or_init(|| Mutex::new(None))
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if slot.is_none() {
        *slot = Some(State::start()?);
    }
    match slot.as_mut() {
        Some(state) => act(state),
        None => bail!("the reaper did not start"),
    }
}

/// Starts the reaper where the calling thread is now. It must not live in a test's own mount namespace, which it would keep
/// alive: [`crate::namespace::Namespace::enter`] calls this before it leaves the shared one.
///
/// # Errors
/// When the reaper cannot be started.
pub fn start() -> Result<()> {
    with(|_| Ok(()))
}

/// Registers `action` **before or right after** the thing exists.
///
/// # Errors
/// When the reaper cannot be started or a path holds a tab or line break.
pub fn register(action: &Action<'_>) -> Result<Ticket> {
    let line = match action {
        Action::Kill(identity) => format!("kill\t{}\t{}", identity.pid, identity.start),
        Action::Recover(binary, state_dir) => {
            format!("recover\t{}\t{}", plain(binary)?, plain(state_dir)?)
        }
        Action::Remove(path) => format!("remove\t{}", plain(path)?),
    };
    with(|state| {
        let id = state.next;
        state.next += 1;
        state.send(&format!("add\t{id}\t{line}\n"))?;
        Ok(Ticket(id))
    })
}

fn plain(path: &Path) -> Result<&str> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    if text.contains(['\t', '\n']) || !path.is_absolute() {
        bail!("{text:?} cannot be given to the reaper");
    }
    Ok(text)
}
