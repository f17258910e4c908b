//! Making a FUSE filesystem that is mounted nowhere yet.
//!
//! [`create`] opens the device and takes `fsopen` … `fsmount` to a detached mount; the caller decides where it goes. Invariant:
//! nothing is attached to any namespace here, so that dropping a [`NewMount`] undoes everything.

use std::fmt;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use thiserror::Error;

use crate::device::Device;

/// What the filesystem shall look like.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// First column of `/proc/mounts`.
    pub source: String,
    /// Shown behind `fuse.` as the type of the filesystem.
    pub subtype: Option<String>,
    /// File type of the root: a directory unless told otherwise.
    pub root: FileType,
    /// Owner of the mount, who may use it even without `allow_other`.
    pub user_id: u32,
    /// Group of the mount.
    pub group_id: u32,
    /// Everybody may use it. Without, all others get EACCES.
    pub allow_other: bool,
    /// The kernel checks permission bits and ACLs; ACCESS is then never sent.
    pub default_permissions: bool,
    /// Largest READ in bytes; `None` for no limit but that of the connection.
    pub max_read: Option<u32>,
    /// Flags of the mount: nosuid, noatime, read-only and so on.
    pub attributes: MountAttrFlags,
    /// The device node.
    pub device: PathBuf,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            source: "hobble".into(),
            subtype: Some("hobble".into()),
            root: FileType::Directory,
            user_id: 0,
            group_id: 0,
            allow_other: true,
            default_permissions: true,
            max_read: None,
            attributes: MountAttrFlags::empty(),
            device: "/dev/fuse".into(),
        }
    }
}

/// Why no mount could be made.
#[derive(Debug, Error)]
pub enum MountError {
    /// The device node cannot be opened.
    #[error("cannot open {path}{}", hint_for_device(source))]
    Device {
        /// The node.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A step of `fsopen` … `fsmount` failed.
    #[error("cannot create a fuse mount: {step} failed{log}")]
    Step {
        /// The step.
        step: &'static str,
        /// What the kernel had to say about it.
        log: KernelLog,
        /// Why.
        #[source]
        source: Errno,
    },
}

fn hint_for_device(errno: &Errno) -> &'static str {
    match *errno {
        Errno::NOENT => {
            " (hint: `modprobe fuse`, and if the node is missing all the same: `mknod /dev/fuse c 10 229`)"
        }
        Errno::NODEV | Errno::NXIO => " (hint: `modprobe fuse`)",
        Errno::PERM | Errno::ACCESS => {
            " (hint: run as root; in a container, allow the device `c 10:229 rwm` in its device cgroup)"
        }
        _ => "",
    }
}

/// Messages that the kernel left in the filesystem context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelLog(pub Vec<String>);

