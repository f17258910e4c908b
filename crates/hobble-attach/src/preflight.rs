//! Pre-flight: what stands against an attachment, found out without any side effect.
//!
//! Invariant: nothing is stopped, mounted or written here; the descriptors that a census takes are our own duplicates and are dropped at
//! the end. The engine runs the very same survey again before its first step, so what `--dry-run` prints is what is executed.

mod machine;
mod processes;
mod reasons;

use std::collections::BTreeMap;
use std::path::Path;

use hobble_api::exit::ExitCode;
use hobble_api::status::{AffectedProcess, Preflight, Scope, Verdict};
use hobble_graft::census::{self, Census};
use hobble_graft::ids::{Pid, ProcessId};

use crate::error::{AttachError, Step};
use crate::inspect;
use crate::options::InjectOptions;
use crate::own::Own;
use crate::slices::TooMany;
use crate::volume::Volume;
use machine::{backing, machine, propagation};
use processes::{OUTSIDE, OUTSIDE_HINT, fitness, holdings, named, ourselves, outside};
pub(crate) use processes::{describe, not_covered};
use reasons::{Reasons, exit_of};

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

/// The hint where more descriptors would help.
pub(crate) const MORE_DESCRIPTORS: &str = "raise hobble's hard limit (ulimit -Hn, LimitNOFILE=)";

/// Why a target has more open files than can be moved.
pub(crate) fn too_many(why: &TooMany) -> String {
    let TooMany {
        held,
        together,
        room,
    } = why;
    let of_these = if *together > 0 {
        format!(", of which {together} belong to one file or are locked and go together")
    } else {
        String::new()
    };
    format!(
        "the target has {held} open files of the volume{of_these}: each takes a descriptor of Hobble's for as long as it is attached and two while it is moved, and there are {room}"
    )
}
