//! Every parser of a file in `/proc`, chosen by the first byte: `cargo fuzz run --sanitizer none proc`.
#![no_main]

use hobble_graft::proc::{cgroup, fdinfo, locks, maps, mountinfo, stat, status, syscall};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((which, text)) = data.split_first() else { return };
    let error = match which % 9 {
        0 => stat::parse(text).err(),
        1 => status::parse(text).err(),
        2 => maps::parse(text).err(),
        3 => maps::parse_smaps(text).err(),
        4 => fdinfo::parse(text).err(),
        5 => locks::parse(text).err(),
        6 => mountinfo::parse(text).err(),
        7 => cgroup::parse(text).err(),
        _ => syscall::parse(text).err(),
    };
    if let Some(error) = error {
        assert!(error.offset <= text.len());
    }
});
