//! What a target's seccomp filters would do to our code if we died.
//!
//! While we trace, the filters are suspended; when we die the kernel enforces them again, and the code in the target still has a few calls
//! to make before it is done. Owns the evaluation of classic BPF as kernel/seccomp.c runs it. Invariant: a target is borrowed only if none of
//! these calls would kill it, trap, or wait for somebody, and the one that unblocks its signals is allowed.

use super::RemoteError;
use crate::arch;
use crate::ids::Tid;
use crate::proc::status::Seccomp;
use crate::stop::sys as ptrace;

/// One instruction, `struct sock_filter` of include/uapi/linux/filter.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    constant: u32,
}

impl From<u64> for Instruction {
    fn from(word: u64) -> Self {
        let [c0, c1, if_true, if_false, k0, k1, k2, k3] = word.to_ne_bytes();
        let (code, constant) = (
            u16::from_ne_bytes([c0, c1]),
            u32::from_ne_bytes([k0, k1, k2, k3]),
        );
        Self {
            code,
            if_true,
            if_false,
            constant,
        }
    }
}

/// What a filter sees of a call, `struct seccomp_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    number: u32,
    architecture: u32,
    ip: u64,
    arguments: [u64; 6],
}

const RET_ACTION: u32 = 0xffff_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// How a call would fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// It is made.
    Allowed,
    /// It returns an error.
    Error,
    /// It kills, traps, or waits for a supervisor.
    Harmful,
}

impl Seen {
    /// The 32-bit word at an offset (seccomp loads nothing else).
    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64, high: bool| {
            if high {
                (value >> 32) as u32
            } else {
                value as u32
            }
        };
        match offset {
            0 => Some(self.number),
            4 => Some(self.architecture),
            8 | 12 => Some(half(self.ip, offset == 12)),
            16..64 if offset.is_multiple_of(4) => {
                let index = usize::try_from((offset - 16) / 8).ok()?;
                Some(half(*self.arguments.get(index)?, offset % 8 == 4))
            }
            _ => None,
        }
    }
}

/// What one filter returns; `None` when it is not a program that the kernel would have accepted.
fn run(program: &[Instruction], seen: &Seen) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; 16]);
    let mut at = 0_usize;
    // Jumps go forwards only, so this ends.
    loop {
        let instruction = *program.get(at)?;
        let k = instruction.constant;
        let slot = usize::try_from(k).ok()?;
        at += 1;
        // include/uapi/linux/bpf_common.h: class in the low three bits.
        match instruction.code & 0x07 {
            0x00 => {
                a = match instruction.code {
                    0x20 => seen.word(k)?,
                    0x00 => k,
                    0x60 => *memory.get(slot)?,
                    0x80 => 64,
                    _ => return None,
                }
            }
            0x01 => {
                x = match instruction.code {
                    0x01 => k,
                    0x61 => *memory.get(slot)?,
                    0x81 => 64,
                    _ => return None,
                }
            }
            0x02 => *memory.get_mut(slot)? = a,
            0x03 => *memory.get_mut(slot)? = x,
            0x04 => {
                let operand = if instruction.code & 0x08 == 0 { k } else { x };
                a = match instruction.code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    // A division by zero returns 0 from the whole filter (kernel/bpf/core.c).
                    0x30 if operand == 0 => return Some(0),
                    0x30 => a / operand,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.wrapping_shl(operand),
                    0x70 => a.wrapping_shr(operand),
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                }
            }
            0x05 => {
                let operand = if instruction.code & 0x08 == 0 { k } else { x };
                let holds = match instruction.code & 0xf0 {
                    0x00 => {
                        at = at.checked_add(slot)?;
                        continue;
                    }
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds {
                    instruction.if_true
                } else {
                    instruction.if_false
                });
            }
            0x06 => {
                return Some(if instruction.code & 0x18 == 0x10 {
                    a
                } else {
                    k
                });
            }
            _ if instruction.code & 0xf8 == 0x80 => a = x,
            _ => x = a,
        }
    }
}

/// What all filters of a thread together make of a call: the strictest counts.
fn verdict(filters: &[Vec<Instruction>], seen: &Seen) -> Verdict {
    filters
        .iter()
        .map(
            |program| match run(program, seen).map(|value| value & RET_ACTION) {
                Some(RET_ALLOW | RET_LOG) => Verdict::Allowed,
                Some(RET_ERRNO) => Verdict::Error,
                _ => Verdict::Harmful,
            },
        )
        .max()
        .unwrap_or(Verdict::Allowed)
}

/// Calls that the code in the target makes, or may be in the middle of, when the tracer dies. The first must be allowed; an error of the others
/// does no harm.
const CALLS_WITHOUT_US: &[i64] = &[
    libc::SYS_rt_sigprocmask,
    libc::SYS_read,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_dup3,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_socketpair,
    libc::SYS_setsockopt,
    libc::SYS_fchdir,
    libc::SYS_fcntl,
];

/// What a thread could go on doing if its tracer died, its filters being enforced again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alone {
    /// Bring to its end what it has begun to receive in place: what is closed is received, too.
    pub(super) receives_in_place: bool,
    /// `close_range`, which older allow lists do not know.
    pub(super) closes_ranges: bool,
}

