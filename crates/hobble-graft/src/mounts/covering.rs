//! A mount placed over a volume, and the propagation of the mount around the volume while it is there.
//!
//! Placed on a shared mount, ours would show up in every other member of its peer group: on the host, in other containers. Placed
//! on a private one, it would stay behind in copies of the namespace that are made meanwhile (`unshare -Um`), where nobody may
//! remove it. So the mount around the volume becomes a *slave* of its group (what the others mount still arrives, nothing goes out)
//! and *shared* in a group of its own, of which copies are made members or slaves: there our `umount` arrives. In the end it is
//! given back the groups it had (MOVE_MOUNT_SET_GROUP, Linux 5.15), from a detached copy that was a member all the time.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::namespace::{Inside, MountNamespace};
use super::volume::{Location, UniqueMountId, copy, look, open_scoped};
use super::{MountsError, step};
use crate::ids::{Device, MountId};
use crate::proc::mountinfo::{Mount, Propagation};
use crate::stop::Deadline;
use crate::sys::mount as sys;

/// `MOVE_MOUNT_SET_GROUP`.
const SET_GROUP: MoveMountFlags = MoveMountFlags::from_bits_retain(0x100);

/// What a later process must know to give a mount its propagation back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PropagationRecord {
    /// The mount around the volume.
    pub mount: MountId,
    /// The same, for good.
    pub unique: UniqueMountId,
    /// What it was before.
    pub propagation: Propagation,
}

/// A mount of ours that lies over a volume.
#[derive(Debug)]
pub struct Covering {
    namespace: MountNamespace,
    /// The root of our mount.
    top: OwnedFd,
    mount: MountId,
    unique: UniqueMountId,
    device: Device,
    /// The volume, below.
    volume: OwnedFd,
    path: PathBuf,
    around: Around,
}

/// The mount around the volume.
#[derive(Debug)]
struct Around {
    root: OwnedFd,
    record: PropagationRecord,
    /// A detached copy in the groups it had; `None` when it had none.
    member: Option<OwnedFd>,
}

impl Covering {
    /// What [`Covering::place`] is going to change, for the journal: to be written down before it is called.
    ///
    /// # Errors
    /// When the mounts of the namespace cannot be read.
    pub fn record(
        namespace: &MountNamespace,
        location: &Location,
        timeout: Duration,
    ) -> Result<PropagationRecord, MountsError> {
        let (mount, unique) = (location.mount, location.unique);
        let mounts = namespace.enter(timeout, |inside| inside.mounts())??;
        let propagation = find(&mounts, mount)?.propagation;
        Ok(PropagationRecord {
            mount,
            unique,
            propagation,
        })
    }

    /// Puts the detached mount `top` over `location`, a directory over a directory or a file over a file. Whoever serves `top` is
    /// asked nothing.
    ///
    /// If we die on the way, the mount around the volume may have another propagation than it had ([`Covering::restore`] with the
    /// record gives it back), and once the last step is done our mount lies there ([`super::remove_leftovers`]).
    ///
    /// # Errors
    /// The step that failed; what was done before it has been undone.
    pub fn place(
        namespace: MountNamespace,
        location: &Location,
        top: BorrowedFd<'_>,
        record: PropagationRecord,
        timeout: Duration,
    ) -> Result<Self, MountsError> {
        let clone = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(MountsError::Thread);
        let seen = look(top).map_err(step("look at the mount to be placed"))?;
        let root = location.mount_root()?;
        let (volume, top) = (clone(location.file.as_fd())?, clone(top)?);
        let (volume_there, top_there, root_there) = (
            clone(volume.as_fd())?,
            clone(top.as_fd())?,
            clone(root.as_fd())?,
        );
        let member = namespace.enter(timeout, move |_| {
            let member = confine(root_there.as_fd(), record.propagation)?;
            let placed = rustix::mount::move_mount(
                top_there.as_fd(),
                "",
                volume_there.as_fd(),
                "",
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
            );
            if let Err(errno) = placed {
                undo(
                    root_there.as_fd(),
                    record.propagation,
                    member.as_ref().map(|m| m.as_fd()),
                );
                return Err(step("place a mount over the volume")(errno));
            }
            Ok(member)
        })??;
        let around = Around {
            root,
            record,
            member,
        };
        let path = location.path.clone();
        Ok(Self {
            namespace,
            top,
            mount: seen.mount,
            unique: seen.unique,
            device: seen.device,
            volume,
            path,
            around,
        })
    }

    /// The namespace it was placed in.
    pub fn namespace(&self) -> &MountNamespace {
        &self.namespace
    }

    /// Our mount's number.
    pub fn mount(&self) -> MountId {
        self.mount
    }

    /// Our mount's number, for good.
    pub fn unique(&self) -> UniqueMountId {
        self.unique
    }

