//! The program that the demo hooks: an application like any other, which knows nothing of Hobble.
//!
//! It commits one row after the other to a SQLite database in WAL mode with `synchronous=FULL`, so that every commit waits for
//! a sync of the WAL, and handles errors as an application should: roll back, wait a moment, try the same row again. A second
//! connection looks at the table now and then. A thread of its own does nothing but look at the clock: its longest gap is how
//! long the process stood still, as the process itself sees it.
//!
//! Invariant: a row counts as committed exactly when SQLite acknowledged its commit, so that afterwards committed rows must
//! equal found rows.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use rusqlite::{Connection, ErrorCode, TransactionBehavior, params};

use super::protocol::{Answer, Order, PhaseReport};
use crate::cli::DemoWriter;
use crate::fail::{Fail, Outcome};
use crate::out::{Out, human_duration};

/// The name of the database in its directory.
pub(crate) const DATABASE: &str = "orders.db";
/// Attempts at one row before it is given up.
const ATTEMPTS: u32 = 50;
/// Wait between two attempts.
const BACKOFF: Duration = Duration::from_millis(1);
/// How often the clock thread looks at the clock.
const TICK: Duration = Duration::from_micros(200);
/// Commits between two looks of the second connection.
const LOOK_EVERY: u64 = 64;
/// Bounds of recorded latencies in microseconds; two significant digits.
const LATENCY_BOUNDS_US: (u64, u64) = (1, 600_000_000);

/// What [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verification {
    /// The answer of `PRAGMA integrity_check`.
    pub(crate) integrity: String,
    /// Rows in the table.
    pub(crate) rows: u64,
}

/// Opens the database anew and looks at all of it.
pub(crate) fn verify(directory: &Path) -> anyhow::Result<Verification> {
    let path = directory.join(DATABASE);
    let db = Connection::open(&path).with_context(|| format!("open {}", path.display()))?;
    let integrity = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    let rows = count_rows(&db)?;
    Ok(Verification { integrity, rows })
}

fn count_rows(db: &Connection) -> rusqlite::Result<u64> {
    let rows: i64 = db.query_row("SELECT count(*) FROM orders", [], |row| row.get(0))?;
    // A count is never negative.
    Ok(rows.unsigned_abs())
}

/// A latency histogram as the writer keeps it.
pub(crate) fn latency_histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(
        LATENCY_BOUNDS_US.0,
        LATENCY_BOUNDS_US.1,
        2,
    )?)
}

/// Runs the writer until it is told to stop.
pub(crate) fn run(args: &DemoWriter, out: &mut Out) -> Outcome<()> {
    write_until_stopped(args, out).map_err(|error| {
        if args.driven {
            say(&Answer::Broken {
                cause: format!("{error:#}"),
            });
        }
        Fail::failed(error).step("demo-writer")
    })
}

