//! Faults are exact: the right share, the right delay, the right operations, files and processes; nothing before, nothing after.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hobble_e2e::{errno, rule_count, scene, slowness};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;

const NONE: [&str; 0] = [];

#[test]
fn thirty_percent_of_writes_fail_and_nothing_else() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, NONE)?;
        let mut other = Target::start(Program::Ops, NONE)?;
        for each in [&mut target, &mut other] {
            each.expect(&format!("open 1 +c {at}/victim"))?;
            each.expect(&format!("open 2 +c {at}/bystander"))?;
            each.expect("write 1 256 4096")?;
        }
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &[
                "--fault",
                "errno=EIO op=write path=victim percent=30",
                "--seed",
                "1",
            ],
        )?;
        let writes = target.expect("write 1 10000 512")?;
        let failed = number(&writes, "failed")?;
        // Binomial(10,000, 0.3): 3 standard deviations are 137.
        ensure!(
            (3000 - 137..=3000 + 137).contains(&failed),
            "{failed} of 10,000 writes failed"
        );
        ensure!(errno(&writes, "EIO") == failed, "{writes}");
        for quiet in ["read 1 5000 512", "write 2 5000 512", "fstat 1 1000"] {
            let answer = target.expect(quiet)?;
            ensure!(number(&answer, "failed")? == 0, "{quiet}: {answer}");
        }
        for foreign in ["write 1 5000 512", "read 1 1000 512"] {
            let answer = other.expect(foreign)?;
            ensure!(
                number(&answer, "failed")? == 0,
                "another process, {foreign}: {answer}"
            );
        }
        // A new open of the other process goes through the hook, and is none of the rule's business either.
        other.expect(&format!("open 3 + {at}/victim"))?;
        ensure!(number(&other.expect("write 3 5000 512")?, "failed")? == 0);
        other.expect("close 3")?;
        let recovered = injection.recover()?;
        ensure!(
            rule_count(&recovered, "errno-1", "injected")? == failed,
            "{recovered}: the target saw {failed}"
        );
        ensure!(
            rule_count(&recovered, "errno-1", "matched")? == 10_000,
            "{recovered}"
        );
        let after = target.expect("write 1 10000 512")?;
        ensure!(number(&after, "failed")? == 0, "after recovery: {after}");
        other.finish()?;
        target.finish().map(drop)
    })
}

#[test]
fn twenty_milliseconds_on_fsync_are_twenty_milliseconds() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        target.expect("write 1 10 4096")?;
        target.expect("fsync 1 20")?;
        let native = number(&target.expect("fsync 1 60")?, "median_us")?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "latency=20ms op=fsync"],
        )?;
        let answer = target.expect("fsync 1 60")?;
        let hooked = number(&answer, "median_us")?;
        println!("median fsync: native {native} us, with 20 ms {hooked} us");
        let reads = number(&target.expect("read 1 200 4096")?, "median_us")?;
        injection.recover()?;
        let after = number(&target.expect("fsync 1 60")?, "median_us")?;
        // On an emulated processor the native median of one moment is no bound for the next.
        let least = if slowness() > 1 { 0 } else { native };
        ensure!(
            (least + 20_000..=native + 20_000 + 3_000 * slowness()).contains(&hooked),
            "native {native} us, hooked {hooked} us"
        );
        ensure!(reads < 5_000 * slowness(), "reads are slow too: {reads} us");
        ensure!(
            after < 15_000 * slowness(),
            "slow after recovery: {after} us"
        );
        target.finish().map(drop)
    })
}

