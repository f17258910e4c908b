//! Bad input and hostile conditions: each gives a clear error and a documented exit code, and leaves the target untouched.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hobble_e2e::{
    assert_hooked, assert_same_descriptors, assert_unmounted, cycles, movable, scene, until,
};
use hobble_testkit::command;
use hobble_testkit::hobble::{Hobble, STEP};
use hobble_testkit::process;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A target with an open file on the volume, and an injection into it that must be refused.
struct Refusal<'s> {
    hobble: &'s Hobble,
    target: Target,
    at: String,
}

impl<'s> Refusal<'s> {
    fn new(hobble: &'s Hobble, volume: &Volume<'_>) -> Result<Refusal<'s>> {
        let at = text(volume.path())?.to_owned();
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {at}/file"))?;
        target.expect("write 1 4 4096")?;
        Ok(Refusal { hobble, target, at })
    }

    /// Injects with `arguments` and expects `code`, and every one of `words` on standard error.
    fn refused(&self, arguments: &[&str], code: i32, words: &[&str]) -> Result<String> {
        let arguments: Vec<&str> = ["inject"].iter().chain(arguments).copied().collect();
        self.refused_command(self.hobble.command(&arguments), code, words)
    }

    fn refused_command(&self, mut inject: Command, code: i32, words: &[&str]) -> Result<String> {
        let before = movable(&self.target)?;
        let mounts = process::mounts(&self.target.pid().to_string())?;
        let name = command::describe(&inject);
        let said = command::output(&mut inject, STEP)?;
        let message = check_refusal(&name, &said, code, words)?;
        ensure!(
            process::mounts(&self.target.pid().to_string())? == mounts,
            "{name}: the target's mounts changed"
        );
        assert_same_descriptors(&self.target, &before)?;
        let left = self.hobble.processes();
        until(
            "no process of Hobble is left",
            Duration::from_secs(5),
            || self.hobble.processes().is_empty(),
        )
        .with_context(|| format!("{name}: {left:?}"))?;
        Ok(message)
    }

    /// `--pid` and `--path` of the target, with more.
    fn with<'a>(&'a self, pid: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        ["--pid", pid, "--path", &self.at]
            .into_iter()
            .chain(more.iter().copied())
            .collect()
    }

    fn finish(mut self) -> Result<()> {
        self.target.assert_running()?;
        ensure!(number(&self.target.expect("write 1 10 4096")?, "ok")? == 10);
        self.target.finish().map(drop)
    }
}

fn check_refusal(name: &str, said: &Output, code: i32, words: &[&str]) -> Result<String> {
    let message = String::from_utf8_lossy(&said.stderr).into_owned();
    let whole = format!("{message}{}", String::from_utf8_lossy(&said.stdout));
    ensure!(
        said.status.code() == Some(code),
        "{name}: ended with {} instead of {code}: {whole}",
        said.status
    );
    ensure!(message.contains("error:"), "{name}: no `error:` in {whole}");
    ensure!(!message.contains("panicked"), "{name}: {whole}");
    for word in words {
        ensure!(
            message.to_lowercase().contains(&word.to_lowercase()),
            "{name}: no {word:?} in {whole}"
        );
    }
    Ok(message)
}

const EIO: [&str; 2] = ["--fault", "errno=EIO op=write"];

#[test]
fn no_such_process() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        // Above the largest pid that Linux gives (PID_MAX_LIMIT).
        case.refused(
            &["--pid", "4194305", "--path", &case.at, EIO[0], EIO[1]],
            3,
            &["4194305"],
        )?;
        case.finish()
    })
}

#[test]
fn a_zombie() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let mut dead = Command::new("true").spawn()?;
        let pid = dead.id().to_string();
        until("it is a zombie", STEP, || {
            process::stat(&pid).is_ok_and(|stat| stat.state == 'Z')
        })?;
        let refused = case.refused(
            &["--pid", &pid, "--path", &case.at, EIO[0], EIO[1]],
            3,
            &[&pid],
        );
        dead.wait()?;
        refused?;
        case.finish()
    })
}

#[test]
fn a_path_that_is_not_there() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        let missing = format!("{}/missing", case.at);
        case.refused(
            &["--pid", &pid, "--path", &missing, EIO[0], EIO[1]],
            1,
            &["missing"],
        )?;
        case.finish()
    })
}

#[test]
fn a_path_outside_the_targets_root() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let root = volume.directory("root")?;
        let program = Program::Pause32.command()?;
        fs::copy(program.get_program(), root.join("pause"))?;
        let mut jail = Command::new("chroot");
        jail.arg(&root).arg("/pause");
        let jailed = Target::start_command(jail)?;
        // It exists for us and not for the target; and dots do not lead out.
        let pid = jailed.pid().to_string();
        let outside = format!("/../../..{}", case.at);
        for path in [case.at.as_str(), outside.as_str()] {
            case.refused(&["--pid", &pid, "--path", path, EIO[0], EIO[1]], 1, &[])?;
        }
        drop(jailed);
        case.finish()
    })
}

