//! Programs in C, Python, Go and Java that open, append, rename and read all the while: attach, fault, recover, many
//! times in a row. While attached every descriptor goes through the hook, after recovery none; contents, offsets,
//! CLOEXEC and flags are as without Hobble (the targets check that themselves).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{assert_hooked, assert_same_descriptors, cycles, movable, rule_count, scene};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;

// What is looked at is that everything is right, not how fast: a busy machine may take its time.
const FAULTS: [&str; 8] = [
    "--max-pause",
    "5s",
    "--fault",
    "errno=EIO op=write percent=20",
    "--fault",
    "latency=1ms op=read percent=10",
    "--seed",
    "7",
];

fn live(kind: Kind, program: Program, arguments: &[&str], rounds: u32) -> Result<()> {
    scene(kind, |hobble, volume| {
        let data = volume.directory("data")?;
        let mut target = Target::start(program, [&[text(&data)?], arguments].concat())?;
        let before = movable(&target)?;
        let mut faults = 0;
        for round in 1..=rounds {
            let mut step = || -> Result<u64> {
                target.expect("tolerate 1")?;
                let mut injection = hobble.attach(target.pid(), volume.path(), &FAULTS)?;
                let attached = injection.wait_event("attached", Duration::from_secs(1))?;
                let open = before
                    .values()
                    .filter(|slot| slot.link.starts_with(volume.path()))
                    .count() as u64;
                ensure!(
                    number(&attached, "descriptors")? >= open,
                    "{attached}: the target has {open}"
                );
                assert_hooked(&target, volume.path(), true)?;
                std::thread::sleep(Duration::from_millis(150));
                target.expect("check").context("while attached")?;
                target.assert_running()?;
                let recovered = injection.recover()?;
                target.expect("tolerate 0")?;
                assert_hooked(&target, volume.path(), false)?;
                assert_same_descriptors(&target, &before)?;
                target.expect("check").context("after recovery")?;
                target.assert_running()?;
                rule_count(&recovered, "errno-1", "injected")
            };
            faults += step().with_context(|| format!("round {round} of {rounds}"))?;
        }
        ensure!(faults > 0, "no fault was injected in {rounds} rounds");
        let last = target.finish()?;
        ensure!(number(&last, "faults")? > 0, "{last}");
        Ok(())
    })
}

#[test]
fn c_with_one_descriptor() -> Result<()> {
    // The one is read only: the files that it makes by name are what is written.
    live(
        Kind::Ext4,
        Program::FilesC,
        &["1", "1", "nap", "busy"],
        cycles(10),
    )
}

#[test]
fn c_with_four_processes_that_share_a_hundred() -> Result<()> {
    live(
        Kind::Ext4,
        Program::FilesC,
        &["100", "4", "nap", "busy"],
        cycles(10),
    )
}

#[test]
fn c_with_two_processes_that_share_a_thousand() -> Result<()> {
    live(
        Kind::Ext4,
        Program::FilesC,
        &["1000", "2", "nap", "busy"],
        cycles(3),
    )
}

#[test]
fn c_with_five_thousand() -> Result<()> {
    live(
        Kind::Ext4,
        Program::FilesC,
        &["5000", "1", "nap", "busy"],
        cycles(2),
    )
}

#[test]
fn python() -> Result<()> {
    live(Kind::Ext4, Program::FilesPython, &["60"], cycles(10))
}

#[test]
fn go() -> Result<()> {
    live(Kind::Ext4, Program::FilesGo, &["60"], cycles(10))
}

#[test]
fn java() -> Result<()> {
    live(Kind::Ext4, Program::FilesJava, &["60"], cycles(10))
}

#[test]
fn every_kind_of_backing_filesystem() -> Result<()> {
    for kind in [
        Kind::Xfs,
        Kind::Btrfs,
        Kind::Tmpfs,
        Kind::Overlay,
        Kind::Directory,
    ] {
        live(
            kind,
            Program::FilesC,
            &["30", "2", "nap", "busy"],
            cycles(2),
        )
        .with_context(|| kind.name())?;
    }
    Ok(())
}
