//! `hobble demo`: ends well, in under a minute, and leaves nothing behind.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::leak::LeakCheck;

#[test]
fn the_demo_ends_well() -> Result<()> {
    hobble_testkit::need::root()?;
    let hobble = Hobble::new()?;
    let leaks = LeakCheck::new(vec![hobble.state_dir().to_owned()])?;
    let start = Instant::now();
    let said = hobble.output([
        "demo",
        "--dir",
        hobble_testkit::target::text(hobble.scratch().path())?,
    ])?;
    let stdout = String::from_utf8_lossy(&said.stdout);
    ensure!(
        said.status.success(),
        "{}: {stdout}{}",
        said.status,
        String::from_utf8_lossy(&said.stderr)
    );
    ensure!(
        start.elapsed() < Duration::from_secs(60),
        "it took {:?}",
        start.elapsed()
    );
    println!("{stdout}");
    leaks.finish()
}

#[test]
fn the_demo_in_json() -> Result<()> {
    hobble_testkit::need::root()?;
    let hobble = Hobble::new()?;
    let said = hobble.run([
        "demo",
        "--json",
        "--phase",
        "1s",
        "--dir",
        hobble_testkit::target::text(hobble.scratch().path())?,
    ])?;
    for line in said.lines() {
        serde_json::from_str::<serde_json::Value>(line)?;
    }
    ensure!(said.lines().count() > 0);
    Ok(())
}
