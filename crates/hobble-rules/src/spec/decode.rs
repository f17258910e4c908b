//! From the tree of values to the raw types.
//!
//! Owns what keys each map has and what shape each field. Invariant: every unknown key and every value of the wrong shape is reported, not just
//! the first, up to the most that are collected; a rule that is wrong does not keep the others from being read.

use std::collections::BTreeMap;

use super::node::{Entry, Node, Value};
use super::reader::{MISSING, Reader};
use super::{
    AttrSpec, CorruptShape, CorruptSpec, ErrnoItem, ErrnoSpec, FaultSpec, LatencyShape,
    LatencySpec, RangeSpec, Reading, RuleSpec, TargetSpec, TimeParts, TimeSpec, VERSION,
    WeightedErrno, WhenSpec, WhoSpec,
};
use crate::diagnostic::Diagnostic;
use crate::fault::{FaultKind, NOT_IN_THIS_VERSION};

/// Reads a whole document.
pub(super) fn read_document(root: &Node) -> Reading {
    let mut reader = Reader::new("");
    reader.positions.insert("", root.position);
    let mut reading = Reading::default();
    let document = &mut reading.document;
    if let Some(mut map) = reader.map("", root) {
        match map.take("version") {
            Some(node) => document.version = reader.number("version", node).unwrap_or(VERSION),
            None => reader.report(
                Diagnostic::error("version", MISSING).hint("write `version: 1`"),
                root.position,
            ),
        }
        document.volume = map
            .take("volume")
            .and_then(|node| reader.text("volume", node));
        document.target = map
            .take("target")
            .and_then(|node| read_target(&mut reader, "target", node));
        document.duration = map
            .take("duration")
            .and_then(|node| reader.text("duration", node));
        document.seed = map
            .take("seed")
            .and_then(|node| reader.number("seed", node));
        document.scope = map
            .take("scope")
            .and_then(|node| reader.text("scope", node));
        let rules = map.take("rules");
        reader.finish("", map, |_| None);
        if let Some(node) = rules {
            (reading.places, document.rules) = read_rules(&mut reader, node);
            reading.written = if let Value::List(items) = &node.value {
                items.len()
            } else {
                0
            };
        }
    }
    document.positions = reader.positions;
    reading.found = reader.diagnostics;
    reading
}

/// The rules that could be read, and before them their places.
fn read_rules(reader: &mut Reader, node: &Node) -> (Vec<usize>, Vec<RuleSpec>) {
    let (mut places, mut rules) = (Vec::new(), Vec::new());
    let Some(items) = reader.list("rules", node) else {
        return (places, rules);
    };
    for (index, item) in items.iter().enumerate() {
        if reader.is_full() {
            break;
        }
        match read_rule(item, &format!("rules[{index}]")) {
            Ok(rule) => {
                places.push(index);
                rules.push(rule);
            }
            Err(diagnostics) => diagnostics
                .into_iter()
                .for_each(|diagnostic| reader.push(diagnostic)),
        }
    }
    (places, rules)
}

