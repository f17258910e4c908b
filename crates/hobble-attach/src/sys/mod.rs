//! The few system calls of this crate that need `unsafe`, each behind a safe function.
#![allow(unsafe_code)]

use std::io;

/// Which side of a clone the caller is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The original process; holds the child's pid.
    Parent(i32),
    /// The new process.
    Child,
}

/// Clones the process so that both sides share one descriptor table but not their memory (`CLONE_FILES` without `CLONE_VM`): what
/// either opens or closes, both do, and the descriptors live until both are gone.
///
/// # Errors
/// EBUSY when the process has more than one thread: only the calling one would exist in the child, and locks of the others would stay
/// taken there for ever.
pub(crate) fn clone_sharing_descriptors() -> io::Result<Side> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with a null stack this is fork() with a shared descriptor table (clone(2)); the process is
    // single-threaded (checked above), so the child finds every lock of the allocator and of stdio free.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => Ok(Side::Child),
        pid if pid > 0 => Ok(Side::Parent(pid as i32)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is to a sigset_t that sigemptyset initialises.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by sigemptyset, which cannot fail for a valid pointer.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is initialised; an invalid number is answered with EINVAL and ignored.
        unsafe { libc::sigaddset(&mut set, *signal) };
    }
    set
}

/// Blocks signals in the calling thread, and so in every thread and child made later.
pub(crate) fn block_signals(signals: &[i32]) {
    let set = signal_set(signals);
    // SAFETY: the set is valid, the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

/// Unblocks signals in the calling thread.
pub(crate) fn unblock_signals(signals: &[i32]) {
    let set = signal_set(signals);
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) };
}

/// Waits for one of some blocked signals; `None` when the time is over.
pub(crate) fn wait_signal(signals: &[i32], timeout: std::time::Duration) -> Option<i32> {
    let set = signal_set(signals);
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    };
    // SAFETY: set and timeout live across the call; no siginfo is asked for.
    let signal = unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &timeout) };
    (signal > 0).then_some(signal)
}

/// Gives the calling, single-threaded process a mount namespace of its own.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: unsharing the mount namespace changes no memory and no descriptor; rustix marks it unsafe only for CLONE_FILES.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .map_err(io::Error::from)
}

/// Takes over a descriptor that the parent left open for this process and named in its arguments.
pub(crate) fn inherited(number: i32) -> std::os::fd::OwnedFd {
    // SAFETY: the hidden command's arguments are written by our own parent, which names two distinct descriptors that it left open for us and
    // that nothing else in this process knows; called once for each.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}

/// Whether a descriptor of this number is open.
pub(crate) fn is_open(number: i32) -> bool {
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    flags >= 0
}

/// Takes over a descriptor that a dead process has left in the table that we share with it, and that nobody else is going to close. To be called once for each.
pub(crate) fn take(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    if !is_open(number) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: open, as just seen, and its owner is dead.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
}

/// Takes a byte-range lock on an open file description (or changes its kind), without waiting. `end` is the last byte; `None` is the end of everything.
pub(crate) fn lock_description(
    fd: std::os::fd::BorrowedFd<'_>,
    is_write: bool,
    start: u64,
    end: Option<u64>,
) -> io::Result<()> {
    let out_of_range = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let length = end.map_or(0, |end| end.saturating_sub(start).saturating_add(1));
    let kind = if is_write {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: i64::try_from(start).map_err(out_of_range)?,
        l_len: i64::try_from(length).map_err(out_of_range)?,
        l_pid: 0,
    };
    set_description_lock(fd, &lock)
}

/// Gives up every byte-range lock of an open file description.
pub(crate) fn unlock_description(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_UNLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    set_description_lock(fd, &lock)
}

fn set_description_lock(fd: std::os::fd::BorrowedFd<'_>, lock: &libc::flock) -> io::Result<()> {
    // SAFETY: F_OFD_SETLK reads one flock structure (fcntl(2)).
    let done = unsafe {
        libc::fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&fd),
            libc::F_OFD_SETLK,
            lock,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
