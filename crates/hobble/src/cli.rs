//! What can be typed: the one table from which parsing, help, man pages and completions come.
//!
//! Nothing here has a meaning yet. Values that have a syntax of their own (durations, ids) are parsed on the way in; whether
//! they make sense together is decided by [`crate::intent`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum, ValueHint};
use hobble_api::exit::ExitCode;
use hobble_attach::DEFAULT_STATE_DIR;

/// Examples, and the exit codes from their own table.
fn after_help() -> String {
    let mut text = String::from(
        "\
Examples:
  hobble inject --pid 4242 --path /var/lib/db --fault 'latency=20ms op=fsync'
  hobble exec --path ./data --fault 'errno=EIO op=write percent=1' -- ./run-tests
  hobble ps
  hobble recover --all

Exit codes:",
    );
    for code in ExitCode::ALL {
        text.push_str(&format!("\n  {}  {}", code.code(), code.meaning()));
    }
    text
}

/// Make the storage of a running program slow, faulty or lying, and put everything back.
#[derive(Debug, Parser)]
#[command(name = "hobble", version, max_term_width = 100, after_help = after_help())]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Write results as JSON, one object a line
    #[arg(long, global = true, help_heading = "Common options")]
    pub(crate) json: bool,
    /// Directory of the attachments' journals and sockets
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "HOBBLE_STATE_DIR",
        hide_env_values = true,
        default_value = DEFAULT_STATE_DIR,
        value_hint = ValueHint::DirPath,
        help_heading = "Common options"
    )]
    pub(crate) state_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Inject(Inject),
    Exec(Exec),
    Ps(Ps),
    Show(Show),
    Update(Update),
    Pause(Pause),
    Resume(Resume),
    Renew(Renew),
    Recover(Recover),
    Events(Events),
    Check(Check),
    Doctor(Doctor),
    #[cfg(feature = "demo")]
    Demo(Demo),
    Completions(Completions),
    Man(Man),
}

/// The rules, wherever they come from.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RuleArgs {
    /// Read the specification from a YAML or JSON file, or from standard input with `-`
    #[arg(short = 'f', long = "file", value_name = "SPEC", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Add a rule, the fault first: 'latency=20ms op=fsync percent=10'; may be repeated, and comes after the rules of the
    /// file
    #[arg(long = "fault", value_name = "RULE")]
    pub(crate) faults: Vec<String>,
}

/// Inject faults into the filesystem of a running program.
///
/// Everything the target has open below PATH is moved onto a filesystem that asks the rules at every operation. Faults last
/// until Ctrl-C, until `--for` is over, or until `hobble recover`; then everything is put back. With `--detach` the command
/// returns once the faults are on.
///
/// Options override what the specification says about target, volume, scope, duration and seed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble inject --pid 4242 --path /var/lib/db --fault 'latency=20ms jitter=5ms op=fsync'
  hobble inject --pid 4242 --path /var/lib/db --fault 'errno=EIO op=write percent=1' --for 2m
  hobble inject -f experiment.yaml --dry-run
  hobble inject --pid 4242 --path /var/lib/db -f experiment.yaml --detach --json")]
pub(crate) struct Inject {
    /// The process to hit
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Option<i32>,
    /// Whom to hit [default: tree]
    #[arg(long, value_enum)]
    pub(crate) scope: Option<ScopeArg>,
    /// The directory or file to hook, as the target sees it
    #[arg(long, value_name = "PATH")]
    pub(crate) path: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) rules: RuleArgs,
    /// Attach without any rule; rules can come later with `hobble update`
    #[arg(long, conflicts_with = "faults")]
    pub(crate) no_rules: bool,
    /// Recover after this long (`90s`, `10m`, `1h30m`), or `forever` [default: 10m]
    #[arg(long = "for", value_name = "DURATION", allow_hyphen_values = true, value_parser = parse_lifetime)]
    pub(crate) lifetime: Option<LifetimeArg>,
    /// Seed of every random choice; drawn and printed when left out
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// Longest time the target may stand still in one go; beyond it everything is rolled back
    #[arg(long, value_name = "DURATION", default_value = "250ms", allow_hyphen_values = true, value_parser = parse_positive_duration)]
    pub(crate) max_pause: Duration,
    /// Recover unless `hobble renew` comes at least this often (`30s`, `5m`)
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, value_parser = parse_positive_duration)]
    pub(crate) lease: Option<Duration>,
    /// When the server is killed and another takes over: go on with the experiment, or recover
    #[arg(long, value_enum, default_value_t = FailoverArg::Continue)]
    pub(crate) failover: FailoverArg,
    /// Print the verdict, the plan and who is affected, and touch nothing
    #[arg(long, conflicts_with = "detach")]
    pub(crate) dry_run: bool,
    /// Return once the faults are on
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Run a command with faults below a directory.
///
/// The command is started in a mount namespace of its own, in which PATH is hooked; nobody else sees the hook, and nothing
/// has to be put back. Its exit code is handed on (128+n when signal n killed it); 125 means that Hobble failed, 126 that
/// the command cannot be executed, 127 that it was not found.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble exec --path /tmp/db --fault 'errno=ENOSPC op=write after=1000' -- ./fill-it-up
  hobble exec --path ./data -f experiment.yaml -- cargo test
  hobble exec --path ./data -- ./baseline")]
