//! Rules on the command line: `latency=20ms jitter=5ms op=write,fsync path=pg_wal/** percent=10`.
//!
//! Owns the syntax of a `--fault` string: words `key=value`, parted by blanks; quotes, single or double, keep blanks and commas together. A string becomes the same tree of
//! values as the YAML of its rule and goes the same way from there. Invariant: whatever a `--fault` string can say, YAML can say; [`Document::to_yaml`] does.

use crate::diagnostic::{Diagnostic, Position, Source, quote};
use crate::nearest::nearest;
use crate::spec::node::{Entry, Node, Value};
use crate::spec::{Document, LARGEST, RuleSpec, read_rule};

/// What a key stands for, and what its value looks like.
struct Key {
    name: &'static str,
    path: &'static [&'static str],
    shape: Shape,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// One word.
    Word,
    /// Words parted by commas.
    List,
    /// Words parted by commas, each perhaps with `:weight`.
    Weights,
    /// `start+length`, `start..end`, `start..` or `..end`.
    Range,
}

const fn word(name: &'static str, path: &'static [&'static str]) -> Key {
    Key {
        name,
        path,
        shape: Shape::Word,
    }
}

const fn list(name: &'static str, path: &'static [&'static str]) -> Key {
    Key {
        name,
        path,
        shape: Shape::List,
    }
}

/// Every key, the faults first. `latency` and `corrupt` stand for the field that their scalar form abbreviates.
const KEYS: [Key; 51] = [
    word("latency", &["fault", "latency", "mean"]),
    word("jitter", &["fault", "latency", "jitter"]),
    word("distribution", &["fault", "latency", "distribution"]),
    word("min", &["fault", "latency", "min"]),
    word("max", &["fault", "latency", "max"]),
    Key {
        name: "errno",
        path: &["fault", "errno"],
        shape: Shape::Weights,
    },
    word("corrupt", &["fault", "corrupt", "fill"]),
    word("occurrences", &["fault", "corrupt", "occurrences"]),
    word("length", &["fault", "corrupt", "length"]),
    word("attr.ino", &["fault", "attr", "ino"]),
    word("attr.size", &["fault", "attr", "size"]),
    word("attr.blocks", &["fault", "attr", "blocks"]),
    word("attr.atime", &["fault", "attr", "atime"]),
    word("attr.mtime", &["fault", "attr", "mtime"]),
    word("attr.ctime", &["fault", "attr", "ctime"]),
    word("attr.kind", &["fault", "attr", "kind"]),
    word("attr.perm", &["fault", "attr", "perm"]),
    word("attr.nlink", &["fault", "attr", "nlink"]),
    word("attr.uid", &["fault", "attr", "uid"]),
    word("attr.gid", &["fault", "attr", "gid"]),
    word("attr.rdev", &["fault", "attr", "rdev"]),
    word("name", &["name"]),
    list("op", &["op"]),
    list("method", &["op"]),
    list("path", &["path"]),
    list("exclude", &["exclude"]),
    list("pid", &["who", "pid"]),
    list("comm", &["who", "comm"]),
    list("uid", &["who", "uid"]),
    Key {
        name: "range",
        path: &["range"],
        shape: Shape::Range,
    },
    word("percent", &["when", "percent"]),
    word("after", &["when", "after"]),
    word("every", &["when", "every"]),
    word("times", &["when", "times"]),
    word("from", &["when", "from"]),
    word("for", &["when", "for"]),
    word("per", &["when", "per"]),
    word("then", &["then"]),
    // The long forms of the same.
    word("latency.mean", &["fault", "latency", "mean"]),
    word("latency.jitter", &["fault", "latency", "jitter"]),
    word(
        "latency.distribution",
        &["fault", "latency", "distribution"],
    ),
    word("latency.min", &["fault", "latency", "min"]),
    word("latency.max", &["fault", "latency", "max"]),
    word("corrupt.fill", &["fault", "corrupt", "fill"]),
    word("corrupt.occurrences", &["fault", "corrupt", "occurrences"]),
    word("corrupt.length", &["fault", "corrupt", "length"]),
    list("who.pid", &["who", "pid"]),
    list("who.comm", &["who", "comm"]),
    list("who.uid", &["who", "uid"]),
    word("when.percent", &["when", "percent"]),
    word("when.per", &["when", "per"]),
];

/// Reads one `--fault` string.
///
/// # Errors
/// Everything that is wrong with its words, with the column.
pub fn parse(text: &str) -> Result<RuleSpec, Vec<Diagnostic>> {
    parse_numbered(text, 1)
}

/// Reads all `--fault` strings of a command line into a document of their rules, in their order.
///
/// # Errors
/// Everything that is wrong with any of them, with the number of the string and the column.
pub fn parse_all<S: AsRef<str>>(texts: &[S]) -> Result<Document, Vec<Diagnostic>> {
    let mut rules = Vec::new();
    let mut found = Vec::new();
    for (number, text) in (1..).zip(texts) {
        match parse_numbered(text.as_ref(), number) {
            Ok(rule) => rules.push(rule),
            Err(diagnostics) => found.extend(diagnostics),
        }
    }
    if found.is_empty() {
        Ok(Document::with_rules(rules))
    } else {
        Err(found)
    }
}

/// Reads the `--fault` string of this number.
pub(crate) fn parse_numbered(text: &str, number: u32) -> Result<RuleSpec, Vec<Diagnostic>> {
    let at = |column: usize| {
        Some(Position {
            source: Source::Fault(number),
            line: 1,
            column: u32::try_from(column).unwrap_or(u32::MAX),
        })
    };
    if text.len() > LARGEST {
        return Err(vec![
            Diagnostic::error(
                "",
                format!(
                    "a fault may have {LARGEST} bytes, this one has {}",
                    text.len()
                ),
            )
            .at(at(1)),
        ]);
    }
    let words =
        split(text).map_err(|(column, cause)| vec![Diagnostic::error("", cause).at(at(column))])?;
    let mut found = Vec::new();
    let mut tree = Tree::default();
    for word in words {
        let Some(equals) = word
            .iter()
            .position(|letter| letter.c == '=' && !letter.quoted)
        else {
            let shown: String = word.iter().map(|letter| letter.c).collect();
            let column = word.first().map_or(1, |letter| letter.column);
            let cause = format!("{} is not of the form key=value", quote(&shown));
            found.push(Diagnostic::error("", cause).at(at(column)));
            continue;
        };
        let (name, value) = word.split_at(equals);
        let name: String = name.iter().map(|letter| letter.c).collect();
        let column = word.first().map_or(1, |letter| letter.column);
        let (sign, value) = value.split_at(value.len().min(1));
        let start = value
            .first()
            .or(sign.first())
            .map_or(column, |letter| letter.column);
        let Some(key) = KEYS.iter().find(|key| key.name == name) else {
            let near = nearest(&name, KEYS.iter().map(|key| key.name));
            let unknown = Diagnostic::error("", format!("unknown key {}", quote(&name)));
            let unknown = match near {
                _ if crate::fault::NOT_IN_THIS_VERSION.contains(&name.as_str()) => {
                    unknown.hint("not available in this version")
                }
                _ if name == "attr" => unknown.hint("name the attribute, as in `attr.perm=0`"),
                _ if name == "stop" => unknown.hint("write `then=stop`"),
                Some(near) => unknown.hint(format!("did you mean `{near}`?")),
                None => unknown,
            };
            found.push(unknown.at(at(column)));
            continue;
        };
        let node = match key.shape {
            Shape::Word => Node::new(
                Value::Word(value.iter().map(|letter| letter.c).collect()),
                at(start),
            ),
            Shape::List => list_node(value, start, at),
            Shape::Weights => weights_node(value, start, at),
            Shape::Range => match range_node(value, at(start)) {
                Ok(node) => node,
                Err(diagnostic) => {
                    found.push(diagnostic.at(at(start)));
                    continue;
                }
            },
        };
        if !tree.insert(key.path, at(column), node) {
            found.push(
                Diagnostic::error("", format!("{} is there twice", quote(&name))).at(at(column)),
            );
        }
    }
    if !found.is_empty() {
        return Err(found);
    }
    let fields = |diagnostic: Diagnostic| Diagnostic {
        field: short_field(&diagnostic.field),
        ..diagnostic
    };
    // A rule of its own place, so that no field is taken for one of a document; the place is not shown.
    read_rule(&tree.into_node(at(1)), PREFIX)
        .map_err(|diagnostics| diagnostics.into_iter().map(fields).collect())
}

const PREFIX: &str = "rule";

fn short_field(field: &str) -> String {
    let rest = field.strip_prefix(PREFIX).unwrap_or(field);
    rest.strip_prefix('.').unwrap_or(rest).to_owned()
}

/// A character of a string, with its column, and whether it was in quotes.
#[derive(Clone, Copy)]
struct Letter {
    c: char,
    column: usize,
    quoted: bool,
}

/// The words of a string; the error is a column and a cause.
fn split(text: &str) -> Result<Vec<Vec<Letter>>, (usize, String)> {
    let mut words = Vec::new();
    let mut word: Vec<Letter> = Vec::new();
    let mut quote: Option<(char, usize)> = None;
    let mut letters = (1..).zip(text.chars()).peekable();
    while let Some((column, c)) = letters.next() {
        match quote {
            Some((open, _)) if c == open => quote = None,
            // Inside double quotes a backslash keeps a double quote or a backslash.
            Some(('"', _))
                if c == '\\'
                    && letters
                        .peek()
                        .is_some_and(|(_, next)| matches!(next, '"' | '\\')) =>
            {
                word.extend(letters.next().map(|(_, c)| Letter {
                    c,
                    column,
                    quoted: true,
                }));
            }
            Some(_) => word.push(Letter {
                c,
                column,
                quoted: true,
            }),
            None if c == '"' || c == '\'' => quote = Some((c, column)),
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            None => word.push(Letter {
                c,
                column,
                quoted: false,
            }),
        }
    }
    if let Some((open, column)) = quote {
        return Err((column, format!("the quote {open} is not closed")));
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// Parts a value at the commas that are neither in quotes nor in braces or brackets.
fn parts(value: &[Letter]) -> Vec<&[Letter]> {
    let mut depth = 0_usize;
    value
        .split(|letter| {
            match letter.c {
                '{' | '[' if !letter.quoted => depth += 1,
                '}' | ']' if !letter.quoted => depth = depth.saturating_sub(1),
                _ => {}
            }
            letter.c == ',' && !letter.quoted && depth == 0
        })
        .collect()
}

fn list_node(value: &[Letter], start: usize, at: impl Fn(usize) -> Option<Position>) -> Node {
    let item = |part: &[Letter]| {
        let position = at(part.first().map_or(start, |letter| letter.column));
        Node::new(
            Value::Word(part.iter().map(|letter| letter.c).collect()),
            position,
        )
    };
    let parts = parts(value);
    match parts.as_slice() {
        [one] => item(one),
        many => Node::new(
            Value::List(many.iter().map(|part| item(part)).collect()),
            at(start),
        ),
    }
}

fn weights_node(
    value: &[Letter],
    start: usize,
    at: impl Fn(usize) -> Option<Position> + Copy,
) -> Node {
    if !value.iter().any(|letter| letter.c == ':') {
        return list_node(value, start, at);
    }
    let entry = |part: &[Letter]| {
        let text: String = part.iter().map(|letter| letter.c).collect();
        let (key, weight) = text.split_once(':').unwrap_or((&text, "1"));
        let position = at(part.first().map_or(start, |letter| letter.column));
        let field = |name: &str, value: &str| Entry {
            key: name.to_owned(),
            position,
            node: Node::new(Value::Word(value.to_owned()), position),
        };
        Node::new(
            Value::Map(vec![field("errno", key), field("weight", weight)]),
            position,
        )
    };
    Node::new(
        Value::List(parts(value).into_iter().map(entry).collect()),
        at(start),
    )
}

fn range_node(value: &[Letter], position: Option<Position>) -> Result<Node, Diagnostic> {
    let text: String = value.iter().map(|letter| letter.c).collect();
    let field = |key: &str, value: &str| {
        (!value.is_empty()).then(|| Entry {
            key: key.to_owned(),
            position,
            node: Node::new(Value::Word(value.to_owned()), position),
        })
    };
    let entries: Vec<Entry> = if let Some((start, end)) = text.split_once("..") {
        [field("start", start), field("end", end)]
            .into_iter()
            .flatten()
            .collect()
    } else if let Some((start, length)) = text.split_once('+') {
        [field("start", start), field("length", length)]
            .into_iter()
            .flatten()
            .collect()
    } else {
        let cause = format!("{} is not a range", quote(&text));
        return Err(Diagnostic::error("range", cause)
            .hint("write 1MiB+64KiB (start+length) or 1MiB..2MiB (start..end)"));
    };
    Ok(Node::new(Value::Map(entries), position))
}

/// The maps that dotted keys make.
#[derive(Default)]
struct Tree(Vec<Entry>);

impl Tree {
    /// Puts a value in its place; false when something is there.
    fn insert(&mut self, path: &[&str], position: Option<Position>, node: Node) -> bool {
        insert(&mut self.0, path, position, node)
    }

    fn into_node(mut self, position: Option<Position>) -> Node {
        // Alone, `latency=…` and `corrupt=…` are the scalar form.
        if let Some(Value::Map(faults)) = self
            .0
            .iter_mut()
            .find(|entry| entry.key == "fault")
            .map(|entry| &mut entry.node.value)
        {
            for (fault, field) in [("latency", "mean"), ("corrupt", "fill")] {
                let Some(entry) = faults.iter_mut().find(|entry| entry.key == fault) else {
                    continue;
                };
                if let Value::Map(fields) = &mut entry.node.value
                    && let [only] = fields.as_slice()
                    && only.key == field
                {
                    entry.node = only.node.clone();
                }
            }
        }
        Node::new(Value::Map(self.0), position)
    }
}

fn insert(entries: &mut Vec<Entry>, path: &[&str], position: Option<Position>, node: Node) -> bool {
    let Some((key, rest)) = path.split_first() else {
        return false;
    };
    let place = entries.iter().position(|entry| entry.key == *key);
    if rest.is_empty() {
        if place.is_some() {
            return false;
        }
        entries.push(Entry {
            key: (*key).to_owned(),
            position,
            node,
        });
        return true;
    }
    if place.is_none() {
        entries.push(Entry {
            key: (*key).to_owned(),
            position,
            node: Node::new(Value::Map(Vec::new()), position),
        });
    }
    match entries
        .iter_mut()
        .find(|entry| entry.key == *key)
        .map(|entry| &mut entry.node.value)
    {
        Some(Value::Map(inner)) => insert(inner, rest, position, node),
        _ => false,
    }
}
