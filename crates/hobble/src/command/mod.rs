//! Carrying out intents: one module a command, or a few that belong together.

pub(crate) mod check;
pub(crate) mod control;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod generate;
pub(crate) mod inject;
pub(crate) mod list;
pub(crate) mod recover;
mod watch;

use std::path::Path;

use crate::fail::{Fail, Outcome};
use crate::out::Out;
use crate::render::Line;

/// Prints lines where they belong.
pub(crate) fn print(out: &mut Out, lines: Vec<Line>) {
    for line in lines {
        match line {
            Line::Plain(text) => out.line(text),
            Line::Warning(text) => out.warn("warning:", &text),
            Line::Hint(text) => out.note("hint:", &text),
        }
    }
}

/// Refuses early what could only fail with a less telling error. Which capabilities root lacks is for pre-flight to say.
pub(crate) fn need_root() -> Outcome<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Fail::failed(anyhow::anyhow!(
        "only root may attach to processes, and see and control attachments"
    ))
    .step("preflight")
    .hint("run it with sudo, or as root of a container with CAP_SYS_ADMIN and CAP_SYS_PTRACE"))
}

/// The attachment that is meant: the one whose id begins with what was typed, or the only one there is.
pub(crate) fn resolve(state_dir: &Path, typed: Option<&str>) -> Outcome<String> {
    need_root()?;
    let Some(typed) = typed else {
        return Ok(hobble_attach::only_id(state_dir)?);
    };
    let ids = hobble_attach::ids(state_dir)?;
    choose(typed, ids)
}

fn choose(typed: &str, ids: Vec<String>) -> Outcome<String> {
    if ids.iter().any(|id| id == typed) {
        return Ok(typed.to_owned());
    }
    let mut fitting: Vec<&String> = ids
        .iter()
        .filter(|id| !typed.is_empty() && id.starts_with(typed))
        .collect();
    match (fitting.pop(), fitting.is_empty()) {
        (Some(id), true) => Ok(id.clone()),
        (Some(_), false) => Err(Fail::usage(format!(
            "more than one attachment begins with `{typed}`"
        ))
        .hint(format!("there are: {}", ids.join(", ")))),
        (None, _) => Err(
            Fail::failed(anyhow::anyhow!("no attachment `{typed}`")).hint(if ids.is_empty() {
                "nothing is attached".to_owned()
            } else {
                format!("there are: {}", ids.join(", "))
            }),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_may_be_shortened_as_long_as_they_are_clear() {
        let ids = || vec!["abcd".to_owned(), "abxy".to_owned(), "abcdef".to_owned()];
        assert_eq!(choose("abcd", ids()).unwrap(), "abcd");
        assert_eq!(choose("abx", ids()).unwrap(), "abxy");
        assert_eq!(choose("ab", ids()).unwrap_err().code(), 2);
        assert_eq!(choose("q", ids()).unwrap_err().code(), 1);
        assert_eq!(choose("", ids()).unwrap_err().code(), 1);
    }
}
