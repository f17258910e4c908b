//! How long a census takes: the first one of a running target, and the re-scan that a stopped target waits for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use hobble_graft::census::{self, FileFacts};
use hobble_graft::ids::{Pid, ProcessId};

const FILES: usize = 5000;
const ROUNDS: usize = 15;

struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Time on the wall, and of the processor: the latter says what an idle machine would need.
struct Watch(Instant, Duration);

impl Watch {
    fn start() -> Self {
        Self(Instant::now(), processor_time())
    }

    fn stop(self) -> (Duration, Duration) {
        (self.0.elapsed(), processor_time() - self.1)
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A child with `FILES` descriptors, of as many files or of one.
fn target(dir: &std::path::Path, is_one_file: bool) -> Sleeper {
    let mut files = Vec::new();
    for n in 0..FILES {
        let path = dir.join(if is_one_file {
            "one".to_owned()
        } else {
            format!("file{n:05}")
        });
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        files.push(file);
    }
    let sleeper = Sleeper(Command::new("sleep").arg("100").spawn().unwrap());
    drop(files);
    let own = std::fs::read_link("/proc/self/exe").unwrap();
    while std::fs::read_link(format!("/proc/{}/exe", sleeper.0.id())).is_ok_and(|exe| exe == own) {}
    sleeper
}

#[test]
fn five_thousand_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    for is_one_file in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let root = std::fs::canonicalize(dir.path()).unwrap();
        let sleeper = target(&root, is_one_file);
        let id = ProcessId::of(Pid::new(sleeper.0.id().cast_signed()).unwrap()).unwrap();
        let volume = |facts: &FileFacts| facts.path.starts_with(&root);
        let (mut first, mut again) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let start = Watch::start();
            let mut census = census::take(&[id], &volume).unwrap();
            first.push(start.stop());
            assert_eq!(census.descriptions().len(), FILES);
            let start = Watch::start();
            let difference = census.rescan(&[id], &volume).unwrap();
            again.push(start.stop());
            assert!(difference.is_empty() && difference.changed.is_empty());
        }
        let files = if is_one_file { 1 } else { FILES };
        for (what, times) in [("census", &first), ("re-scan", &again)] {
            let wall = median(times.iter().map(|t| t.0).collect());
            let busy = median(times.iter().map(|t| t.1).collect());
            println!(
                "{FILES} descriptors of {files} files, {what}: {wall:.1?}, {busy:.1?} of processor time"
            );
        }
        let (first, again) = [first, again]
            .map(|times| median(times.iter().map(|t| t.0).collect()))
            .into();
        // Far above what an idle machine needs: a guard against work that grows with the square, not a benchmark.
        assert!(first < Duration::from_secs(2) && again < Duration::from_secs(1));
    }
}
