//! The credentials of worker threads.
//!
//! Owns the calling thread's fsuid, fsgid, supplementary groups, effective capabilities, umask and working directory. Invariants: outside an [`Assumed`]
//! guard a worker is fsuid 0 and fsgid 0 without supplementary groups; it never has `CAP_SYS_RESOURCE` in force (reserved blocks and quotas are
//! the caller's, kernel-hazards A6); it has `CAP_FSETID` only inside a guard that asked for it; its working directory is `/proc/self/fd`, so that
//! `"7"` names descriptor 7 without walking through any mount.
//!
//! The libc wrappers of these calls change every thread of the process (nptl(7)); here the raw calls change the calling thread alone.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;

use super::{check, thread};

/// Names by capability(7) number.
mod cap {
    pub(super) const CHOWN: u32 = 0;
    pub(super) const DAC_OVERRIDE: u32 = 1;
    pub(super) const DAC_READ_SEARCH: u32 = 2;
    pub(super) const FOWNER: u32 = 3;
    pub(super) const FSETID: u32 = 4;
    pub(super) const SETGID: u32 = 6;
    pub(super) const SETUID: u32 = 7;
    pub(super) const SETPCAP: u32 = 8;
    pub(super) const LINUX_IMMUTABLE: u32 = 9;
    pub(super) const SYS_ADMIN: u32 = 21;
    pub(super) const MKNOD: u32 = 27;
    pub(super) const SETFCAP: u32 = 31;
    pub(super) const MAC_OVERRIDE: u32 = 32;
    pub(super) const MAC_ADMIN: u32 = 33;
}

const fn bits(caps: &[u32]) -> u64 {
    let mut word = 0;
    let mut rest = caps;
    while let [first, tail @ ..] = rest {
        word |= 1 << *first;
        rest = tail;
    }
    word
}

/// What a worker works with: enough to reach any file on behalf of a caller whom the kernel has already checked (`default_permissions`), not
/// enough to use up what is reserved for root.
const KEPT: u64 = bits(&[
    cap::CHOWN,
    cap::DAC_OVERRIDE,
    cap::DAC_READ_SEARCH,
    cap::FOWNER,
    cap::SETGID,
    cap::SETUID,
    cap::SETPCAP,
    cap::LINUX_IMMUTABLE,
    cap::SYS_ADMIN,
    cap::MKNOD,
    cap::SETFCAP,
    cap::MAC_OVERRIDE,
    cap::MAC_ADMIN,
]);
const FSETID: u64 = bits(&[cap::FSETID]);
/// Without these no operation can be mirrored faithfully.
const NEEDED: u64 = bits(&[
    cap::CHOWN,
    cap::DAC_OVERRIDE,
    cap::DAC_READ_SEARCH,
    cap::FOWNER,
    cap::SETGID,
    cap::SETUID,
    cap::SYS_ADMIN,
]);

/// `SECBIT_NO_SETUID_FIXUP` (capabilities(7)): changing the fsuid leaves the effective capabilities alone.
const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;
/// Who a caller is whom our user namespace cannot name (`overflowuid`).
pub(crate) const OVERFLOW: u32 = 65_534;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn capget() -> io::Result<[CapData; 2]> {
    let mut header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 writes exactly two `CapData`; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(result).map(|_| data)
}

fn capset(data: &[CapData; 2]) -> io::Result<()> {
    let mut header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    // SAFETY: version 3 reads exactly two `CapData`; both outlive the call; pid 0 is the calling thread alone.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(result).map(drop)
}

fn setfsuid(uid: u32) {
    // SAFETY: no memory is passed. The raw call changes the calling thread only and reports no errors.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
}

fn setfsgid(gid: u32) {
    // SAFETY: as in `setfsuid`.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
}

fn setgroups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the slice is valid for its length and outlives the call; the raw call changes the calling thread only.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    check(result).map(drop)
}

fn keep_caps_across_setfsuid() -> io::Result<()> {
    // SAFETY: no memory is passed; securebits belong to the calling thread's credentials.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) };
    check(result.into()).map(drop)
}

/// What this thread's effective capabilities are now.
#[derive(Clone, Copy)]
struct State {
    permitted: [CapData; 2],
    effective: u64,
}

thread_local! {
    static STATE: Cell<Option<State>> = const { Cell::new(None) };
}

fn set_effective(state: &mut State, wanted: u64) -> io::Result<()> {
    if state.effective == wanted {
        return Ok(());
    }
    let mut data = state.permitted;
    let [low, high] = &mut data;
    low.effective = (wanted as u32) & low.permitted;
    high.effective = ((wanted >> 32) as u32) & high.permitted;
    capset(&data)?;
    state.effective = wanted;
    Ok(())
}

