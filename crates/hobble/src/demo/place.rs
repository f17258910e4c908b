//! Where the demo puts its database: on a disk, if there is one, for on a filesystem in memory a sync costs nothing and the
//! native figures would flatter.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::descriptors::filesystem_of;

/// Filesystems on which a sync waits for no disk.
const WITHOUT_DISK: [&str; 4] = ["tmpfs", "ramfs", "devtmpfs", "rootfs"];

/// The fresh directory of the demo; removed when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    directory: tempfile::TempDir,
    /// The kind of filesystem it lies on.
    pub(crate) filesystem: String,
}

impl Place {
    /// Makes a fresh directory in `wanted`, or in the best of the usual places.
    pub(crate) fn find(wanted: Option<&Path>) -> anyhow::Result<Self> {
        match wanted {
            Some(parent) => Self::inside(parent),
            None => Self::best_of(&usual_places()),
        }
    }

    fn best_of(parents: &[PathBuf]) -> anyhow::Result<Self> {
        let mut second_best = None;
        let mut last_error = None;
        for parent in parents {
            match Self::inside(parent) {
                Ok(place) if place.is_disk() && !place.is_fuse() => return Ok(place),
                Ok(place) => second_best = second_best.or(Some(place)),
                Err(error) => last_error = Some(error),
            }
        }
        match (second_best, last_error) {
            (Some(place), _) => Ok(place),
            (None, Some(error)) => {
                Err(error.context("no usual place for temporary files can be used"))
            }
            (None, None) => anyhow::bail!("no place to look for"),
        }
    }

    fn inside(parent: &Path) -> anyhow::Result<Self> {
        let parent =
            std::fs::canonicalize(parent).with_context(|| format!("find {}", parent.display()))?;
        let directory = tempfile::Builder::new()
            .prefix("hobble-demo-")
            .tempdir_in(&parent)
            .with_context(|| format!("make a directory in {}", parent.display()))?;
        let filesystem = filesystem_of(directory.path())?;
        Ok(Self {
            directory,
            filesystem,
        })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Whether a sync there waits for a disk, as far as the kind of filesystem tells.
    pub(crate) fn is_disk(&self) -> bool {
        !WITHOUT_DISK.contains(&self.filesystem.as_str())
    }

    fn is_fuse(&self) -> bool {
        self.filesystem.starts_with("fuse")
    }

    /// Leaves the directory behind for somebody to look at.
    pub(crate) fn keep(self) -> PathBuf {
        self.directory.keep()
    }

    /// Removes the directory and everything in it.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        let path = self.directory.path().to_owned();
        self.directory
            .close()
            .with_context(|| format!("remove {}", path.display()))
    }
}

fn usual_places() -> Vec<PathBuf> {
    let mut places = vec![
        PathBuf::from("/var/tmp"),
        PathBuf::from("."),
        PathBuf::from("/tmp"),
    ];
    if let Some(wanted) = std::env::var_os("TMPDIR").filter(|value| !value.is_empty()) {
        places.insert(0, PathBuf::from(wanted));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_usable_place_is_taken_and_left_without_a_trace() {
        let parent = tempfile::tempdir().unwrap();
        let places = [PathBuf::from("/nonexistent"), parent.path().to_owned()];
        let place = Place::best_of(&places).unwrap();
        assert!(
            place
                .path()
                .starts_with(std::fs::canonicalize(parent.path()).unwrap())
        );
        let path = place.path().to_owned();
        place.remove().unwrap();
        assert!(!path.exists());
        let error = Place::best_of(&places[..1]).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent"), "{error:#}");
    }
}
