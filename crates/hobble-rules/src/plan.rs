//! The compiled rules, and the decision about one operation.
//!
//! Owns the index by operation and path, and the composition of rules. Invariants: a plan never changes but for its counters; what `decide` returns is a
//! value, and performing it is somebody else's; no clock and no shared source of randomness is read, so equal inputs give equal decisions; a
//! [`PathMatch`] of another plan matches no rule, so a stale cache can only leave a fault out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::caller::CallerFacts;
use crate::counters::{Cutoffs, RuleCounters, RuleProgress, RuleState, Tally};
use crate::draw::{Draws, RuleKey};
use crate::errno::InjectedErrno;
use crate::experiment::{Experiment, Per, Rule};
use crate::fault::attr::{AttrOverride, Attributes};
use crate::fault::corrupt::Corruption;
use crate::op::{Op, OpSet};
use crate::path_match::{PathMatch, RuleBits, ones};
use crate::pattern::PathIndex;

/// Identity of a file for rules that count `per: file`: the same file must have the same identity for as long as it exists, and so that a seed repeats what it did, the same
/// again in the next run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u64);

impl FileId {
    /// Identity of what has no identity of its own yet: a name in a directory that leads nowhere so far.
    #[must_use]
    pub fn named(directory: Self, name: &[u8]) -> Self {
        Self(crate::draw::fold(directory.0, name))
    }
}

/// The place of a rule in its plan, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleIndex(pub u32);

/// One operation, as the rules see it.
pub struct OpContext<'a> {
    /// What it is.
    pub op: Op,
    /// The path it works on; both for `rename` and `link`, either of which may match. None when the file has no path: then only rules without a
    /// `path` match.
    pub paths: &'a [&'a PathMatch],
    /// Who asks.
    pub caller: &'a dyn CallerFacts,
    /// First byte, for operations on a range of a file.
    pub offset: Option<u64>,
    /// Bytes, for operations on a range of a file.
    pub len: Option<u64>,
    /// Time since injection began.
    pub now: Duration,
    /// The file, for rules that count per file; asked only when one of them has matched.
    pub file: &'a dyn Fn() -> FileId,
}

/// What to do to one operation: wait `delay`; then fail with `errno`, or perform the operation with data and attributes altered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The sum of the delays.
    pub delay: Duration,
    /// The errno to fail with instead of performing the operation.
    pub errno: Option<InjectedErrno>,
    /// Overrides of the reply's attributes, to be applied in this order.
    pub attr: Vec<Arc<AttrOverride>>,
    /// What to do to the data, in this order.
    pub corrupt: Vec<Corruption>,
    /// The rules that fired, in their order.
    pub fired: Vec<RuleIndex>,
}

impl Decision {
    /// Whether the operation is to be performed as if there were no rules.
    #[must_use]
    pub fn is_pass(&self) -> bool {
        self.fired.is_empty()
    }

    /// The attributes to report in the place of the true ones.
    #[must_use]
    pub fn attributes(&self, truth: Attributes) -> Attributes {
        self.attr
            .iter()
            .fold(truth, |attributes, change| change.apply(attributes))
    }
}

/// Rules compiled for deciding about operations.
#[derive(Debug)]
pub struct Plan {
    generation: u64,
    seed: u64,
    ops: OpSet,
    rules: Vec<Entry>,
    /// Words of 64 rules.
    words: usize,
    /// For each operation in turn, `words` words: the rules that can match it.
    by_op: Vec<u64>,
    index: Arc<PathIndex>,
    /// The match of a path that no pattern matches.
    unmatched: PathMatch,
    tally: Arc<Tally>,
}

/// One rule with its state.
#[derive(Debug)]
struct Entry {
    rule: Rule,
    key: RuleKey,
    state: Arc<RuleState>,
    /// When the rule was first installed under its name: what `from` and `for` count from.
    origin: Duration,
    /// `evaluated` of the earlier plans.
    evaluated_before: u64,
    /// What the tally showed for the rule's operations when this plan was made.
    tally_before: u64,
    /// Present in rules that end the list when they fire.
    cutoffs: Option<Box<Cutoffs>>,
}

