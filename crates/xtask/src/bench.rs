//! `cargo xtask bench`: figures that anyone can measure again.
//!
//! Owns what is measured and how it is printed. Invariant: the target measures itself, by reading the clock all the while, and
//! what the same loop sees on the same machine without Hobble is measured next to each run and taken off.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use serde_json::{Value, json};

use crate::tools;

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// How long attaching and recovering stop the target
    Pause(Pause),
}

/// How much of it.
#[derive(Args)]
pub(crate) struct Pause {
    /// Runs of each case; medians are printed
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Numbers of descriptors
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 5000])]
    descriptors: Vec<u32>,
    /// Print JSON only
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Pause(options) => pause(options),
    }
}

/// One case: its name and the target's command line.
struct Case {
    name: String,
    program: Program,
    arguments: Vec<String>,
}

fn cases(options: &Pause) -> Vec<Case> {
    let mut cases: Vec<Case> = options
        .descriptors
        .iter()
        .map(|count| Case {
            name: format!("{count} descriptors"),
            program: Program::FilesC,
            arguments: [&count.to_string(), "1", "spin", "idle"]
                .map(str::to_owned)
                .to_vec(),
        })
        .collect();
    cases.push(Case {
        name: "1000 POSIX locks".to_owned(),
        program: Program::Locks,
        arguments: vec!["1000".to_owned()],
    });
    cases.push(Case {
        name: "500 dirty private mappings".to_owned(),
        program: Program::Maps,
        arguments: ["1024", "500", "spin"].map(str::to_owned).to_vec(),
    });
    cases
}

/// One run, all in microseconds.
struct Sample {
    native: u64,
    attach: u64,
    recover: u64,
    attach_reported: u64,
    recover_reported: u64,
}

fn pause(options: &Pause) -> Result<()> {
    let binary = tools::hobble(true)?;
    let namespace = Namespace::enter()?;
    let mut rows = Vec::new();
    if !options.json {
        println!(
            "longest stop as the target measures it, above the same loop without Hobble; medians of {} in ms",
            options.runs
        );
        println!(
            "{:<28} {:>8} {:>8} {:>8} {:>12} {:>12}",
            "", "native", "attach", "recover", "attach said", "recover said"
        );
    }
    for case in cases(options) {
        let samples: Vec<Sample> = (0..options.runs)
            .map(|_| sample(&namespace, &binary, &case))
            .collect::<Result<_>>()
            .with_context(|| case.name.clone())?;
        let row = row(&case.name, &samples);
        if !options.json {
            let ms = |key: &str| row.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN) / 1000.0;
            println!(
                "{:<28} {:>8.2} {:>8.2} {:>8.2} {:>12.2} {:>12.2}",
                case.name,
                ms("native_us"),
                ms("attach_us"),
                ms("recover_us"),
                ms("attach_reported_us"),
                ms("recover_reported_us")
            );
        }
        rows.push(row);
    }
    println!(
        "{}",
        json!({ "bench": "pause", "runs": options.runs, "cases": rows })
    );
    Ok(())
}

fn row(name: &str, samples: &[Sample]) -> Value {
    let median = |of: &dyn Fn(&Sample) -> u64| {
        let mut values: Vec<u64> = samples.iter().map(of).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let most = |of: &dyn Fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
    let above_attach = |sample: &Sample| sample.attach.saturating_sub(sample.native);
    let above_recover = |sample: &Sample| sample.recover.saturating_sub(sample.native);
    json!({
        "case": name,
        "native_us": median(&|sample| sample.native),
        "attach_us": median(&above_attach),
        "attach_max_us": most(&above_attach),
        "recover_us": median(&above_recover),
        "recover_max_us": most(&above_recover),
        "attach_reported_us": median(&|sample| sample.attach_reported),
        "recover_reported_us": median(&|sample| sample.recover_reported),
    })
}

fn sample(namespace: &Namespace, binary: &std::path::Path, case: &Case) -> Result<Sample> {
    let volume = Volume::new(namespace, Kind::Ext4)?;
    let hobble = Hobble::with_binary(binary)?;
    let mut arguments = vec![text(volume.path())?.to_owned()];
    arguments.extend(case.arguments.iter().cloned());
    let mut target = Target::start(case.program, &arguments)?;
    // Long enough to see what the machine does to any busy loop.
    thread::sleep(Duration::from_millis(300));
    target.expect("reset")?;
    thread::sleep(Duration::from_secs(1));
    let native = number(&target.expect("report")?, "gap_us")?;
    target.expect("reset")?;
    let mut injection = hobble.attach(target.pid(), volume.path(), &["--no-rules"])?;
    let attach = number(&target.expect("report")?, "gap_us")?;
    let attach_reported = number(
        &injection.wait_event("attached", Duration::from_secs(1))?,
        "pause_us",
    )?;
    // The stop is over: this only keeps what follows it out of the next figure.
    thread::sleep(Duration::from_millis(200));
    target.expect("reset")?;
    let recovered = injection.recover()?;
    let recover = number(&target.expect("report")?, "gap_us")?;
    target.expect("check")?;
    target.finish()?;
    drop(hobble);
    volume.close()?;
    Ok(Sample {
        native,
        attach,
        recover,
        attach_reported,
        recover_reported: number(&recovered, "pause_us")?,
    })
}