/// Makes the calling thread a worker; cheap when it is one already. What it changes lasts until the thread ends.
pub(crate) fn enter() -> io::Result<()> {
    if STATE.get().is_some() {
        return Ok(());
    }
    let permitted = capget()?;
    let [low, high] = permitted;
    let have = u64::from(low.permitted) | u64::from(high.permitted) << 32;
    if have & NEEDED != NEEDED {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    thread::unshare_fs()?;
    let descriptors = rustix::fs::open(
        "/proc/self/fd",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::process::fchdir(descriptors.as_fd())?;
    rustix::process::umask(rustix::fs::Mode::empty());
    setgroups(&[])?;
    keep_caps_across_setfsuid()?;
    let mut state = State {
        permitted,
        effective: u64::MAX,
    };
    set_effective(&mut state, KEPT)?;
    STATE.set(Some(state));
    Ok(())
}

/// Whether the calling thread has called [`enter`].
pub(crate) fn is_worker() -> bool {
    STATE.get().is_some()
}

/// What an operation may do beyond the caller's own rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Setid {
    /// The kernel asked for set-user-id and set-group-id bits to be cleared, or would: without `CAP_FSETID`.
    Clear,
    /// The caller has `CAP_FSETID`, by what the kernel sent.
    Keep,
}

/// For as long as it lives, the calling worker creates, allocates and changes files as somebody else.
#[must_use]
pub(crate) struct Assumed {
    identity: bool,
    groups: bool,
    umask: bool,
    // The guard restores the thread that made it.
    _thread: std::marker::PhantomData<*const ()>,
}

/// Whom to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who<'a> {
    /// fsuid.
    pub(crate) uid: u32,
    /// fsgid.
    pub(crate) gid: u32,
    /// Supplementary groups, where they matter.
    pub(crate) groups: &'a [u32],
    /// Whether set-id bits survive.
    pub(crate) setid: Setid,
    /// umask for files that are created.
    pub(crate) umask: u32,
}

/// Takes on an identity. The thread must have called [`enter`].
pub(crate) fn assume(who: Who<'_>) -> io::Result<Assumed> {
    let mut state = STATE
        .get()
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))?;
    let wanted = if who.setid == Setid::Keep {
        KEPT | FSETID
    } else {
        KEPT
    };
    // Left as it is afterwards: the next operation asks for what it needs, so a run of operations by one kind of caller never changes it.
    set_effective(&mut state, wanted)?;
    STATE.set(Some(state));
    let mut guard = Assumed {
        identity: false,
        groups: false,
        umask: who.umask != 0,
        _thread: std::marker::PhantomData,
    };
    if who.umask != 0 {
        rustix::process::umask(rustix::fs::Mode::from_bits_truncate(who.umask));
    }
    if !who.groups.is_empty() {
        setgroups(who.groups)?;
        guard.groups = true;
    }
    // -1 would be a question instead of a change (setfsuid(2)).
    let name = |id: u32| if id == u32::MAX { OVERFLOW } else { id };
    if who.uid != 0 || who.gid != 0 {
        guard.identity = true;
        setfsgid(name(who.gid));
        setfsuid(name(who.uid));
    }
    Ok(guard)
}

impl Drop for Assumed {
    fn drop(&mut self) {
        if self.identity {
            setfsuid(0);
            setfsgid(0);
        }
        if self.groups {
            // Fails only when memory runs out; then the thread must not serve anybody else with these groups.
            if let Err(error) = setgroups(&[]) {
                tracing::error!(%error, "could not drop a caller's groups; this worker will be refused to work");
                STATE.set(None);
            }
        }
        if self.umask {
            rustix::process::umask(rustix::fs::Mode::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    #[test]
    fn an_assumed_identity_owns_what_it_creates_and_is_given_up() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().to_path_buf();
        let (inside, mode, after) = on_a_thread(move || {
            enter().unwrap();
            let who = Who {
                uid: 1234,
                gid: 2345,
                groups: &[3456],
                setid: Setid::Clear,
                umask: 0o077,
            };
            let guard = assume(who).unwrap();
            let inside = std::fs::File::create(path.join("a"))
                .unwrap()
                .metadata()
                .unwrap();
            drop(guard);
            let after = std::fs::File::create(path.join("b"))
                .unwrap()
                .metadata()
                .unwrap();
            (
                (inside.uid(), inside.gid()),
                inside.mode() & 0o777,
                (after.uid(), after.gid(), after.mode() & 0o777),
            )
        });
        assert_eq!(inside, (1234, 2345));
        assert_eq!(mode, 0o600);
        assert_eq!(after, (0, 0, 0o666));
    }

    #[test]
    fn the_rest_of_the_process_keeps_its_rights_and_directory() {
        let before = std::env::current_dir().unwrap();
        let status = on_a_thread(|| {
            enter().unwrap();
            let guard = assume(Who {
                uid: 7,
                gid: 7,
                groups: &[9],
                setid: Setid::Clear,
                umask: 0,
            })
            .unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            drop(guard);
            status
        });
        let line = |text: &str, key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key))
                .map(|rest| rest.trim().to_owned())
                .unwrap()
        };
        assert!(line(&status, "Uid:").ends_with("\t7"), "{status}");
        assert_eq!(line(&status, "Groups:"), "9");
        let effective = u64::from_str_radix(&line(&status, "CapEff:"), 16).unwrap();
        assert_eq!(
            effective & (FSETID | 1 << 24),
            0,
            "neither FSETID nor SYS_RESOURCE may be in force"
        );
        let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(line(&own, "Uid:").ends_with("\t0"));
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