impl Plan {
    /// Compiles an experiment.
    ///
    /// Rules that have the name of a rule in `previous` go on from its counts, and their windows keep their beginning; the windows of other rules
    /// begin at `now`, the time since injection began (zero for a first plan).
    #[must_use]
    pub fn compile(
        experiment: &Experiment,
        seed: u64,
        previous: Option<&Self>,
        now: Duration,
    ) -> Self {
        static GENERATION: AtomicU64 = AtomicU64::new(1);
        let generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        let tally = previous
            .map(|plan| Arc::clone(&plan.tally))
            .unwrap_or_default();
        let evaluated: HashMap<String, u64> = previous
            .map(|plan| {
                plan.counters()
                    .into_iter()
                    .map(|rule| (rule.name, rule.evaluated))
                    .collect()
            })
            .unwrap_or_default();
        let old: HashMap<&str, &Entry> = previous
            .into_iter()
            .flat_map(|plan| &plan.rules)
            .map(|entry| (entry.rule.name(), entry))
            .collect();

        let entries: Vec<Entry> = experiment
            .rules()
            .iter()
            .map(|rule| {
                let before = old.get(rule.name());
                Entry {
                    rule: rule.clone(),
                    key: RuleKey::new(seed, rule.name()),
                    state: before
                        .map(|entry| Arc::clone(&entry.state))
                        .unwrap_or_default(),
                    origin: before.map_or(now, |entry| entry.origin),
                    evaluated_before: evaluated.get(rule.name()).copied().unwrap_or(0),
                    tally_before: tally.sum(rule.ops),
                    cutoffs: rule.is_terminal().then(Box::default),
                }
            })
            .collect();

        let words = entries.len().div_ceil(64);
        let mut by_op = Vec::with_capacity(words * Op::COUNT);
        for op in Op::ALL {
            for chunk in entries.chunks(64) {
                let bit = |(place, entry): (usize, &Entry)| {
                    u64::from(entry.rule.ops.contains(op)) << place
                };
                by_op.push(
                    chunk
                        .iter()
                        .enumerate()
                        .map(bit)
                        .fold(0, |word, bit| word | bit),
                );
            }
        }
        let ops = entries
            .iter()
            .fold(OpSet::EMPTY, |ops, entry| ops.union(entry.rule.ops));
        let mut plan = Self {
            generation,
            seed,
            ops,
            words,
            by_op,
            index: Arc::clone(&experiment.index),
            unmatched: PathMatch {
                generation,
                ops: OpSet::EMPTY,
                rules: RuleBits::Inline(0),
            },
            tally,
            rules: entries,
        };
        let pathless = plan.rules.chunks(64).map(|chunk| {
            let bit =
                |(place, entry): (usize, &Entry)| u64::from(entry.rule.path.is_empty()) << place;
            chunk
                .iter()
                .enumerate()
                .map(bit)
                .fold(0, |word, bit| word | bit)
        });
        plan.unmatched = plan.path_match(pathless.collect());
        plan
    }

    /// Tells plans apart: no two of a process have the same.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The seed in use.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The operations that any rule can match: an operation outside need not be asked about.
    #[must_use]
    pub const fn ops(&self) -> OpSet {
        self.ops
    }

    /// The name of a rule, as it appears in events.
    #[must_use]
    pub fn rule_name(&self, index: RuleIndex) -> Option<&str> {
        self.rules
            .get(usize::try_from(index.0).ok()?)
            .map(|entry| entry.rule.name())
    }

