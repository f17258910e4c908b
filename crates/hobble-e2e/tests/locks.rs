//! Locks that the target holds stay held against an outsider on the backing files, but for the POSIX handover whose length
//! is printed, and are still the target's own after recovery.

use anyhow::{Context, Result, ensure};
use hobble_e2e::{cycles, scene};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, text};
use hobble_testkit::volume::Kind;
use serde_json::Value;

fn of(answer: &Value, kind: &str, key: &str) -> Result<u64> {
    answer
        .get(kind)
        .and_then(|kind| kind.get(key))
        .and_then(Value::as_u64)
        .with_context(|| format!("no {kind}.{key} in {answer}"))
}

#[test]
fn locks_are_carried_over_and_back() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Locks, [text(volume.path())?, "20"])?;
        for round in 1..=cycles(5) {
            let mut step = || -> Result<()> {
                let mut injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
                let attached =
                    injection.wait_event("attached", std::time::Duration::from_secs(1))?;
                ensure!(
                    hobble_testkit::target::number(&attached, "locks")? >= 23,
                    "{attached}"
                );
                target.expect("check").context("while attached")?;
                injection.recover()?;
                target.expect("check").context("after recovery")?;
                target.assert_running()
            };
            step().with_context(|| format!("round {round}"))?;
        }
        target.finish().map(drop)
    })
}

#[test]
fn an_outsider_never_gets_a_held_lock() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        // Both open their files before the attachment: the outsider stays on the backing files.
        let mut target = Target::start(Program::Locks, [text(volume.path())?, "20"])?;
        let mut outsider = Target::start(Program::Outsider, [text(volume.path())?])?;
        target.expect("check")?;
        outsider.expect("reset")?;
        for round in 1..=cycles(10) {
            let mut step = || -> Result<()> {
                let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
                target.expect("check").context("while attached")?;
                injection.recover()?;
                target.expect("check").context("after recovery")?;
                target.assert_running()
            };
            step().with_context(|| format!("round {round}"))?;
        }
        let seen = outsider.expect("report")?;
        for kind in ["flock", "ofd"] {
            ensure!(of(&seen, kind, "tries")? > 1000, "{seen}");
            ensure!(
                of(&seen, kind, "taken")? == 0,
                "the outsider took a held {kind} lock: {seen}"
            );
        }
        println!(
            "POSIX handover: longest window {} us, lock taken {} times in {} tries (resolution {} us)",
            of(&seen, "posix", "window_us")?,
            of(&seen, "posix", "taken")?,
            of(&seen, "posix", "tries")?,
            of(&seen, "posix", "blind_us")?
        );
        // It would get in the way of whoever else tries.
        outsider.finish()?;
        target.expect("release")?;
        target.expect("check").context("after release")?;
        target.finish().map(drop)
    })
}

#[test]
fn a_lock_released_while_attached_is_free_for_everybody() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Locks, [text(volume.path())?, "5"])?;
        let mut outsider = Target::start(Program::Outsider, [text(volume.path())?])?;
        let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        target.expect("release")?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        let seen = outsider.expect("report")?;
        for kind in ["flock", "ofd", "posix"] {
            ensure!(
                of(&seen, kind, "taken")? > 0,
                "{kind} is still held: {seen}"
            );
        }
        outsider.finish()?;
        target.expect("check")?;
        injection.recover()?;
        target.expect("check")?;
        target.finish().map(drop)
    })
}
