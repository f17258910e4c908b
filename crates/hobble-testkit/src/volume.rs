//! Filesystems for a test: ext4, xfs and btrfs on loop devices, tmpfs, overlayfs, plain directories.
//!
//! Owns image, loop device and mount of each volume. Invariant: the loop device carries the autoclear flag
//! (`mount -o loop`), so it detaches itself with its last mount, which the private namespace bounds.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command;
use crate::leak::GRACE;
use crate::namespace::Namespace;
use crate::scratch::Scratch;

/// Making and mounting a filesystem of this size takes well under a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Kinds of backing filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4 on a loop device.
    Ext4,
    /// xfs on a loop device.
    Xfs,
    /// btrfs on a loop device.
    Btrfs,
    /// tmpfs.
    Tmpfs,
    /// overlayfs whose layers lie on ext4 on a loop device.
    Overlay,
    /// A directory of the disk that holds the scratch directories.
    Directory,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 6] = [
        Kind::Ext4,
        Kind::Xfs,
        Kind::Btrfs,
        Kind::Tmpfs,
        Kind::Overlay,
        Kind::Directory,
    ];

    /// The name as in `/proc/filesystems`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
            Kind::Tmpfs => "tmpfs",
            Kind::Overlay => "overlay",
            Kind::Directory => "directory",
        }
    }
}

/// A mounted filesystem that is gone with this value.
#[derive(Debug)]
pub struct Volume<'n> {
    scratch: Scratch,
    root: PathBuf,
    kind: Kind,
    mounts: Vec<PathBuf>,
    _namespace: &'n Namespace,
}

impl<'n> Volume<'n> {
    /// Makes and mounts a filesystem of 1 GiB (sparse; tmpfs: at most that much memory).
    ///
    /// # Errors
    /// When a tool is missing or the kernel lacks the filesystem.
    pub fn new(namespace: &'n Namespace, kind: Kind) -> Result<Volume<'n>> {
        Volume::sized(namespace, kind, 1 << 30)
    }

    /// As [`Volume::new`] with `bytes` of room. xfs takes at least 300 MiB, btrfs 110 MiB.
    ///
    /// # Errors
    /// When a tool is missing or the kernel lacks the filesystem.
    pub fn sized(namespace: &'n Namespace, kind: Kind, bytes: u64) -> Result<Volume<'n>> {
        let scratch = Scratch::new()?;
        let root = scratch.directory("v")?;
        let mut volume = Volume {
            scratch,
            root: root.clone(),
            kind,
            mounts: Vec::new(),
            _namespace: namespace,
        };
        match kind {
            Kind::Directory => {}
            Kind::Tmpfs => volume.mount(&root, "tmpfs", "tmpfs", &format!("size={bytes}"))?,
            Kind::Ext4 => volume.mount_image(&root, "ext4", &["-q", "-F"], bytes)?,
            Kind::Xfs => volume.mount_image(&root, "xfs", &["-q", "-f"], bytes)?,
            Kind::Btrfs => volume.mount_image(&root, "btrfs", &["-q", "-f"], bytes)?,
            Kind::Overlay => {
                let layers = volume.scratch.directory("layers")?;
                volume.mount_image(&layers, "ext4", &["-q", "-F"], bytes)?;
                for layer in ["lower", "upper", "work"] {
                    fs::create_dir(layers.join(layer)).context("cannot make an overlay layer")?;
                }
                let at = layers.display();
                volume.mount(
                    &root,
                    "overlay",
                    "overlay",
                    &format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work"),
                )?;
            }
        }
        fs::set_permissions(&volume.root, fs::Permissions::from_mode(0o755))
            .context("cannot open the volume to all")?;
        Ok(volume)
    }

    /// Where it is mounted: always below a directory that is not part of it.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Makes and returns a directory in it.
    ///
    /// # Errors
    /// When it exists or cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    fn mount_image(&mut self, at: &Path, kind: &str, options: &[&str], bytes: u64) -> Result<()> {
        let image = self.scratch.path().join("image");
        File::create_new(&image)
            .and_then(|file| file.set_len(bytes))
            .context("cannot make the image of a filesystem")?;
        let mkfs = command::find(&format!("mkfs.{kind}"))
            .with_context(|| format!("no mkfs.{kind}: run `cargo xtask setup`"))?;
        command::run(Command::new(mkfs).args(options).arg(&image), LIMIT)?;
        let source = image.to_str().context("the image's path is not UTF-8")?;
        self.mount(at, kind, source, "loop")
    }

    fn mount(&mut self, at: &Path, kind: &str, source: &str, options: &str) -> Result<()> {
        command::run(
            Command::new("mount")
                .args(["-t", kind, "-o", options, source])
                .arg(at),
            LIMIT,
        )?;
        self.mounts.push(at.to_owned());
        Ok(())
    }

    /// Unmounts and says whether that was possible without force: a file that stays open on it is an error here.
    ///
    /// # Errors
    /// When something still uses it. It is then detached lazily all the same.
    pub fn close(mut self) -> Result<()> {
        let mut busy = Vec::new();
        while let Some(mount) = self.mounts.pop() {
            let unmount = || command::run(Command::new("umount").arg(&mount), LIMIT);
            let given_up = Instant::now() + GRACE;
            let mut done = unmount();
            // A process that was killed, and what it had forked, lets go in its own time.
            while done.is_err() && Instant::now() < given_up {
                std::thread::sleep(Duration::from_millis(50));
                done = unmount();
            }
            if let Err(error) = done {
                busy.push(error.to_string());
                command::run(Command::new("umount").arg("-l").arg(&mount), LIMIT)?;
            }
        }
        if !busy.is_empty() {
            bail!("the volume was in use at its end: {}", busy.join("; "));
        }
        Ok(())
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        while let Some(mount) = self.mounts.pop() {
            // Lazily: a failing test may leave users behind, and the namespace ends them.
            if let Err(error) = command::run(Command::new("umount").arg("-l").arg(&mount), LIMIT) {
                eprintln!("warning: cannot unmount {}: {error}", mount.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loops_of(image: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = entry.path().join("loop/backing_file");
            if fs::read_to_string(file).is_ok_and(|text| text.trim_end() == image.to_str().unwrap())
            {
                found.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        found
    }

    #[test]
    fn every_kind_mounts_writes_and_goes() -> Result<()> {
        let namespace = Namespace::enter()?;
        for kind in Kind::ALL {
            let volume = Volume::sized(&namespace, kind, 512 << 20).with_context(|| kind.name())?;
            fs::write(volume.path().join("file"), kind.name())?;
            let image = volume.scratch.path().join("image");
            let looped = matches!(kind, Kind::Ext4 | Kind::Xfs | Kind::Btrfs | Kind::Overlay);
            assert_eq!(
                loops_of(&image).len(),
                usize::from(looped),
                "{}",
                kind.name()
            );
            volume.close()?;
            assert_eq!(loops_of(&image), Vec::<String>::new(), "{}", kind.name());
        }
        Ok(())
    }
}
