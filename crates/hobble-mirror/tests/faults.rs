//! Faults are exact: on what matches, as the rule says, on nothing else, and on nothing any more once they are gone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hobble_fuse::Tid;
use hobble_mirror::{Caching, CallerFacts, Callers, Everybody};
use hobble_testkit::volume::Kind;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, XattrFlags,
};
use support::{Hook, Options, with};

fn read_write(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Both ways of doing I/O.
fn both(body: impl Fn(&Hook)) {
    with(Kind::Tmpfs, Options::default(), |hook| {
        body(hook);
        assert!(hook.mirror.passthrough(), "passthrough was not in use");
    });
    with(Kind::Tmpfs, Options::without_passthrough(), |hook| {
        body(hook);
        assert!(!hook.mirror.passthrough());
    });
}

#[test]
fn a_share_of_writes_fails_and_nothing_else_does() {
    const WRITES: u32 = 10_000;
    both(|hook| {
        hook.inject(&["errno=EIO op=write path=hit percent=30"]);
        let (hit, other) = (read_write(&hook.at("hit")), read_write(&hook.at("other")));
        let mut failed = 0_u32;
        for _ in 0..WRITES {
            match hit.write_at(b"x", 0) {
                Ok(written) => assert_eq!(written, 1),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    failed += 1;
                }
            }
            assert_eq!(other.write_at(b"y", 0).unwrap(), 1);
            let mut byte = [0];
            hit.read_at(&mut byte, 0).unwrap();
        }
        let expected = f64::from(WRITES) * 0.3;
        let sigma = (f64::from(WRITES) * 0.3 * 0.7).sqrt();
        assert!(
            (f64::from(failed) - expected).abs() < 3.0 * sigma,
            "{failed} of {WRITES} failed"
        );
        let counted = hook.metrics().injected_errors;
        assert_eq!(
            counted,
            u64::from(failed),
            "what is counted is what was seen"
        );

        hook.recover();
        for _ in 0..1000 {
            hit.write_all_at(b"z", 0).unwrap();
        }
        assert_eq!(hook.metrics().injected_errors, counted);
    });
}

#[test]
fn a_delay_is_as_long_as_it_says_and_only_where_it_says() {
    both(|hook| {
        hook.inject(&["latency=50ms op=fsync path=hit"]);
        let (hit, other) = (read_write(&hook.at("hit")), read_write(&hook.at("other")));
        for _ in 0..5 {
            let begun = Instant::now();
            hit.sync_all().unwrap();
            let took = begun.elapsed();
            assert!(
                (Duration::from_millis(50)..Duration::from_millis(80)).contains(&took),
                "{took:?}"
            );
            let begun = Instant::now();
            other.sync_all().unwrap();
            hit.write_all_at(b"x", 0).unwrap();
            assert!(begun.elapsed() < Duration::from_millis(25));
        }
        hook.recover();
        let begun = Instant::now();
        hit.sync_all().unwrap();
        assert!(begun.elapsed() < Duration::from_millis(25));
    });
}

#[test]
fn a_delayed_operation_ends_when_released_and_none_begins_while_quiet() {
    with(Kind::Tmpfs, Options::default(), |hook| {
        hook.inject(&["latency=60s op=fsync"]);
        let file = read_write(&hook.at("f"));
        let begun = Instant::now();
        std::thread::scope(|threads| {
            let waiting = threads.spawn(|| file.sync_all());
            while hook.mirror.lot().parked() == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            hook.mirror.quiesce(true);
            assert_eq!(hook.mirror.release(|_| true), 1);
            waiting.join().unwrap().unwrap();
            file.sync_all().unwrap();
        });
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(hook.mirror.settle(Duration::from_secs(1)));
    });
}

