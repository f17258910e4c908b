//! Rules for a volume that is one file: its directory is hooked, so every rule is narrowed to the file.

use std::time::Duration;

use hobble_rules::spec::{Document, OneOrMany};
use hobble_rules::{Experiment, Plan};

use crate::engine::{check_document, diagnostics};
use crate::error::{AttachError, Step};

/// A glob that matches exactly this path.
fn literal(path: &[u8]) -> String {
    let mut glob = String::new();
    for character in String::from_utf8_lossy(path).chars() {
        // A byte that is no text stands for any one character; the name is checked before, so nothing else is reached by it in practice.
        match character {
            '*' | '?' | '[' | ']' | '{' | '}' | '!' | '\\' => glob.extend(['[', character, ']']),
            '\u{fffd}' => glob.push('?'),
            other => glob.push(other),
        }
    }
    glob
}

/// Checks a document and narrows its rules to `directory/file`.
pub(crate) fn check(
    document: &serde_json::Value,
    directory: &[u8],
    file: &[u8],
    step: Step,
) -> Result<Experiment, AttachError> {
    // First as it was written, so that positions and names in messages are the user's.
    let experiment = check_document(document, step)?;
    let mut absolute = directory.to_vec();
    absolute.push(b'/');
    absolute.extend(file);
    let mut document: Document = serde_json::from_value(document.clone())
        .map_err(|error| AttachError::new(step, "the rules cannot be read").because(error))?;
    for (index, rule) in document.rules.iter_mut().enumerate() {
        let name = experiment
            .rules()
            .get(index)
            .map_or_else(String::new, |rule| rule.name().to_owned());
        let alone = Document {
            rules: vec![rule.clone()],
            ..document_without_rules()
        };
        let alone = hobble_rules::check(&alone).map_err(|found| diagnostics(&found, step))?;
        let plan = Plan::compile(&alone, 0, None, Duration::ZERO);
        if plan.match_path(file, &absolute).ops().is_empty() {
            return Err(AttachError::new(
                step,
                format!(
                    "rule `{name}` matches another path than the hooked file {}",
                    String::from_utf8_lossy(&absolute)
                ),
            )
            .hinting("leave `path` out, or hook the directory")
            .exiting(hobble_api::exit::ExitCode::Usage));
        }
        rule.path = Some(OneOrMany::One(literal(&absolute)));
        rule.exclude = None;
    }
    hobble_rules::check(&document).map_err(|found| diagnostics(&found, step))
}

fn document_without_rules() -> Document {
    Document::with_rules(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_narrowed_to_the_file() {
        let document = serde_json::json!({"version": 1, "rules": [{"op": "write", "fault": {"errno": "EIO"}}]});
        let experiment = check(&document, b"/data", b"a[1]*.db", Step::Inject).unwrap();
        let plan = Plan::compile(&experiment, 0, None, Duration::ZERO);
        assert!(
            !plan
                .match_path(b"a[1]*.db", b"/data/a[1]*.db")
                .ops()
                .is_empty()
        );
        assert!(plan.match_path(b"a1x.db", b"/data/a1x.db").ops().is_empty());
    }

    #[test]
    fn a_rule_for_another_file_is_refused() {
        let document = serde_json::json!({"version": 1, "rules": [{"op": "write", "path": "*.log", "fault": {"errno": "EIO"}}]});
        let error = check(&document, b"/data", b"a.db", Step::Inject).unwrap_err();
        assert!(error.to_string().contains("another path"), "{error}");
    }
}