impl fmt::Display for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, line) in self.0.iter().enumerate() {
            write!(f, "{}{line}", if i == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

/// A new filesystem, served by nobody and mounted nowhere.
#[derive(Debug)]
pub struct NewMount {
    /// The connection, to be given to [`crate::Server::start`]. INIT is already queued.
    pub device: Device,
    /// The detached mount, for `move_mount`. Dropping it (if it was not moved) unmounts.
    pub mount: OwnedFd,
    /// The connection's control.
    pub connection: Connection,
}

/// Makes a filesystem.
///
/// # Errors
/// When the device cannot be opened, or the kernel refuses a step; [`MountError`] has its own words.
pub fn create(options: &MountOptions) -> Result<NewMount, MountError> {
    let device = rustix::fs::open(
        &options.device,
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|source| MountError::Device {
        path: options.device.clone(),
        source,
    })?;
    let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|source| {
        MountError::Step {
            step: "fsopen",
            log: KernelLog::default(),
            source,
        }
    })?;
    let failed = |step| {
        let context = context.as_fd();
        move |source| MountError::Step {
            step,
            log: read_log(context),
            source,
        }
    };
    let set = |key: &'static str, value: &str| {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value).map_err(failed(key))
    };
    set("source", &options.source)?;
    if let Some(subtype) = &options.subtype {
        set("subtype", subtype)?;
    }
    set("fd", &device.as_raw_fd().to_string())?;
    set("rootmode", &format!("{:o}", options.root.as_raw_mode()))?;
    set("user_id", &options.user_id.to_string())?;
    set("group_id", &options.group_id.to_string())?;
    if let Some(max_read) = options.max_read {
        set("max_read", &max_read.to_string())?;
    }
    for (key, wanted) in [
        ("allow_other", options.allow_other),
        ("default_permissions", options.default_permissions),
    ] {
        if wanted {
            rustix::mount::fsconfig_set_flag(context.as_fd(), key).map_err(failed(key))?;
        }
    }
    // A read-only mount need not be a read-only filesystem: only the mount's flag is set, below.
    rustix::mount::fsconfig_create(context.as_fd()).map_err(failed("FSCONFIG_CMD_CREATE"))?;
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        options.attributes,
    )
    .map_err(failed("fsmount"))?;
    let connection = Connection::of(&mount).map_err(failed("statx of the new mount"))?;
    Ok(NewMount {
        device: Device::new(device),
        mount,
        connection,
    })
}

fn read_log(context: std::os::fd::BorrowedFd<'_>) -> KernelLog {
    let mut lines = Vec::new();
    let mut buffer = [0u8; 1024];
    // One message per read; ENODATA after the last (fscontext_read, fs/fsopen.c).
    while let Ok(len) = rustix::io::read(context, &mut buffer) {
        let line = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default());
        // "e fuse: …": the first word is the level.
        lines.push(
            line.trim_end()
                .split_once(' ')
                .map_or_else(|| line.to_string(), |(_, text)| text.to_owned()),
        );
        if len == 0 || lines.len() == 16 {
            break;
        }
    }
    KernelLog(lines)
}

/// The kernel's control of one connection: `/sys/fs/fuse/connections/N`, reached without any path that could lie under the
/// hook or be absent from this mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    number: u32,
}

impl Connection {
    /// The connection with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        Self { number }
    }

    /// The connection behind a descriptor of a FUSE mount.
    ///
    /// # Errors
    /// What statx says. It asks the server nothing: not before INIT, not when the server is dead.
    pub fn of(mount: &OwnedFd) -> Result<Self, Errno> {
        // With AT_STATX_DONT_SYNC fuse_getattr (fs/fuse/dir.c) uses what it has.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(mount, c"", flags, StatxFlags::empty())?;
        Ok(Self {
            number: stat.stx_dev_minor,
        })
    }

    /// N of `/sys/fs/fuse/connections/N`: the minor number of st_dev, whose major is 0 (fuse_ctl_add_conn, fs/fuse/control.c).
    #[must_use]
    pub const fn number(self) -> u32 {
        self.number
    }

    /// Aborts the connection: every request, waiting or in the server, fails with ECONNABORTED, and so do all later ones. The mount stays.
    ///
    /// # Errors
    /// ENOENT when there is no such connection any more; what mounting or writing the control file says.
    pub fn abort(self) -> Result<(), Errno> {
        let mut file = self.control("abort", OFlags::WRONLY)?;
        file.write_all(b"1")
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Number of requests that callers wait for at this moment, read or not.
    ///
    /// # Errors
    /// As for [`Connection::abort`].
    pub fn waiting(self) -> Result<u64, Errno> {
        let file = self.control("waiting", OFlags::RDONLY)?;
        let text = std::io::read_to_string(file)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        text.trim().parse().map_err(|_| Errno::PROTO)
    }

    fn control(self, file: &str, flags: OFlags) -> Result<std::fs::File, Errno> {
        // A detached mount of fusectl: the filesystem is one and the same for all (get_tree_single).
        let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        let root = rustix::mount::fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        let path = format!("{}/{file}", self.number);
        Ok(rustix::fs::openat(&root, path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }
}
