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
use super::error::unreachable_memory;
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
        unreachable_memory(self.pid, address, errno)
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
        let Err(refused) = written else {
            return Ok(());
        };
        // A poke into a thread that does not stand still fails with ESRCH, as into one that is gone: tell what came first.
        self.poke(address, bytes)
            .map_err(|_| self.error(address, refused))
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ids::ProcessId;
    use crate::stop::{Deadline, StopError, Tracer};

    #[test]
    fn every_way_of_writing_reaches_memory_that_the_program_may_not_write() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(Pid::new(child.id().cast_signed()).unwrap()).unwrap();
        let result = Tracer::scope(|tracer| -> Result<(), StopError> {
            let stopped = tracer.stop_all(&[id], Deadline::after(Duration::from_secs(5)))?;
            let vdso = crate::proc::maps::of_process(id.pid).unwrap();
            let vdso = vdso.iter().find(|e| e.name == b"[vdso]").unwrap();
            // The last bytes of the vDSO's last page are padding.
            let at = vdso.end - 64;
            let mut memory = Memory::new(id.pid, id.pid.leader());
            let read = |memory: &mut Memory| {
                let mut bytes = [0; 32];
                memory.read(at, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(read(&mut memory), [0; 32]);
            let text: [u8; 21] = std::array::from_fn(|i| i as u8 + 1);
            memory.poke(at, &text).unwrap();
            assert_eq!(read(&mut memory)[..21], text);
            assert_eq!(
                read(&mut memory)[21..],
                [0; 11],
                "bytes behind a partial word are kept"
            );
            memory.force(at, &[0; 32]).unwrap();
            assert_eq!(read(&mut memory), [0; 32]);
            assert!(matches!(
                memory.write(16, &text),
                Err(RemoteError::Memory { address: 16, .. })
            ));
            drop(stopped);
            Ok(())
        });
        child.kill().unwrap();
        child.wait().unwrap();
        result.unwrap();
    }
}