/// Reads one rule; `prefix` is put before its fields in messages.
pub(crate) fn read_rule(node: &Node, prefix: &str) -> Result<RuleSpec, Vec<Diagnostic>> {
    let mut reader = Reader::new(prefix);
    reader.positions.insert("", node.position);
    let mut rule = RuleSpec::default();
    if let Some(mut map) = reader.map("", node) {
        rule.name = map.take("name").and_then(|node| reader.text("name", node));
        rule.op = map.take("op").and_then(|node| reader.texts("op", node));
        if let Some(node) = map.take("method") {
            if rule.op.is_some() {
                reader.report(
                    Diagnostic::error("method", "is another word for `op`, which is there already"),
                    node.position,
                );
            } else {
                rule.op = reader.texts("op", node);
            }
        }
        rule.path = map.take("path").and_then(|node| reader.texts("path", node));
        rule.exclude = map
            .take("exclude")
            .and_then(|node| reader.texts("exclude", node));
        rule.who = map.take("who").and_then(|node| read_who(&mut reader, node));
        rule.range = map
            .take("range")
            .and_then(|node| read_range(&mut reader, node));
        rule.when = map
            .take("when")
            .and_then(|node| read_when(&mut reader, node));
        match map.take("fault") {
            Some(node) => rule.fault = read_fault(&mut reader, node),
            None => {
                let kinds = FaultKind::ALL.map(FaultKind::name).join(", ");
                let missing =
                    Diagnostic::error("fault", MISSING).hint(format!("one or more of {kinds}"));
                reader.report(missing, node.position);
            }
        }
        rule.then = map.take("then").and_then(|node| reader.text("then", node));
        reader.finish("", map, misplaced);
    }
    rule.positions = std::mem::take(&mut reader.positions);
    reader.done(rule)
}

/// Keys that are right one level further in.
fn misplaced(key: &str) -> Option<String> {
    let section = match key {
        "percent" | "after" | "every" | "times" | "from" | "for" | "per" => "when",
        "pid" | "comm" | "uid" => "who",
        "start" | "length" | "end" => "range",
        "errno" | "latency" | "attr" | "corrupt" => "fault",
        _ => return None,
    };
    Some(format!("it belongs in `{section}`"))
}

fn read_target(reader: &mut Reader, field: &str, node: &Node) -> Option<TargetSpec> {
    let mut map = reader.map(field, node)?;
    let pid = reader.need(field, &mut map, "pid", node, Reader::number);
    reader.finish(field, map, |_| None);
    pid.map(|pid| TargetSpec { pid })
}

fn read_who(reader: &mut Reader, node: &Node) -> Option<WhoSpec> {
    let mut map = reader.map("who", node)?;
    let who = WhoSpec {
        pid: map
            .take("pid")
            .and_then(|node| reader.numbers("who.pid", node)),
        comm: map
            .take("comm")
            .and_then(|node| reader.texts("who.comm", node)),
        uid: map
            .take("uid")
            .and_then(|node| reader.numbers("who.uid", node)),
    };
    reader.finish("who", map, |_| None);
    Some(who)
}

fn read_range(reader: &mut Reader, node: &Node) -> Option<RangeSpec> {
    let mut map = reader.map("range", node)?;
    let range = RangeSpec {
        start: map
            .take("start")
            .and_then(|node| reader.number_or_text("range.start", node)),
        length: map
            .take("length")
            .and_then(|node| reader.number_or_text("range.length", node)),
        end: map
            .take("end")
            .and_then(|node| reader.number_or_text("range.end", node)),
    };
    reader.finish("range", map, |_| None);
    Some(range)
}

fn read_when(reader: &mut Reader, node: &Node) -> Option<WhenSpec> {
    let mut map = reader.map("when", node)?;
    let when = WhenSpec {
        percent: map
            .take("percent")
            .and_then(|node| reader.float("when.percent", node)),
        after: map
            .take("after")
            .and_then(|node| reader.number("when.after", node)),
        every: map
            .take("every")
            .and_then(|node| reader.number("when.every", node)),
        times: map
            .take("times")
            .and_then(|node| reader.number("when.times", node)),
        from: map
            .take("from")
            .and_then(|node| reader.text("when.from", node)),
        lasting: map
            .take("for")
            .and_then(|node| reader.text("when.for", node)),
        per: map
            .take("per")
            .and_then(|node| reader.text("when.per", node)),
    };
    reader.finish("when", map, |_| None);
    Some(when)
}

