//! The parsers against nonsense, against damaged real files, and against files written from known values.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use hobble_graft::proc::{cgroup, fdinfo, locks, maps, mountinfo, stat, status, syscall};
use proptest::prelude::*;

/// All parsers; what they answer does not matter here, that they do does.
fn parse_all(text: &[u8]) {
    let _ = stat::parse(text);
    let _ = status::parse(text);
    let _ = maps::parse(text);
    let _ = maps::parse_smaps(text);
    let _ = fdinfo::parse(text);
    let _ = locks::parse(text);
    let _ = mountinfo::parse(text);
    let _ = cgroup::parse(text);
    let _ = syscall::parse(text);
}

/// Real files of this process and host.
fn samples() -> Vec<Vec<u8>> {
    [
        "stat",
        "status",
        "maps",
        "smaps",
        "mountinfo",
        "cgroup",
        "fdinfo/0",
        "syscall",
    ]
    .iter()
    .map(|name| std::fs::read(format!("/proc/self/{name}")).unwrap())
    .chain([std::fs::read("/proc/locks").unwrap()])
    .collect()
}

/// A name as a path may hold it: any bytes but NUL and, within a component, the slash.
fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(
        prop::collection::vec((1u8..).prop_filter("slash", |b| *b != b'/'), 1..8),
        1..4,
    )
    .prop_map(|parts| {
        parts
            .iter()
            .flat_map(|part| [&b"/"[..], part].concat())
            .collect()
    })
}

/// As the kernel's `mangle_path` does it.
fn escape(text: &[u8], special: &[u8]) -> Vec<u8> {
    text.iter()
        .flat_map(|b| {
            if special.contains(b) {
                format!("\\{b:03o}").into_bytes()
            } else {
                vec![*b]
            }
        })
        .collect()
}

#[test]
fn real_files_are_understood() {
    let [a, b, c, d, e, f, g, h, i] = samples().try_into().unwrap();
    stat::parse(&a).unwrap();
    status::parse(&b).unwrap();
    maps::parse(&c).unwrap();
    maps::parse_smaps(&d).unwrap();
    mountinfo::parse(&e).unwrap();
    cgroup::parse(&f).unwrap();
    fdinfo::parse(&g).unwrap();
    syscall::parse(&h).unwrap();
    locks::parse(&i).unwrap();
}

proptest! {
    #[test]
    fn nonsense_is_an_error_and_no_panic(text in prop::collection::vec(any::<u8>(), 0..400)) {
        parse_all(&text);
    }

    #[test]
    fn damaged_files_are_an_error_and_no_panic(
        which in 0usize..9,
        at in any::<prop::sample::Index>(),
        with in prop::collection::vec(any::<u8>(), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut text = samples().swap_remove(which);
        if !text.is_empty() {
            let at = at.index(text.len());
            let end = (at + with.len()).min(text.len());
            text.splice(at..end, with);
            text.truncate(cut.index(text.len() + 1));
        }
        parse_all(&text);
    }

    #[test]
    fn errors_lie_within_the_text(text in "[0-9a-f:. /\\-()rwxps\n\t]{0,120}") {
        let text = text.as_bytes();
        let offsets = [
            stat::parse(text).err(),
            status::parse(text).err(),
            maps::parse(text).err(),
            maps::parse_smaps(text).err(),
            fdinfo::parse(text).err(),
            locks::parse(text).err(),
            mountinfo::parse(text).err(),
            cgroup::parse(text).err(),
            syscall::parse(text).err(),
        ];
        for error in offsets.into_iter().flatten() {
            prop_assert!(error.offset <= text.len(), "{error}");
        }
    }

    #[test]
    fn mounts_keep_every_byte_of_a_name(root in path(), point in path(), source in path(), ids in any::<(u32, u32, u16)>()) {
        let special = b" \t\n\\";
        let (id, parent, group) = ids;
        let text = [
            format!("{id} {parent} 8:1 ").into_bytes(),
            escape(&root, special),
            b" ".to_vec(),
            escape(&point, special),
            format!(" rw,relatime shared:{group} - ext4 ").into_bytes(),
            escape(&source, special),
            b" rw\n".to_vec(),
        ]
        .concat();
        let mounts = mountinfo::parse(&text).unwrap();
        prop_assert_eq!(mounts.len(), 1);
        let mount = &mounts[0];
        prop_assert_eq!((mount.id.0, mount.parent.0), (u64::from(id), u64::from(parent)));
        prop_assert_eq!(&mount.root, &PathBuf::from(OsString::from_vec(root)));
        prop_assert_eq!(mount.mount_point.as_os_str().as_bytes(), point.as_slice());
        prop_assert_eq!(mount.source.as_bytes(), source.as_slice());
        prop_assert_eq!(mount.propagation.peer_group, Some(u64::from(group)));
    }

    #[test]
    fn maps_are_read_as_they_were_written(
        page in 1u64..1 << 34,
        pages in 1u64..1 << 10,
        offset in any::<u32>(),
        inode in any::<u64>(),
        letters in any::<[bool; 4]>(),
        name in path().prop_filter("blanks in front are padding", |n| !n.starts_with(b"/ ")),
    ) {
        let (start, end) = (page << 12, (page + pages) << 12);
        let letter = |n: usize, yes: char, no: char| if letters[n] { yes } else { no };
        let mut text = format!(
            "{start:08x}-{end:08x} {}{}{}{} {offset:08x} fe:0a {inode}                      ",
            letter(0, 'r', '-'), letter(1, 'w', '-'), letter(2, 'x', '-'), letter(3, 's', 'p'),
        )
        .into_bytes();
        let written = escape(&name, b"\n");
        text.extend_from_slice(&written);
        text.push(b'\n');
        let entries = maps::parse(&text).unwrap();
        prop_assert_eq!(entries.len(), 1);
        let entry = &entries[0];
        prop_assert_eq!((entry.start, entry.end, entry.offset, entry.inode), (start, end, u64::from(offset), inode));
        let protection = entry.protection;
        prop_assert_eq!([protection.read, protection.write, protection.execute, entry.is_shared], letters);
        prop_assert_eq!(&entry.name, &written);
    }

    #[test]
    fn names_of_processes_hide_nothing(name in prop::collection::vec(1u8.., 0..16), start in any::<u64>(), parent in 0i32..) {
        let mut text = b"77 (".to_vec();
        text.extend_from_slice(&name);
        text.extend_from_slice(format!(") S {parent} 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9 0 {start} 1 2 3\n").as_bytes());
        let stat = stat::parse(&text).unwrap();
        prop_assert_eq!((stat.name, stat.start_time, stat.parent, stat.threads), (name, start, parent, 9));
    }
}
