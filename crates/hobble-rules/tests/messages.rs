//! Every message, as the user sees it: `tests/messages/*.yaml` are specifications, the `.txt` beside each what is said about it.
//!
//! After an intended change run `HOBBLE_BLESS=1 cargo test -p hobble-rules --test messages` and read the difference before committing it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn said(text: &str) -> String {
    let mut out = String::new();
    match hobble_rules::load(text) {
        Ok((_, experiment)) => experiment
            .warnings()
            .iter()
            .for_each(|warning| writeln!(out, "{warning}").unwrap()),
        Err(found) => found
            .iter()
            .for_each(|error| writeln!(out, "{error}").unwrap()),
    }
    out
}

/// One `--fault` string a line.
fn said_about_faults(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        writeln!(out, "$ {line}").unwrap();
        let checked = hobble_rules::fault_flag::parse_all(&[line])
            .and_then(|document| hobble_rules::check(&document));
        match checked {
            Ok(experiment) => experiment
                .warnings()
                .iter()
                .for_each(|warning| writeln!(out, "{warning}").unwrap()),
            Err(found) => found
                .iter()
                .for_each(|error| writeln!(out, "{error}").unwrap()),
        }
    }
    out
}

fn files(extension: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/messages");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    assert!(!files.is_empty());
    files
}

fn compare(extension: &str, say: impl Fn(&str) -> String) {
    let mut wrong = String::new();
    for path in files(extension) {
        let found = say(&std::fs::read_to_string(&path).unwrap());
        let golden = path.with_extension("txt");
        if std::env::var_os("HOBBLE_BLESS").is_some() {
            std::fs::write(&golden, found).unwrap();
            continue;
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        if found != expected {
            write!(
                wrong,
                "{}:\n--- expected\n{expected}--- found\n{found}",
                path.display()
            )
            .unwrap();
        }
    }
    assert!(
        wrong.is_empty(),
        "{wrong}\nIf this is intended: HOBBLE_BLESS=1 cargo test -p hobble-rules --test messages"
    );
}

#[test]
fn messages_about_specifications_are_as_checked_in() {
    compare("yaml", said);
}

#[test]
fn messages_about_fault_strings_are_as_checked_in() {
    compare("faults", said_about_faults);
}
