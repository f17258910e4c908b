//! `cargo xtask style`: rules of the code that neither compiler nor Clippy checks. They run as a test of this crate too.
//!
//! Owns the list of rules. Invariant: a finding names file and line, and a rule has a way to state an exception in the code itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hobble_testkit::program::workspace;

/// Files past this many lines of code (no comments, no empty lines, no tests) say in their first paragraph why they are one file (`Length:`).
const LONG: usize = 500;
/// How far above a wait its reason may stand.
const NEAR: usize = 20;
/// Crates below this line of the architecture know no async runtime, no command line, no Kubernetes.
const SYNCHRONOUS: &[&str] = &[
    "hobble-attach",
    "hobble-graft",
    "hobble-mirror",
    "hobble-rules",
    "hobble-fuse",
    "hobble-testkit",
];
const TOO_HIGH: &[&str] = &["tokio", "clap", "kube", "async-std", "futures"];
/// Module names that say nothing.
const NAMELESS: &[&str] = &["utils.rs", "util.rs", "common.rs", "misc.rs", "helpers.rs"];

/// Something against the rules.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: PathBuf,
    line: usize,
    text: String,
}

pub(crate) fn run() -> Result<()> {
    let findings = check(&workspace())?;
    for finding in &findings {
        println!(
            "{}:{}: {}",
            finding.file.display(),
            finding.line,
            finding.text
        );
    }
    if !findings.is_empty() {
        bail!("{} findings", findings.len());
    }
    println!("style: nothing to find fault with");
    Ok(())
}

fn check(root: &Path) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in rust_files(&root.join("crates"))? {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let relative = file.strip_prefix(root).unwrap_or(&file).to_owned();
        findings.extend(check_file(&relative, &text));
    }
    for name in SYNCHRONOUS {
        let manifest = root.join("crates").join(name).join("Cargo.toml");
        let text = fs::read_to_string(&manifest)
            .with_context(|| format!("cannot read {}", manifest.display()))?;
        for (number, line) in text.lines().enumerate() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or("");
            if TOO_HIGH.contains(&dependency) {
                findings.push(Finding {
                    file: manifest.strip_prefix(root).unwrap_or(&manifest).to_owned(),
                    line: number + 1,
                    text: format!("{name} may not know {dependency}"),
                });
            }
        }
    }
    findings.extend(check_dependencies(root)?);
    findings.extend(check_pages(root)?);
    Ok(findings)
}

/// Every page below `docs` that a source, a message or another page names is there.
fn check_pages(root: &Path) -> Result<Vec<Finding>> {
    let mut files = rust_files(&root.join("crates"))?;
    for directory in [root.to_owned(), root.join("docs")] {
        let entries = fs::read_dir(&directory)
            .with_context(|| format!("cannot list {}", directory.display()))?;
        files.extend(
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|ending| ending == "md")),
        );
    }
    let mut findings = Vec::new();
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for (number, line) in text.lines().enumerate() {
            for page in pages(line) {
                if !root.join(page).is_file() {
                    findings.push(Finding {
                        file: file.strip_prefix(root).unwrap_or(&file).to_owned(),
                        line: number + 1,
                        text: format!("there is no {page}"),
                    });
                }
            }
        }
    }
    Ok(findings)
}

/// The paths of the form `docs/….md` in a line.
fn pages(line: &str) -> impl Iterator<Item = &str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.');
    line.split(move |c| !is_name(c))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| word.starts_with("docs/") && word.ends_with(".md"))
}

/// Every dependency from outside has its line in `docs/dependencies.md`, and every line its dependency.
fn check_dependencies(root: &Path) -> Result<Vec<Finding>> {
    let read = |name: &str| {
        fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"))
    };
    let (manifest, page) = (read("Cargo.toml")?, read("docs/dependencies.md")?);
    let used: Vec<(usize, &str)> = manifest
        .lines()
        .enumerate()
        .skip_while(|(_, line)| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|(_, line)| !line.starts_with('['))
        .filter_map(|(number, line)| Some((number + 1, line.split_once('=')?.0.trim())))
        .filter(|(_, name)| !name.starts_with("hobble-"))
        .collect();
    let explained: Vec<(usize, &str)> = page
        .lines()
        .enumerate()
        .filter_map(|(number, line)| {
            Some((number + 1, line.strip_prefix("| ")?.split(" |").next()?))
        })
        .filter(|(_, name)| *name != "crate")
        .collect();
    let find = |file: &str, line: usize, text: String| Finding {
        file: file.into(),
        line,
        text,
    };
    let unexplained = used
        .iter()
        .filter(|(_, name)| !explained.iter().any(|(_, other)| other == name))
        .map(|(line, name)| {
            find(
                "Cargo.toml",
                *line,
                format!("docs/dependencies.md says nothing about {name}"),
            )
        });
    let unused = explained
        .iter()
        .filter(|(_, name)| !used.iter().any(|(_, other)| other == name))
        .map(|(line, name)| {
            find(
                "docs/dependencies.md",
                *line,
                format!("{name} is no dependency"),
            )
        });
    Ok(unexplained.chain(unused).collect())
}

fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory)
            .with_context(|| format!("cannot list {}", directory.display()))?
        {
            let path = entry.context("cannot list a directory")?.path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn check_file(file: &Path, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |line: usize, text: String| {
        findings.push(Finding {
            file: file.to_owned(),
            line,
            text,
        })
    };
    let in_tests = file.components().any(|part| {
        matches!(
            part.as_os_str().to_str(),
            Some("tests" | "tests.rs" | "benches" | "examples" | "fuzz")
        )
    });
    let in_sys = file.components().any(|part| {
        matches!(
            part.as_os_str().to_str(),
            Some("sys" | "arch" | "sys.rs" | "arch.rs")
        )
    });
    let name = file
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("");
    if NAMELESS.contains(&name) {
        find(1, format!("{name} says nothing about its job"));
    }
    let lines: Vec<&str> = text.lines().collect();
    if name != "tests.rs" && !lines.first().is_some_and(|line| line.starts_with("//!")) {
        find(
            1,
            "the first line says what the file owns (`//!`)".to_owned(),
        );
    }
    // Tests at the end of a file do not count: they are easier to find there.
    let body = lines
        .iter()
        .position(|line| line.starts_with("#[cfg(test)]"))
        .unwrap_or(lines.len());
    let head: Vec<&&str> = lines
        .iter()
        .take_while(|line| line.starts_with("//!"))
        .collect();
    let size = lines
        .iter()
        .take(body)
        .map(|line| line.trim())
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count();
    if size > LONG && !in_tests && !head.iter().any(|line| line.contains("Length:")) {
        find(
            1,
            format!(
                "{size} lines of code without tests: past {LONG} the head of the file says why (`Length: …`)"
            ),
        );
    }
    for (number, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let testing = in_tests || number >= body;
        if code.trim_start().starts_with('#')
            && code.contains("allow(unsafe_code)")
            && !in_sys
            && !in_tests
        {
            find(
                number + 1,
                "unsafe code belongs into modules named `sys` or `arch`".to_owned(),
            );
        }
        // A wait has a reason, and it stands next to it.
        let explained = lines
            .iter()
            .take(number + 1)
            .rev()
            .take(NEAR + 1)
            .any(|line| line.contains("//"));
        if !testing && code.contains("sleep(") && !code.contains("fn ") && !explained {
            find(
                number + 1,
                format!(
                    "a sleep outside of tests says why nothing wakes it (a comment within {NEAR} lines)"
                ),
            );
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_named_are_found_in_a_line() {
        // In pieces, or the rule would look for them here.
        let line = concat!(
            "see docs",
            "/one.md, [two](docs",
            "/faults/two.md) and docs",
            "/three.json."
        );
        let found: Vec<&str> = pages(line).collect();
        assert_eq!(found.len(), 2);
        assert!(found[0].ends_with("one.md") && found[1].ends_with("faults/two.md"));
    }

    #[test]
    fn the_workspace_keeps_its_rules() -> Result<()> {
        let findings = check(&workspace())?;
        assert_eq!(findings, []);
        Ok(())
    }

    fn texts(file: &str, text: &str) -> Vec<String> {
        check_file(Path::new(file), text)
            .into_iter()
            .map(|finding| finding.text)
            .collect()
    }

    #[test]
    fn each_rule_finds_its_breach() {
        assert!(texts("a/src/utils.rs", "//! x\n")[0].contains("says nothing"));
        assert!(texts("a/src/b.rs", "fn x() {}\n")[0].contains("first line"));
        assert!(
            texts("a/src/b.rs", &format!("//! x\n{}", "a\n".repeat(501)))[0].contains("501 lines")
        );
        assert!(texts("a/src/b.rs", "//! x\n#![allow(unsafe_code)]\n")[0].contains("unsafe"));
        assert!(
            texts(
                "a/src/b.rs",
                &format!("//! x\n{}thread::sleep(POLL);\n", "\n".repeat(21))
            )[0]
            .contains("sleep")
        );
    }

    #[test]
    fn exceptions_are_stated_in_the_code() {
        let long = format!("//! x\n//! Length: one table\n{}", "a\n".repeat(600));
        assert_eq!(texts("a/src/b.rs", &long), Vec::<String>::new());
        assert_eq!(
            texts("a/src/sys/b.rs", "//! x\n#![allow(unsafe_code)]\n"),
            Vec::<String>::new()
        );
        assert_eq!(
            texts(
                "a/src/b.rs",
                "//! x\n// the kernel tells nobody\nthread::sleep(POLL);\n"
            ),
            Vec::<String>::new()
        );
        assert_eq!(
            texts(
                "a/tests/b.rs",
                &format!("//! x\n{}thread::sleep(POLL);\n", "\n".repeat(21))
            ),
            Vec::<String>::new()
        );
    }
}