fn write_until_stopped(args: &DemoWriter, out: &mut Out) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let orders = if args.driven {
        // The demo must never leave a writer behind, however it ends (prctl(2), PR_SET_PDEATHSIG).
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .context("arrange to end with the demo")?;
        read_orders()
    } else {
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop)).context("handle signals")?;
        }
        mpsc::channel().1
    };
    let clock = Clock::start()?;
    let mut writer = Writer::open(&args.dir)?;
    let mut phase = Phase::begin("warm-up", &clock)?;
    writer.commit_next(&mut phase)?;
    if args.driven {
        say(&Answer::Ready);
    } else {
        out.line(format!(
            "pid {} commits to {}",
            std::process::id(),
            args.dir.join(DATABASE).display()
        ));
    }
    loop {
        writer.commit_next(&mut phase)?;
        let order = match orders.try_recv() {
            Ok(order) => Some(order),
            Err(TryRecvError::Empty) => None,
            // The demo is gone (by hand there are no orders, and the channel is closed from the start).
            Err(TryRecvError::Disconnected) => args.driven.then_some(Order::Stop),
        };
        match order {
            Some(Order::Phase(name)) => {
                let ended = std::mem::replace(&mut phase, Phase::begin(&name, &clock)?);
                say(&Answer::Phase(ended.report()));
            }
            Some(Order::Stop) => {
                say(&Answer::Phase(phase.report()));
                let (committed, phantoms, misreads) = writer.close()?;
                say(&Answer::Done {
                    committed,
                    phantoms,
                    misreads,
                });
                return Ok(());
            }
            None if stop.load(Ordering::Relaxed) => break,
            None if !args.driven && phase.began.elapsed() >= Duration::from_secs(1) => {
                let ended = std::mem::replace(&mut phase, Phase::begin("second", &clock)?);
                out.line(by_hand_line(&ended.report())?);
            }
            None => {}
        }
    }
    let (committed, phantoms, misreads) = writer.close()?;
    let found = verify(&args.dir)?;
    out.line(format!(
        "committed {committed} rows, found {}, integrity_check: {}",
        found.rows, found.integrity
    ));
    anyhow::ensure!(
        found.rows == committed + phantoms
            && phantoms == 0
            && misreads == 0
            && found.integrity == "ok",
        "rows were lost, invented or damaged ({phantoms} committed though reported as failed, {misreads} wrong looks)"
    );
    Ok(())
}

fn by_hand_line(report: &PhaseReport) -> anyhow::Result<String> {
    let mut latencies = latency_histogram()?;
    for &(value, times) in &report.latencies_us {
        latencies.saturating_record_n(value, times);
    }
    let at =
        |quantile| human_duration(Duration::from_micros(latencies.value_at_quantile(quantile)));
    let mut line = format!(
        "{:6.0} commits/s  p50 {}  p99 {}  longest gap {}",
        per_second(report),
        at(0.5),
        at(0.99),
        human_duration(Duration::from_micros(report.longest_gap_us))
    );
    for (name, times) in &report.errors {
        line.push_str(&format!("  {name} {times}"));
    }
    Ok(line)
}

/// Commits a second.
pub(crate) fn per_second(report: &PhaseReport) -> f64 {
    if report.seconds > 0.0 {
        // Counts of one run stay far below 2^52.
        report.commits as f64 / report.seconds
    } else {
        0.0
    }
}

/// Writes an answer; a demo that does not listen any more is noticed by its orders ending.
fn say(answer: &Answer) {
    if let Ok(line) = serde_json::to_string(answer) {
        let mut stdout = std::io::stdout().lock();
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    }
}

fn read_orders() -> Receiver<Order> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if let Some(order) = Order::from_line(&line)
                && sender.send(order).is_err()
            {
                return;
            }
        }
    });
    receiver
}

/// The thread that looks at the clock.
struct Clock {
    longest_us: Arc<AtomicU64>,
}

impl Clock {
    fn start() -> anyhow::Result<Self> {
        let longest_us = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&longest_us);
        std::thread::Builder::new()
            .name("clock".to_owned())
            .spawn(move || {
                let mut last = Instant::now();
                loop {
                    // Nothing wakes it: the pause is the rate of the writer.
                    std::thread::sleep(TICK);
                    let now = Instant::now();
                    let gap = now.duration_since(last).saturating_sub(TICK);
                    shared.fetch_max(
                        u64::try_from(gap.as_micros()).unwrap_or(u64::MAX),
                        Ordering::Relaxed,
                    );
                    last = now;
                }
            })
            .context("start the clock thread")?;
        Ok(Self { longest_us })
    }
}

/// The phase under way.
struct Phase {
    name: String,
    began: Instant,
    commits: u64,
    errors: BTreeMap<String, u64>,
    retried: u64,
    abandoned: u64,
    latencies: Histogram<u64>,
    longest_us: Arc<AtomicU64>,
}

