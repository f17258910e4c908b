//! SIGINT, SIGTERM and SIGHUP while a command is in the foreground.
//!
//! Invariant: from [`Signals::install`] on, none of them ends the process; whoever installed them looks at them and winds up
//! in good order.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::fail::{Fail, Outcome};

/// The signals caught so far.
#[derive(Debug, Clone)]
pub(crate) struct Signals {
    count: Arc<AtomicUsize>,
    pending: Arc<Mutex<VecDeque<i32>>>,
}

impl Signals {
    /// Catches what asks the program to end.
    pub(crate) fn install() -> Outcome<Self> {
        Self::catch(&[SIGINT, SIGTERM, SIGHUP])
    }

    /// Catches also what a terminal sends to a command that runs under this one.
    pub(crate) fn install_for_command() -> Outcome<Self> {
        Self::catch(&[SIGINT, SIGQUIT, SIGTERM, SIGHUP])
    }

    fn catch(signals: &[i32]) -> Outcome<Self> {
        let caught = Self {
            count: Arc::new(AtomicUsize::new(0)),
            pending: Arc::new(Mutex::new(VecDeque::new())),
        };
        let mut source = signal_hook::iterator::Signals::new(signals).map_err(|error| {
            Fail::failed(anyhow::Error::new(error).context("cannot catch signals"))
        })?;
        let shared = caught.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in source.forever() {
                    shared
                        .pending
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push_back(signal);
                    shared.count.fetch_add(1, Ordering::SeqCst);
                }
            })
            .map_err(|error| {
                Fail::failed(anyhow::Error::new(error).context("cannot start the signal thread"))
            })?;
        Ok(caught)
    }

    /// How many have been caught since they were installed.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// The next one that has not been taken.
    pub(crate) fn take(&self) -> Option<i32> {
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

/// Whether the terminal itself delivers this signal to a command started by this process: it goes to the whole foreground
/// process group, and handing it on would deliver it twice.
pub(crate) fn comes_from_terminal(signal: i32) -> bool {
    if !matches!(signal, SIGINT | SIGQUIT) {
        return false;
    }
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    rustix::termios::tcgetpgrp(&terminal).is_ok_and(|group| group == rustix::process::getpgrp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn caught_signals_are_counted_and_taken_in_order() {
        let signals = Signals::install().unwrap();
        for (number, signal) in [(1, SIGHUP), (2, SIGTERM)] {
            signal_hook::low_level::raise(signal).unwrap();
            let until = Instant::now() + Duration::from_secs(10);
            while signals.count() < number {
                assert!(Instant::now() < until, "signal {signal} was not caught");
                std::thread::yield_now();
            }
        }
        assert_eq!(signals.take(), Some(SIGHUP));
        assert_eq!(signals.take(), Some(SIGTERM));
        assert_eq!(signals.take(), None);
    }
}
