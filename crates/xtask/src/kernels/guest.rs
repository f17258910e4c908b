//! The virtual machine: what is in its first filesystem, how it is started, what it says.
//!
//! Owns the emulator while it runs. Invariant: it has ended when [`Machine::run`] returns, whatever happened.
//!
//! The machine has two serial lines. The first is its console, where kernel, tests and all else write what they like. The second carries one
//! line for each thing that the host has to know: `doctor JSON`, `begin FILE NAME`, `end FILE NAME STATUS MILLISECONDS`, `done`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hobble_testkit::command;
use hobble_testkit::program::{Program, target_directory};
use serde_json::Value;

use super::archive::Archive;
use super::package::Package;

/// The directory of everything that is not the system's.
const HOME: &str = "/hobble";
/// Memory of the machine in MiB: the image of the disk and the volumes on it are sparse files in there.
const MEMORY: &str = "3072";
/// What the tests and the test kit call; the rest is BusyBox's.
const TOOLS: &[&str] = &[
    "bash",
    "mount",
    "umount",
    "losetup",
    "mkfs.ext4",
    "setpriv",
    "unshare",
    "nsenter",
    "kill",
    "ls",
    "cat",
    "rm",
    "readlink",
    "timeout",
    "sleep",
    // BusyBox's shell would prefer its own of all the others.
    "sh",
    "stat",
    "mkdir",
    "chmod",
    "chroot",
    "dd",
    "head",
    "install",
    "true",
];
/// What the tests need of the kernel, where it is not built in.
const MODULES: &[&str] = &["fuse", "loop", "ext4", "overlay"];
/// The target programs in C that the reduced suite starts.
const PROGRAMS: &[Program] = &[
    Program::FilesC,
    Program::Ops,
    Program::Maps,
    Program::Locks,
    Program::Outsider,
    Program::Signals,
    Program::Tracer,
];
/// Lines of the console that are shown for a test that has failed.
const SHOWN: usize = 40;

/// One test of one file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    pub(super) file: String,
    pub(super) name: String,
}

impl Test {
    pub(super) fn label(&self) -> String {
        format!("{}::{}", self.file, self.name)
    }
}

/// How a test ended.
#[derive(Debug, PartialEq)]
pub(super) struct Ended {
    pub(super) passed: bool,
    pub(super) seconds: f64,
}

/// What a machine said.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The checks of `hobble doctor`.
    pub(super) doctor: Vec<Value>,
    pub(super) results: BTreeMap<Test, Ended>,
    /// What went wrong beside the tests.
    pub(super) wrong: Vec<String>,
    is_done: bool,
}

impl Outcome {
    /// Tests that failed or did not run, and what else went wrong.
    pub(super) fn failures(&self, tests: &[Test]) -> usize {
        let bad = tests
            .iter()
            .filter(|test| !self.results.get(test).is_some_and(|result| result.passed))
            .count();
        bad + self.wrong.len()
    }

    /// Takes one line of the second serial line.
    fn take(&mut self, line: &str) -> Result<Option<(Test, bool)>> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match *words.as_slice() {
            ["doctor", ..] => {
                let json = line.trim().trim_start_matches("doctor").trim();
                self.doctor.push(
                    serde_json::from_str(json)
                        .with_context(|| format!("doctor printed {json:?}"))?,
                );
                Ok(None)
            }
            ["begin", ..] => Ok(None),
            ["end", file, name, status, milliseconds] => {
                let test = Test {
                    file: file.to_owned(),
                    name: name.to_owned(),
                };
                let passed = status == "0";
                let took: u32 = milliseconds
                    .parse()
                    .with_context(|| format!("the machine said {line:?}"))?;
                let seconds = f64::from(took) / 1000.0;
                self.results.insert(test.clone(), Ended { passed, seconds });
                Ok(Some((test, passed)))
            }
            ["done"] => {
                self.is_done = true;
                Ok(None)
            }
            _ => bail!("the machine said {line:?}"),
        }
    }
}

/// What is to be run on which kernel.
pub(super) struct Machine<'a> {
    pub(super) package: &'a Package,
    pub(super) binary: &'a Path,
    pub(super) harnesses: &'a BTreeMap<String, PathBuf>,
    pub(super) tests: &'a [Test],
    pub(super) cycles: u32,
    pub(super) limit: Duration,
}

/// The emulator, ended with this value.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            // It may end between the two.
            let _ = self.0.kill();
            if let Err(error) = self.0.wait() {
                eprintln!("warning: the emulator cannot be reaped: {error}");
            }
        }
    }
}

