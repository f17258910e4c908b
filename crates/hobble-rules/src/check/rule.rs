//! Checking one rule: its filters and its trigger, and which operations are left when all of them are taken together.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use super::Checker;
use crate::diagnostic::quote;
use crate::experiment::{ByteRange, Per, Rule, Trigger, Who};
use crate::fault::{FaultKind, Faults, attr, corrupt, errno, latency};
use crate::op::{Op, OpSet};
use crate::pattern::{CommPattern, PathPattern, WILDCARDS};
use crate::spec::{NumberOrText, OneOrMany, RangeSpec, RuleSpec, WhenSpec, WhoSpec};
use crate::units::parse_size;

/// Longest name of a rule, in bytes.
const LONGEST_NAME: usize = 64;

/// Most bytes of a process name (TASK_COMM_LEN less the NUL, include/linux/sched.h).
const LONGEST_COMM: usize = 15;

/// Checks a rule; `None` when it is wrong, which has been reported then.
pub(super) fn check(checker: &mut Checker<'_>, spec: &RuleSpec, index: usize) -> Option<Rule> {
    let before = checker.errors();
    let faults = check_faults(checker, spec);
    let ops = check_ops(checker, spec, &faults);
    let path = check_patterns(checker, "path", spec.path.as_ref());
    let exclude = check_patterns(checker, "exclude", spec.exclude.as_ref());
    check_excluded(checker, &path, &exclude);
    let who = spec
        .who
        .as_ref()
        .map(|who| check_who(checker, who))
        .unwrap_or_default();
    let range = spec
        .range
        .as_ref()
        .and_then(|range| check_range(checker, range));
    let when = spec
        .when
        .as_ref()
        .map_or(Trigger::ALWAYS, |when| check_when(checker, when));
    let stop = spec
        .then
        .as_deref()
        .and_then(|word| checker.word("then", "consequence", word, &[("stop", true)]))
        .unwrap_or(false);
    let name = check_name(checker, spec, &faults, index);

    if checker.errors() > before {
        return None;
    }
    if faults.corrupt.is_some() && ops.contains(Op::Write) {
        checker.warn(
            "fault.corrupt",
            "destructive: data altered on its way to the volume stays altered after recovery",
        );
    }
    Some(Rule {
        name,
        ops,
        path,
        exclude,
        who,
        range,
        when,
        faults,
        stop,
    })
}

fn check_name(
    checker: &mut Checker<'_>,
    spec: &RuleSpec,
    faults: &Faults,
    index: usize,
) -> Arc<str> {
    let Some(name) = &spec.name else {
        let kind = faults.kinds().next().map_or("rule", FaultKind::name);
        return format!("{kind}-{}", index + 1).into();
    };
    if name.is_empty() || name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
        checker.error(
            "name",
            format!(
                "{} is not a name: 1 to {LONGEST_NAME} bytes without control characters",
                quote(name)
            ),
        );
    }
    name.as_str().into()
}

fn check_faults(checker: &mut Checker<'_>, spec: &RuleSpec) -> Faults {
    let fault = &spec.fault;
    let faults = Faults {
        latency: fault
            .latency
            .as_ref()
            .and_then(|spec| latency::check(checker, spec)),
        errno: fault
            .errno
            .as_ref()
            .and_then(|spec| errno::check(checker, spec)),
        attr: fault
            .attr
            .as_ref()
            .and_then(|spec| attr::check(checker, spec))
            .map(Arc::new),
        corrupt: fault
            .corrupt
            .as_ref()
            .and_then(|spec| corrupt::check(checker, spec)),
    };
    if fault.latency.is_none()
        && fault.errno.is_none()
        && fault.attr.is_none()
        && fault.corrupt.is_none()
    {
        checker.error("fault", "is empty").hint(format!(
            "one or more of {}",
            FaultKind::ALL.map(FaultKind::name).join(", ")
        ));
    }
    if fault.errno.is_some() {
        for (present, field, what) in [
            (fault.attr.is_some(), "fault.attr", "attributes"),
            (fault.corrupt.is_some(), "fault.corrupt", "data"),
        ] {
            if present {
                let hint = "give each a rule of its own, with `percent` or `every`";
                checker
                    .error(
                        field,
                        format!("errno ends the operation, so there are no {what} to alter"),
                    )
                    .hint(hint);
            }
        }
    }
    faults
}

