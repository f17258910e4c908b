//! Living with an attachment: list, show, update, pause, resume, events, deadline, detaching, the target's end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hobble_e2e::{assert_hooked, scene, until};
use hobble_testkit::hobble::{Hobble, STEP};
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use nix::sys::signal::Signal;
use serde_json::Value;

fn open_target(volume: &Volume<'_>) -> Result<Target> {
    let mut target = Target::start(Program::Ops, [""; 0])?;
    target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
    target.expect("write 1 16 4096")?;
    Ok(target)
}

fn failed(target: &mut Target, command: &str) -> Result<u64> {
    number(&target.expect(command)?, "failed")
}

fn lines(text: &str) -> Result<Vec<Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
        .collect()
}

#[test]
fn rules_are_updated_paused_and_resumed_live() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=write"],
        )?;
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        hobble.run(["pause"])?;
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        hobble.run(["resume"])?;
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        // Another operation, which decides about the mode of files that are open already.
        hobble.run(["update", "--fault", "errno=ENOSPC op=read"])?;
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        let reads = target.expect("read 1 10 64")?;
        ensure!(hobble_e2e::errno(&reads, "ENOSPC") == 10, "{reads}");
        hobble.run(["update", "--fault", "latency=30ms op=fsync"])?;
        ensure!(failed(&mut target, "read 1 10 64")? == 0);
        ensure!(number(&target.expect("fsync 1 3")?, "median_us")? >= 30_000);
        injection.recover()?;
        target.finish().map(drop)
    })
}

#[test]
fn a_wrong_update_changes_nothing() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=write"],
        )?;
        let said = hobble.output(["update", "--fault", "errno=EIOU op=write"])?;
        ensure!(said.status.code() == Some(2), "{said:?}");
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        injection.recover()?;
        target.finish().map(drop)
    })
}

/// Opens `a-N` over and over while `go` is in force, keeps all of them and writes to each when told to.
const OPENER: &str = r#"
import json, os, sys, threading, time
at, files, going = sys.argv[1], [], threading.Event()
def work():
    while True:
        going.wait()
        files.append(os.open(f"{at}/a-{len(files)}", os.O_RDWR | os.O_CREAT))
        time.sleep(0.004)
seen = os.open(f"{at}/b", os.O_RDWR | os.O_CREAT)
threading.Thread(target=work, daemon=True).start()
print(json.dumps({"ready": True, "pids": []}), flush=True)
for line in sys.stdin:
    answer = {"errors": []}
    if line.strip() == "go":
        going.set()
    elif line.strip() == "halt":
        going.clear()
        time.sleep(0.05)
    elif line.strip() == "write":
        answer |= {"ok": 0, "failed": 0}
        for file in files:
            try:
                os.pwrite(file, b"x", 0)
                answer["ok"] += 1
            except OSError:
                answer["failed"] += 1
    print(json.dumps(answer), flush=True)
    if line.strip() == "quit":
        break
"#;

