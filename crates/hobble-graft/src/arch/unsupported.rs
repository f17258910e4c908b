//! Processors for which nobody has written the code that runs in a target yet.
//!
//! Everything compiles; a thread that has been stopped is then reported as foreign and let go, before anything is written.

use super::Ending;

/// What seccomp filters see; no number is right for all processors.
pub(crate) const AUDIT_ARCHITECTURE: u32 = 0;

/// Registers of which nothing is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registers([u64; 34]);

impl Default for Registers {
    fn default() -> Self {
        Self([0; 34])
    }
}

impl Registers {
    pub(crate) fn raw(&self) -> &[u64; 34] {
        &self.0
    }

    pub(crate) fn raw_mut(&mut self) -> &mut [u64; 34] {
        &mut self.0
    }

    pub(crate) fn ip(&self) -> u64 {
        0
    }

    pub(crate) fn set_ip(&mut self, _: u64) {}

    pub(crate) fn result(&self) -> i64 {
        0
    }

    /// False for every thread: this is what keeps everything else here from being used.
    pub(crate) fn is_64_bit(&self) -> bool {
        false
    }

    pub(crate) fn restart_unless_handled(&mut self) {}

    pub(crate) fn for_call(&self, _: u64, _: u32, _: [u64; 6]) -> Self {
        *self
    }
}

/// No code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image;

impl Image {
    pub(crate) fn new() -> Self {
        Self
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &[]
    }

    pub(crate) fn data_offset(&self) -> u64 {
        0
    }

    pub(crate) fn data(&self) -> &[u8] {
        &[]
    }

    pub(crate) fn entry_one(&self) -> u64 {
        0
    }

    pub(crate) fn one_return(&self) -> u64 {
        0
    }

    pub(crate) fn entry_batch(&self) -> u64 {
        0
    }

    pub(crate) fn is_leaving(&self, _: u64) -> bool {
        false
    }

    pub(crate) fn set_ending(&mut self, _: &Registers, _: &Ending) {}
}

pub(crate) fn dead_path(stopped: &Registers) -> Registers {
    *stopped
}

pub(crate) fn restarts_after_stop(_: &Registers) -> bool {
    false
}
