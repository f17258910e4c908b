//! The general registers of a stopped thread, and what they say about the system call it was in.
//!
//! Owns the reading of `rax` and `orig_rax` as arch/x86/kernel/signal.c (`arch_do_signal_or_restart`) reads them. Invariant:
//! what is changed here is a copy; a thread is changed by writing it back while it is stopped.

use std::fmt;

/// The general registers as `PTRACE_GETREGSET(NT_PRSTATUS)` gives them.
#[derive(Clone, Copy)]
pub(crate) struct Registers(libc::user_regs_struct);

/// Error numbers that a system call leaves for the return to user space, never seen there (include/linux/errno.h).
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// `USER_CS` of a 64-bit thread (arch/x86/include/asm/segment.h).
const USER_CS: u64 = 0x33;

/// Both `syscall` and `int 0x80` are two bytes.
const SYSCALL_LENGTH: u64 = 2;

impl Default for Registers {
    fn default() -> Self {
        Self(libc::user_regs_struct {
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            rbp: 0,
            rbx: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rax: 0,
            rcx: 0,
            rdx: 0,
            rsi: 0,
            rdi: 0,
            orig_rax: u64::MAX,
            rip: 0,
            cs: USER_CS,
            eflags: 0,
            rsp: 0,
            ss: 0,
            fs_base: 0,
            gs_base: 0,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
        })
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("ip", &format_args!("{:#x}", self.0.rip))
            .field("sp", &format_args!("{:#x}", self.0.rsp))
            .field("result", &self.0.rax.cast_signed())
            .field("call", &self.0.orig_rax.cast_signed())
            .finish_non_exhaustive()
    }
}

impl Registers {
    /// The structure that ptrace fills and takes.
    pub(crate) fn raw(&self) -> &libc::user_regs_struct {
        &self.0
    }

    /// As [`Self::raw`], to be filled.
    pub(crate) fn raw_mut(&mut self) -> &mut libc::user_regs_struct {
        &mut self.0
    }

    /// The instruction pointer.
    pub(crate) fn ip(&self) -> u64 {
        self.0.rip
    }

    /// Sets the instruction pointer.
    pub(crate) fn set_ip(&mut self, ip: u64) {
        self.0.rip = ip;
    }

    /// What the last system call returned.
    pub(crate) fn result(&self) -> i64 {
        self.0.rax.cast_signed()
    }

    /// Whether the thread runs 64-bit code.
    pub(crate) fn is_64_bit(&self) -> bool {
        self.0.cs == USER_CS
    }

    /// The system call that the thread is in, if it is in one.
    pub(crate) fn call(&self) -> Option<i64> {
        let call = self.0.orig_rax.cast_signed();
        (call >= 0).then_some(call)
    }

    /// Makes the kernel restart the system call unless a handler runs, in place of the `EINTR` it would return.
    pub(crate) fn restart_unless_handled(&mut self) {
        self.0.rax = (-ERESTARTNOHAND).cast_unsigned();
    }

    /// The same thread about to make a system call of ours at `ip`. Its stack pointer stays.
    pub(crate) fn for_call(&self, ip: u64, number: u32, arguments: [u64; 6]) -> Self {
        let mut next = *self;
        let [a1, a2, a3, a4, a5, a6] = arguments;
        next.0.rip = ip;
        next.0.rax = number.into();
        // Not in a system call: the kernel has nothing to restart when this thread goes on.
        next.0.orig_rax = u64::MAX;
        next.0.rdi = a1;
        next.0.rsi = a2;
        next.0.rdx = a3;
        next.0.r10 = a4;
        next.0.r8 = a5;
        next.0.r9 = a6;
        // The direction flag may be set by the target; our code does not use string instructions, but TF would trap.
        next.0.eflags &= !0x100;
        next
    }
}