/// Why a rule cannot match an operation.
struct Limit {
    ops: OpSet,
    cause: &'static str,
}

fn check_ops(checker: &mut Checker<'_>, spec: &RuleSpec, faults: &Faults) -> OpSet {
    let mut limits = vec![Limit {
        ops: OpSet::ALL.difference(OpSet::NEVER_SENT),
        cause: "never fires: the kernel checks permissions itself and never sends it",
    }];
    if spec.range.is_some() {
        limits.push(Limit {
            ops: OpSet::WITH_RANGE,
            cause: "has no offset, so `range` never matches it",
        });
    }
    if spec.fault.corrupt.is_some() {
        limits.push(Limit {
            ops: OpSet::WITH_DATA,
            cause: "carries no data, so there is nothing to corrupt",
        });
    }
    if spec.fault.attr.is_some() {
        limits.push(Limit {
            ops: OpSet::WITH_ATTRIBUTES,
            cause: "returns no attributes, so there are none to override",
        });
    }
    if spec.fault.errno.is_some() {
        let cause =
            "is done in the background and nobody waits for its result, so an errno is never seen";
        limits.push(Limit {
            ops: OpSet::ALL.difference(OpSet::UNOBSERVED),
            cause,
        });
    }
    let possible = limits
        .iter()
        .fold(OpSet::ALL, |ops, limit| ops.intersection(limit.ops));
    let ops = match &spec.op {
        None if possible.is_empty() => {
            checker
                .error(
                    "fault",
                    "no operation both carries data and returns attributes",
                )
                .hint("make it two rules");
            possible
        }
        None => possible,
        Some(words) => check_words(checker, words, &limits, possible),
    };
    let latched = ops.intersection(OpSet::LATCHES_ENOSYS);
    let enosys =
        |fault: &errno::ErrnoFault| fault.errnos().any(|errno| errno.name() == Some("ENOSYS"));
    if let Some(op) = latched
        .iter()
        .next()
        .filter(|_| faults.errno.as_ref().is_some_and(enosys))
    {
        let cause = format!(
            "ENOSYS on {op} would outlive the rule: the kernel takes it as \"not implemented\" and stops asking"
        );
        checker
            .error("fault.errno", cause)
            .hint("EOPNOTSUPP or EIO, or an `op` without it");
    }
    ops
}

fn check_words(
    checker: &mut Checker<'_>,
    words: &OneOrMany<String>,
    limits: &[Limit],
    possible: OpSet,
) -> OpSet {
    let mut ops = OpSet::EMPTY;
    if words.as_slice().is_empty() {
        checker
            .error("op", "an empty list matches nothing")
            .hint("leave `op` out to match everything");
    }
    for (index, word) in words.as_slice().iter().enumerate() {
        let field = field_of("op", words, index);
        let Some(named) = OpSet::named(word) else {
            match word.to_ascii_lowercase().as_str() {
                "forget" => {
                    checker.error(
                        &field,
                        "`forget` has no reply, so it can neither fail nor be waited for",
                    );
                }
                "bmap" => {
                    checker.error(
                        &field,
                        "`bmap` is never sent to a filesystem without a block device",
                    );
                }
                "all" | "*" => checker
                    .error(&field, format!("unknown op {}", quote(word)))
                    .hint("leave `op` out to match everything"),
                _ => checker.unknown(&field, "op", word, &OpSet::words().collect::<Vec<_>>()),
            }
            continue;
        };
        ops = ops.union(named.intersection(possible));
        if named.intersects(possible) {
            continue;
        }
        if let Some(limit) = limits.iter().find(|limit| !named.intersects(limit.ops)) {
            let word = word.to_ascii_lowercase();
            // Next to others that can fire, `access` is harmless; alone it is a mistake.
            let alone = words.as_slice().iter().all(|word| {
                OpSet::named(word).is_some_and(|ops| OpSet::NEVER_SENT.is_superset(ops))
            });
            if OpSet::NEVER_SENT.is_superset(named) && !alone {
                checker.warn(&field, format!("`{word}` {}", limit.cause));
            } else {
                checker.error(&field, format!("`{word}` {}", limit.cause));
            }
        } else {
            checker.error(
                &field,
                format!(
                    "the faults of this rule have no operation of {} in common",
                    quote(word)
                ),
            );
        }
    }
    ops
}

