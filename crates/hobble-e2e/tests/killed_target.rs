//! SIGKILL of a process inside a long delay frees it at once, also inside exit(); so does recovering.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hobble_e2e::scene;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;
use nix::sys::signal::Signal;

/// From SIGKILL to the end of the process.
const FREED: Duration = Duration::from_millis(100);

fn killed_in(fault: &str, command: &str) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        target.expect("write 1 4 4096")?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &["--fault", fault])?;
        target.tell(command)?;
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        target.signal(Signal::SIGKILL)?;
        target
            .wait(Duration::from_secs(10))?
            .with_context(|| format!("{command} with {fault}: it survives SIGKILL"))?;
        let took = start.elapsed();
        println!("{command} with {fault}: gone {took:?} after SIGKILL");
        ensure!(
            took < FREED,
            "{command} with {fault}: gone only {took:?} after SIGKILL"
        );
        // The last process of the target has gone: the attachment recovers by itself.
        injection.wait_event("recovered", Duration::from_secs(20))?;
        injection.status(Duration::from_secs(20))?;
        Ok(())
    })
}

#[test]
fn in_a_read() -> Result<()> {
    killed_in("latency=60s op=read", "read 1 1 4096")
}

#[test]
fn in_a_write() -> Result<()> {
    killed_in("latency=60s op=write", "write 1 1 4096")
}

#[test]
fn in_an_fsync() -> Result<()> {
    killed_in("latency=60s op=fsync", "fsync 1 1")
}

#[test]
fn in_exit_with_a_delay_on_every_operation() -> Result<()> {
    // `exit` ends with its descriptors open: the kernel flushes and releases them on the way out.
    killed_in("latency=60s", "exit")
}

#[test]
fn recovering_frees_what_is_parked() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut targets = Vec::new();
        for n in 0..3 {
            let mut target = Target::start(Program::Ops, [""; 0])?;
            target.expect(&format!("open 1 +c {}/file-{n}", text(volume.path())?))?;
            target.expect("write 1 4 4096")?;
            targets.push(target);
        }
        let pid = targets[0].pid();
        let injection = hobble.attach(
            pid,
            volume.path(),
            &["--fault", "latency=60s op=write,fsync"],
        )?;
        targets[0].tell("write 1 1 4096")?;
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        injection.recover()?;
        let answer = targets[0].answer(Duration::from_secs(5))?;
        ensure!(number(&answer, "ok")? == 1, "{answer}");
        ensure!(
            start.elapsed() < Duration::from_secs(5),
            "recovering took {:?}",
            start.elapsed()
        );
        for target in targets {
            target.finish()?;
        }
        Ok(())
    })
}
