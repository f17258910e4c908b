//! `hobble doctor`: what this machine, and perhaps one target, offers; nothing is changed.

use std::path::Path;

use hobble_api::status::{Check, CheckOutcome, Verdict};

use crate::inspect;
use crate::options::InjectOptions;
use crate::own::Own;

fn check(name: &str, outcome: CheckOutcome, text: impl Into<String>, hint: Option<&str>) -> Check {
    Check {
        name: name.to_owned(),
        outcome,
        text: text.into(),
        hint: hint.map(str::to_owned),
    }
}

fn ok(name: &str, text: impl Into<String>) -> Check {
    check(name, CheckOutcome::Ok, text, None)
}

/// Everything that attaching depends on; with a target also the reasons of its pre-flight.
#[must_use]
pub fn doctor(target: Option<(i32, &Path)>) -> Vec<Check> {
    let mut checks = vec![
        kernel(),
        root(),
        fuse(),
        passthrough(),
        mappings(),
        ptrace(),
        forks(),
        descriptors(),
        timeouts(),
        selinux(),
    ];
    if let Some((pid, path)) = target {
        match crate::preflight(&InjectOptions::new(pid, path)) {
            Ok(preflight) => {
                let verdict = preflight.verdict;
                let outcome = match verdict {
                    Verdict::Ok => CheckOutcome::Ok,
                    Verdict::Degraded => CheckOutcome::Warn,
                    Verdict::Refuse => CheckOutcome::Fail,
                };
                checks.push(check(
                    "target",
                    outcome,
                    format!("pid {pid}, {}: {}", path.display(), verdict.as_str()),
                    None,
                ));
                checks.extend(preflight.reasons.into_iter().map(|reason| Check {
                    name: format!("target/{}", reason.code),
                    outcome,
                    text: reason.text,
                    hint: reason.hint,
                }));
            }
            Err(error) => {
                let cause = error.cause_chain();
                let text = if cause.is_empty() {
                    error.to_string()
                } else {
                    format!("{error}: {cause}")
                };
                checks.push(check("target", CheckOutcome::Fail, text, error.hint()));
            }
        }
    }
    checks
}

fn kernel() -> Check {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let lacking = match inspect::kernel_version() {
        Some(version) => inspect::missing_features(version).join("; "),
        None => "a version number that could be compared".to_owned(),
    };
    if lacking.is_empty() {
        ok("kernel", format!("Linux {release}"))
    } else {
        check(
            "kernel",
            CheckOutcome::Fail,
            format!("Linux {release} lacks {lacking}"),
            Some(inspect::NEEDED_VERSION),
        )
    }
}

fn root() -> Check {
    let missing = inspect::missing_capabilities();
    if missing.is_empty() {
        return ok("capabilities", "all that are needed");
    }
    let list: Vec<String> = missing
        .iter()
        .map(|(name, why)| format!("{name} ({why})"))
        .collect();
    check(
        "capabilities",
        CheckOutcome::Fail,
        format!("missing: {}", list.join(", ")),
        Some("run hobble as root, in a container with these capabilities"),
    )
}

fn fuse() -> Check {
    match crate::server::probe() {
        Ok(_) => ok("fuse", "a FUSE filesystem can be made"),
        Err(error) => {
            let source = std::error::Error::source(&error)
                .map_or_else(String::new, |source| format!(": {source}"));
            check(
                "fuse",
                CheckOutcome::Fail,
                format!("{error}{source}"),
                Some(
                    "load the module with `modprobe fuse`; in a container, /dev/fuse must be there",
                ),
            )
        }
    }
}

fn passthrough() -> Check {
    match crate::server::probe() {
        Ok(offered) if offered.passthrough => ok(
            "passthrough",
            "files that no rule looks at are read, written and mapped inside the kernel",
        ),
        Ok(_) => check(
            "passthrough",
            CheckOutcome::Warn,
            "the kernel offers no FUSE passthrough: every read and write goes through the server",
            Some("Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH"),
        ),
        Err(_) => check(
            "passthrough",
            CheckOutcome::Fail,
            "cannot be asked for without FUSE",
            None,
        ),
    }
}

fn mappings() -> Check {
    match crate::server::probe() {
        Ok(offered) if offered.direct_mappings => ok(
            "shared mappings",
            "files can be mapped shared, whatever rules look at them",
        ),
        Ok(_) => {
            let (text, hint) = crate::hook::NO_DIRECT_MAPPINGS;
            check("shared mappings", CheckOutcome::Warn, text, Some(hint))
        }
        Err(_) => check(
            "shared mappings",
            CheckOutcome::Fail,
            "cannot be asked for without FUSE",
            None,
        ),
    }
}

fn ptrace() -> Check {
    if inspect::kernel_number("/proc/sys/kernel/yama/ptrace_scope") == Some(3) {
        return check(
            "ptrace",
            CheckOutcome::Fail,
            "kernel.yama.ptrace_scope is 3: nobody may trace",
            Some("it can only be lowered by a reboot"),
        );
    }
    if inspect::under_seccomp() {
        return check(
            "ptrace",
            CheckOutcome::Warn,
            "hobble itself runs under a seccomp filter: targets that have a filter are refused",
            Some("run it without SystemCallFilter, or with seccomp=unconfined"),
        );
    }
    ok(
        "ptrace",
        "targets can be stopped, those with a seccomp filter too",
    )
}

fn forks() -> Check {
    if crate::scope::TargetSet::tree(Own::default(), Vec::new).follows_forks() {
        ok(
            "process events",
            "children of a target are seen as they are made",
        )
    } else {
        let (text, hint) = inspect::NO_PROCESS_EVENTS;
        check("process events", CheckOutcome::Warn, text, Some(hint))
    }
}

fn descriptors() -> Check {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < 4096 => check(
            "descriptors",
            CheckOutcome::Warn,
            format!(
                "at most {limit} open files: a target may have about {}",
                limit / 2
            ),
            Some("raise the hard limit (ulimit -Hn, LimitNOFILE=)"),
        ),
        Some(limit) => ok("descriptors", format!("at most {limit} open files")),
        None => ok("descriptors", "no limit"),
    }
}

fn timeouts() -> Check {
    let set: Vec<String> = ["default_request_timeout", "max_request_timeout"]
        .into_iter()
        .filter_map(|name| {
            let seconds = inspect::kernel_number(&format!("/proc/sys/fs/fuse/{name}"))?;
            (seconds > 0).then(|| format!("fs.fuse.{name} = {seconds} s"))
        })
        .collect();
    if set.is_empty() {
        ok("request timeouts", "none: delays may be as long as wanted")
    } else {
        check(
            "request timeouts",
            CheckOutcome::Warn,
            format!(
                "{}: the kernel takes the hook away when a delay lasts longer",
                set.join(", ")
            ),
            Some("keep delays shorter, or set them to 0"),
        )
    }
}

fn selinux() -> Check {
    if inspect::kernel_number("/sys/fs/selinux/enforce") == Some(1) {
        check(
            "selinux",
            CheckOutcome::Warn,
            "SELinux is enforcing: descriptors that Hobble opens carry Hobble's label, which the target's domain must be allowed to use",
            Some("look for `fd use` denials in the audit log when attaching fails"),
        )
    } else {
        ok("selinux", "not enforcing")
    }
}