/// The field of one of several values.
fn field_of<T>(field: &str, values: &OneOrMany<T>, index: usize) -> String {
    match values {
        OneOrMany::One(_) => field.to_owned(),
        OneOrMany::Many(_) => format!("{field}[{index}]"),
    }
}

fn check_patterns(
    checker: &mut Checker<'_>,
    field: &str,
    patterns: Option<&OneOrMany<String>>,
) -> Vec<PathPattern> {
    let Some(patterns) = patterns else {
        return Vec::new();
    };
    if patterns.as_slice().is_empty() {
        checker
            .error(field, "an empty list matches nothing")
            .hint(format!("leave `{field}` out"));
    }
    let mut compiled = Vec::new();
    for (index, text) in patterns.as_slice().iter().enumerate() {
        if !checker.afford_pattern(field, text.len()) {
            break;
        }
        match PathPattern::new(text) {
            Ok(pattern) => compiled.push(pattern),
            Err((cause, hint)) => {
                checker
                    .error(
                        &field_of(field, patterns, index),
                        format!("{}: {cause}", quote(text)),
                    )
                    .maybe_hint(hint);
            }
        }
    }
    compiled
}

/// A rule whose every path is excluded can never fire.
fn check_excluded(checker: &mut Checker<'_>, path: &[PathPattern], exclude: &[PathPattern]) {
    let everything = exclude.iter().any(PathPattern::is_everything);
    let covered = |pattern: &PathPattern| exclude.iter().any(|exclude| exclude.covers(pattern));
    if everything || (!path.is_empty() && path.iter().all(covered)) {
        checker.error(
            "exclude",
            "the rule can never fire: everything it could match is excluded",
        );
    }
}

fn check_who(checker: &mut Checker<'_>, spec: &WhoSpec) -> Who {
    let mut who = Who::default();
    for (field, count) in [
        (
            "who.pid",
            spec.pid.as_ref().map(|pids| pids.as_slice().len()),
        ),
        (
            "who.comm",
            spec.comm.as_ref().map(|comms| comms.as_slice().len()),
        ),
        (
            "who.uid",
            spec.uid.as_ref().map(|uids| uids.as_slice().len()),
        ),
    ] {
        if count == Some(0) {
            checker.error(field, "an empty list matches nobody");
        }
    }
    if let Some(pids) = &spec.pid {
        for (index, pid) in pids.as_slice().iter().enumerate() {
            checker.pid(&field_of("who.pid", pids, index), *pid);
        }
        who.pid = pids.as_slice().to_vec();
    }
    if let Some(uids) = &spec.uid {
        who.uid = uids.as_slice().to_vec();
    }
    if let Some(comms) = &spec.comm {
        for (index, text) in comms.as_slice().iter().enumerate() {
            let field = field_of("who.comm", comms, index);
            let literal = !text.contains(WILDCARDS);
            if literal && text.len() > LONGEST_COMM {
                let start = text
                    .char_indices()
                    .map(|(at, c)| at + c.len_utf8())
                    .take_while(|end| *end <= LONGEST_COMM)
                    .last()
                    .unwrap_or(0);
                let shown = text.get(..start).unwrap_or_default();
                let cause = format!(
                    "{} never matches: the kernel keeps {LONGEST_COMM} bytes of a name",
                    quote(text)
                );
                checker
                    .error(&field, cause)
                    .hint(format!("write `{shown}`"));
                continue;
            }
            if text.is_empty() {
                checker.error(&field, "an empty pattern matches nobody");
                continue;
            }
            // A glob for names is compiled alone, which costs more than its length says.
            if !checker.afford_pattern(&field, text.len() + if literal { 0 } else { 64 }) {
                break;
            }
            match CommPattern::new(text) {
                Ok(pattern) => who.comm.push(pattern),
                Err(cause) => {
                    checker.error(&field, format!("{}: {cause}", quote(text)));
                }
            }
        }
    }
    if spec.pid.is_none() && spec.uid.is_none() && spec.comm.is_none() {
        checker
            .error("who", "is empty")
            .hint("one or more of pid, comm, uid");
    }
    who
}

