//! The volume: which directory of which mount in whose namespace is hooked, and what stands against it.
//!
//! Invariants: the target's path is resolved in the target's root and never followed through magic links, so a target cannot lead us out of its tree;
//! everything later goes by descriptor and mount id, never by that path again. Placing and removing mounts is `hobble_graft::mounts`'s craft.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hobble_api::exit::ExitCode;
use hobble_api::status::NotCovered;
use hobble_graft::census::{FileFacts, FileKind};
use hobble_graft::ids::{Device, ProcessId};
use hobble_graft::mounts::{
    self, Covering, Filesystem, Location, MountNamespace, MountsError, PropagationRecord,
};
use hobble_graft::proc::mountinfo::Propagation;
use hobble_graft::proc::tree::MountNamespaceId;
use hobble_graft::proc::{mountinfo, tree};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::error::{AttachError, Step};
use crate::own::Own;

/// How long one piece of work in a mount namespace may take.
const WITHIN: Duration = Duration::from_secs(5);

/// Names of a directory among which a regular file is looked for.
const LOOKED_AT: usize = 1000;

/// Filesystem types that hold no data of a program.
const PSEUDO: &[&str] = &[
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "configfs",
    "fusectl",
    "mqueue",
    "hugetlbfs",
    "bpf",
    "binfmt_misc",
    "pstore",
    "efivarfs",
    "autofs",
    "rpc_pipefs",
    "nsfs",
    "sockfs",
    "pipefs",
];

/// Directories that are refused whatever is mounted there: programs and systems live in them, not data.
const SYSTEM: &[&[u8]] = &[
    b"/", b"/proc", b"/sys", b"/dev", b"/run", b"/boot", b"/etc", b"/usr", b"/bin", b"/sbin",
    b"/lib", b"/lib64",
];

fn is_system(absolute: &[u8]) -> bool {
    absolute.is_empty() || SYSTEM.contains(&absolute)
}

/// A resolved volume; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The directory, on the target's own mount.
    location: Location,
    namespace: MountNamespace,
    target: ProcessId,
    info: mountinfo::Mount,
    /// The path as the target sees it, without a trailing slash; empty for the root.
    absolute: Vec<u8>,
    /// The path as `/proc/*/fd` shows it to us.
    printed: Vec<u8>,
    /// The one file, when the volume is a file: its name and inode.
    file: Option<(Vec<u8>, u64)>,
}

fn failed(step: Step, what: impl Into<String>) -> impl FnOnce(MountsError) -> AttachError {
    let what = what.into();
    move |error| AttachError::new(step, what).because(error)
}

/// What of `path` lies below `base`; empty for `base` itself.
pub(crate) fn below(base: &[u8], path: &Path) -> Option<Vec<u8>> {
    let path = path.as_os_str().as_bytes();
    let base = base.strip_suffix(b"/").unwrap_or(base);
    let rest = path.strip_prefix(base)?;
    match rest {
        [] => Some(Vec::new()),
        [b'/', rest @ ..] => Some(rest.to_vec()),
        _ => None,
    }
}

impl Volume {
    /// Resolves `path` as `target` sees it.
    pub(crate) fn resolve(target: ProcessId, path: &Path) -> Result<Self, AttachError> {
        let usage = |text: String| AttachError::new(Step::Preflight, text).exiting(ExitCode::Usage);
        if !path.is_absolute() {
            return Err(usage(format!("{} is not absolute", path.display()))
                .hinting("give the path as the target sees it, from its root"));
        }
        let pid = target.pid;
        let namespace = MountNamespace::of(pid).map_err(failed(
            Step::Preflight,
            format!("open the mount namespace of process {pid}"),
        ))?;
        let found = Location::resolve(pid, path).map_err(|error| {
            let hint = match &error {
                MountsError::Resolve { errno: rustix::io::Errno::ACCESS, .. } => "a security module may forbid it; run as root of the host",
                _ => "the path is looked up as the target sees it, in its own root and mount namespace",
            };
            AttachError::new(Step::Preflight, format!("process {pid} has no {}", path.display())).because(error).hinting(hint)
        })?;
        let (location, file) = match found.kind {
            FileKind::Directory => (found, None),
            FileKind::Regular => {
                // A hook over the file itself would break whoever replaces it by rename (kernel-hazards D): its directory is hooked, and only the file faulted.
                let name = found
                    .path
                    .file_name()
                    .map(|name| name.as_bytes().to_vec())
                    .unwrap_or_default();
                let parent = found.parent(pid).map_err(failed(
                    Step::Preflight,
                    format!("open the directory of {}", path.display()),
                ))?;
                (parent, Some((name, found.inode)))
            }
            other => {
                return Err(usage(format!(
                    "{} is neither a directory nor a regular file ({other:?})",
                    path.display()
                )));
            }
        };
        let info = mountinfo::of_process(pid)
            .map_err(|error| {
                AttachError::new(Step::Preflight, "read the target's mounts").because(error)
            })?
            .into_iter()
            .find(|known| known.id == location.mount)
            .ok_or_else(|| {
                AttachError::new(
                    Step::Preflight,
                    format!(
                        "{} lies on a mount that process {pid} does not list",
                        path.display()
                    ),
                )
            })?;
        let printed = std::fs::read_link(format!("/proc/self/fd/{}", location.file.as_raw_fd()))
            .map_err(|error| {
                AttachError::io(Step::Preflight, "read back the volume's path", error)
            })?;
        let absolute = location.path.as_os_str().as_bytes();
        let absolute = absolute.strip_suffix(b"/").unwrap_or(absolute).to_vec();
        Ok(Self {
            inner: Arc::new(Inner {
                location,
                namespace,
                target,
                info,
                absolute,
                printed: printed.as_os_str().as_bytes().to_vec(),
                file,
            }),
        })
    }

