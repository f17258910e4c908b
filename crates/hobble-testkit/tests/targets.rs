//! The target programs by themselves: they must find nothing wrong where nothing is, or a test proves nothing about Hobble.
//! And they must find what is wrong: each check is shown a fault made by hand.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hobble_testkit::namespace::Namespace;
use hobble_testkit::process;
use hobble_testkit::program::Program;
use hobble_testkit::scratch::Scratch;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use nix::sys::signal::Signal;

fn files(program: Program, arguments: &[&str]) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut target = Target::start(program, [&[text(scratch.path())?], arguments].concat())?;
    std::thread::sleep(Duration::from_millis(700));
    let first = number(&target.expect("check")?, "operations")?;
    std::thread::sleep(Duration::from_millis(300));
    let second = number(&target.expect("check")?, "operations")?;
    ensure!(
        second > first,
        "it stands still: {first} operations, then {second}"
    );
    target.finish().map(drop)
}

#[test]
fn files_in_c_agree_with_themselves() -> Result<()> {
    files(Program::FilesC, &["50", "3", "nap", "busy"])
}

#[test]
fn files_in_python_agree_with_themselves() -> Result<()> {
    files(Program::FilesPython, &["40"])
}

#[test]
fn files_in_go_agree_with_themselves() -> Result<()> {
    files(Program::FilesGo, &["40"])
}

#[test]
fn files_in_java_agree_with_themselves() -> Result<()> {
    files(Program::FilesJava, &["40"])
}

#[test]
fn five_thousand_descriptors_open() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut target = Target::start(
        Program::FilesC,
        [text(scratch.path())?, "5000", "1", "none", "idle"],
    )?;
    ensure!(
        process::descriptors(target.pid())?
            .values()
            .filter(|slot| slot.movable())
            .count()
            >= 5000
    );
    target.expect("check")?;
    target.finish().map(drop)
}

#[test]
fn every_files_program_finds_damage() -> Result<()> {
    let cases: [(Program, &[&str], &str); 4] = [
        (Program::FilesC, &["9", "1", "none", "idle"], "file-0"),
        (Program::FilesPython, &["5"], "py-1"),
        (Program::FilesGo, &["4"], "go-0"),
        (Program::FilesJava, &["3"], "java-0"),
    ];
    for (program, arguments, victim) in cases {
        let scratch = Scratch::new()?;
        let mut target = Target::start(program, [&[text(scratch.path())?], arguments].concat())?;
        fs::write(scratch.path().join(victim), vec![0; 4095])?;
        // Java compares as it goes, the others on command.
        std::thread::sleep(Duration::from_millis(1500));
        let answer = target.ask("check")?;
        let errors = answer
            .get("errors")
            .and_then(|list| list.as_array())
            .map_or(0, Vec::len);
        ensure!(errors > 0, "{program:?} saw nothing: {answer}");
    }
    Ok(())
}

#[test]
fn mappings_agree_and_find_damage() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut target = Target::start(Program::Maps, [text(scratch.path())?, "64", "20", "none"])?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(number(&target.expect("check")?, "rounds")? > 10);
    fs::write(scratch.path().join("shared"), vec![0xee; 64 * 4096])?;
    ensure!(
        target.expect("check").is_err(),
        "damage in the shared file was not seen"
    );
    Ok(())
}

#[test]
fn locks_are_held_until_released_and_an_outsider_sees_it() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut target = Target::start(Program::Locks, [text(scratch.path())?, "10"])?;
    let mut outsider = Target::start(Program::Outsider, [text(scratch.path())?])?;
    target.expect("check")?;
    outsider.expect("reset")?;
    std::thread::sleep(Duration::from_millis(200));
    let held = outsider.expect("report")?;
    target.expect("release")?;
    std::thread::sleep(Duration::from_millis(200));
    let free = outsider.expect("report")?;
    for kind in ["flock", "ofd", "posix"] {
        let count = |answer: &serde_json::Value, key| {
            answer
                .get(kind)
                .and_then(|value| value.get(key))
                .and_then(serde_json::Value::as_u64)
                .context("no number")
        };
        ensure!(count(&held, "tries")? > 100, "{held}");
        ensure!(count(&held, "taken")? == 0, "{held}");
        ensure!(count(&free, "taken")? > 0, "{free}");
    }
    outsider.finish()?;
    target.expect("check")?;
    target.finish().map(drop)
}

#[test]
fn sqlite_pools_find_every_committed_row() -> Result<()> {
    for mode in ["wal", "delete"] {
        let scratch = Scratch::new()?;
        let database = scratch.path().join("db");
        let mut target = Target::start(Program::SqlitePool, [text(&database)?, mode, "2", "2"])?;
        std::thread::sleep(Duration::from_millis(500));
        target.expect("open 1")?;
        std::thread::sleep(Duration::from_millis(500));
        let answer = target.expect("check")?;
        ensure!(number(&answer, "committed")? > 20, "{mode}: {answer}");
        ensure!(
            number(&answer, "found")? == number(&answer, "committed")?,
            "{mode}: {answer}"
        );
        target.finish()?;
    }
    Ok(())
}

