//! Mounts a mirror of one directory over another, in this mount namespace, until it is unmounted or interrupted:
//! `cargo run -p hobble-mirror --example mirror -- BACKING MOUNTPOINT [--no-passthrough] [--no-cache] [--no-handles] [--depth N] [--fault SPEC]...`
//!
//! For conformance tests and for trying things out by hand; the tool itself hooks running programs instead.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hobble_fuse::mount::{self, MountOptions};
use hobble_fuse::{Features, Server};
use hobble_mirror::{Caching, Config, Everybody, Mirror};
use hobble_rules::Plan;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MoveMountFlags;

struct Arguments {
    backing: PathBuf,
    mountpoint: PathBuf,
    passthrough: bool,
    caching: Caching,
    depth: u32,
    faults: Vec<String>,
}

fn arguments() -> anyhow::Result<Arguments> {
    let mut places: Vec<OsString> = Vec::new();
    let (mut passthrough, mut caching, mut depth, mut faults) =
        (true, Caching::default(), 1, Vec::new());
    let mut rest = std::env::args_os().skip(1);
    while let Some(argument) = rest.next() {
        let mut value = || {
            rest.next()
                .and_then(|value| value.into_string().ok())
                .context("a value is missing")
        };
        match argument.to_str() {
            Some("--no-passthrough") => passthrough = false,
            Some("--no-cache") => caching = Caching::NONE,
            Some("--depth") => depth = value()?.parse()?,
            Some("--fault") => faults.push(value()?),
            Some(other) if other.starts_with("--") => bail!("unknown option {other}"),
            _ => places.push(argument),
        }
    }
    let [backing, mountpoint] = <[OsString; 2]>::try_from(places)
        .ok()
        .context("usage: mirror BACKING MOUNTPOINT [options]")?;
    Ok(Arguments {
        backing: backing.into(),
        mountpoint: mountpoint.into(),
        passthrough,
        caching,
        depth,
        faults,
    })
}

fn plan(faults: &[String]) -> anyhow::Result<Option<Arc<Plan>>> {
    if faults.is_empty() {
        return Ok(None);
    }
    let document = hobble_rules::fault_flag::parse_all(faults).map_err(complaint)?;
    let experiment = hobble_rules::check(&document).map_err(complaint)?;
    Ok(Some(Arc::new(Plan::compile(
        &experiment,
        1,
        None,
        Duration::ZERO,
    ))))
}

fn complaint(errors: Vec<hobble_rules::Diagnostic>) -> anyhow::Error {
    anyhow::anyhow!("{errors:#?}")
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let arguments = arguments()?;
    let root = rustix::fs::open(
        &arguments.backing,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open {}", arguments.backing.display()))?;
    let target = rustix::fs::open(
        &arguments.mountpoint,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open {}", arguments.mountpoint.display()))?;
    let config = Config {
        root,
        native: None,
        volume: arguments.mountpoint.as_os_str().as_bytes().to_vec(),
        caching: arguments.caching,
        passthrough: arguments.passthrough,
        legacy: None,
    };
    let mirror = Mirror::new(config, Arc::new(Everybody))?;
    let new = mount::create(&MountOptions {
        source: "mirror".into(),
        ..MountOptions::default()
    })?;
    let serving = hobble_fuse::Config {
        features: Mirror::features(),
        mask: if arguments.passthrough {
            Features::all()
        } else {
            Features::all().difference(Features::PASSTHROUGH)
        },
        max_stack_depth: arguments.depth,
        ..hobble_fuse::Config::default()
    };
    let server = Server::start(new.device, Arc::new(mirror.clone()), &serving)?;
    if let Some(plan) = plan(&arguments.faults)? {
        mirror.set_plan(Some(plan), Instant::now());
    }
    rustix::mount::move_mount(
        new.mount.as_fd(),
        "",
        target.as_fd(),
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .context("cannot place the mount")?;
    drop((new.mount, target));
    eprintln!(
        "serving; `umount {}` ends it",
        arguments.mountpoint.display()
    );
    while !server.wait(Duration::from_secs(3600)) {}
    Ok(())
}