#[test]
fn an_update_that_fails_says_which_files_the_former_rules_do_not_see() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", OPENER, text(volume.path())?]);
        let mut target = Target::start_command(command)?;
        let former = ["--fault", "errno=EIO op=write path=a-*"];
        let injection = hobble.attach(target.pid(), volume.path(), &former)?;
        let unseen = || -> Result<Vec<Value>> {
            let shown = hobble.json(&["show"])?;
            let listed = shown.get("not_covered").and_then(Value::as_array);
            Ok(listed
                .into_iter()
                .flatten()
                .filter(|item| item.to_string().contains("open file"))
                .cloned()
                .collect())
        };
        // Whoever is traced cannot be stopped by us, so no open file can be exchanged.
        let tracer = Target::start(Program::Tracer, [target.pid().to_string()])?;
        target.expect("go")?;
        let said = hobble.output(["update", "--fault", "errno=EIO op=read path=b"])?;
        let message = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(!said.status.success(), "{said:?}");
        target.expect("halt")?;
        ensure!(
            message.contains("the former rules are in force except for"),
            "{message}"
        );
        let told = unseen()?;
        ensure!(told.len() == 1, "{told:?}");
        let events = lines(&hobble.run(["events", injection.id()?, "--json"])?)?;
        ensure!(
            events
                .iter()
                .any(|event| event.get("event") == Some(&"not_covered".into())),
            "{events:?}"
        );
        // No more than it said, and those for which the former rules could be kept are faulted.
        let number_told: u64 = told
            .first()
            .and_then(|item| item.get("what")?.as_str()?.split(' ').next()?.parse().ok())
            .context("no number of files")?;
        let written = target.expect("write")?;
        ensure!(
            number(&written, "ok")? == number_told,
            "{written}: {told:?}"
        );
        // Once it can be stopped, the next change of the rules opens them anew.
        tracer.finish()?;
        hobble.run(["update", former[0], former[1]])?;
        let written = target.expect("write")?;
        ensure!(
            number(&written, "ok")? == 0 && number(&written, "failed")? > 0,
            "{written}"
        );
        ensure!(unseen()?.is_empty(), "{:?}", unseen()?);
        injection.recover()?;
        target.finish().map(drop)
    })
}

#[test]
fn a_parked_operation_does_not_hold_up_an_update() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "latency=30s op=write"],
        )?;
        target.tell("write 1 1 64")?;
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        hobble.run(["update", "--fault", "latency=1ms op=read"])?;
        ensure!(
            start.elapsed() < Duration::from_secs(5),
            "the update took {:?}",
            start.elapsed()
        );
        // Removing a fault releases what waits for it.
        let write = target.answer(Duration::from_secs(5))?;
        ensure!(number(&write, "ok")? == 1, "{write}");
        injection.recover()?;
        target.finish().map(drop)
    })
}

#[test]
fn a_detached_attachment_is_listed_shown_and_recovered() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let pid = target.pid().to_string();
        let at = text(volume.path())?;
        hobble.run([
            "inject",
            "--json",
            "--detach",
            "--pid",
            &pid,
            "--path",
            at,
            "--fault",
            "errno=EIO op=write",
        ])?;
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        let list = hobble.run(["ps", "--json"])?;
        ensure!(list.contains(at), "{list}");
        let shown = hobble.json(&["show"])?;
        ensure!(shown.get("phase") == Some(&"attached".into()), "{shown}");
        ensure!(
            shown.pointer("/targets/0/pid") == Some(&target.pid().into()),
            "{shown}"
        );
        ensure!(
            shown.pointer("/rules/0/injected") == Some(&10.into()),
            "{shown}"
        );
        let id = shown
            .get("id")
            .and_then(Value::as_str)
            .context("no id")?
            .to_owned();
        let human = hobble.run(["show", &id])?;
        ensure!(human.contains("errno-1"), "{human}");
        let events = lines(&hobble.run(["events", &id, "--json"])?)?;
        for name in ["attached", "injecting"] {
            ensure!(
                events
                    .iter()
                    .any(|event| event.get("event") == Some(&name.into())),
                "no {name} in {events:?}"
            );
        }
        hobble.run(["recover", &id])?;
        assert_hooked(&target, volume.path(), false)?;
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        ensure!(
            lines(&hobble.run(["ps", "--json"])?)?
                .iter()
                .all(|row| row.get("id") != Some(&id.as_str().into()))
        );
        until("the server has gone", Duration::from_secs(5), || {
            hobble.processes().is_empty()
        })?;
        target.finish().map(drop)
    })
}

#[test]
fn the_deadline_recovers() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let mut injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=write", "--for", "1s"],
        )?;
        let start = Instant::now();
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        injection.wait_event("recovered", STEP)?;
        ensure!(injection.status(STEP)?.success(), "{}", injection.said());
        let took = start.elapsed();
        ensure!(
            (Duration::from_millis(600)..Duration::from_secs(5)).contains(&took),
            "recovered after {took:?}"
        );
        let why = injection
            .event("recovering")
            .and_then(|event| event.get("why"))
            .cloned();
        ensure!(why == Some("deadline".into()), "{why:?}");
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        target.finish().map(drop)
    })
}

