//! `hobble ps` and `hobble show`.

use std::time::Duration;

use hobble_api::Timestamp;
use hobble_api::exit::ExitCode;
use hobble_attach::Client;
use serde::Serialize;

use crate::cli::{Global, Show};
use crate::command::{need_root, print, resolve};
use crate::fail::{Fail, Outcome};
use crate::out::{Out, printable};
use crate::render;

/// How long an attachment that has said goodbye may take to be gone.
const ENDING: Duration = Duration::from_millis(300);

/// What JSON says of an attachment that does not answer.
#[derive(Serialize)]
struct Lost<'a> {
    id: &'a str,
    phase: &'static str,
    cause: String,
    hint: Option<&'a str>,
}

/// Every attachment. One that is lost makes the exit code say that recovery is needed.
pub(crate) fn ps(global: &Global, out: &mut Out) -> Outcome<()> {
    need_root()?;
    let mut listed = hobble_attach::list(&global.state_dir)?;
    if listed.iter().any(|attachment| attachment.status.is_err()) {
        // One that ended while it was asked is neither lost nor there.
        std::thread::sleep(ENDING);
        let ids = hobble_attach::ids(&global.state_dir)?;
        listed.retain(|attachment| attachment.status.is_ok() || ids.contains(&attachment.id));
    }
    let mut lost = Vec::new();
    for attachment in &listed {
        match &attachment.status {
            Ok(status) => out.object(status),
            Err(error) => {
                lost.push(attachment.id.as_str());
                out.warn("warning:", &printable(&full_cause(error)));
                out.object(&Lost {
                    id: &attachment.id,
                    phase: "lost",
                    cause: full_cause(error),
                    hint: error.hint(),
                });
            }
        }
    }
    if listed.is_empty() {
        out.line("nothing is attached");
    } else {
        let rows = listed
            .iter()
            .map(|attachment| (attachment.id.as_str(), attachment.status.as_deref().ok()));
        for line in render::list(rows, Timestamp::now()) {
            out.line(line);
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    Err(
        Fail::failed(anyhow::anyhow!("not answering: {}", lost.join(", ")))
            .step("control")
            .hint("`hobble recover --all` puts back what is left of them")
            .exiting(ExitCode::NeedsRecovery.code())
            .told(),
    )
}

fn full_cause(error: &hobble_attach::AttachError) -> String {
    let chain = error.cause_chain();
    if chain.is_empty() {
        error.to_string()
    } else {
        format!("{error}: {chain}")
    }
}

/// One attachment.
pub(crate) fn show(args: &Show, global: &Global, out: &mut Out) -> Outcome<()> {
    let id = resolve(&global.state_dir, args.id.id.as_deref())?;
    let status = Client::open(&global.state_dir, &id)?.status()?;
    out.object(&status);
    print(out, render::status(&status, Timestamp::now()));
    Ok(())
}
