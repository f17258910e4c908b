//! Where the external test suites live, and how the binaries under test are built.
//!
//! Owns `<target dir>/tools`, where `setup` installs to; `$HOBBLE_TOOLS` overrides it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hobble_testkit::command;
use hobble_testkit::program::{target_directory, workspace};

/// Building the workspace from nothing on two cores takes a few minutes.
pub(crate) const BUILD_LIMIT: Duration = Duration::from_secs(10 * 60);

/// The directory of the installed suites' binaries.
pub(crate) fn directory() -> PathBuf {
    std::env::var_os("HOBBLE_TOOLS")
        .map_or_else(|| target_directory().join("tools/bin"), PathBuf::from)
}

/// An installed suite.
///
/// # Errors
/// When it is not there.
pub(crate) fn suite(name: &str) -> Result<PathBuf> {
    let path = directory().join(name);
    if !path.is_file() {
        bail!("no {}: run `cargo xtask setup`", path.display());
    }
    Ok(path)
}

/// `cargo` as it was called, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // What `cargo run` set for this program is not meant for what it starts: it would rebuild crates whose build
    // scripts look at it.
    for name in [
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_PATH",
        "CARGO_PKG_NAME",
        "CARGO_PKG_VERSION",
        "CARGO_PRIMARY_PACKAGE",
    ] {
        command.env_remove(name);
    }
    command
}

/// The binary under test: `$HOBBLE_BIN`, or built.
///
/// # Errors
/// When it does not build.
pub(crate) fn hobble(release: bool) -> Result<PathBuf> {
    match std::env::var_os("HOBBLE_BIN") {
        Some(given) => std::fs::canonicalize(&given).context("HOBBLE_BIN names no file"),
        None => build_hobble(release),
    }
}

/// Builds `hobble` with the demo and returns its path.
///
/// # Errors
/// When it does not build.
pub(crate) fn build_hobble(release: bool) -> Result<PathBuf> {
    let mut build = cargo();
    build.args([
        "build",
        "--quiet",
        "--locked",
        "--package",
        "hobble",
        "--features",
        "hobble/demo",
    ]);
    if release {
        build.arg("--release");
    }
    command::run(&mut build, BUILD_LIMIT)?;
    let path = target_directory()
        .join(if release { "release" } else { "debug" })
        .join("hobble");
    std::fs::canonicalize(&path).with_context(|| format!("cargo built no {}", path.display()))
}
