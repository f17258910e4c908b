//! What was typed, understood: the second of the two stages between the command line and an action.
//!
//! Invariant: an intent is complete and free of contradiction; carrying it out needs nothing more from the command line.

use std::path::{Path, PathBuf};

use hobble_attach::{ExecOptions, InjectOptions, Lifetime, Scope};
use hobble_rules::spec::Document;
use hobble_rules::{Experiment, RunFor};

use crate::cli::{self, Global, LifetimeArg, ScopeArg};
use crate::experiment::{self, Loaded, mistake};
use crate::fail::{Fail, Outcome};

/// `hobble inject`.
#[derive(Debug)]
pub(crate) struct Inject {
    /// What is to be attached.
    pub(crate) options: InjectOptions,
    /// Judge and print only.
    pub(crate) dry_run: bool,
    /// What the user should know before it happens.
    pub(crate) warnings: Vec<String>,
}

/// `hobble exec`.
#[derive(Debug)]
pub(crate) struct Exec {
    /// What is to be run.
    pub(crate) options: ExecOptions,
    /// What the user should know before it happens.
    pub(crate) warnings: Vec<String>,
}

/// `hobble update`.
#[derive(Debug)]
pub(crate) struct Update {
    /// The new rules.
    pub(crate) document: Document,
    /// A new seed: that of the command line, else that of the specification.
    pub(crate) seed: Option<u64>,
    /// What the user should know before it happens.
    pub(crate) warnings: Vec<String>,
}

const EXAMPLE_HINT: &str =
    "for example --fault 'latency=20ms op=fsync'; `hobble check` explains rules";

fn warnings(loaded: Option<&Loaded>) -> Vec<String> {
    let Some(loaded) = loaded else {
        return Vec::new();
    };
    loaded
        .experiment
        .warnings()
        .iter()
        .map(|warning| {
            let mistake = mistake(&(loaded.source.clone(), warning.clone()));
            match mistake.hint {
                Some(hint) => format!("{} ({hint})", mistake.text),
                None => mistake.text,
            }
        })
        .collect()
}

/// The volume: the option, else what the specification says.
fn volume(option: Option<&Path>, experiment: Option<&Experiment>) -> Outcome<PathBuf> {
    option
        .or_else(|| experiment.and_then(Experiment::volume))
        .map(Path::to_path_buf)
        .ok_or_else(|| {
            Fail::usage("no volume")
                .hint("say which directory with --path, or with `volume:` in the specification")
        })
}

/// The document with what the options override put in, so that it says what happens.
fn overridden(loaded: Loaded, path: &Path, seed: Option<u64>) -> Document {
    let mut document = loaded.document;
    // A name that is not UTF-8 cannot be written in a document; the options carry it.
    if let Some(path) = path.to_str() {
        document.volume = Some(path.to_owned());
    }
    document.seed = seed;
    document
}

