//! Files, directories and their inodes through the mirror, as on the volume itself.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hobble_mirror::Caching;
use hobble_testkit::volume::Kind;
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use support::{Hook, Options, with};

const KINDS: [Kind; 5] = [
    Kind::Ext4,
    Kind::Xfs,
    Kind::Btrfs,
    Kind::Tmpfs,
    Kind::Overlay,
];

fn everywhere(body: impl Fn(&Hook)) {
    for kind in KINDS {
        with(kind, Options::default(), &body);
    }
    with(Kind::Ext4, Options::without_passthrough(), &body);
}

fn read_write(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn sh(directory: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn inode_numbers_and_attributes_are_the_backing_ones() {
    everywhere(|hook| {
        fs::create_dir(hook.at("d")).unwrap();
        fs::write(hook.at("d/f"), "hello").unwrap();
        std::os::unix::fs::symlink("f", hook.at("d/s")).unwrap();
        rustix::fs::mknodat(CWD, hook.at("d/p"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        rustix::fs::mknodat(
            CWD,
            hook.at("d/c"),
            FileType::CharacterDevice,
            Mode::RUSR,
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        drop(std::os::unix::net::UnixListener::bind(hook.at("d/u")).unwrap());
        for name in ["", "d", "d/f", "d/s", "d/p", "d/c", "d/u"] {
            let (front, back) = (
                fs::symlink_metadata(hook.at(name)).unwrap(),
                fs::symlink_metadata(hook.behind(name)).unwrap(),
            );
            let facts = |m: &fs::Metadata| {
                (
                    m.ino(),
                    m.mode(),
                    m.nlink(),
                    m.uid(),
                    m.gid(),
                    m.size(),
                    m.blocks(),
                    m.rdev(),
                    m.mtime(),
                    m.mtime_nsec(),
                    m.ctime(),
                    m.ctime_nsec(),
                )
            };
            assert_eq!(facts(&front), facts(&back), "{name}");
        }
        assert!(
            fs::metadata(hook.at("d/c"))
                .unwrap()
                .file_type()
                .is_char_device()
        );
        let listed = |directory: &Path| {
            let mut entries: Vec<_> = fs::read_dir(directory)
                .unwrap()
                .map(|entry| {
                    let entry = entry.unwrap();
                    (
                        entry.file_name(),
                        std::os::unix::fs::DirEntryExt::ino(&entry),
                        entry.file_type().unwrap(),
                    )
                })
                .collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            entries
        };
        assert_eq!(listed(&hook.at("d")), listed(&hook.behind("d")));
        let btime = |path: &Path| fs::metadata(path).unwrap().created().ok();
        assert_eq!(btime(&hook.at("d/f")), btime(&hook.behind("d/f")));
        let (front, back) = (
            rustix::fs::statvfs(&hook.front).unwrap(),
            rustix::fs::statvfs(&hook.back).unwrap(),
        );
        assert_eq!(
            (front.f_blocks, front.f_bsize, front.f_namemax),
            (back.f_blocks, back.f_bsize, back.f_namemax)
        );
    });
}

#[test]
fn renames_of_all_kinds() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs, Kind::Tmpfs] {
        with(kind, Options::default(), |hook| {
            let write = |name: &str, text: &str| fs::write(hook.at(name), text).unwrap();
            let read = |name: &str| fs::read_to_string(hook.at(name)).unwrap();
            let rename = |from: &str, to: &str, flags| {
                rustix::fs::renameat_with(CWD, hook.at(from), CWD, hook.at(to), flags)
            };
            write("a", "A");
            write("b", "B");
            fs::create_dir(hook.at("d")).unwrap();
            write("d/x", "X");
            assert_eq!(
                rename("a", "b", RenameFlags::NOREPLACE).unwrap_err(),
                rustix::io::Errno::EXIST
            );
            rename("a", "b", RenameFlags::EXCHANGE).unwrap();
            assert_eq!((read("a"), read("b")), ("B".into(), "A".into()));
            rename("a", "d", RenameFlags::EXCHANGE).unwrap();
            assert_eq!((read("a/x"), read("d")), ("X".into(), "B".into()));
            let open = File::open(hook.at("b")).unwrap();
            rename("d", "b", RenameFlags::empty()).unwrap();
            assert_eq!(read("b"), "B");
            let mut old = String::new();
            (&open).read_to_string(&mut old).unwrap();
            assert_eq!(
                old, "A",
                "what was renamed over is still there for who has it open"
            );
            rename("b", "w", RenameFlags::WHITEOUT).unwrap();
            let whiteout = fs::symlink_metadata(hook.at("b")).unwrap();
            assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        });
    }
}

#[test]
fn a_removed_working_directory_and_unlinked_files_stay_usable() {
    everywhere(|hook| {
        fs::create_dir(hook.at("d")).unwrap();
        let directory = rustix::fs::open(
            hook.at("d"),
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        let file = read_write(&hook.at("f"));
        let path = rustix::fs::open(hook.at("f"), OFlags::PATH, Mode::empty()).unwrap();
        let only_path = {
            fs::write(hook.at("g"), "x").unwrap();
            rustix::fs::open(hook.at("g"), OFlags::PATH, Mode::empty()).unwrap()
        };
        file.write_all_at(b"hello", 0).unwrap();
        for name in ["f", "g"] {
            fs::remove_file(hook.at(name)).unwrap();
        }
        fs::remove_dir(hook.at("d")).unwrap();
        // Nothing may depend on what the kernel still has cached.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        std::thread::sleep(Duration::from_millis(1100));
        assert_eq!(
            rustix::fs::fstat(&directory).unwrap().st_nlink,
            u64::from(fs::metadata(&hook.back).unwrap().nlink() == 0)
        );
        assert_eq!(rustix::fs::fstat(&path).unwrap().st_size, 5);
        assert_eq!(rustix::fs::fstat(&only_path).unwrap().st_size, 1);
        let mut text = String::new();
        File::open(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&path)
        ))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
        assert_eq!(text, "hello");
        file.set_permissions(fs::Permissions::from_mode(0o600))
            .unwrap();
        file.set_len(2).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
    });
}

#[test]
fn temporary_files_can_be_linked_or_not() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs, Kind::Tmpfs] {
        with(kind, Options::default(), |hook| {
            let make = |flags: i32| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_TMPFILE | flags)
                    .open(&hook.front)
                    .unwrap()
            };
            let file = make(0);
            file.write_all_at(b"content", 0).unwrap();
            rustix::fs::linkat(&file, c"", CWD, hook.at("named"), AtFlags::EMPTY_PATH).unwrap();
            assert_eq!(fs::read(hook.behind("named")).unwrap(), b"content");
            let exclusive = make(libc::O_EXCL);
            assert!(
                rustix::fs::linkat(&exclusive, c"", CWD, hook.at("never"), AtFlags::EMPTY_PATH)
                    .is_err()
            );
        });
    }
}