#[test]
fn places_that_are_never_hooked() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        for path in [
            "/",
            "/proc",
            "/sys",
            "/dev",
            "/run",
            "/proc/self",
            "/sys/kernel",
        ] {
            let place = path.split('/').nth(1).unwrap_or("");
            case.refused(
                &["--pid", &pid, "--path", path, EIO[0], EIO[1]],
                1,
                &[place],
            )?;
        }
        case.finish()
    })
}

#[test]
fn hobbles_own_directories_on_the_volume() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        // Journal and sockets below the volume, which Hobble would then reach through itself.
        let mut inject = hobble.command(["inject"]);
        inject
            .args(case.with(&pid, &EIO))
            .env("HOBBLE_STATE_DIR", volume.path().join("state"));
        case.refused_command(inject, 1, &["state"])?;
        let _ = fs::remove_dir(volume.path().join("state"));
        case.finish()
    })
}

/// Whether the command with this pid has its working directory and its output on the filesystem of this device.
fn is_native(pid: &str, device: u64) -> Result<bool> {
    let on = |what: &str| -> Result<bool> {
        let path = format!("/proc/{pid}/{what}");
        let found = fs::metadata(&path).with_context(|| path.clone())?;
        Ok(found.dev() == device)
    };
    Ok(on("cwd")? && on("fd/1")?)
}

/// Starts `inject` in a directory of the volume, with its output in a file there, from a shell that is itself the target.
fn from_within(scope: &str) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let device = fs::metadata(volume.path())?.dev();
        let events = volume.path().join("events");
        let script = format!(
            "exec 9>held; {} inject --json --pid $$ --path \"$PWD\" --scope {scope} --for 3s \
             --fault 'errno=EIO op=write' >events 2>../errors & echo $!; wait $!; echo $?",
            hobble.binary().display()
        );
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &script])
            .current_dir(volume.path())
            .env("HOBBLE_STATE_DIR", hobble.state_dir())
            .stdout(Stdio::piped());
        let mut shell = shell.spawn()?;
        let pid = shell.id().to_string();
        let run = |shell: &mut Child| -> Result<()> {
            let mut out = BufReader::new(shell.stdout.take().context("no standard output")?);
            let mut line = String::new();
            out.read_line(&mut line)?;
            let command = line.trim().to_owned();
            let said = || fs::read_to_string(&events).unwrap_or_default();
            until("faults are on", STEP, || said().contains("\"injecting\""))?;
            // The target is on the hook; the command that put it there is not, so what it says is not faulted.
            let held = fs::metadata(format!("/proc/{pid}/fd/9"))?;
            ensure!(held.dev() != device, "the shell's file is native");
            ensure!(is_native(&command, device)?, "the command was moved");
            let shown = hobble.json(&["show"])?;
            let targets: Vec<String> = shown
                .get("targets")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|target| target.get("pid").map(Value::to_string))
                .collect();
            let own = [hobble.servers(), hobble.holders()].concat();
            ensure!(own.len() == 2, "server and holder were not found: {own:?}");
            let own = own.iter().map(u32::to_string).chain([command.clone()]);
            for each in own {
                ensure!(!targets.contains(&each), "{each} is of hobble: {targets:?}");
            }
            ensure!(targets.contains(&pid), "{pid} is the target: {targets:?}");
            line.clear();
            out.read_line(&mut line)?;
            ensure!(line.trim() == "0", "it ended with {line}: {}", said());
            let lines: Vec<Value> = said()
                .lines()
                .map(serde_json::from_str)
                .collect::<Result<_, _>>()?;
            let event = |name: &str| {
                lines
                    .iter()
                    .find(|line| line.get("event") == Some(&name.into()))
                    .with_context(|| format!("no {name} in {lines:?}"))
            };
            event("recovered")?;
            let preflight = event("preflight")?;
            ensure!(preflight.get("verdict") == Some(&"degraded".into()));
            for (code, words) in [
                ("own_ancestor", [pid.as_str(), "(sh)"]),
                ("own_directory", [text(volume.path())?, "native"]),
                // Its output, and what it has inherited.
                ("own_descriptors", ["(2)", "native"]),
            ] {
                let told = reason(preflight, code).with_context(|| preflight.to_string())?;
                for word in words {
                    ensure!(told.contains(word), "no {word} in {told}");
                }
            }
            Ok(())
        };
        let ran = run(&mut shell);
        let _ = shell.kill();
        shell.wait()?;
        ran
    })
}

#[test]
fn the_command_in_a_tree_that_is_the_target() -> Result<()> {
    from_within("tree")
}

#[test]
fn the_command_in_a_namespace_that_is_the_target() -> Result<()> {
    from_within("namespace")
}

