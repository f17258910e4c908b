//! How long the target stands still, as it measures it itself. `cargo xtask bench pause` has the figures; this keeps them from
//! getting out of hand on a machine that does other things too.

use std::time::Duration;

use anyhow::{Result, ensure};
use hobble_e2e::scene;
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

#[test]
fn fifteen_thousand_descriptors() -> Result<()> {
    // In several stops, the longest of which counts.
    stop("15000", 600)
}
