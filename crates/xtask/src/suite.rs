//! `cargo xtask test`: every check there is, in one command.
//!
//! Owns the order of the steps. Invariant: a step that fails does not keep the others from running, and makes the whole fail. The last
//! line printed is the test runner's own.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use hobble_testkit::command::{self, wait_for};

use crate::{conformance, setup, style, tools};

/// What the whole may take on two idle cores once the machine is set up. Going past it is said, and is no failure: the machine may be busy.
const PROMISED: Duration = Duration::from_secs(15 * 60);
/// One check; clippy on a fresh clone, which compiles everything, is the longest. Below what `.ci/run` allows in all, so that the step that hangs is named.
const CHECK_LIMIT: Duration = Duration::from_secs(8 * 60);
/// All tests of the workspace; each has a limit of its own in `.config/nextest.toml`.
const TEST_LIMIT: Duration = Duration::from_secs(15 * 60);

/// What to leave out.
#[derive(Args)]
pub(crate) struct Options {
    /// Install nothing
    #[arg(long)]
    no_setup: bool,
    /// Only the tests: no format, lints, style or conformance
    #[arg(long)]
    tests_only: bool,
    /// A filter for the tests, as in `cargo nextest run -E`
    #[arg(long, short = 'E')]
    filter: Option<String>,
}

struct Step {
    name: &'static str,
    took: Duration,
    error: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut steps: Vec<Step> = Vec::new();
    let mut step = |name: &'static str, act: &mut dyn FnMut() -> Result<()>| {
        println!("── {name}");
        let start = Instant::now();
        let error = act().err().map(|error| format!("{error:#}"));
        if let Some(error) = &error {
            println!("{name} failed: {error}");
        }
        let failed = error.is_some();
        steps.push(Step {
            name,
            took: start.elapsed(),
            error,
        });
        !failed
    };
    if !options.no_setup && !step("setup", &mut setup::run) {
        bail!("the machine could not be set up");
    }
    if !options.tests_only {
        step("format", &mut || {
            check(tools::cargo().args(["fmt", "--all", "--", "--check", "--files-with-diff"]))
        });
        step("lints", &mut || {
            check(tools::cargo().args([
                "clippy",
                "--quiet",
                "--locked",
                "--workspace",
                "--all-targets",
                "--features",
                "hobble/demo",
                "--",
                "-D",
                "warnings",
            ]))
        });
        step("style", &mut style::run);
    }
    let mut built = None;
    step("build", &mut || {
        built = Some(tools::build_hobble(false)?);
        Ok(())
    });
    if !options.tests_only
        && let Some(binary) = &built
    {
        step("conformance", &mut || {
            conformance::compare(&conformance::Options::quick(), binary)
        });
    }
    let mut closing = String::new();
    step("tests", &mut || {
        closing.clear();
        tests(options.filter.as_deref(), &mut closing)
    });

    println!("\n── summary");
    for Step { name, took, error } in &steps {
        println!(
            "{:<12} {:>7.1} s  {}",
            name,
            took.as_secs_f64(),
            if error.is_some() { "FAILED" } else { "ok" }
        );
    }
    println!("{}", total(&steps));
    let failed: Vec<&str> = steps
        .iter()
        .filter(|step| step.error.is_some())
        .map(|step| step.name)
        .collect();
    println!("{closing}");
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// The last row of the summary. Setting up is not counted: it happens once on a machine, at the speed of its network.
fn total(steps: &[Step]) -> String {
    let took: Duration = steps
        .iter()
        .filter(|step| step.name != "setup")
        .map(|step| step.took)
        .sum();
    let verdict = if took > PROMISED {
        format!(
            "longer than the {} min promised on two idle cores",
            PROMISED.as_secs() / 60
        )
    } else {
        "ok".to_owned()
    };
    format!("{:<12} {:>7.1} s  {verdict}", "all", took.as_secs_f64())
}

fn check(step: &mut Command) -> Result<()> {
    let said = command::output(step, CHECK_LIMIT)?;
    print!("{}", String::from_utf8_lossy(&said.stdout));
    eprint!("{}", String::from_utf8_lossy(&said.stderr));
    if !said.status.success() {
        bail!("{} ended with {}", command::describe(step), said.status);
    }
    Ok(())
}

