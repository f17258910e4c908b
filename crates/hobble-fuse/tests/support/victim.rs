//! Programs that use the mount, each in a process of its own: this test program started again with a variable set.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Child, Mounted, sys};

const VARIABLE: &str = "HOBBLE_FUSE_TEST_VICTIM";
const MARK: &str = "victim: ";

/// What a victim does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deed {
    /// Opens a file, then reads it once.
    Read,
    /// The same, with a handler for SIGALRM installed with SA_RESTART.
    ReadWithAlarm,
    /// Opens a file and closes it.
    Close,
    /// Opens a file and exits without closing its 51 descriptors.
    Exit,
    /// Writes beyond the end of the file.
    Append,
    /// Creates a file next to the one it has opened.
    CreateNext,
    /// Asks for the attributes of a file next to the one it has opened.
    StatNext,
    /// Reads a file in a thousand threads.
    Crowd,
    /// Has a hundred asynchronous reads under way and waits for them.
    Aio,
    /// Has a hundred asynchronous reads under way and exits.
    AioExit,
    /// Opens a file and says how long one read takes.
    TimedRead,
}

impl Deed {
    const ALL: [Self; 11] = [
        Self::Read,
        Self::ReadWithAlarm,
        Self::Close,
        Self::Exit,
        Self::Append,
        Self::CreateNext,
        Self::StatNext,
        Self::Crowd,
        Self::Aio,
        Self::AioExit,
        Self::TimedRead,
    ];

    fn name(self) -> String {
        format!("{self:?}")
    }
}

/// A running victim.
pub(crate) struct Victim {
    pub(crate) child: Child,
    out: BufReader<std::process::ChildStdout>,
    /// The thread that does the deed.
    pub(crate) tid: i32,
}

impl Victim {
    /// Starts a victim; it has opened the file, and does its deed next.
    pub(crate) fn start(mounted: &Mounted, deed: Deed, file: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "victim", "--nocapture"])
            .env(
                VARIABLE,
                format!("{} {}", deed.name(), mounted.path(file).display()),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        sys::inherit(&mut command, mounted.mount.as_fd());
        let mut child = Child(command.spawn().unwrap(), mounted.connection);
        let out = BufReader::new(child.0.stdout.take().unwrap());
        let mut victim = Self { child, out, tid: 0 };
        victim.tid = victim.line().parse().unwrap();
        victim
    }

    /// The next thing it says.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.out.read_line(&mut line).unwrap(),
                0,
                "the victim said nothing"
            );
            if let Some((_, said)) = line.split_once(MARK) {
                return said.trim().to_owned();
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.0.id() as i32
    }
}

/// What the test named `victim` runs. Returns at once in an ordinary run of the tests.
pub(crate) fn main() {
    let Ok(order) = std::env::var(VARIABLE) else {
        return;
    };
    let (name, path) = order.split_once(' ').unwrap();
    let deed = Deed::ALL
        .into_iter()
        .find(|deed| deed.name() == name)
        .unwrap();
    if matches!(deed, Deed::ReadWithAlarm) {
        sys::handle_alarm_with_restart();
    }
    let mut options = std::fs::File::options();
    options.read(true).write(matches!(deed, Deed::Append));
    let mut file = options.open(path).unwrap();
    println!("{MARK}{}", rustix::thread::gettid().as_raw_nonzero());
    let mut buffer = [0; 5];
    let start = Instant::now();
    match deed {
        Deed::Read | Deed::ReadWithAlarm | Deed::TimedRead => {
            // One system call: `read_exact` would hide an EINTR.
            let result = file.read(&mut buffer);
            let taken = start.elapsed();
            match result {
                Ok(len) => println!("{MARK}{}", String::from_utf8_lossy(&buffer[..len])),
                Err(error) => println!("{MARK}{error}"),
            }
            println!("{MARK}{}", taken.as_micros());
        }
        Deed::Close => {
            drop(file);
            println!("{MARK}closed");
        }
        Deed::Exit => {
            for _ in 0..50 {
                std::mem::forget(file.try_clone().unwrap());
            }
            std::mem::forget(file);
        }
        Deed::Crowd => {
            let file = &file;
            std::thread::scope(|scope| {
                for _ in 0..1000 {
                    let read = move || file.read_at(&mut [0; 5], 0);
                    std::thread::Builder::new()
                        .stack_size(64 << 10)
                        .spawn_scoped(scope, read)
                        .unwrap();
                }
            });
            println!("{MARK}all");
        }
        Deed::Aio => {
            let results = sys::Aio::reads(file.as_fd(), 100, 4096).results();
            println!("{MARK}{}", results.len());
        }
        Deed::AioExit => std::mem::forget(sys::Aio::reads(file.as_fd(), 100, 4096)),
        Deed::CreateNext => {
            let result = std::fs::File::create_new(format!("{path}.next"));
            println!("{MARK}{}", result.is_ok());
        }
        Deed::StatNext => {
            let result = std::fs::exists(format!("{path}.next"));
            println!("{MARK}{result:?}");
        }
        Deed::Append => {
            let result = file.write_at(b"appended", 1 << 20);
            println!("{MARK}{result:?}");
        }
    }
    std::process::exit(0);
}

/// How long "within 100 ms" may be here, where two cores are shared by everything: the promise is measured from the kill to the
/// process's end as seen by its parent.
pub(crate) const FREED: Duration = Duration::from_millis(100);
