//! Who would be stopped: whether each of them can be, where it lives, and what of it would not move.

use hobble_api::exit::ExitCode;
use hobble_api::status::NotCovered as NotCoveredStatus;
use hobble_graft::census::{self, Census, NotCovered};
use hobble_graft::ids::ProcessId;
use hobble_graft::proc::condition::{self, WordSize};
use hobble_graft::proc::locks::LockClass;
use hobble_graft::proc::status::Seccomp;
use hobble_graft::proc::tree;

use super::MORE_DESCRIPTORS;
use super::chain;
use super::reasons::Reasons;
use crate::inspect;
use crate::own::Own;
use crate::slices;
use crate::volume::Volume;

/// Descriptors that a server needs besides those it keeps for the target.
const OWN_DESCRIPTORS: usize = 256;

/// What is the matter with a target in another mount namespace than the volume's: mounts there are copies, and the hook lies on none of them.
pub(super) const OUTSIDE: &str =
    "in another mount namespace: what is opened there by name stays native, what was open moves";
pub(super) const OUTSIDE_HINT: &str = "each such namespace needs an attachment of its own";

/// Processes that a message names before it only counts them.
pub(super) const NAMED: usize = 5;

/// The processes that do not live in the volume's mount namespace.
pub(super) fn outside(processes: &[ProcessId], volume: &Volume) -> Vec<ProcessId> {
    processes
        .iter()
        .filter(|process| {
            // One that has gone meanwhile is nowhere.
            tree::mount_namespace(process.pid).is_ok_and(|namespace| !volume.is_in(namespace))
        })
        .copied()
        .collect()
}

/// `process 12 (sh)` or `processes 12 (sh), 13 (cat) and 7 more`.
pub(super) fn named(processes: &[ProcessId]) -> String {
    let list: Vec<String> = processes
        .iter()
        .take(NAMED)
        .map(|process| format!("{} ({})", process.pid, inspect::comm(process.pid.as_raw())))
        .collect();
    let rest = processes.len() - list.len();
    let more = if rest > 0 {
        format!(" and {rest} more")
    } else {
        String::new()
    };
    let what = if processes.len() == 1 {
        "process"
    } else {
        "processes"
    };
    format!("{what} {}{more}", list.join(", "))
}

/// The targets in other mount namespaces, for the report of an attach.
pub(crate) fn not_covered(elsewhere: &[ProcessId]) -> Vec<NotCoveredStatus> {
    elsewhere
        .iter()
        .map(|process| NotCoveredStatus {
            what: named(&[*process]),
            reason: format!("{OUTSIDE}; {OUTSIDE_HINT}"),
            pid: u32::try_from(process.pid.as_raw()).ok(),
        })
        .collect()
}

/// Whether a process can be stopped and worked on.
pub(super) fn fitness(process: ProcessId, named: bool, own: Own, reasons: &mut Reasons) {
    let pid = process.pid;
    let condition = match condition::of(process) {
        Ok(condition) => condition,
        Err(error) if error.is_gone() => {
            if named {
                reasons.refuse_with(
                    "gone",
                    format!("process {pid} has exited"),
                    None,
                    ExitCode::TargetVanished,
                );
            }
            return;
        }
        Err(error) => {
            return reasons.refuse(
                "inspect",
                format!("process {pid} cannot be looked at: {}", chain(&error)),
                None,
            );
        }
    };
    let comm = inspect::comm(pid.as_raw());
    let who = format!("process {pid} ({comm})");
    if condition.is_kernel_thread {
        return reasons.refuse(
            "kernel_thread",
            format!("{who} is a thread of the kernel"),
            None,
        );
    }
    if condition.is_zombie || condition.is_exiting {
        if named {
            let hint = "it has no files any more; its parent has only to wait for it";
            reasons.refuse_with(
                "zombie",
                format!("{who} has ended and is a zombie"),
                Some(hint),
                ExitCode::TargetVanished,
            );
        }
        return;
    }
    if own.includes(pid) {
        return reasons.refuse("own", format!("{who} is hobble itself"), None);
    }
    if let Some(tracer) = condition.tracer {
        let tracer = tracer.as_raw();
        reasons.refuse(
            "traced",
            format!(
                "{who} is already traced by process {tracer} ({})",
                inspect::comm(tracer)
            ),
            Some("end the debugger, strace or other attachment first"),
        );
    }
    if condition.word_size == Some(WordSize::Bits32) {
        reasons.refuse(
            "word_size",
            format!("{who} is a 32-bit program, which cannot be moved"),
            None,
        );
    }
    if condition.is_frozen == Some(true) {
        reasons.refuse(
            "frozen",
            format!("{who} is frozen by its cgroup and cannot be stopped for the exchange"),
            Some("thaw the cgroup first"),
        );
    }
    if condition.is_stopped {
        reasons.degrade(
            "stopped",
            format!("{who} is stopped; it stays so"),
            Some("kill -CONT lets it go on"),
        );
    }
    if condition.status.seccomp != Seccomp::Disabled && inspect::under_seccomp() {
        reasons.refuse(
            "seccomp",
            format!("{who} has a seccomp filter, and hobble runs under one itself, so it may not suspend the target's"),
            Some("run hobble without SystemCallFilter, or with seccomp=unconfined"),
        );
    }
}