pub(crate) struct Exec {
    /// The directory to hook
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) path: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) rules: RuleArgs,
    /// Seed of every random choice; drawn and printed when left out
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, value_hint = ValueHint::CommandWithArguments)]
    pub(crate) command: Vec<OsString>,
}

/// List attachments.
#[derive(Debug, Args)]
pub(crate) struct Ps {}

/// An attachment, or the only one there is.
#[derive(Debug, Clone, Args)]
pub(crate) struct IdArg {
    /// The attachment (or the beginning of its id); may be left out when there is just one
    #[arg(value_name = "ID")]
    pub(crate) id: Option<String>,
}

/// Show one attachment with the counters of its rules.
#[derive(Debug, Args)]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) id: IdArg,
}

/// Replace the rules of an attachment.
///
/// The whole rule set is exchanged atomically, without detaching. Counters of rules that keep their name go on.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble update --fault 'latency=200ms op=fsync'
  hobble update k7mq2x9f -f experiment.yaml")]
pub(crate) struct Update {
    #[command(flatten)]
    pub(crate) id: IdArg,
    #[command(flatten)]
    pub(crate) rules: RuleArgs,
    /// Draw random choices from this seed from now on; the present one is kept when left out
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
}

/// Switch the rules of an attachment off for the time being.
#[derive(Debug, Args)]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) id: IdArg,
}

/// Switch the rules of an attachment on again.
#[derive(Debug, Args)]
pub(crate) struct Resume {
    #[command(flatten)]
    pub(crate) id: IdArg,
}

/// Renew the lease of an attachment: without that it recovers when the time of `inject --lease` is over.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble inject --pid 4242 --path /var/lib/db -f experiment.yaml --lease 1m --detach
  while sleep 20; do hobble renew; done")]
pub(crate) struct Renew {
    #[command(flatten)]
    pub(crate) id: IdArg,
}

/// Switch faults off and put everything back.
///
/// Works also when the server of the attachment is dead or the machine's Hobble was killed: what to undo is in the
/// attachment's journal.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble recover
  hobble recover k7mq2x9f
  hobble recover --all")]
pub(crate) struct Recover {
    #[command(flatten)]
    pub(crate) id: IdArg,
    /// Recover every attachment
    #[arg(long, conflicts_with = "id")]
    pub(crate) all: bool,
    /// Go on although something can then not be put back; what is left is listed
    #[arg(long)]
    pub(crate) force: bool,
}

/// Print what happened to an attachment.
#[derive(Debug, Args)]
pub(crate) struct Events {
    #[command(flatten)]
    pub(crate) id: IdArg,
    /// Wait for more until the attachment ends
    #[arg(long)]
    pub(crate) follow: bool,
}

/// Check a specification without touching anything.
///
/// Reports every mistake with its position and the nearest valid word. With `-o` the checked specification is written out,
/// which also converts between `--fault` strings, YAML and JSON.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble check experiment.yaml
  hobble check --fault 'latency=20ms op=fsync percent=10' -o yaml > experiment.yaml
  hobble check - -o json < experiment.yaml")]
pub(crate) struct Check {
    /// The specification, YAML or JSON; `-` is standard input
    #[arg(value_name = "SPEC", value_hint = ValueHint::FilePath, required_unless_present = "faults")]
    pub(crate) spec: Option<PathBuf>,
    /// Add a rule, the fault first; may be repeated, and comes after the rules of the file
    #[arg(long = "fault", value_name = "RULE")]
    pub(crate) faults: Vec<String>,
    /// Write the specification in this format instead of a summary
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<FormatArg>,
}

/// Check what this machine, and optionally a target, allow.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Also check this process
    #[arg(long, value_name = "PID", requires = "path", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Option<i32>,
    /// The directory or file to check, as the target sees it
    #[arg(long, value_name = "PATH", requires = "pid")]
    pub(crate) path: Option<PathBuf>,
}

/// Hook a live SQLite database, break it on purpose, and prove that nothing was lost.
///
/// Starts a program that commits to a fresh SQLite database all the while, attaches to it while it runs, delays its syncs,
/// fails its writes, recovers, and counts its rows. Needs root; takes less than a minute; leaves nothing behind.
#[cfg(feature = "demo")]
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Where to make the fresh directory of the database [default: the first disk-backed one of $TMPDIR, /var/tmp, the
    /// current directory, /tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
    /// Length of each of the five phases
    #[arg(long, value_name = "DURATION", default_value = "5s", allow_hyphen_values = true, value_parser = parse_positive_duration)]
    pub(crate) phase: Duration,
    /// Seed of the injected errors
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub(crate) seed: u64,
}

