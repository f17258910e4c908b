//! How long the target stands still, as it measures it itself. `cargo xtask bench pause` has the figures; this keeps them from
//! getting out of hand on a machine that does other things too.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{assert_hooked, assert_same_descriptors, movable, scene};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Generous against the promises (3, 10, 40 ms): a debug build on a busy machine is what runs here.
fn stop(descriptors: &str, most_ms: u64) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, descriptors, "1", "spin", "idle"],
        )?;
        let (mut natives, mut attaches, mut recovers) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..3 {
            target.expect("reset")?;
            std::thread::sleep(Duration::from_millis(500));
            natives.push(number(&target.expect("report")?, "gap_us")?);
            target.expect("reset")?;
            let injection = hobble.attach(
                target.pid(),
                volume.path(),
                &["--no-rules", "--max-pause", "2s"],
            )?;
            attaches.push(number(&target.expect("report")?, "gap_us")?);
            target.expect("reset")?;
            injection.recover()?;
            recovers.push(number(&target.expect("report")?, "gap_us")?);
            target.expect("check")?;
        }
        let (native, attach, recover) = (
            median(&mut natives),
            median(&mut attaches),
            median(&mut recovers),
        );
        println!(
            "{descriptors} descriptors: native {native} us, attach {attach} us, recover {recover} us"
        );
        ensure!(
            attach < native + most_ms * 1000,
            "attaching stops the target for {attach} us (native {native} us)"
        );
        ensure!(
            recover < native + most_ms * 1000,
            "recovering stops the target for {recover} us (native {native} us)"
        );
        target.finish().map(drop)
    })
}

#[test]
fn one_descriptor() -> Result<()> {
    stop("1", 30)
}

#[test]
fn a_thousand_descriptors() -> Result<()> {
    stop("1000", 80)
}

#[test]
fn five_thousand_descriptors() -> Result<()> {
    stop("5000", 300)
}

/// More than are moved at once: the hard limit on this machine is 20,000, of which the target and the server have one each. In, with rules that want to see what is open
/// already, and out.
#[test]
fn fifteen_thousand_descriptors() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "15000", "1", "spin", "idle"],
        )?;
        let before = movable(&target)?;
        ensure!(before.len() >= 15_000, "the target has {}", before.len());
        target.expect("reset")?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--no-rules", "--max-pause", "2s"],
        )?;
        let attach = number(&target.expect("report")?, "gap_us")?;
        assert_hooked(&target, volume.path(), true)?;
        hobble.run(["update", "--fault", "latency=1ms op=read percent=1"])?;
        assert_hooked(&target, volume.path(), true).context("after the update")?;
        target.assert_running()?;
        target.expect("reset")?;
        injection.recover()?;
        let recover = number(&target.expect("report")?, "gap_us")?;
        println!("15000 descriptors: attach {attach} us, recover {recover} us");
        assert_hooked(&target, volume.path(), false)?;
        assert_same_descriptors(&target, &before)?;
        target.expect("check").context("after recovery")?;
        // In several stops, the longest of which counts; generous, as above.
        ensure!(
            attach < 1_500_000,
            "attaching stops the target for {attach} us"
        );
        ensure!(
            recover < 1_500_000,
            "recovering stops the target for {recover} us"
        );
        target.finish().map(drop)
    })
}
