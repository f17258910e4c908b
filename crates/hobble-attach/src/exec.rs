//! `hobble exec`: a command that starts under a hook of its own.
//!
//! The command is an ordinary target: a *launcher* makes a private mount namespace and waits; the hook is attached to the launcher as to any
//! running process; then the launcher becomes the command by execve(2), keeping its pid. So there is one way to attach, and the
//! command cannot see the backing tree for a moment. Invariant: the launcher never outlives the wait of the process that started it unlaunched: it
//! waits for one byte on a pipe and leaves on end-of-file.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::time::Duration;

use hobble_api::event::{Event, EventKind, Recovered};
use hobble_api::exit::{EXEC_FAILED, EXEC_NOT_EXECUTABLE, EXEC_NOT_FOUND, EXEC_SIGNAL_BASE};
use hobble_api::status::Scope;
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::error::{AttachError, Step};
use crate::options::{ExecOptions, InjectOptions, Lifetime};
use crate::session::{self, Session};
use crate::sys;

/// The hidden first argument that turns the program into the launcher: `__launch FD COMMAND ARGS…`.
pub const LAUNCH_ARGUMENT: &str = "__launch";

/// How long a recovery may take after the command's end before it is left to the server.
const RECOVER_WITHIN: Duration = Duration::from_secs(30);

/// How a command under a hook ended.
#[derive(Debug)]
pub struct ExecOutcome {
    /// What the caller should exit with: the command's own code, 128 + n for signal n, 126 or 127 when it could not be started.
    pub code: u8,
    /// Counters and leftovers, when the server could still tell.
    pub recovered: Option<Recovered>,
}

/// The launcher, run by the hidden command `__launch GATE,READY COMMAND ARGS…`. Returns only when the command could not be started: the
/// exit code to leave with.
#[must_use]
pub fn launch_entry(arguments: &[OsString]) -> u8 {
    let [pipes, command, rest @ ..] = arguments else {
        return EXEC_FAILED;
    };
    let Some((gate, ready)) = pipes.to_str().and_then(|pipes| pipes.split_once(',')) else {
        return EXEC_FAILED;
    };
    let (Ok(gate), Ok(ready)) = (gate.parse(), ready.parse()) else {
        return EXEC_FAILED;
    };
    let (gate, ready) = (sys::inherited(gate), sys::inherited(ready));
    if let Err(error) = isolate() {
        eprintln!("error: cannot make a mount namespace\ncaused by: {error}");
        return EXEC_FAILED;
    }
    let told = std::fs::File::from(ready).write_all(b"r");
    let mut byte = [0_u8; 1];
    match (told, std::fs::File::from(gate).read(&mut byte)) {
        (Ok(()), Ok(1)) => {}
        _ => return EXEC_FAILED,
    }
    let error = Command::new(command).args(rest).exec();
    eprintln!(
        "error: cannot run {}\ncaused by: {error}",
        command.to_string_lossy()
    );
    if error.kind() == std::io::ErrorKind::NotFound {
        EXEC_NOT_FOUND
    } else {
        EXEC_NOT_EXECUTABLE
    }
}

/// A mount namespace of its own from which nothing propagates.
fn isolate() -> std::io::Result<()> {
    sys::unshare_mounts()?;
    // Slave, not private: what the host mounts later still shows, what happens here does not go out (mount_namespaces(7)).
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    Ok(())
}

struct Launcher {
    child: Child,
    gate: Option<OwnedFd>,
}

