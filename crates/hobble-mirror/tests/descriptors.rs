//! How many descriptors moving costs. In a program of its own, because they are counted for the whole process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};

use hobble_mirror::adopt::Adoption;
use hobble_testkit::volume::Kind;
use support::{Options, with};

#[test]
fn a_thousand_stand_ins_cost_one_descriptor_each() {
    with(Kind::Ext4, Options::default(), |hook| {
        let mut stand_ins: Vec<OwnedFd> = Vec::new();
        let count = || fs::read_dir("/proc/self/fd").unwrap().count();
        let originals: Vec<File> = (0..1000)
            .map(|number| File::create(hook.behind(number.to_string())).unwrap())
            .collect();
        let before = count();
        for (number, original) in originals.into_iter().enumerate() {
            let facts = Adoption {
                path: number.to_string().into_bytes(),
                ..Adoption::default()
            };
            let id = hook
                .mirror
                .adopt(std::os::fd::OwnedFd::from(original), facts)
                .unwrap();
            stand_ins.push(hook.mirror.stand_in(hook.mount.as_fd(), id).unwrap());
        }
        // The originals were there before; what is new are the stand-ins, which end up in the target.
        let extra = count() - before - stand_ins.len();
        assert!(extra < 16, "{extra} descriptors more");
    });
}