impl Inject {
    /// Reads the specification and settles who says what.
    pub(crate) fn from_args(args: &cli::Inject, global: &Global) -> Outcome<Self> {
        let loaded = experiment::load(args.rules.file.as_deref(), &args.rules.faults)?;
        let experiment = loaded.as_ref().map(|loaded| &loaded.experiment);
        let pid = match (args.pid, experiment.and_then(Experiment::target)) {
            (Some(pid), _) => pid,
            (None, Some(target)) => i32::try_from(target.pid)
                .map_err(|_| Fail::usage(format!("target.pid: {} is no process id", target.pid)))?,
            (None, None) => {
                return Err(Fail::usage("no target")
                    .hint("say which process with --pid, or with `target: { pid: … }` in the specification"));
            }
        };
        let path = volume(args.path.as_deref(), experiment)?;
        if !path.is_absolute() {
            return Err(
                Fail::usage(format!("--path {} is relative", path.display()))
                    .hint("give the absolute path as the target sees it"),
            );
        }
        if !args.no_rules && experiment.is_none_or(|experiment| experiment.rules().is_empty()) {
            return Err(Fail::usage("no rule: nothing would be injected")
                .hint(format!("{EXAMPLE_HINT}; --no-rules attaches without any")));
        }
        let mut options = InjectOptions::new(pid, path.clone());
        options.scope = match (args.scope, experiment.and_then(Experiment::scope)) {
            (Some(ScopeArg::Tree), _) | (None, Some(hobble_rules::Scope::Tree) | None) => {
                Scope::Tree
            }
            (Some(ScopeArg::Namespace), _) | (None, Some(hobble_rules::Scope::Namespace)) => {
                Scope::Namespace
            }
        };
        options.lifetime = match (args.lifetime, experiment.and_then(Experiment::duration)) {
            (Some(LifetimeArg::For(time)), _) | (None, Some(RunFor::Time(time))) => {
                Lifetime::For(time)
            }
            (Some(LifetimeArg::Forever), _) | (None, Some(RunFor::Forever)) => Lifetime::Forever,
            (None, None) => Lifetime::default(),
        };
        options.seed = args.seed.or_else(|| experiment.and_then(Experiment::seed));
        options.max_pause = args.max_pause;
        options.failover = args.failover.into();
        options.lease = args.lease;
        options.state_dir.clone_from(&global.state_dir);
        options.detach = args.detach;
        let warnings = if args.no_rules {
            Vec::new()
        } else {
            warnings(loaded.as_ref())
        };
        let seed = options.seed;
        options.document = loaded
            .filter(|_| !args.no_rules)
            .map(|loaded| overridden(loaded, &path, seed));
        Ok(Self {
            options,
            dry_run: args.dry_run,
            warnings,
        })
    }
}

impl Exec {
    /// Reads the specification and settles who says what.
    pub(crate) fn from_args(args: &cli::Exec, global: &Global) -> Outcome<Self> {
        let loaded = experiment::load(args.rules.file.as_deref(), &args.rules.faults)?;
        let experiment = loaded.as_ref().map(|loaded| &loaded.experiment);
        let path = volume(args.path.as_deref(), experiment)?;
        let path = std::path::absolute(&path).map_err(|error| {
            Fail::failed(anyhow::Error::new(error).context(format!("--path {}", path.display())))
        })?;
        let warnings = warnings(loaded.as_ref());
        let seed = args.seed.or_else(|| experiment.and_then(Experiment::seed));
        let options = ExecOptions {
            document: loaded
                .filter(|loaded| !loaded.experiment.rules().is_empty())
                .map(|loaded| overridden(loaded, &path, seed)),
            path,
            seed,
            state_dir: global.state_dir.clone(),
            command: args.command.clone(),
            server_program: None,
        };
        Ok(Self { options, warnings })
    }
}

