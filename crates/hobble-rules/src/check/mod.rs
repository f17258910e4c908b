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
use crate::fault_flag;
use crate::nearest::nearest;
use crate::pattern::{MOST_BYTES, PathIndex};
use crate::spec::{self, Document, Positions, Reading, RuleSpec, VERSION};
use crate::units::parse_duration;

/// Most rules of an experiment.
pub const MOST_RULES: usize = 4096;

/// Checks a document.
///
/// # Errors
/// Everything that is wrong with it, in the order of the document; none of them is a warning.
pub fn check(document: &Document) -> Result<Experiment, Vec<Diagnostic>> {
    let rules: Vec<(usize, &RuleSpec)> = document.rules.iter().enumerate().collect();
    check_parts(document, &rules, Vec::new())
}

/// Reads and checks a specification in one go, so that a key that is unknown does not hide a value that is wrong elsewhere.
///
/// # Errors
/// Everything that is wrong with it, in the order of the text; none of them is a warning.
pub fn load(text: &str) -> Result<(Document, Experiment), Vec<Diagnostic>> {
    load_all::<&str>(Some(text), &[])
}

/// Reads and checks what a command line gives: a specification, and rules from `--fault` strings that follow those of the specification.
///
/// # Errors
/// Everything that is wrong with any of them; the positions say in which. None is a warning.
pub fn load_all<S: AsRef<str>>(
    text: Option<&str>,
    faults: &[S],
) -> Result<(Document, Experiment), Vec<Diagnostic>> {
    let Reading {
        mut document,
        mut places,
        written,
        mut found,
    } = match text {
        Some(text) => spec::read(text)?,
        None => Reading::default(),
    };
    for (index, fault) in faults.iter().enumerate() {
        match fault_flag::parse_numbered(
            fault.as_ref(),
            u32::try_from(index + 1).unwrap_or(u32::MAX),
        ) {
            Ok(rule) => {
                document.rules.push(rule);
                places.push(written + index);
            }
            Err(diagnostics) => found.extend(diagnostics),
        }
    }
    let rules: Vec<(usize, &RuleSpec)> = places.into_iter().zip(&document.rules).collect();
    let experiment = check_parts(&document, &rules, found)?;
    Ok((document, experiment))
}

/// Checks the rules of a document that could be read, with their places; `found` is what was wrong with the rest of it.
fn check_parts(
    document: &Document,
    specs: &[(usize, &RuleSpec)],
    found: Vec<Diagnostic>,
) -> Result<Experiment, Vec<Diagnostic>> {
    let mut findings = Findings::new(found);
    let mut checker = Checker {
        prefix: String::new(),
        positions: &document.positions,
        findings: &mut findings,
    };
    if document.version != VERSION {
        let cause = format!("version {} is not known here", document.version);
        checker
            .error("version", cause)
            .hint(format!("this is version {VERSION}"));
    }
    let volume = document
        .volume
        .as_deref()
        .and_then(|volume| check_volume(&mut checker, volume));
    let target = document.target.as_ref().map(|target| {
        checker.pid("target.pid", target.pid);
        Target { pid: target.pid }
    });
    let duration = document
        .duration
        .as_deref()
        .and_then(|text| check_run_for(&mut checker, text));
    let scopes = [("tree", Scope::Tree), ("namespace", Scope::Namespace)];
    let scope = document
        .scope
        .as_deref()
        .and_then(|word| checker.word("scope", "scope", word, &scopes));
    if specs.len() > MOST_RULES {
        checker.error(
            "rules",
            format!("there may be {MOST_RULES} rules, here are {}", specs.len()),
        );
    }

    let mut checked: Vec<Checked<'_>> = Vec::new();
    for (place, spec) in specs.iter().take(MOST_RULES) {
        if findings.is_full() {
            break;
        }
        let prefix = format!("rules[{place}]");
        let mut checker = Checker {
            prefix,
            positions: &spec.positions,
            findings: &mut findings,
        };
        if let Some(rule) = rule::check(&mut checker, spec, *place) {
            checked.push(Checked {
                rule,
                place: *place,
                spec,
            });
        }
    }
    check_names(&checked, &mut findings);
    check_shadows(&checked, &mut findings);

    let rules: Vec<Rule> = checked.into_iter().map(|checked| checked.rule).collect();
    let index = PathIndex::new(
        rules
            .iter()
            .map(|rule| (rule.path.as_slice(), rule.exclude.as_slice())),
    );
    if let Err(error) = &index {
        let cause = format!(
            "the patterns of all rules together are too large: {}",
            error.kind()
        );
        findings.add(Diagnostic::error("rules", cause).at(document.positions.find("rules")));
    }
    match index {
        Ok(index) if findings.errors.is_empty() => {
            let index = Arc::new(index);
            let warnings = findings.warnings;
            Ok(Experiment {
                volume,
                target,
                duration,
                seed: document.seed,
                scope,
                rules,
                index,
                warnings,
            })
        }
        _ => Err(findings.into_errors()),
    }
}

/// A rule that passed, with what it was written as.
struct Checked<'a> {
    rule: Rule,
    place: usize,
    spec: &'a RuleSpec,
}

/// What was found, up to [`MOST_DIAGNOSTICS`] of each severity.
struct Findings {
    errors: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
    /// Stands for what is past the limit.
    spare: Option<Diagnostic>,
    /// Bytes of the patterns so far.
    pattern_bytes: usize,
}