#[test]
fn the_same_seed_fails_the_same_writes() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        let mut seen = Vec::new();
        for seed in ["11", "11", "12"] {
            let injection = hobble.attach(
                target.pid(),
                volume.path(),
                &["--fault", "errno=ENOSPC op=write percent=2", "--seed", seed],
            )?;
            let answer = target.expect("write 1 1000 64")?;
            seen.push((
                number(&answer, "failed")?,
                answer.get("first_failed").cloned(),
            ));
            ensure!(
                errno(&answer, "ENOSPC") == number(&answer, "failed")?,
                "{answer}"
            );
            injection.recover()?;
        }
        ensure!(seen[0] == seen[1], "seed 11 gave {seen:?}");
        ensure!(
            seen[0] != seen[2],
            "seeds 11 and 12 gave the same: {seen:?}"
        );
        target.finish().map(drop)
    })
}

#[test]
fn counts_and_metadata_faults() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {at}/file"))?;
        target.expect(&format!("mkdir {at}/dir"))?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &[
                "--fault",
                "errno=EDQUOT op=create path=dir/** after=2 times=3",
                "--fault",
                "errno=EACCES op=rename path=file",
                "--fault",
                "errno=ENOTEMPTY op=rmdir path=dir",
            ],
        )?;
        let created = target.expect(&format!("create 10 {at}/dir"))?;
        ensure!(
            number(&created, "failed")? == 3 && errno(&created, "EDQUOT") == 3,
            "{created}"
        );
        ensure!(created.get("first_failed") == Some(&2.into()), "{created}");
        ensure!(
            errno(
                &target.expect(&format!("rename {at}/file {at}/other"))?,
                "EACCES"
            ) == 1
        );
        ensure!(errno(&target.expect(&format!("rmdir {at}/dir"))?, "ENOTEMPTY") == 1);
        ensure!(number(&target.expect(&format!("stat 1 {at}/file"))?, "ok")? == 1);
        injection.recover()?;
        ensure!(
            number(
                &target.expect(&format!("rename {at}/file {at}/other"))?,
                "ok"
            )? == 1
        );
        target.finish().map(drop)
    })
}

/// Writes until one fails, as one does soon when the file has come under a rule; then all have to.
fn fails_soon_and_for_good(target: &mut Target, slot: u32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while number(&target.expect(&format!("write {slot} 1 64"))?, "failed")? == 0 {
        ensure!(
            Instant::now() < end,
            "slot {slot}: the rule does not see the file"
        );
    }
    let answer = target.expect(&format!("write {slot} 500 64"))?;
    ensure!(errno(&answer, "EIO") == 500, "slot {slot}: {answer}");
    Ok(())
}

#[test]
fn a_file_that_is_renamed_under_a_rule_while_it_is_open_is_hit() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("mkdir {at}/old"))?;
        target.expect(&format!("open 1 +c {at}/before.tmp"))?;
        target.expect(&format!("open 2 +c {at}/old/deep"))?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &[
                "--fault",
                "errno=EIO op=write path=current.log,logs/**,linked",
            ],
        )?;
        target.expect(&format!("open 3 +c {at}/after.tmp"))?;
        target.expect(&format!("open 4 +T {at}"))?;
        target.expect(&format!("open 5 +c {at}/bystander"))?;
        for slot in 1..=5 {
            let answer = target.expect(&format!("write {slot} 100 64"))?;
            ensure!(number(&answer, "failed")? == 0, "slot {slot}: {answer}");
        }
        for (slot, change) in [
            (1, format!("rename {at}/before.tmp {at}/current.log")),
            (2, format!("rename {at}/old {at}/logs")),
            (3, format!("rename {at}/after.tmp {at}/current.log")),
            (4, format!("name 4 {at}/linked")),
        ] {
            let answer = target.expect(&change)?;
            ensure!(number(&answer, "failed")? == 0, "{change}: {answer}");
            fails_soon_and_for_good(&mut target, slot)?;
        }
        ensure!(number(&target.expect("write 5 500 64")?, "failed")? == 0);
        // Renamed away again it is hit no more, without anything being opened anew.
        target.expect(&format!("rename {at}/logs {at}/old"))?;
        ensure!(number(&target.expect("write 2 500 64")?, "failed")? == 0);
        let status = hobble.json(&["show"])?;
        ensure!(
            status.get("not_covered") == Some(&serde_json::json!([])),
            "{status}"
        );
        injection.recover()?;
        for slot in 1..=5 {
            let answer = target.expect(&format!("write {slot} 100 64"))?;
            ensure!(number(&answer, "failed")? == 0, "slot {slot}: {answer}");
        }
        target.finish().map(drop)
    })
}

