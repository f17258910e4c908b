//! Pooled SQLite: connections opened before, during and after the attachment in one process, and in a second one. Every
//! row that was committed is found, whatever the journal mode; integrity_check alone would prove nothing.

use anyhow::{Context, Result, ensure};
use hobble_e2e::{cycles, scene};
use hobble_testkit::hobble::STEP;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;
use nix::sys::signal::Signal;
use serde_json::Value;

/// `during`: connections opened while attached; they see another st_dev, which is what SQLite keeps its locks by.
fn pool(mode: &str, during: bool) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let database = volume.path().join("db");
        let mut target = Target::start(Program::SqlitePool, [text(&database)?, mode, "2", "2"])?;
        let pause = || std::thread::sleep(std::time::Duration::from_millis(400));
        pause();
        for round in 1..=cycles(3) {
            let mut step = || -> Result<()> {
                // The second process is a descendant: both are in scope.
                let mut injection = hobble.attach(
                    target.pid(),
                    volume.path(),
                    &["--fault", "latency=1ms op=fsync percent=20"],
                )?;
                pause();
                if during {
                    target.expect("open 1").context("while attached")?;
                }
                pause();
                // Connections opened meanwhile hold POSIX locks: what stays on the hook until they close is named, and is no failure.
                injection.signal(Signal::SIGINT)?;
                let recovered = injection.wait_event("recovered", STEP)?;
                injection.status(STEP)?;
                println!(
                    "round {round}: left {}",
                    recovered.get("left").unwrap_or(&Value::Null)
                );
                pause();
                target.expect("open 1").context("after recovery")?;
                pause();
                target.assert_running()
            };
            step().with_context(|| format!("{mode}, round {round}"))?;
        }
        let found = target.expect("check").with_context(|| mode.to_owned())?;
        println!("{mode}: {found}");
        ensure!(number(&found, "committed")? > 100, "{found}");
        ensure!(number(&found, "lost")? == 0, "{found}");
        ensure!(
            found.get("failures") == Some(&serde_json::json!({})),
            "SQLite saw errors: {found}"
        );
        target.finish()?;
        // With the last connection closed nothing holds the hook any more.
        hobble.recover_all().map(drop)
    })
}

#[test]
fn wal_mode() -> Result<()> {
    pool("wal", true)
}

#[test]
fn rollback_journal_mode() -> Result<()> {
    pool("delete", true)
}

#[test]
fn wal_mode_without_connections_opened_meanwhile() -> Result<()> {
    pool("wal", false)
}

#[test]
fn rollback_journal_mode_without_connections_opened_meanwhile() -> Result<()> {
    pool("delete", false)
}