#[test]
fn forged_attributes_are_seen_at_once_and_gone_at_once() {
    both(|hook| {
        for name in ["hit", "other"] {
            fs::write(hook.at(name), "four").unwrap();
            fs::set_permissions(hook.at(name), fs::Permissions::from_mode(0o644)).unwrap();
        }
        let open = File::open(hook.at("hit")).unwrap();
        assert_eq!(fs::metadata(hook.at("hit")).unwrap().len(), 4);
        hook.inject(&["attr.size=1234567 attr.perm=0600 attr.uid=77 attr.mtime=2001-09-09T01:46:40Z op=getattr,lookup path=hit"]);
        for metadata in [
            fs::metadata(hook.at("hit")).unwrap(),
            open.metadata().unwrap(),
        ] {
            assert_eq!(metadata.len(), 1_234_567);
            assert_eq!(metadata.mode(), 0o100_600);
            assert_eq!(metadata.uid(), 77);
            assert_eq!(metadata.mtime(), 1_000_000_000);
        }
        assert_eq!(fs::metadata(hook.at("other")).unwrap().len(), 4);
        assert_eq!(
            fs::metadata(hook.behind("hit")).unwrap().len(),
            4,
            "the file itself is not changed"
        );
        hook.recover();
        for metadata in [
            fs::metadata(hook.at("hit")).unwrap(),
            open.metadata().unwrap(),
        ] {
            assert_eq!(
                (metadata.len(), metadata.mode(), metadata.uid()),
                (4, 0o100_644, 0)
            );
        }
        assert_eq!(fs::read(hook.at("hit")).unwrap(), b"four");
    });
}

#[test]
fn an_append_goes_to_the_true_end_whatever_the_size_is_said_to_be() {
    both(|hook| {
        fs::write(hook.at("log"), "0123456789").unwrap();
        hook.inject(&[
            "attr.size=3 op=getattr,lookup path=log",
            "errno=EIO op=write path=log percent=0",
        ]);
        let mut log = OpenOptions::new()
            .append(true)
            .open(hook.at("log"))
            .unwrap();
        assert_eq!(log.metadata().unwrap().len(), 3);
        log.write_all(b"abc").unwrap();
        assert_eq!(fs::read(hook.behind("log")).unwrap(), b"0123456789abc");
        hook.recover();
        log.write_all(b"def").unwrap();
        assert_eq!(fs::read(hook.at("log")).unwrap(), b"0123456789abcdef");
    });
}

#[test]
fn corrupted_reads_leave_the_file_alone_in_every_way_of_reading() {
    both(|hook| {
        let truth = vec![0xa5_u8; 64 * 1024];
        fs::write(hook.at("f"), &truth).unwrap();
        fs::write(hook.at("g"), &truth).unwrap();
        let change = hook.inject(&["corrupt=zero occurrences=4 length=100 op=read path=f"]);
        assert!(change.must_reopen.is_empty());
        let mut file = File::open(hook.at("f")).unwrap();
        let mut seen = Vec::new();
        file.read_to_end(&mut seen).unwrap();
        assert_eq!(seen.len(), truth.len());
        assert_ne!(seen, truth);
        // sendfile goes through the page cache: it sees the fault too, and every time.
        for _ in 0..3 {
            let outside = tempfile::tempdir().unwrap();
            let target = File::create(outside.path().join("copy")).unwrap();
            let mut at = 0;
            while (at as usize) < truth.len() {
                rustix::fs::sendfile(&target, &file, Some(&mut at), truth.len()).unwrap();
            }
            assert_ne!(fs::read(outside.path().join("copy")).unwrap(), truth);
        }
        assert_eq!(fs::read(hook.at("g")).unwrap(), truth);
        assert_eq!(fs::read(hook.behind("f")).unwrap(), truth);
        hook.recover();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut seen = Vec::new();
        file.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, truth);
        let outside = tempfile::tempdir().unwrap();
        let target = File::create(outside.path().join("copy")).unwrap();
        let mut at = 0;
        while (at as usize) < truth.len() {
            rustix::fs::sendfile(&target, &file, Some(&mut at), truth.len()).unwrap();
        }
        assert_eq!(fs::read(outside.path().join("copy")).unwrap(), truth);
    });
}

