//! Working and root directories.

use std::ffi::CString;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::facts;
use super::{CensusError, Directory, Member, Volume};
use crate::proc::ProcError;

/// Looks at a directory that its program changes as fast as we look, before the name it has at the moment is taken.
const LOOKS: usize = 16;

/// Looks at `name` (`cwd` or `root`) of a thread. Says whether it is another than `before`, which is used again if it is not.
pub(super) fn look(
    member: Member,
    name: &str,
    before: Option<Directory>,
    volume: Volume<'_>,
) -> Result<(Option<Directory>, bool), CensusError> {
    let Member { pid, tid } = member;
    let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/{name}"));
    let c_path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap_or_default();
    let error = |errno: Errno| match errno {
        Errno::NOENT | Errno::SRCH => CensusError::Proc(ProcError::Gone { path: path.clone() }),
        errno => CensusError::from_errno(&path, pid, errno),
    };
    let cwd = CWD.as_fd();
    // What is opened cannot change any more, so it is described from the descriptor and not from the link; the link only gives
    // it a name, and is read again when the directory is renamed or exchanged in between.
    for look in 0.. {
        let link = facts::link(cwd, &c_path, Vec::new()).map_err(error)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let kept = rustix::fs::open(&path, flags, Mode::empty()).map_err(error)?;
        let attributes = facts::of_descriptor(&kept).map_err(error)?;
        if look < LOOKS && facts::link(cwd, &c_path, Vec::new()).map_err(error)? != link {
            continue;
        }
        let facts = facts::assemble(pid, &link, attributes, true);
        if !volume(&facts) {
            return Ok((None, before.is_some()));
        }
        return Ok(match before {
            Some(before) if before.facts == facts => (Some(before), false),
            _ => (Some(Directory { facts, kept }), true),
        });
    }
    Ok((before, false))
}