#[test]
fn a_terminated_command_recovers() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = open_target(volume)?;
        let mut injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=write"],
        )?;
        injection.signal(Signal::SIGTERM)?;
        injection.wait_event("recovered", STEP)?;
        injection.status(STEP)?;
        assert_hooked(&target, volume.path(), false)?;
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        target.finish().map(drop)
    })
}

#[test]
fn the_end_of_the_target_ends_the_attachment() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let target = open_target(volume)?;
        let mut injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
        target.finish()?;
        injection.wait_event("recovered", STEP)?;
        injection.status(STEP)?;
        Ok(())
    })
}

#[test]
fn children_are_faulted_too_and_strangers_are_not() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        std::fs::write(volume.path().join("file"), "true")?;
        let script = "echo '{\"ready\":true,\"pids\":[]}'; while read -r line; do [ \"$line\" = quit ] && { echo '{\"errors\":[]}'; exit 0; }; \
                      if (eval \"$line\") >/dev/null 2>&1; then echo '{\"errors\":[],\"ok\":1}'; else echo '{\"errors\":[],\"ok\":0}'; fi; done";
        let mut command = std::process::Command::new("bash");
        command.args(["-c", script]).current_dir(volume.path());
        let mut shell = Target::start_command(command)?;
        let injection = hobble.attach(
            shell.pid(),
            volume.path(),
            &["--fault", "errno=EACCES op=open path=file"],
        )?;
        for child in [
            "cat file",
            "setsid cat file",
            "(cat file; exit $?) & wait $!",
        ] {
            ensure!(
                number(&shell.expect(child)?, "ok")? == 0,
                "`{child}` was not faulted"
            );
        }
        let mut stranger = Target::start(Program::Ops, [""; 0])?;
        ensure!(
            number(
                &stranger.expect(&format!("openclose 100 {at}/file"))?,
                "failed"
            )? == 0
        );
        stranger.finish()?;
        injection.recover()?;
        ensure!(number(&shell.expect("cat file")?, "ok")? == 1);
        shell.finish().map(drop)
    })
}

#[test]
fn scope_namespace_hits_everybody_in_it() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        // A namespace of its own, so that nobody else is in it: the test itself stays outside.
        let inside = |command: &mut std::process::Command| -> Result<std::process::Command> {
            let mut wrapped = std::process::Command::new("unshare");
            wrapped
                .args(["--mount", "--propagation", "private", "--"])
                .arg(command.get_program())
                .args(command.get_args());
            Ok(wrapped)
        };
        let first = Target::start_command(inside(&mut Program::Ops.command()?)?)?;
        let mut join = std::process::Command::new("nsenter");
        join.args(["--mount", "--target", &first.pid().to_string(), "--"])
            .arg(Program::Ops.command()?.get_program());
        let mut second = Target::start_command(join)?;
        second.expect(&format!("open 1 +c {at}/file"))?;
        let injection = hobble.attach(
            first.pid(),
            volume.path(),
            &["--scope", "namespace", "--fault", "errno=EIO op=write"],
        )?;
        ensure!(failed(&mut second, "write 1 10 64")? == 10);
        injection.recover()?;
        ensure!(failed(&mut second, "write 1 10 64")? == 0);
        second.finish()?;
        first.finish().map(drop)
    })
}

#[test]
fn a_dry_run_touches_nothing() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let target = open_target(volume)?;
        let mounts = hobble_testkit::process::mounts(&target.pid().to_string())?;
        let before = hobble_e2e::movable(&target)?;
        let plan = hobble.run([
            "inject",
            "--dry-run",
            "--json",
            "--pid",
            &target.pid().to_string(),
            "--path",
            text(volume.path())?,
            "--fault",
            "errno=EIO op=write",
        ])?;
        let plan: Value = serde_json::from_str(plan.trim()).context(plan)?;
        ensure!(
            matches!(
                plan.get("verdict").and_then(Value::as_str),
                Some("ok" | "degraded")
            ),
            "{plan}"
        );
        ensure!(
            plan.pointer("/processes/0/pid") == Some(&target.pid().into()),
            "{plan}"
        );
        ensure!(hobble_testkit::process::mounts(&target.pid().to_string())? == mounts);
        ensure!(hobble_e2e::movable(&target)? == before);
        target.finish().map(drop)
    })
}