#[test]
fn allocation_holes_and_copies() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Btrfs] {
        for options in [Options::default(), Options::without_passthrough()] {
            with(kind, options, |hook| {
                let file = read_write(&hook.at("f"));
                rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
                assert_eq!(file.metadata().unwrap().len(), 1 << 20);
                rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 1 << 20).unwrap();
                assert_eq!(file.metadata().unwrap().len(), 1 << 20);
                file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
                rustix::fs::fallocate(
                    &file,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    256 << 10,
                    256 << 10,
                )
                .unwrap();
                let mut byte = [1];
                file.read_exact_at(&mut byte, 300 << 10).unwrap();
                assert_eq!(byte, [0]);
                let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap();
                let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(hole)).unwrap();
                assert_eq!((hole, data), (256 << 10, 512 << 10));
                rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096).unwrap();
                file.read_exact_at(&mut byte, 0).unwrap();
                assert_eq!(byte, [0]);
                let copy = read_write(&hook.at("copy"));
                let copied = rustix::fs::copy_file_range(
                    &file,
                    Some(&mut (512 << 10)),
                    &copy,
                    Some(&mut 0),
                    1000,
                )
                .unwrap();
                assert_eq!(copied, 1000);
                assert_eq!(fs::read(hook.behind("copy")).unwrap(), vec![7; 1000]);
            });
        }
    }
}

