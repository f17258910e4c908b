//! The raw form of a specification: exactly what was written.
//!
//! Owns the types that mirror the YAML and JSON, their schema, and the way in and out of text. Invariant: unknown keys and values of the wrong shape are refused
//! here; whether the values make sense is for [`crate::check`] to say. What is printed reads back as the same document.

mod decode;
mod json_schema;
pub(crate) mod node;
mod reader;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::diagnostic::{Diagnostic, Position};

pub(crate) use decode::read_rule;
pub use json_schema::schema;
pub use node::LARGEST;

/// The version of the language.
pub const VERSION: u64 = 1;

/// An experiment as written.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Hobble experiment")]
pub struct Document {
    /// Version of the language: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u64,
    /// Directory or file to hook: absolute, as the target sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// What is to be hit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<TargetSpec>,
    /// How long until everything is put back, such as `5m`; `forever` must be said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// Makes the run repeatable: the same seed gives the same decisions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Who is hit: `tree` (the process and its descendants) or `namespace` (every process of its mount namespace).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["tree", "namespace"]))]
    pub scope: Option<String>,
    /// The rules, asked in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleSpec>,
    /// Where the fields were written.
    #[serde(skip)]
    pub positions: Positions,
}

/// What is to be hit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetSpec {
    /// Process id.
    pub pid: u32,
}

/// A rule: filter (`op`, `path`, `exclude`, `who`, `range`), trigger (`when`) and fault.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Name, unique in the experiment; `latency-1`, `errno-2` (kind and place) when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Operations, or groups of them: `data`, `metadata`, `sync`. All that the fault can hit when there is none. `method` is another word for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub op: Option<OneOrMany<String>>,
    /// Globs, relative to the volume, or absolute; any of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<OneOrMany<String>>,
    /// Globs of what is left alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<OneOrMany<String>>,
    /// Callers; all conditions must hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<WhoSpec>,
    /// Bytes of the file; operations on a range that touches them match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<RangeSpec>,
    /// When a match is hit: window, then counts, then percent, then times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<WhenSpec>,
    /// What happens; several compose: slow, then failed.
    pub fault: FaultSpec,
    /// `stop`: when the rule fires, no later rule is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["stop"]))]
    pub then: Option<String>,
    /// Where the fields were written.
    #[serde(skip)]
    pub positions: Positions,
}

/// One value or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// Written without a list.
    One(T),
    /// Written as a list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// A number, or text such as `64KiB`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum NumberOrText {
    /// A plain number.
    Number(u64),
    /// Text with a meaning of its own.
    Text(String),
}

/// Callers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WhoSpec {
    /// Process ids, as seen from outside the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<OneOrMany<u32>>,
    /// Globs for the name of the process or of the very thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comm: Option<OneOrMany<String>>,
    /// User ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<OneOrMany<u32>>,
}

/// A range of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeSpec {
    /// First byte, such as `1MiB`; 0 when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<NumberOrText>,
    /// Number of bytes; to the end of the file when there is neither this nor `end`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<NumberOrText>,
    /// First byte past the range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<NumberOrText>,
}

/// Trigger.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WhenSpec {
    /// Share of the matches that are hit, by chance.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "plain_percent"
    )]
    #[schemars(range(min = 0, max = 100), with = "Option<f64>")]
    pub percent: Option<f64>,
    /// So many matches are let pass first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
    /// Of the further matches, every so-manieth is hit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub every: Option<u64>,
    /// So many are hit at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub times: Option<u64>,
    /// Time from the beginning of the injection until the rule wakes up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Time for which the rule is awake.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub lasting: Option<String>,
    /// What the counts are kept for: `rule` (the default), `process` or `file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["rule", "process", "file"]))]
    pub per: Option<String>,
}

/// Faults, at least one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("minProperties" = 1))]
pub struct FaultSpec {
    /// Delays the operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencySpec>,
    /// Fails the operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<ErrnoSpec>,
    /// Overrides attributes in the reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attr: Option<AttrSpec>,
    /// Alters the data read, or, and that for good, the data written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<CorruptSpec>,
}

/// A delay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum LatencySpec {
    /// Always the same, such as `20ms`.
    Fixed(String),
    /// Drawn from a distribution.
    Shaped(LatencyShape),
}

/// A delay drawn from a distribution.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LatencyShape {
    /// Mean before clamping.
    pub mean: String,
    /// Half the width of `uniform`, standard deviation of `normal`, `lognormal` and `pareto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<String>,
    /// `constant`, `uniform` (the default with a jitter), `normal`, `exponential`, `pareto` or `lognormal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["constant", "uniform", "normal", "exponential", "pareto", "lognormal"]))]
    pub distribution: Option<String>,
    /// No delay is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<String>,
    /// No delay is longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<String>,
}

/// An errno: name or number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ErrnoName {
    /// Number, 1 to 511.
    Number(u64),
    /// Name, such as `EIO`.
    Name(String),
}

/// One errno or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ErrnoSpec {
    /// Always this.
    One(ErrnoName),
    /// One of these.
    List(Vec<ErrnoItem>),
    /// One of these, in proportion to their weights.
    Weights(BTreeMap<String, u32>),
}

/// One of several errnos.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ErrnoItem {
    /// With weight 1.
    Plain(ErrnoName),
    /// With its weight.
    Weighted(WeightedErrno),
}

/// An errno and its weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightedErrno {
    /// The errno.
    pub errno: ErrnoName,
    /// Its share of the sum of the weights.
    #[schemars(range(min = 1))]
    pub weight: u32,
}

