//! The hobble command.
fn main() {}