/// Runs every test of the workspace by nextest, or by `cargo test` where that is not installed; `closing` becomes
/// the runner's closing line.
fn tests(filter: Option<&str>, closing: &mut String) -> Result<()> {
    let nextest = command::find("cargo-nextest").is_some();
    let mut run = tools::cargo();
    if nextest {
        run.args([
            "nextest",
            "run",
            "--locked",
            "--workspace",
            "--features",
            "hobble/demo",
        ]);
        if std::env::var("CI").is_ok_and(|value| value == "true") {
            run.args(["--profile", "ci"]);
        }
        if let Some(filter) = filter {
            run.args(["-E", filter]);
        }
    } else {
        if filter.is_some() {
            bail!("a filter needs cargo-nextest");
        }
        // One at a time, as the kernel tests need: cargo test has no groups.
        run.args([
            "test",
            "--locked",
            "--workspace",
            "--features",
            "hobble/demo",
            "--no-fail-fast",
            "--",
            "--test-threads=1",
        ]);
    }
    // Errors name their causes: the stack of whoever made the error value adds pages and nothing else.
    run.env("RUST_LIB_BACKTRACE", "0");
    run.env("HOBBLE_TOOLS", tools::directory())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = run.spawn().context("cannot start the test runner")?;
    // nextest speaks on standard error, libtest on standard output: both are handed on and watched.
    let (sender, kept) = channel();
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    let second = sender.clone();
    std::thread::spawn(move || watch(stdout, std::io::stdout(), &sender));
    std::thread::spawn(move || watch(stderr, std::io::stderr(), &second));
    let status = wait_for(&mut child, TEST_LIMIT)?;
    if status.is_none() {
        child.kill().context("cannot kill the test runner")?;
        child.wait().context("cannot reap the test runner")?;
    }
    // A process that a test left behind may hold the pipes: what is not here by now does not count.
    let mut said = Vec::new();
    while let Ok(line) = kept.recv_timeout(Duration::from_secs(2)) {
        said.push(line);
    }
    *closing = summary(&said, nextest);
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("the test runner ended with {status}"),
        None => bail!("the tests took longer than {TEST_LIMIT:?}"),
    }
}

/// Hands every line on, and sends those that may be a runner's last word.
fn watch(from: impl std::io::Read, mut to: impl Write, kept: &Sender<String>) {
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        // A closed terminal is no reason to stop testing, nor is a main thread that has heard enough.
        let _ = writeln!(to, "{line}");
        if line.trim_start().starts_with("Summary [") || line.starts_with("test result:") {
            let _ = kept.send(line);
        }
    }
}

/// nextest closes with one line for all; libtest has one per binary, which are added up in its own words.
fn summary(lines: &[String], nextest: bool) -> String {
    if nextest {
        return lines.last().cloned().unwrap_or_default();
    }
    let count = |what: &str| -> u64 {
        lines
            .iter()
            .filter_map(|line| {
                line.split(';')
                    .map(|part| part.trim())
                    .find(|part| part.ends_with(what))
            })
            .filter_map(|part| {
                part.split_ascii_whitespace()
                    .rev()
                    .nth(1)
                    .and_then(|number| number.parse::<u64>().ok())
            })
            .sum()
    };
    let failed = count("failed");
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    format!(
        "test result: {verdict}. {} passed; {failed} failed; {} ignored",
        count("passed"),
        count("ignored")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_past_the_promise_is_told_and_setting_up_is_not_counted() {
        let step = |name, minutes: u64| Step {
            name,
            took: Duration::from_secs(minutes * 60),
            error: None,
        };
        assert!(total(&[step("setup", 20), step("tests", 14)]).ends_with("ok"));
        assert!(total(&[step("lints", 4), step("tests", 12)]).contains("15 min promised"));
    }

    #[test]
    fn what_ci_allows_in_all_is_more_than_any_step_may_take() {
        let ci =
            std::fs::read_to_string(hobble_testkit::program::workspace().join(".ci/run")).unwrap();
        let minutes: u64 = ci
            .split_ascii_whitespace()
            .find_map(|word| word.strip_suffix('m')?.parse().ok())
            .unwrap();
        let outer = Duration::from_secs(minutes * 60);
        for limit in [CHECK_LIMIT, TEST_LIMIT, tools::BUILD_LIMIT] {
            assert!(limit < outer, "{limit:?} is not below {outer:?}");
        }
    }

    #[test]
    fn libtest_lines_are_added_up() {
        let lines = [
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s".to_owned(),
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s".to_owned(),
        ];
        assert_eq!(
            summary(&lines, false),
            "test result: FAILED. 5 passed; 1 failed; 1 ignored"
        );
    }

    #[test]
    fn the_last_word_of_nextest_is_kept() {
        let lines = ["     Summary [   1.0s] 2 tests run: 2 passed, 0 skipped".to_owned()];
        assert_eq!(summary(&lines, true), lines[0]);
    }
}
