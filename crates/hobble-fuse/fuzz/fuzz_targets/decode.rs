//! No bytes from the device may panic the decoder: `cargo fuzz run --sanitizer none decode` in `crates/hobble-fuse`.

#![no_main]

use hobble_fuse::{Creation, Features, Op, Protocol, decode};
use libfuzzer_sys::fuzz_target;

fn walk(creation: &Creation<'_>) -> usize {
    creation.groups.iter().count() + creation.security.iter().count()
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = input.to_vec();
    // The kernel's length is always right; a wrong one would end every run at the first check.
    if let (Some(len), Ok(right)) = (bytes.first_chunk_mut::<4>(), u32::try_from(input.len())) {
        *len = right.to_ne_bytes();
    }
    for features in [Features::empty(), Features::all()] {
        let protocol = Protocol { minor: 45, features };
        match decode::decode(&bytes, protocol) {
            Ok(Op::BatchForget(forgets)) => drop(forgets.iter().count()),
            Ok(Op::Removemapping(mappings)) => drop(mappings.iter().count()),
            Ok(
                Op::Mkdir { creation, .. }
                | Op::Mknod { creation, .. }
                | Op::Create { creation, .. }
                | Op::Symlink { creation, .. }
                | Op::Tmpfile { creation, .. },
            ) => drop(walk(&creation)),
            Ok(_) => {}
            Err(error) => drop(error.to_string()),
        }
    }
});
