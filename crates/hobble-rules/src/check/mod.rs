//! From the raw document to the checked experiment.
//!
//! Owns what makes sense. Invariant: what passes can be compiled and run without a further error, and every rule in it can fire; all that is wrong is
//! reported, not just the first.

mod rule;

pub(crate) use rule::check_size;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::diagnostic::{Diagnostic, MOST_DIAGNOSTICS, Severity, join, quote};
use crate::experiment::{Experiment, Rule, RunFor, Scope, Target};
use crate::nearest::nearest;
use crate::pattern::PathIndex;
use crate::spec::{Document, Positions, RuleSpec, VERSION};
use crate::units::parse_duration;

/// Most rules of an experiment.
pub const MOST_RULES: usize = 4096;

/// Checks a document.
///
/// # Errors
/// Everything that is wrong with it, in the order of the document; none of them is a warning.
pub fn check(document: &Document) -> Result<Experiment, Vec<Diagnostic>> {
    let mut found = Vec::new();
    let mut checker = Checker { prefix: String::new(), positions: &document.positions, found: &mut found };
    if document.version != VERSION {
        let cause = format!("version {} is not known here", document.version);
        checker.error("version", cause).hint(format!("this is version {VERSION}"));
    }
    let volume = document.volume.as_deref().and_then(|volume| check_volume(&mut checker, volume));
    let target = document.target.as_ref().map(|target| {
        checker.pid("target.pid", target.pid);
        Target { pid: target.pid }
    });
    let duration = document.duration.as_deref().and_then(|text| check_run_for(&mut checker, text));
    let scopes = [("tree", Scope::Tree), ("namespace", Scope::Namespace)];
    let scope = document.scope.as_deref().and_then(|word| checker.word("scope", "scope", word, &scopes));
    if document.rules.len() > MOST_RULES {
        checker.error("rules", format!("there may be {MOST_RULES} rules, here are {}", document.rules.len()));
    }

    let mut rules: Vec<Rule> = Vec::new();
    let mut places = Vec::new();
    for (index, spec) in document.rules.iter().enumerate().take(MOST_RULES) {
        let prefix = format!("rules[{index}]");
        let mut checker = Checker { prefix, positions: &spec.positions, found: &mut found };
        if let Some(rule) = rule::check(&mut checker, spec, index) {
            rules.push(rule);
            places.push(index);
        }
    }
    check_names(&document.rules, &rules, &places, &mut found);
    check_shadows(&document.rules, &rules, &places, &mut found);

    let index = PathIndex::new(rules.iter().map(|rule| (rule.path.as_slice(), rule.exclude.as_slice())));
    if let Err(error) = &index {
        let cause = format!("the patterns of all rules together are too large: {}", error.kind());
        found.push(Diagnostic::error("rules", cause).at(document.positions.find("rules")));
    }
    let (warnings, mut errors): (Vec<_>, Vec<_>) = found.into_iter().partition(|found| found.severity == Severity::Warning);
    match index {
        Ok(index) if errors.is_empty() => {
            let index = Arc::new(index);
            Ok(Experiment { volume, target, duration, seed: document.seed, scope, rules, index, warnings })
        }
        _ => {
            errors.truncate(MOST_DIAGNOSTICS);
            Err(errors)
        }
    }
}

fn check_volume(checker: &mut Checker<'_>, volume: &str) -> Option<PathBuf> {
    if !volume.starts_with('/') {
        checker.error("volume", "must be an absolute path, as the target sees it");
        return None;
    }
    if volume.contains('\0') {
        checker.error("volume", "cannot contain a NUL byte");
        return None;
    }
    Some(PathBuf::from(volume))
}

fn check_run_for(checker: &mut Checker<'_>, text: &str) -> Option<RunFor> {
    if text == "forever" {
        return Some(RunFor::Forever);
    }
    let duration = checker.duration("duration", text)?;
    if duration.is_zero() {
        checker.error("duration", "an experiment of no length hits nothing").hint("`forever` is until recovered by hand");
        return None;
    }
    Some(RunFor::Time(duration))
}