impl Phase {
    fn begin(name: &str, clock: &Clock) -> anyhow::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            began: Instant::now(),
            commits: 0,
            errors: BTreeMap::new(),
            retried: 0,
            abandoned: 0,
            latencies: latency_histogram()?,
            longest_us: Arc::clone(&clock.longest_us),
        })
    }

    fn report(self) -> PhaseReport {
        PhaseReport {
            seconds: self.began.elapsed().as_secs_f64(),
            commits: self.commits,
            retried: self.retried,
            abandoned: self.abandoned,
            latencies_us: self
                .latencies
                .iter_recorded()
                .map(|step| (step.value_iterated_to(), step.count_at_value()))
                .collect(),
            longest_gap_us: self.longest_us.swap(0, Ordering::Relaxed),
            name: self.name,
            errors: self.errors,
        }
    }
}

/// The application proper.
struct Writer {
    db: Connection,
    /// Looks at the table; open from the start, as in a connection pool.
    reader: Connection,
    next_id: i64,
    /// Rows that were there before.
    inherited: u64,
    committed: u64,
    phantoms: u64,
    misreads: u64,
}

impl Writer {
    fn open(directory: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("create {}", directory.display()))?;
        let path: PathBuf = directory.join(DATABASE);
        let open = || -> rusqlite::Result<Connection> {
            let db = Connection::open(&path)?;
            db.pragma_update(None, "journal_mode", "wal")?;
            // Only FULL syncs the WAL at every commit (sqlite.org/pragma.html#pragma_synchronous).
            db.pragma_update(None, "synchronous", "full")?;
            db.busy_timeout(Duration::from_secs(5))?;
            Ok(db)
        };
        let db = open().with_context(|| format!("open {}", path.display()))?;
        db.execute_batch(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, cents INTEGER NOT NULL)",
        )?;
        let reader = open()?;
        let inherited = count_rows(&db)?;
        let last: i64 = db.query_row("SELECT coalesce(max(id), 0) FROM orders", [], |row| {
            row.get(0)
        })?;
        Ok(Self {
            db,
            reader,
            next_id: last + 1,
            inherited,
            committed: 0,
            phantoms: 0,
            misreads: 0,
        })
    }

    /// Commits the next row, however often that has to be tried.
    fn commit_next(&mut self, phase: &mut Phase) -> anyhow::Result<()> {
        let began = Instant::now();
        let id = self.next_id;
        self.next_id += 1;
        for attempt in 0..ATTEMPTS {
            match self.commit(id) {
                Ok(()) => {
                    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                    phase.latencies.saturating_record(micros);
                    phase.commits += 1;
                    phase.retried += u64::from(attempt > 0);
                    self.committed += 1;
                    if self.committed.is_multiple_of(LOOK_EVERY) {
                        self.look(phase);
                    }
                    return Ok(());
                }
                Err(error) => {
                    let Some(failure) = error.sqlite_error() else {
                        return Err(error.into());
                    };
                    if attempt > 0 && failure.code == ErrorCode::ConstraintViolation {
                        self.phantoms += 1;
                        return Ok(());
                    }
                    *phase
                        .errors
                        .entry(error_name(failure.extended_code))
                        .or_default() += 1;
                    // Nothing wakes it: an application that backs off before it tries again.
                    std::thread::sleep(BACKOFF);
                }
            }
        }
        phase.abandoned += 1;
        Ok(())
    }

    fn commit(&mut self, id: i64) -> rusqlite::Result<()> {
        let transaction = self
            .db
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction
            .prepare_cached("INSERT INTO orders (id, customer, cents) VALUES (?1, ?2, ?3)")?
            .execute(params![id, format!("customer {}", id % 97), id % 10_000])?;
        // Dropped unless committed, a transaction rolls back.
        transaction.commit()
    }

    fn look(&mut self, phase: &mut Phase) {
        match count_rows(&self.reader) {
            Ok(rows) => {
                self.misreads += u64::from(rows != self.inherited + self.committed + self.phantoms)
            }
            Err(error) => {
                let code = error
                    .sqlite_error()
                    .map_or(0, |failure| failure.extended_code);
                *phase
                    .errors
                    .entry(format!("{} (look)", error_name(code)))
                    .or_default() += 1;
            }
        }
    }

    /// Closes the database and tells how many rows it must now have gained, how many of those were reported as failed, and
    /// how many looks were wrong.
    fn close(self) -> anyhow::Result<(u64, u64, u64)> {
        self.reader
            .close()
            .map_err(|(_, error)| error)
            .context("close the second connection")?;
        self.db
            .close()
            .map_err(|(_, error)| error)
            .context("close the database")?;
        Ok((
            self.inherited + self.committed,
            self.phantoms,
            self.misreads,
        ))
    }
}