#[test]
fn hobbles_own_working_directory_on_the_volume() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let device = fs::metadata(volume.path())?.dev();
        let pid = case.target.pid().to_string();
        // Allowed: it stays native, and pre-flight says so. Nothing of the command is then on the hook, so nothing keeps that from going.
        let mut here = hobble.command([""; 0]);
        here.current_dir(volume.path());
        let found = plan(here, &case.with(&pid, &EIO))?;
        ensure!(found.get("verdict") == Some(&"degraded".into()), "{found}");
        let told = reason(&found, "own_directory").with_context(|| found.to_string())?;
        ensure!(told.contains("native"), "{told}");
        let mut inject = hobble.command(["inject", "--json", "--for", "2s"]);
        inject
            .args(case.with(&pid, &EIO))
            .current_dir(volume.path())
            .stdout(Stdio::piped());
        let mut inject = inject.spawn()?;
        let mut attached = false;
        let lines = BufReader::new(inject.stdout.take().context("no standard output")?).lines();
        for line in lines {
            if line?.contains("\"injecting\"") {
                attached = true;
                let directory = fs::metadata(format!("/proc/{}/cwd", inject.id()))?;
                ensure!(directory.dev() == device, "its directory was moved");
            }
        }
        let status = inject.wait()?;
        ensure!(
            attached && status.success(),
            "attached: {attached}, {status}"
        );
        let elsewhere = plan(hobble.command([""; 0]), &case.with(&pid, &EIO))?;
        ensure!(reason(&elsewhere, "own_directory").is_none(), "{elsewhere}");
        case.finish()
    })
}

#[test]
fn the_command_itself_as_the_target() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        // `exec` keeps the pid: the shell names itself and becomes the command.
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(format!(
                "exec {} inject --pid $$ --path {} --no-rules",
                hobble.binary().display(),
                case.at
            ))
            .env("HOBBLE_STATE_DIR", hobble.state_dir());
        case.refused_command(shell, 1, &["hobble itself"])?;
        case.finish()
    })
}

#[test]
fn a_kernel_that_is_too_old() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        // personality(2), UNAME26: the kernel calls itself 2.6 for this process.
        let mut old = Command::new("setarch");
        old.arg("--uname-2.6")
            .arg(hobble.binary())
            .arg("inject")
            .args(case.with(&pid, &EIO));
        old.env("HOBBLE_STATE_DIR", hobble.state_dir());
        case.refused_command(
            old,
            1,
            &[
                "pidfd_getfd",
                "STATX_MNT_ID",
                "STATX_ATTR_MOUNT_ROOT",
                "5.12",
            ],
        )?;
        case.finish()
    })
}

/// The reason of this code in what `inject --dry-run --json` printed.
fn reason(plan: &Value, code: &str) -> Option<String> {
    plan.get("reasons")?
        .as_array()?
        .iter()
        .find(|reason| reason.get("code").and_then(Value::as_str) == Some(code))?
        .get("text")?
        .as_str()
        .map(str::to_owned)
}

/// `inject --dry-run --json` by this command line, which ends where its own arguments begin.
fn plan(mut command: Command, arguments: &[&str]) -> Result<Value> {
    let text = command::run(
        command
            .args(["inject", "--dry-run", "--json"])
            .args(arguments),
        STEP,
    )?;
    serde_json::from_str(text.trim()).with_context(|| format!("it printed {text:?}"))
}

#[test]
fn without_process_events_a_tree_is_degraded() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        // The connector is there in the first network namespace alone (drivers/connector/connector.c, cn_init).
        let without = |scope: &str| -> Result<Value> {
            let mut command = Command::new("unshare");
            command.arg("--net").arg(hobble.binary());
            command.env("HOBBLE_STATE_DIR", hobble.state_dir());
            plan(command, &case.with(&pid, &["--no-rules", "--scope", scope]))
        };
        let found = without("tree")?;
        ensure!(found.get("verdict") == Some(&"degraded".into()), "{found}");
        let text = reason(&found, "process_events").with_context(|| found.to_string())?;
        ensure!(text.contains("connector"), "{text}");
        let found = without("namespace")?;
        ensure!(reason(&found, "process_events").is_none(), "{found}");
        let found = plan(
            hobble.command([""; 0]),
            &case.with(&pid, &["--no-rules", "--scope", "tree"]),
        )?;
        ensure!(reason(&found, "process_events").is_none(), "{found}");
        case.finish()
    })
}

#[test]
fn a_descendant_in_another_mount_namespace_is_told() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let file = volume.path().join("file");
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!(
            "exec 9>{}; unshare --mount sleep 600 & echo $!; wait",
            file.display()
        ));
        shell.stdout(Stdio::piped());
        let mut shell = shell.spawn()?;
        let run = |shell: &mut Child| -> Result<()> {
            let mut line = String::new();
            let out = shell.stdout.take().context("no standard output")?;
            BufReader::new(out).read_line(&mut line)?;
            let child = line.trim().to_owned();
            until("it has unshared", STEP, || {
                fs::read_to_string(format!("/proc/{child}/comm"))
                    .is_ok_and(|comm| comm.trim() == "sleep")
            })?;
            let pid = shell.id().to_string();
            let at = text(volume.path())?;
            let arguments = ["--pid", &pid, "--path", at, "--no-rules"];
            let found = plan(hobble.command([""; 0]), &arguments)?;
            let told = reason(&found, "other_namespace").with_context(|| found.to_string())?;
            ensure!(told.contains(&child) && told.contains("sleep"), "{told}");
            let mut injection = hobble.attach(shell.id(), volume.path(), &["--no-rules"])?;
            let attached = injection.wait_event("attached", STEP)?;
            let listed = attached
                .get("not_covered")
                .and_then(Value::as_array)
                .is_some_and(|all| {
                    all.iter().any(|each| {
                        each.get("pid")
                            .and_then(Value::as_u64)
                            .map(|pid| pid.to_string())
                            .as_ref()
                            == Some(&child)
                    })
                });
            ensure!(listed, "{attached}");
            injection.recover().map(drop)?;
            let _ = kill(Pid::from_raw(child.parse()?), Signal::SIGKILL);
            Ok(())
        };
        let ran = run(&mut shell);
        let _ = shell.kill();
        shell.wait()?;
        ran
    })
}