fn read_fault(reader: &mut Reader, node: &Node) -> FaultSpec {
    let Some(mut map) = reader.map("fault", node) else {
        return FaultSpec::default();
    };
    let fault = FaultSpec {
        latency: map
            .take("latency")
            .and_then(|node| read_latency(reader, node)),
        errno: map.take("errno").and_then(|node| read_errno(reader, node)),
        attr: map.take("attr").and_then(|node| read_attr(reader, node)),
        corrupt: map
            .take("corrupt")
            .and_then(|node| read_corrupt(reader, node)),
    };
    if map.is_empty() {
        let kinds = FaultKind::ALL.map(FaultKind::name).join(", ");
        reader.report(
            Diagnostic::error("fault", "is empty").hint(format!("one or more of {kinds}")),
            node.position,
        );
    }
    reader.finish("fault", map, |key| {
        NOT_IN_THIS_VERSION
            .contains(&key)
            .then(|| "not available in this version".to_owned())
    });
    fault
}

fn read_latency(reader: &mut Reader, node: &Node) -> Option<LatencySpec> {
    let field = "fault.latency";
    if !matches!(node.value, Value::Map(_)) {
        return reader.text(field, node).map(LatencySpec::Fixed);
    }
    let mut map = reader.map(field, node)?;
    let mean = reader.need(field, &mut map, "mean", node, Reader::text);
    let mut text = |key: &str| {
        map.take(key)
            .and_then(|node| reader.text(&format!("{field}.{key}"), node))
    };
    let (jitter, distribution, min, max) = (
        text("jitter"),
        text("distribution"),
        text("min"),
        text("max"),
    );
    reader.finish(field, map, |_| None);
    mean.map(|mean| {
        LatencySpec::Shaped(LatencyShape {
            mean,
            jitter,
            distribution,
            min,
            max,
        })
    })
}

fn read_errno(reader: &mut Reader, node: &Node) -> Option<ErrnoSpec> {
    let field = "fault.errno";
    match &node.value {
        Value::List(items) => {
            reader.positions.insert(field, node.position);
            let item = |(index, item): (usize, &Node)| {
                read_errno_item(reader, &format!("{field}[{index}]"), item)
            };
            let read: Vec<Option<ErrnoItem>> = items.iter().enumerate().map(item).collect();
            read.into_iter()
                .collect::<Option<Vec<_>>>()
                .map(ErrnoSpec::List)
        }
        Value::Map(_) => {
            let map = reader.map(field, node)?;
            let mut weights = BTreeMap::new();
            for Entry {
                key,
                position,
                node,
            } in map.entries
            {
                let inner = format!("{field}.{key}");
                if let Some(weight) = reader.number(&inner, node) {
                    weights.insert(key.clone(), weight);
                }
                reader.positions.insert(&inner, *position);
            }
            Some(ErrnoSpec::Weights(weights))
        }
        _ => reader.errno_name(field, node).map(ErrnoSpec::One),
    }
}

fn read_errno_item(reader: &mut Reader, field: &str, node: &Node) -> Option<ErrnoItem> {
    if !matches!(node.value, Value::Map(_)) {
        return reader.errno_name(field, node).map(ErrnoItem::Plain);
    }
    let mut map = reader.map(field, node)?;
    let errno = reader.need(field, &mut map, "errno", node, Reader::errno_name);
    let weight = reader.need(field, &mut map, "weight", node, Reader::number);
    reader.finish(field, map, |_| None);
    Some(ErrnoItem::Weighted(WeightedErrno {
        errno: errno?,
        weight: weight?,
    }))
}

