//! The few calls that safe crates do not offer, for making a process with unusual habits.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};

/// Gives the calling thread a descriptor table or directories of its own.
pub(crate) fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: unshare takes a number. The caller is a test thread that owns what it then does alone.
    check(unsafe { libc::unshare(flags) }).map(drop)
}

/// `fcntl` with a number.
pub(crate) fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: only used with commands whose argument is a number.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}

/// `fcntl` with a lock.
pub(crate) fn lock(
    fd: BorrowedFd<'_>,
    command: i32,
    kind: i32,
    start: i64,
    length: i64,
) -> io::Result<()> {
    let flock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: only used with commands that read one flock, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const flock) }).map(drop)
}

/// Closes a descriptor that somebody else owns: in a forked copy, whose owner never runs.
pub(crate) fn close(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: only called in a forked copy that never drops the owner.
    check(unsafe { libc::close(fd.as_raw_fd()) }).map(drop)
}

/// Opens `path` under the number of `fd`, in a forked copy.
pub(crate) fn replace(fd: BorrowedFd<'_>, path: &std::ffi::CStr, flags: i32) -> io::Result<()> {
    // SAFETY: `path` ends with a NUL and outlives the call.
    let raw = check(unsafe { libc::open(path.as_ptr(), flags, 0o600) })?;
    // SAFETY: takes numbers; the descriptor that is closed by it is the caller's.
    check(unsafe { libc::dup3(raw, fd.as_raw_fd(), libc::O_CLOEXEC) })?;
    // SAFETY: `raw` was just opened here.
    check(unsafe { libc::close(raw) }).map(drop)
}

/// `F_SETOWN_EX`.
pub(crate) fn set_owner(fd: BorrowedFd<'_>, kind: i32, id: i32) -> io::Result<()> {
    let owner = [kind, id];
    // SAFETY: F_SETOWN_EX (15) reads two ints, which `owner` is.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), 15, owner.as_ptr()) }).map(drop)
}

/// An inotify instance that watches `path`.
pub(crate) fn inotify(path: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: takes a number.
    let raw = check(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    // SAFETY: `raw` was just opened and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: `path` ends with a NUL and outlives the call.
    check(unsafe { libc::inotify_add_watch(raw, path.as_ptr(), libc::IN_CREATE) })?;
    Ok(fd)
}

/// A mapping of the test's own, unmapped in the end.
#[derive(Debug)]
pub(crate) struct Memory {
    at: *mut libc::c_void,
    length: usize,
}

impl Memory {
    /// Maps `length` bytes of `fd` from `offset` on.
    pub(crate) fn map(
        fd: BorrowedFd<'_>,
        length: usize,
        protection: i32,
        flags: i32,
        offset: i64,
    ) -> io::Result<Self> {
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                fd.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { at, length })
        }
    }

    /// Its first address.
    pub(crate) fn address(&self) -> u64 {
        self.at.addr() as u64
    }

    /// Writes one byte.
    pub(crate) fn poke(&self, offset: usize, value: u8) {
        assert!(offset < self.length);
        // SAFETY: in bounds of the mapping, which was made writable by the test.
        let byte = unsafe { self.at.cast::<u8>().add(offset) };
        // SAFETY: as above; nobody else refers to this memory.
        unsafe { byte.write_volatile(value) };
    }

    /// `madvise` on the whole.
    pub(crate) fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is ours; no advice that frees memory in use by Rust is given.
        check(unsafe { libc::madvise(self.at, self.length, advice) }).map(drop)
    }

    /// `madvise` on one page.
    pub(crate) fn advise_page(&self, page: usize, advice: i32) -> io::Result<()> {
        assert!((page + 1) * 4096 <= self.length);
        // SAFETY: in bounds of the mapping.
        let at = unsafe { self.at.cast::<u8>().add(page * 4096) };
        // SAFETY: the page is ours and holds nothing that Rust knows of.
        check(unsafe { libc::madvise(at.cast(), 4096, advice) }).map(drop)
    }

    /// Unmaps it in a forked copy, in which it is never dropped.
    pub(crate) fn unmap(&self) -> io::Result<()> {
        // SAFETY: the range is ours, and the copy does not use it again.
        check(unsafe { libc::munmap(self.at, self.length) }).map(drop)
    }

    /// `mlock` on the whole.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is ours.
        check(unsafe { libc::mlock(self.at, self.length) }).map(drop)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and nothing refers to it any more.
        unsafe { libc::munmap(self.at, self.length) };
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A forked copy of this process that does what it is told, one step at a time, and is gone in the end.
#[derive(Debug)]
pub(crate) struct Target {
    pid: libc::pid_t,
    tell: OwnedFd,
    told: OwnedFd,
}

impl Target {
    /// Forks. The copy has one thread, and every descriptor and mapping that we have; step `n` is run by [`Target::step`]. A step
    /// may only make system calls: other threads may have held any lock of this process when it was copied.
    pub(crate) fn fork(steps: &[&dyn Fn() -> io::Result<()>]) -> Self {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let ((from_parent, tell), (told, to_parent)) = (pipe(), pipe());
        // SAFETY: the child makes system calls only, as documented, and never returns.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: takes numbers; has the kernel kill the child when the thread of the test ends.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let mut command = [0u8];
            while rustix::io::read(&from_parent, &mut command) == Ok(1) {
                let done = steps
                    .get(usize::from(command[0]))
                    .is_some_and(|step| step().is_ok());
                if rustix::io::write(&to_parent, &[u8::from(done)]) != Ok(1) {
                    break;
                }
            }
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(0) };
        }
        Self { pid, tell, told }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Runs a step to its end.
    pub(crate) fn step(&self, number: u8) {
        rustix::io::write(&self.tell, &[number]).unwrap();
        let mut done = [0u8];
        assert_eq!(
            rustix::io::read(&self.told, &mut done),
            Ok(1),
            "the target has died"
        );
        assert_eq!(done, [1], "step {number} has failed");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: the child was not waited for, so the pid is still its.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}