#[test]
fn no_root_and_a_missing_capability() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        // Where anybody may execute it.
        let binary = volume.path().join("hobble");
        fs::copy(hobble.binary(), &binary)?;
        let arguments = case.with(&pid, &EIO);
        let mut nobody = Command::new("setpriv");
        nobody
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"])
            .arg(&binary)
            .arg("inject")
            .args(&arguments);
        nobody.env("HOBBLE_STATE_DIR", hobble.state_dir());
        case.refused_command(nobody, 1, &["root"])?;
        for (capability, name) in [
            ("-sys_ptrace", "CAP_SYS_PTRACE"),
            ("-sys_admin", "CAP_SYS_ADMIN"),
        ] {
            let mut less = Command::new("setpriv");
            less.args(["--bounding-set", capability, "--"])
                .arg(&binary)
                .arg("inject")
                .args(&arguments);
            less.env("HOBBLE_STATE_DIR", hobble.state_dir());
            case.refused_command(less, 1, &[name])?;
        }
        case.finish()
    })
}

#[test]
fn a_target_that_is_traced() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        let tracer = Target::start(Program::Tracer, [&pid])?;
        case.refused(
            &case.with(&pid, &EIO),
            1,
            &["traced", &tracer.pid().to_string()],
        )?;
        tracer.finish()?;
        case.finish()
    })
}

#[test]
fn a_volume_that_is_attached_already() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        let injection = hobble.attach(target.pid(), volume.path(), &EIO)?;
        let pid = target.pid().to_string();
        let said = hobble.output([
            "inject",
            "--pid",
            &pid,
            "--path",
            text(volume.path())?,
            EIO[0],
            EIO[1],
        ])?;
        check_refusal("the second inject", &said, 1, &["already"])?;
        ensure!(
            number(&target.expect("write 1 10 64")?, "failed")? == 10,
            "the first attachment was harmed"
        );
        injection.recover()?;
        target.finish().map(drop)
    })
}

#[test]
fn a_stopped_target_stays_stopped() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        target.signal(Signal::SIGSTOP)?;
        let pid = target.pid();
        let stopped = || process::stat(&pid.to_string()).is_ok_and(|stat| stat.state == 'T');
        until("it is stopped", STEP, stopped)?;
        // Attaching to it works, or is refused with a word about it; in both cases it is as stopped as before.
        match hobble.attach(pid, volume.path(), &EIO) {
            Ok(injection) => {
                until("it is stopped again", Duration::from_secs(2), stopped)?;
                injection.recover()?;
            }
            Err(error) => ensure!(format!("{error:#}").contains("stopped"), "{error:#}"),
        }
        until("it is still stopped", Duration::from_secs(2), stopped)?;
        target.signal(Signal::SIGCONT)?;
        ensure!(number(&target.expect("write 1 10 64")?, "ok")? == 10);
        target.finish().map(drop)
    })
}

#[test]
fn a_32_bit_target() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let target = Target::start(Program::Pause32, [""; 0])?;
        let pid = target.pid().to_string();
        case.refused(&case.with(&pid, &EIO), 1, &["32-bit"])?;
        target.assert_running()?;
        drop(target);
        case.finish()
    })
}

#[test]
fn wrong_specifications() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        for (fault, words) in [
            ("errno=EIOO op=write", &["EIOO", "EIO"][..]),
            ("errno=EIO op=wirte", &["wirte", "write"]),
            ("errno=EIO op=write percnt=5", &["percnt", "percent"]),
            ("latncy=5ms", &["latncy", "latency"]),
            ("errno=EIO op=write path=a[", &["a["]),
            ("errno=EIO op=write percent=101", &["101"]),
            ("errno=EIO op=write percent=-1", &["-1"]),
            ("latency=-5ms op=read", &["-5ms"]),
            ("latency=5parsecs op=read", &["5parsecs"]),
            ("op=read", &[]),
            ("", &[]),
        ] {
            case.refused(&case.with(&pid, &["--fault", fault]), 2, words)?;
            let said = hobble.output(["check", "--fault", fault])?;
            check_refusal(&format!("check --fault {fault:?}"), &said, 2, words)?;
        }
        case.refused(&case.with(&pid, &[]), 2, &["--no-rules"])?;
        case.refused(&case.with(&pid, &[EIO[0], EIO[1], "--for", "-3s"]), 2, &[])?;
        let spec = hobble.scratch().path().join("spec.yaml");
        fs::write(
            &spec,
            "version: 1\nrules:\n  - op: [read]\n    fualt: { errno: EIO }\n",
        )?;
        case.refused(
            &case.with(&pid, &["-f", text(&spec)?]),
            2,
            &["fualt", "fault", "4"],
        )?;
        case.finish()
    })
}

