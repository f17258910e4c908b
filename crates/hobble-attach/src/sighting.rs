//! Who holds something of a filesystem: a quick look at every process of the host.
//!
//! Invariant: nothing is asked of the filesystem itself (attributes are taken as cached), so a dead server holds nobody up; a process is passed over only
//! when none of its descriptor tables, directories and mappings shows the device. What this finds is then looked into by a census.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use hobble_graft::ids::{Device, Pid, ProcessId};
use hobble_graft::proc::{stat, tree};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

/// Everybody on this host but ourselves, the kernel's threads and zombies.
fn everybody() -> Vec<ProcessId> {
    let own = [Some(Pid::own())];
    tree::pids()
        .unwrap_or_default()
        .into_iter()
        .filter(|pid| !own.contains(&Some(*pid)))
        .filter_map(|pid| {
            let stat = stat::of_process(pid).ok()?;
            let fit = !stat.is_kernel_thread() && !stat.has_ended();
            fit.then_some(ProcessId {
                pid,
                start_time: stat.start_time,
            })
        })
        .collect()
}

/// The processes that hold something of the filesystem on `device`, by ascending pid. Whoever shares our descriptor table (the attachment's holder) holds
/// what we hold and is left out.
pub(crate) fn holders(device: Device) -> Vec<ProcessId> {
    everybody()
        .into_iter()
        .filter(|process| {
            holds(process.pid, device) && !hobble_graft::census::shares_our_table(process.pid)
        })
        .collect()
}

/// Whether a process has a descriptor on `device`.
pub(crate) fn has_on(pid: Pid, device: Device) -> bool {
    thread_holds(Path::new(&format!("/proc/{pid}")), device)
}

fn is_on(directory: impl AsFd, name: &std::ffi::CStr, device: Device) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(directory, name, flags, StatxFlags::TYPE)
        .is_ok_and(|stat| stat.stx_dev_major == device.major && stat.stx_dev_minor == device.minor)
}

fn holds(pid: Pid, device: Device) -> bool {
    let base = format!("/proc/{pid}");
    // `maps` prints the device in hexadecimal, two digits at least (fs/proc/task_mmu.c, show_vma_header_prefix).
    let mapped = format!(" {:02x}:{:02x} ", device.major, device.minor);
    let maps = fs::read(format!("{base}/maps")).unwrap_or_default();
    if maps
        .windows(mapped.len())
        .any(|window| window == mapped.as_bytes())
    {
        return true;
    }
    let Ok(tasks) = fs::read_dir(format!("{base}/task")) else {
        return false;
    };
    tasks
        .filter_map(Result::ok)
        .any(|task| thread_holds(&task.path(), device))
}

/// Threads may have tables and directories of their own (clone(2) without CLONE_FILES or CLONE_FS).
fn thread_holds(task: &Path, device: Device) -> bool {
    let open = |path: &Path| {
        rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    if let Ok(directory) = open(task)
        && (is_on(&directory, c"cwd", device) || is_on(&directory, c"root", device))
    {
        return true;
    }
    let Ok(descriptors) = open(&task.join("fd")) else {
        return false;
    };
    let Ok(list) = rustix::fs::Dir::read_from(&descriptors) else {
        return false;
    };
    list.filter_map(Result::ok).any(|entry| {
        entry
            .file_name()
            .to_bytes()
            .first()
            .is_some_and(u8::is_ascii_digit)
            && is_on(&descriptors, entry.file_name(), device)
    })
}

/// Whether a descriptor of a process is this inode on this device.
pub(crate) fn descriptor_is(pid: i32, fd: i32, device: Device, inode: u64) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(
        rustix::fs::CWD,
        format!("/proc/{pid}/fd/{fd}"),
        flags,
        StatxFlags::INO,
    )
    .is_ok_and(|stat| {
        stat.stx_dev_major == device.major
            && stat.stx_dev_minor == device.minor
            && stat.stx_ino == inode
    })
}