#[test]
fn corrupted_writes_are_what_is_on_disk() {
    both(|hook| {
        hook.inject(&["corrupt=zero occurrences=1 length=1000 op=write path=f"]);
        let truth = vec![0xa5_u8; 8192];
        fs::write(hook.at("f"), &truth).unwrap();
        let stored = fs::read(hook.behind("f")).unwrap();
        assert_eq!(stored.len(), truth.len());
        let changed = stored.iter().filter(|byte| **byte == 0).count();
        assert!(
            (1..=1000).contains(&changed),
            "{changed} bytes were changed"
        );
        assert_eq!(
            stored.iter().filter(|byte| **byte == 0xa5).count(),
            truth.len() - changed
        );
        hook.recover();
        fs::write(hook.at("f"), &truth).unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), truth);
    });
}

#[test]
fn files_that_were_open_before_are_reported_and_fit_once_reopened() {
    with(Kind::Tmpfs, Options::default(), |hook| {
        let file = read_write(&hook.at("f"));
        let _other = read_write(&hook.at("g"));
        file.write_all_at(b"x", 0).unwrap();
        let change = hook.inject(&["errno=EIO op=write path=f"]);
        assert_eq!((change.must_reopen.len(), change.may_reopen.len()), (1, 0));
        let info = hook.mirror.identify(file.as_fd()).unwrap();
        assert_eq!(info.handle, Some(change.must_reopen[0]));
        assert!(!hook.mirror.fits(change.must_reopen[0]).unwrap());
        let again = File::from(hook.mirror.reopen_stand_in(file.as_fd()).unwrap());
        let mut number = OwnedFd::from(file);
        rustix::io::dup2(&again, &mut number).unwrap();
        let file = File::from(number);
        drop(again);
        assert_eq!(errno(file.write_at(b"y", 0)), Some(libc::EIO));
        let change = hook.recover();
        assert_eq!((change.must_reopen.len(), change.may_reopen.len()), (0, 1));
        file.write_all_at(b"z", 0).unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"z");
    });
}

#[test]
fn rules_follow_renames_of_any_directory_above() {
    both(|hook| {
        fs::create_dir_all(hook.at("a/b")).unwrap();
        let file = {
            fs::write(hook.at("a/b/f"), "x").unwrap();
            read_write(&hook.at("a/b/f"))
        };
        hook.inject(&["errno=EIO op=fsync path=new/**"]);
        file.sync_all().unwrap();
        fs::rename(hook.at("a"), hook.at("new")).unwrap();
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        fs::rename(hook.at("new/b"), hook.at("b")).unwrap();
        file.sync_all().unwrap();
        fs::rename(hook.at("b/f"), hook.at("new/g")).unwrap();
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        // An unlinked file is still matched by its last path.
        fs::remove_file(hook.at("new/g")).unwrap();
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        hook.recover();
        file.sync_all().unwrap();
    });
}

#[test]
fn a_hard_link_is_matched_by_any_of_its_names() {
    both(|hook| {
        fs::create_dir(hook.at("d")).unwrap();
        fs::write(hook.at("f"), "x").unwrap();
        fs::hard_link(hook.at("f"), hook.at("d/g")).unwrap();
        let file = read_write(&hook.at("f"));
        fs::metadata(hook.at("d/g")).unwrap();
        fs::metadata(hook.at("f")).unwrap();
        hook.inject(&["errno=EIO op=fsync path=d/**"]);
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
        fs::remove_file(hook.at("d/g")).unwrap();
        file.sync_all().unwrap();
    });
}

#[test]
fn names_that_are_not_utf8_and_absolute_patterns_match() {
    use std::os::unix::ffi::OsStrExt;
    with(Kind::Tmpfs, Options::default(), |hook| {
        let name = std::ffi::OsStr::from_bytes(b"caf\xe9.db");
        hook.inject(&[
            "errno=EIO op=create path=caf?.db",
            "errno=ENOSPC op=mkdir path=/volume/abs",
        ]);
        assert_eq!(errno(File::create(hook.at(name))), Some(libc::EIO));
        assert_eq!(errno(fs::create_dir(hook.at("abs"))), Some(libc::ENOSPC));
        File::create(hook.at("cafe.txt")).unwrap();
    });
}

