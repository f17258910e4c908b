//! Real runtimes with schedulers, collectors and signal handlers of their own work on through fifty exchanges.
//!
//! Go, Java and Python programs append to a log, read their data back, and count; each ends with a check of everything it wrote. A
//! runtime that is not installed fails the test: the machine that runs it must have `go`, `java` and `python3`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Switch, SwitchFailed};
use programs::Target;
use programs::volume::{Side, Volume};

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Stop(#[from] hobble_graft::stop::StopError),
    #[error(transparent)]
    Switch(#[from] SwitchFailed),
}

fn move_all(volume: &Volume, target: &Target, side: Side) -> Duration {
    let budget = || Deadline::after(Duration::from_secs(10));
    let processes = [target.id()];
    let released = Tracer::scope(|tracer| -> Result<_, Failed> {
        let mut stopped = tracer.stop_all(&processes, budget())?;
        // Opens come and go all the time: look while nothing moves.
        let census = volume.census(&processes);
        let mut switch = Switch::new(&census);
        for description in census.descriptions() {
            switch.description(description.id, volume.stand_in(description, side));
        }
        for file in census.mapped_files() {
            let access = if file.is_writable {
                rustix::fs::OFlags::RDWR
            } else {
                rustix::fs::OFlags::RDONLY
            };
            switch.mapped_file(
                file.id,
                volume.open(&volume.relative(&file.facts), access, side),
            );
        }
        let report = switch.apply(&mut stopped, budget(), &mut Vec::new(), &mut NoHandover)?;
        assert!(report.descriptors >= 2, "{report:?}");
        let after = volume.census(&processes);
        assert!(
            after
                .descriptions()
                .all(|d| volume.side_of(&d.facts) == side)
        );
        Ok(stopped.release())
    })
    .unwrap();
    released.stood_still
}

/// Fifty exchanges while the program works; then it is told to check what it has written.
fn survives(volume: &Volume, mut target: Target) {
    let mut longest = Duration::ZERO;
    for round in 0..50 {
        let side = if round % 2 == 0 {
            Side::Clone
        } else {
            Side::Native
        };
        longest = longest.max(move_all(volume, &target, side));
        assert!(
            target.is_running(),
            "round {round}: state {}",
            target.state()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    target.tell("finish");
    let line = target.line();
    eprintln!("{line}; longest stop, with the census in it: {longest:?}");
    assert!(line.starts_with("ok "), "{line}");
    let records: usize = line.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(records > 100, "{line}");
    let log = std::fs::read_to_string(volume.path().join("log")).unwrap();
    assert_eq!(log.lines().count(), records);
    assert!(
        log.lines()
            .enumerate()
            .all(|(i, line)| line.parse() == Ok(i)),
        "the log is out of order"
    );
}

fn source(volume: &Volume, name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    volume.file("data", &(0..65536).map(|i| i as u8).collect::<Vec<u8>>());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    (directory, path)
}

fn built(mut command: Command, what: &str) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{what} is needed for this test: {error}"));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn python() {
    let volume = Volume::new();
    let (_keep, path) = source(
        &volume,
        "worker.py",
        r#"
import mmap, os, select, sys, threading, time
d = sys.argv[1]
log = open(d + "/log", "a"); data = open(d + "/data", "r+b"); m = mmap.mmap(data.fileno(), 65536)
p = mmap.mmap(data.fileno(), 65536, access=mmap.ACCESS_COPY); p[5] = 77
stop = False
def spin():
    while not stop: [str(i) for i in range(1000)]
def sleep():
    while not stop:
        t = time.monotonic(); time.sleep(0.01); assert time.monotonic() - t >= 0.01
threads = [threading.Thread(target=f) for f in (spin, sleep)]
for t in threads: t.start()
print("ready", flush=True)
n = 0
while not select.select([0], [], [], 0)[0]:
    log.write(f"{n}\n"); log.flush(); n += 1
    data.seek(n % 65536); assert data.read(1)[0] == n % 65536 % 256
    assert m[n % 65536] == n % 256 and p[5] == 77
stop = True
for t in threads: t.join()
print("ok", n, "python", flush=True)
"#,
    );
    let mut command = Command::new("python3");
    command.arg(path).arg(volume.path());
    survives(&volume, Target::start(command));
}

#[test]
fn go() {
    let volume = Volume::new();
    let (keep, path) = source(
        &volume,
        "worker.go",
        r#"
package main

import ("bufio"; "fmt"; "os"; "runtime"; "sync/atomic"; "time")

func check(err error) { if err != nil { fmt.Fprintln(os.Stderr, "target:", err); os.Exit(70) } }

func main() {
	d := os.Args[1]
	log, err := os.OpenFile(d+"/log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0600); check(err)
	data, err := os.Open(d + "/data"); check(err)
	var stop atomic.Bool
	go func() { bufio.NewReader(os.Stdin).ReadString('\n'); stop.Store(true) }()
	for g := 0; g < 8; g++ {
		go func() { for !stop.Load() { b := make([]byte, 1<<16); b[0] = 1; runtime.Gosched() } }()
		go func() { for !stop.Load() { t := time.Now(); time.Sleep(time.Millisecond); if time.Since(t) < time.Millisecond { check(fmt.Errorf("short sleep")) } } }()
	}
	go func() { b := make([]byte, 16); for i := int64(0); !stop.Load(); i++ { _, err := data.ReadAt(b, i%65000); check(err); if b[0] != byte(i%65000) { check(fmt.Errorf("bad data")) } } }()
	fmt.Println("ready")
	n := 0
	for ; !stop.Load(); n++ { _, err := fmt.Fprintf(log, "%d\n", n); check(err); if n%64 == 0 { runtime.GC() } }
	fmt.Println("ok", n, "go")
}
"#,
    );
    let program = keep.path().join("worker");
    let mut build = Command::new("go");
    build
        .arg("build")
        .arg("-o")
        .arg(&program)
        .arg(&path)
        .env("GOFLAGS", "")
        .env("GOCACHE", cache("go"))
        .env("GO111MODULE", "off");
    built(build, "go");
    let mut command = Command::new(program);
    command.arg(volume.path());
    survives(&volume, Target::start(command));
}

#[test]
fn java() {
    let volume = Volume::new();
    let (keep, path) = source(
        &volume,
        "Worker.java",
        r#"
import java.io.*; import java.nio.*; import java.nio.channels.*; import java.nio.file.*; import java.util.*;
public class Worker {
    static volatile boolean stop; static volatile Object sink;
    static void check(boolean ok, String what) { if (!ok) { System.err.println("target: " + what); Runtime.getRuntime().halt(70); } }
    public static void main(String[] a) throws Exception {
        OutputStream log = new FileOutputStream(a[0] + "/log", true);
        FileChannel data = FileChannel.open(Paths.get(a[0], "data"), StandardOpenOption.READ, StandardOpenOption.WRITE);
        MappedByteBuffer m = data.map(FileChannel.MapMode.READ_WRITE, 0, 65536);
        for (int i = 0; i < 3; i++) { Thread t = new Thread(() -> { while (!stop) sink = new byte[10000]; }); t.setDaemon(true); t.start(); }
        Thread s = new Thread(() -> { try { while (!stop) { long b = System.nanoTime(); Thread.sleep(2); check(System.nanoTime() - b >= 1900000, "short sleep"); } } catch (Exception e) { check(false, "" + e); } });
        s.start();
        System.out.println("ready");
        int n = 0; ByteBuffer one = ByteBuffer.allocate(1);
        for (; System.in.available() == 0; n++) {
            log.write((n + "\n").getBytes());
            one.clear(); check(data.read(one, n % 65536) == 1 && one.get(0) == (byte) n, "bad data");
            check(m.get(n % 65536) == (byte) n, "bad mapping");
        }
        stop = true; s.join();
        System.out.println("ok " + n + " java");
        System.exit(0);
    }
}
"#,
    );
    let mut build = Command::new("javac");
    build.arg("-d").arg(keep.path()).arg(&path);
    built(build, "javac");
    let mut command = Command::new("java");
    command
        .arg("-Xmx128m")
        .arg("-cp")
        .arg(keep.path())
        .arg("Worker")
        .arg(volume.path());
    survives(&volume, Target::start(command));
}

/// Where a compiler may keep what it has built.
fn cache(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join("hobble-graft-targets").join(name);
    std::fs::create_dir_all(&path).unwrap();
    assert!(Path::is_absolute(&path));
    path
}