impl Machine<'_> {
    /// Boots, runs and returns what was said; `console` gets everything else.
    ///
    /// # Errors
    /// When the machine cannot be put together or started. A machine that hangs or breaks down is an outcome.
    pub(super) fn run(&self, scratch: &Path, console: &Path) -> Result<Outcome> {
        let archive = scratch.join("initramfs");
        let results = scratch.join("results");
        self.pack(&archive)?;
        fs::write(&results, "").context("cannot make a file for the results")?;
        fs::write(console, "").context("cannot make a file for the console")?;
        let qemu = command::find("qemu-system-x86_64").context("no qemu-system-x86_64")?;
        let said = scratch.join("emulator");
        let stderr = fs::File::create(&said).context("cannot make a file")?;
        let child = Command::new(qemu)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            // Not the host's virtualisation: it may be there or not, and its faults would be ours.
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                MEMORY,
            ])
            .arg("-kernel")
            .arg(&self.package.image)
            .arg("-initrd")
            .arg(&archive)
            .args([
                "-append",
                "console=ttyS0 loglevel=4 panic=-1 oops=panic rdinit=/init mitigations=off",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-serial")
            .arg(format!("file:{}", results.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("cannot start the emulator")?;
        let mut emulator = Emulator(child);
        let mut outcome = Outcome::default();
        let start = Instant::now();
        let mut read = 0;
        loop {
            let ended = emulator
                .0
                .try_wait()
                .context("cannot wait for the emulator")?;
            let text = fs::read_to_string(&results).context("cannot read the results")?;
            while let Some(length) = text.get(read..).and_then(|rest| rest.find('\n')) {
                let line = text.get(read..read + length).unwrap_or_default();
                read += length + 1;
                if let Some((test, passed)) = outcome.take(line)? {
                    report(&outcome, &test, passed, console);
                }
            }
            if let Some(status) = ended {
                if !outcome.is_done {
                    let emulator = fs::read_to_string(&said).unwrap_or_default();
                    outcome.wrong.push(format!(
                        "the machine ended before its time ({status}){}\n{}",
                        emulator.trim_end(),
                        tail(console, "")
                    ));
                }
                return Ok(outcome);
            }
            if start.elapsed() > self.limit {
                outcome.wrong.push(format!(
                    "the machine was not done after {:?}\n{}",
                    self.limit,
                    tail(console, "")
                ));
                return Ok(outcome);
            }
            // The emulator writes to files, which nobody can be woken by.
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn pack(&self, path: &Path) -> Result<()> {
        let mut archive = Archive::create(path)?;
        for directory in ["dev", "proc", "sys", "run", "tmp", "var/tmp", "etc", "root"] {
            archive.directory(directory)?;
        }
        // Merged, as Debian's is: where a library lies does not depend on how it was found.
        for directory in ["bin", "sbin", "lib", "lib64"] {
            archive.directory(&format!("usr/{directory}"))?;
            archive.link(directory, &format!("usr/{directory}"))?;
        }
        archive.bytes(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        )?;
        archive.bytes("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
        archive.bytes("init", 0o755, self.script()?.as_bytes())?;
        let mut programs = Vec::new();
        let busybox = command::find("busybox").context("no busybox")?;
        archive.copy(&busybox, "usr/lib/busybox")?;
        for tool in TOOLS {
            let found = command::find(tool).with_context(|| format!("no {tool}"))?;
            archive.copy(&found, &format!("usr/bin/{tool}"))?;
            programs.push(found);
        }
        for program in PROGRAMS {
            let command = program.command()?;
            let built = PathBuf::from(command.get_program());
            let relative = built
                .strip_prefix(target_directory())
                .context("a target program lies outside the target directory")?;
            archive.copy(&built, &format!("{HOME}/target/{}", relative.display()))?;
            programs.push(built);
        }
        let strip = command::find("strip").context("no strip")?;
        let mut files = vec![("hobble".to_owned(), self.binary.to_owned())];
        for (name, harness) in self.harnesses {
            if self.tests.iter().any(|test| test.file == *name) {
                files.push((name.clone(), harness.clone()));
            }
        }
        for (name, file) in files {
            // A fifth of the size without the tables of lines, which the machine has to unpack.
            let stripped = path.with_extension("stripped");
            command::run(
                Command::new(&strip)
                    .arg("--strip-debug")
                    .arg("-o")
                    .arg(&stripped)
                    .arg(&file),
                Duration::from_secs(60),
            )?;
            archive.copy(&stripped, &format!("{HOME}/{name}"))?;
            programs.push(file);
        }
        for (source, place) in libraries(&programs)? {
            if !archive.contains(&place) {
                archive.copy(&source, &place)?;
            }
        }
        for (name, object) in self.package.modules(MODULES)? {
            archive.bytes(&format!("{HOME}/modules/{name}.ko"), 0o644, &object)?;
        }
        archive.finish()
    }

    /// What the machine does, from its first process on.
    fn script(&self) -> Result<String> {
        let mut text = String::from(
            "#!/usr/lib/busybox sh\n\
             export PATH=/usr/bin:/usr/sbin\n\
             /usr/lib/busybox --install -s /usr/sbin\n\
             mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /tmp\n\
             exec </dev/null >/dev/console 2>&1\n\
             hostname hobble; ip link set lo up\n\
             ulimit -Hn 20000\n",
        );
        for (name, _) in self.package.modules(MODULES)? {
            text.push_str(&format!(
                "insmod {HOME}/modules/{name}.ko || echo no {name}\n"
            ));
        }
        text.push_str(&format!(
            "test -c /dev/fuse || mknod -m 666 /dev/fuse c 10 229\n\
             mkdir -p /sys/fs/fuse/connections; mount -t fusectl none /sys/fs/fuse/connections\n\
             truncate -s 8G /tmp/disk; mkfs.ext4 -q -F -E lazy_itable_init=1 -O ^has_journal /tmp/disk; mount -o loop /tmp/disk /var/tmp\n\
             export HOBBLE_BIN={HOME}/hobble CARGO_TARGET_DIR={HOME}/target HOBBLE_CYCLES={} HOBBLE_SLOWNESS=20 HOBBLE_TEST_MAX_PAUSE=10s RUST_BACKTRACE=0 HOME=/root\n\
             stty -F /dev/ttyS1 raw -echo\n\
             say() {{ echo \"$*\" >/dev/ttyS1; }}\n\
             now() {{ set -- $(cat /proc/uptime); echo \"${{1%.*}}${{1#*.}}0\"; }}\n\
             run() {{\n\
             \tsay begin $1 $2; echo \"begin $1 $2\"; from=$(now)\n\
             \ttimeout -k 10 300 {HOME}/$1 --exact $2 --nocapture --test-threads 1; status=$?\n\
             \tto=$(now); echo \"end $1 $2 $status\"; say end $1 $2 $status $((to - from))\n\
             }}\n\
             uname -r\n\
             {HOME}/hobble --json doctor >/tmp/doctor; while read -r line; do say doctor \"$line\"; done </tmp/doctor\n",
            self.cycles
        ));
        for test in self.tests {
            text.push_str(&format!("run {} {}\n", test.file, test.name));
        }
        // The line needs a moment to be emptied, which nothing but its driver can tell.
        text.push_str("say done; sync; sleep 1; poweroff -f\n");
        Ok(text)
    }
}

fn report(outcome: &Outcome, test: &Test, passed: bool, console: &Path) {
    let seconds = outcome
        .results
        .get(test)
        .map_or(0.0, |result| result.seconds);
    let word = if passed { "ok" } else { "FAILED" };
    println!("{word:<7} {seconds:>6.1} s  {}", test.label());
    if !passed {
        println!(
            "{}",
            tail(console, &format!("begin {} {}", test.file, test.name))
        );
    }
}

/// The last lines of the console that come after `mark`.
fn tail(console: &Path, mark: &str) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .rsplit_once(mark)
        .filter(|_| !mark.is_empty())
        .map_or(text.as_ref(), |(_, rest)| rest)
        .lines()
        .collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(SHOWN))
        .map(|line| format!("    {}\n", line.trim_end()))
        .collect()
}

/// The shared libraries of `programs` with the interpreter, and where each belongs.
fn libraries(programs: &[PathBuf]) -> Result<BTreeMap<PathBuf, String>> {
    let ldd = command::find("ldd").context("no ldd")?;
    let mut found = BTreeMap::new();
    for program in programs {
        let said = command::output(Command::new(&ldd).arg(program), Duration::from_secs(30))?;
        for path in paths(&String::from_utf8_lossy(&said.stdout)) {
            let place = if path.starts_with("/usr") {
                path.clone()
            } else {
                format!("/usr{path}")
            };
            found.insert(PathBuf::from(path), place);
        }
    }
    Ok(found)
}

/// The absolute paths in the output of ldd(1): `name => path (address)` and `path (address)`.
fn paths(said: &str) -> Vec<String> {
    said.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            path.split_ascii_whitespace().next()
        })
        .filter(|path| path.starts_with('/'))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_says_is_read() -> Result<()> {
        let mut outcome = Outcome::default();
        let test = Test {
            file: "locks".to_owned(),
            name: "a".to_owned(),
        };
        let other = Test {
            file: "locks".to_owned(),
            name: "b".to_owned(),
        };
        assert!(
            outcome
                .take("doctor {\"name\":\"fuse\",\"outcome\":\"ok\"}\r")?
                .is_none()
        );
        assert_eq!(outcome.take("begin locks a\r")?, None);
        assert_eq!(
            outcome.take("end locks a 0 1500\r")?,
            Some((test.clone(), true))
        );
        assert_eq!(outcome.failures(std::slice::from_ref(&test)), 0);
        // What did not run has failed, as what ended with another status has.
        assert_eq!(outcome.failures(&[test.clone(), other.clone()]), 1);
        outcome.take("end locks b 101 7")?;
        assert_eq!(outcome.failures(&[test, other]), 1);
        assert!(outcome.take("Kernel panic").is_err());
        Ok(())
    }

    #[test]
    fn libraries_are_found_by_path() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n\tstatically linked\n";
        assert_eq!(
            paths(said),
            ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
    }
}
