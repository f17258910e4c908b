//! A directory with a second way to it: a clone of its mount that is attached nowhere. A file opened through one or the other is the same
//! inode with another mount, so that what was moved can be told from what was not, and both show the same data.

#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use hobble_graft::census::{self, Census, Description, FileFacts};
use hobble_graft::ids::ProcessId;
use rustix::fs::{CWD, Mode, OFlags, StatxFlags};
use rustix::mount::OpenTreeFlags;

pub struct Volume {
    path: PathBuf,
    /// Removed with the value.
    directory: Option<tempfile::TempDir>,
    clone: OwnedFd,
    mounts: [u64; 2],
}

/// Which way to the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Native,
    Clone,
}

impl Volume {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        Self {
            directory: Some(directory),
            ..Self::at(&path)
        }
    }

    /// A directory that is there already, and stays.
    pub fn at(path: &Path) -> Self {
        let clone = rustix::mount::open_tree(
            CWD,
            path,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .expect("open_tree needs CAP_SYS_ADMIN: run the tests as root");
        Self::with_other_way(path, clone)
    }

    /// The other way is this mount.
    pub fn with_other_way(path: &Path, clone: OwnedFd) -> Self {
        let native = rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap();
        let mount = |fd: &OwnedFd| {
            let flags = rustix::fs::AtFlags::EMPTY_PATH;
            rustix::fs::statx(fd, "", flags, StatxFlags::MNT_ID)
                .unwrap()
                .stx_mnt_id
        };
        let mounts = [mount(&native), mount(&clone)];
        assert_ne!(mounts[0], mounts[1]);
        Self {
            path: path.to_owned(),
            directory: None,
            clone,
            mounts,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn inodes(&self) -> BTreeSet<u64> {
        let mut inodes = BTreeSet::from([self.path().metadata().unwrap().ino()]);
        let mut stack = vec![self.path().to_owned()];
        while let Some(directory) = stack.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                inodes.insert(metadata.ino());
                if metadata.is_dir() {
                    stack.push(entry.path());
                }
            }
        }
        inodes
    }

    /// What `processes` hold of the directory, through either way.
    pub fn census(&self, processes: &[ProcessId]) -> Census {
        let inodes = self.inodes();
        census::take(processes, &|facts: &FileFacts| {
            inodes.contains(&facts.inode)
        })
        .unwrap()
    }

    /// The same once more.
    pub fn rescan(&self, census: &mut Census, processes: &[ProcessId]) {
        let inodes = self.inodes();
        census
            .rescan(processes, &|facts: &FileFacts| {
                inodes.contains(&facts.inode)
            })
            .unwrap();
    }

    pub fn side_of(&self, facts: &FileFacts) -> Side {
        match self.mounts.iter().position(|m| *m == facts.mount.0) {
            Some(0) => Side::Native,
            Some(1) => Side::Clone,
            _ => panic!("{facts:?} is on neither mount"),
        }
    }

    /// A file of the directory by its inode's name, opened through one of the ways.
    pub fn open(&self, name: &Path, flags: OFlags, side: Side) -> OwnedFd {
        let root;
        let directory = match side {
            Side::Clone => self.clone.as_fd(),
            Side::Native => {
                root = rustix::fs::open(self.path(), OFlags::PATH, Mode::empty()).unwrap();
                root.as_fd()
            }
        };
        rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// The place of a file below the directory, from what the kernel says its path is.
    pub fn relative(&self, facts: &FileFacts) -> PathBuf {
        match facts.path.strip_prefix(self.path()) {
            Ok(path) if path.as_os_str().is_empty() => PathBuf::from("."),
            Ok(path) => path.to_owned(),
            // Paths of a mount that is attached nowhere begin at its root.
            Err(_) => match facts.path.strip_prefix("/") {
                Ok(path) if path.as_os_str().is_empty() => PathBuf::from("."),
                Ok(path) => path.to_owned(),
                Err(_) => panic!("{facts:?} has no absolute path"),
            },
        }
    }

    /// The same file through the other way, with the same access.
    pub fn stand_in(&self, description: &Description, side: Side) -> OwnedFd {
        let access = OFlags::from_bits_retain(description.flags.0)
            & (OFlags::ACCMODE | OFlags::DIRECTORY | OFlags::PATH);
        self.open(&self.relative(&description.facts), access, side)
    }
}
