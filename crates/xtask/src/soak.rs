//! `cargo xtask soak`: attach and recover in a loop under programs that check every byte.
//!
//! Owns the load and what is counted. Invariants: the load decides what went wrong, by checksums, row counts and failed calls; it is stopped and
//! everything is gone when the command ends, whatever happened.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use hobble_testkit::command::{self, wait_for};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::leak::LeakCheck;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::process;
use hobble_testkit::program::Program;
use hobble_testkit::target::text;
use hobble_testkit::volume::{Kind, Volume};
use serde_json::Value;

use crate::bench::{self, Case};
use crate::{setup, tools};

/// Commands of the load, and the Debian package that has each. PostgreSQL's own are not in PATH.
const COMMANDS: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("python3", "python3"),
    ("setpriv", "util-linux"),
    ("pg_lsclusters", "postgresql"),
];

/// Rules that look at every read, write and sync, and never fire.
const RULES: [&str; 6] = [
    "--fault",
    "errno=EIO op=read,write,fsync after=1000000000000",
    "--fault",
    "latency=1s op=read,write percent=0",
    // A busy machine may take its time: what is looked at is that everything is right.
    "--max-pause",
    "5s",
];

/// Until the load works.
const START: Duration = Duration::from_secs(120);
/// Until it has checked everything and ended.
const END: Duration = Duration::from_secs(180);
/// Cycles after which the load has all the memory and descriptors that it needs.
const WARM: u64 = 3;
/// An operation that takes longer has been held up by a server that died, not by the load.
const LONGEST_STALL_MS: f64 = 1000.0;
/// Most that the median of the longest stops may be above the load's own.
const LONGEST_STOP: Duration = Duration::from_millis(25);

/// How long, and what is done in each cycle.
#[derive(Args)]
pub(crate) struct Options {
    /// Cycles of attaching and recovering
    #[arg(long, default_value_t = 100)]
    cycles: u64,
    /// Stop after so many minutes, however many cycles there were
    #[arg(long)]
    minutes: Option<u64>,
    /// Kill the server at a random moment of each cycle instead of recovering
    #[arg(long)]
    kill_server: bool,
    /// Measure the longest stop under this load instead, in so many runs of each case
    #[arg(long, value_name = "RUNS")]
    stops: Option<usize>,
    /// Descriptors of the target whose stop is measured
    #[arg(long, default_value_t = 1000, requires = "stops")]
    descriptors: u32,
    /// Dirty private mappings of the target whose stop is measured
    #[arg(long, default_value_t = 500, requires = "stops")]
    mappings: u32,
    /// POSIX locks of the target whose stop is measured
    #[arg(long, default_value_t = 100, requires = "stops")]
    locks: u32,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::install(COMMANDS)?;
    let postgres = postgres()?;
    let binary = tools::hobble(true)?;
    let namespace = Namespace::enter()?;
    let leaks = LeakCheck::new(Vec::new())?;
    let volume = Volume::sized(&namespace, Kind::Ext4, 4 << 30)?;
    let hobble = Hobble::with_binary(&binary)?;
    let mut load = Load::start(&hobble, &volume, &postgres)?;
    let mut problems = match options.stops {
        Some(runs) => stops(options, runs, &namespace, &binary)?,
        None => cycle(options, &hobble, &volume, &load)?,
    };
    problems.extend(load.finish(options.kill_server)?);
    drop(load);
    let left = hobble.processes();
    if !left.is_empty() {
        problems.push(format!("processes of hobble are left: {left:?}"));
    }
    drop(hobble);
    volume.close()?;
    if let Err(error) = leaks.finish() {
        problems.push(format!("{error:#}"));
    }
    for problem in &problems {
        println!("problem: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} problems", problems.len());
    }
    println!("soak: nothing was seen by anybody");
    Ok(())
}

/// Where PostgreSQL's programs are: Debian has them by version.
fn postgres() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not where Debian puts it")?
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            let binaries = entry.path().join("bin");
            binaries
                .join("pgbench")
                .is_file()
                .then_some((version, binaries))
        })
        .collect();
    found.sort_unstable();
    found
        .pop()
        .map(|(_, binaries)| binaries)
        .context("no version of PostgreSQL with its programs is there")
}

