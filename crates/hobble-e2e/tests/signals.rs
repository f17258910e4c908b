//! A timer with SA_RESTART, SIGSTOP and SIGCONT, and attaching and recovering during a parked read cause no EINTR; waits
//! that the kernel does not restart after a stop do not end early.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{cycles, scene};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;
use nix::sys::signal::Signal;

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

#[test]
fn nothing_is_interrupted() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Signals, [text(&volume.path().join("file"))?])?;
        pause(300);
        target.expect("report").context("natively")?;
        for round in 1..=cycles(10) {
            let mut step = || -> Result<()> {
                target.expect("reset")?;
                let injection = hobble.attach(
                    target.pid(),
                    volume.path(),
                    &["--fault", "latency=150ms op=read"],
                )?;
                target.expect("report").context("after attaching")?;
                // Most of the time a read is parked: what follows hits it there.
                pause(100);
                target.expect("stops 1")?;
                target.signal(Signal::SIGSTOP)?;
                pause(60);
                target.signal(Signal::SIGCONT)?;
                // Reads are never interrupted, waits are as natively.
                target
                    .expect("stops 0")
                    .context("after SIGSTOP and SIGCONT")?;
                target.expect("storm 100").context("with reads parked")?;
                let seen = target.expect("report").context("with reads parked")?;
                ensure!(
                    number(&seen, "slow_reads")? > 0,
                    "no read was delayed: {seen}"
                );
                injection.recover().context("with a read parked")?;
                pause(50);
                target.expect("report").context("after recovery")?;
                target.assert_running()
            };
            step().with_context(|| format!("round {round}"))?;
        }
        target.finish().map(drop)
    })
}

#[test]
fn attaching_during_a_parked_read_and_again() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        target.expect("write 1 4 4096")?;
        for _ in 0..cycles(5) {
            let injection = hobble.attach(
                target.pid(),
                volume.path(),
                &["--fault", "latency=10s op=read"],
            )?;
            target.tell("read 1 1 4096")?;
            pause(150);
            // Recovering completes the parked read, with its data.
            injection.recover()?;
            let read = target.answer(Duration::from_secs(5))?;
            ensure!(
                number(&read, "ok")? == 1 && number(&read, "sum")? == 4096 * u64::from(b'h'),
                "{read}"
            );
            ensure!(number(&read, "max_us")? < 9_000_000, "{read}");
        }
        target.finish().map(drop)
    })
}
