//! Aborts a connection when its test hangs or its process dies.
//!
//! A thread of this process that waits for a reply keeps the table of descriptors, and so the very device, alive; once the
//! readers have been killed nobody answers it and no signal ends it. So there is a child process, told by the kernel when the
//! thread that started it dies (PR_SET_PDEATHSIG), which then writes to the connection's `abort`.

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use hobble_fuse::mount::Connection;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::sys;

/// Longer than any test takes.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Watchdog {
    /// Dropped to call it off.
    hold: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(super) fn over(connection: Connection) -> Self {
        let (hold, held) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
            rustix::mount::fsconfig_create(context.as_fd()).unwrap();
            let attributes = MountAttrFlags::empty();
            let root =
                rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
                    .unwrap();
            let path = format!("{}/abort", connection.number());
            let abort =
                rustix::fs::openat(&root, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                    .unwrap();
            let mut command = Command::new("sh");
            // By path, for a shell need not know descriptors of more than one digit.
            let script = format!(
                "trap 'echo 1 > /proc/self/fd/{}; exit' TERM; echo; read -r line",
                abort.as_raw_fd()
            );
            command
                .args(["-c", &script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            sys::inherit(&mut command, abort.as_fd());
            sys::end_with_this_thread(&mut command);
            let mut child = command.spawn().unwrap();
            // Its line says that the trap is set.
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            ready.send(()).unwrap();
            if held.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!(
                    "a test has taken {LIMIT:?}: connection {} aborted",
                    connection.number()
                );
                let _ = connection.abort();
            }
            drop(child.stdin.take());
            let _ = child.wait();
        });
        is_ready.recv().unwrap();
        Self {
            hold: Some(hold),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.hold = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
