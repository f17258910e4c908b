//! A private mount namespace for one test.
//!
//! Owns the thread's membership. Invariant: no mount made by the thread or by anything it starts shows up outside the
//! namespace, and the kernel takes all of them down with the last process in it.

use std::fs::File;
use std::marker::PhantomData;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::{need, reaper};

/// The calling thread, and every process that it starts from now on, live in a mount namespace of their own.
///
/// Not `Send`: membership belongs to the thread (unshare(2): CLONE_NEWNS implies CLONE_FS and affects
/// the calling thread alone).
#[derive(Debug)]
pub struct Namespace {
    outside: File,
    thread: PhantomData<*const ()>,
}

impl Namespace {
    /// Leaves the shared namespace. Mounts that were there stay visible; nothing propagates in or out.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn enter() -> Result<Namespace> {
        need::root()?;
        reaper::start()?;
        let outside = File::open("/proc/thread-self/ns/mnt")
            .context("cannot open the current mount namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let namespace = Namespace {
            outside,
            thread: PhantomData,
        };
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .context("cannot make the mounts of the namespace private")?;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The thread may go on to run another test: it must not keep the namespace alive.
        if let Err(error) = setns(&self.outside, CloneFlags::CLONE_NEWNS) {
            eprintln!("warning: cannot return to the shared mount namespace: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, mount};

    #[test]
    fn a_mount_made_inside_is_not_seen_outside() -> Result<()> {
        let scratch = crate::scratch::Scratch::new()?;
        {
            let _namespace = Namespace::enter()?;
            mount("none", scratch.path(), "tmpfs", MountFlags::empty(), None)?;
            std::fs::write(scratch.path().join("inside"), "")?;
        }
        assert!(!scratch.path().join("inside").exists());
        Ok(())
    }
}
