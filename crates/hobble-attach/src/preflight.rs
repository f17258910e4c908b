//! Pre-flight: what stands against an attachment, found out without any side effect.
//!
//! Invariant: nothing is stopped, mounted or written here; the descriptors that a census takes are our own duplicates and are dropped at
//! the end. The engine runs the very same survey again before its first step, so what `--dry-run` prints is what is executed.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use hobble_api::exit::ExitCode;
use hobble_api::status::{
    AffectedProcess, NotCovered as NotCoveredStatus, Preflight, Reason, Scope, Verdict,
};
use hobble_graft::census::{self, Census, FileKind, NotCovered};
use hobble_graft::ids::{Pid, ProcessId};
use hobble_graft::proc::condition::{self, WordSize};
use hobble_graft::proc::locks::LockClass;
use hobble_graft::proc::mountinfo::Propagation;
use hobble_graft::proc::status::Seccomp;
use hobble_graft::proc::tree;

use crate::error::{AttachError, Step};
use crate::inspect;
use crate::options::InjectOptions;
use crate::own::Own;
use crate::volume::Volume;

/// Descriptors that a server needs besides those it keeps for the target.
const OWN_DESCRIPTORS: u64 = 256;

/// What a survey found.
pub(crate) struct Survey {
    /// The verdict and everything that led to it.
    pub(crate) preflight: Preflight,
    /// The volume, resolved; absent when that failed.
    pub(crate) volume: Option<Volume>,
    /// What they hold of the volume.
    pub(crate) census: Option<Census>,
    /// Targets that do not live in the volume's mount namespace.
    pub(crate) elsewhere: Vec<ProcessId>,
    /// The first reason to refuse, as an error.
    pub(crate) refusal: Option<AttachError>,
}

#[derive(Default)]
struct Reasons {
    refuse: Vec<(Reason, ExitCode)>,
    degraded: Vec<Reason>,
}

impl Reasons {
    fn refuse(&mut self, code: &str, text: impl Into<String>, hint: Option<&str>) {
        self.refuse_with(code, text, hint, ExitCode::Failed);
    }

    fn refuse_with(
        &mut self,
        code: &str,
        text: impl Into<String>,
        hint: Option<&str>,
        exit: ExitCode,
    ) {
        self.refuse.push((
            Reason {
                code: code.to_owned(),
                text: text.into(),
                hint: hint.map(str::to_owned),
            },
            exit,
        ));
    }

    fn degrade(&mut self, code: &str, text: impl Into<String>, hint: Option<&str>) {
        let reason = Reason {
            code: code.to_owned(),
            text: text.into(),
            hint: hint.map(str::to_owned),
        };
        if !self.degraded.contains(&reason) {
            self.degraded.push(reason);
        }
    }
}

/// Looks at kernel, target and volume, and says whether and how an attachment would work.
///
/// # Errors
/// When the process does not exist; everything else is a reason in the answer.
pub fn preflight(options: &InjectOptions) -> Result<Preflight, AttachError> {
    let start = inspect::start_time(options.pid)?;
    Ok(survey(
        options.pid,
        start,
        Own::new(ProcessId::own().ok()),
        options.scope,
        &options.path,
        &options.state_dir,
    )?
    .preflight)
}

