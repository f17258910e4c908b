//! The server is killed and another takes over: no operation of the target fails, nothing is done twice, and the experiment goes on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hobble_e2e::{
    assert_hooked, assert_same_descriptors, assert_unmounted, cycles, movable, rule_count, scene,
    until,
};
use hobble_testkit::hobble::{Hobble, Injection, STEP};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::Kind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Reads and writes come to the server, and nothing is ever done to them.
const NEVER: [&str; 4] = [
    "--fault",
    "errno=EIO op=read,write,rename percent=0",
    "--fault",
    "latency=1s op=fsync after=1000000000",
];

/// The longest that any one operation may take because the server was killed (issue: under 1 s).
const LONGEST: Duration = Duration::from_secs(1);

fn only_server(hobble: &Hobble) -> Result<u32> {
    let mut servers = Vec::new();
    until("there is one server", STEP, || {
        servers = hobble.servers();
        servers.len() == 1
    })?;
    servers.first().copied().context("one server")
}

fn send(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(pid.cast_signed()), signal)?)
}

/// Kills the server, and waits until another says that it has taken over.
fn kill_and_wait(hobble: &Hobble, injection: &mut Injection) -> Result<u32> {
    let server = only_server(hobble)?;
    send(server, Signal::SIGKILL)?;
    let until = Instant::now() + STEP;
    while Instant::now() < until {
        let Some(event) = injection.next_event(STEP)? else {
            break;
        };
        if event.pointer("/event") == Some(&"taken_over".into()) {
            ensure!(event.pointer("/goes_on") == Some(&true.into()), "{event}");
            return u32::try_from(number(&event, "server_pid")?).context("a pid");
        }
    }
    bail!("nobody has taken over: {}", injection.said())
}

#[test]
fn no_operation_fails_and_none_is_done_twice() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        hobble.env("HOBBLE_LOG", "debug");
        let mut target = Target::start(Program::Once, [text(volume.path())?, "3"])?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &NEVER)?;
        target.expect("reset")?;
        let id = injection.id()?.to_owned();
        let mut work = || -> Result<()> {
            for round in 0..cycles(25) {
                // Sometimes while what the one before has taken over is still being answered.
                std::thread::sleep(Duration::from_millis(u64::from(round) * 37 % 170));
                let taken = kill_and_wait(&hobble, &mut injection).context("another takes over");
                target
                    .expect("report")
                    .with_context(|| format!("round {round}"))?;
                taken?;
            }
            target.expect("check")?;
            assert_hooked(&target, volume.path(), true)
        };
        let worked = work();
        if worked.is_err() {
            hobble.keep_logs();
            eprint!("{}", hobble.logs());
        }
        worked?;
        ensure!(injection.id()? == id, "another attachment");
        let seen = target.expect("report")?;
        let longest = Duration::from_micros(number(&seen, "longest_us")?);
        println!(
            "longest operation: {longest:?} of {}",
            number(&seen, "operations")?
        );
        ensure!(longest < LONGEST, "an operation took {longest:?}");
        let recovered = injection.recover()?;
        ensure!(
            rule_count(&recovered, "errno-1", "matched")? > 0,
            "{recovered}"
        );
        assert_hooked(&target, volume.path(), false)?;
        assert_unmounted(&target.pid().to_string(), volume.path())?;
        target.expect("check").context("after recovery")?;
        target.finish().map(drop)
    })
}

#[test]
fn rules_counts_and_commands_go_on() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        let path = text(volume.path())?;
        let mut target = Target::start(Program::Ops, [path])?;
        target.expect(&format!("open 0 +c {path}/a"))?;
        let mut injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=ENOSPC op=fsync times=3", "--seed", "7"],
        )?;
        for _ in 0..2 {
            ensure!(
                number(&target.ask("fsync 0 1")?, "failed")? == 1,
                "the rule does not fire"
            );
        }
        // What was counted is noted within a tenth of a second.
        std::thread::sleep(Duration::from_millis(300));
        kill_and_wait(&hobble, &mut injection)?;
        ensure!(
            number(&target.ask("fsync 0 1")?, "failed")? == 1,
            "the rule has gone"
        );
        ensure!(
            number(&target.ask("fsync 0 1")?, "failed")? == 0,
            "`times` began anew with the new server"
        );
        let status = hobble.json(&["show"])?;
        ensure!(status.pointer("/seed") == Some(&7.into()), "{status}");
        hobble.run(["pause"])?;
        kill_and_wait(&hobble, &mut injection)?;
        let status = hobble.json(&["show"])?;
        ensure!(status.pointer("/paused") == Some(&true.into()), "{status}");
        hobble.run(["update", "--fault", "errno=EDQUOT op=fsync"])?;
        ensure!(
            number(&target.ask("fsync 0 1")?, "failed")? == 0,
            "it is paused"
        );
        kill_and_wait(&hobble, &mut injection)?;
        hobble.run(["resume"])?;
        ensure!(
            number(&target.ask("fsync 0 1")?, "failed")? == 1,
            "the updated rule has gone"
        );
        injection.recover()?;
        ensure!(
            number(&target.ask("fsync 0 1")?, "failed")? == 0,
            "a fault after recovery"
        );
        target.finish().map(drop)
    })
}

