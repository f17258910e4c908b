//! The archive that a kernel unpacks into its first filesystem: cpio in the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Owns the bytes. Invariant: parents come before what is in them, and the trailer comes last.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

use anyhow::{Context, Result, bail};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive that is being written.
pub(super) struct Archive {
    to: BufWriter<fs::File>,
    inode: u32,
    there: BTreeSet<String>,
}

impl Archive {
    pub(super) fn create(path: &Path) -> Result<Archive> {
        let file =
            fs::File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Archive {
            to: BufWriter::new(file),
            inode: 0,
            there: BTreeSet::new(),
        })
    }

    /// A directory, with its parents; one that is there already is left alone.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        let mut sofar = String::new();
        for part in Path::new(path).components() {
            let Component::Normal(part) = part else {
                continue;
            };
            let part = part.to_str().context("a path is not UTF-8")?;
            if !sofar.is_empty() {
                sofar.push('/');
            }
            sofar.push_str(part);
            if !self.there.contains(&sofar) {
                let name = sofar.clone();
                self.entry(&name, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// A file with these bytes.
    pub(super) fn bytes(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parent(path)?;
        self.entry(path.trim_start_matches('/'), FILE | mode, bytes)
    }

    /// A copy of a file of this machine, with its mode.
    pub(super) fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode = fs::metadata(from)
            .with_context(|| format!("cannot look at {}", from.display()))?
            .permissions()
            .mode();
        self.bytes(path, mode & 0o7777, &bytes)
    }

    pub(super) fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.parent(path)?;
        self.entry(path.trim_start_matches('/'), LINK, to.as_bytes())
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.there.contains(path.trim_start_matches('/'))
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush().context("cannot write the archive")
    }

    fn parent(&mut self, path: &str) -> Result<()> {
        match Path::new(path).parent().and_then(Path::to_str) {
            Some(parent) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        if !self.there.insert(name.to_owned()) {
            bail!("{name} is in the archive twice");
        }
        self.inode += 1;
        let size = u32::try_from(bytes.len()).with_context(|| format!("{name} is too large"))?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long")?;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), size of the name, checksum
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(name);
        header.push('\0');
        let mut put = |bytes: &[u8]| -> Result<()> {
            let padding = bytes.len().next_multiple_of(4) - bytes.len();
            self.to
                .write_all(bytes)
                .and_then(|()| (0..padding).try_for_each(|_| self.to.write_all(b"\0")))
                .context("cannot write the archive")
        };
        put(header.as_bytes())?;
        put(bytes)
    }
}

#[cfg(test)]
mod tests {
    use hobble_testkit::scratch::Scratch;

    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() -> Result<()> {
        let scratch = Scratch::new()?;
        let path = scratch.path().join("archive");
        let mut archive = Archive::create(&path)?;
        archive.bytes("/usr/bin/a", 0o755, b"12345")?;
        archive.link("/bin", "usr/bin")?;
        assert!(archive.contains("/usr/bin/a") && !archive.contains("/usr/bin/b"));
        assert!(archive.link("/bin", "elsewhere").is_err());
        archive.finish()?;
        let bytes = fs::read(&path)?;
        assert_eq!(bytes.len() % 4, 0);
        let mut names = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let from = at + 6 + 8 * n;
                usize::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16)
                    .unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            names.push(String::from_utf8(
                bytes[at + 110..at + 110 + name_size - 1].to_vec(),
            )?);
            at += (110 + name_size).next_multiple_of(4) + size.next_multiple_of(4);
        }
        assert_eq!(names, ["usr", "usr/bin", "usr/bin/a", "bin", "TRAILER!!!"]);
        Ok(())
    }
}