    /// Device of our filesystem.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The volume below our mount, open with `O_PATH`: a walk from here stays below.
    pub fn volume(&self) -> BorrowedFd<'_> {
        self.volume.as_fd()
    }

    /// Whether it is still where it was placed. Somebody in the namespace may have unmounted it; or removed the covered directory
    /// from another namespace, which detaches what is mounted on it without a word (vfs_rmdir, `detach_mounts`).
    ///
    /// # Errors
    /// When the mounts of the namespace cannot be read.
    pub fn is_in_place(&self, timeout: Duration) -> Result<bool, MountsError> {
        let mounts = self.namespace.enter(timeout, |inside| inside.mounts())??;
        Ok(mounts
            .iter()
            .any(|m| m.id == self.mount && m.device == self.device))
    }

    /// Binds names, paths relative to the volume, from below onto the same names in our mount: a mount that lay there with all below
    /// it, or the socket, FIFO or device of that name, which would else be a stranger's (a unix socket seen through another
    /// filesystem refuses to be connected to). **Walks through our mount**, so it must be served, by another thread. Returns the names
    /// that could not be bound, each with its own reason (`ENOENT` when there is no such name on either side).
    ///
    /// If we die, what was bound remains as long as our mount does, and goes with it.
    ///
    /// # Errors
    /// [`MountsError::Late`] or [`MountsError::Timeout`] when the deadline passes, with some of the names bound: to be undone by
    /// [`Covering::remove`]. A thread that is left behind then, waiting for whoever serves our mount, binds nothing any more: it looks
    /// at the deadline before each name, and the kernel puts nothing onto a mount that is in no namespace (`EINVAL`).
    pub fn bind_through(
        &self,
        names: Vec<PathBuf>,
        deadline: Deadline,
    ) -> Result<Vec<(PathBuf, MountsError)>, MountsError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let clone = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(MountsError::Thread);
        let (volume, top) = (clone(self.volume.as_fd())?, clone(self.top.as_fd())?);
        // One visit for all of them: a thread for each name would be most of the time.
        self.namespace.enter(deadline.left(), move |_| {
            let mut unbound = Vec::new();
            let count = names.len();
            for (done, name) in names.into_iter().enumerate() {
                if deadline.passed() {
                    return Err(MountsError::Late { left: count - done });
                }
                if let Err(error) = bind(volume.as_fd(), top.as_fd(), &name) {
                    unbound.push((name, error));
                }
            }
            Ok(unbound)
        })?
    }

    /// Takes our mount away, with what was bound onto it, here and in the copies of this namespace that were made since; then gives
    /// the mount around the volume its propagation back. Whoever serves our mount is asked nothing.
    ///
    /// Descriptors that are still open on it keep working. That it is gone already is no error. If we die on the way, the propagation
    /// may remain to be restored.
    ///
    /// # Errors
    /// The step that failed. [`super::sightings`] tells what is left of the mount anywhere.
    pub fn remove(self, timeout: Duration) -> Result<(), MountsError> {
        let (mount, device) = (self.mount, self.device);
        let Around {
            root,
            record,
            member,
        } = self.around;
        let top = self.top;
        self.namespace.enter(timeout, move |inside| {
            let is_there = inside
                .mounts()?
                .iter()
                .any(|m| m.id == mount && m.device == device);
            if is_there {
                inside
                    .unmount(top.as_fd())
                    .map_err(step("unmount the hook"))?;
            }
            give_back(
                root.as_fd(),
                record.propagation,
                member.as_ref().map(|m| m.as_fd()),
            )
        })?
    }

    /// Gives a mount the propagation back that a process changed and then died. `location` is a place in that mount, and nothing of
    /// ours lies over it any more. Without the copy that the dead process held, another member of the group is looked for among the
    /// mounts of the namespace and of ours; where there is none, a mount that was shared is shared again in a new group.
    ///
    /// If we die, the propagation may be private; calling this again continues.
    ///
    /// # Errors
    /// [`MountsError::NotOurs`] when `location` is not in the mount of the record.
    pub fn restore(
        namespace: &MountNamespace,
        location: &Location,
        record: PropagationRecord,
        timeout: Duration,
    ) -> Result<(), MountsError> {
        if location.unique != record.unique {
            return Err(MountsError::NotOurs {
                path: location.path.clone(),
            });
        }
        let root = location.mount_root()?;
        let mut member = None;
        if !record.propagation.is_private() {
            let near = MountNamespace::from_descriptor(
                namespace
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(MountsError::Thread)?,
            )?;
            for place in std::iter::once(near).chain(MountNamespace::all()?) {
                // A namespace that cannot be searched has no member that could be used.
                if let Ok(Ok(found @ Some(_))) =
                    place.enter(timeout, move |inside| member_of(inside, record))
                {
                    member = found;
                    break;
                }
            }
        }
        namespace.enter(timeout, move |_| {
            give_back(
                root.as_fd(),
                record.propagation,
                member.as_ref().map(|m| m.as_fd()),
            )
        })?
    }

    /// Where it is, as the target sees it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Binds a name of the volume onto the same name of the mount `top`. To be called inside the namespace of both.
