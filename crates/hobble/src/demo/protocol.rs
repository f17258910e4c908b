//! What the demo and its writer say to each other: orders as words, answers as JSON lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An order, one a line: `phase NAME` or `stop`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// End the phase under way, report it, and begin this one.
    Phase(String),
    /// Report the phase under way and finish.
    Stop,
}

impl Order {
    /// The line, with its newline.
    pub(crate) fn to_line(&self) -> String {
        match self {
            Order::Phase(name) => format!("phase {name}\n"),
            Order::Stop => "stop\n".to_owned(),
        }
    }

    /// Reads a line; `None` when it is no order.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        match line.trim_end().split_once(' ') {
            Some(("phase", name)) if !name.is_empty() => Some(Order::Phase(name.to_owned())),
            None if line.trim_end() == "stop" => Some(Order::Stop),
            _ => None,
        }
    }
}

/// An answer of the writer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// The database is open and the first rows are committed.
    Ready,
    /// A phase has ended.
    Phase(PhaseReport),
    /// The writer has finished and closed the database.
    Done {
        /// Rows whose commit was acknowledged.
        committed: u64,
        /// Rows that turned out to be there although their commit had been reported as failed.
        phantoms: u64,
        /// Times that a look at the table found another number of rows than had been committed.
        misreads: u64,
    },
    /// The writer gives up.
    Broken {
        /// Why.
        cause: String,
    },
}

/// What the writer saw during one phase.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PhaseReport {
    /// Name of the phase.
    pub(crate) name: String,
    /// Its length in seconds.
    pub(crate) seconds: f64,
    /// Rows committed.
    pub(crate) commits: u64,
    /// Errors that SQLite reported, by name.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Commits that succeeded after at least one error.
    pub(crate) retried: u64,
    /// Rows given up after too many errors.
    pub(crate) abandoned: u64,
    /// Latency of a row, retries included: microseconds and how often.
    pub(crate) latencies_us: Vec<(u64, u64)>,
    /// The longest time between two steps of a thread that only looks at the clock, in microseconds.
    pub(crate) longest_gap_us: u64,
}

impl PhaseReport {
    /// Errors of all names.
    pub(crate) fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_round_trip_and_nonsense_is_none() {
        for order in [Order::Phase("20 ms on sync".to_owned()), Order::Stop] {
            assert_eq!(Order::from_line(&order.to_line()), Some(order));
        }
        for nonsense in ["", "phase", "phase ", "stop now", "dance\n"] {
            assert_eq!(Order::from_line(nonsense), None, "{nonsense:?}");
        }
    }
}
