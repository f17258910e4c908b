//! `kill -9` of the server, of the command, of both, of all: at every step of an attachment and at random moments. The target runs on, is native again
//! after `hobble recover --all` (or earlier, where the holder does it), and has its unlinked files and its locks. What it may see
//! in between are errors, never wrong data.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{
    assert_hooked, assert_same_descriptors, assert_unmounted, cycles, movable, scene,
};
use hobble_testkit::hobble::{Hobble, STEP};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const RULES: [&str; 4] = [
    "--fault",
    "latency=1ms op=read percent=10",
    "--fault",
    "errno=EIO op=write percent=5",
];

fn kill_all(pids: &[u32]) {
    for pid in pids {
        // One that has ended meanwhile needs no killing.
        let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
    }
}

/// Waits until nothing of Hobble acts on the state directory any more, then recovers what is left.
fn clean_up(hobble: &Hobble) -> Result<()> {
    let said = hobble.output(["recover", "--all"])?;
    ensure!(
        said.status.success(),
        "`recover --all` ended with {}: {}{}",
        said.status,
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
    hobble_e2e::until(
        "every process of Hobble has gone",
        Duration::from_secs(15),
        || hobble.processes().is_empty(),
    )?;
    Ok(())
}

/// What becomes of the hook of a dead server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is served on, where it can be.
    TakenOver,
    /// It is undone, as on a kernel that does not hand out again what the dead server had taken.
    Undone,
}

/// One target, crashed upon again and again by `crash`, each time put back and looked at.
fn survives(
    fate: Fate,
    crashes: &[&str],
    mut crash: impl FnMut(&str, &mut Hobble, &Volume<'_>, u32) -> Result<()>,
) -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("crashing"))?;
        hobble.env("HOBBLE_LOG", "debug");
        if fate == Fate::Undone {
            hobble.env("HOBBLE_MASK", "has_resend");
        }
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "27", "2", "nap", "busy"],
        )?;
        let before = movable(&target)?;
        for name in crashes {
            let mut step = || -> Result<()> {
                target.expect("tolerate 1")?;
                crash(name, &mut hobble, volume, target.pid())?;
                hobble.keep_logs();
                clean_up(&hobble)?;
                target.expect("tolerate 0")?;
                assert_hooked(&target, volume.path(), false)?;
                assert_same_descriptors(&target, &before)?;
                target.expect("check")?;
                target.assert_running()
            };
            let result = step().with_context(|| format!("killed at {name}"));
            if result.is_err() {
                eprint!("{}", hobble.logs());
            }
            result?;
        }
        target.finish().map(drop)
    })
}

#[test]
fn the_server_dies_at_every_step() -> Result<()> {
    dies_at_every_step(Fate::TakenOver)
}

#[test]
fn the_server_dies_at_every_step_and_the_hook_is_undone() -> Result<()> {
    dies_at_every_step(Fate::Undone)
}

fn dies_at_every_step(fate: Fate) -> Result<()> {
    let hobble = Hobble::new()?;
    let listed = hobble.run(["__fault-points"])?;
    let mut points: Vec<&str> = listed.split_ascii_whitespace().collect();
    // Only a successor comes by these; see the tests of taking over.
    points.retain(|point| !point.starts_with("take"));
    // Of two processes that share everything one has been moved and the other not yet, on the way in and on the way out. The holder's successors come by these
    // points too, and die there as well: what they leave is for `recover --all`.
    points.extend([
        "borrowing:2",
        "exchanging-descriptors:2",
        "exchanging-descriptors:3",
        "exchanging-descriptors:4",
    ]);
    ensure!(
        points.len() > 10,
        "`hobble __fault-points` lists {points:?}"
    );
    survives(fate, &points, |point, hobble, volume, pid| {
        hobble.env("HOBBLE_FAULT_POINT", point);
        let injecting = hobble.attach(pid, volume.path(), &RULES);
        hobble.unset("HOBBLE_FAULT_POINT");
        // Points after `injecting` need something to happen; every command may fail here.
        if let Ok(mut injection) = injecting {
            hobble.output(["update", "--fault", "latency=2ms op=read"])?;
            injection.signal(Signal::SIGINT)?;
            while injection
                .next_event(STEP)
                .context("the command hangs after its server has died")?
                .is_some()
            {}
            let status = injection
                .status(STEP)
                .context("the command hangs after its server has died")?;
            // Where another server has taken over, nobody but its log can tell.
            let taken_over = fate == Fate::TakenOver && injection.event("taken_over").is_some();
            ensure!(
                !status.success() || taken_over,
                "the step was never reached"
            );
        }
        Ok(())
    })
}

#[test]
fn the_server_dies_at_a_random_moment() -> Result<()> {
    at_random_moments(Fate::TakenOver, "server", |hobble, _| hobble.servers())
}

#[test]
fn the_server_dies_at_a_random_moment_and_the_hook_is_undone() -> Result<()> {
    at_random_moments(Fate::Undone, "server", |hobble, _| hobble.servers())
}

#[test]
fn the_command_dies_at_a_random_moment() -> Result<()> {
    at_random_moments(Fate::TakenOver, "command", |_, command| vec![command])
}

#[test]
fn server_and_command_die_at_a_random_moment() -> Result<()> {
    at_random_moments(Fate::TakenOver, "server and command", |hobble, command| {
        let mut pids = hobble.servers();
        pids.push(command);
        pids
    })
}

