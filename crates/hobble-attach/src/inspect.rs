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

/// What attaching cannot do without, by the version of the kernel that brought it. The rest is asked for where it is used and done without.
const NEEDED: &[(Version, &str)] = &[
    ((5, 2), "fsopen(2) and move_mount(2)"),
    ((5, 6), "pidfd_getfd(2) and openat2(2)"),
    (
        (5, 8),
        "STATX_MNT_ID and STATX_ATTR_MOUNT_ROOT of statx(2), which tell what lies on the volume's mount",
    ),
    (
        (5, 12),
        "mount_setattr(2), which keeps the hook from spreading",
    ),
];

/// The hint for a kernel that lacks something of [`missing_features`].
pub(crate) const NEEDED_VERSION: &str = "Linux 5.12 or later is needed";

/// Kernel release as (major, minor).
pub(crate) type Version = (u32, u32);

/// What a kernel of this version lacks of what attaching cannot do without.
pub(crate) fn missing_features(version: Version) -> Vec<&'static str> {
    NEEDED
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|(_, feature)| *feature)
        .collect()
}

/// Whether a thread that is stopped inside a restartable sequence can be told from others (PTRACE_GET_RSEQ_CONFIGURATION).
pub(crate) fn tells_rseq(version: Version) -> bool {
    version >= (5, 13)
}

/// Whether a mount can be given back the peer group that it was in (MOVE_MOUNT_SET_GROUP).
pub(crate) fn gives_back_groups(version: Version) -> bool {
    version >= (5, 15)
}

/// What is missed in `tree` scope where process events cannot be had (see `scope`), and the hint.
pub(crate) const NO_PROCESS_EVENTS: (&str, &str) = (
    "the process-event connector is not available: a child whose parents have gone before its first operation is missed in tree scope",
    "run in the host's network namespace, or use --scope namespace",
);

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

/// The version of the running kernel; `None` when its release is not numbered as Linux's are.
pub(crate) fn kernel_version() -> Option<Version> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_too_old_for_each_feature_that_it_lacks() {
        assert_eq!(missing_features((2, 6)).len(), NEEDED.len());
        let lacks = |version, feature: &str| {
            missing_features(version)
                .iter()
                .any(|missing| missing.contains(feature))
        };
        assert!(lacks((5, 5), "pidfd_getfd") && !lacks((5, 6), "pidfd_getfd"));
        assert!(lacks((5, 7), "STATX_MNT_ID") && lacks((5, 7), "STATX_ATTR_MOUNT_ROOT"));
        assert!(!lacks((5, 8), "STATX_MNT_ID") && lacks((5, 11), "mount_setattr"));
        assert_eq!(missing_features((5, 12)), Vec::<&str>::new());
        assert_eq!(missing_features((6, 0)), Vec::<&str>::new());
        let newest = NEEDED.iter().map(|(since, _)| *since).max().unwrap();
        assert!(NEEDED_VERSION.contains(&format!("{}.{}", newest.0, newest.1)));
    }
}
