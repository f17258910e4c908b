//! The directory under which every attachment keeps its journal, socket and log.
//!
//! Invariant: nothing in it is trusted before it has been opened without following links and found to be a directory or regular file
//! of root's that nobody else can write. Layout: `<state dir>/<id>/{journal,ledger,control.sock,log}`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::StateError;

/// Where attachments live unless the caller says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/run/hobble";

/// A checked state directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
}

/// The directory of one attachment.
#[derive(Debug, Clone)]
pub(crate) struct AttachmentDir {
    path: PathBuf,
    id: String,
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { op, path, source }
}

fn check_private_dir(path: &Path) -> Result<(), StateError> {
    let meta = fs::symlink_metadata(path).map_err(io_error("stat", path))?;
    let refuse = |problem: String| StateError::Unsafe {
        path: path.to_owned(),
        problem,
    };
    if !meta.is_dir() {
        return Err(refuse("is not a directory".into()));
    }
    if meta.uid() != 0 {
        return Err(refuse(format!(
            "belongs to uid {}, not to root",
            meta.uid()
        )));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(refuse(format!(
            "can be written by others (mode {:04o})",
            meta.mode() & 0o7777
        )));
    }
    Ok(())
}

/// Whether `id` is shaped like an attachment's id: what is read back from a directory listing or typed by a user.
#[must_use]
pub(crate) fn is_id(id: &str) -> bool {
    (4..=32).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

impl StateDir {
    /// Opens the directory; with `create`, makes it (0700) when it is missing.
    pub(crate) fn open(path: &Path, create: bool) -> Result<Self, StateError> {
        if create {
            match fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(path)
            {
                Ok(()) => {}
                Err(error) => return Err(io_error("create", path)(error)),
            }
        }
        check_private_dir(path)?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Makes the directory of a new attachment.
    pub(crate) fn create(&self, id: &str) -> Result<AttachmentDir, StateError> {
        let path = self.path.join(id);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io_error("create", &path))?;
        Ok(AttachmentDir {
            path,
            id: id.to_owned(),
        })
    }

    /// The directory of an attachment that exists.
    pub(crate) fn attachment(&self, id: &str) -> Result<AttachmentDir, StateError> {
        let path = self.path.join(id);
        if !is_id(id) {
            return Err(StateError::Unsafe {
                path,
                problem: "is not named like an attachment".into(),
            });
        }
        check_private_dir(&path)?;
        Ok(AttachmentDir {
            path,
            id: id.to_owned(),
        })
    }

    /// The ids of all attachments, sorted; what is not named like one is passed over.
    pub(crate) fn ids(&self) -> Result<Vec<String>, StateError> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("list", &self.path))? {
            let entry = entry.map_err(io_error("list", &self.path))?;
            if let Some(name) = entry.file_name().to_str()
                && is_id(name)
            {
                ids.push(name.to_owned());
            }
        }
        ids.sort();
        Ok(ids)
    }
}

impl AttachmentDir {
    /// The attachment's id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    /// What is known of single descriptors.
    pub(crate) fn ledger(&self) -> PathBuf {
        self.path.join("ledger")
    }

    /// The log of holder and server.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Opens a file of ours: no link, root's, not writable by others.
    pub(crate) fn open_own(&self, path: &Path, how: OFlags) -> Result<fs::File, StateError> {
        let fd: OwnedFd = rustix::fs::open(
            path,
            how | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        )
        .map_err(|e| io_error("open", path)(e.into()))?;
        let file = fs::File::from(fd);
        let meta = file.metadata().map_err(io_error("stat", path))?;
        if !meta.is_file() || meta.uid() != 0 || meta.mode() & 0o022 != 0 {
            return Err(StateError::Unsafe {
                path: path.to_owned(),
                problem: format!(
                    "is not a regular file of root's that only root can write (uid {}, mode {:06o})",
                    meta.uid(),
                    meta.mode()
                ),
            });
        }
        Ok(file)
    }

    /// Creates a file of ours, to be appended to or to be written anywhere; it must not exist.
    pub(crate) fn create_own(&self, path: &Path, append: bool) -> Result<fs::File, StateError> {
        fs::OpenOptions::new()
            .read(true)
            .append(append)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io_error("create", path))
    }

    /// Removes the attachment's directory with everything that is ours in it.
    pub(crate) fn remove(&self) -> Result<(), StateError> {
        for file in [self.socket(), self.journal(), self.ledger(), self.log()] {
            match fs::remove_file(&file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("remove", &file)(error)),
            }
        }
        match fs::remove_dir(&self.path) {
            Ok(()) => Ok(()),
            // The server, its successor and `hobble recover` may all come to the end at the same time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &self.path)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir().expect("temporary directory")
    }

    #[test]
    fn refuses_a_link_a_foreign_mode_and_a_file() {
        let dir = scratch();
        let real = dir.path().join("real");
        StateDir::open(&real, true).expect("fresh directory");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).expect("symlink");
        assert!(matches!(
            StateDir::open(&link, false),
            Err(StateError::Unsafe { .. })
        ));
        fs::set_permissions(&real, fs::Permissions::from_mode(0o777)).expect("chmod");
        assert!(matches!(
            StateDir::open(&real, false),
            Err(StateError::Unsafe { .. })
        ));
        let file = dir.path().join("file");
        fs::write(&file, b"").expect("write");
        assert!(matches!(
            StateDir::open(&file, false),
            Err(StateError::Unsafe { .. })
        ));
    }

    #[test]
    fn ids_are_checked_both_ways() {
        let dir = scratch();
        let state = StateDir::open(dir.path(), true).expect("state directory");
        state.create("pg-1a2b").expect("attachment");
        fs::create_dir(dir.path().join("Not An Id")).expect("mkdir");
        assert_eq!(state.ids().expect("ids"), ["pg-1a2b"]);
        assert!(state.attachment("../etc").is_err());
        assert!(state.attachment("pg-1a2b").is_ok());
    }

    #[test]
    fn own_files_are_not_opened_through_links() {
        let dir = scratch();
        let state = StateDir::open(dir.path(), true).expect("state directory");
        let attachment = state.create("abcd").expect("attachment");
        std::os::unix::fs::symlink("/etc/passwd", attachment.journal()).expect("symlink");
        assert!(
            attachment
                .open_own(&attachment.journal(), OFlags::RDONLY)
                .is_err()
        );
    }
}