/// The survey that pre-flight and the engine share.
pub(crate) fn survey(
    pid: i32,
    start: u64,
    own: Own,
    scope: Scope,
    path: &Path,
    state_dir: &Path,
) -> Result<Survey, AttachError> {
    let mut reasons = Reasons::default();
    let offers_passthrough = machine(&mut reasons);
    let target = Pid::new(pid)
        .map(|pid| ProcessId {
            pid,
            start_time: start,
        })
        .ok_or_else(|| {
            AttachError::new(Step::Preflight, format!("{pid} is not a process id"))
                .exiting(ExitCode::Usage)
        })?;
    fitness(target, true, own, &mut reasons);
    if scope == Scope::Tree && !crate::scope::TargetSet::tree(own, Vec::new).follows_forks() {
        let (text, hint) = inspect::NO_PROCESS_EVENTS;
        reasons.degrade("process_events", text, Some(hint));
    }
    let mut volume = None;
    let mut census = None;
    let mut elsewhere = Vec::new();
    if reasons.refuse.is_empty() {
        match Volume::resolve(target, path) {
            Ok(found) => {
                found.objections(state_dir, |code, text, hint, refuse| {
                    if refuse {
                        reasons.refuse(code, text, hint)
                    } else {
                        reasons.degrade(code, text, hint)
                    }
                });
                if let Some(version) = inspect::kernel_version() {
                    let around = found.propagation_around();
                    propagation(version, around, &found.display(), &mut reasons);
                }
                volume = Some(found);
            }
            Err(error) => {
                let chain = error.cause_chain();
                let text = if chain.is_empty() {
                    error.to_string()
                } else {
                    format!("{error}: {chain}")
                };
                reasons.refuse_with("path", text, error.hint(), error.exit_code());
            }
        }
    }
    if let Some(volume) = volume.as_ref().filter(|_| reasons.refuse.is_empty()) {
        let processes = crate::attaching::processes(target, scope, own)?;
        ourselves(own, &processes, volume, &mut reasons);
        for process in &processes {
            if *process != target {
                fitness(*process, false, own, &mut reasons);
            }
        }
        elsewhere = outside(&processes, volume);
        if !elsewhere.is_empty() {
            let text = format!("{} {OUTSIDE}", named(&elsewhere));
            reasons.degrade("other_namespace", text, Some(OUTSIDE_HINT));
        }
        match census::take(&processes, &|facts| volume.holds(facts)) {
            Ok(taken) => {
                holdings(&taken, volume, &mut reasons);
                if offers_passthrough && reasons.refuse.is_empty() {
                    backing(&taken, volume, &mut reasons);
                }
                census = Some(taken);
            }
            Err(error) => reasons.refuse(
                "census",
                format!("the target cannot be looked into: {}", chain(&error)),
                None,
            ),
        }
    }
    let affected = census.as_ref().map(affected).unwrap_or_default();
    let steps = volume
        .as_ref()
        .map(|volume| plan(volume, &affected, scope))
        .unwrap_or_default();
    let exit = exit_of(&reasons.refuse).unwrap_or(ExitCode::Failed);
    let refusal = reasons.refuse.first().map(|(reason, _)| {
        let error = AttachError::new(Step::Preflight, reason.text.clone()).exiting(exit);
        match &reason.hint {
            Some(hint) => error.hinting(hint.clone()),
            None => error,
        }
    });
    let verdict = match (reasons.refuse.is_empty(), reasons.degraded.is_empty()) {
        (false, _) => Verdict::Refuse,
        (true, false) => Verdict::Degraded,
        (true, true) => Verdict::Ok,
    };
    let list = reasons
        .refuse
        .into_iter()
        .map(|(reason, _)| reason)
        .chain(reasons.degraded)
        .collect();
    Ok(Survey {
        preflight: Preflight {
            verdict,
            reasons: list,
            steps,
            processes: affected,
        },
        volume,
        census,
        elsewhere,
        refusal,
    })
}

/// What is the matter with a target in another mount namespace than the volume's: mounts there are copies, and the hook lies on none of them.
const OUTSIDE: &str =
    "in another mount namespace: what is opened there by name stays native, what was open moves";
const OUTSIDE_HINT: &str = "each such namespace needs an attachment of its own";

/// Processes that a message names before it only counts them.
const NAMED: usize = 5;