    /// What stands against hooking it: a short name, a sentence, a hint, and whether it is reason enough to refuse.
    pub(crate) fn objections(
        &self,
        state_dir: &Path,
        mut object: impl FnMut(&str, String, Option<&str>, bool),
    ) {
        let inner = &*self.inner;
        let name = self.display();
        let fs_type = inner.info.fs_type.to_string_lossy().into_owned();
        if is_system(&inner.absolute) {
            object(
                "system_directory",
                format!("{name} is a directory of the system, not of a program's data"),
                Some("name the directory that holds the data"),
                true,
            );
        }
        if PSEUDO.contains(&fs_type.as_str()) {
            object(
                "pseudo_filesystem",
                format!("{name} is on {fs_type}, which holds no data"),
                None,
                true,
            );
        }
        if fs_type == "fuse.hobble" {
            object(
                "attached",
                format!("{name} is attached already"),
                Some("`hobble ps` lists the attachments; `hobble update` changes the rules of one"),
                true,
            );
        } else if fs_type.starts_with("fuse") {
            object(
                "fuse_backing",
                format!(
                    "{name} is itself on a FUSE filesystem ({fs_type}): reads and writes pass two servers"
                ),
                None,
                false,
            );
        }
        if self.covers(state_dir) {
            object(
                "own_files",
                format!(
                    "hobble's own state directory {} lies in {name}",
                    state_dir.display()
                ),
                Some("name one outside the volume with --state-dir"),
                true,
            );
        }
        if !inner.location.is_mount_root {
            let mount_point = inner.info.mount_point.display();
            object(
                "sub_directory",
                format!(
                    "{name} is not the root of a mount: rename(2) and link(2) across its edge fail with EXDEV, and the directory itself cannot be renamed or removed while attached"
                ),
                // Not what would be refused.
                (!is_system(inner.info.mount_point.as_os_str().as_bytes()))
                    .then(|| format!("hook {mount_point} and filter by path to avoid that"))
                    .as_deref(),
                false,
            );
        }
        if let Some((file, _)) = &inner.file {
            object(
                "single_file",
                format!(
                    "the directory of {} is hooked and only that file faulted",
                    String::from_utf8_lossy(file)
                ),
                None,
                false,
            );
        }
        let submounts = mounts::submounts(inner.target.pid, &inner.location).unwrap_or_default();
        if !submounts.is_empty() {
            let list: Vec<String> = submounts
                .iter()
                .map(|mount| mount.mount_point.display().to_string())
                .collect();
            object(
                "submounts",
                format!("mounts below {name} stay native: {}", list.join(", ")),
                None,
                false,
            );
        }
    }