#[test]
fn with_failover_recover_the_target_is_native_and_has_seen_no_error() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        let mut target = Target::start(Program::Once, [text(volume.path())?, "2"])?;
        for _ in 0..cycles(3) {
            let more: Vec<&str> = NEVER
                .iter()
                .copied()
                .chain(["--failover", "recover"])
                .collect();
            let mut injection = hobble.attach(target.pid(), volume.path(), &more)?;
            std::thread::sleep(Duration::from_millis(100));
            send(only_server(&hobble)?, Signal::SIGKILL)?;
            let taken = injection.wait_event("taken_over", STEP)?;
            ensure!(taken.pointer("/goes_on") == Some(&false.into()), "{taken}");
            injection.wait_event("recovered", STEP)?;
            assert_hooked(&target, volume.path(), false)?;
            assert_unmounted(&target.pid().to_string(), volume.path())?;
            target.expect("check")?;
            until("every process of Hobble has gone", STEP, || {
                hobble.processes().is_empty()
            })?;
        }
        target.finish().map(drop)
    })
}

#[test]
fn locks_stay_taken_while_servers_are_killed() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        let mut target = Target::start(Program::Locks, [text(volume.path())?, "5"])?;
        let mut outsider = Target::start(Program::Outsider, [text(volume.path())?])?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        outsider.expect("reset")?;
        for _ in 0..cycles(6) {
            kill_and_wait(&hobble, &mut injection)?;
            let seen = outsider.expect("report")?;
            for kind in ["flock", "ofd", "posix"] {
                let taken = seen.pointer(&format!("/{kind}/taken"));
                ensure!(taken == Some(&0.into()), "{kind} was lost: {seen}");
            }
            target.expect("check")?;
        }
        injection.recover()?;
        target.expect("check").context("after recovery")?;
        outsider.finish()?;
        target.finish().map(drop)
    })
}

#[test]
fn a_server_that_is_stopped_is_replaced() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        hobble.env("HOBBLE_LOG", "debug");
        let mut target = Target::start(Program::Once, [text(volume.path())?, "1"])?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &NEVER)?;
        let begun = Instant::now();
        send(only_server(&hobble)?, Signal::SIGSTOP)?;
        let taken = injection.wait_event("taken_over", Duration::from_secs(30));
        if taken.is_err() {
            hobble.keep_logs();
            eprint!("{}", hobble.logs());
        }
        taken?;
        println!("replaced after {:?}", begun.elapsed());
        target.expect("check")?;
        injection.recover()?;
        target.finish().map(drop)
    })
}

/// Successors that die at a step of their own, one after the other, until the hook is undone: that is not without errors, but the target is native and has its files.
#[test]
fn successors_die_at_every_step_of_their_own() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "27", "2", "nap", "busy"],
        )?;
        let before = movable(&target)?;
        for point in ["takeover-claimed", "takeover-served", "taken-over"] {
            let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
            hobble.env("HOBBLE_LOG", "debug");
            // The holder arms it once, so every successor that comes by it dies.
            hobble.env("HOBBLE_FAULT_POINT", point);
            target.expect("tolerate 1")?;
            let injection = hobble.attach(target.pid(), volume.path(), &NEVER)?;
            send(only_server(&hobble)?, Signal::SIGKILL)?;
            hobble.keep_logs();
            let mut look = || -> Result<()> {
                until("it is undone", Duration::from_secs(30), || {
                    hobble.processes().iter().all(|pid| *pid == injection.pid())
                })?;
                target.expect("tolerate 0")?;
                assert_hooked(&target, volume.path(), false)?;
                assert_unmounted(&target.pid().to_string(), volume.path())?;
                assert_same_descriptors(&target, &before)?;
                target.expect("check").map(drop)
            };
            let looked = look();
            if looked.is_err() {
                eprint!("{}", hobble.logs());
            }
            looked.with_context(|| format!("killed at {point}"))?;
        }
        target.finish().map(drop)
    })
}

