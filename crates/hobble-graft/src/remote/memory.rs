//! Reading and writing the memory of a process that stands still.
//!
//! Owns the choice of the way: `process_vm_readv`/`process_vm_writev`, which respect page protections; where a seccomp filter or
//! a security module of *ours* forbids those, or the page is not writable to the program, `/proc/<pid>/mem`, which a tracer may always use; where
//! that is forbidden too (`proc_mem.force_override=never`), `PTRACE_POKEDATA`. Invariant: all of the bytes or an error.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use rustix::io::Errno;

use super::RemoteError;
use crate::ids::{Pid, Tid};
use crate::stop::sys;

/// The memory of one process.
#[derive(Debug)]
pub(crate) struct Memory {
    pid: Pid,
    tid: Tid,
    file: Option<File>,
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Memory {
    /// Through a thread that stands still.
    pub(crate) fn new(pid: Pid, tid: Tid) -> Self {
        Self {
            pid,
            tid,
            file: None,
        }
    }

    fn file(&mut self) -> Result<&File, Errno> {
        if self.file.is_none() {
            let path = PathBuf::from(format!("/proc/{}/task/{}/mem", self.pid, self.tid));
            let file = File::options()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| errno(&e))?;
            self.file = Some(file);
        }
        self.file.as_ref().ok_or(Errno::BADF)
    }

    fn error(&self, address: u64, errno: Errno) -> RemoteError {
        if errno == Errno::SRCH {
            RemoteError::Gone { pid: self.pid }
        } else {
            RemoteError::Memory {
                pid: self.pid,
                address,
                errno,
            }
        }
    }

    /// Fills `bytes` from `address`.
    pub(crate) fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), RemoteError> {
        let remote = [RemoteIoVec {
            base: address as usize,
            len: bytes.len(),
        }];
        let pid = nix::unistd::Pid::from_raw(self.tid.as_raw());
        if process_vm_readv(pid, &mut [IoSliceMut::new(bytes)], &remote) == Ok(bytes.len()) {
            return Ok(());
        }
        let result = self
            .file()
            .and_then(|file| file.read_exact_at(bytes, address).map_err(|e| errno(&e)));
        result.map_err(|errno| self.error(address, errno))
    }

    /// Writes to memory that the program itself may write.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), RemoteError> {
        let remote = [RemoteIoVec {
            base: address as usize,
            len: bytes.len(),
        }];
        let pid = nix::unistd::Pid::from_raw(self.tid.as_raw());
        if process_vm_writev(pid, &[IoSlice::new(bytes)], &remote) == Ok(bytes.len()) {
            return Ok(());
        }
        self.force(address, bytes)
    }

    /// Writes whatever the protection of the page: a private mapping gets a page of its own (`FOLL_FORCE`, mm/gup.c).
    pub(crate) fn force(&mut self, address: u64, bytes: &[u8]) -> Result<(), RemoteError> {
        let written = self
            .file()
            .and_then(|file| file.write_all_at(bytes, address).map_err(|e| errno(&e)));
        if written.is_ok() {
            return Ok(());
        }
        self.poke(address, bytes)
            .map_err(|errno| self.error(address, errno))
    }

    /// Word by word; a last partial word keeps the bytes behind it.
    fn poke(&mut self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let at = address + 8 * index as u64;
            let mut word = [0; 8];
            if chunk.len() < word.len() {
                let file = self.file()?;
                file.read_exact_at(&mut word, at).map_err(|e| errno(&e))?;
            }
            for (slot, byte) in word.iter_mut().zip(chunk) {
                *slot = *byte;
            }
            sys::poke(self.tid, at, u64::from_le_bytes(word))?;
        }
        Ok(())
    }

    /// A 64-bit number.
    pub(crate) fn read_u64(&mut self, address: u64) -> Result<u64, RemoteError> {
        let mut word = [0; 8];
        self.read(address, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}
