//! `cargo xtask conformance`: public test suites on ext4, natively and through `hobble exec`, with the results compared.
//!
//! Owns the list of variants. Invariant: only a difference from the native run of the same minute fails; what the backing filesystem itself
//! fails is printed and left at that.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use hobble_testkit::command;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::scratch::Scratch;
use hobble_testkit::volume::{Kind, Volume};

use crate::tools;

/// pjdfstest takes seconds natively.
const LIMIT: Duration = Duration::from_secs(300);

/// Two users that every Debian has: pjdfstest becomes them.
const PJDFSTEST: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
# Longer than a tick of the clock that ext4 takes its times from, at any HZ.
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["games", "games"]]
"#;

/// Every operation that fsx knows.
const FSX: &str = "
flen = 262144
[weights]
close_open = 1.0
invalidate = 1.0
mapread = 10.0
mapwrite = 10.0
read = 10.0
write = 10.0
truncate = 5.0
fsync = 1.0
fdatasync = 1.0
posix_fallocate = 2.0
punch_hole = 2.0
sendfile = 2.0
posix_fadvise = 1.0
copy_file_range = 2.0
";

/// How much to run.
#[derive(Args)]
pub(crate) struct Options {
    /// Operations of each fsx run
    #[arg(long, default_value_t = 10_000)]
    operations: u32,
    /// Seeds of fsx, one run each
    #[arg(long, value_delimiter = ',', default_values_t = [42, 7])]
    seeds: Vec<u32>,
}

impl Options {
    /// What `cargo xtask test` runs.
    pub(crate) fn quick() -> Options {
        Options {
            operations: 2_000,
            seeds: vec![42],
        }
    }
}

struct Variant {
    name: &'static str,
    /// `None` is native.
    hook: Option<&'static [&'static str]>,
    environment: &'static [(&'static str, &'static str)],
}

const VARIANTS: &[Variant] = &[
    Variant {
        name: "native",
        hook: None,
        environment: &[],
    },
    Variant {
        name: "no rule",
        hook: Some(&[]),
        environment: &[],
    },
    Variant {
        name: "data rules at 0 %",
        hook: Some(&[
            "--fault",
            "errno=EIO op=read,write,fsync percent=0",
            "--fault",
            "latency=1s op=read,write percent=0",
        ]),
        environment: &[],
    },
    Variant {
        name: "no passthrough",
        hook: Some(&[]),
        environment: &[("HOBBLE_MASK", "passthrough")],
    },
    Variant {
        name: "no passthrough, data rules at 0 %",
        hook: Some(&["--fault", "errno=EIO op=read,write,fsync percent=0"]),
        environment: &[("HOBBLE_MASK", "passthrough")],
    },
];

/// Differences that no hook can hide: test, its result through the hook, and why.
const KNOWN: &[(&str, &str, &str)] = &[(
    "link::link_count_max",
    "skipped",
    "glibc's pathconf derives LINK_MAX from statfs.f_type, which is FUSE's",
)];

type Results = BTreeMap<String, String>;

pub(crate) fn run(options: &Options) -> Result<()> {
    compare(options, &tools::hobble(false)?)
}

pub(crate) fn compare(options: &Options, binary: &Path) -> Result<()> {
    let suites = Suites {
        pjdfstest: tools::suite("pjdfstest")?,
        fsx: tools::suite("fsx")?,
        binary: binary.to_owned(),
        scratch: Scratch::new()?,
    };
    fs::write(suites.scratch.path().join("pjdfstest.toml"), PJDFSTEST)
        .context("cannot write a configuration")?;
    fs::write(suites.scratch.path().join("fsx.toml"), FSX)
        .context("cannot write a configuration")?;
    let namespace = Namespace::enter()?;
    let volume = Volume::new(&namespace, Kind::Ext4)?;
    let second = Volume::sized(&namespace, Kind::Ext4, 64 << 20)?;
    let mut native: Option<Results> = None;
    let mut different = 0;
    println!(
        "{:<36} {:>7} {:>8} {:>7} {:>7} {:>8}",
        "ext4", "passed", "skipped", "failed", "differ", "seconds"
    );
    for (number, variant) in VARIANTS.iter().enumerate() {
        let start = Instant::now();
        let at = volume.directory(&number.to_string())?;
        let mut results = suites.pjdfstest(variant, &at, second.path())?;
        for seed in &options.seeds {
            results.insert(
                format!("fsx seed {seed}"),
                suites.fsx(variant, &at, *seed, options.operations)?,
            );
        }
        let count = |word: &str| results.values().filter(|value| *value == word).count();
        let differ: Vec<String> = native
            .as_ref()
            .map_or_else(Vec::new, |native| differences(native, &results));
        println!(
            "{:<36} {:>7} {:>8} {:>7} {:>7} {:>8.1}",
            variant.name,
            count("ok"),
            count("skipped"),
            results.len() - count("ok") - count("skipped"),
            differ.len(),
            start.elapsed().as_secs_f64()
        );
        for (test, result, why) in KNOWN {
            if native
                .as_ref()
                .is_some_and(|native| native.get(*test) != results.get(*test))
                && results.get(*test).is_some_and(|hooked| hooked == result)
            {
                println!("    known: {test} is {result}: {why}");
            }
        }
        for line in &differ {
            println!("    {line}");
        }
        different += differ.len();
        if native.is_none() {
            if count("ok") < 300 {
                bail!(
                    "the native run passed {} tests only: the suite did not run as it should",
                    count("ok")
                );
            }
            for (name, _) in results.iter().filter(|(_, value)| *value == "FAILED") {
                println!("    fails natively: {name}");
            }
            native = Some(results);
        }
    }
    if different > 0 {
        bail!("{different} results differ from the native ones");
    }
    Ok(())
}