/// A server is killed, and whoever takes over as soon as it can be seen, a few times in a row.
#[test]
fn a_successor_is_killed_while_it_takes_over() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        hobble.env("HOBBLE_LOG", "debug");
        let mut target = Target::start(Program::Once, [text(volume.path())?, "2"])?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &NEVER)?;
        let mut work = || -> Result<()> {
            for round in 0..cycles(4) {
                let mut dead = only_server(&hobble)?;
                send(dead, Signal::SIGKILL)?;
                for again in 0..3 {
                    until("there is another", STEP, || {
                        hobble.servers().iter().any(|pid| *pid != dead)
                    })?;
                    let next = hobble.servers().into_iter().find(|pid| *pid != dead);
                    dead = next.unwrap_or(dead);
                    // From before it has claimed the attachment to when it serves.
                    std::thread::sleep(Duration::from_millis(u64::from(round * 3 + again) * 2));
                    send(dead, Signal::SIGKILL)?;
                }
                kill_and_wait(&hobble, &mut injection)?;
                target
                    .expect("report")
                    .with_context(|| format!("round {round}"))?;
                // Ten that live no longer than a moment each are taken for a request that kills whoever serves it, and the hook is undone.
                std::thread::sleep(Duration::from_millis(250));
                hobble.keep_logs();
            }
            target.expect("check").map(drop)
        };
        let worked = work();
        if worked.is_err() {
            hobble.keep_logs();
            eprint!("{}", hobble.logs());
        }
        worked?;
        hobble.keep_logs();
        let recovered = injection.recover();
        if recovered.is_err() {
            eprint!("{}", hobble.logs());
        }
        recovered?;
        target.expect("check").context("after recovery")?;
        target.finish().map(drop)
    })
}

/// Two processes with pooled connections in WAL mode: every row that was committed is found, and SQLite sees no error.
#[test]
fn sqlite_sees_nothing() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("killed"))?;
        let database = volume.path().join("db");
        let mut target = Target::start(Program::SqlitePool, [text(&database)?, "wal", "2", "2"])?;
        std::thread::sleep(Duration::from_millis(300));
        let mut injection = hobble.attach(target.pid(), volume.path(), &NEVER)?;
        for round in 0..cycles(8) {
            if round == 2 {
                target.expect("open 1").context("while attached")?;
            }
            kill_and_wait(&hobble, &mut injection).with_context(|| format!("round {round}"))?;
            std::thread::sleep(Duration::from_millis(150));
        }
        injection.signal(Signal::SIGINT)?;
        injection.wait_event("recovered", STEP)?;
        let found = target.expect("check")?;
        println!("{found}");
        ensure!(number(&found, "committed")? > 100, "{found}");
        ensure!(number(&found, "lost")? == 0, "{found}");
        ensure!(
            found.get("failures") == Some(&serde_json::json!({})),
            "SQLite saw errors: {found}"
        );
        target.finish()?;
        hobble.recover_all().map(drop)
    })
}

/// A lease is kept by renewing it, also with the server that takes over, and ends the experiment when nobody does.
#[test]
fn a_lease_that_is_not_renewed_ends_the_experiment() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("leased"))?;
        let mut target = Target::start(Program::Once, [text(volume.path())?, "1"])?;
        let more: Vec<&str> = NEVER.iter().copied().chain(["--lease", "1500ms"]).collect();
        let mut injection = hobble.attach(target.pid(), volume.path(), &more)?;
        let begun = Instant::now();
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(700));
            hobble.run(["renew"])?;
            if round == 1 {
                kill_and_wait(&hobble, &mut injection)?;
            }
        }
        ensure!(
            begun.elapsed() > Duration::from_millis(2500),
            "it was not kept"
        );
        let renewed = Instant::now();
        let recovering = injection.wait_event("recovering", STEP)?;
        ensure!(
            recovering.pointer("/why") == Some(&"lost_lease".into()),
            "{recovering}"
        );
        let waited = renewed.elapsed();
        ensure!(
            waited > Duration::from_millis(1000) && waited < Duration::from_millis(2500),
            "it ended {waited:?} after it was renewed"
        );
        injection.wait_event("recovered", STEP)?;
        target.expect("check")?;
        let said = hobble.output(["renew"])?;
        ensure!(!said.status.success(), "there is nothing to renew");
        target.finish().map(drop)
    })
}
