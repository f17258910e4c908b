//! `kcmp(2)`: whether two processes share an object of the kernel, and an order among objects.

use std::cmp::Ordering;
use std::ffi::{c_int, c_ulong};

use rustix::io::Errno;

/// What is compared (include/uapi/linux/kcmp.h).
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Two open file descriptions; takes two descriptors.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Working and root directories.
    Fs = 3,
}

fn kcmp(a: i32, b: i32, kind: Kind, first: c_ulong, second: c_ulong) -> Result<Ordering, Errno> {
    // SAFETY: kcmp reads no memory of ours with these kinds; all arguments are numbers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind as c_int, first, second) };
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3 means "not equal, and no order"; the kernel never answers it for these kinds (kernel/kcmp.c, `kcmp_ptr`).
        3 => Err(Errno::OPNOTSUPP),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// Compares what descriptor `fd_a` of thread `a` and `fd_b` of thread `b` refer to. `EBADF` when one is not open.
pub(crate) fn file(a: i32, fd_a: i32, b: i32, fd_b: i32) -> Result<Ordering, Errno> {
    let first = c_ulong::try_from(fd_a).map_err(|_| Errno::BADF)?;
    let second = c_ulong::try_from(fd_b).map_err(|_| Errno::BADF)?;
    kcmp(a, b, Kind::File, first, second)
}

/// Compares the address spaces of two threads.
pub(crate) fn vm(a: i32, b: i32) -> Result<Ordering, Errno> {
    kcmp(a, b, Kind::Vm, 0, 0)
}

/// Compares the descriptor tables of two threads.
pub(crate) fn files(a: i32, b: i32) -> Result<Ordering, Errno> {
    kcmp(a, b, Kind::Files, 0, 0)
}

/// Compares the `fs_struct`s of two threads.
pub(crate) fn fs(a: i32, b: i32) -> Result<Ordering, Errno> {
    kcmp(a, b, Kind::Fs, 0, 0)
}
