//! What is left of a filesystem of ours, in whatever mount namespace of the host.

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::MountsError;
use super::namespace::{Inside, MountNamespace};
use super::volume::{look, open_in};
use crate::ids::{Device, MountId};
use crate::proc::mountinfo::Mount;
use crate::proc::tree::MountNamespaceId;

/// A mount of the filesystem that was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The namespace it is in.
    pub namespace: MountNamespaceId,
    /// Its number.
    pub mount: MountId,
    /// Its mount point, from the root of that namespace.
    pub path: PathBuf,
    /// Why it is still there; `None` when nobody tried to remove it. `EINVAL`: it is locked to its parent, in a namespace that was
    /// made without privileges and no longer takes part in propagation. `EBUSY`: something else is mounted over it.
    pub refused: Option<Errno>,
}

/// What the source of our mounts is called in `mountinfo`, unless something else is said.
const SOURCE: &str = "hobble";

/// What tells a filesystem of ours from every other.
///
/// The device number alone does not: the kernel gives it to the next filesystem without a disk as soon as ours has gone, and a
/// recovery that comes late would remove a stranger's mounts. The source, chosen when the filesystem is made, should therefore be
/// one that no other attachment has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// `st_dev` of its files.
    pub device: Device,
    /// The source it was mounted with.
    pub source: OsString,
}

impl From<Device> for Filesystem {
    /// A filesystem whose source is just `hobble`.
    fn from(device: Device) -> Self {
        Self {
            device,
            source: SOURCE.into(),
        }
    }
}

impl Filesystem {
    fn is_of(&self, mount: &Mount) -> bool {
        mount.device == self.device && mount.source == self.source
    }
}

/// Every mount of a filesystem of ours on the host. Changes nothing, and asks nothing of the filesystem. Namespaces that cannot be joined are
/// passed over; the first error of that kind is logged.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn sightings(
    of: impl Into<Filesystem>,
    timeout: Duration,
) -> Result<Vec<Leftover>, MountsError> {
    let of = of.into();
    everywhere(timeout, move |inside, namespace| {
        found(inside, namespace, &of)
    })
}

/// Removes every mount of a filesystem of ours on the host. Returns what could not be removed. Asks nothing of the filesystem.
///
/// If we die, those that were not reached yet remain; calling this again continues.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn remove_leftovers(
    of: impl Into<Filesystem>,
    timeout: Duration,
) -> Result<Vec<Leftover>, MountsError> {
    let of = of.into();
    everywhere(timeout, move |inside, namespace| {
        // Children of ours lie above and come later in the list; the topmost of several on one point must go first.
        let mut left = found(inside, namespace, &of)?;
        left.reverse();
        for leftover in &mut left {
            leftover.refused = remove(inside, leftover).err();
        }
        // What was refused may have gone with another, by propagation.
        let still = found(inside, namespace, &of)?;
        left.retain(|leftover| still.iter().any(|s| s.mount == leftover.mount));
        Ok(left)
    })
}

fn remove(inside: &Inside, leftover: &Leftover) -> Result<(), Errno> {
    let root = open_in(inside.root(), &leftover.path, OFlags::NOFOLLOW)?;
    if look(root.as_fd())?.mount != leftover.mount {
        return Err(Errno::BUSY);
    }
    inside.unmount(root.as_fd())
}

fn found(
    inside: &Inside,
    namespace: MountNamespaceId,
    of: &Filesystem,
) -> Result<Vec<Leftover>, MountsError> {
    let mounts = inside.mounts()?.into_iter().filter(|m| of.is_of(m));
    Ok(mounts
        .map(|m| Leftover {
            namespace,
            mount: m.id,
            path: m.mount_point,
            refused: None,
        })
        .collect())
}

fn everywhere(
    timeout: Duration,
    work: impl Fn(&Inside, MountNamespaceId) -> Result<Vec<Leftover>, MountsError>
    + Clone
    + Send
    + 'static,
) -> Result<Vec<Leftover>, MountsError> {
    let mut all = Vec::new();
    let mut has_failed = false;
    for namespace in MountNamespace::all()? {
        let (id, work) = (namespace.id(), work.clone());
        match namespace
            .enter(timeout, move |inside| work(inside, id))
            .and_then(|done| done)
        {
            Ok(found) => all.extend(found),
            Err(error) if !has_failed => {
                has_failed = true;
                tracing::warn!(namespace = id.0, %error, "a mount namespace could not be searched");
            }
            Err(_) => {}
        }
    }
    Ok(all)
}
