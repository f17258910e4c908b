//! Taking fields out of the tree of values.
//!
//! Owns the shapes: map, list, text, number. Invariant: a value of the wrong shape is reported with its field and position and gives nothing; a field that was read has
//! its position noted; what is left of a map when it is finished is reported as unknown.

use super::decode::keys_of;
use super::node::{Entry, Node, Value};
use super::{ErrnoName, NumberOrText, OneOrMany, Positions};
use crate::diagnostic::{Diagnostic, MOST_DIAGNOSTICS, Position, join, quote};
use crate::nearest::nearest;

/// The cause when a key is not there.
pub(super) const MISSING: &str = "is missing";

/// What is left of a map while its keys are taken.
pub(super) struct Keys<'a> {
    pub(super) entries: Vec<&'a Entry>,
    known: Vec<&'static str>,
    was_empty: bool,
}

impl<'a> Keys<'a> {
    /// The value of a key, once.
    pub(super) fn take(&mut self, key: &str) -> Option<&'a Node> {
        let place = self.entries.iter().position(|entry| entry.key == key)?;
        Some(&self.entries.swap_remove(place).node)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.was_empty
    }
}

/// Collects what is wrong while fields are read.
pub(super) struct Reader {
    prefix: String,
    pub(super) positions: Positions,
    pub(super) diagnostics: Vec<Diagnostic>,
}

