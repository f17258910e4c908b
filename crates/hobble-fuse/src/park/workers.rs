//! Threads that carry on with requests whose wait has ended.
//!
//! Invariant: a job never waits for another that blocks, up to [`MAX`] blocked at a time: a thread is added whenever a job
//! comes and none is idle. Threads beyond the first go after a while of idleness.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Threads at most.
const MAX: usize = 64;
/// How long a thread beyond the first stays without a job.
const LINGER: Duration = Duration::from_secs(2);

pub(super) struct Workers {
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
    settled: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    running: usize,
    closed: bool,
}

impl Workers {
    /// Starts the first thread.
    pub(super) fn new() -> std::io::Result<Self> {
        let inner = Arc::new(Inner {
            state: Mutex::default(),
            work: Condvar::new(),
            settled: Condvar::new(),
        });
        let workers = Self { inner };
        workers
            .inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .threads = 1;
        workers.spawn()?;
        Ok(workers)
    }

    /// Starts a thread that has been counted already.
    fn spawn(&self) -> std::io::Result<()> {
        let inner = Arc::clone(&self.inner);
        std::thread::Builder::new()
            .name("fuse-resume".into())
            .spawn(move || inner.work())
            .map(drop)
    }

    pub(super) fn submit(&self, job: Job) {
        let mut state = self
            .inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.jobs.push_back(job);
        let grow = state.jobs.len() > state.idle && state.threads < MAX;
        if grow {
            state.threads += 1;
        }
        drop(state);
        self.inner.work.notify_one();
        if grow && let Err(error) = self.spawn() {
            tracing::warn!(%error, "cannot start another thread; resumed requests may wait for each other");
            self.inner
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .threads -= 1;
        }
    }

    /// Waits until there is no job left, waiting or running.
    pub(super) fn settle(&self, timeout: Duration) -> bool {
        let state = self
            .inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (state, _) = self
            .inner
            .settled
            .wait_timeout_while(state, timeout, |state| {
                state.running > 0 || !state.jobs.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.running == 0 && state.jobs.is_empty()
    }

    /// Threads end when the jobs that are left have been done.
    pub(super) fn close(&self) {
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed = true;
        self.inner.work.notify_all();
    }
}

impl Inner {
    fn work(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut idle_since = Instant::now();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.running += 1;
                drop(state);
                if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a resumed request panicked; please report this bug");
                }
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.running -= 1;
                if state.running == 0 && state.jobs.is_empty() {
                    self.settled.notify_all();
                }
                idle_since = Instant::now();
                continue;
            }
            if state.closed || (state.threads > 1 && idle_since.elapsed() >= LINGER) {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            state = if state.threads > 1 {
                self.work
                    .wait_timeout(state, LINGER)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            } else {
                self.work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            };
            state.idle -= 1;
        }
    }
}
