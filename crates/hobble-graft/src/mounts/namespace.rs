//! A mount namespace that we hold, and a thread's visit to it.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::{MountsError, step};
use crate::ids::Pid;
use crate::proc::mountinfo::{self, Mount};
use crate::proc::tree::{self, MountNamespaceId};
use crate::proc::{ProcError, read_open};
use crate::sys::mount as sys;

/// A mount namespace, held so that it does not end and its number is not given to another.
#[derive(Debug)]
pub struct MountNamespace {
    fd: OwnedFd,
    id: MountNamespaceId,
}

impl MountNamespace {
    /// The mount namespace of a process.
    ///
    /// # Errors
    /// [`ProcError::Gone`] when there is no such process or it is a zombie.
    pub fn of(pid: Pid) -> Result<Self, MountsError> {
        let path = PathBuf::from(format!("/proc/{pid}/ns/mnt"));
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| ProcError::errno(&path, errno))?;
        Self::from_descriptor(fd)
    }

    /// A mount namespace that somebody else opened.
    ///
    /// # Errors
    /// When the descriptor cannot be looked at.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, MountsError> {
        let stat = rustix::fs::fstat(&fd).map_err(step("look at a mount namespace"))?;
        Ok(Self {
            fd,
            id: MountNamespaceId(stat.st_ino),
        })
    }

    /// Another hold on the same namespace.
    ///
    /// # Errors
    /// When our descriptors run out.
    pub fn try_clone(&self) -> Result<Self, MountsError> {
        let fd = self.fd.try_clone().map_err(MountsError::Thread)?;
        Ok(Self { fd, id: self.id })
    }

    /// Its number.
    pub fn id(&self) -> MountNamespaceId {
        self.id
    }

    /// Runs `work` on a new thread that has joined the namespace, with its root directory as root and working directory, and waits
    /// for it, at most `timeout`. Nothing about the calling thread or any other changes. If we die meanwhile, what `work` has done
    /// remains.
    ///
    /// # Errors
    /// [`MountsError::Timeout`] when `work` does not come back: its thread stays in the kernel until the filesystem that it waits
    /// for answers or is aborted.
    pub fn enter<T: Send + 'static>(
        &self,
        timeout: Duration,
        work: impl FnOnce(&Inside) -> T + Send + 'static,
    ) -> Result<T, MountsError> {
        let namespace = self.fd.try_clone().map_err(MountsError::Thread)?;
        let (tell, told) = mpsc::channel();
        std::thread::Builder::new()
            .name("namespace".to_owned())
            .spawn(move || {
                let done = Inside::join(&namespace).map(|inside| work(&inside));
                // Nobody listens any more after a timeout.
                let _ = tell.send(done);
            })
            .map_err(MountsError::Thread)?;
        match told.recv_timeout(timeout) {
            Ok(done) => done,
            Err(RecvTimeoutError::Timeout) => Err(MountsError::Timeout { timeout }),
            Err(RecvTimeoutError::Disconnected) => Err(MountsError::Lost),
        }
    }

    /// Every mount namespace of the host that can be found: those of all processes and threads, and, where the kernel can list them
    /// (6.12), those that only descriptors or bind mounts hold. Each once.
    ///
    /// # Errors
    /// When `/proc` cannot be listed. Processes that may not be looked into are passed over.
    pub fn all() -> Result<Vec<Self>, MountsError> {
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        let mut add = |namespace: Self| {
            if seen.insert(namespace.id) {
                found.push(namespace);
            }
        };
        let own = Self::of(Pid::own())?;
        for is_next in [true, false] {
            let mut at = own.fd.try_clone().map_err(MountsError::Thread)?;
            // Not an error: before 6.12 nobody can list them, and the processes are all there is.
            while let Ok(Some(next)) = sys::neighbour(at.as_fd(), is_next) {
                at = next.try_clone().map_err(MountsError::Thread)?;
                add(Self::from_descriptor(next)?);
            }
        }
        add(own);
        for pid in tree::pids()? {
            let Ok(threads) = tree::threads(pid) else {
                continue;
            };
            for tid in threads {
                let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/ns/mnt"));
                if let Ok(fd) =
                    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                {
                    add(Self::from_descriptor(fd)?);
                }
            }
        }
        Ok(found)
    }
}

impl AsFd for MountNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A thread's presence in a mount namespace. It cannot leave the thread.
#[derive(Debug)]
pub struct Inside {
    /// `/proc/thread-self` of the namespace that we come from: the one over there may be missing, or of another pid namespace.
    own: OwnedFd,
    /// Its directory of descriptors, the working directory for [`Inside::unmount`].
    descriptors: OwnedFd,
    /// The root of the namespace.
    root: OwnedFd,
    thread: std::marker::PhantomData<*const ()>,
}

impl Inside {
    fn join(namespace: &OwnedFd) -> Result<Self, MountsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &str| rustix::fs::open(path, flags, Mode::empty());
        let own = open("/proc/thread-self").map_err(step("open /proc/thread-self"))?;
        let descriptors =
            open("/proc/thread-self/fd").map_err(step("open /proc/thread-self/fd"))?;
        sys::unshare_directories().map_err(step("unshare the working directory of a thread"))?;
        let kind = Some(rustix::thread::LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
            .map_err(step("join a mount namespace"))?;
        // Joining has made the root of the namespace our root and working directory (fs/namespace.c, `mntns_install`).
        let root = open("/").map_err(step("open the root of a mount namespace"))?;
        Ok(Self {
            own,
            descriptors,
            root,
            thread: std::marker::PhantomData,
        })
    }

    /// The root directory of the namespace.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// All mounts of the namespace, parents first.
    ///
    /// # Errors
    /// When the list cannot be read or understood.
    pub fn mounts(&self) -> Result<Vec<Mount>, MountsError> {
        let path = Path::new("/proc/thread-self/mountinfo");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.own, "mountinfo", flags, Mode::empty())
            .map_err(|errno| ProcError::errno(path, errno))?;
        let text = read_open(file, path)?;
        Ok(mountinfo::parse(&text).map_err(|e| ProcError::parse(path, e))?)
    }

    /// Detaches the mount whose root `root` is open as, and everything mounted below it (MNT_DETACH). Nothing is asked of the
    /// filesystem: the mount is named by the descriptor, and no path of it is walked.
    ///
    /// # Errors
    /// `EINVAL` when `root` is not the root of a mount of this namespace, or the mount is locked to its parent because the namespace
    /// was made by somebody with fewer privileges.
    pub fn unmount(&self, root: BorrowedFd<'_>) -> Result<(), Errno> {
        // By a link of our own /proc, found relative to the working directory, which may lie outside the namespace.
        rustix::process::fchdir(&self.descriptors)?;
        let name = CString::new(root.as_raw_fd().to_string()).unwrap_or_default();
        let done = sys::unmount(&name, libc::MNT_DETACH);
        rustix::process::fchdir(&self.root)?;
        done
    }
}

/// Opens the root directory of a process, as it sees it.
pub(super) fn root_of(pid: Pid) -> Result<OwnedFd, MountsError> {
    let path = PathBuf::from(format!("/proc/{pid}/root"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, &path, flags, Mode::empty())
        .map_err(|errno| ProcError::errno(&path, errno))?)
}
