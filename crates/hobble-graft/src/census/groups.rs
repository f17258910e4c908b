//! Who shares what: living threads, grouped by the object of the kernel that they use.
//!
//! Invariant: a group never holds a thread that had already lost the object. Threads in `exit()` have none, and all of them would
//! look alike to `kcmp`, so every group is checked by a member that is certainly not exiting *after* it was compared.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use rustix::io::Errno;

use super::{CensusError, Member};
use crate::ids::ProcessId;
use crate::proc::{ProcError, stat, tree};
use crate::sys::kcmp;

/// A comparison of two threads by one of the objects they use.
pub(super) type Compare = fn(i32, i32) -> Result<Ordering, Errno>;

/// The threads of those of `processes` that are alive, by process.
pub(super) fn living(
    processes: &[ProcessId],
) -> Result<BTreeMap<ProcessId, Vec<Member>>, CensusError> {
    let mut found = BTreeMap::new();
    for id in processes {
        match id.is_alive().and_then(|alive| {
            if alive {
                tree::threads(id.pid).map(Some)
            } else {
                Ok(None)
            }
        }) {
            Ok(Some(threads)) => {
                found.insert(
                    *id,
                    threads
                        .into_iter()
                        .map(|tid| Member { pid: id.pid, tid })
                        .collect(),
                );
            }
            Ok(None) => {}
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

/// Partitions `members` by `compare`. Members that end meanwhile are left out.
pub(super) fn partition(
    members: &[Member],
    compare: Compare,
) -> Result<Vec<Vec<Member>>, CensusError> {
    let mut left: Vec<Member> = members.to_vec();
    // Every round either ends or drops a thread that was exiting.
    loop {
        let groups = sort(&left, compare)?;
        let mut exiting = Vec::new();
        for group in &groups {
            let Some(first) = group.first() else { continue };
            if !is_exiting(*first)? {
                continue;
            }
            for member in group {
                if is_exiting(*member)? {
                    exiting.push(*member);
                }
            }
        }
        if exiting.is_empty() {
            return Ok(groups);
        }
        left.retain(|member| !exiting.contains(member));
    }
}

/// Whether a thread has lost, or is about to lose, what it shares.
pub(super) fn is_exiting(member: Member) -> Result<bool, ProcError> {
    match stat::of_thread(member.pid, member.tid) {
        Ok(stat) => Ok(stat.is_exiting() || stat.state.is_dead()),
        Err(error) if error.is_gone() => Ok(true),
        Err(error) => Err(error),
    }
}

/// Groups in the kernel's order, each with its members ascending.
fn sort(members: &[Member], compare: Compare) -> Result<Vec<Vec<Member>>, CensusError> {
    let mut groups: Vec<Vec<Member>> = Vec::new();
    // Neighbours nearly always share, so the group of the one before is tried first.
    let mut last = 0;
    'members: for member in members {
        if let Some(group) = groups.get_mut(last)
            && against(group, *member, compare)? == Some(Ordering::Equal)
        {
            group.push(*member);
            continue;
        }
        let (mut low, mut high) = (0, groups.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some(group) = groups.get_mut(middle) else {
                break;
            };
            match against(group, *member, compare)? {
                Some(Ordering::Equal) => {
                    group.push(*member);
                    last = middle;
                    continue 'members;
                }
                Some(Ordering::Less) => low = middle + 1,
                Some(Ordering::Greater) => high = middle,
                None if group.is_empty() => {
                    // Nobody of that group is left.
                    groups.remove(middle);
                    high -= 1;
                }
                None => continue 'members,
            }
        }
        groups.insert(low, vec![*member]);
        last = low;
    }
    for group in &mut groups {
        group.sort_unstable();
    }
    Ok(groups)
}

/// How the group lies to the member; `None` when the member is gone, or when nobody is left in the group, which is then empty.
fn against(
    group: &mut Vec<Member>,
    member: Member,
    compare: Compare,
) -> Result<Option<Ordering>, CensusError> {
    while let Some(first) = group.first() {
        let (a, b) = (first.tid.as_raw(), member.tid.as_raw());
        match compare(a, b) {
            Ok(order) => return Ok(Some(order)),
            Err(Errno::SRCH) => {
                if compare(b, b) == Err(Errno::SRCH) {
                    return Ok(None);
                }
                group.remove(0);
            }
            Err(errno) => {
                return Err(CensusError::compare(member.pid, errno));
            }
        }
    }
    Ok(None)
}

/// By descriptor table.
pub(super) const TABLES: Compare = kcmp::files;
/// By working and root directory.
pub(super) const DIRECTORIES: Compare = kcmp::fs;
/// By memory.
pub(super) const SPACES: Compare = kcmp::vm;
