//! What a test needs from the machine.
//!
//! Owns the rule that a test which cannot run says so and fails: nothing here skips.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::command::find;

/// CAP_SYS_ADMIN and CAP_SYS_PTRACE as bits of `CapEff` in `/proc/self/status` (linux/capability.h).
const NEEDED: [(u32, &str); 2] = [(21, "CAP_SYS_ADMIN"), (19, "CAP_SYS_PTRACE")];

/// Root with the capabilities that mounts and ptrace take.
///
/// # Errors
/// Names what is missing.
pub fn root() -> Result<()> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("no CapEff in /proc/self/status")?;
    for (bit, name) in NEEDED {
        if mask & (1 << bit) == 0 {
            bail!("this test needs {name}: run it as root");
        }
    }
    Ok(())
}

/// A program of the system.
///
/// # Errors
/// Names the program and the command that installs it.
pub fn tool(name: &str) -> Result<std::path::PathBuf> {
    find(name).with_context(|| format!("this test needs {name}: run `cargo xtask setup`"))
}

/// `/dev/fuse`.
///
/// # Errors
/// When the kernel offers no FUSE.
pub fn fuse() -> Result<()> {
    if !fs::exists("/dev/fuse").context("cannot look for /dev/fuse")? {
        bail!("this test needs /dev/fuse: load the fuse module");
    }
    Ok(())
}
