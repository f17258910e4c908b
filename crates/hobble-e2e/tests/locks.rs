//! Locks that the target holds stay held against an outsider on the backing files, but for the POSIX handover whose length
//! is printed, and are still the target's own after recovery.

use anyhow::{Context, Result, ensure};
use hobble_e2e::{assert_hooked, cycles, scene};
use hobble_testkit::hobble::{Injection, STEP};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, no_errors, number, text};
use hobble_testkit::volume::Kind;
use nix::sys::signal::Signal;
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

/// What somebody else sees of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Free = 0,
    Shared = 1,
    Exclusive = 2,
}

/// Makes the target do something, which must succeed.
fn must(target: &mut Target, line: &str) -> Result<Value> {
    let answer = target.expect(line)?;
    no_errors(&answer).with_context(|| line.to_owned())?;
    Ok(answer)
}

/// Fails unless the outsider sees every range (first byte and length) as it must be.
fn assert_seen(outsider: &mut Target, wanted: &[(u64, u64, Seen)]) -> Result<()> {
    for (start, length, seen) in wanted {
        let answer = must(outsider, &format!("held 0 {start} {length}"))?;
        ensure!(
            number(&answer, "sum")? == *seen as u64,
            "bytes {start} and on must be {seen:?}: {answer}"
        );
    }
    Ok(())
}

/// Recovers as Ctrl-C does, and expects that descriptors stay on the hook.
fn recover_and_leave(mut injection: Injection) -> Result<()> {
    injection.signal(Signal::SIGINT)?;
    let recovered = injection.wait_event("recovered", STEP)?;
    injection.status(STEP)?;
    let left = recovered.get("left").and_then(Value::as_array);
    ensure!(left.is_some_and(|left| !left.is_empty()), "{recovered}");
    Ok(())
}

/// The target locks through a descriptor that is moved, through one opened while attached, which stays on the hook, and natively after recovery. Then the hook is
/// taken away by force, which closes native descriptors of the file in the target. `before` says what the target does just before.
fn by_force_after_recovery(before: &[&str]) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let file = volume.path().join("data");
        std::fs::write(&file, vec![7; 8192])?;
        let open = |slot: u32| format!("open {slot} + {}", file.display());
        let mut outsider = Target::start(Program::Ops, [""; 0])?;
        must(&mut outsider, &open(0))?;
        let mut target = Target::start(Program::Ops, [""; 0])?;
        must(&mut target, &open(0))?;
        must(&mut target, "lock 0 w 0 10")?;
        let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        must(&mut target, &open(1))?;
        must(&mut target, "lock 1 w 20 10")?;
        must(&mut target, "lock 1 r 30 5")?;
        recover_and_leave(injection)?;
        must(&mut target, "lock 0 w 40 10")?;
        must(&mut target, "lock 0 r 60 10")?;
        let mut all = [
            (0, 10, Seen::Exclusive),
            (20, 10, Seen::Exclusive),
            (30, 5, Seen::Shared),
            (40, 10, Seen::Exclusive),
            (60, 10, Seen::Shared),
            (70, 0, Seen::Free),
        ];
        assert_seen(&mut outsider, &all).context("before it is forced")?;
        for line in before {
            must(&mut target, line)?;
        }
        hobble.run(["recover", "--all", "--force"])?;
        assert_hooked(&target, volume.path(), false)?;
        assert_seen(&mut outsider, &all).context("by force")?;
        // They are the target's own, and can be given up one by one.
        for (step, unlock) in [
            "lock 0 u 0 10",
            "lock 1 u 20 10",
            "lock 1 u 30 5",
            "lock 0 u 40 10",
            "lock 0 u 60 10",
        ]
        .iter()
        .enumerate()
        {
            must(&mut target, unlock)?;
            if let Some((_, _, seen)) = all.get_mut(step) {
                *seen = Seen::Free;
            }
            assert_seen(&mut outsider, &all).with_context(|| (*unlock).to_owned())?;
        }
        outsider.finish()?;
        target.finish().map(drop)
    })
}

#[test]
fn forcing_what_stayed_off_the_hook_keeps_all_locks() -> Result<()> {
    by_force_after_recovery(&[])
}

#[test]
fn forcing_a_mapping_off_the_hook_keeps_all_locks() -> Result<()> {
    // Made through the descriptor that stayed, so it lies on the hook; a mapping is moved by means of a descriptor that is closed again.
    by_force_after_recovery(&["map 1"])
}

#[test]
fn forcing_both_sides_off_at_once_loses_no_lock() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let file = volume.path().join("data");
        std::fs::write(&file, vec![7; 8192])?;
        let open = |slot: u32, flags: &str| format!("open {slot} {flags} {}", file.display());
        let mut outsider = Target::start(Program::Ops, [""; 0])?;
        must(&mut outsider, &open(0, "+"))?;
        let mut target = Target::start(Program::Ops, [""; 0])?;
        // Some through which no lock, or not every lock, can be taken.
        for (slot, flags) in [(2, "r"), (3, "w"), (0, "+"), (4, "p")] {
            must(&mut target, &open(slot, flags))?;
        }
        must(&mut target, "lock 0 w 0 10")?;
        must(&mut target, "lock 0 r 60 20")?;
        let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        for (slot, flags) in [(12, "r"), (13, "w"), (1, "+"), (14, "p")] {
            must(&mut target, &open(slot, flags))?;
        }
        must(&mut target, "lock 1 w 20 10")?;
        must(&mut target, "lock 1 r 70 20")?;
        // To the hook they are two owners, so they cannot conflict when they become one.
        for refused in [
            "lock 1 w 5 1",
            "lock 0 w 25 1",
            "lock 1 w 60 1",
            "lock 0 w 89 1",
        ] {
            let answer = target.expect(refused)?;
            ensure!(
                hobble_e2e::errno(&answer, "EAGAIN") == 1,
                "{refused}: {answer}"
            );
        }
        let all = [
            (0, 10, Seen::Exclusive),
            (10, 10, Seen::Free),
            (20, 10, Seen::Exclusive),
            (60, 30, Seen::Shared),
            (90, 0, Seen::Free),
        ];
        assert_seen(&mut outsider, &all).context("while attached")?;
        hobble.run(["recover", "--all", "--force"])?;
        drop(injection);
        assert_hooked(&target, volume.path(), false)?;
        assert_seen(&mut outsider, &all).context("by force")?;
        // One owner now: what was taken through one descriptor is given up through another.
        must(&mut target, "lock 1 u 0 10")?;
        must(&mut target, "lock 0 u 20 10")?;
        must(&mut target, "lock 1 u 60 30")?;
        assert_seen(&mut outsider, &[(0, 0, Seen::Free)])?;
        outsider.finish()?;
        target.finish().map(drop)
    })
}