/// Every operation that a rule can name and a program can cause, made to fail; nothing fails without the rule.
#[test]
fn every_operation_can_be_failed_and_only_that_one_is() {
    let plain = || Options {
        caching: Caching::NONE,
        ..Options::default()
    };
    let options = [
        plain(),
        Options {
            mask: Options::without_passthrough().mask,
            ..plain()
        },
    ];
    for options in options {
        with(Kind::Ext4, options, every_operation);
    }
}

fn every_operation(hook: &Hook) {
    {
        let prepare = || {
            let _ = fs::remove_dir_all(hook.behind("d"));
            fs::create_dir(hook.behind("d")).unwrap();
            for name in ["f", "g", "u"] {
                fs::write(hook.behind("d").join(name), "hello").unwrap();
            }
            fs::create_dir(hook.behind("d/sub")).unwrap();
            std::os::unix::fs::symlink("f", hook.behind("d/s")).unwrap();
            rustix::fs::setxattr(hook.behind("d/f"), "user.a", b"1", XattrFlags::empty()).unwrap();
        };
        let at = |name: &str| hook.at("d").join(name);
        type Cause<'a> = (&'a str, Box<dyn Fn() -> io::Result<()> + 'a>);
        let causes: Vec<Cause<'_>> = vec![
            (
                "lookup",
                Box::new(|| fs::symlink_metadata(at("f")).map(drop)),
            ),
            (
                "getattr",
                Box::new(|| fs::symlink_metadata(at("f")).map(drop)),
            ),
            (
                "setattr",
                Box::new(|| fs::set_permissions(at("f"), fs::Permissions::from_mode(0o600))),
            ),
            ("readlink", Box::new(|| fs::read_link(at("s")).map(drop))),
            (
                "symlink",
                Box::new(|| std::os::unix::fs::symlink("x", at("new-s"))),
            ),
            (
                "mknod",
                Box::new(|| {
                    Ok(rustix::fs::mknodat(
                        CWD,
                        at("fifo"),
                        FileType::Fifo,
                        Mode::RUSR,
                        0,
                    )?)
                }),
            ),
            ("mkdir", Box::new(|| fs::create_dir(at("new-d")))),
            ("unlink", Box::new(|| fs::remove_file(at("u")))),
            ("rmdir", Box::new(|| fs::remove_dir(at("sub")))),
            ("rename", Box::new(|| fs::rename(at("g"), at("g2")))),
            ("link", Box::new(|| fs::hard_link(at("f"), at("f2")))),
            ("open", Box::new(|| File::open(at("f")).map(drop))),
            ("create", Box::new(|| File::create_new(at("new")).map(drop))),
            (
                "tmpfile",
                Box::new(|| {
                    OpenOptions::new()
                        .write(true)
                        .custom_flags(libc::O_TMPFILE)
                        .open(hook.at("d"))
                        .map(drop)
                }),
            ),
            (
                "read",
                Box::new(|| read_write(&at("f")).read_at(&mut [0], 0).map(drop)),
            ),
            (
                "write",
                Box::new(|| read_write(&at("f")).write_at(b"x", 0).map(drop)),
            ),
            (
                "flush",
                Box::new(|| {
                    let file = read_write(&at("f"));
                    // The duplicate's close is a flush whose result is seen.
                    close(file.try_clone().unwrap())
                }),
            ),
            ("fsync", Box::new(|| read_write(&at("f")).sync_all())),
            ("fdatasync", Box::new(|| read_write(&at("f")).sync_data())),
            ("opendir", Box::new(|| fs::read_dir(hook.at("d")).map(drop))),
            (
                "readdir",
                Box::new(|| fs::read_dir(hook.at("d"))?.try_for_each(|entry| entry.map(drop))),
            ),
            (
                "fsyncdir",
                Box::new(|| File::open(hook.at("d"))?.sync_all()),
            ),
            (
                "statfs",
                Box::new(|| Ok(rustix::fs::statvfs(at("f")).map(drop)?)),
            ),
            (
                "setxattr",
                Box::new(|| {
                    Ok(rustix::fs::setxattr(
                        at("f"),
                        "user.b",
                        b"1",
                        XattrFlags::empty(),
                    )?)
                }),
            ),
            (
                "getxattr",
                Box::new(
                    || Ok(rustix::fs::getxattr(at("f"), "user.a", &mut [0; 8][..]).map(drop)?),
                ),
            ),
            (
                "listxattr",
                Box::new(|| Ok(rustix::fs::listxattr(at("f"), &mut [0; 64][..]).map(drop)?)),
            ),
            (
                "removexattr",
                Box::new(|| Ok(rustix::fs::removexattr(at("f"), "user.a")?)),
            ),
            (
                "fallocate",
                Box::new(|| {
                    Ok(rustix::fs::fallocate(
                        read_write(&at("f")),
                        FallocateFlags::empty(),
                        0,
                        100,
                    )?)
                }),
            ),
            (
                "copy_file_range",
                Box::new(|| {
                    let (from, to) = (read_write(&at("f")), read_write(&at("g")));
                    Ok(
                        rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 3)
                            .map(drop)?,
                    )
                }),
            ),
            (
                "lseek",
                Box::new(|| {
                    Ok(
                        rustix::fs::seek(read_write(&at("f")), rustix::fs::SeekFrom::Data(0))
                            .map(drop)?,
                    )
                }),
            ),
            (
                "ioctl",
                Box::new(|| Ok(rustix::fs::ioctl_getflags(read_write(&at("f"))).map(drop)?)),
            ),
            (
                "flock",
                Box::new(|| {
                    Ok(rustix::fs::flock(
                        read_write(&at("f")),
                        FlockOperation::NonBlockingLockExclusive,
                    )?)
                }),
            ),
            (
                "setlk",
                Box::new(|| {
                    Ok(rustix::fs::fcntl_lock(
                        read_write(&at("f")),
                        FlockOperation::NonBlockingLockExclusive,
                    )?)
                }),
            ),
        ];
        for (op, cause) in &causes {
            prepare();
            cause().unwrap_or_else(|error| panic!("{op} without a rule: {error}"));
            prepare();
            // An error that no filesystem here gives by itself.
            hook.inject(&[&format!("errno=EHWPOISON op={op} path=d/**,d")]);
            assert_eq!(errno(cause()), Some(libc::EHWPOISON), "{op} with the rule");
            hook.recover();
            prepare();
            cause().unwrap_or_else(|error| panic!("{op} after the rule: {error}"));
        }
    }
}

