//! The public test suites, on a mirror and on the volume itself: the lists of results must be the same.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hobble_testkit::command;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::volume::{Kind, Volume};
use support::{Hook, Options, tool};

const LIMIT: Duration = Duration::from_secs(200);

/// Results by test, `ok` or not; what the suite skips has its reason in the machine, not in the filesystem.
fn pjdfstest(directory: &Path, other: &Path, config: &Path) -> BTreeMap<String, String> {
    let mut program = Command::new(tool("pjdfstest"));
    program
        .arg("-c")
        .arg(config)
        .arg("-p")
        .arg(directory)
        .arg("-s")
        .arg(other);
    let output = command::output(&mut program, LIMIT).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let mut results = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(result)) = (words.next(), words.next())
            && name.contains("::")
        {
            results.insert(name.to_owned(), result.to_owned());
        }
    }
    assert!(
        results.len() > 300,
        "pjdfstest did not run:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    results
}

/// The one test that no FUSE filesystem can run: it asks `pathconf(_PC_LINK_MAX)`, which glibc derives from the type of the filesystem.
const NEEDS_TYPE: &str = "link::link_count_max";

/// All three at once: most of what the suite does is to sleep, for the sake of times that must differ.
#[test]
fn pjdfstest_says_the_same_with_passthrough_without_it_and_natively() {
    let namespace = Namespace::enter().unwrap();
    let volume = Volume::new(&namespace, Kind::Ext4).unwrap();
    let other = Volume::sized(&namespace, Kind::Tmpfs, 64 << 20).unwrap();
    let config = other.path().join("config.toml");
    let users = "[[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]";
    let text = format!(
        "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nutime_now = {{}}\nutimensat = {{}}\n[dummy_auth]\nentries = {users}\n"
    );
    std::fs::write(&config, text).unwrap();
    let directory = |name| {
        let directory = volume.directory(name).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&directory, mode).unwrap();
        directory
    };
    let native = directory("n");
    let hooks = [
        Hook::new(&directory("a"), Options::default()),
        Hook::new(&directory("b"), Options::without_passthrough()),
    ];
    let elsewhere = other.path().to_path_buf();
    let run = |directory: &Path| pjdfstest(directory, &elsewhere, &config);
    let (expected, found) = std::thread::scope(|threads| {
        let run = &run;
        let found = hooks
            .each_ref()
            .map(|hook| threads.spawn(move || run(&hook.front)));
        (run(&native), found.map(|found| found.join().unwrap()))
    });
    assert!(hooks[0].mirror.passthrough() && !hooks[1].mirror.passthrough());
    assert!(expected.values().filter(|result| *result == "ok").count() > 350);
    for found in found {
        let different: Vec<_> = expected
            .iter()
            .filter(|(name, result)| found.get(*name) != Some(result))
            .map(|(name, result)| (name, result, found.get(name)))
            .filter(|(name, _, found)| {
                !(name.as_str() == NEEDS_TYPE && found.is_some_and(|found| found == "skipped"))
            })
            .collect();
        assert!(different.is_empty(), "not as native: {different:#?}");
    }
}

/// Everything fsx can do, on one file of its own.
const EVERY_OPERATION: &str = "[weights]\nclose_open = 1\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\ninvalidate = 1\ntruncate = 5\nfsync = 1\n\
    fdatasync = 1\nposix_fallocate = 1\npunch_hole = 2\nsendfile = 2\nposix_fadvise = 1\ncopy_file_range = 2\n";

fn fsx(kind: Kind, options: Options, faults: &[&str], operations: u32) {
    support::with(kind, options, |hook| {
        if !faults.is_empty() {
            hook.inject(faults);
        }
        let outside = tempfile::tempdir().unwrap();
        let config = outside.path().join("fsx.toml");
        std::fs::write(&config, EVERY_OPERATION).unwrap();
        for seed in [1, 42] {
            let mut program = Command::new(tool("fsx"));
            program
                .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-f"])
                .arg(&config);
            program
                .arg("-P")
                .arg(outside.path())
                .arg(hook.at(format!("fsx-{seed}")));
            let output = command::output(&mut program, LIMIT).unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            let end: Vec<&str> = said.lines().rev().take(40).collect();
            assert!(
                output.status.success(),
                "fsx failed with seed {seed}: {:#?}",
                end.into_iter().rev().collect::<Vec<_>>()
            );
            let (front, back) = (
                hook.at(format!("fsx-{seed}")),
                hook.behind(format!("fsx-{seed}")),
            );
            assert_eq!(std::fs::read(front).unwrap(), std::fs::read(back).unwrap());
        }
    });
}

#[test]
fn fsx_with_passthrough() {
    fsx(Kind::Ext4, Options::default(), &[], 2000);
}

#[test]
fn fsx_without_passthrough() {
    fsx(Kind::Ext4, Options::without_passthrough(), &[], 2000);
}

/// Every read and write comes to the server, which does nothing to them.
#[test]
fn fsx_with_intercepted_data() {
    fsx(
        Kind::Ext4,
        Options::default(),
        &["errno=EIO op=read,write percent=0"],
        2000,
    );
}

#[test]
fn fsx_with_intercepted_data_without_passthrough() {
    fsx(
        Kind::Ext4,
        Options::without_passthrough(),
        &["errno=EIO op=read,write percent=0"],
        2000,
    );
}

#[test]
fn fsx_on_tmpfs() {
    fsx(Kind::Tmpfs, Options::default(), &[], 2000);
}

#[test]
fn fsx_on_overlay() {
    fsx(Kind::Overlay, Options::default(), &[], 1000);
}

#[test]
fn fsx_on_xfs_and_btrfs() {
    fsx(Kind::Xfs, Options::default(), &[], 500);
    fsx(Kind::Btrfs, Options::default(), &[], 500);
}