    /// Whether a path of ours lies in the volume: some directory above it is the volume's.
    fn covers(&self, path: &Path) -> bool {
        let location = &self.inner.location;
        let mut next = Some(std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()));
        while let Some(path) = next {
            if rustix::fs::stat(&path).is_ok_and(|stat| {
                Device::from_raw(stat.st_dev) == location.device && stat.st_ino == location.inode
            }) {
                return true;
            }
            next = path.parent().map(PathBuf::from);
        }
        false
    }

    /// Whether a file belongs to the volume, and is native.
    pub(crate) fn holds(&self, facts: &FileFacts) -> bool {
        let inner = &*self.inner;
        if facts.mount != inner.location.mount {
            return false;
        }
        match &inner.file {
            Some((_, inode)) => facts.inode == *inode && facts.device == inner.location.device,
            None => inner.location.is_mount_root || below(&inner.printed, &facts.path).is_some(),
        }
    }

    /// Whether a filesystem's device is the volume's.
    pub(crate) fn is_on(&self, device: Device) -> bool {
        device == self.inner.location.device || device == self.inner.info.device
    }

    /// `st_dev` of its files.
    pub(crate) fn device(&self) -> Device {
        self.inner.location.device
    }

    /// The path as the target sees it.
    pub(crate) fn absolute(&self) -> &[u8] {
        &self.inner.absolute
    }

    /// The path as `/proc` shows it to us.
    pub(crate) fn printed(&self) -> &[u8] {
        &self.inner.printed
    }

    /// For messages.
    pub(crate) fn display(&self) -> String {
        let text = String::from_utf8_lossy(&self.inner.absolute).into_owned();
        if text.is_empty() {
            "/".to_owned()
        } else {
            text
        }
    }

    /// A path of a file of the volume, relative to its root; also one that the kernel prints from the root of a mount that is attached nowhere.
    pub(crate) fn relative(&self, path: &Path) -> Vec<u8> {
        below(&self.inner.printed, path)
            .or_else(|| below(b"/", path))
            .unwrap_or_default()
    }

    /// The name of the only file that rules are for.
    pub(crate) fn only_file(&self) -> Option<&[u8]> {
        self.inner.file.as_ref().map(|(name, _)| name.as_slice())
    }

    /// The inode of the target's mount namespace.
    pub(crate) fn namespace(&self) -> u64 {
        self.inner.namespace.id().0
    }

    /// Whether this is the target's mount namespace.
    pub(crate) fn is_in(&self, namespace: tree::MountNamespaceId) -> bool {
        self.inner.namespace.id() == namespace
    }

    /// Whether anybody but ourselves is left in the target's mount namespace.
    pub(crate) fn is_inhabited(&self, own: Own) -> bool {
        is_inhabited(self.inner.namespace.id(), own)
    }

    /// How deep the hook says that filesystems are stacked: one more than what is below it, as more would forbid a filesystem on top of it (kernel-hazards D).
    pub(crate) fn max_stack_depth(&self) -> u32 {
        1 + u32::from(matches!(
            self.inner.info.fs_type.to_str(),
            Some("overlay" | "ecryptfs")
        ))
    }

    /// The first regular file of the directory itself, as a place only (`O_PATH`): nothing is asked of the file, and no lease on it is broken.
    pub(crate) fn first_file(&self) -> Option<OwnedFd> {
        let open = |name: &std::ffi::CStr, flags| {
            let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.inner.location.file, name, flags, Mode::empty()).ok()
        };
        // Reading would else change the directory's time of access.
        let directory = open(c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME)?;
        rustix::fs::Dir::new(directory)
            .ok()?
            .take(LOOKED_AT)
            .filter_map(Result::ok)
            .filter(|entry| matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown))
            .find_map(|entry| {
                let file = open(entry.file_name(), OFlags::PATH)?;
                let stat = rustix::fs::fstat(&file).ok()?;
                (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(file)
            })
    }

    /// The flags of the covered mount, for the hook to have them too.
    pub(crate) fn mount_flags(&self) -> Result<MountAttrFlags, AttachError> {
        let attributes = mounts::attributes_of(&self.inner.location.file)
            .map_err(failed(Step::Serve, "read the flags of the volume's mount"))?;
        Ok(MountAttrFlags::from_bits_retain(
            u32::try_from(attributes).unwrap_or(0),
        ))
    }

    /// The directory on the target's own mount.
    pub(crate) fn native(&self) -> Result<OwnedFd, AttachError> {
        self.inner.location.file.try_clone().map_err(|error| {
            AttachError::io(Step::Serve, "duplicate the volume's descriptor", error)
        })
    }

    /// A private copy of the tree, mounted nowhere, without the mounts below it.
    pub(crate) fn clone_tree(&self) -> Result<OwnedFd, AttachError> {
        mounts::clone_tree(&self.inner.namespace, &self.inner.location, false, WITHIN).map_err(
            failed(Step::Serve, format!("copy the tree of {}", self.display())),
        )
    }

    /// How the mount around the volume propagated when the path was resolved.
    pub(crate) fn propagation_around(&self) -> &Propagation {
        &self.inner.info.propagation
    }

    /// What placing is going to change, for the journal.
    pub(crate) fn propagation(&self) -> Result<PropagationRecord, AttachError> {
        Covering::record(&self.inner.namespace, &self.inner.location, WITHIN).map_err(failed(
            Step::Mount,
            format!("read how mounts around {} propagate", self.display()),
        ))
    }

    /// Puts a detached mount over the directory.
    pub(crate) fn place(
        &self,
        mount: BorrowedFd<'_>,
        record: PropagationRecord,
    ) -> Result<Covering, AttachError> {
        let namespace = self
            .inner
            .namespace
            .try_clone()
            .map_err(failed(Step::Mount, "hold the target's mount namespace"))?;
        Covering::place(namespace, &self.inner.location, mount, record, WITHIN).map_err(failed(
            Step::Mount,
            format!("put the hook over {}", self.display()),
        ))
    }

    /// Names below the volume that must show through the hook: what is mounted there, and the sockets, FIFOs and devices that are in use.
    pub(crate) fn through(&self, specials: &[FileFacts]) -> Vec<PathBuf> {
        let inner = &*self.inner;
        let mut names: Vec<PathBuf> = Vec::new();
        let mut add = |name: Vec<u8>| {
            let name = PathBuf::from(std::ffi::OsStr::from_bytes(&name));
            // What lies on a mount that is bound as a whole comes with it.
            if !name.as_os_str().is_empty() && !names.iter().any(|known| name.starts_with(known)) {
                names.push(name);
            }
        };
        for mount in mounts::submounts(inner.target.pid, &inner.location).unwrap_or_default() {
            if let Some(name) = below(&inner.absolute, &mount.mount_point) {
                add(name);
            }
        }
        for facts in specials.iter().filter(|facts| !facts.is_deleted) {
            if let Some(name) = below(&inner.printed, &facts.path) {
                add(name);
            }
        }
        for path in bound_sockets(inner.target) {
            if let Some(name) = below(&inner.absolute, &path) {
                add(name);
            }
        }
        names
    }

    /// Whether the target has a mount on the hook's place still.
    pub(crate) fn is_in_place(covering: &Covering) -> bool {
        covering.is_in_place(WITHIN).unwrap_or(true)
    }
}