/// `close(2)` with its result, which `drop` does not tell.
#[allow(unsafe_code)]
fn close(file: File) -> io::Result<()> {
    let fd = file.into_raw_fd();
    // SAFETY: `into_raw_fd` gave up the descriptor, so this is its only close.
    if unsafe { libc::close(fd) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// In scope while the switch is on.
struct Switch(Arc<AtomicBool>);

impl Callers for Switch {
    fn in_scope(&self, _tid: Tid) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn facts(&self, tid: Tid) -> CallerFacts {
        Everybody.facts(tid)
    }
}

#[test]
fn callers_out_of_scope_are_neither_faulted_nor_counted() {
    let switch = Arc::new(AtomicBool::new(false));
    let options = Options {
        callers: Arc::new(Switch(Arc::clone(&switch))),
        ..Options::default()
    };
    with(Kind::Tmpfs, options, |hook| {
        hook.inject(&["errno=EIO op=write,create,lookup"]);
        fs::write(hook.at("f"), "x").unwrap();
        let file = read_write(&hook.at("f"));
        file.write_all_at(b"y", 0).unwrap();
        switch.store(true, Ordering::SeqCst);
        assert_eq!(errno(file.write_at(b"z", 0)), Some(libc::EIO));
        switch.store(false, Ordering::SeqCst);
        file.write_all_at(b"w", 0).unwrap();
    });
}

#[test]
fn the_caller_is_known_by_its_name() {
    with(Kind::Tmpfs, Options::default(), |hook| {
        fs::write(hook.at("f"), "x").unwrap();
        hook.inject(&["errno=EIO op=read who.comm=cat"]);
        let status = std::process::Command::new("cat")
            .arg(hook.at("f"))
            .output()
            .unwrap()
            .status;
        assert!(!status.success());
        let status = std::process::Command::new("head")
            .arg(hook.at("f"))
            .output()
            .unwrap()
            .status;
        assert!(status.success());
    });
}

/// Opens in all modes at once, while rules that change the mode come and go: none of it may fail.
#[test]
fn concurrent_opens_never_meet_a_wrong_mode() {
    both(|hook| {
        fs::write(hook.at("f"), vec![1; 8192]).unwrap();
        let end = Instant::now() + Duration::from_secs(4);
        std::thread::scope(|threads| {
            for number in 0..4 {
                let path = hook.at("f");
                threads.spawn(move || {
                    let mut buffer = [0; 4096];
                    while Instant::now() < end {
                        let flags = if number % 2 == 0 { 0 } else { libc::O_APPEND };
                        let file = OpenOptions::new()
                            .read(true)
                            .write(true)
                            .custom_flags(flags)
                            .open(&path)
                            .unwrap();
                        file.read_at(&mut buffer, 0).unwrap();
                        if number == 0 {
                            file.write_at(&buffer, 4096).unwrap();
                        }
                        if number == 1 {
                            File::open(&path).unwrap().read_at(&mut buffer, 0).unwrap();
                        }
                    }
                });
            }
            while Instant::now() < end {
                hook.inject(&["errno=EIO op=read,write path=f percent=0"]);
                std::thread::sleep(Duration::from_millis(3));
                hook.recover();
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        assert!(hook.at("f").metadata().unwrap().file_type().is_file());
        assert!(!hook.at("f").metadata().unwrap().file_type().is_fifo());
    });
}

#[test]
fn direct_and_synchronous_writes_go_through_the_server_as_they_are() {
    with(Kind::Ext4, Options::default(), |hook| {
        hook.inject(&["errno=EIO op=read,write percent=0"]);
        for flags in [libc::O_DIRECT, libc::O_SYNC, libc::O_DSYNC, libc::O_NOATIME] {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(flags)
                .open(hook.at(format!("f-{flags}")))
                .unwrap();
            let memory = vec![7_u8; 4096 * 3];
            let start = memory.as_ptr().align_offset(4096);
            let page = &memory[start..start + 4096];
            file.write_all_at(page, 4096).unwrap();
            if flags == libc::O_DIRECT {
                assert_eq!(
                    errno(file.write_at(&page[..100], 0)),
                    Some(libc::EINVAL),
                    "the alignment of the filesystem is the program's"
                );
                let present = rustix::fs::fcntl_getfl(&file).unwrap();
                rustix::fs::fcntl_setfl(&file, present.difference(OFlags::DIRECT)).unwrap();
                file.write_all_at(&page[..100], 0).unwrap();
            }
        }
        let stat = rustix::fs::statat(CWD, hook.at("f-16384"), AtFlags::empty()).unwrap();
        assert_eq!(stat.st_size, 8192);
    });
}

/// Has the kernel forget what it knows of the mirror, as it does under memory pressure.
fn forget_everything(hook: &Hook) {
    // do_remount_sb drops the dentries of the filesystem (`shrink_dcache_sb`, fs/super.c `reconfigure_super`).
    rustix::mount::mount_remount(&hook.front, rustix::mount::MountFlags::empty(), "").unwrap();
    let begun = Instant::now();
    while hook.mirror.nodes() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(5), "not forgotten");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn counts_per_file_are_the_files_and_not_the_directorys() {
    both(|hook| {
        fs::create_dir(hook.at("d")).unwrap();
        let (a, b) = (hook.at("d/a"), hook.at("d/b"));
        let eio = Some(libc::EIO);
        for path in [&a, &b] {
            fs::write(path, "x").unwrap();
        }
        hook.inject(&["errno=EIO op=unlink,mkdir,rename,link path=d/* times=1 per=file"]);
        assert_eq!(errno(fs::remove_file(&a)), eio);
        assert_eq!(errno(fs::remove_file(&b)), eio);
        fs::rename(&a, hook.at("d/c")).unwrap();
        fs::hard_link(hook.at("d/c"), &a).unwrap();
        fs::remove_file(&a).unwrap();
        fs::remove_file(&b).unwrap();
        // Names that lead nowhere yet are told apart as well.
        for name in ["d/x", "d/y"] {
            assert_eq!(errno(fs::create_dir(hook.at(name))), eio);
            fs::create_dir(hook.at(name)).unwrap();
        }
        hook.recover();
    });
}

#[test]
fn counts_per_file_outlive_what_the_kernel_remembers() {
    both(|hook| {
        fs::write(hook.at("f"), "x").unwrap();
        hook.inject(&["errno=EIO op=open path=f times=1 per=file"]);
        assert_eq!(errno(File::open(hook.at("f"))), Some(libc::EIO));
        for _ in 0..2 {
            forget_everything(hook);
            File::open(hook.at("f")).unwrap();
        }
        hook.recover();
    });
}

#[test]
fn the_same_seed_decides_the_same_for_each_file_whichever_comes_first() {
    let fails = |hook: &Hook, names: &[&str]| {
        hook.inject(&["errno=EIO op=open path=f-* percent=50 after=0 per=file"]);
        let mut failed: Vec<String> = names
            .iter()
            .filter(|name| File::open(hook.at(name)).is_err())
            .map(|name| (*name).to_owned())
            .collect();
        hook.recover();
        failed.sort();
        failed
    };
    with(Kind::Ext4, Options::default(), |hook| {
        let names: Vec<String> = (0..16).map(|number| format!("f-{number}")).collect();
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        for name in &names {
            fs::write(hook.behind(name), "x").unwrap();
        }
        let first = fails(hook, &names);
        assert!(!first.is_empty() && first.len() < names.len(), "{first:?}");
        forget_everything(hook);
        names.reverse();
        assert_eq!(fails(hook, &names), first);
    });
}

/// Counts how often it is told of misfits.
struct Told(AtomicUsize);

impl Callers for Told {
    fn in_scope(&self, _tid: Tid) -> bool {
        true
    }

    fn facts(&self, tid: Tid) -> CallerFacts {
        Everybody.facts(tid)
    }

    fn misfits(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn an_open_file_that_comes_under_a_data_rule_by_its_name_is_told_of() {
    use rustix::fs::RenameFlags;
    let callers = Arc::new(Told(AtomicUsize::new(0)));
    let options = Options {
        callers: Arc::clone(&callers) as Arc<dyn Callers>,
        ..Options::default()
    };
    with(Kind::Ext4, options, |hook| {
        let told = || callers.0.swap(0, Ordering::SeqCst) > 0;
        let at = |name: &str| hook.at(name);
        fs::create_dir_all(at("d/e")).unwrap();
        let (file, deep) = (read_write(&at("new.tmp")), read_write(&at("d/e/f")));
        let nameless = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(&hook.front)
            .unwrap();
        let misfits = |files: &[&File]| {
            let mut have = hook.mirror.misfits();
            have.sort_by_key(|handle| handle.number());
            let mut want: Vec<_> = files
                .iter()
                .map(|file| hook.mirror.identify(file.as_fd()).unwrap().handle.unwrap())
                .collect();
            want.sort_by_key(|handle| handle.number());
            assert_eq!(have, want);
        };
        fs::rename(at("new.tmp"), at("current.log")).unwrap();
        fs::rename(at("current.log"), at("new.tmp")).unwrap();
        assert!(!told(), "there are no rules");
        hook.inject(&["errno=EIO op=fsync path=current.log"]);
        fs::rename(at("new.tmp"), at("current.log")).unwrap();
        fs::rename(at("current.log"), at("new.tmp")).unwrap();
        assert!(!told(), "the rule is not about data");
        hook.recover();

        hook.inject(&["errno=EIO op=write path=current.log,logs/**"]);
        fs::rename(at("new.tmp"), at("other.tmp")).unwrap();
        assert!(!told(), "no rule is for this name");
        fs::rename(at("other.tmp"), at("current.log")).unwrap();
        assert!(told());
        misfits(&[&file]);
        fs::rename(at("current.log"), at("new.tmp")).unwrap();
        misfits(&[]);

        fs::rename(at("d"), at("logs")).unwrap();
        assert!(told(), "a directory above it has another name");
        misfits(&[&deep]);
        fs::rename(at("logs"), at("d")).unwrap();
        misfits(&[]);

        fs::write(at("current.log"), "").unwrap();
        assert!(!told());
        rustix::fs::renameat_with(
            CWD,
            at("new.tmp"),
            CWD,
            at("current.log"),
            RenameFlags::EXCHANGE,
        )
        .unwrap();
        assert!(told(), "exchanged");
        misfits(&[&file]);
        fs::rename(at("current.log"), at("old.log")).unwrap();
        misfits(&[]);
        told();

        let by_number = format!("/proc/self/fd/{}", nameless.as_raw_fd());
        rustix::fs::linkat(
            CWD,
            by_number,
            CWD,
            at("current.log"),
            AtFlags::SYMLINK_FOLLOW,
        )
        .unwrap();
        assert!(told(), "linked for the first time");
        misfits(&[&nameless]);

        // What is opened from now on fits.
        let again = read_write(&at("current.log"));
        assert_eq!(errno(again.write_at(b"x", 0)), Some(libc::EIO));
        misfits(&[&nameless]);
        let again = File::from(hook.mirror.reopen_stand_in(nameless.as_fd()).unwrap());
        drop(nameless);
        assert_eq!(errno(again.write_at(b"x", 0)), Some(libc::EIO));
        hook.recover();
    });
}

/// Files are opened while their name changes to and fro: whichever comes first, none of them bypasses the rule untold.
#[test]
fn an_open_that_races_with_a_rename_is_told_of_or_fits() {
    let callers = Arc::new(Told(AtomicUsize::new(0)));
    let options = Options {
        callers: Arc::clone(&callers) as Arc<dyn Callers>,
        ..Options::default()
    };
    with(Kind::Tmpfs, options, |hook| {
        let (plain, ruled) = (hook.at("plain"), hook.at("ruled"));
        fs::write(&plain, "x").unwrap();
        hook.inject(&["errno=EIO op=write path=ruled"]);
        for _ in 0..300 {
            callers.0.store(0, Ordering::SeqCst);
            std::thread::scope(|threads| {
                // By number, so that the open never comes too late for the name.
                let found = rustix::fs::open(&plain, OFlags::PATH, Mode::empty()).unwrap();
                let path = format!("/proc/self/fd/{}", found.as_raw_fd());
                let opening =
                    threads.spawn(move || OpenOptions::new().write(true).open(path).unwrap());
                fs::rename(&plain, &ruled).unwrap();
                let file = opening.join().unwrap();
                assert!(
                    hook.mirror.misfits().is_empty() || callers.0.load(Ordering::SeqCst) > 0,
                    "untold"
                );
                drop(file);
            });
            fs::rename(&ruled, &plain).unwrap();
        }
        hook.recover();
    });
}