fn check_range(checker: &mut Checker<'_>, spec: &RangeSpec) -> Option<ByteRange> {
    if spec.start.is_none() && spec.length.is_none() && spec.end.is_none() {
        checker
            .error("range", "is empty")
            .hint("`start` with `length` or `end`");
        return None;
    }
    if spec.length.is_some() && spec.end.is_some() {
        checker.error("range.end", "and `length` say the same; write one of them");
        return None;
    }
    let mut size = |field: &str, value: Option<&NumberOrText>| {
        value.map(|value| check_size(checker, field, value))
    };
    let (start, length, end) = (
        size("range.start", spec.start.as_ref()),
        size("range.length", spec.length.as_ref()),
        size("range.end", spec.end.as_ref()),
    );
    let start = start.unwrap_or(Some(0))?;
    let (field, end) = match (length, end) {
        (Some(length), _) => ("range.length", start.saturating_add(length?)),
        (None, Some(end)) => ("range.end", end?),
        (None, None) => ("range", u64::MAX),
    };
    if end <= start {
        checker.error(field, "the range has no bytes, so the rule can never fire");
        return None;
    }
    Some(ByteRange { start, end })
}

/// A size, as a number or as text with a unit.
pub(crate) fn check_size(
    checker: &mut Checker<'_>,
    field: &str,
    value: &NumberOrText,
) -> Option<u64> {
    match value {
        NumberOrText::Number(number) => Some(*number),
        NumberOrText::Text(text) => match parse_size(text) {
            Ok(size) => Some(size),
            Err(cause) => {
                checker.error(field, format!("{}: {cause}", quote(text)));
                None
            }
        },
    }
}

fn check_when(checker: &mut Checker<'_>, spec: &WhenSpec) -> Trigger {
    let mut when = Trigger::ALWAYS;
    if let Some(percent) = spec.percent {
        if !(0.0..=100.0).contains(&percent) {
            checker.error(
                "when.percent",
                format!("{percent} is not between 0 and 100"),
            );
        } else if percent == 0.0 {
            checker.warn(
                "when.percent",
                "0 lets no match through: the rule counts and never fires",
            );
        }
        when.percent = percent;
    }
    when.after = spec.after.unwrap_or(0);
    if let Some(every) = spec.every {
        match NonZeroU64::new(every) {
            Some(every) => when.every = every,
            None => checker
                .error("when.every", "0 is no interval")
                .hint("1 is every match, 2 every second"),
        }
    }
    if let Some(times) = spec.times {
        when.times = NonZeroU64::new(times);
        if when.times.is_none() {
            checker.error("when.times", "0 times: the rule can never fire");
        }
    }
    when.from = spec
        .from
        .as_deref()
        .and_then(|text| checker.duration("when.from", text))
        .unwrap_or(Duration::ZERO);
    when.lasting = spec
        .lasting
        .as_deref()
        .and_then(|text| checker.duration("when.for", text));
    if when.lasting == Some(Duration::ZERO) {
        checker.error("when.for", "a window of no length: the rule can never fire");
    }
    let scopes = [
        ("rule", Per::Rule),
        ("process", Per::Process),
        ("file", Per::File),
    ];
    when.per = spec
        .per
        .as_deref()
        .and_then(|word| checker.word("when.per", "scope of the counts", word, &scopes))
        .unwrap_or_default();
    // With `percent` each scope has a series of decisions of its own.
    let counted = spec.after.is_some() || spec.every.is_some() || spec.times.is_some();
    if when.per != Per::Rule && !counted && spec.percent.is_none() {
        checker.warn(
            "when.per",
            "changes nothing without `after`, `every`, `times` or `percent`",
        );
    }
    when
}
