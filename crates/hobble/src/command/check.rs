//! `hobble check`: says whether a specification is right, what it means, and writes it in another form.

use std::borrow::Cow;

use hobble_rules::{Diagnostic, Severity, Source};
use serde::Serialize;

use crate::cli::{Check, FormatArg};
use crate::experiment::{self, LoadError, Loaded, mistake};
use crate::fail::{Fail, Outcome};
use crate::out::{Out, count, printable};

/// The JSON result.
#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    source: &'a str,
    rules: Vec<RuleReport<'a>>,
    diagnostics: Vec<DiagnosticReport<'a>>,
}

#[derive(Serialize)]
struct RuleReport<'a> {
    name: &'a str,
    ops: Vec<String>,
    faults: Vec<String>,
    destructive: bool,
}

#[derive(Serialize)]
struct DiagnosticReport<'a> {
    severity: &'static str,
    source: Cow<'a, str>,
    line: Option<u32>,
    column: Option<u32>,
    field: &'a str,
    cause: &'a str,
    hint: Option<&'a str>,
}

impl<'a> DiagnosticReport<'a> {
    fn new(source: &'a str, diagnostic: &'a Diagnostic) -> Self {
        Self {
            severity: match diagnostic.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            },
            source: match diagnostic.position.map(|position| position.source) {
                Some(Source::Fault(number)) => Cow::Owned(format!("--fault {number}")),
                Some(Source::Spec) | None => Cow::Borrowed(source),
            },
            line: diagnostic.position.map(|position| position.line),
            column: diagnostic.position.map(|position| position.column),
            field: &diagnostic.field,
            cause: &diagnostic.cause,
            hint: diagnostic.hint.as_deref(),
        }
    }
}

/// Checks.
pub(crate) fn run(args: &Check, out: &mut Out) -> Outcome<()> {
    let loaded = match experiment::load(args.spec.as_deref(), &args.faults) {
        Ok(Some(loaded)) => loaded,
        Ok(None) => {
            return Err(
                Fail::usage("nothing to check").hint("name a file, `-`, or a rule with --fault")
            );
        }
        Err(LoadError::Wrong(wrong)) => {
            let diagnostics = wrong
                .diagnostics
                .iter()
                .map(|(from, item)| DiagnosticReport::new(from, item))
                .collect();
            out.object(&Report {
                ok: false,
                source: &wrong.source,
                rules: Vec::new(),
                diagnostics,
            });
            return Err(Fail::from(LoadError::Wrong(wrong)).told());
        }
        Err(error) => return Err(error.into()),
    };
    for warning in loaded.experiment.warnings() {
        let mistake = mistake(&(loaded.source.clone(), warning.clone()));
        out.warn("warning:", &printable(&mistake.text));
        if let Some(hint) = &mistake.hint {
            out.note("hint:", &printable(hint));
        }
    }
    match args.output {
        Some(format) => print_document(&loaded, format, out),
        None => {
            summary(&loaded, out);
            Ok(())
        }
    }
}

/// The document in another form; the same with and without `--json`, since it was asked for by name.
fn print_document(loaded: &Loaded, format: FormatArg, out: &mut Out) -> Outcome<()> {
    let text = match format {
        FormatArg::Yaml => loaded.document.to_yaml().map_err(Fail::failed)?,
        FormatArg::Json => serde_json::to_string_pretty(&loaded.document).map_err(Fail::failed)?,
    };
    out.raw(text.trim_end());
    Ok(())
}

fn summary(loaded: &Loaded, out: &mut Out) {
    let rules: Vec<RuleReport<'_>> = loaded
        .experiment
        .rules()
        .iter()
        .map(|rule| RuleReport {
            name: rule.name(),
            ops: rule.ops().iter().map(|op| op.name().to_owned()).collect(),
            faults: rule.kinds().map(|kind| kind.name().to_owned()).collect(),
            destructive: rule.is_destructive(),
        })
        .collect();
    out.line(format!(
        "{}: ok, {}",
        printable(&loaded.source),
        count(rules.len() as u64, "rule")
    ));
    for rule in &rules {
        let destructive = if rule.destructive {
            "  (destructive: the data stays altered)"
        } else {
            ""
        };
        out.line(format!(
            "  {}: {} on {}{destructive}",
            printable(rule.name),
            rule.faults.join(", "),
            rule.ops.join(", ")
        ));
    }
    let diagnostics = loaded
        .experiment
        .warnings()
        .iter()
        .map(|item| DiagnosticReport::new(&loaded.source, item))
        .collect();
    out.object(&Report {
        ok: true,
        source: &loaded.source,
        rules,
        diagnostics,
    });
}
