//! What is wrong with a specification, and where.
//!
//! Owns positions, field paths and the printed form of a diagnostic. Invariant: a diagnostic always names the field; it has a line and column
//! whenever the text it came from is known.

use std::fmt;

/// Most diagnostics that are collected: who made more mistakes than that gave the wrong file.
pub(crate) const MOST_DIAGNOSTICS: usize = 50;

/// Which text a position is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The specification.
    Spec,
    /// The `--fault` string of this number, from 1.
    Fault(u32),
}

/// A place in the text of a specification or of a `--fault` string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The text.
    pub source: Source,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Source::Spec => write!(f, "{}:{}", self.line, self.column),
            Source::Fault(number) => write!(f, "--fault {number}, column {}", self.column),
        }
    }
}

/// Whether a diagnostic stops the specification from being used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// It cannot be used.
    Error,
    /// It can; something about it ought to be known.
    Warning,
}

/// One thing that is wrong, or worth knowing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it stops the specification from being used.
    pub severity: Severity,
    /// Where, when the text is known.
    pub position: Option<Position>,
    /// The field, as in `rules[1].op[0]`; empty for the document as a whole.
    pub field: String,
    /// What is wrong; lower-case, no final dot.
    pub cause: String,
    /// What would be right: the nearest valid word, or what to write instead.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// An error about a field.
    pub(crate) fn error(field: impl Into<String>, cause: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            position: None,
            field: field.into(),
            cause: cause.into(),
            hint: None,
        }
    }

    /// The same with a hint.
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// The same at a place.
    pub(crate) fn at(self, position: Option<Position>) -> Self {
        Self {
            position: position.or(self.position),
            ..self
        }
    }
}

impl Diagnostic {
    /// The field without the place of its rule, when that is the `--fault` string that the position names anyway.
    #[must_use]
    pub fn shown_field(&self) -> &str {
        let in_rule = self
            .field
            .strip_prefix("rules[")
            .and_then(|rest| rest.split_once(']'));
        match (self.position.map(|position| position.source), in_rule) {
            (Some(Source::Fault(_)), Some((_, field))) => field.strip_prefix('.').unwrap_or(field),
            _ => &self.field,
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(position) = self.position {
            write!(f, "{position}: ")?;
        }
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        let field = self.shown_field();
        if !field.is_empty() {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.cause)?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostic {}

/// A field below another.
pub(crate) fn join(prefix: &str, field: &str) -> String {
    match (prefix, field) {
        ("", _) => field.to_owned(),
        (_, "") => prefix.to_owned(),
        _ => format!("{prefix}.{field}"),
    }
}

/// What the user wrote, for a message: without control characters, cut off when long.
pub(crate) fn quote(text: &str) -> String {
    const LONGEST: usize = 60;
    let shown: String = text.chars().take(LONGEST).flat_map(plain).collect();
    let more = if text.chars().nth(LONGEST).is_some() {
        "…"
    } else {
        ""
    };
    format!("`{shown}{more}`")
}

fn plain(c: char) -> impl Iterator<Item = char> {
    let control = c.is_control() || ('\u{200b}'..='\u{202e}').contains(&c);
    let escaped = control.then(|| c.escape_unicode()).into_iter().flatten();
    escaped.chain((!control).then_some(c))
}
