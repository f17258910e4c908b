//! The checked form of a specification: what a plan is compiled from.
//!
//! Owns the types that hold only what makes sense. Invariant: an [`Experiment`] comes from [`crate::check`] alone, so every glob in it compiles, every
//! number is in range, and every rule can fire.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::diagnostic::Diagnostic;
use crate::draw::{Draws, RuleKey};
use crate::fault::{FaultKind, Faults};
use crate::op::{Op, OpSet};
use crate::pattern::{CommPattern, PathIndex, PathPattern};

/// How long an experiment lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunFor {
    /// So long, then it is recovered.
    Time(Duration),
    /// Until it is recovered by hand, or its target is gone.
    Forever,
}

/// Which processes of the target's mount namespace are hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The process and its descendants.
    Tree,
    /// Every process of the mount namespace.
    Namespace,
}

/// What is to be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The process, as seen from here.
    pub pid: u32,
}

/// What the user declared, checked.
#[derive(Clone, Debug)]
pub struct Experiment {
    pub(crate) volume: Option<PathBuf>,
    pub(crate) target: Option<Target>,
    pub(crate) duration: Option<RunFor>,
    pub(crate) seed: Option<u64>,
    pub(crate) scope: Option<Scope>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) index: Arc<PathIndex>,
    pub(crate) warnings: Vec<Diagnostic>,
}

impl Experiment {
    /// The directory or file to hook, absolute, as the target sees it.
    #[must_use]
    pub fn volume(&self) -> Option<&Path> {
        self.volume.as_deref()
    }

    /// The target named in the specification.
    #[must_use]
    pub const fn target(&self) -> Option<Target> {
        self.target
    }

    /// How long to run.
    #[must_use]
    pub const fn duration(&self) -> Option<RunFor> {
        self.duration
    }

    /// The seed to run with; a fresh one is to be chosen, and printed, when there is none.
    #[must_use]
    pub const fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Who is hit.
    #[must_use]
    pub const fn scope(&self) -> Option<Scope> {
        self.scope
    }

    /// The rules, in order, all named.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What is allowed and yet probably not meant, or ought to be known before running.
    #[must_use]
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }

    /// Whether any rule alters data that stays altered after recovery.
    #[must_use]
    pub fn is_destructive(&self) -> bool {
        self.rules.iter().any(Rule::is_destructive)
    }
}

/// Filter, trigger and faults, checked.
#[derive(Clone, Debug)]
pub struct Rule {
    pub(crate) name: Arc<str>,
    pub(crate) ops: OpSet,
    pub(crate) path: Vec<PathPattern>,
    pub(crate) exclude: Vec<PathPattern>,
    pub(crate) who: Who,
    pub(crate) range: Option<ByteRange>,
    pub(crate) when: Trigger,
    pub(crate) faults: Faults,
    pub(crate) stop: bool,
}

impl Rule {
    /// Its name, unique in the experiment.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The operations it can match.
    #[must_use]
    pub const fn ops(&self) -> OpSet {
        self.ops
    }

    /// What it does.
    #[must_use]
    pub const fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The kinds of its faults.
    pub fn kinds(&self) -> impl Iterator<Item = FaultKind> {
        self.faults.kinds()
    }

    /// Whether it alters data that stays altered after recovery: `corrupt` on writes.
    #[must_use]
    pub fn is_destructive(&self) -> bool {
        self.faults.corrupt.is_some() && self.ops.contains(Op::Write)
    }

    /// Whether firing ends the list of rules for that operation: an errno ends the operation, `then: stop` says so.
    pub(crate) fn is_terminal(&self) -> bool {
        self.stop || self.faults.errno.is_some()
    }

    /// Whether it fires on every operation of its kinds. One with a path, be it `**`, does not: files without a path do not match it.
    pub(crate) fn is_unconditional(&self) -> bool {
        self.path.is_empty()
            && self.exclude.is_empty()
            && self.who.is_anyone()
            && self.range.is_none()
            && self.when == Trigger::ALWAYS
    }
}

/// Which callers a rule matches; all given conditions must hold, within one of them any item.
#[derive(Clone, Debug, Default)]
pub(crate) struct Who {
    pub(crate) pid: Vec<u32>,
    pub(crate) comm: Vec<CommPattern>,
    pub(crate) uid: Vec<u32>,
}

impl Who {
    /// Whether it matches everybody.
    #[must_use]
    pub(crate) const fn is_anyone(&self) -> bool {
        self.pid.is_empty() && self.comm.is_empty() && self.uid.is_empty()
    }
}

/// A range of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) start: u64,
    /// One past the last byte.
    pub(crate) end: u64,
}

impl ByteRange {
    /// Whether an access of `len` bytes at `offset` touches it; an empty access touches nothing.
    #[must_use]
    pub(crate) const fn overlaps(&self, offset: u64, len: u64) -> bool {
        len > 0 && offset < self.end && offset.saturating_add(len) > self.start
    }
}

/// What the counts of a trigger are kept for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Per {
    /// The rule: one count for all.
    #[default]
    Rule,
    /// Each process.
    Process,
    /// Each file.
    File,
}

/// When a matching operation is hit. The order is: window, counts, percent, times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Trigger {
    pub(crate) percent: f64,
    pub(crate) after: u64,
    pub(crate) every: NonZeroU64,
    pub(crate) times: Option<NonZeroU64>,
    pub(crate) from: Duration,
    pub(crate) lasting: Option<Duration>,
    pub(crate) per: Per,
}

impl Trigger {
    /// Hits every match.
    pub(crate) const ALWAYS: Self = Self {
        percent: 100.0,
        after: 0,
        every: NonZeroU64::MIN,
        times: None,
        from: Duration::ZERO,
        lasting: None,
        per: Per::Rule,
    };

    /// Whether chance lets match `n` through: the draws, if any had to be made, or nothing when it does not.
    #[allow(clippy::option_option)] // Not let through, let through undrawn, let through drawn.
    pub(crate) fn draw(&self, key: RuleKey, scope: u64, n: u64) -> Option<Option<Draws>> {
        if self.percent >= 100.0 {
            return Some(None);
        }
        if self.percent <= 0.0 {
            return None;
        }
        let draws = key.draws(scope, n);
        // The unit lies in (0, 1] and is spread evenly over 2^53 points.
        (crate::draw::unit(draws.share) <= self.percent / 100.0).then_some(Some(draws))
    }
}
