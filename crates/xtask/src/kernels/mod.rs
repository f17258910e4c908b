//! `cargo xtask kernels`: the end-to-end tests on kernels that people still run, in a virtual machine.
//!
//! Owns which kernels, which tests, and what each kernel is known to lack. Invariants: the machine is emulated in software, so the outcome does not
//! depend on the host's own virtualisation; every wait has a limit; a test that did not run has failed.

mod archive;
mod guest;
mod package;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use hobble_testkit::command;
use hobble_testkit::scratch::Scratch;
use serde_json::Value;

use crate::{setup, tools};
use guest::{Outcome, Test};

/// A kernel series that Debian ships, and what `hobble doctor` has to say about it.
struct Kernel {
    /// As in the names of Debian's packages.
    series: &'static str,
    /// The checks of `hobble doctor` that warn there; every other one is `ok`.
    lacks: &'static [&'static str],
}

/// Debian 12's own kernel, which knows neither passthrough nor RESEND, and the one of Debian 13, which is in Debian 12's security archive as well.
const KERNELS: &[Kernel] = &[
    Kernel {
        series: "6.1",
        lacks: &["passthrough", "shared mappings"],
    },
    Kernel {
        series: "6.12",
        lacks: &[],
    },
];

/// What is run by default, by file of `crates/hobble-e2e/tests`. Left out is what measures time closer than an emulated processor keeps it, and what needs
/// interpreters and filesystems beyond a small image.
const REDUCED: &[(&str, &[&str])] = &[
    (
        "exactness",
        &[
            "thirty_percent_of_writes_fail_and_nothing_else",
            "twenty_milliseconds_on_fsync_are_twenty_milliseconds",
            "the_same_seed_fails_the_same_writes",
            "counts_and_metadata_faults",
            "a_file_that_is_renamed_under_a_rule_while_it_is_open_is_hit",
            "attributes_are_forged_and_true_again",
            "corrupted_reads_leave_the_data_alone",
            "without_passthrough_faults_are_as_exact",
        ],
    ),
    (
        "live_targets",
        &[
            "c_with_one_descriptor",
            "c_with_four_processes_that_share_a_hundred",
            "c_with_two_processes_that_share_a_thousand",
        ],
    ),
    (
        "control",
        &[
            "rules_are_updated_paused_and_resumed_live",
            "a_detached_attachment_is_listed_shown_and_recovered",
            "the_deadline_recovers",
            "the_end_of_the_target_ends_the_attachment",
            "children_are_faulted_too_and_strangers_are_not",
            "scope_namespace_hits_everybody_in_it",
            "a_dry_run_touches_nothing",
            "two_attachments_side_by_side",
        ],
    ),
    (
        "locks",
        &[
            "locks_are_carried_over_and_back",
            "an_outsider_never_gets_a_held_lock",
            "a_lock_released_while_attached_is_free_for_everybody",
            "forcing_both_sides_off_at_once_loses_no_lock",
        ],
    ),
    (
        "mappings",
        &[
            "dirty_private_and_shared_mappings_survive",
            "mappings_survive_on_a_kernel_that_maps_no_direct_files",
        ],
    ),
    ("signals", &["attaching_during_a_parked_read_and_again"]),
    (
        "exec",
        &[
            "exit_codes_are_handed_on",
            "the_command_is_faulted_and_nobody_else_sees_the_hook",
        ],
    ),
    (
        "killed_target",
        &[
            "in_a_read",
            "in_a_write",
            "in_an_fsync",
            "in_exit_with_a_delay_on_every_operation",
            "recovering_frees_what_is_parked",
        ],
    ),
    (
        "crash",
        &[
            "the_server_dies_at_a_random_moment",
            "server_and_command_die_at_a_random_moment",
            "everything_dies_but_the_target",
            "locks_outlive_the_server",
            "locks_taken_and_given_up_while_attached_outlive_the_server",
        ],
    ),
];

