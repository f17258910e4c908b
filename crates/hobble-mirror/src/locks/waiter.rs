//! Threads that wait for locks held by others than our clients.
//!
//! Owns the threads; readers never wait. Invariant: a wait ends by the lock, an error or [`Wait::cancel`], and after `cancel` the waiting thread is nudged until it
//! has noticed: a signal that comes just before the blocking call begins is lost, so one is not enough.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::Duration;

use crate::lock::lock;
use crate::sys::thread;

/// One blocking call on a thread of its own.
pub(crate) struct Wait {
    cancelled: AtomicBool,
    /// The thread's id while it runs, else 0. The mutex keeps the thread from ending between the look and the signal.
    tid: Mutex<i32>,
    started: AtomicI32,
}

/// Stack of a waiting thread: it makes one system call and one reply.
const STACK: usize = 256 * 1024;

impl Wait {
    /// Runs `block` on a new thread until it returns something else than `EINTR` or the wait is cancelled, then `done`.
    pub(crate) fn start(
        block: impl Fn() -> io::Result<()> + Send + 'static,
        done: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        thread::make_nudgeable();
        let wait = Arc::new(Self {
            cancelled: AtomicBool::new(false),
            tid: Mutex::new(0),
            started: AtomicI32::new(0),
        });
        let mine = Arc::clone(&wait);
        std::thread::Builder::new()
            .name("lock-wait".into())
            .stack_size(STACK)
            .spawn(move || {
                *lock(&mine.tid) = thread::tid();
                mine.started.store(1, Ordering::Release);
                let result = loop {
                    if mine.cancelled.load(Ordering::Acquire) {
                        break Err(io::Error::from_raw_os_error(libc::EINTR));
                    }
                    match block() {
                        Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                        other => break other,
                    }
                };
                *lock(&mine.tid) = 0;
                done(result);
            })?;
        Ok(wait)
    }

    /// Ends the wait with `EINTR` soon, unless it has ended already. Never blocks.
    pub(crate) fn cancel(self: &Arc<Self>) {
        self.cancelled.store(true, Ordering::Release);
        Nudger::get().add(Arc::downgrade(self));
    }

    /// Signals the thread; `false` when it needs no more signals.
    fn nudge(&self) -> bool {
        let tid = lock(&self.tid);
        if *tid != 0 {
            thread::nudge(*tid);
        }
        *tid != 0 || self.started.load(Ordering::Acquire) == 0
    }
}

/// Signals the threads of cancelled waits until they have ended.
struct Nudger {
    queue: Mutex<Vec<Weak<Wait>>>,
    more: Condvar,
}

/// How often a cancelled thread is signalled.
const EVERY: Duration = Duration::from_millis(2);

impl Nudger {
    fn get() -> &'static Self {
        static NUDGER: OnceLock<Nudger> = OnceLock::new();
        static STARTED: OnceLock<()> = OnceLock::new();
        let nudger = NUDGER.get_or_init(|| Self {
            queue: Mutex::default(),
            more: Condvar::new(),
        });
        STARTED.get_or_init(|| {
            let spawned =
                std::thread::Builder::new().name("lock-nudge".into()).stack_size(STACK).spawn(|| Self::run(nudger));
            if let Err(error) = spawned {
                tracing::error!(%error, "no thread to interrupt lock waits; they end only when the lock is free");
            }
        });
        nudger
    }

    fn run(nudger: &'static Self) {
        loop {
            let waits = {
                let mut queue = lock(&nudger.queue);
                while queue.is_empty() {
                    queue = nudger
                        .more
                        .wait(queue)
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                queue.retain(|wait| wait.upgrade().is_some_and(|wait| wait.nudge()));
                !queue.is_empty()
            };
            if waits {
                // Nothing wakes it: see the comment on the signal above; the pause bounds how often it is sent.
                std::thread::sleep(EVERY);
            }
        }
    }

    fn add(&self, wait: Weak<Wait>) {
        lock(&self.queue).push(wait);
        self.more.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::mpsc;
    use std::time::Instant;

    use crate::sys::lock::{LockKind, LockRange, set, set_wait};

    fn two_descriptions() -> (tempfile::TempDir, std::fs::File, std::fs::File) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            std::fs::File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .unwrap()
        };
        let (a, b) = (open(), open());
        (dir, a, b)
    }

    const ALL: LockRange = LockRange {
        start: 0,
        end: LockRange::OPEN_END,
    };

    #[test]
    fn a_cancelled_wait_ends_although_the_lock_stays_taken() {
        for _ in 0..50 {
            let (_dir, holder, waiter) = two_descriptions();
            set(holder.as_fd(), Some(LockKind::Write), ALL).unwrap();
            let (sender, receiver) = mpsc::channel();
            let wait = Wait::start(
                move || set_wait(waiter.as_fd(), LockKind::Write, ALL),
                move |result| sender.send(result).unwrap(),
            )
            .unwrap();
            let begun = Instant::now();
            wait.cancel();
            let result = receiver
                .recv_timeout(Duration::from_secs(5))
                .expect("the wait must end");
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EINTR));
            assert!(begun.elapsed() < Duration::from_secs(1));
        }
    }

    #[test]
    fn a_wait_ends_when_the_lock_is_given_up() {
        let (_dir, holder, waiter) = two_descriptions();
        set(holder.as_fd(), Some(LockKind::Write), ALL).unwrap();
        let (sender, receiver) = mpsc::channel();
        let _wait = Wait::start(
            move || set_wait(waiter.as_fd(), LockKind::Write, ALL),
            move |result| sender.send(result).unwrap(),
        )
        .unwrap();
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        set(holder.as_fd(), None, ALL).unwrap();
        receiver
            .recv_timeout(Duration::from_secs(5))
            .expect("the wait must end")
            .unwrap();
    }
}