    /// The rules, in order.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().map(|entry| &entry.rule)
    }

    /// Which rules match a path, given as it lies below the volume (without a leading slash; empty for its root) and as the target
    /// sees it (from its root).
    #[must_use]
    pub fn match_path(&self, volume_relative: &[u8], absolute: &[u8]) -> PathMatch {
        let mut included: Option<Vec<u64>> = None;
        let mut excluded: Option<Vec<u64>> = None;
        let fresh = || vec![0_u64; self.words];
        self.index.each_match(volume_relative, absolute, |hit| {
            let words = if hit.excludes {
                &mut excluded
            } else {
                &mut included
            };
            if let Some(word) = words.get_or_insert_with(fresh).get_mut(hit.rule / 64) {
                *word |= 1 << (hit.rule % 64);
            }
        });
        if included.is_none() && excluded.is_none() {
            return self.unmatched.clone();
        }
        let word_of = |words: &Option<Vec<u64>>, index: usize| {
            words
                .as_ref()
                .and_then(|words| words.get(index))
                .copied()
                .unwrap_or(0)
        };
        let words = (0..self.words)
            .map(|index| {
                (self.unmatched.rules.word(index) | word_of(&included, index))
                    & !word_of(&excluded, index)
            })
            .collect();
        self.path_match(words)
    }

    /// The match of a file whose path is not known: rules with a `path` do not match it.
    #[must_use]
    pub fn match_unknown_path(&self) -> PathMatch {
        self.unmatched.clone()
    }

    fn path_match(&self, words: Vec<u64>) -> PathMatch {
        let rules = RuleBits::from_words(words);
        let ops = rules
            .iter(self.words)
            .filter_map(|place| self.rules.get(place))
            .fold(OpSet::EMPTY, |ops, entry| ops.union(entry.rule.ops));
        PathMatch {
            generation: self.generation,
            ops,
            rules,
        }
    }

    /// Whether some rule may want to see reads or writes of a file with this path, so that it must not be opened in a mode in which they bypass the
    /// server. A match of another plan says yes: too careful is only slow.
    #[must_use]
    pub fn intercepts_data(&self, path: &PathMatch) -> bool {
        if path.generation != self.generation {
            return self.ops.intersects(OpSet::WITH_DATA);
        }
        path.ops.intersects(OpSet::WITH_DATA)
    }

    /// Decides about an operation, and counts it.
    #[must_use]
    pub fn decide(&self, context: &OpContext<'_>) -> Decision {
        let mut decision = Decision::default();
        let op = context.op;
        if !self.ops.contains(op) {
            return decision;
        }
        self.tally.count(op);
        let unknown = [&self.unmatched];
        let paths = if context.paths.is_empty() {
            &unknown
        } else {
            context.paths
        };
        let live = |path: &&&PathMatch| path.generation == self.generation && path.ops.contains(op);
        if !paths.iter().any(|path| live(&path)) {
            return decision;
        }
        let start = op.index() * self.words;
        let candidates = self
            .by_op
            .get(start..start + self.words)
            .unwrap_or_default();
        for (word, of_op) in candidates.iter().enumerate() {
            let of_path = paths
                .iter()
                .filter(live)
                .fold(0, |bits, path| bits | path.rules.word(word));
            for bit in ones(of_op & of_path) {
                let place = word * 64 + bit;
                let Some(entry) = self.rules.get(place) else {
                    continue;
                };
                if entry.fire(context, &mut decision) {
                    decision
                        .fired
                        .push(RuleIndex(u32::try_from(place).unwrap_or(u32::MAX)));
                    if let Some(cutoffs) = &entry.cutoffs {
                        cutoffs.count(op);
                        return decision;
                    }
                }
            }
        }
        decision
    }

    /// Takes over what rules of the same names had seen and done in a plan of another process ([`Plan::progress`]). Rules that count by process or by file begin
    /// those counts anew.
    #[must_use]
    pub fn going_on(mut self, progress: &[RuleProgress]) -> Self {
        for entry in &mut self.rules {
            let Some(known) = progress
                .iter()
                .find(|known| known.name == entry.rule.name())
            else {
                continue;
            };
            entry.origin = Duration::from_millis(known.origin_ms);
            entry.evaluated_before = known.evaluated;
            entry.state.go_on(known.matched, known.injected);
        }
        self
    }

    /// What another process needs to know to go on with these rules, in the order of the rules.
    #[must_use]
    pub fn progress(&self) -> Vec<RuleProgress> {
        let counters = self.counters().into_iter().zip(&self.rules);
        counters
            .map(|(counters, entry)| RuleProgress {
                name: counters.name,
                evaluated: counters.evaluated,
                matched: counters.matched,
                injected: counters.injected,
                origin_ms: u64::try_from(entry.origin.as_millis()).unwrap_or(u64::MAX),
            })
            .collect()
    }

    /// What every rule has seen and done, in the order of the rules.
    ///
    /// Read while operations go on, the numbers of one rule may be of slightly different moments.
    #[must_use]
    pub fn counters(&self) -> Vec<RuleCounters> {
        let mut before: Vec<&Cutoffs> = Vec::new();
        let mut counters = Vec::with_capacity(self.rules.len());
        for entry in &self.rules {
            let ops = entry.rule.ops;
            let hidden: u64 = before.iter().map(|cutoffs| cutoffs.sum(ops)).sum();
            let tallied = self.tally.sum(ops).saturating_sub(entry.tally_before);
            counters.push(RuleCounters {
                name: entry.rule.name().to_owned(),
                evaluated: entry.evaluated_before + tallied.saturating_sub(hidden),
                matched: entry.state.matched.load(Ordering::Relaxed),
                injected: entry.state.injected.load(Ordering::Relaxed),
            });
            before.extend(entry.cutoffs.as_deref());
        }
        counters
    }
}