/// Calls that receive in place. All must be allowed, for after the first the others have to follow.
const RECEIVING_IN_PLACE: &[i64] = &[
    libc::SYS_recvfrom,
    libc::SYS_close,
    libc::SYS_recvmsg,
    libc::SYS_dup3,
];

/// Refuses threads that their own filters would kill for finishing without us.
pub(super) fn check(tid: Tid, seccomp: Seccomp) -> Result<Alone, RemoteError> {
    match seccomp {
        Seccomp::Disabled => {
            return Ok(Alone {
                receives_in_place: true,
                closes_ranges: true,
            });
        }
        Seccomp::Strict => {
            return Err(RemoteError::Filtered {
                tid,
                call: libc::SYS_close,
            });
        }
        Seccomp::Filter => {}
    }
    let mut filters: Vec<Vec<Instruction>> = Vec::new();
    loop {
        match ptrace::seccomp_filter(tid, filters.len()) {
            Ok(Some(words)) => filters.push(words.into_iter().map(Into::into).collect()),
            Ok(None) => break,
            // Refused (we are filtered ourselves), or not built in: nothing is known of the filter.
            Err(_) => return Err(RemoteError::Filtered { tid, call: -1 }),
        }
    }
    let verdict_on = |call: i64| {
        let seen = Seen {
            number: u32::try_from(call).unwrap_or(u32::MAX),
            architecture: arch::AUDIT_ARCHITECTURE,
            ip: 0,
            arguments: [0; 6],
        };
        verdict(&filters, &seen)
    };
    for call in CALLS_WITHOUT_US {
        let worst = if *call == libc::SYS_rt_sigprocmask {
            Verdict::Allowed
        } else {
            Verdict::Error
        };
        if verdict_on(*call) > worst {
            return Err(RemoteError::Filtered { tid, call: *call });
        }
    }
    let is_allowed = |call: &i64| verdict_on(*call) == Verdict::Allowed;
    Ok(Alone {
        receives_in_place: RECEIVING_IN_PLACE.iter().all(is_allowed),
        closes_ranges: is_allowed(&libc::SYS_close_range),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(code: u16, constant: u32, if_true: u8, if_false: u8) -> Instruction {
        Instruction {
            code,
            if_true,
            if_false,
            constant,
        }
    }

    fn call(number: u32) -> Seen {
        Seen {
            number,
            architecture: 0xc000_003e,
            ip: 0x1_0000_0002,
            arguments: [7 << 32 | 5, 0, 0, 0, 0, 0],
        }
    }

    #[test]
    fn the_strictest_filter_counts() {
        let kill_close = vec![
            op(0x20, 0, 0, 0),
            op(0x15, 3, 0, 1),
            op(0x06, 0, 0, 0),
            op(0x06, RET_ALLOW, 0, 0),
        ];
        let error_read = vec![
            op(0x20, 0, 0, 0),
            op(0x15, 0, 0, 1),
            op(0x06, RET_ERRNO | 1, 0, 0),
            op(0x06, RET_LOG, 0, 0),
        ];
        let both = [kill_close, error_read];
        assert_eq!(verdict(&both, &call(3)), Verdict::Harmful);
        assert_eq!(verdict(&both, &call(0)), Verdict::Error);
        assert_eq!(verdict(&both, &call(1)), Verdict::Allowed);
        assert_eq!(verdict(&[], &call(3)), Verdict::Allowed);
    }

    #[test]
    fn loads_arithmetic_and_memory() {
        // (low(arg0) + high(arg0)) * 2 - high(ip) == 23, through memory and both registers.
        let program = vec![
            op(0x20, 16, 0, 0),
            op(0x02, 3, 0, 0),
            op(0x20, 20, 0, 0),
            op(0x61, 3, 0, 0),
            op(0x0c, 0, 0, 0),
            op(0x24, 2, 0, 0),
            op(0x07, 0, 0, 0),
            op(0x20, 12, 0, 0),
            op(0x02, 0, 0, 0),
            op(0x87, 0, 0, 0),
            op(0x61, 0, 0, 0),
            op(0x1c, 0, 0, 0),
            op(0x15, 23, 0, 1),
            op(0x06, RET_ALLOW, 0, 0),
            op(0x06, 0, 0, 0),
        ];
        assert_eq!(run(&program, &call(0)), Some(RET_ALLOW));
        assert_eq!(
            run(
                &[op(0x05, 1, 0, 0), op(0x06, 1, 0, 0), op(0x06, 2, 0, 0)],
                &call(0)
            ),
            Some(2)
        );
        assert_eq!(run(&[op(0x34, 0, 0, 0)], &call(0)), Some(0));
    }

    #[test]
    fn programs_the_kernel_would_refuse_count_as_harmful() {
        for bad in [
            vec![],
            vec![op(0x20, 2, 0, 0)],
            vec![op(0x20, 64, 0, 0)],
            vec![op(0x60, 16, 0, 0)],
            vec![op(0xff, 0, 0, 0)],
        ] {
            assert_eq!(verdict(&[bad], &call(0)), Verdict::Harmful);
        }
    }
}
