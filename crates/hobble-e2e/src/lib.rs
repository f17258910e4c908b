//! What the end-to-end tests share: a scene with a volume, a state directory and a check for leaks.
//!
//! The tests below `tests/` drive the built `hobble` binary against real programs, one file per promise. They see nothing of
//! Hobble's other crates. `HOBBLE_CYCLES` scales those that repeat themselves.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::leak::LeakCheck;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::process::{self, Slot};
use hobble_testkit::target::Target;
use hobble_testkit::volume::{Kind, Volume};
use hobble_testkit::{need, target};
use serde_json::Value;

/// How many cycles a repeating test makes: `$HOBBLE_CYCLES`, or `default`.
pub fn cycles(default: u32) -> u32 {
    std::env::var("HOBBLE_CYCLES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// By how much a machine is slower than what the bounds of the tests are meant for: `$HOBBLE_SLOWNESS`, or 1. Only upper bounds on times are stretched by it.
pub fn slowness() -> u64 {
    std::env::var("HOBBLE_SLOWNESS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

/// Runs `test` in a mount namespace of its own with a fresh state directory, and checks that it leaves nothing behind.
///
/// # Errors
/// What the test returns, or what it left.
pub fn scene(kind: Kind, test: impl FnOnce(&Hobble, &Volume<'_>) -> Result<()>) -> Result<()> {
    need::root()?;
    need::fuse()?;
    let namespace = Namespace::enter()?;
    let volume = Volume::new(&namespace, kind)?;
    let hobble = Hobble::new()?;
    let leaks = LeakCheck::new(vec![hobble.state_dir().to_owned()])?;
    test(&hobble, &volume).inspect_err(|_| eprint!("{}", hobble.logs()))?;
    leaks.finish()?;
    // The holder ends after its server, which ends after the last answer.
    until(
        "every process of hobble has ended",
        Duration::from_secs(5),
        || hobble.processes().is_empty(),
    )
    .with_context(|| format!("left: {:?}", hobble.processes()))?;
    // Busy means that something still holds the backing filesystem.
    volume.close()
}

/// The descriptors of every process of `target`, without standard streams and what is no file or directory of `volume`.
///
/// # Errors
/// When a process is gone.
pub fn movable(target: &Target) -> Result<BTreeMap<(u32, u32), Slot>> {
    let mut all = BTreeMap::new();
    for pid in target.pids() {
        for (number, slot) in process::descriptors(pid)? {
            if number > 2 && slot.movable() {
                all.insert((pid, number), slot);
            }
        }
    }
    Ok(all)
}

/// Fails unless exactly the descriptors on `volume` are hooked (`on`) or none is (`!on`), cwd included.
///
/// # Errors
/// Names the first descriptors that are on the wrong side.
pub fn assert_hooked(target: &Target, volume: &Path, on: bool) -> Result<()> {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for ((pid, number), slot) in movable(target)? {
        if slot.link.starts_with(volume) {
            seen += 1;
            if slot.hooked != on {
                wrong.push(format!(
                    "fd {number} of {pid} -> {} on mount {}",
                    slot.link.display(),
                    slot.mount
                ));
            }
        }
    }
    if !wrong.is_empty() {
        wrong.truncate(5);
        bail!(
            "{} be on the hook: {wrong:#?}",
            if on { "must" } else { "must not" }
        );
    }
    ensure!(
        seen > 0,
        "the target has no descriptor on {}",
        volume.display()
    );
    Ok(())
}

/// Fails when a hook is mounted on `volume`, or below it, in the namespace of a process (`thread-self` for our own). Others' hooks are not looked at.
///
/// # Errors
/// Names the mounts.
pub fn assert_unmounted(process: &str, volume: &Path) -> Result<()> {
    let mut mounts = process::mounts(process)?;
    mounts.retain(|(_, point, kind)| kind == "fuse.hobble" && Path::new(point).starts_with(volume));
    ensure!(mounts.is_empty(), "the hook is still mounted: {mounts:?}");
    Ok(())
}

/// What must be the same before an attachment and after recovery: link, flags, inode, mount of every descriptor.
/// A target at work opens and closes more meanwhile, and renames its files: it has five seconds to be seen without any.
///
/// # Errors
/// Lists differences.
pub fn assert_same_descriptors(target: &Target, before: &BTreeMap<(u32, u32), Slot>) -> Result<()> {
    let start = Instant::now();
    loop {
        match compare(before, &movable(target)?) {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() > Duration::from_secs(5) => return Err(error),
            // The target's next step decides.
            Err(_) => std::thread::sleep(Duration::from_millis(3)),
        }
    }
}

fn compare(before: &BTreeMap<(u32, u32), Slot>, after: &BTreeMap<(u32, u32), Slot>) -> Result<()> {
    let name = |slot: &Slot| slot.link.to_string_lossy().replace(".renamed", "");
    let key = |slot: &Slot| (name(slot), slot.flags, slot.inode, slot.mount);
    let mut wrong: Vec<String> = before
        .iter()
        .filter_map(|(place, slot)| match after.get(place) {
            None => Some(format!("{place:?} is gone: {slot:?}")),
            Some(now) if key(now) != key(slot) => {
                Some(format!("{place:?}: {slot:?} became {now:?}"))
            }
            Some(_) => None,
        })
        .chain(
            after
                .keys()
                .filter(|place| !before.contains_key(place))
                .map(|place| format!("{place:?} is new")),
        )
        .collect();
    if !wrong.is_empty() {
        let count = wrong.len();
        wrong.truncate(5);
        bail!("{count} descriptors are not as before: {wrong:#?}");
    }
    Ok(())
}

/// A counter of a rule in a `recovered` event.
///
/// # Errors
/// When there is no such rule.
pub fn rule_count(recovered: &Value, rule: &str, counter: &str) -> Result<u64> {
    let rules = recovered
        .get("rules")
        .and_then(Value::as_array)
        .context("no rules in the event")?;
    let found = rules
        .iter()
        .find(|each| each.get("name").and_then(Value::as_str) == Some(rule));
    target::number(
        found.with_context(|| format!("no rule {rule} in {recovered}"))?,
        counter,
    )
}

/// How often an errno was seen in an answer of the `ops` target.
pub fn errno(answer: &Value, name: &str) -> u64 {
    answer
        .get("errno")
        .and_then(|errno| errno.get(name))
        .and_then(Value::as_u64)
        .unwrap_or(0)
}

/// Looks at `condition` until it holds.
///
/// # Errors
/// When it does not hold within `limit`.
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > limit {
            bail!("not within {limit:?}: {what}");
        }
        // What is waited for happens in other processes, which tell nobody.
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(start.elapsed())
}
