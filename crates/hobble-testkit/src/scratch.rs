//! Directories for a test, on a filesystem that has a disk below it.
//!
//! Owns the directory of each test. Invariant: it is removed with the guard, or by the reaper.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::statfs;

use crate::reaper::{self, Action, Ticket};

/// `TMPFS_MAGIC` of `linux/magic.h`: neither fsync nor O_DIRECT mean there what they mean on a disk.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `RAMFS_MAGIC` of `linux/magic.h`.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// A directory that is gone with this value, mode 0755 so that targets of any user reach it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    ticket: Option<Ticket>,
}

impl Scratch {
    /// Makes one in `$HOBBLE_TEST_DIR`, or else in `/var/tmp`, which must be backed by a disk.
    ///
    /// # Errors
    /// When that place is in memory only, or cannot be written.
    pub fn new() -> Result<Scratch> {
        let base = std::env::var_os("HOBBLE_TEST_DIR")
            .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let kind = statfs(&base)
            .with_context(|| format!("cannot examine {}", base.display()))?
            .f_type;
        if [TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind) {
            bail!(
                "{} is in memory: set HOBBLE_TEST_DIR to a directory on a disk",
                base.display()
            );
        }
        let directory = tempfile::Builder::new()
            // Short: names of unix sockets, of which suites make some here, end at 108 bytes (unix(7)).
            .prefix("hob-")
            .tempdir_in(&base)
            .with_context(|| format!("cannot make a directory in {}", base.display()))?;
        let path =
            fs::canonicalize(directory.path()).context("cannot resolve the scratch directory")?;
        let ticket = reaper::register(&Action::Remove(&path))?;
        // From here on the reaper or our Drop removes it.
        let _ = directory.keep();
        let scratch = Scratch {
            path,
            ticket: Some(ticket),
        };
        fs::set_permissions(&scratch.path, fs::Permissions::from_mode(0o755))
            .context("cannot open the scratch directory to all")?;
        Ok(scratch)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and returns a sub-directory.
    ///
    /// # Errors
    /// When it exists or cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // On failure the ticket stays open: the reaper tries again once this process is gone.
        match fs::remove_dir_all(&self.path) {
            Ok(()) => {
                if let Some(ticket) = self.ticket.take() {
                    ticket.done();
                }
            }
            Err(error) => eprintln!(
                "warning: cannot remove {} yet: {error}",
                self.path.display()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_goes_with_its_guard() -> Result<()> {
        let scratch = Scratch::new()?;
        let path = scratch.path().to_owned();
        fs::write(scratch.directory("a")?.join("b"), "c")?;
        drop(scratch);
        assert!(!path.exists());
        Ok(())
    }
}