impl Launcher {
    fn start(options: &ExecOptions) -> Result<Self, AttachError> {
        let failed =
            |error: std::io::Error| AttachError::io(Step::Exec, "start the launcher", error);
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|error| failed(error.into()))?;
        let (ready, isolated) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|error| failed(error.into()))?;
        let program = options
            .server_program
            .clone()
            .unwrap_or_else(|| "/proc/self/exe".into());
        // Inherited by the launcher, which closes both before it becomes the command.
        let mut command = Command::new(program);
        command.arg0("hobble").arg(LAUNCH_ARGUMENT);
        let gate_number = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        let ready_number = std::os::fd::AsRawFd::as_raw_fd(&isolated);
        command.arg(format!("{gate_number},{ready_number}"));
        command.args(&options.command);
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
            .map_err(|error| failed(error.into()))?;
        rustix::io::fcntl_setfd(&isolated, rustix::io::FdFlags::empty())
            .map_err(|error| failed(error.into()))?;
        let child = command.spawn().map_err(failed)?;
        drop((theirs, isolated));
        let mut launcher = Self {
            child,
            gate: Some(ours),
        };
        let mut byte = [0_u8; 1];
        match std::fs::File::from(ready).read(&mut byte) {
            Ok(1) => Ok(launcher),
            _ => {
                launcher.end();
                Err(AttachError::new(
                    Step::Exec,
                    "the launcher could not make a mount namespace of its own",
                )
                .hinting("hobble needs root with CAP_SYS_ADMIN"))
            }
        }
    }

    fn go(&mut self) -> Result<(), AttachError> {
        let Some(gate) = self.gate.take() else {
            return Ok(());
        };
        std::fs::File::from(gate)
            .write_all(b"g")
            .map_err(|error| AttachError::io(Step::Exec, "let the command start", error))
    }

    /// Lets the launcher leave by end-of-file and reaps it.
    fn end(&mut self) {
        self.gate = None;
        let _ = self.child.wait();
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.gate.is_some() {
            self.end();
        }
    }
}

/// Runs a command under a hook of its own and waits for its end. `each` sees every event. `signals` is polled for signals that are to be
/// handed on to the command.
///
/// # Errors
/// When the hook could not be attached: the command has not been started then (exit code 125).
pub fn exec(
    options: &ExecOptions,
    mut each: impl FnMut(&Event),
    mut signals: impl FnMut() -> Option<i32>,
) -> Result<ExecOutcome, AttachError> {
    let mut launcher = Launcher::start(options)?;
    let pid = i32::try_from(launcher.child.id())
        .map_err(|_| AttachError::new(Step::Exec, "the launcher's pid does not fit"))?;
    let mut inject = InjectOptions::new(pid, options.path.clone());
    inject.scope = Scope::Namespace;
    inject.document.clone_from(&options.document);
    inject.lifetime = Lifetime::Forever;
    inject.seed = options.seed;
    inject.state_dir.clone_from(&options.state_dir);
    inject.server_program.clone_from(&options.server_program);
    let mut session = session::inject(&inject)?;
    session.wait_injecting(&mut each)?;
    launcher.go()?;
    let status = loop {
        match launcher.child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(error) => return Err(AttachError::io(Step::Exec, "wait for the command", error)),
        }
        if let Some(signal) = signals()
            && let (Some(pid), Some(signal)) = (
                rustix::process::Pid::from_raw(pid),
                rustix::process::Signal::from_named_raw(signal),
            )
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
        // Events are the clock of this loop: short enough that the end of a short command is not waited for noticeably.
        if !session.ended() {
            if let Ok(Some(event)) = session.next_event(Duration::from_millis(5)) {
                each(&event);
            }
        } else {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let recovered = finish(&mut session, &mut each);
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(EXEC_FAILED),
        (None, Some(signal)) => EXEC_SIGNAL_BASE.wrapping_add(u8::try_from(signal).unwrap_or(0)),
        (None, None) => EXEC_FAILED,
    };
    Ok(ExecOutcome { code, recovered })
}

/// Waits for the recovery that the command's end, or what it left running in its namespace, leads to.
fn finish(session: &mut Session, each: &mut impl FnMut(&Event)) -> Option<Recovered> {
    let _ = session.recover(false);
    let until = std::time::Instant::now() + RECOVER_WITHIN;
    while !session.ended() && std::time::Instant::now() < until {
        match session.next_event(Duration::from_millis(200)) {
            Ok(Some(event)) => {
                each(&event);
                if let EventKind::Recovered(recovered) = event.kind {
                    return Some(recovered);
                }
            }
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    None
}