#[test]
fn ten_megabytes_of_nonsense() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        let spec = hobble.scratch().path().join("nonsense");
        let mut state = 1_u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        let binary: Vec<u8> = (0..10 << 20).map(|_| random()).collect();
        let nested = "[".repeat(10 << 20).into_bytes();
        let repeated = "a: &a [*a, *a]\n".repeat(700_000).into_bytes();
        for nonsense in [binary, nested, repeated] {
            fs::write(&spec, nonsense)?;
            let start = Instant::now();
            let message = case.refused(&case.with(&pid, &["-f", text(&spec)?]), 2, &[])?;
            ensure!(message.len() < 20_000, "{} bytes of error", message.len());
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "it took {:?}",
                start.elapsed()
            );
        }
        case.finish()
    })
}

#[test]
fn a_pause_past_its_limit_is_rolled_back() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(
            Program::FilesC,
            [text(volume.path())?, "2000", "1", "nap", "busy"],
        )?;
        let before = movable(&target)?;
        let pid = target.pid().to_string();
        for _ in 0..cycles(3) {
            let mut inject = hobble.inject([
                "--pid",
                &pid,
                "--path",
                text(volume.path())?,
                "--no-rules",
                "--max-pause",
                "1us",
            ])?;
            let failed = inject.wait_event("failed", STEP)?;
            ensure!(failed.get("rolled_back") == Some(&true.into()), "{failed}");
            let status = inject.status(STEP)?;
            ensure!(status.code() == Some(4), "{status}: {failed}");
            assert_hooked(&target, volume.path(), false)?;
            assert_same_descriptors(&target, &before)?;
            target.expect("check")?;
            target.assert_running()?;
        }
        target.finish().map(drop)
    })
}

#[test]
fn more_sockets_than_the_pause_allows_are_rolled_back() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        // Each has to be bound through the hook while the target stands still. The target stops within a few milliseconds; these take far longer.
        let sockets: Vec<_> = (0..2500)
            .map(|number| volume.path().join(format!("s{number}")))
            .collect();
        let listeners = sockets
            .iter()
            .map(std::os::unix::net::UnixListener::bind)
            .collect::<Result<Vec<_>, _>>()?;
        let before = movable(&target)?;
        let mounts = process::mounts(&target.pid().to_string())?;
        let pid = target.pid().to_string();
        let mut inject = hobble.inject([
            "--pid",
            &pid,
            "--path",
            text(volume.path())?,
            "--no-rules",
            "--max-pause",
            "60ms",
        ])?;
        let failed = inject.wait_event("failed", STEP)?;
        let cause = failed
            .get("cause")
            .and_then(serde_json::Value::as_str)
            .unwrap_or_default();
        ensure!(
            cause.contains("could not be moved within --max-pause")
                && ["onto the hook", "in a mount namespace"]
                    .iter()
                    .any(|late| cause.contains(late)),
            "{failed}"
        );
        ensure!(failed.get("rolled_back") == Some(&true.into()), "{failed}");
        let status = inject.status(STEP)?;
        ensure!(status.code() == Some(4), "{status}: {failed}");
        ensure!(
            process::mounts(&pid)? == mounts,
            "the target's mounts changed"
        );
        assert_hooked(&target, volume.path(), false)?;
        assert_same_descriptors(&target, &before)?;
        for socket in sockets.iter().step_by(500) {
            std::os::unix::net::UnixStream::connect(socket)
                .with_context(|| format!("connect to {}", socket.display()))?;
        }
        drop(listeners);
        target.finish().map(drop)
    })
}

#[test]
fn no_room_for_the_journal() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let case = Refusal::new(hobble, volume)?;
        let pid = case.target.pid().to_string();
        // A state directory of its own on a filesystem that is full.
        let full = hobble.scratch().directory("full")?;
        command::run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "none"])
                .arg(&full),
            STEP,
        )?;
        let state = full.join("state");
        command::run(
            Command::new("install")
                .args(["-d", "-m", "700"])
                .arg(&state),
            STEP,
        )?;
        let filling = command::output(
            Command::new("dd")
                .args(["if=/dev/zero", "bs=4k"])
                .arg(format!("of={}/zeros", full.display())),
            STEP,
        )?;
        ensure!(!filling.status.success(), "it does not fill up");
        let mut inject = hobble.command(["inject"]);
        inject
            .args(case.with(&pid, &EIO))
            .env("HOBBLE_STATE_DIR", &state);
        let refused = case.refused_command(inject, 1, &["no space left"]);
        command::run(Command::new("umount").arg("-l").arg(&full), STEP)?;
        refused?;
        case.finish()
    })
}

/// A state directory of its own, on a filesystem of its own that can be filled up.
struct SmallState {
    mount: PathBuf,
}