/// Names must be unique, since counts and decisions go by them.
fn check_names(specs: &[RuleSpec], rules: &[Rule], places: &[usize], found: &mut Vec<Diagnostic>) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (rule, place) in rules.iter().zip(places) {
        if let Some(earlier) = first.insert(rule.name(), *place) {
            let field = format!("rules[{place}].name");
            let cause = format!("the name {} belongs to rules[{earlier}] already", quote(rule.name()));
            let position = specs.get(*place).and_then(|spec| spec.positions.find("name"));
            found.push(Diagnostic::error(field, cause).at(position));
        }
    }
}

/// A rule behind one that always fires on all its operations, and ends the list, can never fire.
fn check_shadows(specs: &[RuleSpec], rules: &[Rule], places: &[usize], found: &mut Vec<Diagnostic>) {
    let mut walls: Vec<&Rule> = Vec::new();
    for (rule, place) in rules.iter().zip(places) {
        if let Some(wall) = walls.iter().find(|wall| wall.ops.is_superset(rule.ops)) {
            let cause = format!("can never fire: {} before it always fires and ends the list", quote(wall.name()));
            let position = specs.get(*place).and_then(|spec| spec.positions.find(""));
            let hint = if wall.stop { "remove its `then: stop`, or put this rule first" } else { "its errno ends the operation; put this rule first" };
            found.push(Diagnostic::error(format!("rules[{place}]"), cause).hint(hint).at(position));
        }
        // One wall for each set of operations is enough, and keeps this linear.
        if rule.is_terminal() && rule.is_unconditional() && !walls.iter().any(|wall| wall.ops.is_superset(rule.ops)) {
            walls.push(rule);
        }
    }
}

/// Collects what is wrong with the fields below a prefix.
pub(crate) struct Checker<'a> {
    prefix: String,
    positions: &'a Positions,
    found: &'a mut Vec<Diagnostic>,
}

/// A diagnostic just added, to which a hint may be given.
pub(crate) struct Added<'a>(Option<&'a mut Diagnostic>);

impl Added<'_> {
    pub(crate) fn hint(self, hint: impl Into<String>) {
        if let Some(diagnostic) = self.0 {
            diagnostic.hint = Some(hint.into());
        }
    }

    fn maybe_hint(self, hint: Option<String>) {
        if let Some(hint) = hint {
            self.hint(hint);
        }
    }
}

impl Checker<'_> {
    fn add(&mut self, severity: Severity, field: &str, cause: String) -> Added<'_> {
        let position = self.positions.find(field);
        let field = join(&self.prefix, field);
        self.found.push(Diagnostic { severity, position, field, cause, hint: None });
        Added(self.found.last_mut())
    }

    pub(crate) fn error(&mut self, field: &str, cause: impl Into<String>) -> Added<'_> {
        self.add(Severity::Error, field, cause.into())
    }

    pub(crate) fn warn(&mut self, field: &str, cause: impl Into<String>) -> Added<'_> {
        self.add(Severity::Warning, field, cause.into())
    }

    /// The meaning of a word among a few; `what` names what it should be one of.
    pub(crate) fn word<T: Copy>(&mut self, field: &str, what: &str, word: &str, words: &[(&'static str, T)]) -> Option<T> {
        if let Some((_, meaning)) = words.iter().find(|(name, _)| *name == word) {
            return Some(*meaning);
        }
        self.unknown(field, what, word, &words.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        None
    }

    /// Reports a word that is none of `words`.
    pub(crate) fn unknown(&mut self, field: &str, what: &str, word: &str, words: &[&str]) {
        const FEW: usize = 8;
        let hint = match nearest(word, words.iter().copied()) {
            Some(near) => Some(format!("did you mean `{near}`?")),
            None if words.len() <= FEW => Some(format!("there are {}", words.join(", "))),
            None => None,
        };
        self.error(field, format!("unknown {what} {}", quote(word))).maybe_hint(hint);
    }

    pub(crate) fn duration(&mut self, field: &str, text: &str) -> Option<std::time::Duration> {
        match parse_duration(text) {
            Ok(duration) => Some(duration),
            Err(cause) => {
                self.error(field, format!("{}: {cause}", quote(text)));
                None
            }
        }
    }

    pub(crate) fn pid(&mut self, field: &str, pid: u32) {
        if pid == 0 || i32::try_from(pid).is_err() {
            self.error(field, format!("{pid} is not a process id"));
        }
    }
}
