//! What a journal says, put together: who was attached how, what is kept where, and what may be left in which process.
//!
//! Invariant: everything here is a claim of a file that may have been tampered with. A claim about a process is used only while a process with that
//! pid *and* start time lives; a claim about a descriptor only when the descriptor turns out to be that file.

use hobble_graft::ids::{BootId, Pid, ProcessId};
use hobble_graft::remote::Residue;

use crate::journal::{Around, JournalError, Kept, PosixLock, Record, Who};
use crate::session::ServeConfig;

/// A journal's claims.
#[derive(Debug, Default)]
pub(crate) struct Story {
    pub(crate) holder: Option<ProcessId>,
    /// Who has served or begun to undo, in order, those left out that have given up.
    pub(crate) servers: Vec<ProcessId>,
    pub(crate) target: Option<ProcessId>,
    pub(crate) scope: String,
    pub(crate) mount_ns: u64,
    pub(crate) path: Vec<u8>,
    /// What `/proc/mounts` shows as the hook's source.
    pub(crate) source: String,
    /// `st_dev` of the hook; 0 when there was no connection yet.
    pub(crate) hook_dev: u64,
    /// `st_dev` of the volume.
    pub(crate) backing_dev: Option<u64>,
    pub(crate) kept: Vec<Kept>,
    pub(crate) posix: Vec<PosixLock>,
    /// An exchange may have been cut off: a process's locks are what the journal says, not what the server was found to hold for it.
    pub(crate) exchanging: bool,
    pub(crate) residues: Vec<Residue>,
    /// Soft limits that may be raised still, in the order in which they were raised. A process may be in it twice: a recovery that died raised what the
    /// server had left raised.
    pub(crate) limits: Vec<RaisedLimit>,
    /// Somebody but Hobble may be on the hook: it was about to be placed.
    pub(crate) may_be_placed: bool,
    /// The hook was about to be placed: it may be there, and the mount around it may propagate differently.
    pub(crate) placing: Option<Around>,
}

/// A soft limit on descriptors that was raised for an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RaisedLimit {
    pub(crate) who: Who,
    /// What it was before.
    pub(crate) soft: u64,
    /// What it was raised to.
    pub(crate) raised: u64,
}

/// A process named by the journal, if its numbers are numbers of a process.
pub(crate) fn process(who: Who) -> Option<ProcessId> {
    Pid::new(who.pid).map(|pid| ProcessId {
        pid,
        start_time: who.start,
    })
}

/// Whether a server may still answer. What cannot be looked at is taken for alive: to wait for a dead one costs time, to undo beside a living one costs the target.
pub(crate) fn lives(process: ProcessId) -> bool {
    !process.is_ending().unwrap_or(false)
}

impl Story {
    /// Puts the records of attachment `id` together.
    ///
    /// # Errors
    /// [`JournalError::Foreign`] when they tell of another boot or another attachment.
    pub(crate) fn of(records: Vec<Record>, id: &str) -> Result<Self, JournalError> {
        let mut story = Self {
            source: crate::hook::source(id),
            ..Self::default()
        };
        for record in records {
            match record {
                Record::Opened {
                    id: named, boot_id, ..
                } => {
                    if named != id {
                        return Err(JournalError::Foreign {
                            problem: format!("it names attachment `{named}`"),
                        });
                    }
                    let now = BootId::current().map_err(|error| JournalError::Foreign {
                        problem: error.to_string(),
                    })?;
                    if BootId::parse(boot_id.as_bytes()).is_none_or(|then| then != now) {
                        return Err(JournalError::Foreign {
                            problem:
                                "it was written before the last boot: there is nothing left to undo"
                                    .to_owned(),
                        });
                    }
                }
                Record::Holder(who) => story.holder = process(who),
                Record::Server(who) => story.servers.extend(process(who)),
                Record::GaveUp(who) => {
                    let gave_up = process(who);
                    story.servers.retain(|server| Some(*server) != gave_up);
                }
                Record::Attachment {
                    target,
                    scope,
                    mount_ns,
                    path,
                    hook_dev,
                    backing_dev,
                } => {
                    // A new try: the hook of the one before is gone.
                    story.placing = None;
                    story.may_be_placed = false;
                    story.kept.clear();
                    story.posix.clear();
                    story.backing_dev = Some(backing_dev);
                    story.target = process(target);
                    story.scope = scope;
                    story.mount_ns = mount_ns;
                    story.path = path;
                    story.hook_dev = hook_dev;
                }
                Record::Keeping { kept } => story.kept.extend(kept),
                Record::Locks { posix } => {
                    // A later round of the same attach names only what it moved.
                    story.posix.retain(|known| {
                        !posix.iter().any(|lock| {
                            lock.who == known.who && lock.dev == known.dev && lock.ino == known.ino
                        })
                    });
                    story.posix.extend(posix);
                    story.exchanging = true;
                }
                Record::Placing(around) => {
                    story.placing = Some(around);
                    story.may_be_placed = true;
                }
                Record::Residue { who, what } => match serde_json::from_value::<Residue>(what) {
                    Ok(residue) if residue.pid == who.pid && residue.start_time == who.start => {
                        story.residues.push(residue)
                    }
                    _ => tracing::warn!(
                        pid = who.pid,
                        "the journal's record of what was left in a process is not understood"
                    ),
                },
                Record::Limit { who, soft, raised } => {
                    story.limits.push(RaisedLimit { who, soft, raised });
                }
                Record::LimitPutBack { who } => {
                    if let Some(last) = story.limits.iter().rposition(|limit| limit.who == who) {
                        story.limits.remove(last);
                    }
                }
                Record::Exchanged | Record::Attached => story.exchanging = false,
                Record::Stopping { .. }
                | Record::Grafting
                | Record::Recovering { .. }
                | Record::Recovered { .. } => {}
            }
        }
        Ok(story)
    }