impl SmallState {
    fn new(mount: PathBuf) -> Result<Self> {
        command::run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=4m", "none"])
                .arg(&mount),
            STEP,
        )?;
        Ok(Self { mount })
    }

    fn directory(&self) -> PathBuf {
        self.mount.join("state")
    }

    fn fill_up(&self) -> Result<()> {
        let mut zeros = fs::File::create(self.mount.join("zeros"))?;
        let chunk = [0_u8; 4096];
        let full = loop {
            if let Err(error) = zeros.write_all(&chunk) {
                break error;
            }
        };
        ensure!(
            full.kind() == std::io::ErrorKind::StorageFull,
            "it does not fill up: {full}"
        );
        Ok(())
    }
}

impl Drop for SmallState {
    fn drop(&mut self) {
        let _ = command::run(Command::new("umount").arg("-l").arg(&self.mount), STEP);
    }
}

fn journal_of(hobble: &Hobble) -> Result<PathBuf> {
    fs::read_dir(hobble.state_dir())?
        .flatten()
        .map(|entry| entry.path().join("journal"))
        .find(|path| path.is_file())
        .context("no journal")
}

/// Ends a journal where a page ends, by a line that is passed over as cut off: what is left of its last page would do for a small recovery.
fn end_at_a_page(journal: &Path) -> Result<()> {
    let mut file = fs::File::options().append(true).open(journal)?;
    let size = usize::try_from(file.metadata()?.len())?;
    let mut line = vec![b'x'; 8192 - size % 4096 - 2];
    line.extend(b"~\n");
    file.write_all(&line)?;
    Ok(())
}

/// What becomes of a server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lives,
    /// It is killed, and another takes over.
    TakenOver,
    /// It is killed, and the hook is undone, as on a kernel that does not hand out again what the dead server had taken.
    Undone,
}

/// The state directory fills up while the target is attached; then the server recovers, or is killed and another recovers.
fn fills_up(fate: Fate) -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let small = SmallState::new(outer.scratch().directory("small")?)?;
        let mut hobble = Hobble::with_state_dir(&small.directory())?;
        if fate == Fate::Undone {
            hobble.env("HOBBLE_MASK", "has_resend");
        }
        let at = text(volume.path())?;
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {at}/file"))?;
        target.expect("write 1 4 4096")?;
        let before = movable(&target)?;
        let pid = target.pid().to_string();
        hobble.run([
            "inject",
            "--detach",
            "--pid",
            &pid,
            "--path",
            at,
            "--no-rules",
        ])?;
        target.expect(&format!("open 2 +c {at}/another"))?;
        end_at_a_page(&journal_of(&hobble)?)?;
        small.fill_up()?;
        if fate != Fate::Lives {
            for server in hobble.servers() {
                kill(Pid::from_raw(server.cast_signed()), Signal::SIGKILL)?;
            }
        }
        if fate != Fate::Undone {
            hobble.run(["recover", "--all"])?;
        }
        until("nothing of the attachment is left", STEP, || {
            hobble.processes().is_empty()
        })?;
        target.expect("close 2")?;
        assert_same_descriptors(&target, &before)?;
        target.expect("write 1 4 4096")?;
        target.finish().map(drop)
    })
}

#[test]
fn the_journal_has_room_for_a_recovery() -> Result<()> {
    fills_up(Fate::Lives)
}

#[test]
fn the_journal_has_room_for_a_recovery_without_a_server() -> Result<()> {
    fills_up(Fate::Undone)
}

#[test]
fn the_journal_has_room_for_another_server() -> Result<()> {
    fills_up(Fate::TakenOver)
}

#[test]
fn a_tampered_journal() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let hobble = Hobble::with_state_dir(&outer.scratch().path().join("tampered"))?;
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        let pid = target.pid().to_string();
        let bystander = Command::new("sleep").arg("600").spawn();
        let mut bystander = bystander?;
        hobble.run([
            "inject",
            "--detach",
            "--json",
            "--pid",
            &pid,
            "--path",
            text(volume.path())?,
            "--no-rules",
        ])?;
        let journal = journal_of(&hobble)?;
        let original = fs::read(&journal)?;
        let pids: Vec<u32> = [hobble.holders(), hobble.servers()].concat();
        ensure!(
            pids.len() >= 2,
            "holder and server were not found: {pids:?}"
        );
        for pid in pids {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        let redirected = String::from_utf8_lossy(&original)
            .replace(&pid, &bystander.id().to_string())
            .into_bytes();
        let mut truncated = original.clone();
        truncated.truncate(original.len() * 2 / 3);
        for damage in [
            b"nonsense\n".to_vec(),
            vec![0xff; 4096],
            vec![b'{'; 1 << 20],
            redirected,
            truncated,
        ] {
            fs::write(&journal, &damage)?;
            let said = command::output(&mut hobble.command(["recover", "--all"]), STEP)?;
            let message = String::from_utf8_lossy(&said.stderr);
            println!(
                "{} bytes: {}: {message}{}",
                damage.len(),
                said.status,
                String::from_utf8_lossy(&said.stdout)
            );
            ensure!(!message.contains("panicked"), "{message}");
            ensure!(
                matches!(said.status.code(), Some(0 | 1 | 3 | 5)),
                "{}: {message}",
                said.status
            );
            ensure!(
                bystander.try_wait()?.is_none(),
                "a process that the attachment never knew was killed"
            );
            target.assert_running()?;
            if !journal.exists() {
                break;
            }
        }
        if journal.parent().is_some_and(Path::is_dir) {
            fs::write(&journal, &original)?;
            let said = hobble.output(["recover", "--all", "--force"])?;
            println!(
                "undamaged, by force: {}: {}",
                said.status,
                String::from_utf8_lossy(&said.stderr)
            );
        }
        bystander.kill()?;
        bystander.wait()?;
        assert_unmounted(&pid, volume.path())?;
        target.assert_running()
    })
}

