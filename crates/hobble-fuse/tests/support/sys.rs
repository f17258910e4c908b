//! System calls that the tests need raw.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A descriptor that was inherited by number.
pub(crate) fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: the parent of this process leaves the descriptor open for it, and nothing else in this process uses it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Has a child inherit a descriptor under the same number.
pub(crate) fn inherit(command: &mut Command, fd: BorrowedFd<'_>) {
    let number = fd.as_raw_fd();
    let clear = move || {
        // SAFETY: fcntl with F_SETFD touches no memory and may be called after fork.
        let result = unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
        if result < 0 {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: the closure makes one async-signal-safe system call and allocates nothing.
    unsafe { command.pre_exec(clear) };
}

/// Has a child get SIGTERM when the thread that starts it dies.
pub(crate) fn end_with_this_thread(command: &mut Command) {
    let ask = || {
        // SAFETY: this prctl touches no memory and may be called after fork.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
        if result < 0 {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: the closure makes one async-signal-safe system call and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs a handler for SIGALRM that does nothing, with SA_RESTART.
pub(crate) fn handle_alarm_with_restart() {
    // SAFETY: all-zero is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: both pointers are valid or null for the whole call, and the handler does nothing.
    let result = unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

/// Sends a signal to one thread.
pub(crate) fn tgkill(pid: i32, tid: i32, signal: i32) {
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    assert_eq!(result, 0, "tgkill: {}", std::io::Error::last_os_error());
}

/// Makes the calling thread's file system attributes its own and gives it a private mount namespace.
pub(crate) fn private_mount_namespace() {
    // SAFETY: the thread that calls this shares no file system attributes it depends on; no memory is touched.
    let result = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
}

/// A shared mapping of the first `len` bytes of a file.
pub(crate) struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    pub(crate) fn shared(file: BorrowedFd<'_>, len: usize) -> std::io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no memory in use.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(Self { address, len })
        }
    }

    pub(crate) fn copy(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: the mapping is `len` bytes long, is not unmapped before drop, and `bytes` is as long and distinct.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address.cast::<u8>(), bytes.as_mut_ptr(), self.len)
        };
        bytes
    }

    pub(crate) fn store(&self, at: usize, byte: u8) {
        assert!(at < self.len);
        let target = self.address.cast::<u8>().wrapping_add(at);
        // SAFETY: `at` lies within the mapping, which is writable.
        unsafe { target.write_volatile(byte) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `shared`, which nobody refers to any more.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

/// Asynchronous reads of one descriptor by libaio's system calls.
pub(crate) struct Aio {
    context: libc::c_ulong,
    controls: Vec<Iocb>,
    buffers: Vec<u8>,
}

/// `struct iocb` of include/uapi/linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

impl Aio {
    /// Submits `number` reads of `size` bytes each.
    pub(crate) fn reads(fd: BorrowedFd<'_>, number: usize, size: usize) -> Self {
        let mut aio = Self {
            context: 0,
            controls: Vec::new(),
            buffers: vec![0; number * size],
        };
        // SAFETY: the kernel writes the context's number through a valid pointer.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_setup,
                number as libc::c_long,
                &raw mut aio.context,
            )
        };
        assert_eq!(result, 0, "io_setup: {}", std::io::Error::last_os_error());
        for i in 0..number {
            aio.controls.push(Iocb {
                data: i as u64,
                fd: fd.as_raw_fd() as u32,
                buffer: aio.buffers[i * size..].as_mut_ptr() as u64,
                len: size as u64,
                ..Iocb::default()
            });
        }
        let mut pointers: Vec<*mut Iocb> =
            aio.controls.iter_mut().map(std::ptr::from_mut).collect();
        let mut done = 0;
        while done < number {
            let rest = &mut pointers[done..];
            // SAFETY: control blocks and buffers live in `aio` until every event has been reaped (or the context destroyed).
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    aio.context,
                    rest.len() as libc::c_long,
                    rest.as_mut_ptr(),
                )
            };
            assert!(result > 0, "io_submit: {}", std::io::Error::last_os_error());
            done += result as usize;
        }
        aio
    }

    /// Waits for all of them; their results.
    pub(crate) fn results(&self) -> Vec<i64> {
        let number = self.controls.len();
        let mut events = vec![IoEvent::default(); number];
        let mut done = 0;
        while done < number {
            let rest = &mut events[done..];
            // SAFETY: the kernel writes at most `rest.len()` events, which is what there is room for.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    1 as libc::c_long,
                    rest.len() as libc::c_long,
                    rest.as_mut_ptr(),
                    std::ptr::null_mut::<libc::timespec>(),
                )
            };
            assert!(
                result > 0,
                "io_getevents: {}",
                std::io::Error::last_os_error()
            );
            done += result as usize;
        }
        events.iter().map(|event| event.result).collect()
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context was made by io_setup; the call waits for what is still in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
