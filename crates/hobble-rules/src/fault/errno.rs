//! Fault kind `errno`: the operation fails.
//!
//! Owns the weighted choice among errnos. Invariant: each is chosen in proportion to its weight, by one draw.

use crate::check::Checker;
use crate::draw::below;
use crate::errno::InjectedErrno;
use crate::spec::{ErrnoItem, ErrnoName, ErrnoSpec};

/// A checked `errno` fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrnoFault {
    /// Each with the sum of its own weight and those before it; never empty, sums strictly rise.
    choices: Vec<(u64, InjectedErrno)>,
}

impl ErrnoFault {
    /// Errnos with their weights; `None` when there is none, or a weight is 0.
    #[must_use]
    pub fn new(weighted: &[(InjectedErrno, u32)]) -> Option<Self> {
        let mut sum = 0;
        let mut choices = Vec::with_capacity(weighted.len());
        for (errno, weight) in weighted {
            if *weight == 0 {
                return None;
            }
            sum += u64::from(*weight);
            choices.push((sum, *errno));
        }
        (!choices.is_empty()).then_some(Self { choices })
    }

    /// The errnos, in the order of the rule.
    pub fn errnos(&self) -> impl Iterator<Item = InjectedErrno> {
        self.choices.iter().map(|(_, errno)| *errno)
    }

    /// Whether the choice depends on chance.
    pub(crate) fn is_random(&self) -> bool {
        self.choices.len() > 1
    }

    /// The errno that a random number stands for.
    pub(crate) fn pick(&self, draw: u64) -> Option<InjectedErrno> {
        let total = self.choices.last().map_or(0, |(sum, _)| *sum);
        let point = below(draw, total);
        self.choices
            .iter()
            .find(|(sum, _)| point < *sum)
            .map(|(_, errno)| *errno)
    }
}

/// Checks the raw form.
pub(crate) fn check(checker: &mut Checker<'_>, spec: &ErrnoSpec) -> Option<ErrnoFault> {
    const FIELD: &str = "fault.errno";
    let mut weighted = Vec::new();
    match spec {
        ErrnoSpec::One(name) => weighted.push((FIELD.to_owned(), checked(checker, FIELD, name), 1)),
        ErrnoSpec::List(items) => {
            for (index, item) in items.iter().enumerate() {
                let field = format!("{FIELD}[{index}]");
                let (inner, name, weight) = match item {
                    ErrnoItem::Plain(name) => (field.clone(), name, 1),
                    ErrnoItem::Weighted(item) => {
                        (format!("{field}.errno"), &item.errno, item.weight)
                    }
                };
                weighted.push((field, checked(checker, &inner, name), weight));
            }
        }
        ErrnoSpec::Weights(weights) => {
            for (name, weight) in weights {
                let field = format!("{FIELD}.{name}");
                let key = name
                    .parse()
                    .map_or_else(|_| ErrnoName::Name(name.clone()), ErrnoName::Number);
                let errno = checked(checker, &field, &key);
                weighted.push((field, errno, *weight));
            }
        }
    }
    if weighted.is_empty() {
        checker
            .error(FIELD, "an empty list fails nothing")
            .hint("write EIO, or another errno");
    }
    let mut choices = Vec::new();
    for (field, errno, weight) in weighted {
        if weight == 0 {
            checker
                .error(&field, "has weight 0, so it is never chosen")
                .hint("leave it out");
        }
        choices.extend(errno.map(|errno| (errno, weight)));
    }
    ErrnoFault::new(&choices)
}

fn checked(checker: &mut Checker<'_>, field: &str, name: &ErrnoName) -> Option<InjectedErrno> {
    match name {
        ErrnoName::Number(0) => {
            checker
                .error(field, "0 is success, not an errno")
                .hint("a rule that only counts has `percent: 0`");
            None
        }
        ErrnoName::Number(number) => {
            let errno = u16::try_from(*number).ok().and_then(InjectedErrno::new);
            if errno.is_none() {
                checker.error(
                    field,
                    format!(
                        "{number} is not an errno: they are 1 to {}",
                        InjectedErrno::MAX
                    ),
                );
            }
            errno
        }
        ErrnoName::Name(name) => {
            let errno = InjectedErrno::named(name);
            if errno.is_none() {
                checker.unknown(
                    field,
                    "errno",
                    name,
                    &crate::errno::names().collect::<Vec<_>>(),
                );
            }
            errno
        }
    }
}
