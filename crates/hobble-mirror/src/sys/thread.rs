//! What a thread does to itself or to another thread of this process.

use std::io;
use std::sync::Once;

use super::check;

/// A signal that nothing else in a server uses; its handler does nothing, so its only effect is that a blocking call returns `EINTR`.
fn nudge_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

extern "C" fn ignore(_: libc::c_int) {}

/// Gives the calling thread a working directory and umask of its own.
pub(crate) fn unshare_fs() -> io::Result<()> {
    // SAFETY: no memory is passed; CLONE_FS affects only the calling thread's file-system struct.
    let result = unsafe { libc::unshare(libc::CLONE_FS) };
    check(result.into()).map(drop)
}

/// The calling thread's id.
pub(crate) fn tid() -> i32 {
    // SAFETY: gettid takes no arguments and cannot fail.
    unsafe { libc::gettid() }
}

/// Installs the handler that lets [`nudge`] interrupt a blocking call. The handler does not ask for `SA_RESTART`.
pub(crate) fn make_nudgeable() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask, the default handler.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as *const () as usize;
        // SAFETY: `action` is initialised and its handler is a function that does nothing, which is async-signal-safe.
        unsafe { libc::sigaction(nudge_signal(), &raw const action, std::ptr::null_mut()) };
    });
}

/// Interrupts the blocking system call that thread `tid` of this process is in.
///
/// The caller keeps the thread from ending meanwhile, so that the id cannot have been used again.
pub(crate) fn nudge(tid: i32) {
    let process = std::process::id() as libc::c_long;
    // SAFETY: no memory is passed; the signal has a handler that does nothing (`make_nudgeable`).
    unsafe { libc::syscall(libc::SYS_tgkill, process, tid, nudge_signal()) };
}