impl Update {
    /// Reads the specification.
    pub(crate) fn from_args(args: &cli::Update) -> Outcome<Self> {
        let Some(loaded) = experiment::load(args.rules.file.as_deref(), &args.rules.faults)? else {
            return Err(
                Fail::usage("no rules to put in force").hint(format!("-f SPEC, or {EXAMPLE_HINT}"))
            );
        };
        let warnings = warnings(Some(&loaded));
        let seed = args.seed.or_else(|| loaded.experiment.seed());
        Ok(Self {
            document: loaded.document,
            seed,
            warnings,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser as _;
    use std::time::Duration;

    const SPEC: &str = "version: 1\nvolume: /data\ntarget: { pid: 7 }\nscope: namespace\nduration: 5m\nseed: 42\n\
                        rules:\n  - name: slow\n    op: [fsync]\n    fault: { latency: 20ms }\n";

    fn spec() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SPEC).unwrap();
        file
    }

    fn inject(words: &[&str]) -> Outcome<Inject> {
        let cli = Cli::try_parse_from([&["hobble", "inject"], words].concat()).unwrap();
        let Command::Inject(args) = &cli.command else {
            panic!("not inject")
        };
        Inject::from_args(args, &cli.global)
    }

    fn refusal(words: &[&str]) -> String {
        format!("{:?}", inject(words).unwrap_err())
    }

    #[test]
    fn a_specification_alone_is_enough() {
        let file = spec();
        let options = inject(&["-f", file.path().to_str().unwrap()])
            .unwrap()
            .options;
        assert_eq!(options.pid, 7);
        assert_eq!(options.path, Path::new("/data"));
        assert_eq!(options.scope, Scope::Namespace);
        assert_eq!(options.lifetime, Lifetime::For(Duration::from_secs(300)));
        assert_eq!(options.seed, Some(42));
        assert_eq!(options.document.unwrap().rules.len(), 1);
    }

    #[test]
    fn options_override_and_faults_are_added() {
        let file = spec();
        let file = file.path().to_str().unwrap();
        let options = inject(&[
            "-f",
            file,
            "--pid",
            "8",
            "--path",
            "/other",
            "--scope",
            "tree",
            "--for",
            "forever",
            "--seed",
            "1",
            "--fault",
            "errno=EIO op=write",
            "--max-pause",
            "10ms",
            "--detach",
            "--state-dir",
            "/state",
        ])
        .unwrap()
        .options;
        assert_eq!(options.pid, 8);
        assert_eq!(options.path, Path::new("/other"));
        assert_eq!(options.scope, Scope::Tree);
        assert_eq!(options.lifetime, Lifetime::Forever);
        assert_eq!(options.seed, Some(1));
        assert_eq!(options.max_pause, Duration::from_millis(10));
        assert!(options.detach);
        assert_eq!(options.state_dir, Path::new("/state"));
        let document = options.document.unwrap();
        assert_eq!(document.rules.len(), 2);
        assert_eq!(document.volume.as_deref(), Some("/other"));
        assert_eq!(document.seed, Some(1));
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let options = inject(&[
            "--pid",
            "8",
            "--path",
            "/d",
            "--fault",
            "errno=EIO op=write",
        ])
        .unwrap()
        .options;
        assert_eq!(options.scope, Scope::Tree);
        assert_eq!(options.lifetime, Lifetime::For(Duration::from_secs(600)));
        assert_eq!(options.seed, None);
        assert_eq!(options.max_pause, Duration::from_millis(250));
    }

    #[test]
    fn no_rules_drops_those_of_the_specification() {
        let file = spec();
        let intent = inject(&["-f", file.path().to_str().unwrap(), "--no-rules"]).unwrap();
        assert!(intent.options.document.is_none());
        assert!(
            inject(&["--pid", "8", "--path", "/d", "--no-rules"])
                .unwrap()
                .options
                .document
                .is_none()
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(refusal(&["--path", "/d", "--no-rules"]).contains("no target"));
        assert!(refusal(&["--pid", "8", "--no-rules"]).contains("no volume"));
        assert!(refusal(&["--pid", "8", "--path", "/d"]).contains("no rule"));
        assert!(refusal(&["--pid", "8", "--path", "d", "--no-rules"]).contains("relative"));
        for words in [
            &["--path", "/d", "--no-rules"][..],
            &["--pid", "8", "--path", "/d"],
        ] {
            assert_eq!(inject(words).unwrap_err().code(), 2);
        }
    }

    #[test]
    fn every_mistake_is_reported_and_is_a_usage_error() {
        let fail = inject(&[
            "--pid",
            "8",
            "--path",
            "/d",
            "--fault",
            "errno=EIOO",
            "--fault",
            "latency=-3s op=wirte",
        ])
        .unwrap_err();
        assert_eq!(fail.code(), 2);
        let text = format!("{fail:?}");
        assert!(
            text.contains("--fault 1") && text.contains("--fault 2"),
            "{text}"
        );
        assert!(
            inject(&["--pid", "8", "-f", "/nonexistent/spec.yaml"])
                .unwrap_err()
                .code()
                == 1
        );
    }

    #[test]
    fn exec_takes_relative_directories_and_runs_without_rules() {
        let cli = Cli::try_parse_from(["hobble", "exec", "--path", "data", "--", "true"]).unwrap();
        let Command::Exec(args) = &cli.command else {
            panic!("not exec")
        };
        let options = Exec::from_args(args, &cli.global).unwrap().options;
        assert!(options.path.is_absolute() && options.path.ends_with("data"));
        assert!(options.document.is_none());
        assert_eq!(options.command, ["true"]);
    }
}
