//! Any text as a specification: it is refused or accepted without panic; what is accepted is printed, reads back as the same, and can be asked.
//!
//! `cargo fuzz run --sanitizer none specification` in `crates/hobble-rules` (`--sanitizer none` works on stable Rust).
#![no_main]

use std::time::Duration;

use hobble_rules::{FileId, KnownCaller, Op, OpContext, Plan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok((document, experiment)) = hobble_rules::load(text) else { return };
    let printed = document.to_yaml().expect("a document that was read can be printed");
    assert_eq!(hobble_rules::parse(&printed).expect("what is printed can be read"), document, "{printed}");
    let plan = Plan::compile(&experiment, 1, None, Duration::ZERO);
    let path = plan.match_path(b"base/1/\xff.log", b"/data/base/1/\xff.log");
    let caller = KnownCaller { uid: 0, pid: Some(1), comm: None };
    for op in Op::ALL {
        let decision = plan.decide(&OpContext {
            op,
            paths: &[&path],
            caller: &caller,
            offset: Some(0),
            len: Some(4096),
            now: Duration::from_secs(1),
            file: &|| FileId(1),
        });
        let mut data = [0; 64];
        for corruption in decision.corrupt {
            corruption.apply(&mut data);
        }
    }
});