/// The processes that do not live in the volume's mount namespace.
fn outside(processes: &[ProcessId], volume: &Volume) -> Vec<ProcessId> {
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
fn named(processes: &[ProcessId]) -> String {
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

/// An error with everything below it, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

/// What the machine itself lacks; gives whether its kernel offers passthrough.
fn machine(reasons: &mut Reasons) -> bool {
    let missing = inspect::missing_capabilities();
    if !missing.is_empty() {
        let list: Vec<String> = missing
            .iter()
            .map(|(name, why)| format!("{name} ({why})"))
            .collect();
        reasons.refuse(
            "capabilities",
            format!("missing capabilities: {}", list.join(", ")),
            Some("run hobble as root"),
        );
    }
    if let Some(version) = inspect::kernel_version() {
        kernel(version, reasons);
    }
    if !missing.is_empty() {
        return false;
    }
    match crate::server::probe() {
        Ok(true) => return true,
        Ok(false) => reasons.degrade(
            "no_passthrough",
            "the kernel offers no FUSE passthrough: every read and write goes through the server, mapped files are kept coherent only among users of the hook",
            Some("Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH"),
        ),
        Err(error) => reasons.refuse("fuse", chain(&error), Some("`hobble doctor` tells more")),
    }
    false
}

/// Whether the volume's filesystem can be passed through to, which the kernel tells only when asked to with a file of it; nothing is said without one.
fn backing(taken: &Census, volume: &Volume, reasons: &mut Reasons) {
    let open = taken
        .descriptions()
        .find(|description| description.facts.kind == FileKind::Regular)
        .map(|description| description.kept.as_fd());
    let mapped = || taken.mapped_files().first().map(|file| file.kept.as_fd());
    let first;
    let file = match open.or_else(mapped) {
        Some(file) => file,
        None => {
            first = volume.first_file();
            let Some(file) = first.as_ref() else { return };
            file.as_fd()
        }
    };
    match crate::hook::probe_backing(file, volume) {
        Ok(None) => {}
        Ok(Some(errno)) => reasons.degrade(
            "backing",
            format!(
                "passthrough is not possible on the filesystem of {} ({errno}): every read and write goes through the server",
                volume.display()
            ),
            (errno == hobble_fuse::Errno::LOOP)
                .then_some("it is stacked as deep as the kernel allows; hook what lies below it"),
        ),
        Err(error) => reasons.degrade("backing", chain(&error), None),
    }
}

/// What a kernel of this version cannot do, whatever the target.
fn kernel(version: inspect::Version, reasons: &mut Reasons) {
    let lacking = inspect::missing_features(version);
    if !lacking.is_empty() {
        let text = format!("the kernel lacks {}", lacking.join("; "));
        reasons.refuse("kernel", text, Some(inspect::NEEDED_VERSION));
    } else if !inspect::tells_rseq(version) {
        reasons.degrade(
            "rseq",
            "the kernel does not tell whether a thread is inside a restartable sequence (rseq(2)): a target that uses them, by its allocator for example, may be \
             disturbed when it is stopped there",
            Some("Linux 5.13 or later has PTRACE_GET_RSEQ_CONFIGURATION"),
        );
    }
}

/// What a kernel of this version cannot give back to the mount around the volume.
fn propagation(
    version: inspect::Version,
    propagation: &Propagation,
    volume: &str,
    reasons: &mut Reasons,
) {
    if propagation.is_private() || inspect::gives_back_groups(version) {
        return;
    }
    reasons.degrade(
        "propagation",
        format!(
            "the mount around {volume} is shared with other namespaces and cannot be put back into its peer group: from recovery on, what is mounted in it does not show there any more"
        ),
        Some("Linux 5.15 or later has MOVE_MOUNT_SET_GROUP"),
    );
}

/// The exit code of a refusal: that the target has gone matters more than what else is wrong.
fn exit_of(refusals: &[(Reason, ExitCode)]) -> Option<ExitCode> {
    let vanished = refusals
        .iter()
        .any(|(_, exit)| *exit == ExitCode::TargetVanished);
    if vanished {
        Some(ExitCode::TargetVanished)
    } else {
        refusals.first().map(|(_, exit)| *exit)
    }
}

/// Whether a process can be stopped and worked on.
fn fitness(process: ProcessId, named: bool, own: Own, reasons: &mut Reasons) {
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
fn ourselves(own: Own, processes: &[ProcessId], volume: &Volume, reasons: &mut Reasons) {
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
    let open = held.descriptions().len();
    if open > 0 {
        reasons.degrade(
            "own_descriptors",
            format!(
                "this command itself has {open} files of {name} open, its output perhaps: they stay native"
            ),
            None,
        );
    }
}

/// What the target holds that cannot be moved, or only with losses.
fn holdings(census: &Census, volume: &Volume, reasons: &mut Reasons) {
    // Each moved description: the census's copy, the one that is kept, and the stand-in; fewer as soon as the target goes on.
    let needed =
        (census.descriptions().len() + census.mapped_files().len()) as u64 * 3 + OWN_DESCRIPTORS;
    if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum
        && needed > limit
    {
        reasons.refuse(
            "descriptors",
            format!("about {needed} open files are needed while the target is moved, the hard limit is {limit}"),
            Some("raise hobble's hard limit (ulimit -Hn, LimitNOFILE=)"),
        );
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

fn affected(census: &Census) -> Vec<AffectedProcess> {
    let mut by_pid: BTreeMap<Pid, AffectedProcess> = BTreeMap::new();
    for process in census.processes() {
        let pid = process.id.pid;
        let leader = process
            .threads
            .iter()
            .find(|thread| thread.tid.as_raw() == pid.as_raw())
            .or(process.threads.first());
        let places = leader
            .map(|thread| census.places_in(thread.table))
            .unwrap_or_default();
        let table = leader.map(|thread| thread.table);
        let locks = census
            .descriptions()
            .filter(|description| {
                description
                    .places
                    .iter()
                    .any(|place| Some(place.table) == table)
            })
            .map(|description| {
                description
                    .locks
                    .iter()
                    .filter(|held| held.table.is_none() || held.table == table)
                    .count() as u64
            })
            .sum();
        let mappings = census
            .spaces()
            .iter()
            .find(|space| space.id == process.space)
            .map_or(0, |space| space.mappings.len() as u64);
        by_pid.insert(
            pid,
            AffectedProcess {
                pid: u32::try_from(pid.as_raw()).unwrap_or(0),
                comm: inspect::comm(pid.as_raw()),
                descriptors: places.len() as u64,
                mappings,
                locks,
            },
        );
    }
    by_pid.into_values().collect()
}

/// The steps of an attachment in words; the engine takes them in this order.
fn plan(volume: &Volume, affected: &[AffectedProcess], scope: Scope) -> Vec<String> {
    let descriptors: u64 = affected.iter().map(|process| process.descriptors).sum();
    let mappings: u64 = affected.iter().map(|process| process.mappings).sum();
    let locks: u64 = affected.iter().map(|process| process.locks).sum();
    let name = volume.display();
    vec![
        "open a journal in the state directory".to_owned(),
        format!("serve a mirror of {name} on a FUSE mount that is attached nowhere yet"),
        format!(
            "open stand-ins for {descriptors} descriptors and {mappings} mappings while the target runs"
        ),
        format!(
            "stop {} process{} ({})",
            affected.len(),
            if affected.len() == 1 { "" } else { "es" },
            match scope {
                Scope::Tree => "the process and its descendants",
                Scope::Namespace => "everybody in the mount namespace",
            }
        ),
        format!("put the mount over {name} in the target's mount namespace"),
        format!(
            "exchange {descriptors} descriptors, {mappings} mappings, {locks} locks and the working directories below {name}"
        ),
        "let the target go on, look for what was missed, turn the rules on".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(reasons: &Reasons) -> (Vec<&str>, Vec<&str>) {
        (
            reasons
                .refuse
                .iter()
                .map(|(r, _)| r.code.as_str())
                .collect(),
            reasons.degraded.iter().map(|r| r.code.as_str()).collect(),
        )
    }

    #[test]
    fn old_kernels_are_refused_or_degraded_by_what_they_lack() {
        for (version, refused, degraded) in [
            ((5, 7), vec!["kernel"], vec![]),
            ((5, 11), vec!["kernel"], vec![]),
            ((5, 12), vec![], vec!["rseq"]),
            ((5, 13), vec![], vec![]),
        ] {
            let mut reasons = Reasons::default();
            kernel(version, &mut reasons);
            assert_eq!(codes(&reasons), (refused, degraded), "{version:?}");
        }
    }

    #[test]
    fn a_shared_mount_that_cannot_be_given_back_is_told() {
        let shared = Propagation {
            peer_group: Some(7),
            ..Propagation::default()
        };
        for (version, around, degraded) in [
            ((5, 14), shared, vec!["propagation"]),
            ((5, 15), shared, vec![]),
            ((5, 14), Propagation::default(), vec![]),
        ] {
            let mut reasons = Reasons::default();
            propagation(version, &around, "/data", &mut reasons);
            assert_eq!(codes(&reasons), (vec![], degraded), "{version:?}");
        }
    }
}