/// Commands that this task calls on the host, and the Debian package that has each.
const COMMANDS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("apt-cache", "apt"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("ldd", "libc-bin"),
    ("strip", "binutils"),
    ("mkfs.ext4", "e2fsprogs"),
];

/// Which kernels and tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Kernel series, as in Debian's package names
    #[arg(long, value_delimiter = ',', default_values_t = ["6.1", "6.12"].map(str::to_owned))]
    series: Vec<String>,
    /// Only tests whose name contains this
    #[arg(long, short = 'E')]
    filter: Option<String>,
    /// All tests of this file of `crates/hobble-e2e/tests`, instead of the reduced suite
    #[arg(long)]
    file: Option<String>,
    /// Cycles of the tests that repeat themselves
    #[arg(long, default_value_t = 2)]
    cycles: u32,
    /// Minutes that one kernel may take in all
    #[arg(long, default_value_t = 25)]
    minutes: u64,
    /// Keep the consoles' output in this directory
    #[arg(long)]
    keep: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let kernels: Vec<&Kernel> = options
        .series
        .iter()
        .map(|series| {
            KERNELS
                .iter()
                .find(|kernel| kernel.series == series)
                .with_context(|| {
                    let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.series).collect();
                    format!("series {series} is not one of {}", known.join(", "))
                })
        })
        .collect::<Result<_>>()?;
    setup::install(COMMANDS)?;
    let binary = tools::hobble(true)?;
    let harnesses = harnesses()?;
    let tests = selected(options, &harnesses)?;
    let scratch = Scratch::new()?;
    let mut columns = Vec::new();
    for kernel in &kernels {
        let package = package::fetch(kernel.series)?;
        println!("── Linux {} ({} tests)", package.release, tests.len());
        let machine = guest::Machine {
            package: &package,
            binary: &binary,
            harnesses: &harnesses,
            tests: &tests,
            cycles: options.cycles,
            limit: Duration::from_secs(options.minutes * 60),
        };
        let console = match &options.keep {
            Some(directory) => {
                std::fs::create_dir_all(directory)
                    .with_context(|| format!("cannot make {}", directory.display()))?;
                directory.join(format!("console-{}", kernel.series))
            }
            None => scratch.path().join(format!("console-{}", kernel.series)),
        };
        let mut outcome = machine.run(scratch.path(), &console)?;
        if let Err(error) = examine(kernel, &outcome.doctor) {
            println!("hobble doctor: {error:#}");
            outcome.wrong.push(format!("{error:#}"));
        }
        columns.push((package.release, outcome));
    }
    print(&tests, &columns);
    let failed: usize = columns
        .iter()
        .map(|(_, outcome)| outcome.failures(&tests))
        .sum();
    if failed > 0 {
        bail!("{failed} failures");
    }
    Ok(())
}

/// The tests' executables by the name of their file, built without being run.
fn harnesses() -> Result<BTreeMap<String, PathBuf>> {
    let mut build = tools::cargo();
    build.args([
        "test",
        "--quiet",
        "--locked",
        "--no-run",
        "--package",
        "hobble-e2e",
        "--message-format",
        "json-render-diagnostics",
    ]);
    let said = command::run(&mut build, tools::BUILD_LIMIT)?;
    Ok(said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let name = message.pointer("/target/name")?.as_str()?.to_owned();
            let path = message.get("executable")?.as_str()?;
            Some((name, PathBuf::from(path)))
        })
        .collect())
}

fn selected(options: &Options, harnesses: &BTreeMap<String, PathBuf>) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    let named = |file: &str, name: &str| Test {
        file: file.to_owned(),
        name: name.to_owned(),
    };
    if let Some(file) = &options.file {
        let harness = harnesses
            .get(file)
            .with_context(|| format!("there are no end-to-end tests called {file}"))?;
        tests.extend(listed(harness)?.iter().map(|name| named(file, name)));
    } else {
        for (file, names) in REDUCED {
            let harness = harnesses
                .get(*file)
                .with_context(|| format!("cargo built no tests of {file}"))?;
            let there = listed(harness)?;
            for name in *names {
                if !there.iter().any(|known| known == name) {
                    bail!("{file} has no test {name} any more: mend the list");
                }
                tests.push(named(file, name));
            }
        }
    }
    if let Some(filter) = &options.filter {
        tests.retain(|test| test.name.contains(filter.as_str()));
    }
    if tests.is_empty() {
        bail!("no test is left to run");
    }
    Ok(tests)
}