#[test]
fn attributes_by_ioctl_and_extended_attributes() {
    with(Kind::Ext4, Options::default(), |hook| {
        let file = read_write(&hook.at("f"));
        let flags = rustix::fs::ioctl_getflags(&file).unwrap();
        rustix::fs::ioctl_setflags(&file, flags | rustix::fs::IFlags::NODUMP).unwrap();
        let behind = File::open(hook.behind("f")).unwrap();
        assert!(
            rustix::fs::ioctl_getflags(&behind)
                .unwrap()
                .contains(rustix::fs::IFlags::NODUMP)
        );
        let shown = sh(&hook.front, "lsattr -d . && lsattr f && lsattr -v f");
        let native = sh(&hook.back, "lsattr -d . && lsattr f && lsattr -v f");
        assert_eq!(shown, native);
        assert!(
            !Command::new("fstrim")
                .arg(&hook.front)
                .output()
                .unwrap()
                .status
                .success(),
            "trimming is not for a hook"
        );
        rustix::fs::setxattr(hook.at("f"), "user.empty", b"", XattrFlags::CREATE).unwrap();
        assert_eq!(
            rustix::fs::getxattr(hook.at("f"), "user.empty", &mut [0; 4][..]).unwrap(),
            0
        );
        let large = vec![b'v'; 3000];
        rustix::fs::setxattr(hook.at("f"), "user.large", &large, XattrFlags::empty()).unwrap();
        let mut read = vec![0; 3000];
        assert_eq!(
            rustix::fs::getxattr(hook.behind("f"), "user.large", &mut read[..]).unwrap(),
            3000
        );
        assert_eq!(
            rustix::fs::getxattr(hook.at("f"), "user.large", &mut [0; 10][..]).unwrap_err(),
            rustix::io::Errno::RANGE
        );
        assert_eq!(
            rustix::fs::setxattr(hook.at("f"), "user.large", b"", XattrFlags::CREATE).unwrap_err(),
            rustix::io::Errno::EXIST
        );
        rustix::fs::removexattr(hook.at("f"), "user.large").unwrap();
        assert_eq!(
            rustix::fs::getxattr(hook.at("f"), "user.large", &mut [0; 10][..]).unwrap_err(),
            rustix::io::Errno::NODATA
        );
    });
}