#[test]
fn everything_dies_but_the_target() -> Result<()> {
    // Without its holder the descriptors of unlinked files cannot survive while the target is hooked; before the switch
    // and after recovery nothing may be lost. What is promised after `attached` is that the mount goes and the target runs.
    scene(Kind::Ext4, |outer, volume| {
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "9", "1", "nap", "busy"],
        )?;
        target.expect("tolerate 1")?;
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("crashing"))?;
        let injection = hobble.attach(target.pid(), volume.path(), &RULES)?;
        let everybody = [hobble.holders(), hobble.servers()].concat();
        ensure!(
            everybody.len() >= 2,
            "holder and server were not found: {everybody:?}"
        );
        kill_all(&everybody);
        drop(injection);
        let said = hobble.output(["recover", "--all", "--force"])?;
        println!(
            "recover said {}: {}",
            said.status,
            String::from_utf8_lossy(&said.stdout)
        );
        assert_unmounted(&target.pid().to_string(), volume.path())?;
        target.assert_running()
    })
}

#[test]
fn fifteen_thousand_files_outlive_the_server() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("crashing"))?;
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "15000", "1", "nap", "busy"],
        )?;
        let before = movable(&target)?;
        target.expect("tolerate 1")?;
        let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        let servers = hobble.servers();
        ensure!(!servers.is_empty(), "the server was not found");
        kill_all(&servers);
        drop(injection);
        clean_up(&hobble)?;
        target.expect("tolerate 0")?;
        assert_hooked(&target, volume.path(), false)?;
        assert_same_descriptors(&target, &before)?;
        target.expect("check")?;
        target.finish().map(drop)
    })
}

fn at_random_moments(
    fate: Fate,
    who: &str,
    victims: impl Fn(&Hobble, u32) -> Vec<u32>,
) -> Result<()> {
    let rounds = cycles(7);
    let names: Vec<String> = (0..rounds)
        .map(|round| format!("{who}, round {round}"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    // Spread evenly over what an attachment takes, which every run lengthens or shortens a little.
    let mut moment = 0_u32;
    survives(fate, &names, |_, hobble, volume, pid| {
        moment += 1;
        let mut injection = hobble.inject(
            ["--pid", &pid.to_string(), "--path", text(volume.path())?]
                .into_iter()
                .chain(RULES),
        )?;
        let late = moment.is_multiple_of(3);
        if late {
            injection.wait_event("injecting", STEP)?;
        }
        std::thread::sleep(Duration::from_millis(u64::from(moment) * 37 % 200));
        let victims = victims(hobble, injection.pid());
        // Early on there may be no server yet; an attachment that stands has one.
        ensure!(!late || !victims.is_empty(), "there is nobody to kill");
        kill_all(&victims);
        std::thread::sleep(Duration::from_millis(u64::from(moment) * 53 % 150));
        Ok(())
    })
}

#[test]
fn locks_outlive_the_server() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("crashing"))?;
        let mut target = Target::start(Program::Locks, [text(volume.path())?, "5"])?;
        let mut outsider = Target::start(Program::Outsider, [text(volume.path())?])?;
        for _ in 0..cycles(3) {
            let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
            outsider.expect("reset")?;
            let servers = hobble.servers();
            ensure!(!servers.is_empty(), "the server was not found");
            kill_all(&servers);
            std::thread::sleep(Duration::from_millis(300));
            let seen = outsider.expect("report")?;
            for kind in ["flock", "ofd", "posix"] {
                ensure!(
                    seen.pointer(&format!("/{kind}/taken")) == Some(&0.into()),
                    "{kind} was lost with the server: {seen}"
                );
            }
            drop(injection);
            clean_up(&hobble)?;
            target.expect("check").context("after recovery")?;
            let seen = outsider.expect("report")?;
            for kind in ["flock", "ofd", "posix"] {
                ensure!(
                    seen.pointer(&format!("/{kind}/taken")) == Some(&0.into()),
                    "{kind} was free while it was given back: {seen}"
                );
            }
        }
        outsider.finish()?;
        target.finish().map(drop)
    })
}

/// What one process holds of the ten bytes of `SPANS`, as another sees it.
fn held_of(outsider: &mut Target, span: u64) -> Result<u64> {
    number(&outsider.expect(&format!("held 1 {span} 10"))?, "sum")
}

#[test]
fn locks_taken_and_given_up_while_attached_outlive_the_server() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("crashing"))?;
        let file = volume.path().join("file");
        let open = format!("open 1 +c {}", text(&file)?);
        let mut target = Target::start(Program::Ops, [""; 0])?;
        let mut outsider = Target::start(Program::Ops, [""; 0])?;
        target.expect(&open)?;
        target.expect("write 1 16 4096")?;
        // A descriptor through which no write lock can be taken.
        target.expect(&format!("open 2 r {}", text(&file)?))?;
        outsider.expect(&open.replace("+c", "+"))?;
        for _ in 0..cycles(3) {
            target.expect("lock 1 w 0 10")?;
            target.expect("lock 1 w 100 10")?;
            let injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
            target.expect("lock 1 u 100 10")?;
            target.expect("lock 1 w 200 10")?;
            target.expect("lock 1 r 300 10")?;
            kill_all(&hobble.servers());
            drop(injection);
            clean_up(&hobble)?;
            assert_hooked(&target, volume.path(), false)?;
            let seen: Vec<u64> = [0, 100, 200, 300]
                .into_iter()
                .map(|span| held_of(&mut outsider, span))
                .collect::<Result<_>>()?;
            ensure!(
                seen == [2, 0, 2, 1],
                "held at 0, 100, 200 and 300: {seen:?}"
            );
            for span in [0, 200, 300] {
                target.expect(&format!("lock 1 u {span} 10"))?;
                ensure!(
                    held_of(&mut outsider, span)? == 0,
                    "a lock at {span} cannot be given up"
                );
            }
        }
        outsider.finish()?;
        target.finish().map(drop)
    })
}
