//! Descriptors that move to the hook and back: stand-ins for what has a name, for what has none, and the originals in return.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hobble_mirror::adopt::{AdoptedId, Adoption};
use hobble_mirror::locks::Class;
use hobble_testkit::volume::Kind;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use support::{Hook, Options, with};

const KINDS: [Kind; 4] = [Kind::Ext4, Kind::Tmpfs, Kind::Xfs, Kind::Overlay];

fn everywhere(body: impl Fn(&Hook)) {
    for kind in KINDS {
        with(kind, Options::default(), &body);
    }
    with(Kind::Ext4, Options::without_passthrough(), &body);
}

fn adopt(hook: &Hook, original: impl AsFd, path: &str) -> AdoptedId {
    let facts = Adoption {
        path: path.as_bytes().to_vec(),
        ..Adoption::default()
    };
    hook.mirror
        .adopt(original.as_fd().try_clone_to_owned().unwrap(), facts)
        .unwrap()
}

fn shown(fd: impl AsFd) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap()
}

fn stand_in(hook: &Hook, id: AdoptedId) -> File {
    let fd = hook.mirror.stand_in(hook.mount.as_fd(), id).unwrap();
    let hooked = rustix::fs::fstat(&fd).unwrap().st_dev;
    assert_eq!(
        hooked,
        rustix::fs::stat(&hook.front).unwrap().st_dev,
        "a stand-in is on the hook"
    );
    File::from(fd)
}

fn same_description(one: impl AsFd, other: impl AsFd) -> bool {
    // Two descriptors of one description share a position.
    let (one, other) = (one.as_fd(), other.as_fd());
    let before = rustix::fs::tell(other).unwrap();
    rustix::fs::seek(one, rustix::fs::SeekFrom::Start(before + 17)).unwrap();
    let moved = rustix::fs::tell(other).unwrap() == before + 17;
    rustix::fs::seek(one, rustix::fs::SeekFrom::Start(before)).unwrap();
    moved
}

#[test]
fn a_file_with_a_name_is_stood_in_for_with_its_flags() {
    everywhere(|hook| {
        fs::create_dir(hook.behind("d")).unwrap();
        for flags in [
            0,
            libc::O_APPEND,
            libc::O_NOATIME,
            libc::O_SYNC,
            libc::O_DSYNC,
            libc::O_NONBLOCK,
            libc::O_APPEND | libc::O_DSYNC,
        ] {
            let original = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(flags)
                .open(hook.behind("d/f"))
                .unwrap();
            let id = adopt(hook, &original, "d/f");
            let file = stand_in(hook, id);
            let mask = OFlags::ACCMODE
                | OFlags::APPEND
                | OFlags::NOATIME
                | OFlags::SYNC
                | OFlags::DSYNC
                | OFlags::NONBLOCK;
            let (have, want) = (
                rustix::fs::fcntl_getfl(&file).unwrap() & mask,
                rustix::fs::fcntl_getfl(&original).unwrap() & mask,
            );
            assert_eq!(have, want);
            assert_eq!(
                file.metadata().unwrap().ino(),
                original.metadata().unwrap().ino()
            );
            assert_eq!(shown(&file), hook.at("d/f"));
            (&file).write_all(b"through").unwrap();
            let info = hook.mirror.identify(file.as_fd()).unwrap();
            assert_eq!((info.adopted, info.class), (Some(id), Class::Moved));
            let back = hook.mirror.give_back(&info).unwrap();
            assert!(
                same_description(&back, &original),
                "the original itself comes back"
            );
            drop(file);
            fs::remove_file(hook.behind("d/f")).unwrap();
        }
        for (read, write) in [(true, false), (false, true)] {
            fs::write(hook.behind("g"), "x").unwrap();
            let original = OpenOptions::new()
                .read(read)
                .write(write)
                .open(hook.behind("g"))
                .unwrap();
            let file = stand_in(hook, adopt(hook, &original, "g"));
            assert_eq!(file.read_at(&mut [0], 0).is_ok(), read);
            assert_eq!(file.write_at(b"y", 0).is_ok(), write);
        }
    });
}

