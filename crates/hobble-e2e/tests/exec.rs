//! `hobble exec`: a command in a namespace of its own with a hook; its exit code is handed on.

use anyhow::{Context, Result, ensure};
use hobble_e2e::scene;
use hobble_testkit::target::text;
use hobble_testkit::volume::Kind;

#[test]
fn exit_codes_are_handed_on() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        std::fs::write(volume.path().join("plain"), "x")?;
        let code = |words: &[&str]| -> Result<Option<i32>> {
            let command: Vec<&str> = ["exec", "--path", at, "--"]
                .iter()
                .chain(words)
                .copied()
                .collect();
            Ok(hobble.output(command)?.status.code())
        };
        ensure!(code(&["true"])? == Some(0));
        ensure!(code(&["sh", "-c", "exit 3"])? == Some(3));
        ensure!(code(&["sh", "-c", "kill -TERM $$"])? == Some(128 + 15));
        ensure!(code(&["/no/such/program"])? == Some(127));
        ensure!(code(&[&format!("{at}/plain")])? == Some(126));
        let missing = hobble.output(["exec", "--path", "/no/such/directory", "--", "true"])?;
        ensure!(missing.status.code() == Some(125), "{missing:?}");
        Ok(())
    })
}

#[test]
fn the_command_is_faulted_and_nobody_else_sees_the_hook() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        std::fs::write(volume.path().join("file"), "content")?;
        let mounts = hobble_testkit::process::mounts("thread-self")?;
        let script = format!(
            "stat -f -c %T {at}; cat {at}/file && exit 9; mkdir {at}/made && echo made > {at}/made/it"
        );
        let said = hobble.output([
            "exec",
            "--path",
            at,
            "--fault",
            "errno=EIO op=read path=file",
            "--",
            "sh",
            "-c",
            &script,
        ])?;
        let stdout = String::from_utf8_lossy(&said.stdout);
        ensure!(said.status.code() == Some(0), "{said:?}");
        ensure!(stdout.contains("fuse"), "{stdout}");
        ensure!(
            String::from_utf8_lossy(&said.stderr).contains("Input/output error"),
            "{said:?}"
        );
        ensure!(
            std::fs::read_to_string(volume.path().join("made/it"))
                .context("what the command wrote")?
                == "made\n"
        );
        ensure!(std::fs::read_to_string(volume.path().join("file"))? == "content");
        ensure!(hobble_testkit::process::mounts("thread-self")? == mounts);
        Ok(())
    })
}

#[test]
fn signals_reach_the_command() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let mut child = hobble
            .command([
                "exec",
                "--path",
                at,
                "--",
                "sh",
                "-c",
                "trap 'exit 42' TERM; touch \"$0/ready\"; while :; do sleep 0.05; done",
            ])
            .arg(volume.path())
            .stdin(std::process::Stdio::null())
            .spawn()?;
        let ready = volume.path().join("ready");
        let waited = hobble_e2e::until(
            "the command runs",
            std::time::Duration::from_secs(20),
            || ready.exists(),
        );
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(child.id() as i32),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        let status =
            hobble_testkit::command::wait_for(&mut child, std::time::Duration::from_secs(20))?;
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        waited?;
        ensure!(
            status.and_then(|status| status.code()) == Some(42),
            "{status:?}"
        );
        Ok(())
    })
}

/// The kernel refuses to open a running executable for truncation, but only after it has asked a filesystem that truncates
/// on open (do_open in fs/namei.c: handle_truncate comes after vfs_open).
#[test]
fn a_running_executable_is_not_truncated() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        let script = "import os,sys,subprocess,shutil\n\
            p=sys.argv[1]+'/sleep'; shutil.copy('/bin/sleep',p); os.chmod(p,0o755); size=os.stat(p).st_size\n\
            c=subprocess.Popen([p,'30'])\n\
            try: os.open(p,os.O_RDONLY|os.O_TRUNC); sys.exit('it could be opened')\n\
            except OSError as e: print(e)\n\
            ok=os.stat(p).st_size==size and c.poll() is None\n\
            c.kill(); c.wait(); sys.exit(0 if ok else 'it was truncated')";
        for rules in [&[][..], &["--fault", "errno=EIO op=read,write percent=0"]] {
            let mut command = vec!["exec", "--path", at];
            command.extend(rules);
            command.extend(["--", "python3", "-c", script, at]);
            let said = hobble.output(&command)?;
            ensure!(said.status.success(), "{rules:?}: {said:?}");
        }
        Ok(())
    })
}
