//! Any text as a `--fault` string: it is refused or accepted without panic, and what is accepted has a YAML form that reads back as the same.
//!
//! `cargo fuzz run --sanitizer none fault_string` in `crates/hobble-rules` (`--sanitizer none` works on stable Rust).
#![no_main]

use hobble_rules::fault_flag;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(document) = fault_flag::parse_all(&[text]) else { return };
    let printed = document.to_yaml().expect("a document that was read can be printed");
    assert_eq!(hobble_rules::parse(&printed).expect("what is printed can be read"), document, "{printed}");
    let _ = hobble_rules::check(&document);
});