/// In passthrough the server hears of no `F_SETFL`, so the shared description is as it was when the file was moved.
#[test]
fn a_file_reopened_for_the_rules_has_the_flags_of_its_program() {
    everywhere(|hook| {
        fs::write(hook.behind("f"), "0123456789").unwrap();
        let original = OpenOptions::new()
            .read(true)
            .append(true)
            .open(hook.behind("f"))
            .unwrap();
        let file = stand_in(hook, adopt(hook, &original, "f"));
        let appending = rustix::fs::fcntl_getfl(&file).unwrap();
        rustix::fs::fcntl_setfl(&file, appending.difference(OFlags::APPEND)).unwrap();
        hook.inject(&["errno=EIO op=write path=f percent=0"]);
        let again = File::from(hook.mirror.reopen_stand_in(file.as_fd()).unwrap());
        again.write_all_at(b"abc", 0).unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"abc3456789");
        rustix::fs::fcntl_setfl(&again, appending).unwrap();
        (&again).write_all(b"def").unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"abc3456789def");
        drop((file, again, original));
        hook.recover();
        fs::remove_file(hook.behind("f")).unwrap();
    });
}

/// `F_GETFL` shows O_TMPFILE for as long as the file is open, and O_DIRECTORY is a part of that.
#[test]
fn a_nameless_file_that_got_a_name_is_stood_in_for_and_opened_again() {
    everywhere(|hook| {
        let nameless = |directory: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .open(directory)
                .unwrap()
        };
        let name = |file: &File, path: PathBuf| {
            let number = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::linkat(CWD, number, CWD, path, AtFlags::SYMLINK_FOLLOW).unwrap();
        };
        let original = nameless(&hook.back);
        name(&original, hook.behind("f"));
        let file = stand_in(hook, adopt(hook, &original, "f"));
        file.write_all_at(b"abc", 0).unwrap();

        let opened = nameless(&hook.front);
        let again = File::from(hook.mirror.reopen_stand_in(opened.as_fd()).unwrap());
        again.write_all_at(b"def", 0).unwrap();
        name(&opened, hook.at("g"));
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"abc");
        assert_eq!(fs::read(hook.behind("g")).unwrap(), b"def");
    });
}

#[test]
fn an_unlinked_file_is_stood_in_for_and_shown_as_deleted() {
    everywhere(|hook| {
        fs::create_dir(hook.behind("d")).unwrap();
        let original = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(hook.behind("d/gone"))
            .unwrap();
        original.write_all_at(b"still here", 0).unwrap();
        fs::remove_file(hook.behind("d/gone")).unwrap();
        let facts = Adoption {
            path: b"d/gone".to_vec(),
            deleted: true,
            ..Adoption::default()
        };
        let id = hook
            .mirror
            .adopt(
                std::os::fd::OwnedFd::from(original.try_clone().unwrap()),
                facts,
            )
            .unwrap();
        let mut file = stand_in(hook, id);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here");
        assert_eq!(
            shown(&file),
            Path::new(&format!("{} (deleted)", hook.at("d/gone").display()))
        );
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        assert!(!hook.at("d/gone").exists(), "nobody else sees the name");
        assert_eq!(fs::read_dir(hook.at("d")).unwrap().count(), 0);
        file.write_all_at(b"and written", 0).unwrap();
        file.set_len(3).unwrap();
        file.sync_all().unwrap();
        assert_eq!(original.metadata().unwrap().len(), 3);
    });
}

#[test]
fn a_name_that_is_somebody_elses_by_now_is_left_alone() {
    everywhere(|hook| {
        let original = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(hook.behind("f"))
            .unwrap();
        original.write_all_at(b"old", 0).unwrap();
        fs::rename(hook.behind("f"), hook.behind("moved")).unwrap();
        fs::write(hook.behind("f"), "new").unwrap();
        assert_eq!(fs::read(hook.at("f")).unwrap(), b"new");
        let other = File::open(hook.at("f")).unwrap();
        let file = stand_in(hook, adopt(hook, &original, "f"));
        let mut text = [0; 3];
        file.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"old");
        assert_eq!(fs::read(hook.at("f")).unwrap(), b"new");
        assert_eq!(shown(&other), hook.at("f"));
        assert_eq!(fs::read(hook.at("moved")).unwrap(), b"old");
        assert_eq!(
            file.metadata().unwrap().ino(),
            fs::metadata(hook.at("moved")).unwrap().ino()
        );
    });
}

