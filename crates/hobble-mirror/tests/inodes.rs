//! Many inodes, few descriptors. In a program of its own, because the limit is the process's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use hobble_testkit::volume::Kind;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Options, with};

/// Descriptors there may be.
const DESCRIPTORS: u64 = 256;

fn known(kind: Kind, directories: u32, files: u32) {
    with(kind, Options::default(), |hook| {
        for directory in 0..directories {
            let directory = hook.behind(directory.to_string());
            fs::create_dir(&directory).unwrap();
            for file in 0..files {
                File::create(directory.join(file.to_string())).unwrap();
            }
        }
        let mut inodes = 0;
        for directory in 0..directories {
            for entry in fs::read_dir(hook.at(directory.to_string())).unwrap() {
                let entry = entry.unwrap();
                let metadata = fs::symlink_metadata(entry.path()).unwrap();
                assert_eq!(metadata.ino(), std::os::unix::fs::DirEntryExt::ino(&entry));
                inodes += 1;
            }
        }
        assert_eq!(inodes, directories * files);
        // All of them still work, and so do new ones.
        for directory in (0..directories).step_by(7) {
            for file in (0..files).step_by(101) {
                let path = hook.at(directory.to_string()).join(file.to_string());
                fs::write(&path, "x").unwrap();
                assert_eq!(
                    fs::read(hook.behind(directory.to_string()).join(file.to_string())).unwrap(),
                    b"x"
                );
            }
        }
        let used = fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(used < DESCRIPTORS as usize, "{used} descriptors");
        eprintln!(
            "{kind:?}: {} nodes, {used} descriptors",
            hook.mirror.nodes()
        );
    });
}

#[test]
fn a_hundred_thousand_inodes_need_few_descriptors() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(DESCRIPTORS),
            maximum,
        },
    )
    .unwrap();
    known(Kind::Xfs, 100, 1000);
    known(Kind::Ext4, 30, 1000);
    // No file handles there: the kernel is asked to forget.
    known(Kind::Overlay, 10, 300);
}