#[test]
fn two_attachments_side_by_side() -> Result<()> {
    scene(Kind::Ext4, |hobble: &Hobble, volume| {
        let mut targets = [open_target(volume)?, open_target(volume)?];
        let directories = [volume.directory("a")?, volume.directory("b")?];
        let mut injections = Vec::new();
        for (target, directory) in targets.iter_mut().zip(&directories) {
            target.expect(&format!("open 2 +c {}/own", text(directory)?))?;
            injections.push(hobble.attach(
                target.pid(),
                directory,
                &["--fault", "errno=EIO op=write"],
            )?);
        }
        // With two of them a command has to say which.
        ensure!(
            hobble.output(["pause"])?.status.code() == Some(2),
            "an ambiguous command was carried out"
        );
        let first = injections[0].id()?.to_owned();
        hobble.run(["pause", &first])?;
        ensure!(failed(&mut targets[0], "write 2 5 64")? == 0);
        ensure!(failed(&mut targets[1], "write 2 5 64")? == 5);
        for injection in injections {
            injection.recover()?;
        }
        for target in targets {
            target.finish()?;
        }
        Ok(())
    })
}

#[test]
fn a_file_renamed_under_a_rule_that_cannot_be_opened_anew_is_told_of() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {at}/new.tmp"))?;
        let rules = ["--fault", "errno=EIO op=write path=current.log"];
        let injection = hobble.attach(target.pid(), volume.path(), &rules)?;
        let not_covered = || -> Result<String> {
            let shown = hobble.json(&["show"])?;
            let listed = shown.get("not_covered").cloned().unwrap_or_default();
            Ok(listed.to_string())
        };
        // Whoever is traced cannot be stopped by us, so no open file can be exchanged.
        let tracer = Target::start(Program::Tracer, [target.pid().to_string()])?;
        target.expect(&format!("rename {at}/new.tmp {at}/current.log"))?;
        until("the file is told of", Duration::from_secs(10), || {
            not_covered().is_ok_and(|told| {
                told.contains("1 open file") && told.contains("renamed or linked under a rule")
            })
        })?;
        // The attachment goes on, and the next change of the rules catches up.
        ensure!(number(&target.expect("write 1 10 64")?, "failed")? == 0);
        tracer.finish()?;
        hobble.run(["update", rules[0], rules[1]])?;
        ensure!(number(&target.expect("write 1 10 64")?, "failed")? == 10);
        ensure!(not_covered()? == "[]", "{}", not_covered()?);
        injection.recover()?;
        ensure!(number(&target.expect("write 1 10 64")?, "failed")? == 0);
        target.finish().map(drop)
    })
}

#[test]
fn a_target_of_another_user_is_attached_like_any() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let directory = volume.directory("theirs")?;
        std::os::unix::fs::chown(&directory, Some(65534), Some(65534))?;
        std::fs::set_permissions(
            volume.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        // As a server drops its privileges: what it has open it could not open from outside, and root in a container may not look at its limits.
        let mut command = std::process::Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(Program::Ops.command()?.get_program());
        let mut target = Target::start_command(command)?;
        target.expect(&format!("open 1 +c {}/file", text(&directory)?))?;
        target.expect("write 1 16 4096")?;
        let injection = hobble.attach(
            target.pid(),
            volume.path(),
            &["--fault", "errno=EIO op=write"],
        )?;
        assert_hooked(&target, volume.path(), true)?;
        ensure!(failed(&mut target, "write 1 10 64")? == 10);
        injection.recover()?;
        assert_hooked(&target, volume.path(), false)?;
        ensure!(failed(&mut target, "write 1 10 64")? == 0);
        target.finish().map(drop)
    })
}
