//! `hobble completions` and `hobble man`: made from the table of [`crate::cli`] on demand, so that they cannot drift.

use crate::cli::{self, Completions, Man};
use crate::fail::{Fail, Outcome};
use crate::out::Out;

/// The completion script on standard output, whatever the mode.
pub(crate) fn completions(args: &Completions, out: &mut Out) {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::command(), "hobble", &mut script);
    out.raw(String::from_utf8_lossy(&script).trim_end());
}

/// One page for the program and one for each command.
pub(crate) fn man(args: &Man, out: &mut Out) -> Outcome<()> {
    let failed = |error: std::io::Error| {
        Fail::failed(
            anyhow::Error::new(error)
                .context(format!("cannot write man pages to {}", args.dir.display())),
        )
    };
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    clap_mangen::generate_to(cli::command().disable_help_subcommand(true), &args.dir)
        .map_err(failed)?;
    out.line(format!("wrote man pages to {}", args.dir.display()));
    Ok(())
}