/// The name of a result code (sqlite.org/rescode.html) that a faulty disk can cause.
fn error_name(extended: i32) -> String {
    use rusqlite::ffi;
    let name = match extended {
        ffi::SQLITE_IOERR_READ => "SQLITE_IOERR_READ",
        ffi::SQLITE_IOERR_SHORT_READ => "SQLITE_IOERR_SHORT_READ",
        ffi::SQLITE_IOERR_WRITE => "SQLITE_IOERR_WRITE",
        ffi::SQLITE_IOERR_FSYNC => "SQLITE_IOERR_FSYNC",
        ffi::SQLITE_IOERR_TRUNCATE => "SQLITE_IOERR_TRUNCATE",
        ffi::SQLITE_IOERR_FSTAT => "SQLITE_IOERR_FSTAT",
        ffi::SQLITE_IOERR_SHMSIZE => "SQLITE_IOERR_SHMSIZE",
        ffi::SQLITE_IOERR_SHMMAP => "SQLITE_IOERR_SHMMAP",
        ffi::SQLITE_IOERR_LOCK => "SQLITE_IOERR_LOCK",
        other => match other & 0xff {
            ffi::SQLITE_IOERR => "SQLITE_IOERR",
            ffi::SQLITE_BUSY => "SQLITE_BUSY",
            ffi::SQLITE_FULL => "SQLITE_FULL",
            ffi::SQLITE_CORRUPT => "SQLITE_CORRUPT",
            ffi::SQLITE_CANTOPEN => "SQLITE_CANTOPEN",
            ffi::SQLITE_READONLY => "SQLITE_READONLY",
            ffi::SQLITE_CONSTRAINT => "SQLITE_CONSTRAINT",
            _ => return format!("SQLITE code {other}"),
        },
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_rows_are_found_again_and_a_second_run_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        for (run, rows) in [(1, 130), (2, 260)] {
            let clock = Clock::start().unwrap();
            let mut writer = Writer::open(directory.path()).unwrap();
            let mut phase = Phase::begin("test", &clock).unwrap();
            for _ in 0..130 {
                writer.commit_next(&mut phase).unwrap();
            }
            let report = phase.report();
            assert_eq!(
                (report.commits, report.error_count(), report.retried),
                (130, 0, 0),
                "run {run}"
            );
            assert_eq!(
                report
                    .latencies_us
                    .iter()
                    .map(|(_, times)| times)
                    .sum::<u64>(),
                130
            );
            assert_eq!(writer.close().unwrap(), (rows, 0, 0));
            let found = verify(directory.path()).unwrap();
            assert_eq!(
                found,
                Verification {
                    integrity: "ok".to_owned(),
                    rows
                }
            );
        }
    }

    #[test]
    fn a_row_that_cannot_be_written_is_counted_and_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::start().unwrap();
        let mut writer = Writer::open(directory.path()).unwrap();
        let mut phase = Phase::begin("test", &clock).unwrap();
        writer.commit_next(&mut phase).unwrap();
        writer.db.pragma_update(None, "query_only", true).unwrap();
        writer.commit_next(&mut phase).unwrap();
        let report = phase.report();
        assert_eq!((report.commits, report.abandoned), (1, 1));
        assert_eq!(
            report.errors,
            BTreeMap::from([("SQLITE_READONLY".to_owned(), u64::from(ATTEMPTS))])
        );
        assert_eq!(writer.close().unwrap(), (1, 0, 0));
    }
}