#[test]
fn attributes_are_forged_and_true_again() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {at}/file"))?;
        target.expect("write 1 1 4096")?;
        // What the kernel may have cached before the rules are on must not hide them.
        target.expect(&format!("stat 10 {at}/file"))?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "attr.size=12345 op=getattr,lookup path=file"],
        )?;
        let forged = number(&target.expect(&format!("stat 1 {at}/file"))?, "sum")?;
        ensure!(forged == 12_345, "the size is {forged}");
        injection.recover()?;
        let size = number(&target.expect(&format!("stat 1 {at}/file"))?, "sum")?;
        ensure!(size == 4096, "the size is {size} after recovery");
        target.finish().map(drop)
    })
}

#[test]
fn corrupted_reads_leave_the_data_alone() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {at}/file"))?;
        target.expect("write 1 16 4096")?;
        let want = 16 * 4096 * u64::from(b'h');
        ensure!(number(&target.expect("read 1 16 4096")?, "sum")? == want);
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "corrupt=zero op=read path=file"],
        )?;
        let read = target.expect("read 1 16 4096")?;
        ensure!(
            number(&read, "ok")? == 16 && number(&read, "sum")? < want,
            "nothing was corrupted: {read}"
        );
        injection.recover()?;
        ensure!(
            number(&target.expect("read 1 16 4096")?, "sum")? == want,
            "the corruption reached the file"
        );
        target.finish().map(drop)
    })
}

#[test]
fn a_weighted_errno_draws_each() -> Result<()> {
    scene(Kind::Tmpfs, |hobble, volume| {
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO:3,ENOSPC:1 op=write"],
        )?;
        let answer = target.expect("write 1 2000 64")?;
        let (eio, enospc) = (errno(&answer, "EIO"), errno(&answer, "ENOSPC"));
        ensure!(eio + enospc == 2000, "{answer}");
        // Binomial(2,000, 0.25): 5 standard deviations are 97.
        ensure!((403..=597).contains(&enospc), "{answer}");
        injection.recover()?;
        target.finish().map(drop)
    })
}

#[test]
fn without_passthrough_faults_are_as_exact() -> Result<()> {
    let masked = |hobble: &hobble_testkit::hobble::Hobble,
                  volume: &hobble_testkit::volume::Volume<'_>|
     -> Result<()> {
        let mut target = Target::start(Program::Ops, NONE)?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        target.expect("write 1 256 4096")?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=read percent=50", "--seed", "3"],
        )?;
        let status = hobble.json(&["show"])?;
        ensure!(
            status.get("passthrough") == Some(&false.into()),
            "passthrough was not masked: {status}"
        );
        let read = target.expect("read 1 1000 4096")?;
        let failed = number(&read, "failed")?;
        // 5 standard deviations are 79: no read may be answered from a cache.
        ensure!((421..=579).contains(&failed), "{read}");
        ensure!(number(&target.expect("write 1 1000 4096")?, "failed")? == 0);
        std::thread::sleep(Duration::from_millis(10));
        injection.recover()?;
        ensure!(number(&target.expect("read 1 1000 4096")?, "failed")? == 0);
        target.finish().map(drop)
    };
    scene(Kind::Ext4, |hobble, volume| {
        let mut masking = hobble_testkit::hobble::Hobble::with_state_dir(
            &hobble.scratch().path().join("masked"),
        )?;
        masking.env("HOBBLE_MASK", "passthrough");
        masked(&masking, volume)
    })
}