#[test]
fn the_control_socket_is_roots_alone() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(Program::Ops, [""; 0])?;
        target.expect(&format!("open 1 +c {}/file", text(volume.path())?))?;
        let injection = hobble.attach(target.pid(), volume.path(), &EIO)?;
        let binary = hobble.scratch().path().join("hobble");
        fs::copy(hobble.binary(), &binary)?;
        for command in [&["recover", "--all"][..], &["pause"], &["ps"]] {
            let mut nobody = Command::new("setpriv");
            nobody
                .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"])
                .arg(&binary)
                .args(command);
            nobody.env("HOBBLE_STATE_DIR", hobble.state_dir());
            let said = command::output(&mut nobody, STEP)?;
            check_refusal(&format!("{command:?} as nobody"), &said, 1, &[])?;
        }
        // Past the directory's mode the socket itself still asks who is there: nobody, with the directory open to all.
        let directory = fs::read_dir(hobble.state_dir())?
            .flatten()
            .next()
            .context("no attachment")?
            .path();
        command::run(
            Command::new("chmod")
                .arg("711")
                .arg(hobble.state_dir())
                .arg(&directory),
            STEP,
        )?;
        let connect = "import os,socket,sys\n\
            s=socket.socket(socket.AF_UNIX); s.settimeout(5); os.setgid(65534); os.setuid(65534)\n\
            try: s.connect(sys.argv[1]); s.sendall(b'{\"v\":1,\"request\":\"recover\"}\\n'); print('answer', s.recv(1000))\n\
            except OSError as e: print('refused', e)";
        let said = command::run(
            Command::new("python3")
                .args(["-c", connect])
                .arg(directory.join("control.sock")),
            STEP,
        );
        command::run(
            Command::new("chmod")
                .arg("700")
                .arg(hobble.state_dir())
                .arg(&directory),
            STEP,
        )?;
        let said = said?;
        println!("nobody at the socket: {said}");
        ensure!(
            number(&target.expect("write 1 10 64")?, "failed")? == 10,
            "somebody else switched the faults off: {said}"
        );
        injection.recover()?;
        target.finish().map(drop)
    })
}

/// Lets the target die at one step, and looks at how the command ends and what is left.
fn dies_at(step: &str, hobble: &mut Hobble, volume: &Volume<'_>, code: i32) -> Result<()> {
    let directory = volume.directory(step)?;
    let mut target = Target::start(
        Program::FilesC,
        [text(&directory)?, "200", "1", "none", "busy"],
    )?;
    let pid = target.pid().to_string();
    hobble.env("HOBBLE_FAULT_POINT", &format!("target@{step}"));
    let injecting = hobble.inject([
        "--pid",
        &pid,
        "--path",
        text(volume.path())?,
        "--max-pause",
        "5s",
        EIO[0],
        EIO[1],
    ]);
    hobble.unset("HOBBLE_FAULT_POINT");
    let mut injection = injecting?;
    if step.starts_with("updat") {
        injection.wait_event("injecting", STEP)?;
        hobble.output(["update", "--fault", "latency=1ms op=read"])?;
    } else if code == 0 {
        injection.wait_event("injecting", STEP)?;
        injection.signal(Signal::SIGINT)?;
    }
    // To the end of its output: the last event tells how it went.
    while injection.next_event(STEP)?.is_some() {}
    let status = injection.status(STEP)?;
    let last = injection
        .events()
        .last()
        .context("no event at all")?
        .clone();
    let said = injection.said();
    ensure!(
        target.wait(STEP)?.is_some(),
        "the target lives: the step was never reached"
    );
    ensure!(status.code() == Some(code), "{status}: {last}, {said}");
    match last.get("event").and_then(Value::as_str) {
        Some("recovered") => {}
        Some("failed") => {
            ensure!(last.get("rolled_back") == Some(&true.into()), "{last}");
            let cause = last
                .get("cause")
                .and_then(Value::as_str)
                .unwrap_or_default();
            ensure!(
                cause.contains(&pid) || cause.contains("exit") || cause.contains("ended"),
                "{last} does not tell that the target has gone"
            );
        }
        _ => bail!("it ends with {last}"),
    }
    drop(target);
    until(
        "every process of Hobble has gone",
        Duration::from_secs(10),
        || hobble.processes().is_empty(),
    )?;
    let left = fs::read_dir(hobble.state_dir())?.count();
    ensure!(
        left == 0,
        "{left} attachments are left in the state directory"
    );
    assert_unmounted("thread-self", volume.path())?;
    Ok(())
}

