//! What the outside may see of an attachment: its status and its events.
//!
//! Invariant: events are numbered without gaps from 0 and never change; a follower that knows its last number misses nothing as
//! long as the log holds it. No number is given twice, also when another server has taken over, which knows the last events only. The board is written by the engine only.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind};
use hobble_api::status::Status;
use hobble_mirror::Legacy;

/// Events kept for late followers; an attachment that is updated every second fills this in almost three hours.
const KEPT_EVENTS: usize = 10_000;

#[derive(Debug)]
struct State {
    status: Status,
    events: VecDeque<Event>,
    next: u64,
    closed: bool,
    /// Where a successor finds the number of the next event.
    legacy: Option<Legacy>,
}

/// The board of one attachment.
#[derive(Debug)]
pub(crate) struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

impl Board {
    /// A board that shows `status` and no event.
    pub(crate) fn new(status: Status, legacy: Option<Legacy>) -> Self {
        Self::going_on(status, Vec::new(), legacy)
    }

    /// The board of an attachment whose server may have died: with the events that are known, and numbers that go on from the last that anybody has seen.
    pub(crate) fn going_on(status: Status, events: Vec<Event>, legacy: Option<Legacy>) -> Self {
        Self {
            state: Mutex::new(State {
                status,
                events: events.into(),
                next: legacy.as_ref().map_or(0, Legacy::told),
                closed: false,
                legacy,
            }),
            changed: Condvar::new(),
        }
    }

    /// The last events, at most so many.
    pub(crate) fn last_events(&self, most: usize) -> Vec<Event> {
        let state = self.lock();
        let first = state.events.len().saturating_sub(most);
        state.events.iter().skip(first).cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status as it was last written.
    pub(crate) fn status(&self) -> Status {
        self.lock().status.clone()
    }

    /// Changes the status.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// Publishes an event.
    pub(crate) fn publish(&self, kind: EventKind) {
        let mut state = self.lock();
        let mut event = Event::new(Timestamp::now(), state.status.id.clone(), kind);
        event.seq = Some(state.next);
        state.next += 1;
        if let Some(legacy) = &state.legacy {
            legacy.set_told(state.next);
        }
        if state.events.len() == KEPT_EVENTS {
            state.events.pop_front();
        }
        state.events.push_back(event);
        drop(state);
        self.changed.notify_all();
    }

    /// No event will follow; followers end.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The events from number `since` on; waits for one at most `timeout`. `None` when there will be none any more.
    pub(crate) fn events_since(&self, since: u64, timeout: Duration) -> Option<Vec<Event>> {
        let until = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            let found: Vec<Event> = state
                .events
                .iter()
                .filter(|event| event.seq.is_some_and(|seq| seq >= since))
                .cloned()
                .collect();
            if !found.is_empty() {
                return Some(found);
            }
            if state.closed {
                return None;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(Vec::new());
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