fn bind(volume: BorrowedFd<'_>, top: BorrowedFd<'_>, name: &Path) -> Result<(), MountsError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW
        | OpenTreeFlags::AT_RECURSIVE;
    let below = rustix::mount::open_tree(volume, name, flags)
        .map_err(step("copy what lies below the hook"))?;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let onto =
        open_scoped(top, name, OFlags::NOFOLLOW, how).map_err(step("find a name on the hook"))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(below.as_fd(), "", onto.as_fd(), "", flags)
        .map_err(step("bind a name onto the hook"))
}

fn find(mounts: &[Mount], id: MountId) -> Result<&Mount, MountsError> {
    mounts.iter().find(|m| m.id == id).ok_or(MountsError::Step {
        step: "find the mount around the volume",
        errno: Errno::NOENT,
    })
}

/// Makes the mount a slave of its group and shared in a new one; returns a detached copy that is still in the old groups.
fn confine(root: BorrowedFd<'_>, before: Propagation) -> Result<Option<OwnedFd>, MountsError> {
    let member = if before.is_private() {
        None
    } else {
        Some(copy(root, false)?)
    };
    if before.peer_group.is_some() {
        sys::set_propagation(root, libc::MS_SLAVE, false)
            .map_err(step("make the mount around the volume a slave"))?;
    }
    if let Err(errno) = sys::set_propagation(root, libc::MS_SHARED, false) {
        undo(root, before, member.as_ref().map(|m| m.as_fd()));
        return Err(step("make the mount around the volume shared")(errno));
    }
    Ok(member)
}

/// [`give_back`] after a failure, which is what the caller reports.
fn undo(root: BorrowedFd<'_>, before: Propagation, member: Option<BorrowedFd<'_>>) {
    if let Err(error) = give_back(root, before, member) {
        tracing::error!(%error, "the mount around the volume keeps a propagation of ours; `findmnt -o +PROPAGATION` shows it");
    }
}

/// The reverse of [`confine`].
fn give_back(
    root: BorrowedFd<'_>,
    before: Propagation,
    member: Option<BorrowedFd<'_>>,
) -> Result<(), MountsError> {
    let set =
        |propagation, what| sys::set_propagation(root, propagation, false).map_err(step(what));
    if before.is_unbindable {
        return set(
            libc::MS_UNBINDABLE,
            "make the mount around the volume unbindable again",
        );
    }
    // Groups are only given to a mount that has none.
    set(libc::MS_PRIVATE, "make the mount around the volume private")?;
    if before.is_private() {
        return Ok(());
    }
    let joined = member.is_some_and(|member| {
        let flags = SET_GROUP | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(member, "", root, "", flags)
            .inspect_err(|errno| tracing::warn!(%errno, "the mount around the volume could not join its peer group again"))
            .is_ok()
    });
    if joined || before.peer_group.is_none() {
        return Ok(());
    }
    set(
        libc::MS_SHARED,
        "make the mount around the volume shared again",
    )
}

/// A detached copy with the groups of the record, made from any mount that has them, or that is of the group that ours was a slave of.
/// To be called inside a namespace.
fn member_of(inside: &Inside, record: PropagationRecord) -> Result<Option<OwnedFd>, MountsError> {
    let before = record.propagation;
    let mounts = inside.mounts()?;
    let others = || mounts.iter().filter(|m| m.id != record.mount);
    let peers = others()
        .filter(|m| before.peer_group.is_some() && m.propagation.peer_group == before.peer_group);
    let siblings = others().filter(|m| {
        let now = m.propagation;
        before.peer_group.is_none()
            && now.peer_group.is_none()
            && before.master.is_some()
            && now.master == before.master
    });
    let masters =
        others().filter(|m| before.master.is_some() && m.propagation.peer_group == before.master);
    let candidates = peers
        .map(|m| (m, false))
        .chain(siblings.map(|m| (m, false)))
        .chain(masters.map(|m| (m, true)));
    for (mount, is_master) in candidates {
        let Ok(root) = super::volume::open_in(inside.root(), &mount.mount_point, OFlags::empty())
        else {
            continue;
        };
        // Something else may lie over its mount point.
        if !look(root.as_fd()).is_ok_and(|seen| seen.mount == mount.id) {
            continue;
        }
        let Ok(member) = copy(root.as_fd(), false) else {
            continue;
        };
        // The copy is a peer of its original; as a slave of that it is what ours was.
        if is_master && sys::set_propagation(member.as_fd(), libc::MS_SLAVE, false).is_err() {
            continue;
        }
        return Ok(Some(member));
    }
    Ok(None)
}
