//! `hobble recover`: faults off and everything put back, whoever is still alive.
//!
//! The work is done on a thread of its own, so that progress is shown and signals are answered meanwhile; a signal does not
//! end it half way.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use hobble_api::event::{Event, EventKind};
use hobble_attach::{AttachError, Which};

use crate::cli::{Global, Recover};
use crate::command::{need_root, print, resolve};
use crate::fail::{Fail, Outcome};
use crate::out::Out;
use crate::render;
use crate::signals::Signals;

/// How often the wait for events looks for signals.
const LOOK: Duration = Duration::from_millis(100);

/// What the working thread has to tell.
enum News {
    Event(Box<Event>),
    Done(Result<(), AttachError>),
}

/// Recovers one attachment or all of them.
pub(crate) fn run(args: &Recover, global: &Global, out: &mut Out) -> Outcome<()> {
    need_root()?;
    let which = if args.all {
        if hobble_attach::ids(&global.state_dir)?.is_empty() {
            out.line("nothing is attached");
            return Ok(());
        }
        Which::All
    } else {
        Which::One(resolve(&global.state_dir, args.id.id.as_deref())?)
    };
    let signals = Signals::install()?;
    let news = start(global, which, args.force)?;
    let mut incomplete = Vec::new();
    let mut said = false;
    let mut seen = 0;
    loop {
        if signals.count() > seen {
            seen = signals.count();
            out.warn(
                "warning:",
                "recovery is going on; ending it half way would leave targets on a dead filesystem",
            );
        }
        match news.recv_timeout(LOOK) {
            Ok(News::Event(event)) => {
                said |= matches!(event.kind, EventKind::Recovered(_));
                tell(&event, &mut incomplete, args.all, out);
            }
            Ok(News::Done(result)) => {
                out.progress_done();
                result?;
                if !said {
                    // The server was gone before it could be asked how it went.
                    out.line("recovered: everything is back");
                }
                break;
            }
            Err(RecvTimeoutError::Timeout) => out.progress(Instant::now(), "recovering"),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(
                    Fail::failed(anyhow::anyhow!("the recovery ended without a result"))
                        .needing_recovery(),
                );
            }
        }
    }
    if args.force {
        // What could not be put back was told with its event; where the attachment has ended all the same, nobody can do more about it.
        let there = hobble_attach::ids(&global.state_dir)?;
        incomplete.retain(|id| there.contains(id));
    }
    if incomplete.is_empty() {
        return Ok(());
    }
    Err(Fail::failed(anyhow::anyhow!(
        "not everything could be put back: {}",
        incomplete.join(", ")
    ))
    .step("recover")
    .hint("look at what is left, and run `hobble recover` again when it is gone")
    .needing_recovery()
    .told())
}

fn start(global: &Global, which: Which, force: bool) -> Outcome<Receiver<News>> {
    let (sender, receiver) = mpsc::channel();
    let state_dir = global.state_dir.clone();
    std::thread::Builder::new()
        .name("recover".to_owned())
        .spawn(move || {
            // The other end lives until it has heard that this is done.
            let result = hobble_attach::recover(&state_dir, &which, force, &mut |event| {
                let _ = sender.send(News::Event(Box::new(event.clone())));
            });
            let _ = sender.send(News::Done(result));
        })
        .map_err(|error| {
            Fail::failed(error)
                .context("cannot start the recovery")
                .needing_recovery()
        })?;
    Ok(receiver)
}

fn tell(event: &Event, incomplete: &mut Vec<String>, many: bool, out: &mut Out) {
    out.progress_done();
    out.event(event);
    if let EventKind::Recovered(recovered) = &event.kind
        && !recovered.left.is_empty()
    {
        incomplete.push(event.id.clone());
    }
    if !out.is_json() {
        if many && matches!(event.kind, EventKind::Recovering { .. }) {
            out.line(format!("attachment: {}", event.id));
        }
        print(out, render::event(event));
    }
}
