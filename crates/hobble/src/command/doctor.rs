//! `hobble doctor`: what this machine, and perhaps one target, allow.

use hobble_api::status::CheckOutcome;

use crate::cli::Doctor;
use crate::fail::{Fail, Outcome};
use crate::out::{Out, Style, printable};

/// Prints every check; fails when one of them does.
pub(crate) fn run(args: &Doctor, out: &mut Out) -> Outcome<()> {
    let target = args.pid.zip(args.path.as_deref());
    let checks = hobble_attach::doctor(target);
    let width = checks
        .iter()
        .map(|check| check.name.chars().count())
        .max()
        .unwrap_or(0);
    for check in &checks {
        out.object(check);
        let style = match check.outcome {
            CheckOutcome::Ok => Style::Good,
            CheckOutcome::Warn => Style::Warn,
            CheckOutcome::Fail => Style::Bad,
        };
        let mark = out.paint(style, &format!("{:<4}", check.outcome.as_str()));
        out.line(format!(
            "{mark}  {:<width$}  {}",
            printable(&check.name),
            printable(&check.text)
        ));
        if let Some(hint) = &check.hint {
            out.line(format!(
                "{:width$}hint: {}",
                "",
                printable(hint),
                width = width + 8
            ));
        }
    }
    let failed: Vec<&str> = checks
        .iter()
        .filter(|check| check.outcome == CheckOutcome::Fail)
        .map(|check| check.name.as_str())
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Fail::failed(anyhow::anyhow!(
        "Hobble cannot work here: {}",
        failed.join(", ")
    ))
    .step("preflight")
    .told())
}
