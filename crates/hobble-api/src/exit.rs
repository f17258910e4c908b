//! Exit codes of the `hobble` command.
//!
//! The numbers are stable. `hobble exec` is the exception to the table: it hands on what its command returned (128 + n
//! when signal n killed it) and uses [`EXEC_FAILED`], [`EXEC_NOT_EXECUTABLE`] and [`EXEC_NOT_FOUND`] for its own troubles,
//! as `env`, `nice` and `timeout` do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum ExitCode {
    /// 0: it did what was asked.
    Ok = 0,
    /// 1: it failed before anything of the target was touched, or the request was refused.
    Failed = 1,
    /// 2: the command line or the specification is wrong.
    Usage = 2,
    /// 3: the target went away.
    TargetVanished = 3,
    /// 4: it failed half way and everything was put back; the target is as it was.
    RolledBack = 4,
    /// 5: something is left over that only `hobble recover` can put back.
    NeedsRecovery = 5,
}

impl ExitCode {
    /// Every code, in numeric order.
    pub const ALL: [ExitCode; 6] = [
        ExitCode::Ok,
        ExitCode::Failed,
        ExitCode::Usage,
        ExitCode::TargetVanished,
        ExitCode::RolledBack,
        ExitCode::NeedsRecovery,
    ];

    /// The number handed to the shell.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// One line for a table of exit codes.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            ExitCode::Ok => "success",
            ExitCode::Failed => "failed; the target was not touched",
            ExitCode::Usage => "wrong command line or specification",
            ExitCode::TargetVanished => "the target went away",
            ExitCode::RolledBack => "failed half way, and everything was put back",
            ExitCode::NeedsRecovery => "something is left over: run `hobble recover`",
        }
    }
}

/// `hobble exec`: Hobble itself failed, and the command was not started (or not waited for to its end).
pub const EXEC_FAILED: u8 = 125;
/// `hobble exec`: the command was found but could not be executed.
pub const EXEC_NOT_EXECUTABLE: u8 = 126;
/// `hobble exec`: the command was not found.
pub const EXEC_NOT_FOUND: u8 = 127;
/// `hobble exec`: added to the number of the signal that killed the command.
pub const EXEC_SIGNAL_BASE: u8 = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_their_position_in_the_table() {
        for (position, exit) in ExitCode::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), position);
        }
    }
}