/// Attaches, and recovers or kills, until there were enough cycles. Gives what went wrong.
fn cycle(
    options: &Options,
    hobble: &Hobble,
    volume: &Volume<'_>,
    load: &Load,
) -> Result<Vec<String>> {
    let start = Instant::now();
    let until = options
        .minutes
        .map(|minutes| start + Duration::from_secs(minutes * 60));
    let mut told = Instant::now();
    let mut problems = Vec::new();
    let mut warm = None;
    let (mut done, mut pauses) = (0, Vec::new());
    // A xorshift: moments need to be spread, not to be unpredictable.
    let mut random = u64::from(std::process::id()) << 17 | 1;
    while done < options.cycles && until.is_none_or(|until| Instant::now() < until) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let moment = Duration::from_millis(random % 400);
        let mut injection = hobble
            .attach(load.pid(), volume.path(), &RULES)
            .with_context(|| format!("cycle {done}"))?;
        if let Ok(attached) = injection.wait_event("attached", Duration::from_secs(1)) {
            pauses.extend(attached.get("pause_us").and_then(Value::as_u64));
        }
        // The load works meanwhile, for a while that is never the same.
        thread::sleep(moment);
        if options.kill_server {
            for pid in hobble.servers() {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
                // One that has ended meanwhile needs no killing.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            thread::sleep(moment / 2);
            drop(injection);
            hobble.recover_all()?;
        } else {
            injection
                .recover()
                .with_context(|| format!("cycle {done}"))?;
        }
        done += 1;
        load.assert_working()?;
        if done == WARM {
            warm = Some(load.resources()?);
        }
        if told.elapsed() > Duration::from_secs(30) {
            told = Instant::now();
            println!("{done} cycles in {} s", start.elapsed().as_secs());
        }
    }
    pauses.sort_unstable();
    println!(
        "{done} cycles in {} s; stops on the way in: median {} us, longest {} us",
        start.elapsed().as_secs(),
        pauses.get(pauses.len() / 2).copied().unwrap_or(0),
        pauses.last().copied().unwrap_or(0)
    );
    if let Some(warm) = warm {
        let now = load.resources()?;
        for (name, before) in &warm {
            match now.get(name) {
                Some(now) => problems.extend(before.grown(name, now)),
                None => problems.push(format!("{name} is gone")),
            }
        }
        println!(
            "descriptors, mappings, threads and memory of {} processes were compared",
            warm.len()
        );
    }
    Ok(problems)
}

/// Longest stops of targets of their own while the load works beside them. Gives what was above what is promised.
fn stops(
    options: &Options,
    runs: usize,
    namespace: &Namespace,
    binary: &Path,
) -> Result<Vec<String>> {
    let case = |name: String, program, arguments: Vec<String>| Case {
        name,
        program,
        arguments,
        limit: Some(LONGEST_STOP),
    };
    let Options {
        descriptors,
        mappings,
        locks,
        ..
    } = options;
    let cases = [
        case(
            format!("{descriptors} descriptors"),
            Program::FilesC,
            [&descriptors.to_string(), "1", "spin", "idle"]
                .map(str::to_owned)
                .to_vec(),
        ),
        case(
            format!("{mappings} mappings"),
            Program::Maps,
            ["1024", &mappings.to_string(), "spin"]
                .map(str::to_owned)
                .to_vec(),
        ),
        case(
            format!("{locks} locks"),
            Program::Locks,
            vec![locks.to_string()],
        ),
    ];
    let mut problems = Vec::new();
    for case in &cases {
        let samples = (0..runs)
            .map(|_| bench::sample(namespace, binary, case))
            .collect::<Result<Vec<_>>>()
            .with_context(|| case.name.clone())?;
        let row = bench::row(case, &samples);
        println!("{row}");
        problems.extend(bench::above(case, &row));
    }
    Ok(problems)
}

/// What a process has of what may leak.
#[derive(Debug, Clone, Copy)]
struct Resources {
    descriptors: usize,
    mappings: usize,
    threads: usize,
    memory_kib: u64,
}

impl Resources {
    fn of(pid: u32) -> Result<Resources> {
        let lines = |name: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{name}");
            Ok(fs::read_to_string(&path)
                .with_context(|| format!("cannot read {path}"))?
                .lines()
                .count())
        };
        let memory = process::status_field(pid, "VmRSS")?;
        Ok(Resources {
            descriptors: process::numbers(&format!("/proc/{pid}/fd")).len(),
            mappings: lines("maps")?,
            threads: process::numbers(&format!("/proc/{pid}/task")).len(),
            memory_kib: memory
                .split_ascii_whitespace()
                .next()
                .and_then(|number| number.parse().ok())
                .with_context(|| format!("VmRSS of {pid} is {memory:?}"))?,
        })
    }

    /// What has become more than the process itself accounts for: allocators map and free a little all the time.
    fn grown(&self, name: &str, now: &Resources) -> Option<String> {
        let grown = now.descriptors > self.descriptors
            || now.mappings > self.mappings + 4
            || now.threads > self.threads
            || now.memory_kib > self.memory_kib + self.memory_kib / 5 + 8 * 1024;
        grown.then(|| format!("{name} had {self:?}, has {now:?}"))
    }
}

/// All programs that work on the volume, ended with this value.
struct Load {
    child: Child,
    control: PathBuf,
    is_over: bool,
}