/// What the command that asks for the attachment has to do with it: it is no target itself, but its parents may be, and it may be at work in the volume.
pub(super) fn ourselves(own: Own, processes: &[ProcessId], volume: &Volume, reasons: &mut Reasons) {
    let above: Vec<ProcessId> = own
        .ancestors()
        .into_iter()
        .filter(|ancestor| processes.contains(ancestor))
        .collect();
    if !above.is_empty() {
        reasons.degrade(
            "own_ancestor",
            format!(
                "this command was started by {}, which the scope holds: stopped with the others, the terminal with it, and what it starts from now on is faulted too",
                named(&above)
            ),
            Some("run hobble from a shell outside the target"),
        );
    }
    let Some(caller) = own.caller() else { return };
    // A caller that cannot be looked into has nothing to say; it is not moved in any case.
    let Ok(held) = census::take(&[caller], &|facts| volume.holds(facts)) else {
        return;
    };
    let name = volume.display();
    let here = |fs: &census::FsStruct| fs.cwd.is_some() || fs.root.is_some();
    if held.fs_structs().iter().any(here) {
        reasons.degrade(
            "own_directory",
            format!("this command's own working directory lies in {name}: it stays native"),
            None,
        );
    }
    // What it was started with, not what it opens to find all this out: that is never handed on.
    let is_inherited = |description: &&census::Description| {
        description.places.iter().any(|place| !place.close_on_exec)
    };
    let open = held.descriptions().filter(is_inherited).count();
    if open > 0 {
        reasons.degrade(
            "own_descriptors",
            format!(
                "this command itself has files of {name} open ({open}), its output perhaps: they stay native"
            ),
            None,
        );
    }
}

/// What the target holds that cannot be moved, or only with losses.
pub(super) fn holdings(census: &Census, volume: &Volume, reasons: &mut Reasons) {
    match slices::inwards(census, slices::room_at_most(OWN_DESCRIPTORS)) {
        Ok(parts) if parts.len() > 1 => reasons.degrade(
            "slices",
            format!(
                "it has more open files than are moved at once: they are moved in {} stops, and given back in several; between the first and the last, what it opens anew is on                  the hook already while an older descriptor of the same file may not be yet",
                parts.len()
            ),
            Some(MORE_DESCRIPTORS),
        ),
        Ok(_) => {}
        Err(too_many) => reasons.refuse("descriptors", super::too_many(&too_many), Some(MORE_DESCRIPTORS)),
    }
    let posix = census
        .descriptions()
        .flat_map(|description| &description.locks)
        .any(|held| held.lock.class == LockClass::Posix);
    if posix {
        reasons.degrade(
            "fcntl_locks",
            "the target holds POSIX locks: while they are handed over another process could take a read lock on them, and a program that keys its own lock table by st_dev \
             sees files opened before and after as different",
            Some("hobble keeps such descriptors apart; see docs/specification.md"),
        );
    }
    for not_covered in census.not_covered() {
        let (code, text) = describe(not_covered, volume);
        if let Some(text) = text {
            reasons.degrade(code, text, None);
        }
    }
}

/// A short name and a sentence for something that is not moved; no sentence when it does not concern the volume.
pub(crate) fn describe(
    not_covered: &NotCovered,
    volume: &Volume,
) -> (&'static str, Option<String>) {
    match not_covered {
        NotCovered::InFlight {
            fd, descriptors, ..
        } => (
            "in_flight",
            Some(format!(
                "{descriptors} descriptors wait unreceived in socket {fd}; should they be of the volume, they arrive native"
            )),
        ),
        NotCovered::IoUring { fd, files, .. } => (
            "io_uring",
            Some(format!(
                "io_uring {fd} has {files} registered files, which stay native; operations through descriptors are covered"
            )),
        ),
        NotCovered::Aio { .. } => (
            "aio",
            Some("kernel AIO is in use: operations in flight finish on the native file".to_owned()),
        ),
        NotCovered::Lease { .. } => (
            "lease",
            Some("a lease is held, which a file on the hook cannot have".to_owned()),
        ),
        NotCovered::Inotify { fd, watches, .. } => {
            let here = watches
                .iter()
                .filter(|(device, _)| volume.is_on(*device))
                .count();
            ("inotify", (here > 0).then(|| format!("inotify {fd} has {here} watches on the volume's filesystem; they see what reaches the backing files")))
        }
        NotCovered::Fanotify { fd, .. } => (
            "fanotify",
            Some(format!("fanotify {fd} sees what reaches the backing files")),
        ),
        NotCovered::Executable { process, .. } => (
            "executable",
            Some(format!(
                "the program of process {process} lies in the volume; /proc/{process}/exe stays native"
            )),
        ),
        _ => ("other", None),
    }
}
