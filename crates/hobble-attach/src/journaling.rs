//! Writes the steps of an exchange into the journal before they are made, and that a limit was put back once it was.

use std::collections::BTreeMap;
use std::io;

use hobble_graft::switch::{Step, StepLog, Way};

use crate::fault_point;
use crate::journal::{Journal, Record, Who};
use crate::ledger::{Entry, Ledger};

/// The journal as the switch sees it.
pub(crate) struct Steps<'a> {
    /// Where to.
    pub(crate) journal: &'a mut Journal,
    /// What the ledger has to say once the replacements stand where they shall and before the first of them is in place.
    pub(crate) positions: Option<(&'a Ledger, &'a BTreeMap<i32, Entry>)>,
}

impl StepLog for Steps<'_> {
    fn step(&mut self, step: &Step) -> io::Result<()> {
        let record = match step {
            Step::Borrow(residue) => Record::Residue {
                who: Who {
                    pid: residue.pid,
                    start: residue.start_time,
                },
                what: serde_json::to_value(residue).map_err(io::Error::other)?,
            },
            Step::RaiseLimit {
                pid,
                start_time,
                soft,
                raised,
            } => Record::Limit {
                who: Who {
                    pid: *pid,
                    start: *start_time,
                },
                soft: *soft,
                raised: *raised,
            },
            Step::LimitPutBack { pid, start_time } => Record::LimitPutBack {
                who: Who {
                    pid: *pid,
                    start: *start_time,
                },
            },
            // What refers to what is found exactly by a census; these would only repeat it roughly.
            Step::Descriptors {
                way: Way::There, ..
            } => {
                if let Some((ledger, positions)) = self.positions.take() {
                    ledger.write(positions)?;
                }
                fault_point::pass("exchanging-descriptors");
                return Ok(());
            }
            Step::Directory {
                way: Way::There, ..
            } => {
                fault_point::pass("exchanging-directory");
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.journal.append(&record).map_err(io::Error::other)?;
        if matches!(step, Step::Borrow(_)) {
            fault_point::pass("borrowing");
        }
        Ok(())
    }
}