/// The program that the demo hooks: commits one row after the other to a SQLite database and watches itself.
///
/// Prints one line a second until it is interrupted, then how many rows it committed and how many it found. A command of
/// its own, outside the table: nobody but the demo and those who repeat it by hand needs it.
#[cfg(feature = "demo")]
#[derive(Debug, Parser)]
#[command(name = "hobble demo-writer", version, max_term_width = 100)]
pub(crate) struct DemoWriter {
    /// The directory of the database; it is made when it is missing
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Take orders from standard input and answer in JSON
    #[arg(long, hide = true)]
    pub(crate) driven: bool,
}

/// Print the completion script of a shell.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble completions bash > /etc/bash_completion.d/hobble
  hobble completions zsh > ~/.zfunc/_hobble
  hobble completions fish > ~/.config/fish/completions/hobble.fish")]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Write the man pages into a directory.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hobble man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// The directory; it is made when it is missing
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
}

/// `--scope`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FailoverArg {
    /// The experiment goes on
    Continue,
    /// The target is recovered
    Recover,
}

impl From<FailoverArg> for hobble_attach::Failover {
    fn from(arg: FailoverArg) -> Self {
        match arg {
            FailoverArg::Continue => Self::Continue,
            FailoverArg::Recover => Self::Recover,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScopeArg {
    /// The process and its descendants, those made later included
    Tree,
    /// Every process in the target's mount namespace
    Namespace,
}

/// `-o` of `check`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// YAML, the form of the documentation
    Yaml,
    /// JSON
    Json,
}

/// `--for`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LifetimeArg {
    /// This long.
    For(Duration),
    /// Until somebody recovers.
    Forever,
}

/// A duration with a unit, above zero.
pub(crate) fn parse_positive_duration(text: &str) -> Result<Duration, String> {
    if text.trim_start().starts_with('-') {
        return Err("must not be negative".to_owned());
    }
    let duration = humantime::parse_duration(text.trim())
        .map_err(|error| format!("{error}; write it like `250ms`, `90s` or `1h30m`"))?;
    if duration.is_zero() {
        return Err("must be longer than zero".to_owned());
    }
    Ok(duration)
}

/// A duration or the word `forever`.
fn parse_lifetime(text: &str) -> Result<LifetimeArg, String> {
    if text.trim() == "forever" {
        return Ok(LifetimeArg::Forever);
    }
    parse_positive_duration(text)
        .map(LifetimeArg::For)
        .map_err(|error| format!("{error}, or `forever`"))
}

/// The table itself, for help, man pages and completions.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn lifetimes() {
        assert_eq!(parse_lifetime("forever"), Ok(LifetimeArg::Forever));
        assert_eq!(
            parse_lifetime("1h30m"),
            Ok(LifetimeArg::For(Duration::from_secs(5400)))
        );
        assert_eq!(
            parse_lifetime("250ms"),
            Ok(LifetimeArg::For(Duration::from_millis(250)))
        );
        for wrong in [
            "",
            "0s",
            "-5s",
            "10",
            "ten minutes",
            "for ever",
            "5 parsecs",
        ] {
            let error = parse_lifetime(wrong).unwrap_err();
            assert!(error.ends_with(", or `forever`"), "{wrong}: {error}");
        }
    }

    #[test]
    fn what_follows_the_command_of_exec_belongs_to_it() {
        let cli =
            Cli::try_parse_from(["hobble", "exec", "--path", "/d", "--", "ls", "--json", "-f"])
                .unwrap();
        let Command::Exec(exec) = cli.command else {
            panic!("not exec")
        };
        assert_eq!(exec.command, ["ls", "--json", "-f"]);
        assert!(!cli.global.json);
        let cli = Cli::try_parse_from(["hobble", "exec", "--path", "/d", "ls", "--json"]).unwrap();
        assert!(!cli.global.json);
        // An option that `exec` does not have is no command.
        let words = ["hobble", "exec", "--path", "/d", "--for", "1s", "--", "ls"];
        let error = Cli::try_parse_from(words).unwrap_err();
        assert_eq!(error.kind(), clap::error::ErrorKind::UnknownArgument);
    }

    #[test]
    fn common_options_stand_before_or_after_the_command() {
        for words in [["hobble", "--json", "ps"], ["hobble", "ps", "--json"]] {
            assert!(Cli::try_parse_from(words).unwrap().global.json);
        }
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        for words in [
            &[
                "hobble",
                "inject",
                "--pid",
                "1",
                "--path",
                "/d",
                "--no-rules",
                "--fault",
                "errno=EIO",
            ][..],
            &[
                "hobble",
                "inject",
                "--pid",
                "0",
                "--path",
                "/d",
                "--no-rules",
            ],
            &["hobble", "inject", "--pid", "1", "--dry-run", "--detach"],
            &["hobble", "recover", "a", "--all"],
            &["hobble", "check"],
            &["hobble", "doctor", "--pid", "1"],
            &["hobble", "exec", "--path", "/d"],
        ] {
            assert!(Cli::try_parse_from(words).is_err(), "{words:?}");
        }
    }
}