#[test]
fn sqlite_pool_finds_a_lost_row() -> Result<()> {
    let scratch = Scratch::new()?;
    let database = scratch.path().join("db");
    let mut target = Target::start(Program::SqlitePool, [text(&database)?, "wal", "1", "1"])?;
    std::thread::sleep(Duration::from_millis(300));
    let thief = "import sqlite3,sys; c=sqlite3.connect(sys.argv[1],timeout=20); c.execute('DELETE FROM t WHERE sequence=3'); c.commit()";
    hobble_testkit::command::run(
        Command::new("python3").args(["-c", thief]).arg(&database),
        Duration::from_secs(30),
    )?;
    let answer = target.ask("check")?;
    ensure!(number(&answer, "lost")? == 1, "{answer}");
    Ok(())
}

#[test]
fn waits_are_not_disturbed_by_stop_and_continue() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut target = Target::start(Program::Signals, [text(&scratch.path().join("file"))?])?;
    std::thread::sleep(Duration::from_millis(400));
    let answer = target.expect("storm 200")?;
    ensure!(
        number(&answer, "ticks")? > 10 && number(&answer, "waits")? > 5,
        "{answer}"
    );
    target.finish().map(drop)
}

#[test]
fn operations_are_counted_by_outcome() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.path().join("file");
    let mut target = Target::start(Program::Ops, [""; 0])?;
    target.expect(&format!("open 1 +c {}", text(&file)?))?;
    ensure!(number(&target.expect("write 1 100 4096")?, "ok")? == 100);
    let read = target.expect("read 1 2 4096")?;
    ensure!(
        number(&read, "sum")? == 2 * 4096 * u64::from(b'h'),
        "{read}"
    );
    let missing = target.expect(&format!("stat 3 {}/missing", text(scratch.path())?))?;
    ensure!(number(&missing, "failed")? == 3, "{missing}");
    ensure!(
        missing.get("errno").and_then(|errno| errno.get("ENOENT")) == Some(&3.into()),
        "{missing}"
    );
    target.finish().map(drop)
}

#[test]
fn a_dropped_target_is_gone_with_its_children() -> Result<()> {
    let scratch = Scratch::new()?;
    let target = Target::start(
        Program::FilesC,
        [text(scratch.path())?, "9", "4", "none", "busy"],
    )?;
    let pids: Vec<_> = target
        .pids()
        .into_iter()
        .map(process::identify)
        .collect::<Result<_>>()?;
    ensure!(pids.len() == 4);
    drop(target);
    std::thread::sleep(Duration::from_millis(100));
    for identity in pids {
        ensure!(!process::is_running(identity), "{identity:?} is left");
    }
    Ok(())
}

#[test]
fn a_traced_or_stopped_target_is_noticed() -> Result<()> {
    let target = Target::start(Program::Ops, [""; 0])?;
    target.assert_running()?;
    let tracer = Target::start(Program::Tracer, [target.pid().to_string()])?;
    ensure!(target.assert_running().is_err(), "a tracer was not noticed");
    tracer.finish()?;
    target.assert_running()?;
    target.signal(Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_millis(50));
    ensure!(target.assert_running().is_err(), "a stop was not noticed");
    target.signal(Signal::SIGCONT)?;
    Ok(())
}

#[test]
fn the_32_bit_program_runs() -> Result<()> {
    let target = Target::start(Program::Pause32, [""; 0])?;
    let exe = fs::read(format!("/proc/{}/exe", target.pid()))?;
    ensure!(exe.get(4) == Some(&1), "its executable is no ELFCLASS32");
    Ok(())
}

/// The reaper is what cleans up after a test that was killed: this test is its own victim.
#[test]
fn what_a_killed_test_leaves_is_reaped() -> Result<()> {
    const MARK: &str = "HOBBLE_TESTKIT_VICTIM";
    if let Some(report) = std::env::var_os(MARK) {
        let namespace = Namespace::enter()?;
        let volume = Volume::sized(&namespace, Kind::Ext4, 64 << 20)?;
        let target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "9", "1", "none", "busy"],
        )?;
        fs::write(
            report,
            format!(
                "{}\n{}\n{}",
                target.pid(),
                target.identity().start,
                text(volume.path())?
            ),
        )?;
        target.signal(Signal::SIGSTOP)?;
        std::thread::sleep(Duration::from_secs(60));
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let report = scratch.path().join("report");
    let mut victim = Command::new(std::env::current_exe()?)
        .args([
            "--exact",
            "what_a_killed_test_leaves_is_reaped",
            "--nocapture",
        ])
        .env(MARK, &report)
        .stdout(std::process::Stdio::null())
        .spawn()?;
    for _ in 0..3000 {
        if fs::read_to_string(&report).is_ok_and(|text| text.lines().count() == 3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let said = fs::read_to_string(&report);
    victim.kill()?;
    victim.wait()?;
    let said = said?;
    let lines: Vec<&str> = said.lines().collect();
    let identity = process::Identity {
        pid: lines[0].parse()?,
        start: lines[1].parse()?,
    };
    let volume = std::path::Path::new(lines[2]);
    for _ in 0..1000 {
        if !process::is_running(identity) && !volume.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!(
        "left behind: target running {}, volume there {}",
        process::is_running(identity),
        volume.exists()
    )
}