/// Attributes to report in the place of the true ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttrSpec {
    /// Inode number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ino: Option<u64>,
    /// Size in bytes, such as `4096` or `64KiB`; `+1MiB` and `-1` are relative to the true size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<NumberOrText>,
    /// Blocks of 512 bytes; `+8` and `-8` are relative.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<NumberOrText>,
    /// Time of last access: RFC 3339, `{sec, nsec}`, or relative such as `+1h` and `-30d`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub atime: Option<TimeSpec>,
    /// Time of last change of the content, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtime: Option<TimeSpec>,
    /// Time of last change of the attributes, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctime: Option<TimeSpec>,
    /// File type: `regular`, `directory`, `symlink`, `fifo`, `socket`, `char_device` or `block_device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["regular", "directory", "symlink", "fifo", "socket", "char_device", "block_device", "file", "regularFile", "namedPipe", "charDevice", "blockDevice"]))]
    pub kind: Option<String>,
    /// Permission bits: octal text such as `"0644"`, or a plain number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perm: Option<NumberOrText>,
    /// Number of names; `+1` and `-1` are relative.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nlink: Option<NumberOrText>,
    /// Owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Device number: a plain number as the kernel encodes it, or `major:minor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdev: Option<NumberOrText>,
}

/// A point in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum TimeSpec {
    /// RFC 3339, or relative.
    Text(String),
    /// As in IOChaos.
    Parts(TimeParts),
}

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TimeParts {
    /// Seconds.
    pub sec: i64,
    /// Nanoseconds.
    #[schemars(range(max = 999_999_999))]
    pub nsec: u32,
}

/// Corruption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum CorruptSpec {
    /// The filling alone: one byte of the buffer.
    Fill(String),
    /// With numbers.
    Full(CorruptShape),
}

/// Corruption with numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CorruptShape {
    /// What is put in: `zero` or `random`.
    #[schemars(extend("enum" = ["zero", "random"]))]
    pub fill: String,
    /// Each operation has 1 to so many segments altered; 1 when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub occurrences: Option<u64>,
    /// Each segment has 1 to so many bytes; 1 when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<NumberOrText>,
}

/// Where the fields of a document or rule were written. Positions are no part of what a document says: all are equal.
#[derive(Clone, Debug, Default)]
pub struct Positions(BTreeMap<String, Position>);

impl PartialEq for Positions {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Positions {}

impl Positions {
    pub(crate) fn insert(&mut self, field: &str, position: Option<Position>) {
        if let Some(position) = position {
            self.0.insert(field.to_owned(), position);
        }
    }

    /// The position of the field, else of the nearest field around it.
    pub(crate) fn find(&self, field: &str) -> Option<Position> {
        let mut field = field;
        loop {
            if let Some(position) = self.0.get(field) {
                return Some(*position);
            }
            if field.is_empty() {
                return None;
            }
            field = field
                .rfind(['.', '['])
                .and_then(|end| field.get(..end))
                .unwrap_or("");
        }
    }
}

impl Default for Document {
    /// A document of this version that says nothing.
    fn default() -> Self {
        Self {
            version: VERSION,
            volume: None,
            target: None,
            duration: None,
            seed: None,
            scope: None,
            rules: Vec::new(),
            positions: Positions::default(),
        }
    }
}

impl Document {
    /// A document with these rules and nothing else.
    #[must_use]
    pub fn with_rules(rules: Vec<RuleSpec>) -> Self {
        Self {
            rules,
            ..Self::default()
        }
    }

    /// YAML that reads back as this document.
    ///
    /// # Errors
    /// [`PrintError`] when a text in it cannot be written as YAML.
    pub fn to_yaml(&self) -> Result<String, PrintError> {
        serde_saphyr::to_string(self).map_err(|error| PrintError {
            reason: error.to_string(),
        })
    }
}

/// A document could not be printed.
#[derive(Debug, thiserror::Error)]
#[error("document cannot be written as YAML: {reason}")]
pub struct PrintError {
    /// Why.
    reason: String,
}

/// Reads a specification in YAML or JSON.
///
/// # Errors
/// Everything that is not readable, unknown or of the wrong shape, with its position.
pub fn parse(text: &str) -> Result<Document, Vec<Diagnostic>> {
    read(text)?.whole()
}

/// What could be read of a text that was at least YAML.
#[derive(Default)]
pub(crate) struct Reading {
    /// The document, with those of its rules that could be read.
    pub(crate) document: Document,
    /// The places of these rules.
    pub(crate) places: Vec<usize>,
    /// How many rules were written, those included that could not be read.
    pub(crate) written: usize,
    /// What is wrong with the rest.
    pub(crate) found: Vec<Diagnostic>,
}

impl Reading {
    fn whole(self) -> Result<Document, Vec<Diagnostic>> {
        let mut found = self.found;
        found.sort_by_key(|diagnostic| diagnostic.position);
        if found.is_empty() {
            Ok(self.document)
        } else {
            Err(found)
        }
    }
}

/// Reads as much of a specification as can be read.
pub(crate) fn read(text: &str) -> Result<Reading, Vec<Diagnostic>> {
    let root = node::from_yaml(text).map_err(|diagnostic| vec![diagnostic])?;
    Ok(decode::read_document(&root))
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let root = node::Node::from(serde_json::Value::deserialize(deserializer)?);
        decode::read_document(&root).whole().map_err(|diagnostics| {
            let causes: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            serde::de::Error::custom(causes.join("; "))
        })
    }
}

/// Writes 10 rather than 10.0.
fn plain_percent<S: Serializer>(percent: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match percent {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Whole, and in range.
        Some(percent) if percent.fract() == 0.0 && (0.0..=100.0).contains(percent) => {
            serializer.serialize_u64(*percent as u64)
        }
        percent => percent.serialize(serializer),
    }
}
