//! `hobble update`, `pause`, `resume` and `events`: requests to a live attachment.

use std::time::Duration;

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind, Rules};
use hobble_attach::Client;

use crate::cli::{Events, Global, IdArg};
use crate::command::{print, resolve};
use crate::fail::{Fail, Outcome};
use crate::intent;
use crate::out::{Out, printable};
use crate::render;
use crate::signals::Signals;

/// How often following looks for signals.
const LOOK: Duration = Duration::from_millis(200);

fn open(id: &IdArg, global: &Global) -> Outcome<Client> {
    let id = resolve(&global.state_dir, id.id.as_deref())?;
    Ok(Client::open(&global.state_dir, &id)?)
}

/// Tells that it is done, in the form of the event that the attachment records for it.
fn tell(id: &str, kind: EventKind, out: &mut Out) {
    let event = Event::new(Timestamp::now(), id, kind);
    out.event(&event);
    if !out.is_json() {
        print(out, render::event(&event));
    }
}

/// Puts other rules in force.
pub(crate) fn update(
    id: &IdArg,
    intent: intent::Update,
    global: &Global,
    out: &mut Out,
) -> Outcome<()> {
    for warning in &intent.warnings {
        out.warn("warning:", &printable(warning));
    }
    let document = serde_json::to_value(&intent.document).map_err(Fail::failed)?;
    let mut client = open(id, global)?;
    let (seed, rules) = client.update(document, intent.seed)?;
    tell(client.id(), EventKind::Updated(Rules { seed, rules }), out);
    Ok(())
}

/// Rules off.
pub(crate) fn pause(id: &IdArg, global: &Global, out: &mut Out) -> Outcome<()> {
    let mut client = open(id, global)?;
    client.pause()?;
    tell(client.id(), EventKind::Paused {}, out);
    Ok(())
}

/// Rules on.
pub(crate) fn resume(id: &IdArg, global: &Global, out: &mut Out) -> Outcome<()> {
    let mut client = open(id, global)?;
    client.resume()?;
    tell(client.id(), EventKind::Resumed {}, out);
    Ok(())
}

/// The lease counts anew.
pub(crate) fn renew(id: &IdArg, global: &Global, out: &mut Out) -> Outcome<()> {
    let mut client = open(id, global)?;
    let until = client.renew()?;
    if out.is_json() {
        out.object(&serde_json::json!({ "v": 1, "id": client.id(), "until": until }));
    } else {
        out.line(format!("renewed: recovers at {until} unless renewed again"));
    }
    Ok(())
}

/// What happened, and with `--follow` what happens.
pub(crate) fn events(args: &Events, global: &Global, out: &mut Out) -> Outcome<()> {
    let client = open(&args.id, global)?;
    let signals = Signals::install()?;
    let mut events = client.events(args.follow, None)?;
    while !events.ended() && signals.count() == 0 {
        if let Some(event) = events.next(LOOK)? {
            out.event(&event);
            out.line(render::history(&event));
        }
    }
    Ok(())
}
