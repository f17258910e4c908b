//! Facts about this machine and about processes that pre-flight, doctor and the engine share. Nothing here has a side effect.

use std::fs;

use hobble_api::exit::ExitCode;

use crate::error::{AttachError, Step};

/// What Hobble needs of root's capabilities, with the reason (capabilities(7)); numbers from linux/capability.h.
pub(crate) const CAPABILITIES: &[(u32, &str, &str)] = &[
    (0, "CAP_CHOWN", "files made by the target get its owner"),
    (
        1,
        "CAP_DAC_OVERRIDE",
        "the backing files are opened whatever their mode",
    ),
    (2, "CAP_DAC_READ_SEARCH", "inodes are opened by file handle"),
    (
        3,
        "CAP_FOWNER",
        "attributes are changed on the target's behalf",
    ),
    (6, "CAP_SETGID", "files are made with the caller's group"),
    (7, "CAP_SETUID", "files are made with the caller's user"),
    (
        19,
        "CAP_SYS_PTRACE",
        "the target is stopped and its descriptors are taken",
    ),
    (
        21,
        "CAP_SYS_ADMIN",
        "the hook is mounted in the target's namespace",
    ),
];

/// The start time of a process, which together with its pid names it for ever.
pub(crate) fn start_time(pid: i32) -> Result<u64, AttachError> {
    let no_such = || {
        AttachError::new(Step::Preflight, format!("there is no process {pid}"))
            .hinting("`ps -e` lists the processes; pids are those of the host's pid namespace")
            .exiting(ExitCode::TargetVanished)
    };
    let pid = hobble_graft::ids::Pid::new(pid).ok_or_else(no_such)?;
    match hobble_graft::ids::ProcessId::of(pid) {
        Ok(id) => Ok(id.start_time),
        Err(error) if error.is_gone() => Err(no_such()),
        Err(error) => Err(AttachError::new(
            Step::Preflight,
            format!("process {pid} cannot be looked at"),
        )
        .because(error)),
    }
}

fn own_status(field: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    text.lines().find_map(|line| {
        Some(
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .trim()
                .to_owned(),
        )
    })
}

/// The capabilities of [`CAPABILITIES`] that this process lacks.
pub(crate) fn missing_capabilities() -> Vec<(&'static str, &'static str)> {
    let effective = own_status("CapEff")
        .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .iter()
        .filter(|(number, ..)| effective & (1 << number) == 0)
        .map(|(_, name, why)| (*name, *why))
        .collect()
}

/// Whether this process itself runs under a seccomp filter: PTRACE_O_SUSPEND_SECCOMP is EPERM then (kernel/ptrace.c, `check_ptrace_options`).
pub(crate) fn under_seccomp() -> bool {
    own_status("Seccomp").is_some_and(|mode| mode != "0")
}

/// Kernel release as (major, minor).
pub(crate) fn kernel_version() -> Option<(u32, u32)> {
    let uname = rustix::system::uname();
    let release = uname.release().to_str().ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A number in a file of `/proc/sys` or `/sys`.
pub(crate) fn kernel_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The command name of a process, for messages.
pub(crate) fn comm(pid: i32) -> String {
    fs::read(format!("/proc/{pid}/comm"))
        .map(|name| String::from_utf8_lossy(name.trim_ascii_end()).into_owned())
        .unwrap_or_default()
}