#[test]
fn a_nameless_temporary_file_can_still_be_linked() {
    for kind in [Kind::Ext4, Kind::Tmpfs, Kind::Xfs] {
        with(kind, Options::default(), |hook| {
            let mode = Mode::RUSR | Mode::WUSR;
            let original = File::from(
                rustix::fs::openat(CWD, &hook.back, OFlags::TMPFILE | OFlags::RDWR, mode).unwrap(),
            );
            original.write_all_at(b"nameless", 0).unwrap();
            let facts = Adoption {
                path: b"#12".to_vec(),
                deleted: true,
                tmpfile: true,
                ..Adoption::default()
            };
            let id = hook
                .mirror
                .adopt(
                    std::os::fd::OwnedFd::from(original.try_clone().unwrap()),
                    facts,
                )
                .unwrap();
            let file = stand_in(hook, id);
            assert_eq!(file.metadata().unwrap().nlink(), 0);
            assert!(shown(&file).to_string_lossy().ends_with("(deleted)"));
            rustix::fs::linkat(&file, c"", CWD, hook.at("named"), AtFlags::EMPTY_PATH).unwrap();
            assert_eq!(fs::read(hook.behind("named")).unwrap(), b"nameless");
            assert_eq!(
                fs::metadata(hook.at("named")).unwrap().ino(),
                file.metadata().unwrap().ino()
            );
        });
    }
}

