//! Debian's kernel packages: found and fetched through apt by name, unpacked beside the build.
//!
//! Owns `<target dir>/kernels`. Invariant: what is unpacked there is complete (it appears by rename), and is not fetched again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hobble_testkit::command;
use hobble_testkit::program::target_directory;

/// A hundred megabytes over a slow link.
const FETCH_LIMIT: Duration = Duration::from_secs(600);

/// A kernel with its modules.
pub(super) struct Package {
    /// As `uname -r` says there.
    pub(super) release: String,
    /// The kernel proper.
    pub(super) image: PathBuf,
    modules: PathBuf,
}

/// The newest kernel of a series for machines without hardware of their own, whose package is the smallest.
///
/// # Errors
/// When apt offers none, or it cannot be fetched.
pub(super) fn fetch(series: &str) -> Result<Package> {
    let apt_cache = command::find("apt-cache").context("no apt-cache")?;
    let pattern = format!("^linux-image-{}[.]", series.replace('.', "[.]"));
    let search = || {
        command::run(
            Command::new(&apt_cache).args(["search", "--names-only", &pattern]),
            FETCH_LIMIT,
        )
        .map(|said| newest(&said))
    };
    let mut name = search()?;
    if name.is_none() {
        // The lists may never have been fetched on a new machine.
        crate::setup::apt_get(&["update", "-qq"])?;
        name = search()?;
    }
    let name = name.with_context(|| {
        format!("apt offers no linux-image-{series}.*-cloud-amd64: Debian 12 with its security archive does")
    })?;
    let release = name.trim_start_matches("linux-image-").to_owned();
    let home = target_directory().join("kernels");
    let at = home.join(&name);
    if !at.exists() {
        println!("kernels: fetching {name}");
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let draft = home.join(format!("{name}.draft"));
        match fs::remove_dir_all(&draft) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", draft.display()));
            }
            _ => {}
        }
        fs::create_dir(&draft).context("cannot make a directory for a kernel")?;
        let apt = command::find("apt-get").context("no apt-get")?;
        command::run(
            Command::new(apt)
                .args(["download", "-qq", &name])
                .current_dir(&draft),
            FETCH_LIMIT,
        )?;
        let archive = fs::read_dir(&draft)
            .context("cannot list what was fetched")?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
            .with_context(|| format!("apt-get brought no package of {name}"))?;
        let unpack = command::find("dpkg-deb").context("no dpkg-deb")?;
        command::run(
            Command::new(unpack).arg("-x").arg(&archive).arg(&draft),
            FETCH_LIMIT,
        )?;
        fs::remove_file(&archive).context("cannot remove a package")?;
        fs::rename(&draft, &at).context("cannot put a kernel in place")?;
    }
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|directory| at.join(directory).join(&release))
        .into_iter()
        .find(|path| path.is_dir())
        .with_context(|| format!("{name} has no modules"))?;
    Ok(Package {
        image: at.join("boot").join(format!("vmlinuz-{release}")),
        release,
        modules,
    })
}

/// The newest package among the lines of `apt-cache search`.
fn newest(said: &str) -> Option<String> {
    said.lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .filter(|name| name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// Every number in a name, in order: enough to compare versions of one series.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|each: char| !each.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

impl Package {
    /// The objects of `wanted` and of what they need, in the order in which they are to be loaded; what is built in is left out.
    ///
    /// # Errors
    /// When there is no such module.
    pub(super) fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let built_in = fs::read_to_string(self.modules.join("modules.builtin"))
            .context("cannot read the list of what is built in")?;
        let order = fs::read_to_string(self.modules.join("modules.order"))
            .context("cannot read the list of modules")?;
        let mut found = Vec::new();
        let mut seen: BTreeSet<String> = built_in.lines().map(module_name).collect();
        for name in wanted {
            self.add(name, &order, &mut seen, &mut found)?;
        }
        Ok(found)
    }

    fn add(
        &self,
        name: &str,
        order: &str,
        seen: &mut BTreeSet<String>,
        found: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        let path = order
            .lines()
            .find(|line| module_name(line) == name)
            .with_context(|| format!("Linux {} has no module {name}", self.release))?;
        let object = self.object(&path.replace(".o", ".ko").replace(".kko", ".ko"))?;
        for needed in needs(&object) {
            self.add(&needed, order, seen, found)?;
        }
        found.push((name, object));
        Ok(())
    }

    /// The bytes of a module, unpacked.
    fn object(&self, path: &str) -> Result<Vec<u8>> {
        let plain = self.modules.join(path);
        if plain.exists() {
            return fs::read(&plain).with_context(|| format!("cannot read {}", plain.display()));
        }
        let packed = PathBuf::from(format!("{}.xz", plain.display()));
        unpack(&packed)
    }
}

fn unpack(packed: &Path) -> Result<Vec<u8>> {
    let xz = command::find("xz").context("no xz")?;
    let said = command::output(Command::new(xz).arg("-dc").arg(packed), FETCH_LIMIT)?;
    if !said.status.success() {
        bail!("{} cannot be unpacked", packed.display());
    }
    Ok(said.stdout)
}

/// `kernel/fs/fuse/fuse.ko` and `kernel/fs/fuse/fuse.o` are `fuse`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// What a module says of itself in its section `.modinfo`: `depends=` and names with commas between them.
fn needs(object: &[u8]) -> Vec<String> {
    let mark = b"\0depends=";
    let Some(start) = object
        .windows(mark.len())
        .position(|window| window == mark)
        .map(|at| at + mark.len())
    else {
        return Vec::new();
    };
    let text: Vec<u8> = object
        .iter()
        .skip(start)
        .take_while(|byte| **byte != 0)
        .copied()
        .collect();
    String::from_utf8_lossy(&text)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_found_by_its_numbers() {
        let said = "linux-image-6.1.0-9-cloud-amd64 - Linux\nlinux-image-6.1.0-56-cloud-amd64 - Linux\n\
                    linux-image-6.1.0-57-amd64 - Linux\nlinux-image-6.1.0-58-cloud-amd64-unsigned - Linux\n";
        assert_eq!(
            newest(said).as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(newest(""), None);
    }

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(needs(b"x\0depends=jbd2,mbcache\0y"), ["jbd2", "mbcache"]);
        assert_eq!(needs(b"x\0depends=\0y"), Vec::<String>::new());
        assert_eq!(needs(b"x"), Vec::<String>::new());
        assert_eq!(module_name("kernel/lib/crc-t10dif.ko"), "crc_t10dif");
    }
}
