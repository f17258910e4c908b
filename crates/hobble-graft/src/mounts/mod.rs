//! Mounts in other mount namespaces: where a volume is, what lies below it, how a mount is put over it and taken away again.
//!
//! Knows descriptors of mounts, and not what filesystem they are of. Invariants:
//!
//! - A mount that we place shows up in the namespace it is placed in and in copies of that namespace made later, nowhere else.
//! - When it is taken away it goes from all of those, as far as the kernel lets us; what is left is named.
//! - No path is walked *through* a mount that we placed unless its function says so: whoever serves it may be dead.
//!
//! Everything that acts in a namespace runs on a thread that is made for it, joins the namespace and ends: the other threads of
//! the process never leave theirs (setns(2); `unshare(CLONE_FS)` first). Every such call is bounded in time.

mod covering;
mod leftovers;
mod namespace;
mod volume;

pub use covering::{Covering, PropagationRecord};
pub use leftovers::{Filesystem, Leftover, remove_leftovers, sightings};
pub use namespace::{Inside, MountNamespace};
pub use volume::{Location, UniqueMountId, attributes_of, clone_tree, submounts};

use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;

use crate::proc::ProcError;

/// Why something about a mount failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountsError {
    /// A file in `/proc` could not be read or understood.
    #[error("cannot inspect the mounts of a process")]
    Proc(#[from] ProcError),
    /// The path does not lead anywhere in the root directory of the process.
    #[error("cannot resolve {} as process {pid} sees it", path.display())]
    Resolve {
        /// The process.
        pid: crate::ids::Pid,
        /// The path that was asked for.
        path: PathBuf,
        /// The kernel's reason. ELOOP: a magic link in `/proc` is on the way.
        #[source]
        errno: Errno,
    },
    /// The root of the mount that a directory is in cannot be reached, because something else is mounted over it or over a
    /// directory on the way.
    #[error("the root of the mount around {} cannot be reached", path.display())]
    Unreachable {
        /// The directory.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A step in a mount namespace failed.
    #[error("cannot {step}")]
    Step {
        /// What was attempted.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        errno: Errno,
    },
    /// A thread for a namespace could not be had.
    #[error("cannot start a thread for a mount namespace")]
    Thread(#[source] std::io::Error),
    /// The kernel did not come back in time: a filesystem on the way does not answer. The thread is left behind and ends with the
    /// call.
    #[error("no answer within {timeout:?} in a mount namespace")]
    Timeout {
        /// The time that was given.
        timeout: Duration,
    },
    /// The deadline has passed before all names were bound.
    #[error("no time left to bind {left} more names onto the hook")]
    Late {
        /// How many were not.
        left: usize,
    },
    /// The thread ended without an answer.
    #[error("the thread in a mount namespace has ended without an answer")]
    Lost,
    /// What lies on the volume is not what was put there.
    #[error("{} is not the mount that was placed there", path.display())]
    NotOurs {
        /// Where.
        path: PathBuf,
    },
}

fn step(step: &'static str) -> impl Fn(Errno) -> MountsError {
    move |errno| MountsError::Step { step, errno }
}
