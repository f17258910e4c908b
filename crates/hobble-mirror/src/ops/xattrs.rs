//! Extended attributes, POSIX ACLs among them.
//!
//! The kernel has checked the caller's right to each (`xattr_permission`, fs/xattr.c); what a filesystem derives from the caller by itself (the fate of
//! set-group-id when an ACL is set) follows from the identity the operation is done under.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use hobble_fuse::{Caller, NodeId, Reply};
use rustix::fs::XattrFlags;

use super::names::if_done;
use super::{act_as, error, fail, finish, setid_by, setid_of};
use crate::fd::ProcName;
use crate::mirror::Inner;

/// Largest attribute and longest list there can be (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX` in include/uapi/linux/limits.h).
const LARGEST: usize = 65_536;

impl Inner {
    fn with_name<T>(&self, id: NodeId, work: impl FnOnce(&CStr) -> io::Result<T>) -> io::Result<T> {
        let fd = self.fd_of(&self.node(id)?)?;
        work(ProcName::new(fd.as_fd()).as_c_str())
    }

    pub(crate) fn setxattr(
        &self,
        id: NodeId,
        name: &CStr,
        value: &[u8],
        (flags, acl_kill_sgid): (XattrFlags, bool),
        caller: Caller,
        reply: Reply,
    ) {
        let set = self.with_name(id, |path| {
            let is_acl = name.to_bytes().starts_with(b"system.posix_acl_");
            // With an ACL the kernel says whether set-group-id goes (FUSE_SETXATTR_ACL_KILL_SGID).
            let setid = if is_acl {
                setid_by(acl_kill_sgid)
            } else {
                setid_of(caller)
            };
            let _as_caller = act_as(caller, setid)?;
            rustix::fs::setxattr(path, name, value, flags)
                .or_else(|errno| if_done(&reply, errno.into(), libc::EEXIST))
        });
        finish(reply, set);
    }

    pub(crate) fn removexattr(&self, id: NodeId, name: &CStr, caller: Caller, reply: Reply) {
        let removed = self.with_name(id, |path| {
            let _as_caller = act_as(caller, setid_of(caller))?;
            rustix::fs::removexattr(path, name)
                .or_else(|errno| if_done(&reply, errno.into(), libc::ENODATA))
        });
        finish(reply, removed);
    }

    pub(crate) fn getxattr(&self, id: NodeId, name: &CStr, size: u32, reply: Reply) {
        let mut buffer = vec![0; usize::try_from(size).unwrap_or(LARGEST).min(LARGEST)];
        let got = self.with_name(id, |path| match size {
            0 => Ok(rustix::fs::getxattr_query(path, name)?),
            _ => Ok(rustix::fs::getxattr(path, name, buffer.as_mut_slice())?),
        });
        answer(got.map(|len| (len, buffer)), size, reply);
    }

    pub(crate) fn listxattr(&self, id: NodeId, size: u32, caller: Caller, reply: Reply) {
        let listed = self.with_name(id, |path| {
            let mut names = vec![0; LARGEST];
            let len = rustix::fs::listxattr(path, names.as_mut_slice())?;
            names.truncate(len);
            if caller.uid != 0 {
                // Filesystems hide these from callers without CAP_SYS_ADMIN, which the server has (ext4_xattr_trusted_list, fs/ext4/xattr_trusted.c).
                let visible = names
                    .split_inclusive(|byte| *byte == 0)
                    .filter(|name| !name.starts_with(b"trusted."));
                names = visible.flatten().copied().collect();
            }
            match usize::try_from(size).unwrap_or(LARGEST) {
                room if room != 0 && names.len() > room => Err(error(libc::ERANGE)),
                _ => Ok((names.len(), names)),
            }
        });
        answer(listed, size, reply);
    }
}

fn answer(got: io::Result<(usize, Vec<u8>)>, size: u32, reply: Reply) {
    match got {
        Ok((len, _)) if size == 0 => {
            reply.xattr_size(u32::try_from(len).unwrap_or(u32::MAX));
        }
        Ok((len, buffer)) => {
            reply.xattr_data(buffer.get(..len).unwrap_or_default());
        }
        Err(error) => fail(reply, &error),
    }
}
