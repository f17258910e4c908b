//! The `hobble` command: faults in the filesystem of a running program, and everything put back.
//!
//! Two stages: [`cli`] says what can be typed, [`intent`] what it means; [`command`] carries it out through `hobble-attach`.
//! This crate knows nothing of wire formats and ptrace. Standard output carries results only (see [`out`]), and every
//! failure goes through [`fail`], which keeps the table of exit codes.

mod cli;
mod command;
#[cfg(feature = "demo")]
mod demo;
mod experiment;
mod fail;
mod intent;
mod out;
mod render;
mod signals;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};
use fail::Outcome;
use out::Out;

fn main() -> ExitCode {
    if let Some(code) = inner_command() {
        return ExitCode::from(code);
    }
    log("warn");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Broken standard streams change nothing about the outcome.
            let _ = error.print();
            let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
            return match error.exit_code() {
                0 => ExitCode::SUCCESS,
                _ if is_exec(&arguments) => ExitCode::from(hobble_api::exit::EXEC_FAILED),
                _ => ExitCode::from(hobble_api::exit::ExitCode::Usage.code()),
            };
        }
    };
    let mut out = Out::new(cli.global.json);
    let code = match dispatch(&cli, &mut out) {
        Ok(code) => code,
        Err(fail) => {
            fail.report(&mut out);
            fail.code()
        }
    };
    drop(out);
    ExitCode::from(code)
}

/// Logs go to standard error; `HOBBLE_LOG` says what is logged (`debug`, `hobble_attach=trace`, ...).
fn log(default: &str) {
    let filter = EnvFilter::try_from_env("HOBBLE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // Told on standard error, which panics when that is what failed: a full disk must not end the server.
        .log_internal_errors(false)
        .init();
}

/// Whether a command line that could not be parsed was meant for `exec`, whose small exit codes belong to its command.
fn is_exec(arguments: &[OsString]) -> bool {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--state-dir") => drop(arguments.next()),
            Some(option) if option.starts_with('-') => {}
            Some(command) => return command == "exec",
            None => return false,
        }
    }
    false
}

/// What Hobble starts itself. Handled before anything else, for the holder forks and must be alone in its process.
fn inner_command() -> Option<u8> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let (name, rest) = match arguments.as_slice() {
        [_, name, rest @ ..] => (name.to_str()?, rest),
        _ => return None,
    };
    match name {
        hobble_attach::SERVE_ARGUMENT => {
            log("info");
            // Exit statuses of the holder are small; anything else is a failure.
            Some(u8::try_from(hobble_attach::serve_entry()).unwrap_or(1))
        }
        hobble_attach::LAUNCH_ARGUMENT => Some(hobble_attach::launch_entry(rest)),
        "__fault-points" => {
            let mut out = Out::new(false);
            for point in hobble_attach::fault_point::POINTS {
                out.line(point);
            }
            Some(0)
        }
        #[cfg(feature = "demo")]
        "demo-writer" => {
            let args = cli::DemoWriter::parse_from(arguments.iter().skip(1));
            let mut out = Out::new(false);
            Some(match demo::run_writer(&args, &mut out) {
                Ok(()) => 0,
                Err(fail) => {
                    fail.report(&mut out);
                    fail.code()
                }
            })
        }
        _ => None,
    }
}

/// Turns what was typed into an intent, and carries it out.
fn dispatch(cli: &Cli, out: &mut Out) -> Outcome<u8> {
    let global = &cli.global;
    match &cli.command {
        Command::Inject(args) => {
            command::inject::run(&intent::Inject::from_args(args, global)?, out)?
        }
        Command::Exec(args) => {
            let failed = |fail: fail::Fail| fail.exiting(hobble_api::exit::EXEC_FAILED);
            let intent = intent::Exec::from_args(args, global).map_err(failed)?;
            return command::exec::run(&intent, out).map_err(failed);
        }
        Command::Ps(_) => command::list::ps(global, out)?,
        Command::Show(args) => command::list::show(args, global, out)?,
        Command::Update(args) => {
            command::control::update(&args.id, intent::Update::from_args(args)?, global, out)?;
        }
        Command::Pause(args) => command::control::pause(&args.id, global, out)?,
        Command::Resume(args) => command::control::resume(&args.id, global, out)?,
        Command::Renew(args) => command::control::renew(&args.id, global, out)?,
        Command::Recover(args) => command::recover::run(args, global, out)?,
        Command::Events(args) => command::control::events(args, global, out)?,
        Command::Check(args) => command::check::run(args, out)?,
        Command::Doctor(args) => command::doctor::run(args, out)?,
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::run(args, global, out)?,
        Command::Completions(args) => command::generate::completions(args, out),
        Command::Man(args) => command::generate::man(args, out)?,
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_is_found_behind_common_options() {
        let is_exec =
            |words: &[&str]| super::is_exec(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(is_exec(&["exec"]) && is_exec(&["--json", "--state-dir", "ps", "exec", "--nope"]));
        assert!(is_exec(&["--state-dir=x", "exec"]));
        assert!(!is_exec(&["ps", "exec"]) && !is_exec(&["--state-dir", "exec"]) && !is_exec(&[]));
    }
}
