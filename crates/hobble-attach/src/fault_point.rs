//! Places where a test lets the server die by SIGKILL, to prove that recovery works from there.
//!
//! `HOBBLE_FAULT_POINT=NAME[:N]` makes the server kill itself the N-th time (default: first) it passes NAME. The variable is read by
//! the holder only and reaches nobody else. Points sit right after a journal record and before the step it announces, and right after the step.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Every fault point, in the order in which an attachment passes them.
pub const POINTS: &[&str] = &[
    "journal-opened",
    "served",
    "precopied",
    "stopping",
    "stopped",
    "mounting",
    "mounted",
    "grafting",
    "grafted",
    "let-go",
    "injecting",
    "updating",
    "updated",
    "recovering",
    "recover-stopped",
    "recover-grafted",
    "unmounted",
    "recovered",
];

struct Armed {
    name: String,
    left: AtomicU32,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// Arms the point that `HOBBLE_FAULT_POINT` names; called once, by the server.
///
/// # Errors
/// A text naming the nearest mistake, when the variable is set to something that is no fault point.
pub(crate) fn arm_from_environment() -> Result<(), String> {
    let armed = match std::env::var("HOBBLE_FAULT_POINT") {
        Err(_) => None,
        Ok(text) => {
            let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
            let count: u32 = count
                .parse()
                .map_err(|_| format!("HOBBLE_FAULT_POINT: `{count}` is not a count"))?;
            if !POINTS.contains(&name) {
                return Err(format!(
                    "HOBBLE_FAULT_POINT: `{name}` is not one of {}",
                    POINTS.join(", ")
                ));
            }
            Some(Armed {
                name: name.to_owned(),
                left: AtomicU32::new(count.max(1)),
            })
        }
    };
    let _ = ARMED.set(armed);
    Ok(())
}

/// Passes a point: dies here by SIGKILL when a test asked for it.
pub(crate) fn pass(name: &str) {
    debug_assert!(POINTS.contains(&name), "unknown fault point {name}");
    if let Some(Some(armed)) = ARMED.get()
        && armed.name == name
        && armed.left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // SIGKILL to oneself is delivered before kill() returns to user space (signal(7)).
        loop {
            std::thread::park();
        }
    }
}