/// The registers with which user code can take up `stopped` without the kernel's help: the restart of an interrupted
/// system call is done by hand, as `arch_do_signal_or_restart` does it when no handler runs.
///
/// Only for the path on which the tracer has died. A signal that arrives between this decision and the restart is
/// handled before the call is made again; the wait then does not see it (the `pause` race that the kernel's own restart avoids).
pub(crate) fn dead_path(stopped: &Registers) -> Registers {
    let mut next = *stopped;
    if let Some(call) = stopped.call() {
        match -stopped.result() {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                next.0.rax = call.cast_unsigned();
                next.0.rip = next.0.rip.wrapping_sub(SYSCALL_LENGTH);
            }
            ERESTART_RESTARTBLOCK => {
                next.0.rax = libc::SYS_restart_syscall.cast_unsigned();
                next.0.rip = next.0.rip.wrapping_sub(SYSCALL_LENGTH);
            }
            _ => {}
        }
    }
    next.0.orig_rax = u64::MAX;
    next
}

/// Whether a thread stopped with these registers is about to return `EINTR` only because we stopped it.
///
/// These calls return plain `EINTR` after any stop (signal(7), "Interruption of system calls and library functions by stop
/// signals"), where others return one of the `ERESTART` numbers: they wait with a time-out that the kernel cannot resume, or a FUSE server
/// answered `EINTR` to the kernel's INTERRUPT. They have had no effect when they return `EINTR`, so making
/// them again is right. `close` is not among them: it has freed the number.
pub(crate) fn restarts_after_stop(registers: &Registers) -> bool {
    registers.result() == -i64::from(libc::EINTR)
        && registers
            .call()
            .is_some_and(|call| RETURNS_PLAIN_EINTR.contains(&call))
}

/// Sorted by what they wait for. A wait with a relative time-out may last at most that time-out once more.
const RETURNS_PLAIN_EINTR: &[i64] = &[
    // fs/eventpoll.c, ep_poll
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    // ipc/sem.c, do_semtimedop; ipc/msg.c
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    // kernel/signal.c, do_sigtimedwait
    libc::SYS_rt_sigtimedwait,
    // net/: sock_intr_errno() is EINTR when SO_RCVTIMEO or SO_SNDTIMEO is set
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // sockets as above, and files of a FUSE server
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fcntl,
    libc::SYS_flock,
    // fs/aio.c, io_uring/
    libc::SYS_io_getevents,
    333, // io_pgetevents
    libc::SYS_io_uring_enter,
    // kernel/futex/waitwake.c, futex_wait_multiple
    libc::SYS_futex_waitv,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(call: i64, result: i64) -> Registers {
        let mut registers = Registers::default();
        registers.0.orig_rax = call.cast_unsigned();
        registers.0.rax = result.cast_unsigned();
        registers.0.rip = 0x1000;
        registers
    }

    #[test]
    fn dead_path_rewinds_what_the_kernel_would() {
        for errno in [512, 513, 514] {
            let next = dead_path(&stopped(libc::SYS_read, -errno));
            assert_eq!(
                (next.0.rax.cast_signed(), next.0.rip),
                (libc::SYS_read, 0xffe)
            );
        }
        let next = dead_path(&stopped(libc::SYS_nanosleep, -516));
        assert_eq!((next.0.rax, next.0.rip), (219, 0xffe));
        let next = dead_path(&stopped(libc::SYS_read, 17));
        assert_eq!((next.0.rax, next.0.rip), (17, 0x1000));
        // -512 outside a system call is a value of the program's own.
        let next = dead_path(&stopped(-1, -512));
        assert_eq!((next.0.rax.cast_signed(), next.0.rip), (-512, 0x1000));
    }

    #[test]
    fn only_calls_without_effect_are_restarted() {
        assert!(restarts_after_stop(&stopped(libc::SYS_epoll_wait, -4)));
        assert!(!restarts_after_stop(&stopped(libc::SYS_epoll_wait, 1)));
        assert!(!restarts_after_stop(&stopped(libc::SYS_close, -4)));
        assert!(!restarts_after_stop(&stopped(-1, -4)));
    }
}