impl Load {
    fn start(hobble: &Hobble, volume: &Volume<'_>, postgres: &Path) -> Result<Load> {
        let control = hobble.scratch().directory("load")?;
        let put = |name: &str, content: &str| {
            fs::write(control.join(name), content).with_context(|| format!("cannot write {name}"))
        };
        put("load.py", include_str!("soak/load.py"))?;
        put("load.sh", include_str!("soak/load.sh"))?;
        let job = include_str!("soak/fio.job");
        put(
            "fio.job",
            &job.replace(
                "[global]",
                &format!("[global]\ndirectory={}/fio", text(volume.path())?),
            ),
        )?;
        let shell = command::find("bash").context("no bash")?;
        let child = Command::new(shell)
            .arg(control.join("load.sh"))
            .arg(volume.path())
            .arg(&control)
            .arg(postgres)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the load")?;
        let mut load = Load {
            child,
            control,
            is_over: false,
        };
        println!("soak: starting fio, SQLite and PostgreSQL");
        let until = Instant::now() + START;
        while !load.control.join("ready").exists() {
            if let Some(status) = load.child.try_wait().context("cannot wait for the load")? {
                bail!("the load ended with {status}: {}", load.logs());
            }
            if Instant::now() > until {
                bail!("the load is not ready after {START:?}: {}", load.logs());
            }
            // It says so by a file.
            thread::sleep(Duration::from_millis(50));
        }
        Ok(load)
    }

    /// Its first process: all others are descendants.
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails when one of the processes that work all the while is gone.
    fn assert_working(&self) -> Result<()> {
        for (name, pid) in self.workers()? {
            if process::stat(&pid.to_string()).is_err() {
                bail!("{name} is gone: {}", self.logs());
            }
        }
        Ok(())
    }

    /// The processes that live as long as the load.
    fn workers(&self) -> Result<Vec<(String, u32)>> {
        let mut found = Vec::new();
        for file in ["postgres.pid", "workers.pid"] {
            let said = fs::read_to_string(self.control.join(file))
                .with_context(|| format!("no {file}"))?;
            for (number, pid) in said.split_ascii_whitespace().enumerate() {
                let pid = pid.parse().with_context(|| format!("{file}: {said:?}"))?;
                found.push((format!("{file} {number}"), pid));
            }
        }
        Ok(found)
    }

    fn resources(&self) -> Result<BTreeMap<String, Resources>> {
        self.workers()?
            .into_iter()
            .map(|(name, pid)| Ok((name, Resources::of(pid)?)))
            .collect()
    }

    /// Has it stop and check everything; gives what it saw. A server that is killed must not hold anybody up for long either.
    fn finish(&mut self, is_killing: bool) -> Result<Vec<String>> {
        fs::write(self.control.join("stop"), "").context("cannot stop the load")?;
        let status = wait_for(&mut self.child, END)?
            .with_context(|| format!("the load does not end: {}", self.logs()))?;
        self.is_over = true;
        if !status.success() || !self.control.join("done").exists() {
            bail!("the load ended with {status}: {}", self.logs());
        }
        let mut problems = Vec::new();
        for part in ["sqlite-1", "sqlite-2", "prober-1", "fio-1", "pgbench-1"] {
            let path = self.control.join(format!("{part}.json"));
            let Ok(said) = fs::read_to_string(&path) else {
                problems.push(format!("{part} did not come to its end: {}", self.logs()));
                continue;
            };
            let seen: Value =
                serde_json::from_str(&said).with_context(|| format!("{part} said {said:?}"))?;
            println!("{part}: {seen}");
            let number = |key: &str| seen.get(key).and_then(Value::as_u64).unwrap_or(0);
            if number("errors") > 0 {
                problems.push(format!("{part} saw {} errors", number("errors")));
            }
            if number("operations") == 0 {
                problems.push(format!("{part} did nothing"));
            }
            let longest = seen
                .get("longest_ms")
                .and_then(Value::as_f64)
                .unwrap_or(0.0);
            if is_killing && part.starts_with("prober") && longest >= LONGEST_STALL_MS {
                problems.push(format!("{part} was held up for {longest:.0} ms"));
            }
        }
        if !problems.is_empty() {
            problems.push(self.logs());
        }
        Ok(problems)
    }

    /// The last lines of everything that was logged.
    fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(&self.control).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == "log") {
                let log = fs::read(&path).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let lines: Vec<&str> = log.lines().collect();
                for line in lines.iter().skip(lines.len().saturating_sub(5)) {
                    text.push_str(&format!(
                        "\n    {}: {line}",
                        entry.file_name().to_string_lossy()
                    ));
                }
            }
        }
        text
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut pids = process::tree(self.child.id());
        if let Ok(workers) = self.workers() {
            pids.extend(workers.iter().map(|(_, pid)| *pid));
        }
        for pid in pids {
            if let Ok(pid) = i32::try_from(pid) {
                let pid = nix::unistd::Pid::from_raw(pid);
                // One that has ended meanwhile needs no killing.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        if let Err(error) = self.child.wait() {
            eprintln!("warning: the load cannot be reaped: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_and_a_little_unrest_is_not() {
        let before = Resources {
            descriptors: 10,
            mappings: 50,
            threads: 1,
            memory_kib: 20_000,
        };
        let calm = Resources {
            mappings: 53,
            memory_kib: 25_000,
            ..before
        };
        assert_eq!(before.grown("x", &calm), None);
        for grown in [
            Resources {
                descriptors: 11,
                ..before
            },
            Resources {
                mappings: 60,
                ..before
            },
            Resources {
                threads: 2,
                ..before
            },
            Resources {
                memory_kib: 40_000,
                ..before
            },
        ] {
            assert!(before.grown("x", &grown).is_some(), "{grown:?}");
        }
    }
}
