//! What kernel and filesystem offer, whatever the target.

use std::os::fd::AsFd;

use hobble_graft::census::{Census, FileKind};
use hobble_graft::proc::mountinfo::Propagation;

use super::chain;
use super::reasons::Reasons;
use crate::inspect;
use crate::volume::Volume;

/// What the machine itself lacks; gives whether its kernel offers passthrough.
pub(super) fn machine(reasons: &mut Reasons) -> bool {
    let missing = inspect::missing_capabilities();
    if !missing.is_empty() {
        let list: Vec<String> = missing
            .iter()
            .map(|(name, why)| format!("{name} ({why})"))
            .collect();
        reasons.refuse(
            "capabilities",
            format!("missing capabilities: {}", list.join(", ")),
            Some("run hobble as root"),
        );
    }
    if let Some(version) = inspect::kernel_version() {
        kernel(version, reasons);
    }
    if !missing.is_empty() {
        return false;
    }
    match crate::server::probe() {
        Ok(offered) => {
            if !offered.direct_mappings {
                let (text, hint) = crate::hook::NO_DIRECT_MAPPINGS;
                reasons.degrade("no_direct_mappings", text, Some(hint));
            }
            if offered.passthrough {
                return true;
            }
            reasons.degrade(
            "no_passthrough",
            "the kernel offers no FUSE passthrough: every read and write goes through the server, mapped files are kept coherent only among users of the hook",
            Some("Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH"),
            );
        }
        Err(error) => reasons.refuse("fuse", chain(&error), Some("`hobble doctor` tells more")),
    }
    false
}

/// Whether the volume's filesystem can be passed through to, which the kernel tells only when asked to with a file of it; nothing is said without one.
pub(super) fn backing(taken: &Census, volume: &Volume, reasons: &mut Reasons) {
    let open = taken
        .descriptions()
        .find(|description| description.facts.kind == FileKind::Regular)
        .map(|description| description.kept.as_fd());
    let mapped = || taken.mapped_files().first().map(|file| file.kept.as_fd());
    let first;
    let file = match open.or_else(mapped) {
        Some(file) => file,
        None => {
            first = volume.first_file();
            let Some(file) = first.as_ref() else { return };
            file.as_fd()
        }
    };
    match crate::hook::probe_backing(file, volume) {
        Ok(None) => {}
        Ok(Some(errno)) => reasons.degrade(
            "backing",
            format!(
                "passthrough is not possible on the filesystem of {} ({errno}): every read and write goes through the server",
                volume.display()
            ),
            (errno == hobble_fuse::Errno::LOOP)
                .then_some("it is stacked as deep as the kernel allows; hook what lies below it"),
        ),
        Err(error) => reasons.degrade("backing", chain(&error), None),
    }
}

/// What a kernel of this version cannot do, whatever the target.
pub(super) fn kernel(version: inspect::Version, reasons: &mut Reasons) {
    let lacking = inspect::missing_features(version);
    if !lacking.is_empty() {
        let text = format!("the kernel lacks {}", lacking.join("; "));
        reasons.refuse("kernel", text, Some(inspect::NEEDED_VERSION));
    } else if !inspect::tells_rseq(version) {
        reasons.degrade(
            "rseq",
            "the kernel does not tell whether a thread is inside a restartable sequence (rseq(2)): a target that uses them, by its allocator for example, may be \
             disturbed when it is stopped there",
            Some("Linux 5.13 or later has PTRACE_GET_RSEQ_CONFIGURATION"),
        );
    }
}

/// What a kernel of this version cannot give back to the mount around the volume.
pub(super) fn propagation(
    version: inspect::Version,
    propagation: &Propagation,
    volume: &str,
    reasons: &mut Reasons,
) {
    if propagation.is_private() || inspect::gives_back_groups(version) {
        return;
    }
    reasons.degrade(
        "propagation",
        format!(
            "the mount around {volume} is shared with other namespaces and cannot be put back into its peer group: from recovery on, what is mounted in it does not show there any more"
        ),
        Some("Linux 5.15 or later has MOVE_MOUNT_SET_GROUP"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(reasons: &Reasons) -> (Vec<&str>, Vec<&str>) {
        (
            reasons
                .refuse
                .iter()
                .map(|(r, _)| r.code.as_str())
                .collect(),
            reasons.degraded.iter().map(|r| r.code.as_str()).collect(),
        )
    }

    #[test]
    fn old_kernels_are_refused_or_degraded_by_what_they_lack() {
        for (version, refused, degraded) in [
            ((5, 7), vec!["kernel"], vec![]),
            ((5, 11), vec!["kernel"], vec![]),
            ((5, 12), vec![], vec!["rseq"]),
            ((5, 13), vec![], vec![]),
        ] {
            let mut reasons = Reasons::default();
            kernel(version, &mut reasons);
            assert_eq!(codes(&reasons), (refused, degraded), "{version:?}");
        }
    }

    #[test]
    fn a_shared_mount_that_cannot_be_given_back_is_told() {
        let shared = Propagation {
            peer_group: Some(7),
            ..Propagation::default()
        };
        for (version, around, degraded) in [
            ((5, 14), shared, vec!["propagation"]),
            ((5, 15), shared, vec![]),
            ((5, 14), Propagation::default(), vec![]),
        ] {
            let mut reasons = Reasons::default();
            propagation(version, &around, "/data", &mut reasons);
            assert_eq!(codes(&reasons), (vec![], degraded), "{version:?}");
        }
    }
}