#[test]
fn a_target_that_dies_at_any_step() -> Result<()> {
    scene(Kind::Ext4, |outer, volume| {
        let mut hobble = Hobble::with_state_dir(&outer.scratch().path().join("dying"))?;
        hobble.env("HOBBLE_LOG", "debug");
        let listed = hobble.run(["__fault-points"])?;
        let mut wrong = Vec::new();
        let mut ending = false;
        // Only a successor comes by those of taking over.
        for step in listed
            .split_ascii_whitespace()
            .filter(|step| !step.starts_with("take"))
        {
            // The target has vanished; unless it did while everything was being put back, which was what had been asked for.
            ending |= step == "recovering";
            let code = if ending { 0 } else { 3 };
            if let Err(error) = dies_at(step, &mut hobble, volume, code) {
                eprint!("{}", hobble.logs());
                wrong.push(format!("{step}: {error:#}"));
            }
        }
        ensure!(ending, "`hobble __fault-points` lists {listed}");
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    })
}

#[test]
fn a_fuse_backing_is_allowed_and_degraded() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        // Somebody else's FUSE filesystem; it ends with its mount, and that with the namespace.
        let source = volume.directory("source")?;
        let mounted = hobble.scratch().directory("fuse")?;
        command::run(Command::new("bindfs").arg(&source).arg(&mounted), STEP)?;
        let run = || -> Result<()> {
            let mut target = Target::start(Program::Ops, [""; 0])?;
            target.expect(&format!("open 1 +c {}/file", text(&mounted)?))?;
            let pid = target.pid().to_string();
            let plan = hobble.run([
                "inject",
                "--dry-run",
                "--json",
                "--pid",
                &pid,
                "--path",
                text(&mounted)?,
                EIO[0],
                EIO[1],
            ])?;
            let plan: serde_json::Value = serde_json::from_str(plan.trim())?;
            ensure!(plan.get("verdict") == Some(&"degraded".into()), "{plan}");
            ensure!(
                plan.get("reasons")
                    .is_some_and(|reasons| reasons.to_string().to_lowercase().contains("fuse")),
                "{plan}"
            );
            let injection = hobble.attach(target.pid(), &mounted, &EIO)?;
            ensure!(number(&target.expect("write 1 10 64")?, "failed")? == 10);
            injection.recover()?;
            ensure!(number(&target.expect("write 1 10 64")?, "failed")? == 0);
            target.finish().map(drop)
        };
        let ran = run();
        command::run(Command::new("umount").arg(&mounted), STEP)?;
        ran
    })
}

/// Mounts an overlay of `lower` at a fresh directory of the volume.
fn overlay(volume: &Volume<'_>, name: &str, lower: &std::path::Path) -> Result<std::path::PathBuf> {
    let [upper, work, merged] =
        ["upper", "work", "merged"].map(|what| volume.directory(&format!("{name}-{what}")));
    let (upper, work, merged) = (upper?, work?, merged?);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    command::run(
        Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged),
        STEP,
    )?;
    Ok(merged)
}

#[test]
fn a_backing_without_passthrough_is_degraded_and_shown() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        // Passthrough to an overlay works; an overlay of an overlay is stacked too deep for it (fuse_backing_open, fs/fuse/backing.c: ELOOP).
        let lower = volume.directory("lower")?;
        fs::write(lower.join("first"), "found without being open")?;
        let once = overlay(volume, "once", &lower)?;
        let twice = overlay(volume, "twice", &once)?;
        let passes = |at: &std::path::Path, expected: bool| -> Result<()> {
            let at = text(at)?;
            let mut target = Target::start(Program::Ops, [""; 0])?;
            let pid = target.pid().to_string();
            let arguments = ["--pid", &pid, "--path", at, "--no-rules"];
            // By a file that nobody has open, then by one that the target has.
            for _ in 0..2 {
                let found = plan(hobble.command([""; 0]), &arguments)?;
                let told = reason(&found, "backing");
                ensure!(told.is_none() == expected, "{at}: {found}");
                if let Some(told) = told {
                    ensure!(told.contains("os error 40"), "{told}");
                }
                target.expect(&format!("open 1 +c {at}/file"))?;
                target.expect("write 1 1 64")?;
            }
            let injection =
                hobble.attach(target.pid(), std::path::Path::new(at), &["--no-rules"])?;
            target.expect("write 1 10 64")?;
            let shown = hobble.json(&["show"])?;
            ensure!(
                shown.get("passthrough") == Some(&expected.into()),
                "{at}: {shown}"
            );
            injection.recover()?;
            target.finish().map(drop)
        };
        let run = || -> Result<()> {
            passes(volume.path(), true)?;
            passes(&once, true)?;
            passes(&twice, false)
        };
        let ran = run();
        for mount in [&twice, &once] {
            command::run(Command::new("umount").arg(mount), STEP)?;
        }
        ran
    })
}