impl Findings {
    fn new(found: Vec<Diagnostic>) -> Self {
        let mut findings = Self {
            errors: Vec::new(),
            warnings: Vec::new(),
            spare: None,
            pattern_bytes: 0,
        };
        for diagnostic in found {
            findings.add(diagnostic);
        }
        findings
    }

    fn is_full(&self) -> bool {
        self.errors.len() >= MOST_DIAGNOSTICS
    }

    fn add(&mut self, diagnostic: Diagnostic) -> Added<'_> {
        let kept = match diagnostic.severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        if kept.len() >= MOST_DIAGNOSTICS {
            return Added(Some(self.spare.insert(diagnostic)));
        }
        kept.push(diagnostic);
        Added(kept.last_mut())
    }

    /// The errors in the order of the text.
    fn into_errors(mut self) -> Vec<Diagnostic> {
        self.errors.sort_by_key(|error| error.position);
        self.errors
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
        checker
            .error("duration", "an experiment of no length hits nothing")
            .hint("`forever` is until recovered by hand");
        return None;
    }
    Some(RunFor::Time(duration))
}

/// Names must be unique, since counts and decisions go by them.
fn check_names(checked: &[Checked<'_>], findings: &mut Findings) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for Checked { rule, place, spec } in checked {
        if let Some(earlier) = first.insert(rule.name(), *place) {
            let cause = format!(
                "the name {} belongs to rules[{earlier}] already",
                quote(rule.name())
            );
            let position = spec.positions.find("name");
            findings.add(Diagnostic::error(format!("rules[{place}].name"), cause).at(position));
        }
    }
}

/// A rule behind one that always fires on all its operations, and ends the list, can never fire.
fn check_shadows(checked: &[Checked<'_>], findings: &mut Findings) {
    let mut walls: Vec<&Rule> = Vec::new();
    for Checked { rule, place, spec } in checked {
        let hidden = walls.iter().find(|wall| wall.ops.is_superset(rule.ops));
        if let Some(wall) = hidden {
            let cause = format!(
                "can never fire: {} before it always fires and ends the list",
                quote(wall.name())
            );
            let hint = match wall.stop {
                true => "remove its `then: stop`, or put this rule first",
                false => "its errno ends the operation; put this rule first",
            };
            findings.add(
                Diagnostic::error(format!("rules[{place}]"), cause)
                    .hint(hint)
                    .at(spec.positions.find("")),
            );
        } else if rule.is_terminal() && rule.is_unconditional() {
            // Walls never contain one another's operations, so there are few.
            walls.retain(|wall| !rule.ops.is_superset(wall.ops));
            walls.push(rule);
        }
    }
}

/// Collects what is wrong with the fields below a prefix.
pub(crate) struct Checker<'a> {
    prefix: String,
    positions: &'a Positions,
    findings: &'a mut Findings,
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
        self.findings.add(Diagnostic {
            severity,
            position,
            field,
            cause,
            hint: None,
        })
    }

    pub(crate) fn error(&mut self, field: &str, cause: impl Into<String>) -> Added<'_> {
        self.add(Severity::Error, field, cause.into())
    }

    pub(crate) fn warn(&mut self, field: &str, cause: impl Into<String>) -> Added<'_> {
        self.add(Severity::Warning, field, cause.into())
    }

    /// The meaning of a word among a few; `what` names what it should be one of.
    pub(crate) fn word<T: Copy>(
        &mut self,
        field: &str,
        what: &str,
        word: &str,
        words: &[(&'static str, T)],
    ) -> Option<T> {
        if let Some((_, meaning)) = words.iter().find(|(name, _)| *name == word) {
            return Some(*meaning);
        }
        self.unknown(
            field,
            what,
            word,
            &words.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        );
        None
    }

    /// Reports a word that is none of `words`.
    pub(crate) fn unknown(&mut self, field: &str, what: &str, word: &str, words: &[&str]) {
        const FEW: usize = 8;
        if self.findings.is_full() {
            return;
        }
        let hint = match nearest(word, words.iter().copied()) {
            Some(near) => Some(format!("did you mean `{near}`?")),
            None if words.len() <= FEW => Some(format!("there are {}", words.join(", "))),
            None => None,
        };
        self.error(field, format!("unknown {what} {}", quote(word)))
            .maybe_hint(hint);
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

    /// How many errors were found so far.
    fn errors(&self) -> usize {
        self.findings.errors.len()
    }

    /// Whether there is room for a pattern of so many bytes; reported once when there is not.
    pub(crate) fn afford_pattern(&mut self, field: &str, bytes: usize) -> bool {
        let before = self.findings.pattern_bytes;
        self.findings.pattern_bytes = before.saturating_add(bytes);
        if before <= MOST_BYTES && self.findings.pattern_bytes > MOST_BYTES {
            self.error(
                field,
                format!("the patterns of all rules together may have {MOST_BYTES} bytes"),
            );
        }
        self.findings.pattern_bytes <= MOST_BYTES
    }

    /// A process id.
    pub(crate) fn pid(&mut self, field: &str, pid: u32) {
        if pid == 0 || i32::try_from(pid).is_err() {
            self.error(field, format!("{pid} is not a process id"));
        }
    }
}
