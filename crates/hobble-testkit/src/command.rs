//! Running a program to its end, always with a limit on time.
//!
//! Owns no state. Invariant: no function here waits longer than the limit it is given, and a child that
//! has outlived its limit is killed and reaped before the function returns.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a waiting parent looks at its child.
const POLL: Duration = Duration::from_millis(5);

/// Waits for `child` until `limit` has passed; `None` when it still runs then.
///
/// # Errors
/// When the child's status cannot be read.
pub fn wait_for(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        // A poll rather than SIGCHLD: a test process must not own signal handlers.
        thread::sleep(POLL);
    }
}

/// Runs `command` without input and returns what it printed and its status, whatever that is.
///
/// # Errors
/// When it cannot be started, or has not ended within `limit` (it is killed then, and the error holds what it said).
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = match wait_for(&mut child, limit)? {
        Some(status) => status,
        None => {
            child
                .kill()
                .with_context(|| format!("cannot kill {name}"))?;
            child
                .wait()
                .with_context(|| format!("cannot reap {name}"))?;
            // Grandchildren may hold the pipes open: what has been read so far is all there is to say.
            bail!("{name} did not end within {limit:?}");
        }
    };
    let collect = |reader: thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Output {
        status,
        stdout: collect(stdout),
        stderr: collect(stderr),
    })
}

/// Runs `command` and returns its standard output when it succeeds.
///
/// # Errors
/// As [`output`], and when it ends with a status other than 0; the error holds what it said.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let name = describe(command);
    let output = output(command, limit)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{name} failed with {}: {}{}",
            output.status,
            stderr.trim_end(),
            stdout.trim_end()
        );
    }
    Ok(stdout)
}

/// The command line of `command`, for messages.
pub fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// The path of `program` in PATH or in the system's administration directories, which a
/// plain user's PATH lacks.
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn drain(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // A read error ends the capture; the status of the child is what decides.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_captured_with_the_status() -> Result<()> {
        let output = output(
            Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]),
            Duration::from_secs(10),
        )?;
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stdout, b"out\n");
        assert_eq!(output.stderr, b"err\n");
        Ok(())
    }

    #[test]
    fn a_command_past_its_limit_is_killed() {
        let start = Instant::now();
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(error.to_string().contains("did not end within"), "{error}");
    }

    #[test]
    fn a_failure_says_what_the_command_said() {
        let error = run(
            Command::new("sh").args(["-c", "echo because >&2; exit 1"]),
            Duration::from_secs(10),
        )
        .unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }
}