/// Rewinding and seeking in the middle of listings gives every name once, however large the directory.
#[test]
fn a_large_directory_is_listed_completely() {
    everywhere(|hook| {
        let names: HashSet<String> = (0..5000)
            .map(|number| format!("a-rather-long-name-{number}"))
            .collect();
        fs::create_dir(hook.behind("d")).unwrap();
        for name in &names {
            File::create(hook.behind("d").join(name)).unwrap();
        }
        let list = || -> Vec<String> {
            fs::read_dir(hook.at("d"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        for _ in 0..2 {
            let listed = list();
            assert_eq!(listed.len(), names.len());
            assert_eq!(listed.into_iter().collect::<HashSet<_>>(), names);
        }
        let open = rustix::fs::open(
            hook.at("d"),
            OFlags::RDONLY | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        let mut directory = rustix::fs::Dir::new(open).unwrap();
        let mut all: Vec<(String, i64)> = Vec::new();
        while let Some(entry) = directory.read() {
            let entry = entry.unwrap();
            all.push((
                entry.file_name().to_string_lossy().into_owned(),
                entry.offset(),
            ));
        }
        for place in [10, 1234, 4000] {
            directory.seek(all[place].1).unwrap();
            let next = directory.read().unwrap().unwrap();
            assert_eq!(next.file_name().to_string_lossy(), all[place + 1].0);
        }
    });
}

#[test]
fn reads_and_writes_without_rules_never_come_to_the_server() {
    with(Kind::Ext4, Options::default(), |hook| {
        let file = read_write(&hook.at("f"));
        let mut buffer = vec![1; 4096];
        let before = hook.metrics().requests;
        for number in 0..1000_u64 {
            file.write_all_at(&buffer, number % 64 * 4096).unwrap();
            file.read_exact_at(&mut buffer, number % 64 * 4096).unwrap();
        }
        let after = hook.metrics().requests;
        assert!(after - before < 20, "{} requests", after - before);
    });
}

#[test]
fn both_sides_and_mappings_see_each_others_data_and_sizes() {
    for (options, intercepted) in [(Options::default(), false), (Options::default(), true)] {
        with(
            Kind::Ext4,
            Options {
                caching: Caching::NONE,
                ..options
            },
            |hook| {
                if intercepted {
                    hook.inject(&["errno=EIO op=read,write percent=0"]);
                }
                let (front, back) = (read_write(&hook.at("f")), read_write(&hook.behind("f")));
                let mut seen = [0; 5];
                for (writer, reader) in [(&front, &back), (&back, &front)] {
                    for text in [b"first", b"again"] {
                        writer.write_all_at(text, 0).unwrap();
                        reader.read_exact_at(&mut seen, 0).unwrap();
                        assert_eq!(&seen, text);
                    }
                }
                let mut end = 5;
                for _ in 0..20 {
                    back.write_all_at(b"x", end).unwrap();
                    end += 1;
                    assert_eq!((&front).seek(SeekFrom::End(0)).unwrap(), end);
                    let mut appender = OpenOptions::new().append(true).open(hook.at("f")).unwrap();
                    appender.write_all(b"yy").unwrap();
                    end += 2;
                    assert_eq!(fs::metadata(hook.behind("f")).unwrap().len(), end);
                    assert_eq!(fs::metadata(hook.at("f")).unwrap().len(), end);
                }
                let script = "
import mmap, os, sys, time
front = os.open(sys.argv[1], os.O_RDWR)
back = os.open(sys.argv[2], os.O_RDWR)
os.ftruncate(front, 8192)
mapped = mmap.mmap(front, 8192)
before = os.stat(sys.argv[1]).st_mtime_ns
time.sleep(0.02)
mapped[4096:4101] = b'store'
assert os.pread(back, 5, 4096) == b'store'
os.pwrite(back, b'other', 100)
assert mapped[100:105] == b'other'
os.pwrite(front, b'third', 200)
assert mapped[200:205] == b'third'
mapped.flush()
assert os.stat(sys.argv[1]).st_mtime_ns > before
assert os.stat(sys.argv[1]).st_mtime_ns == os.stat(sys.argv[2]).st_mtime_ns
os.close(front)
mapped[0:5] = b'after'
assert os.pread(back, 5, 0) == b'after'
";
                let output = Command::new("python3")
                    .args(["-c", script])
                    .arg(hook.at("f"))
                    .arg(hook.behind("f"))
                    .output()
                    .unwrap();
                assert!(
                    output.status.success(),
                    "intercepted {intercepted}: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            },
        );
    }
}

/// Pages stay cached from one open to the next, as long as the file is what it was.
#[test]
fn without_passthrough_what_was_read_before_is_read_from_the_cache() {
    with(Kind::Ext4, Options::without_passthrough(), |hook| {
        fs::write(hook.behind("f"), vec![1; 1 << 20]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let read = || {
            let before = hook.metrics().requests;
            let data = fs::read(hook.at("f")).unwrap();
            (data, hook.metrics().requests - before)
        };
        let (first, cost) = read();
        assert!(cost > 4, "{cost} requests");
        std::thread::sleep(Duration::from_millis(20));
        let (again, cost_again) = read();
        assert_eq!(first, again);
        assert!(cost_again < cost, "{cost_again} requests, {cost} before");
        fs::write(hook.behind("f"), vec![2; 1 << 20]).unwrap();
        assert_eq!(read().0, vec![2; 1 << 20]);
    });
}

/// With attributes cached, too: a file that may be mapped for writing is asked about every time.
#[test]
fn the_times_of_a_file_that_may_be_mapped_are_never_stale() {
    with(
        Kind::Ext4,
        Options {
            caching: Caching {
                entry: Duration::from_secs(60),
                attr: Duration::from_secs(60),
            },
            ..Options::default()
        },
        |hook| {
            let file = read_write(&hook.at("f"));
            file.set_len(4096).unwrap();
            let before = fs::metadata(hook.at("f")).unwrap().len();
            let back = read_write(&hook.behind("f"));
            back.set_len(10_000).unwrap();
            assert_ne!(fs::metadata(hook.at("f")).unwrap().len(), before);
            // One that was only ever read may be stale, for as long as the caching says.
            fs::write(hook.behind("g"), "x").unwrap();
            assert_eq!(fs::metadata(hook.at("g")).unwrap().len(), 1);
            fs::write(hook.behind("g"), "xyz").unwrap();
            assert_eq!(fs::metadata(hook.at("g")).unwrap().len(), 1);
        },
    );
}

#[test]
fn what_happens_behind_the_hook_is_seen_in_time() {
    let caching = Caching {
        entry: Duration::from_millis(100),
        attr: Duration::from_millis(100),
    };
    with(
        Kind::Ext4,
        Options {
            caching,
            ..Options::default()
        },
        |hook| {
            fs::create_dir(hook.at("d")).unwrap();
            fs::write(hook.at("d/f"), "x").unwrap();
            fs::remove_dir_all(hook.behind("d")).unwrap();
            fs::create_dir(hook.behind("d")).unwrap();
            fs::write(hook.behind("d/f"), "new").unwrap();
            let begun = Instant::now();
            while fs::read(hook.at("d/f")).ok().as_deref() != Some(b"new") {
                assert!(begun.elapsed() < Duration::from_secs(2));
            }
        },
    );
}

/// A number that the backing filesystem uses again is another file.
#[test]
fn a_number_used_again_is_another_inode() {
    for kind in [Kind::Ext4, Kind::Tmpfs] {
        with(
            kind,
            Options {
                caching: Caching {
                    entry: Duration::from_secs(60),
                    attr: Duration::from_secs(60),
                },
                ..Options::default()
            },
            |hook| {
                for round in 0..200 {
                    let name = format!("f{round}");
                    let text = format!("text {round}");
                    fs::write(hook.behind(&name), &text).unwrap();
                    assert_eq!(fs::read_to_string(hook.at(&name)).unwrap(), text);
                    assert_eq!(
                        fs::metadata(hook.at(&name)).unwrap().len() as usize,
                        text.len()
                    );
                    fs::remove_file(hook.behind(&name)).unwrap();
                }
            },
        );
    }
}

#[test]
fn subvolumes_do_not_share_inode_numbers() {
    with(Kind::Btrfs, Options::default(), |hook| {
        sh(
            &hook.back,
            "btrfs -q subvolume create one && btrfs -q subvolume create two && echo 1 > one/f && echo 2 > two/f",
        );
        let numbers: HashSet<u64> = ["", "one", "two", "one/f", "two/f"]
            .iter()
            .map(|name| fs::metadata(hook.at(name)).unwrap().ino())
            .collect();
        assert_eq!(numbers.len(), 5, "{numbers:?}");
        let devices: HashSet<u64> = ["", "one", "two"]
            .iter()
            .map(|name| fs::metadata(hook.at(name)).unwrap().dev())
            .collect();
        assert_eq!(devices.len(), 1);
        assert_eq!(
            (
                fs::read(hook.at("one/f")).unwrap(),
                fs::read(hook.at("two/f")).unwrap()
            ),
            (b"1\n".to_vec(), b"2\n".to_vec())
        );
        for name in ["one", "two"] {
            let listed = fs::read_dir(hook.at(name))
                .unwrap()
                .next()
                .unwrap()
                .unwrap();
            assert_eq!(
                std::os::unix::fs::DirEntryExt::ino(&listed),
                fs::metadata(listed.path()).unwrap().ino()
            );
        }
    });
}

#[test]
fn what_a_mount_below_the_volume_covers_is_what_is_served() {
    use hobble_testkit::namespace::Namespace;
    use hobble_testkit::volume::Volume;
    let namespace = Namespace::enter().unwrap();
    let volume = Volume::new(&namespace, Kind::Ext4).unwrap();
    let back = volume.directory("back").unwrap();
    fs::create_dir(back.join("m")).unwrap();
    fs::write(back.join("m/covered"), "x").unwrap();
    rustix::mount::mount(
        "none",
        back.join("m"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    fs::write(back.join("m/on-top"), "x").unwrap();
    use rustix::mount::{OpenTreeFlags, open_tree};
    let clone = |flags| {
        open_tree(
            CWD,
            &back,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | flags,
        )
        .unwrap()
    };
    for root in [
        None,
        Some(clone(OpenTreeFlags::empty())),
        Some(clone(OpenTreeFlags::AT_RECURSIVE)),
    ] {
        let hook = Hook::new(
            &back,
            Options {
                root,
                ..Options::default()
            },
        );
        let names: Vec<_> = fs::read_dir(hook.at("m"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["covered"]);
        assert!(File::open(hook.at("m/covered")).is_ok());
        assert!(!hook.at("m/on-top").exists());
    }
    rustix::mount::unmount(back.join("m"), rustix::mount::UnmountFlags::empty()).unwrap();
}

#[test]
fn programs_run_from_the_hook_and_git_finds_nothing_wrong() {
    everywhere(|hook| {
        fs::copy("/bin/true", hook.at("true")).unwrap();
        fs::set_permissions(hook.at("true"), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Command::new(hook.at("true")).status().unwrap().success());
        let script = "git init -q r && cd r && git config user.email a@b && git config user.name n && \
            for i in 1 2 3 4 5; do for f in a b c d e f; do echo $i $f > $f; done; git add . && git commit -qm $i; done && \
            git gc -q && git fsck --strict && git clone -q . ../s && cd ../s && git log --oneline | wc -l";
        assert_eq!(sh(&hook.front, script).trim(), "5");
    });
}

/// The kernel refuses to truncate what is being executed; it must have been asked before it was done.
#[test]
fn a_running_program_is_not_truncated() {
    everywhere(|hook| {
        fs::copy("/bin/sleep", hook.at("sleep")).unwrap();
        let before = fs::metadata(hook.behind("sleep")).unwrap().len();
        let mut running = Command::new(hook.at("sleep")).arg("60").spawn().unwrap();
        for (read, write) in [(false, true), (true, true)] {
            let opened = OpenOptions::new()
                .read(read)
                .write(write)
                .open(hook.at("sleep"));
            assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
        }
        let truncated = rustix::fs::open(
            hook.at("sleep"),
            OFlags::RDONLY | OFlags::TRUNC,
            Mode::empty(),
        );
        assert_eq!(truncated.unwrap_err(), rustix::io::Errno::TXTBSY);
        assert_eq!(fs::metadata(hook.behind("sleep")).unwrap().len(), before);
        assert!(running.try_wait().unwrap().is_none());
        running.kill().unwrap();
        running.wait().unwrap();
        rustix::fs::open(
            hook.at("sleep"),
            OFlags::RDONLY | OFlags::TRUNC,
            Mode::empty(),
        )
        .unwrap();
        assert_eq!(fs::metadata(hook.behind("sleep")).unwrap().len(), 0);
    });
}

#[test]
fn nothing_is_left_known_when_the_kernel_has_forgotten() {
    with(Kind::Ext4, Options::default(), |hook| {
        for number in 0..500 {
            fs::write(hook.at(format!("f{number}")), "x").unwrap();
        }
        // Another test may have had the kernel drop its caches; what is open it cannot forget.
        let open = File::open(hook.at("f0")).unwrap();
        assert!(hook.mirror.nodes() > 1 && hook.mirror.open_files() > 0);
        drop(open);
        for number in 0..500 {
            fs::remove_file(hook.at(format!("f{number}"))).unwrap();
        }
        let begun = Instant::now();
        while hook.mirror.nodes() > 1 || hook.mirror.open_files() > 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "{} nodes, {} files",
                hook.mirror.nodes(),
                hook.mirror.open_files()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(hook.mount.as_fd().try_clone_to_owned().is_ok());
    });
}