impl Entry {
    /// Whether filters and trigger let the rule fire; adds its faults to the decision if so.
    fn fire(&self, context: &OpContext<'_>, decision: &mut Decision) -> bool {
        if !self.matches(context) {
            return false;
        }
        self.state.matched.fetch_add(1, Ordering::Relaxed);
        let Some((scope, n, draws)) = self.trigger(context) else {
            return false;
        };
        self.state.injected.fetch_add(1, Ordering::Relaxed);

        let faults = &self.rule.faults;
        let random = faults
            .latency
            .as_ref()
            .is_some_and(|latency| latency.is_random())
            || faults.errno.as_ref().is_some_and(|errno| errno.is_random());
        let draws = match draws {
            None if random => self.key.draws(scope, n),
            drawn => drawn.unwrap_or(Draws {
                share: 0,
                pick: 0,
                first: 0,
                second: 0,
            }),
        };
        if let Some(latency) = &faults.latency {
            decision.delay = decision
                .delay
                .saturating_add(latency.sample(draws.first, draws.second));
        }
        if let Some(errno) = &faults.errno {
            decision.errno = errno.pick(draws.pick);
        }
        decision.attr.extend(faults.attr.clone());
        decision
            .corrupt
            .extend(faults.corrupt.map(|fault| Corruption {
                fault,
                key: self.key,
                scope,
                n,
            }));
        true
    }

    /// Whether the filters other than op and path hold; the cheap ones are asked first.
    fn matches(&self, context: &OpContext<'_>) -> bool {
        let rule = &self.rule;
        if let Some(range) = rule.range {
            let (Some(offset), Some(len)) = (context.offset, context.len) else {
                return false;
            };
            if !range.overlaps(offset, len) {
                return false;
            }
        }
        let who = &rule.who;
        if !who.uid.is_empty() && !who.uid.contains(&context.caller.uid()) {
            return false;
        }
        if !who.pid.is_empty()
            && !context
                .caller
                .pid()
                .is_some_and(|pid| who.pid.contains(&pid))
        {
            return false;
        }
        if !who.comm.is_empty() {
            let named = |comm: crate::caller::Comm| {
                who.comm
                    .iter()
                    .any(|pattern| pattern.matches(comm.as_bytes()))
            };
            return context.caller.comm().is_some_and(named)
                || context.caller.thread_comm().is_some_and(named);
        }
        true
    }

    /// Whether this match fires: its scope and number there, and its draws if they had to be made.
    fn trigger(&self, context: &OpContext<'_>) -> Option<(u64, u64, Option<Draws>)> {
        let when = &self.rule.when;
        let since = context.now.saturating_sub(self.origin);
        if since < when.from
            || when
                .lasting
                .is_some_and(|lasting| since - when.from >= lasting)
        {
            return None;
        }
        let key = match when.per {
            Per::Rule => None,
            Per::Process => Some(u64::from(context.caller.pid().unwrap_or(0))),
            Per::File => Some((context.file)().0),
        };
        let scope = key.unwrap_or(0);
        let counted =
            |n: u64| n >= when.after && (n - when.after + 1).is_multiple_of(when.every.get());
        let Some(times) = when.times else {
            // The number is taken under the lock, the draw is made outside.
            let n = self.state.with(key, |stream| {
                stream.seen += 1;
                stream.seen - 1
            });
            let draws = counted(n)
                .then(|| when.draw(self.key, scope, n))
                .flatten()?;
            return Some((scope, n, draws));
        };
        // With a limit the draw is made under the lock as well: which matches are the first `times` to fire must not depend on which thread
        // comes first.
        self.state.with(key, |stream| {
            let n = stream.seen;
            stream.seen += 1;
            if stream.injected >= times.get() || !counted(n) {
                return None;
            }
            let draws = when.draw(self.key, scope, n)?;
            stream.injected += 1;
            Some((scope, n, draws))
        })
    }
}
