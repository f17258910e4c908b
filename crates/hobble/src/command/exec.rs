//! `hobble exec`: a command under a hook of its own.

use hobble_api::event::EventKind;
use hobble_api::exit::EXEC_FAILED;

use crate::command::need_root;
use crate::fail::{Fail, Outcome};
use crate::intent;
use crate::out::{Out, printable};
use crate::render::{self, Line};
use crate::signals::{Signals, comes_from_terminal};

/// Runs it; what the shell is told is the command's own exit code.
pub(crate) fn run(intent: &intent::Exec, out: &mut Out) -> Outcome<u8> {
    // Standard output belongs to the command.
    out.leave_stdout();
    for warning in &intent.warnings {
        out.warn("warning:", &printable(warning));
    }
    need_root()?;
    let signals = Signals::install_for_command()?;
    let mut failed = false;
    let outcome = hobble_attach::exec(
        &intent.options,
        |event| {
            failed |= matches!(event.kind, EventKind::Failed(_));
            out.event(event);
            if !out.is_json()
                && matches!(event.kind, EventKind::Injecting(_) | EventKind::Attached(_))
            {
                aside(
                    out,
                    render::event(event),
                    matches!(event.kind, EventKind::Injecting(_)),
                );
            }
        },
        || std::iter::from_fn(|| signals.take()).find(|&signal| !comes_from_terminal(signal)),
    );
    let outcome = outcome.map_err(|error| {
        let fail = Fail::from(error).exiting(EXEC_FAILED);
        if failed { fail.told() } else { fail }
    })?;
    if let Some(recovered) = outcome.recovered.filter(|_| !out.is_json()) {
        aside(out, render::counters(&recovered.rules), true);
    }
    Ok(outcome.code)
}

/// Prints to standard error; results only where they are wanted, warnings always.
fn aside(out: &mut Out, lines: Vec<Line>, results: bool) {
    for line in lines {
        match line {
            Line::Plain(text) if results => out.note("hobble:", &text),
            Line::Plain(_) => {}
            Line::Warning(text) => out.warn("warning:", &text),
            Line::Hint(text) => out.note("hint:", &text),
        }
    }
}
