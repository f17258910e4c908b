//! `cargo xtask setup`: what the tests need beyond Rust and a C compiler.
//!
//! Invariant: what is there is left alone, so a second run changes nothing and needs no network.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hobble_testkit::command;
use hobble_testkit::program::target_directory;

use crate::tools;

/// Commands that the tests call, and the Debian package that has each.
const COMMANDS: &[(&str, &str)] = &[
    ("cc", "gcc"),
    ("ld", "binutils"),
    ("python3", "python3"),
    ("go", "golang-go"),
    ("javac", "default-jdk-headless"),
    ("java", "default-jdk-headless"),
    ("git", "git"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("tune2fs", "e2fsprogs"),
    ("chattr", "e2fsprogs"),
    ("getfattr", "attr"),
    ("setfattr", "attr"),
    ("setfacl", "acl"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
    ("setpriv", "util-linux"),
    ("setarch", "util-linux"),
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("fstrim", "util-linux"),
    ("kill", "procps"),
    ("bindfs", "bindfs"),
];

/// Test suites from crates.io: programs that are run, never linked.
const SUITES: &[(&str, &str)] = &[("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// Downloading a JDK and Go over a slow link takes a while.
const INSTALL_LIMIT: Duration = Duration::from_secs(900);

pub(crate) fn run() -> Result<()> {
    install(COMMANDS)?;
    suites()
}

/// Installs the packages of those commands that are not there.
///
/// # Errors
/// When apt cannot, or a package does not bring its command.
pub(crate) fn install(commands: &[(&str, &str)]) -> Result<()> {
    let missing: BTreeSet<&str> = commands
        .iter()
        .filter(|(name, _)| command::find(name).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        println!("setup: every system tool is there");
        return Ok(());
    }
    println!(
        "setup: installing {}",
        missing.iter().copied().collect::<Vec<_>>().join(" ")
    );
    if command::find("apt-get").is_none() {
        bail!(
            "this machine has no apt-get: install these Debian packages or their equals: {missing:?}"
        );
    }
    apt_get(&["update", "-qq"])?;
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(&missing);
    apt_get(&arguments)?;
    for (name, package) in commands {
        if command::find(name).is_none() {
            bail!("{package} is installed but brought no {name}");
        }
    }
    Ok(())
}

/// Runs apt-get without asking anybody anything.
///
/// # Errors
/// When it fails, or there is none.
pub(crate) fn apt_get(arguments: &[&str]) -> Result<()> {
    let apt = command::find("apt-get").context("this machine has no apt-get")?;
    let mut install = Command::new(apt);
    install
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command::run(&mut install, INSTALL_LIMIT)
        .map(drop)
        .context("run `cargo xtask setup` as root, with Debian's registry in reach")
}

fn suites() -> Result<()> {
    for (name, version) in SUITES {
        if tools::suite(name).is_ok() {
            println!("setup: {name} is there");
            continue;
        }
        println!("setup: building {name} {version}");
        let root = target_directory().join("tools");
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        let mut install = tools::cargo();
        install
            .args([
                "install",
                "--quiet",
                "--locked",
                "--version",
                version,
                name,
                "--root",
            ])
            .arg(&root)
            // Both share what they have in common.
            .arg("--target-dir")
            .arg(root.join("build"))
            .stdin(Stdio::null());
        command::run(&mut install, INSTALL_LIMIT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hobble_testkit::program::workspace;

    use super::*;

    /// What every Debian has: of its packages bash, coreutils and dash, which are essential (Debian policy 3.8).
    const EVERYWHERE: &[&str] = &[
        "bash", "cat", "chmod", "chroot", "dd", "head", "install", "sh", "sleep", "true",
    ];

    fn sources(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn every_command_that_a_test_calls_is_installed() {
        let mut files = Vec::new();
        for each in fs::read_dir(workspace().join("crates")).unwrap().flatten() {
            // Sources too: there are unit tests in them, and the test kit is all source.
            sources(&each.path().join("src"), &mut files);
            sources(&each.path().join("tests"), &mut files);
        }
        // In two pieces, or this very line would be found.
        let call = ["Command::new", "(\""].concat();
        let mut calls = 0;
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for rest in text.split(&call).skip(1) {
                let name = rest.split('"').next().unwrap_or_default();
                calls += 1;
                assert!(
                    name.starts_with('/')
                        || EVERYWHERE.contains(&name)
                        || COMMANDS.iter().any(|(known, _)| *known == name),
                    "{} calls {name}, which no package of `cargo xtask setup` brings",
                    file.display()
                );
            }
        }
        assert!(calls > 50, "only {calls} calls were found");
    }
}