/// Paths of the unix sockets that are bound in a process's network namespace (`/proc/<pid>/net/unix`, last column).
fn bound_sockets(process: ProcessId) -> Vec<PathBuf> {
    let text = std::fs::read(format!("/proc/{}/net/unix", process.pid)).unwrap_or_default();
    text.split(|byte| *byte == b'\n')
        .skip(1)
        .filter_map(|line| {
            line.iter()
                .position(|byte| *byte == b'/')
                .and_then(|at| line.get(at..))
        })
        .map(|path| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
        .collect()
}

/// Takes a placed hook away in the target's namespace.
pub(crate) fn take_off(covering: Covering) -> Result<(), AttachError> {
    covering
        .remove(WITHIN)
        .map_err(failed(Step::Recover, "take the hook away"))
}

/// Whether any process but Hobble's own is in a mount namespace.
pub(crate) fn is_inhabited(namespace: MountNamespaceId, own: Own) -> bool {
    tree::in_mount_namespace(namespace).map_or(true, |found| {
        found
            .processes
            .iter()
            .any(|process| !own.includes(process.pid))
    })
}

/// The filesystem with this source, if it is mounted in the namespace of any process.
pub(crate) fn find_by_source(source: &str) -> Option<Device> {
    tree::pids()
        .unwrap_or_default()
        .into_iter()
        .find_map(|pid| {
            let mounts = mountinfo::of_process(pid).ok()?;
            let ours = mounts
                .into_iter()
                .find(|mount| mount.fs_type == "fuse.hobble" && mount.source == source)?;
            Some(ours.device)
        })
}

/// Whether one of our filesystems is mounted anywhere.
pub(crate) fn is_sighted(device: Device, source: &str) -> bool {
    let filesystem = Filesystem {
        device,
        source: source.into(),
    };
    mounts::sightings(filesystem, WITHIN).is_ok_and(|found| !found.is_empty())
}

/// Removes every mount of one of our filesystems from every mount namespace on this host. Gives those that cannot be removed.
pub(crate) fn remove_everywhere(
    device: Device,
    source: &str,
) -> Result<Vec<NotCovered>, AttachError> {
    let filesystem = Filesystem {
        device,
        source: source.into(),
    };
    let left = mounts::remove_leftovers(filesystem, WITHIN)
        .map_err(failed(Step::Recover, "look for mounts of the hook"))?;
    Ok(left
        .into_iter()
        .map(|leftover| {
            tracing::warn!(path = %leftover.path.display(), namespace = leftover.namespace.0, refused = ?leftover.refused, "a mount of the hook cannot be removed");
            let why = leftover.refused.map_or_else(String::new, |errno| format!(" ({errno})"));
            NotCovered {
                what: format!("the mount at {} in mount namespace {}", leftover.path.display(), leftover.namespace.0),
                reason: format!("it cannot be removed{why}: it was copied into a sandbox made meanwhile, or something is mounted over it"),
                pid: None,
            }
        })
        .collect())
}

/// Gives the mount around a volume the propagation back that a dead server had changed.
pub(crate) fn restore_propagation(
    volume: &Volume,
    record: PropagationRecord,
) -> Result<(), AttachError> {
    Covering::restore(
        &volume.inner.namespace,
        &volume.inner.location,
        record,
        WITHIN,
    )
    .map_err(failed(Step::Recover, "give a mount its propagation back"))
}