/// The names of the tests in an executable.
fn listed(harness: &std::path::Path) -> Result<Vec<String>> {
    let said = command::run(
        Command::new(harness).args(["--list", "--format", "terse"]),
        Duration::from_secs(60),
    )?;
    Ok(said
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

/// Whether doctor says what the kernel lacks, and nothing else.
fn examine(kernel: &Kernel, doctor: &[Value]) -> Result<()> {
    if doctor.len() < 5 {
        bail!("only {} checks were printed", doctor.len());
    }
    let mut lacking = Vec::new();
    for check in doctor {
        let field = |name: &str| check.get(name).and_then(Value::as_str).unwrap_or("");
        match field("outcome") {
            "ok" => {}
            "warn" => lacking.push(field("name")),
            other => bail!("{} is {other}: {}", field("name"), field("text")),
        }
    }
    if lacking != kernel.lacks {
        bail!("warns of {lacking:?}, expected {:?}", kernel.lacks);
    }
    Ok(())
}

fn print(tests: &[Test], columns: &[(String, Outcome)]) {
    let width = tests
        .iter()
        .map(|test| test.label().len())
        .max()
        .unwrap_or(0)
        .max("hobble doctor".len());
    let column = |text: &str| format!("  {text:>26}");
    print!("\n{:<width$}", "");
    for (release, _) in columns {
        print!("{}", column(release));
    }
    println!();
    print!("{:<width$}", "hobble doctor");
    for (_, outcome) in columns {
        let lacks: Vec<&str> = outcome
            .doctor
            .iter()
            .filter(|check| check.get("outcome").and_then(Value::as_str) != Some("ok"))
            .filter_map(|check| check.get("name").and_then(Value::as_str))
            .collect();
        let text = match (outcome.doctor.is_empty(), lacks.is_empty()) {
            (true, _) => "nothing".to_owned(),
            (_, true) => "ok".to_owned(),
            _ => format!("lacks {}", lacks.join(", ")),
        };
        print!("{}", column(&text));
    }
    println!();
    for test in tests {
        print!("{:<width$}", test.label());
        for (_, outcome) in columns {
            let text = match outcome.results.get(test) {
                Some(result) if result.passed => format!("ok {:>6.1} s", result.seconds),
                Some(result) => format!("FAILED {:>6.1} s", result.seconds),
                None => "NOT RUN".to_owned(),
            };
            print!("{}", column(&text));
        }
        println!();
    }
    for (release, outcome) in columns {
        for line in &outcome.wrong {
            println!("{release}: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_series_of_the_defaults_is_known() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        let line = <Line as clap::Parser>::parse_from(["kernels"]);
        let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.series).collect();
        assert_eq!(line.options.series, known);
    }

    #[test]
    fn doctor_must_warn_of_exactly_what_is_missing() {
        // What a kernel lacks as a whole, then the last check.
        let said = |lacking: &str, last: &str| {
            [
                ("kernel", "ok"),
                ("fuse", "ok"),
                ("passthrough", lacking),
                ("shared mappings", lacking),
                ("descriptors", last),
            ]
            .map(|(name, outcome)| json!({ "name": name, "outcome": outcome, "text": "" }))
            .to_vec()
        };
        let old = &KERNELS[0];
        let new = &KERNELS[1];
        assert!(examine(old, &said("warn", "ok")).is_ok());
        assert!(examine(old, &said("ok", "ok")).is_err());
        assert!(examine(old, &said("warn", "fail")).is_err());
        assert!(examine(new, &said("ok", "ok")).is_ok());
        assert!(examine(new, &said("warn", "ok")).is_err());
        assert!(examine(new, &[]).is_err());
    }
}
