//! Small C programs to be stopped and moved, killed when the test ends however it ends.

#![allow(dead_code, unreachable_pub)]

pub mod hook;
pub mod volume;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use hobble_graft::ids::{Pid, ProcessId};

/// What every program begins with.
const PRELUDE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static void die(const char *what) { fprintf(stderr, "target: %s: %s\n", what, strerror(errno)); _exit(70); }
#define check(x) do { if (!(x)) die(#x); } while (0)
static void ready(void) { check(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 || 1); check(write(1, "ready\n", 6) == 6); }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static void say(const char *text) { char line[256]; int n = snprintf(line, sizeof line, "%s\n", text); check(write(1, line, n) == n); }
static void wait_for_line(void) { char c; do { ssize_t n = read(0, &c, 1); if (n == 0) _exit(0); check(n == 1); } while (c != '\n'); }
"#;

/// A running program.
pub struct Target {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: BufReader<std::process::ChildStdout>,
    id: ProcessId,
    extra: Vec<ProcessId>,
}

/// Compiles a program, once per content.
fn compile(name: &str, body: &str) -> PathBuf {
    use std::hash::{Hash as _, Hasher as _};
    let source = format!("{PRELUDE}\n{body}\n");
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    source.hash(&mut hasher);
    let directory = std::env::temp_dir().join("hobble-graft-targets");
    std::fs::create_dir_all(&directory).unwrap();
    let program = directory.join(format!("{name}-{:016x}", hasher.finish()));
    if !program.exists() {
        let unique = format!("{}-{:?}", std::process::id(), std::thread::current().id());
        let file = directory.join(format!("{name}-{unique}.c"));
        let output = directory.join(format!("{name}-{unique}"));
        std::fs::write(&file, source).unwrap();
        let status = Command::new("cc")
            .args(["-O1", "-pthread", "-o"])
            .arg(&output)
            .arg(&file)
            .status()
            .expect("a C compiler");
        assert!(status.success(), "{name} does not compile");
        std::fs::remove_file(&file).unwrap();
        std::fs::rename(&output, &program).unwrap();
    }
    program
}

impl Target {
    /// Compiles and starts a C program, and waits until it calls `ready()`.
    pub fn c(name: &str, body: &str) -> Self {
        Self::c_with(name, body, &[])
    }

    /// As [`Self::c`], with arguments.
    pub fn c_with(name: &str, body: &str, arguments: &[&std::ffi::OsStr]) -> Self {
        let mut command = Command::new(compile(name, body));
        command.args(arguments);
        Self::start(command)
    }

    /// Starts any program that prints `ready` as its first line.
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let id = ProcessId::of(Pid::new(child.id() as i32).unwrap()).unwrap();
        let mut target = Self {
            child,
            stdin,
            lines,
            id,
            extra: Vec::new(),
        };
        assert_eq!(target.line(), "ready");
        target
    }

    /// The next line it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends a line.
    pub fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub fn id(&self) -> ProcessId {
        self.id
    }

    pub fn pid(&self) -> Pid {
        self.id.pid
    }

    /// Its children, to be killed with it.
    pub fn children(&mut self) -> Vec<ProcessId> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid());
        let children: Vec<ProcessId> = std::fs::read_to_string(path)
            .unwrap()
            .split_ascii_whitespace()
            .map(|word| ProcessId::of(Pid::new(word.parse().unwrap()).unwrap()).unwrap())
            .collect();
        self.extra.extend(&children);
        children
    }

    /// Everything that a stop might leave behind: descriptors, mappings, signal mask and bytes of the vDSO.
    pub fn fingerprint(&self) -> String {
        let pid = self.pid();
        let mut fds: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                format!(
                    "{:?} -> {:?}",
                    entry.file_name(),
                    std::fs::read_link(entry.path()).unwrap()
                )
            })
            .collect();
        fds.sort();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let status: Vec<&str> = status
            .lines()
            .filter(|l| {
                [
                    "SigBlk",
                    "SigPnd",
                    "ShdPnd",
                    "SigCgt",
                    "TracerPid",
                    "Threads",
                ]
                .iter()
                .any(|k| l.starts_with(k))
            })
            .collect();
        format!("{fds:#?}\n{maps}\n{status:#?}\nvdso {:x}", self.vdso())
    }

    /// A sum of the bytes of the vDSO, padding included.
    pub fn vdso(&self) -> u64 {
        let pid = self.pid();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let vdso = maps.lines().find(|l| l.ends_with("[vdso]")).unwrap();
        let (start, end) = vdso.split(' ').next().unwrap().split_once('-').unwrap();
        let (start, end) = (
            u64::from_str_radix(start, 16).unwrap(),
            u64::from_str_radix(end, 16).unwrap(),
        );
        let mut bytes = vec![0; (end - start) as usize];
        let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, start).unwrap();
        bytes.iter().fold(0_u64, |sum, b| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*b))
        })
    }

    /// Its open descriptors and what the kernel calls them, without the mount they are on.
    pub fn descriptors(&self) -> Vec<String> {
        let mut fds: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let link = std::fs::read_link(entry.path()).unwrap();
                format!(
                    "{:?} -> {:?}",
                    entry.file_name(),
                    link.file_name().unwrap_or(link.as_os_str())
                )
            })
            .collect();
        fds.sort();
        fds
    }

    /// Whether it lives and is not stopped.
    pub fn is_running(&self) -> bool {
        matches!(self.state(), 'R' | 'S' | 'D')
    }

    /// The letter of its state.
    pub fn state(&self) -> char {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next())
            .unwrap_or('X')
    }

    /// Waits until the condition holds.
    pub fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !condition(self) {
            assert!(
                Instant::now() < end,
                "not within 10 s: {what} (state {})",
                self.state()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn signal(&self, signal: i32) {
        let status = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(self.pid().to_string())
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        for child in &self.extra {
            if child.is_alive().unwrap_or(false) {
                let _ = Command::new("kill")
                    .arg("-9")
                    .arg(child.pid.to_string())
                    .status();
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
