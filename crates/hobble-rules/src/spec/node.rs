//! A specification as a tree of values with their positions, before anything is known about what they mean.
//!
//! Owns the tree and the way in from YAML and JSON; the one place that calls the YAML library. Invariant: bounded size, depth and number of nodes, so that
//! nothing that walks the tree can run out of stack or time.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy};
use serde_saphyr::{Location, Spanned};

use crate::diagnostic::{Diagnostic, Position, Source, quote};

/// Largest text of a specification, in bytes.
pub const LARGEST: usize = 1 << 20;

const DEEPEST: usize = 24;

/// A value, and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) position: Option<Position>,
    /// Byte of the text at which the value itself begins, which is elsewhere when an alias stands for it.
    start: Option<u64>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    /// A word of a `--fault` string, where text and numbers look alike.
    Word(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) position: Option<Position>,
    pub(crate) node: Node,
}

impl Value {
    /// What kind of value it is, for messages.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) | Self::Word(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// Reads YAML; JSON is a subset of it.
pub(crate) fn from_yaml(text: &str) -> Result<Node, Diagnostic> {
    if text.len() > LARGEST {
        let cause = format!(
            "a specification may have {LARGEST} bytes, this one has {}",
            text.len()
        );
        return Err(Diagnostic::error("", cause));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEEPEST,
            flow_nesting_limit: DEEPEST,
            max_nodes: 50_000,
            max_events: 200_000,
            max_documents: 1,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_merge_keys: 0,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 10_000,
            max_replay_stack_depth: 8,
            max_alias_expansions_per_anchor: 1_000,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Value>>(text, options) {
        Ok(spanned) => {
            let mut root = Node::from(spanned);
            root.keep_signs(text);
            Ok(root)
        }
        Err(error) => {
            let position = error.location().and_then(position);
            Err(Diagnostic::error("", cause_of(error.without_snippet())).at(position))
        }
    }
}

/// The cause in our words where the library's would puzzle, else the first line of its own.
fn cause_of(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    use serde_saphyr::budget::BudgetBreach;
    let cause = match error {
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            return format!("the key {} is there twice", quote(key));
        }
        Error::Budget {
            breach: BudgetBreach::Documents { .. },
            ..
        }
        | Error::MultipleDocuments { .. } => {
            return "there is more than one document".into();
        }
        Error::Budget {
            breach: BudgetBreach::Depth { .. },
            ..
        } => "nested too deeply".into(),
        Error::Budget { .. } => "it has too many parts".into(),
        Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => "its aliases stand for too much".into(),
        _ => {
            let message = error.to_string();
            let line = message.lines().next().unwrap_or_default();
            // The position is said elsewhere.
            line.split(" at line ")
                .next()
                .unwrap_or(line)
                .chars()
                .take(200)
                .collect::<String>()
        }
    };
    format!("not readable as YAML or JSON: {cause}")
}

impl Node {
    /// A value at a place.
    pub(crate) const fn new(value: Value, position: Option<Position>) -> Self {
        Self {
            value,
            position,
            start: None,
        }
    }

    /// Makes text of numbers that were written with a plus: `+1` is relative where a rule takes relative values, and YAML takes it for 1.
    fn keep_signs(&mut self, source: &str) {
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.keep_signs(source)),
            Value::Map(entries) => entries
                .iter_mut()
                .for_each(|entry| entry.node.keep_signs(source)),
            Value::Int(number) => {
                let start = self.start.and_then(|start| usize::try_from(start).ok());
                if start.and_then(|start| source.as_bytes().get(start)) == Some(&b'+') {
                    self.value = Value::Text(format!("+{number}"));
                }
            }
            _ => {}
        }
    }
}

fn position(location: Location) -> Option<Position> {
    let line = u32::try_from(location.line())
        .ok()
        .filter(|line| *line > 0)?;
    Some(Position {
        source: Source::Spec,
        line,
        column: u32::try_from(location.column()).ok()?,
    })
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        let start = spanned.defined.span().byte_offset();
        Self {
            start,
            ..Self::new(spanned.value, position(spanned.referenced))
        }
    }
}

impl From<serde_json::Value> for Node {
    fn from(value: serde_json::Value) -> Self {
        let value = match value {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(value),
            serde_json::Value::Number(number) => match number.as_i128() {
                Some(value) => Value::Int(value),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Value::Text(text),
            serde_json::Value::Array(items) => {
                Value::List(items.into_iter().map(Self::from).collect())
            }
            serde_json::Value::Object(entries) => {
                let entry = |(key, value)| Entry {
                    key,
                    position: None,
                    node: Self::from(value),
                };
                Value::Map(entries.into_iter().map(entry).collect())
            }
        };
        Self::new(value, None)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Value, E> {
        Ok(i128::try_from(value).map_or(Value::Float(f64::INFINITY), Value::Int))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Value>>()? {
            list.push(Node::from(item));
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let node = Node::from(entries.next_value::<Spanned<Value>>()?);
            map.push(Entry {
                key: key.value,
                position: position(key.referenced),
                node,
            });
        }
        Ok(Value::Map(map))
    }
}