/// What a run has otherwise than the native one, tests that are missing on either side included.
fn differences(native: &Results, other: &Results) -> Vec<String> {
    let none = || "not run".to_owned();
    let mut names: Vec<&String> = native.keys().chain(other.keys()).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .filter(|name| native.get(*name) != other.get(*name))
        .filter(|name| !known(name, other.get(*name).map_or("", String::as_str)))
        .map(|name| {
            let value = |results: &Results| results.get(name).cloned().unwrap_or_else(none);
            format!("{name}: native {}, hooked {}", value(native), value(other))
        })
        .collect()
}

/// Whether a difference is one that no hook can hide.
fn known(name: &str, hooked: &str) -> bool {
    KNOWN
        .iter()
        .any(|(test, result, _)| *test == name && *result == hooked)
}

struct Suites {
    pjdfstest: PathBuf,
    fsx: PathBuf,
    binary: PathBuf,
    scratch: Scratch,
}

impl Suites {
    /// `program`, by itself or below `hobble exec` with `at` hooked.
    fn command(&self, variant: &Variant, at: &Path, program: &Path) -> Command {
        let mut command = match variant.hook {
            None => Command::new(program),
            Some(flags) => {
                let mut command = Command::new(&self.binary);
                command
                    .arg("--state-dir")
                    .arg(self.scratch.path().join("state"));
                command
                    .args(["exec", "--path"])
                    .arg(at)
                    .args(flags)
                    .arg("--")
                    .arg(program);
                command
            }
        };
        command
            .envs(variant.environment.iter().copied())
            .env("RUST_BACKTRACE", "0")
            .current_dir("/");
        command
    }

    fn pjdfstest(&self, variant: &Variant, at: &Path, second: &Path) -> Result<Results> {
        let work = at.join("p");
        fs::create_dir(&work).context("cannot make a directory")?;
        let mut run = self.command(variant, at, &self.pjdfstest);
        run.arg("-c")
            .arg(self.scratch.path().join("pjdfstest.toml"))
            .arg("-s")
            .arg(second)
            .arg("-p")
            .arg(&work);
        let said = command::output(&mut run, LIMIT)?;
        let stdout = String::from_utf8_lossy(&said.stdout).into_owned();
        let results = parse(&stdout);
        if variant.hook.is_some() {
            explain(&stdout);
        }
        if !stdout.contains("Summary:") {
            bail!(
                "pjdfstest ({}) did not come to its end: {}{}",
                variant.name,
                said.status,
                String::from_utf8_lossy(&said.stderr)
            );
        }
        Ok(results)
    }

    fn fsx(&self, variant: &Variant, at: &Path, seed: u32, operations: u32) -> Result<String> {
        let mut run = self.command(variant, at, &self.fsx);
        run.arg("-f").arg(self.scratch.path().join("fsx.toml"));
        run.args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-P"])
            .arg(self.scratch.path());
        run.arg(at.join(format!("fsx-{seed}")));
        let said = command::output(&mut run, LIMIT)?;
        if !said.status.success() {
            println!(
                "fsx ({}, seed {seed}): {}\n{}{}",
                variant.name,
                said.status,
                last_lines(&said.stdout),
                last_lines(&said.stderr)
            );
            return Ok("FAILED".to_owned());
        }
        Ok("ok".to_owned())
    }
}

/// What the suite says about its failures: the indented lines below each.
fn explain(text: &str) {
    let mut below = false;
    for line in text.lines() {
        let indented = line.starts_with([' ', '\t']);
        if !indented {
            below = line.ends_with("FAILED");
        }
        if below {
            println!("    {}{line}", if indented { "    " } else { "" });
        }
    }
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(20))
        .map(|line| format!("    {line}\n"))
        .collect()
}

/// `name   ok|skipped|FAILED|…` lines; what is indented belongs to the line before.
fn parse(text: &str) -> Results {
    text.lines()
        .filter(|line| !line.starts_with([' ', '\t']) && line.contains("::"))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, rest)| (name.to_owned(), rest.trim().to_owned()))
        .filter(|(_, result)| {
            matches!(
                result.as_str(),
                "ok" | "skipped" | "FAILED" | "expected failure"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_and_compared() {
        let native =
            parse("a::b    ok\nc::d   skipped\n\tnot configured\ne::f  ok\nSummary: 0 failed\n");
        assert_eq!(native.len(), 3);
        let other = parse("a::b    FAILED\n   0: x::y ok\nc::d   skipped\n");
        assert_eq!(
            differences(&native, &other),
            [
                "a::b: native ok, hooked FAILED",
                "e::f: native ok, hooked not run"
            ]
        );
    }
}
