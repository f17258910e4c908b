//! Generation, conformance and benchmarks.
fn main() {}
