//! A dirtied private mapping and a shared one are right through many attachments, and lie on the hook while attached.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{cycles, scene};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;

/// Address range to (permissions, offset, device) of every mapping of a file of `volume`.
fn mappings(pid: u32, volume: &Path) -> Result<BTreeMap<String, (String, String, String)>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if let [range, permissions, offset, device, _, path] = fields[..]
            && Path::new(path).starts_with(volume)
        {
            found.insert(
                range.to_owned(),
                (permissions.to_owned(), offset.to_owned(), device.to_owned()),
            );
        }
    }
    Ok(found)
}

#[test]
fn dirty_private_and_shared_mappings_survive() -> Result<()> {
    survive("")
}

#[test]
fn mappings_survive_on_a_kernel_that_maps_no_direct_files() -> Result<()> {
    survive("passthrough,direct_io_allow_mmap")
}

/// With these features of the kernel's switched off.
fn survive(masked: &str) -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("masked"))?;
        hobble.env("HOBBLE_MASK", masked);
        let mut target = Target::start(Program::Maps, [text(volume.path())?, "256", "40", "nap"])?;
        let before = mappings(target.pid(), volume.path())?;
        ensure!(before.len() > 40, "{before:?}");
        for round in 1..=cycles(10) {
            let mut step = || -> Result<()> {
                let injection = hobble.attach(
                    target.pid(),
                    volume.path(),
                    &["--fault", "latency=1ms op=read percent=5"],
                )?;
                target.expect("check").context("while attached")?;
                let attached = mappings(target.pid(), volume.path())?;
                for (range, (permissions, offset, device)) in &before {
                    let now = attached
                        .get(range)
                        .with_context(|| format!("mapping {range} is gone"))?;
                    ensure!(
                        (&now.0, &now.1) == (permissions, offset),
                        "mapping {range} was {permissions} {offset}, is {now:?}"
                    );
                    ensure!(&now.2 != device, "mapping {range} is not on the hook");
                }
                injection.recover()?;
                target.expect("check").context("after recovery")?;
                let after = mappings(target.pid(), volume.path())?;
                ensure!(after == before, "mappings were {before:?}, are {after:?}");
                target.assert_running()
            };
            step().with_context(|| format!("round {round}"))?;
        }
        let last = target.finish()?;
        ensure!(number(&last, "rounds")? > 100, "{last}");
        Ok(())
    })
}