impl Reader {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            positions: Positions::default(),
            diagnostics: Vec::new(),
        }
    }

    pub(super) fn done<T>(self, value: T) -> Result<T, Vec<Diagnostic>> {
        if self.diagnostics.is_empty() {
            Ok(value)
        } else {
            Err(self.diagnostics)
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.diagnostics.len() >= MOST_DIAGNOSTICS
    }

    pub(super) fn push(&mut self, diagnostic: Diagnostic) {
        if !self.is_full() {
            self.diagnostics.push(diagnostic);
        }
    }

    /// Adds a diagnostic whose field is relative to the prefix.
    pub(super) fn report(&mut self, diagnostic: Diagnostic, position: Option<Position>) {
        let field = join(&self.prefix, &diagnostic.field);
        self.push(
            Diagnostic {
                field,
                ..diagnostic
            }
            .at(position),
        );
    }

    /// A value of the wrong shape.
    fn wrong<T>(&mut self, field: &str, expected: &str, node: &Node) -> Option<T> {
        let found = match &node.value {
            Value::Text(text) | Value::Word(text) => quote(text),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            value => value.kind().to_owned(),
        };
        self.report(
            Diagnostic::error(field, format!("{expected} is expected, found {found}")),
            node.position,
        );
        None
    }

    pub(super) fn map<'a>(&mut self, field: &str, node: &'a Node) -> Option<Keys<'a>> {
        self.positions.insert(field, node.position);
        match &node.value {
            Value::Map(entries) => Some(Keys {
                entries: entries.iter().collect(),
                known: keys_of(&self.prefix, field),
                was_empty: entries.is_empty(),
            }),
            _ => self.wrong(field, "a map", node),
        }
    }

    pub(super) fn list<'a>(&mut self, field: &str, node: &'a Node) -> Option<&'a [Node]> {
        self.positions.insert(field, node.position);
        match &node.value {
            Value::List(items) => Some(items),
            _ => self.wrong(field, "a list", node),
        }
    }

    /// Reports what is left of a map; `advice` knows more about some keys than the nearest word.
    pub(super) fn finish(
        &mut self,
        field: &str,
        map: Keys<'_>,
        advice: impl Fn(&str) -> Option<String>,
    ) {
        let mut entries = map.entries;
        entries.sort_by_key(|entry| entry.position);
        for entry in entries {
            if self.is_full() {
                return;
            }
            let unknown = Diagnostic::error(field, format!("unknown key {}", quote(&entry.key)));
            let unknown = match (
                advice(&entry.key),
                nearest(&entry.key, map.known.iter().copied()),
            ) {
                (Some(advice), _) => unknown.hint(advice),
                (None, Some(word)) => {
                    // A key that is missing because it is misspelt is one mistake, not two.
                    let whole = join(&self.prefix, &join(field, word));
                    self.diagnostics
                        .retain(|other| other.cause != MISSING || other.field != whole);
                    unknown.hint(format!("did you mean `{word}`?"))
                }
                (None, None) => unknown.hint(format!("there are {}", map.known.join(", "))),
            };
            self.report(unknown, entry.position);
        }
    }

    /// A key that must be there.
    pub(super) fn need<'a, T>(
        &mut self,
        field: &str,
        map: &mut Keys<'a>,
        key: &str,
        whole: &Node,
        read: impl FnOnce(&mut Self, &str, &'a Node) -> Option<T>,
    ) -> Option<T> {
        let inner = format!("{field}.{key}");
        match map.take(key) {
            Some(node) => read(self, &inner, node),
            None => {
                self.report(Diagnostic::error(inner, MISSING), whole.position);
                None
            }
        }
    }

    /// Text; a number stands for its digits, so that a file may be called 123 and a duration without a unit can be explained later.
    pub(super) fn text(&mut self, field: &str, node: &Node) -> Option<String> {
        self.positions.insert(field, node.position);
        match &node.value {
            Value::Text(text) | Value::Word(text) => Some(text.clone()),
            Value::Int(number) => Some(number.to_string()),
            Value::Float(number) => Some(number.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            Value::Null | Value::List(_) | Value::Map(_) => self.wrong(field, "text", node),
        }
    }

    pub(super) fn number<T: TryFrom<i128>>(&mut self, field: &str, node: &Node) -> Option<T> {
        self.positions.insert(field, node.position);
        let value = match &node.value {
            Value::Int(number) => Some(*number),
            Value::Word(word) => word.parse().ok(),
            _ => None,
        };
        let Some(value) = value else {
            return self.wrong(field, "a whole number", node);
        };
        let Ok(value) = T::try_from(value) else {
            let bits = 8 * size_of::<T>();
            let cause = if value < 0 {
                "cannot be negative".to_owned()
            } else {
                format!("must fit in {bits} bits")
            };
            self.report(
                Diagnostic::error(field, format!("{value} {cause}")),
                node.position,
            );
            return None;
        };
        Some(value)
    }

    pub(super) fn float(&mut self, field: &str, node: &Node) -> Option<f64> {
        self.positions.insert(field, node.position);
        match &node.value {
            #[allow(clippy::cast_precision_loss)] // Out of range then, and refused by the check.
            Value::Int(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            Value::Word(word) => match word.parse() {
                Ok(number) => Some(number),
                Err(_) => self.wrong(field, "a number", node),
            },
            _ => self.wrong(field, "a number", node),
        }
    }

    pub(super) fn number_or_text(&mut self, field: &str, node: &Node) -> Option<NumberOrText> {
        self.positions.insert(field, node.position);
        match &node.value {
            Value::Int(number) => match u64::try_from(*number) {
                Ok(number) => Some(NumberOrText::Number(number)),
                Err(_) => Some(NumberOrText::Text(number.to_string())),
            },
            Value::Word(word) => Some(
                plain_number(word)
                    .map_or_else(|| NumberOrText::Text(word.clone()), NumberOrText::Number),
            ),
            Value::Text(text) => Some(NumberOrText::Text(text.clone())),
            _ => self.wrong(field, "a number or text", node),
        }
    }

    /// Permission bits; in a `--fault` string they are always octal, as everywhere on a command line.
    pub(super) fn mode(&mut self, field: &str, node: &Node) -> Option<NumberOrText> {
        match &node.value {
            Value::Word(word) => {
                self.positions.insert(field, node.position);
                Some(NumberOrText::Text(word.clone()))
            }
            _ => self.number_or_text(field, node),
        }
    }

    pub(super) fn errno_name(&mut self, field: &str, node: &Node) -> Option<ErrnoName> {
        match self.number_or_text(field, node)? {
            NumberOrText::Number(number) => Some(ErrnoName::Number(number)),
            NumberOrText::Text(name) => Some(ErrnoName::Name(name)),
        }
    }

    fn one_or_many<T>(
        &mut self,
        field: &str,
        node: &Node,
        read: impl Fn(&mut Self, &str, &Node) -> Option<T>,
    ) -> Option<OneOrMany<T>> {
        match &node.value {
            Value::List(items) => {
                self.positions.insert(field, node.position);
                let mut values = Vec::with_capacity(items.len());
                let mut whole = true;
                for (index, item) in items.iter().enumerate() {
                    match read(self, &format!("{field}[{index}]"), item) {
                        Some(value) => values.push(value),
                        None => whole = false,
                    }
                }
                whole.then_some(OneOrMany::Many(values))
            }
            _ => read(self, field, node).map(OneOrMany::One),
        }
    }

    pub(super) fn texts(&mut self, field: &str, node: &Node) -> Option<OneOrMany<String>> {
        self.one_or_many(field, node, Self::text)
    }

    pub(super) fn numbers<T: TryFrom<i128>>(
        &mut self,
        field: &str,
        node: &Node,
    ) -> Option<OneOrMany<T>> {
        self.one_or_many(field, node, Self::number)
    }
}

/// A number in its plainest form, so that `007` stays the text it is.
fn plain_number(word: &str) -> Option<u64> {
    word.parse()
        .ok()
        .filter(|number: &u64| number.to_string() == word)
}