fn read_attr(reader: &mut Reader, node: &Node) -> Option<AttrSpec> {
    let field = "fault.attr";
    let mut map = reader.map(field, node)?;
    let at = |key: &str| format!("{field}.{key}");
    let attr = AttrSpec {
        ino: map
            .take("ino")
            .and_then(|node| reader.number(&at("ino"), node)),
        size: map
            .take("size")
            .and_then(|node| reader.number_or_text(&at("size"), node)),
        blocks: map
            .take("blocks")
            .and_then(|node| reader.number_or_text(&at("blocks"), node)),
        atime: map
            .take("atime")
            .and_then(|node| read_time(reader, &at("atime"), node)),
        mtime: map
            .take("mtime")
            .and_then(|node| read_time(reader, &at("mtime"), node)),
        ctime: map
            .take("ctime")
            .and_then(|node| read_time(reader, &at("ctime"), node)),
        kind: map
            .take("kind")
            .and_then(|node| reader.text(&at("kind"), node)),
        perm: map
            .take("perm")
            .and_then(|node| reader.mode(&at("perm"), node)),
        nlink: map
            .take("nlink")
            .and_then(|node| reader.number_or_text(&at("nlink"), node)),
        uid: map
            .take("uid")
            .and_then(|node| reader.number(&at("uid"), node)),
        gid: map
            .take("gid")
            .and_then(|node| reader.number(&at("gid"), node)),
        rdev: map
            .take("rdev")
            .and_then(|node| reader.number_or_text(&at("rdev"), node)),
    };
    reader.finish(field, map, |_| None);
    Some(attr)
}

fn read_time(reader: &mut Reader, field: &str, node: &Node) -> Option<TimeSpec> {
    if !matches!(node.value, Value::Map(_)) {
        return reader.text(field, node).map(TimeSpec::Text);
    }
    let mut map = reader.map(field, node)?;
    let sec = reader.need(field, &mut map, "sec", node, Reader::number);
    let nsec = reader.need(field, &mut map, "nsec", node, Reader::number);
    reader.finish(field, map, |_| None);
    Some(TimeSpec::Parts(TimeParts {
        sec: sec?,
        nsec: nsec?,
    }))
}

fn read_corrupt(reader: &mut Reader, node: &Node) -> Option<CorruptSpec> {
    let field = "fault.corrupt";
    if !matches!(node.value, Value::Map(_)) {
        return reader.text(field, node).map(CorruptSpec::Fill);
    }
    let mut map = reader.map(field, node)?;
    let fill = reader.need(field, &mut map, "fill", node, Reader::text);
    let occurrences = map
        .take("occurrences")
        .and_then(|node| reader.number("fault.corrupt.occurrences", node));
    let length = map
        .take("length")
        .and_then(|node| reader.number_or_text("fault.corrupt.length", node));
    reader.finish(field, map, |_| None);
    fill.map(|fill| {
        CorruptSpec::Full(CorruptShape {
            fill,
            occurrences,
            length,
        })
    })
}

/// The keys of the map in a field, for the nearest word.
pub(super) fn keys_of(prefix: &str, field: &str) -> Vec<&'static str> {
    const DOCUMENT: [&str; 7] = [
        "version", "volume", "target", "duration", "seed", "scope", "rules",
    ];
    const RULE: [&str; 9] = [
        "name", "op", "path", "exclude", "who", "range", "when", "fault", "then",
    ];
    const ATTR: [&str; 12] = [
        "ino", "size", "blocks", "atime", "mtime", "ctime", "kind", "perm", "nlink", "uid", "gid",
        "rdev",
    ];
    match field {
        "" if prefix.is_empty() => DOCUMENT.to_vec(),
        "target" => vec!["pid"],
        "who" => vec!["pid", "comm", "uid"],
        "range" => vec!["start", "length", "end"],
        "when" => vec!["percent", "after", "every", "times", "from", "for", "per"],
        "fault" => FaultKind::ALL.map(FaultKind::name).to_vec(),
        "fault.latency" => vec!["mean", "jitter", "distribution", "min", "max"],
        "fault.corrupt" => vec!["fill", "occurrences", "length"],
        "fault.attr" => ATTR.to_vec(),
        "fault.attr.atime" | "fault.attr.mtime" | "fault.attr.ctime" => vec!["sec", "nsec"],
        field if field.starts_with("fault.errno[") => vec!["errno", "weight"],
        _ => RULE.to_vec(),
    }
}
