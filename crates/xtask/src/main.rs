//! Everything that the workspace does beside compiling: setting a machine up, running every check, conformance against the
//! backing filesystem, benchmarks, style.
//!
//! `cargo xtask test` is what the README names and what CI runs. No step here waits without a limit.

mod bench;
mod conformance;
mod kernels;
mod setup;
mod soak;
mod style;
mod suite;
mod tools;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, test and measure Hobble")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the tests need, skipping what is there
    Setup,
    /// Set up, then run every check: format, lints, style, conformance, all tests
    Test(suite::Options),
    /// pjdfstest and fsx on ext4, natively and through `hobble exec`, with the results compared
    Conformance(conformance::Options),
    /// The end-to-end tests on Debian's kernels 6.1 and 6.12, in a virtual machine
    Kernels(kernels::Options),
    /// Attach and recover in a loop under fio, SQLite and PostgreSQL, which check every byte
    Soak(soak::Options),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Rules of the code that no compiler checks
    Style,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Setup => setup::run(),
        Task::Test(options) => suite::run(&options),
        Task::Conformance(options) => conformance::run(&options),
        Task::Kernels(options) => kernels::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Bench(bench) => bench::run(&bench),
        Task::Style => style::run(),
    }
}
