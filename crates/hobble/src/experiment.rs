//! From a file and `--fault` strings to a checked document.
//!
//! Invariant: what leaves here has been checked by `hobble-rules`; nobody further down sees a specification that is wrong.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use hobble_rules::spec::Document;
use hobble_rules::{Diagnostic, Experiment, Source};

use crate::fail::{Fail, Mistake, Outcome};

/// More than any specification that is accepted: what is longer is cut here and refused there.
const READ_AT_MOST: u64 = 8 * 1024 * 1024;

/// A checked specification.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    /// As written, rules of `--fault` at the end.
    pub(crate) document: Document,
    /// What it means.
    pub(crate) experiment: Experiment,
    /// Where it comes from, for messages: a file name, `standard input` or `--fault`.
    pub(crate) source: String,
}

/// Everything that is wrong with a specification, and where it comes from.
#[derive(Debug)]
pub(crate) struct Wrong {
    /// As in [`Loaded::source`].
    pub(crate) source: String,
    /// Each with the text it was found in.
    pub(crate) diagnostics: Vec<(String, Diagnostic)>,
}

/// Why there is no checked specification.
#[derive(Debug)]
pub(crate) enum LoadError {
    /// It could not be read.
    Unreadable(Fail),
    /// It is wrong.
    Wrong(Wrong),
}

impl From<LoadError> for Fail {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Unreadable(fail) => fail,
            LoadError::Wrong(wrong) => {
                Fail::mistakes(wrong.diagnostics.iter().map(mistake).collect())
            }
        }
    }
}

/// A diagnostic as a line: `file:line:column: field: cause`, or `--fault 2, column 7: field: cause`.
pub(crate) fn mistake((source, diagnostic): &(String, Diagnostic)) -> Mistake {
    let mut text = match diagnostic.position {
        None => source.clone(),
        Some(position) => match position.source {
            Source::Spec => format!("{source}:{position}"),
            Source::Fault(_) => position.to_string(),
        },
    };
    if !diagnostic.field.is_empty() {
        text.push_str(&format!(": {}", diagnostic.field));
    }
    text.push_str(&format!(": {}", diagnostic.cause));
    Mistake {
        text,
        hint: diagnostic.hint.clone(),
    }
}

/// Reads and checks a file (`-` is standard input) and rules from the command line; `None` when there is neither.
pub(crate) fn load(file: Option<&Path>, faults: &[String]) -> Result<Option<Loaded>, LoadError> {
    if file.is_none() && faults.is_empty() {
        return Ok(None);
    }
    let source = match file {
        None => "--fault".to_owned(),
        Some(path) if path == Path::new("-") => "standard input".to_owned(),
        Some(path) => path.display().to_string(),
    };
    let text = file.map(read).transpose().map_err(LoadError::Unreadable)?;
    match hobble_rules::load_all(text.as_deref(), faults) {
        Ok((document, experiment)) => Ok(Some(Loaded {
            document,
            experiment,
            source,
        })),
        Err(diagnostics) => Err(LoadError::Wrong(Wrong {
            diagnostics: diagnostics
                .into_iter()
                .map(|diagnostic| (source.clone(), diagnostic))
                .collect(),
            source,
        })),
    }
}

/// A document that consists of one `--fault` rule.
#[cfg(feature = "demo")]
pub(crate) fn document_of_fault(fault: &str) -> anyhow::Result<Document> {
    match load(None, &[fault.to_owned()]) {
        Ok(Some(loaded)) => Ok(loaded.document),
        Ok(None) => anyhow::bail!("no rule in {fault:?}"),
        Err(LoadError::Wrong(wrong)) => {
            let all: Vec<String> = wrong
                .diagnostics
                .iter()
                .map(|item| mistake(item).text)
                .collect();
            anyhow::bail!("{}", all.join("; "))
        }
        Err(LoadError::Unreadable(_)) => anyhow::bail!("no file was to be read"),
    }
}

/// The text of a file or of standard input, bounded.
fn read(path: &Path) -> Outcome<String> {
    let cannot = |error: std::io::Error| {
        Fail::failed(anyhow::Error::new(error).context(format!("cannot read {}", path.display())))
    };
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(READ_AT_MOST)
            .read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(READ_AT_MOST).read_to_end(&mut bytes))
    };
    read.map_err(cannot)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Fail::usage(format!("{}: byte {at} is not UTF-8", path.display()))
            .hint("a specification is YAML or JSON text; write bytes of file names as \\xNN in double quotes")
    })
}
