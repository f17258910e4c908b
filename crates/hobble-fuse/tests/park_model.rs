//! Deadline, INTERRUPT, release, kill and bypass race for parked requests: `src/park/table.rs` itself, with the locks of a
//! scheduler that tries thousands of interleavings.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::time::{Duration, Instant};

use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::thread;

/// What `table.rs` takes its lock from.
mod sync {
    pub(crate) use shuttle::sync::{Mutex, MutexGuard};
}

#[path = "../src/park/table.rs"]
#[allow(dead_code, reason = "the model uses a part of it")]
mod table;

use table::{Interrupted, Outcome, Parked, Table, Taken};

const REQUESTS: u64 = 3;

/// Counts how often it was carried on with, and with an INTERRUPT; moved by value, so it can only be in one place.
struct Payload(u64, Arc<Vec<AtomicUsize>>);

impl Payload {
    fn finish(self, interrupt: Option<u64>) {
        self.1[self.0 as usize].fetch_add(1, Ordering::SeqCst);
        if let Some(token) = interrupt {
            assert_eq!(token, self.0);
            self.1[(REQUESTS + token) as usize].fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn finish(taken: Taken<Payload, u64>) {
    taken.payload.finish(taken.interrupt);
    drop(taken.going);
}

type Model = Table<Payload, u64, u64>;

fn counters() -> Arc<Vec<AtomicUsize>> {
    Arc::new((0..2 * REQUESTS).map(|_| AtomicUsize::new(0)).collect())
}

fn assert_each_done_once(counters: &[AtomicUsize]) {
    for count in &counters[..REQUESTS as usize] {
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}

fn parked(
    unique: u64,
    deadline: Option<Instant>,
    done: &Arc<Vec<AtomicUsize>>,
    start: Instant,
) -> Parked<Payload> {
    Parked {
        deadline,
        since: start,
        tid: unique as u32 + 100,
        exclusive: unique == 0,
        payload: Payload(unique, Arc::clone(done)),
    }
}

fn park(
    table: &Model,
    unique: u64,
    deadline: Option<Instant>,
    done: &Arc<Vec<AtomicUsize>>,
    start: Instant,
) {
    match table.park(unique, parked(unique, deadline, done, start)) {
        Outcome::Parked {
            interrupted: true, ..
        } => kill(table, unique),
        Outcome::Parked { .. } => {}
        Outcome::Bypassed(payload, interrupt) => payload.finish(interrupt),
    }
}

fn kill(table: &Model, unique: u64) {
    if let Some(taken) = table.take(unique) {
        finish(taken);
    }
}

#[test]
fn every_request_is_carried_on_with_exactly_once() {
    let start = Instant::now();
    shuttle::check_pct(
        move || {
            let table = Arc::new(Model::new());
            let done = counters();
            let soon = start + Duration::from_millis(1);
            let late = start + Duration::from_secs(1);
            let mut threads = Vec::new();
            for unique in 0..REQUESTS {
                let (table, done) = (Arc::clone(&table), Arc::clone(&done));
                threads.push(thread::spawn(move || {
                    park(&table, unique, Some(soon), &done, start)
                }));
            }
            for unique in 0..REQUESTS {
                let table = Arc::clone(&table);
                threads.push(thread::spawn(move || {
                    if let Interrupted::Parked(tid) = table.interrupt(unique, unique, start) {
                        assert_eq!(u64::from(tid), unique + 100);
                        if unique % 2 == 0 {
                            kill(&table, unique);
                        }
                    }
                }));
            }
            let timer = Arc::clone(&table);
            threads.push(thread::spawn(move || {
                let mut due = Vec::new();
                timer.due(late, &mut due);
                due.into_iter().for_each(finish);
            }));
            let releaser = Arc::clone(&table);
            threads.push(thread::spawn(move || {
                releaser.set_bypass(true);
                releaser.release(|_| true).into_iter().for_each(finish);
            }));
            for thread in threads {
                thread.join().unwrap();
            }
            // What was parked before the bypass and after the timer's look: its next look.
            let mut due = Vec::new();
            assert_eq!(table.due(late, &mut due), None);
            due.into_iter().for_each(finish);
            assert_each_done_once(&done);
            let counts = table.counts();
            assert_eq!(
                (
                    counts.parked,
                    counts.interrupted,
                    counts.exclusive + counts.going
                ),
                (0, 0, 0)
            );
            // Every INTERRUPT goes with its request, or found nothing and is given back to the kernel in the end.
            let (stale, more) = table.stale_interrupts(late);
            assert!(!more);
            for token in 0..REQUESTS {
                let with_request = done[(REQUESTS + token) as usize].load(Ordering::SeqCst);
                let alone = stale.iter().filter(|stale| **stale == token).count();
                assert_eq!(with_request + alone, 1);
            }
        },
        5000,
        4,
    );
}

#[test]
fn a_kill_is_seen_whether_its_interrupt_comes_before_or_after_the_request_is_parked() {
    let start = Instant::now();
    shuttle::check_random(
        move || {
            let table = Arc::new(Model::new());
            let done = counters();
            let late = start + Duration::from_secs(1);
            let parker = {
                let (table, done) = (Arc::clone(&table), Arc::clone(&done));
                thread::spawn(move || {
                    for unique in 0..REQUESTS {
                        park(&table, unique, Some(late), &done, start);
                    }
                })
            };
            for unique in 0..REQUESTS {
                if let Interrupted::Parked(_) = table.interrupt(unique, unique, start) {
                    kill(&table, unique);
                }
            }
            parker.join().unwrap();
            assert_each_done_once(&done);
            // Nothing of them is left, not even a deadline to be woken by.
            assert_eq!(table.due(start, &mut Vec::new()), None);
        },
        5000,
    );
}

#[test]
fn nothing_is_parked_once_the_lot_lets_everything_pass() {
    let start = Instant::now();
    shuttle::check_random(
        move || {
            let table = Arc::new(Model::new());
            let done = counters();
            let parker = {
                let (table, done) = (Arc::clone(&table), Arc::clone(&done));
                thread::spawn(move || {
                    for unique in 0..REQUESTS {
                        park(&table, unique, None, &done, start);
                    }
                })
            };
            table.set_bypass(true);
            table.release(|_| true).into_iter().for_each(finish);
            assert_eq!(table.counts().parked, 0);
            parker.join().unwrap();
            assert_each_done_once(&done);
        },
        5000,
    );
}

#[test]
fn a_hook_is_called_once_or_never_and_not_after_it_was_removed() {
    let start = Instant::now();
    shuttle::check_random(
        move || {
            let table = Arc::new(Model::new());
            let called = Arc::new(AtomicUsize::new(0));
            let waiter = {
                let (table, called) = (Arc::clone(&table), Arc::clone(&called));
                thread::spawn(move || {
                    let early = table.hook(1, 7).is_some();
                    called.fetch_add(usize::from(early), Ordering::SeqCst);
                    let removed = table.unhook(1).is_some();
                    assert!(!(early && removed));
                })
            };
            match table.interrupt(1, 1, start) {
                Interrupted::Hook(callback) => {
                    assert_eq!(callback, 7);
                    called.fetch_add(1, Ordering::SeqCst);
                }
                Interrupted::Early => {}
                Interrupted::Parked(_) => panic!("nothing was parked"),
            }
            waiter.join().unwrap();
            assert!(called.load(Ordering::SeqCst) <= 1);
        },
        5000,
    );
}

#[test]
fn the_slow_round_visits_everybody() {
    shuttle::check_random(
        || {
            let start = Instant::now();
            let table: Table<u64, u64, u64> = Table::new();
            for unique in 0..100u64 {
                let entry = Parked {
                    deadline: None,
                    since: start,
                    tid: unique as u32,
                    exclusive: false,
                    payload: unique,
                };
                assert!(matches!(
                    table.park(unique * 2, entry),
                    Outcome::Parked { .. }
                ));
            }
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..13 {
                let round = table.next_round(8);
                assert!(round.len() <= 8);
                seen.extend(round);
            }
            assert_eq!(seen.len(), 100);
            assert_eq!(table.requests_of(7), [14]);
        },
        1,
    );
}