    /// What can be told without a journal: by the configuration of the attachment and the device of the hook that was found.
    pub(crate) fn without_journal(
        config: &ServeConfig,
        holder: ProcessId,
        hook: hobble_graft::ids::Device,
    ) -> Self {
        Self {
            holder: Some(holder),
            target: Pid::new(config.pid).map(|pid| ProcessId {
                pid,
                start_time: config.start_time,
            }),
            scope: config.scope.as_str().to_owned(),
            path: config.path.clone(),
            source: crate::hook::source(&config.id),
            hook_dev: hook.raw(),
            may_be_placed: true,
            ..Self::default()
        }
    }

    /// The holder, if it still lives.
    pub(crate) fn living_holder(&self) -> Option<ProcessId> {
        self.holder
            .filter(|process| process.is_alive().unwrap_or(false))
    }

    /// Who serves, or served: nobody undoes before there is a server, which names itself first and never gives up.
    pub(crate) fn server(&self) -> Option<ProcessId> {
        self.servers.first().copied()
    }

    /// Whose the attachment is: the first server or recoverer that still lives. Records are appended in one order that everybody sees, so two that begin at the same
    /// time agree on who goes first.
    pub(crate) fn living_server(&self) -> Option<ProcessId> {
        self.servers.iter().copied().find(|process| lives(*process))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_and_another_id_are_refused() {
        let boot = BootId::current().unwrap().as_str().to_owned();
        let opened = |id: &str, boot: &str| {
            vec![Record::Opened {
                v: 1,
                id: id.into(),
                boot_id: boot.into(),
                created: 0,
            }]
        };
        assert!(Story::of(opened("abcd", &boot), "abcd").is_ok());
        assert!(matches!(
            Story::of(opened("abcd", &boot), "efgh"),
            Err(JournalError::Foreign { .. })
        ));
        let other = "00000000-0000-0000-0000-000000000000";
        assert!(matches!(
            Story::of(opened("abcd", other), "abcd"),
            Err(JournalError::Foreign { .. })
        ));
    }

    #[test]
    fn a_limit_that_was_put_back_is_not_put_back_again() {
        let (one, two) = (Who { pid: 7, start: 1 }, Who { pid: 7, start: 2 });
        let limit = |who, soft, raised| Record::Limit { who, soft, raised };
        let back = |who| Record::LimitPutBack { who };
        let limits = |records: Vec<Record>| {
            let limits = Story::of(records, "abcd").unwrap().limits;
            limits
                .into_iter()
                .map(|limit| (limit.who, limit.soft, limit.raised))
                .collect::<Vec<_>>()
        };
        assert_eq!(limits(vec![limit(one, 64, 80), back(one)]), []);
        assert_eq!(
            limits(vec![limit(one, 64, 80), back(two)]),
            [(one, 64, 80)],
            "another process with the same pid"
        );
        // The server died with the limit raised, and a recovery raised it further and has put that back.
        assert_eq!(
            limits(vec![limit(one, 64, 80), limit(one, 80, 96), back(one)]),
            [(one, 64, 80)]
        );
    }

    #[test]
    fn a_forged_residue_is_not_believed() {
        let boot = BootId::current().unwrap().as_str().to_owned();
        let records = vec![
            Record::Opened {
                v: 1,
                id: "abcd".into(),
                boot_id: boot,
                created: 0,
            },
            Record::Residue {
                who: Who { pid: 1, start: 1 },
                what: serde_json::json!({"pid": 2, "start_time": 1}),
            },
        ];
        assert!(Story::of(records, "abcd").unwrap().residues.is_empty());
    }
}
