//! The target programs: their sources, and how each becomes something that runs.
//!
//! Owns the build directory `<target dir>/testkit`. Invariant: a compiled program's path holds the hash of its
//! source, and appears by rename only, so tests that run at once share it and never see half of one.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::command;

/// Compiling the largest of them takes a few seconds; Go builds its standard library on first use.
const LIMIT: Duration = Duration::from_secs(240);

/// A target program. What each does is said at the head of its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Many descriptors, all the while in use, in C.
    FilesC,
    /// The same in Python.
    FilesPython,
    /// The same in Go.
    FilesGo,
    /// The same in Java.
    FilesJava,
    /// Operations on demand, counted and timed.
    Ops,
    /// What must not be done twice, all the while, without forgiving an error.
    Once,
    /// Dirtied private and shared mappings.
    Maps,
    /// Holds locks.
    Locks,
    /// Tries to take somebody else's locks.
    Outsider,
    /// One state of a live program, looked at step by step.
    States,
    /// Threads on a pool of SQLite connections.
    SqlitePool,
    /// Timers, stops and the calls that the kernel does not restart.
    Signals,
    /// Traces another process.
    Tracer,
    /// A 32-bit program that only waits.
    Pause32,
}

/// What every program in C begins with.
const COMMON: &str = include_str!("../targets/common.h");

enum Build {
    C {
        source: &'static str,
        flags: &'static [&'static str],
    },
    Go {
        source: &'static str,
    },
    Script {
        source: &'static str,
        name: &'static str,
        interpreter: &'static [&'static str],
    },
}

impl Program {
    fn build(self) -> (&'static str, Build) {
        const THREADS: &[&str] = &["-pthread"];
        let c = |source, flags| Build::C { source, flags };
        match self {
            Program::FilesC => ("files", c(include_str!("../targets/files.c"), THREADS)),
            Program::FilesPython => (
                "files.py",
                Build::Script {
                    source: include_str!("../targets/files.py"),
                    name: "files.py",
                    interpreter: &["python3"],
                },
            ),
            Program::FilesGo => (
                "files-go",
                Build::Go {
                    source: include_str!("../targets/files.go"),
                },
            ),
            Program::FilesJava => (
                "Files.java",
                Build::Script {
                    source: include_str!("../targets/Files.java"),
                    name: "Files.java",
                    interpreter: &["java", "-XX:+UseSerialGC", "-Xmx256m"],
                },
            ),
            Program::Ops => ("ops", c(include_str!("../targets/ops.c"), THREADS)),
            Program::Maps => ("maps", c(include_str!("../targets/maps.c"), THREADS)),
            Program::Locks => ("locks", c(include_str!("../targets/locks.c"), THREADS)),
            Program::Once => ("once", c(include_str!("../targets/once.c"), THREADS)),
            Program::Outsider => (
                "outsider",
                c(include_str!("../targets/outsider.c"), THREADS),
            ),
            Program::States => (
                "states.py",
                Build::Script {
                    source: include_str!("../targets/states.py"),
                    name: "states.py",
                    interpreter: &["python3"],
                },
            ),
            Program::SqlitePool => (
                "sqlite_pool.py",
                Build::Script {
                    source: include_str!("../targets/sqlite_pool.py"),
                    name: "sqlite_pool.py",
                    interpreter: &["python3"],
                },
            ),
            Program::Signals => ("signals", c(include_str!("../targets/signals.c"), THREADS)),
            Program::Tracer => ("tracer", c(include_str!("../targets/tracer.c"), &[])),
            Program::Pause32 => (
                "pause32",
                c(
                    include_str!("../targets/pause32.S"),
                    &["-m32", "-nostdlib", "-static", "-x", "assembler-with-cpp"],
                ),
            ),
        }
    }

    /// The command that runs it, compiled first where needed; arguments are for the caller to add.
    ///
    /// # Errors
    /// When a compiler or interpreter is missing, or the source does not compile.
    pub fn command(self) -> Result<Command> {
        let (name, build) = self.build();
        match build {
            Build::Script {
                source,
                name,
                interpreter,
            } => {
                let path = put(&[source], name, |place| {
                    fs::write(place, source).context("cannot write a script")
                })?;
                let (program, arguments) = interpreter
                    .split_first()
                    .context("a script needs an interpreter")?;
                let found = command::find(program)
                    .with_context(|| format!("no {program}: run `cargo xtask setup`"))?;
                let mut command = Command::new(found);
                command.args(arguments).arg(path);
                Ok(command)
            }
            Build::C { source, flags } => {
                let path = put(&[COMMON, source], name, |place| {
                    let input = place.with_extension("c");
                    // Assembler needs nothing of it, and would not read it.
                    let common = if flags.contains(&"-m32") { "" } else { COMMON };
                    fs::write(&input, format!("{common}\n#line 1 \"{name}.c\"\n{source}"))
                        .context("cannot write a source")?;
                    // -Werror: a warning in a target program is a bug in a test.
                    command::run(
                        Command::new("cc")
                            .args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"])
                            .args(flags)
                            .arg(&input)
                            .arg("-o")
                            .arg(place),
                        LIMIT,
                    )?;
                    fs::remove_file(&input).context("cannot remove a source")
                })?;
                Ok(Command::new(path))
            }
            Build::Go { source } => {
                let path = put(&[source], name, |place| {
                    let input = place.with_extension("go");
                    fs::write(&input, source).context("cannot write a source")?;
                    let go = command::find("go").context("no go: run `cargo xtask setup`")?;
                    command::run(
                        Command::new(go)
                            .args(["build", "-o"])
                            .arg(place)
                            .arg(&input)
                            .env("GO111MODULE", "off")
                            .env("GOFLAGS", "")
                            .env("GOCACHE", directory()?.join("go-cache")),
                        LIMIT,
                    )?;
                    fs::remove_file(&input).context("cannot remove a source")
                })?;
                Ok(Command::new(path))
            }
        }
    }
}

/// Cargo's target directory: `$CARGO_TARGET_DIR`, or the workspace's.
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The root of the workspace that this crate was built in.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

fn directory() -> Result<PathBuf> {
    let directory = target_directory().join("testkit");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// `<target dir>/testkit/<hash>/<name>`, made by `make` when it is not there.
fn put(sources: &[&str], name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (sources, name, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    let home = directory()?.join(format!("{:016x}", hasher.finish()));
    let path = home.join(name);
    if !path.exists() {
        fs::create_dir_all(&home).context("cannot make a build directory")?;
        // Java wants its own file name, so what is unfinished lies in a directory of its own.
        let work = tempfile::tempdir_in(&home).context("cannot make a build directory")?;
        let draft = work.path().join(name);
        make(&draft)?;
        fs::rename(&draft, &path)
            .with_context(|| format!("cannot put {} in place", path.display()))?;
    }
    Ok(path)
}