#[test]
fn directories_are_stood_in_for_open_by_path_and_deleted() {
    everywhere(|hook| {
        fs::create_dir_all(hook.behind("d/sub")).unwrap();
        fs::write(hook.behind("d/f"), "x").unwrap();
        let open = |flags| {
            rustix::fs::open(hook.behind("d"), flags | OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let listed = stand_in(hook, adopt(hook, open(OFlags::RDONLY), "d"));
        assert_eq!(shown(&listed), hook.at("d"));
        let names: Vec<_> = rustix::fs::Dir::read_from(&listed)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_owned())
            .collect();
        assert_eq!(names.len(), 4, "{names:?}");

        let path = stand_in(hook, adopt(hook, open(OFlags::PATH), "d"));
        assert!(
            rustix::fs::fcntl_getfl(&path)
                .unwrap()
                .contains(OFlags::PATH)
        );
        rustix::fs::openat(&path, c"f", OFlags::RDONLY, Mode::empty()).unwrap();
        let info = hook.mirror.identify(path.as_fd()).unwrap();
        assert_eq!(info.handle, None);
        let back = hook.mirror.give_back(&info).unwrap();
        let native = rustix::fs::stat(hook.behind("d")).unwrap();
        assert_eq!(
            (
                rustix::fs::fstat(&back).unwrap().st_dev,
                rustix::fs::fstat(&back).unwrap().st_ino
            ),
            (native.st_dev, native.st_ino)
        );
        assert_eq!(shown(&back), hook.behind("d"));

        let gone = rustix::fs::open(
            hook.behind("d/sub"),
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        fs::remove_dir(hook.behind("d/sub")).unwrap();
        let facts = Adoption {
            path: b"d/sub".to_vec(),
            deleted: true,
            ..Adoption::default()
        };
        let id = hook.mirror.adopt(gone, facts).unwrap();
        let gone = stand_in(hook, id);
        assert_eq!(
            shown(&gone),
            Path::new(&format!("{} (deleted)", hook.at("d/sub").display()))
        );
        let made = rustix::fs::openat(&gone, c"x", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR);
        assert_eq!(made.unwrap_err(), rustix::io::Errno::NOENT);
    });
}

#[test]
fn the_root_of_the_volume_is_stood_in_for() {
    everywhere(|hook| {
        let root =
            rustix::fs::open(&hook.back, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let root = stand_in(hook, adopt(hook, root, ""));
        assert_eq!(shown(&root), hook.front);
        fs::write(hook.at("x"), "x").unwrap();
        rustix::fs::openat(&root, c"x", OFlags::RDONLY, Mode::empty()).unwrap();
    });
}

#[test]
fn a_symlink_held_by_path_is_stood_in_for_as_a_symlink() {
    everywhere(|hook| {
        std::os::unix::fs::symlink("target", hook.behind("s")).unwrap();
        let original = rustix::fs::open(
            hook.behind("s"),
            OFlags::PATH | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .unwrap();
        let link = stand_in(hook, adopt(hook, original, "s"));
        assert_eq!(
            rustix::fs::readlinkat(&link, c"", Vec::new())
                .unwrap()
                .to_bytes(),
            b"target"
        );
    });
}

#[test]
fn what_was_opened_while_attached_is_given_back_as_if_opened_natively() {
    for kind in KINDS {
        with(kind, Options::default(), |hook| {
            fs::create_dir(hook.at("d")).unwrap();
            for (name, create) in [("d/made", true), ("d/found", false)] {
                if !create {
                    fs::write(hook.behind(name), "").unwrap();
                }
                let mut file = OpenOptions::new()
                    .read(true)
                    .append(true)
                    .create(create)
                    .open(hook.at(name))
                    .unwrap();
                file.write_all(b"one").unwrap();
                let info = hook.mirror.identify(file.as_fd()).unwrap();
                assert_eq!((info.adopted, info.class), (None, Class::Opened));
                let mut back = File::from(hook.mirror.give_back(&info).unwrap());
                let native = rustix::fs::stat(hook.behind(name)).unwrap();
                assert_eq!(rustix::fs::fstat(&back).unwrap().st_dev, native.st_dev);
                assert_eq!(shown(&back), hook.behind(name), "on the target's own mount");
                let flags = rustix::fs::fcntl_getfl(&back).unwrap();
                assert!(flags.contains(OFlags::APPEND) && flags & OFlags::ACCMODE == OFlags::RDWR);
                drop(file);
                back.write_all(b"two").unwrap();
                back.seek(SeekFrom::Start(0)).unwrap();
                let mut text = String::new();
                back.read_to_string(&mut text).unwrap();
                assert_eq!(text, "onetwo");
            }
        });
    }
}

#[test]
fn flags_changed_while_attached_are_those_given_back() {
    with(Kind::Ext4, Options::default(), |hook| {
        hook.inject(&["errno=EIO op=read,write percent=0"]);
        let original = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(hook.behind("f"))
            .unwrap();
        original.write_all_at(b"0123456789", 0).unwrap();
        let id = adopt(hook, &original, "f");
        let mut file = stand_in(hook, id);
        let flags = rustix::fs::fcntl_getfl(&file).unwrap();
        rustix::fs::fcntl_setfl(&file, flags | OFlags::APPEND).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"ab").unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"0123456789ab");
        let back = hook
            .mirror
            .give_back(&hook.mirror.identify(file.as_fd()).unwrap())
            .unwrap();
        assert!(
            rustix::fs::fcntl_getfl(&back)
                .unwrap()
                .contains(OFlags::APPEND)
        );
        hook.mirror
            .keep(hook.mirror.identify(file.as_fd()).unwrap().handle.unwrap())
            .unwrap();
        rustix::fs::fcntl_setfl(&file, flags).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"XY").unwrap();
        assert_eq!(fs::read(hook.behind("f")).unwrap(), b"XY23456789ab");
    });
}

#[test]
fn a_door_is_never_faulted_nor_delayed() {
    with(Kind::Ext4, Options::default(), |hook| {
        fs::create_dir(hook.behind("d")).unwrap();
        let original = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(hook.behind("d/f"))
            .unwrap();
        hook.inject(&["latency=60s errno=EIO op=lookup,getattr,open,getlk,ioctl,opendir"]);
        let id = adopt(hook, &original, "d/f");
        let file = hook.mirror.stand_in(hook.mount.as_fd(), id).unwrap();
        hook.mirror.identify(file.as_fd()).unwrap();
        hook.recover();
    });
}

#[test]
fn only_a_descriptor_of_this_mirror_is_identified() {
    with(Kind::Ext4, Options::default(), |hook| {
        let file = File::create(hook.behind("f")).unwrap();
        assert!(hook.mirror.identify(file.as_fd()).is_err());
        let path = rustix::fs::open(hook.behind("f"), OFlags::PATH, Mode::empty()).unwrap();
        assert!(hook.mirror.identify(path.as_fd()).is_err());
    });
}
