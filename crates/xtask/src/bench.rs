//! `cargo xtask bench`: figures that anyone can measure again.
//!
//! Owns what is measured, how it is printed and what it may be at most. Invariants: the target measures itself, by reading the clock all the while, and
//! what the same loop sees on the same machine without Hobble is measured next to each run and taken off; a figure comes with the load of the
//! machine that it was measured on.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use hobble_testkit::hobble::Hobble;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, number, text};
use hobble_testkit::volume::{Kind, Volume};
use serde_json::{Value, json};

use crate::tools;

/// The longest stop that is promised by number of descriptors, for attaching and recovering each (docs/specification.md): the median, above what the same
/// loop sees without Hobble, on an idle machine.
const LIMITS: &[(u32, Duration)] = &[
    (1, Duration::from_millis(3)),
    (1000, Duration::from_millis(10)),
    (5000, Duration::from_millis(40)),
    (15_000, Duration::from_millis(200)),
];

/// More runnable threads than this, averaged over the last minute (proc_loadavg(5)), and the target competes for its processor.
const IDLE_LOAD: f64 = 0.3;

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
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 5000, 15_000])]
    descriptors: Vec<u32>,
    /// Print JSON only
    #[arg(long)]
    json: bool,
    /// Fail when a median is above what is promised
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Pause(options) => pause(options),
    }
}

/// One case: its name and the target's command line.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) program: Program,
    pub(crate) arguments: Vec<String>,
    /// Most that either median may be, where something is promised.
    pub(crate) limit: Option<Duration>,
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
            limit: LIMITS
                .iter()
                .find(|(descriptors, _)| descriptors == count)
                .map(|(_, limit)| *limit),
        })
        .collect();
    cases.push(Case {
        name: "1000 POSIX locks".to_owned(),
        program: Program::Locks,
        arguments: vec!["1000".to_owned()],
        limit: None,
    });
    cases.push(Case {
        name: "500 dirty private mappings".to_owned(),
        program: Program::Maps,
        arguments: ["1024", "500", "spin"].map(str::to_owned).to_vec(),
        limit: None,
    });
    cases
}

/// One run, all in microseconds.
pub(crate) struct Sample {
    native: u64,
    attach: u64,
    recover: u64,
    attach_reported: u64,
    recover_reported: u64,
}

/// The load average over the last minute.
fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    text.split_ascii_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .with_context(|| format!("/proc/loadavg says {text:?}"))
}

fn pause(options: &Pause) -> Result<()> {
    if options.runs == 0 {
        bail!("--runs 0 measures nothing");
    }
    // Before the build, which loads the machine itself.
    let load = load()?;
    let idle = load <= IDLE_LOAD;
    let binary = tools::hobble(true)?;
    let namespace = Namespace::enter()?;
    let mut rows = Vec::new();
    let mut broken = Vec::new();
    if !options.json {
        println!("load average at start: {load:.2}");
        if !idle {
            println!(
                "the machine is NOT idle (above {IDLE_LOAD}): what follows are not the figures that are promised"
            );
        }
        println!(
            "longest stop as the target measures it, above the same loop without Hobble; medians of {} in ms",
            options.runs
        );
        println!(
            "{:<28} {:>8} {:>8} {:>8} {:>8} {:>12} {:>12}",
            "", "native", "attach", "recover", "limit", "attach said", "recover said"
        );
    }
    for case in cases(options) {
        let samples: Vec<Sample> = (0..options.runs)
            .map(|_| sample(&namespace, &binary, &case))
            .collect::<Result<_>>()
            .with_context(|| case.name.clone())?;
        let row = row(&case, &samples);
        broken.extend(above(&case, &row));
        if !options.json {
            let ms = |key: &str| row.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN) / 1000.0;
            println!(
                "{:<28} {:>8.2} {:>8.2} {:>8.2} {:>8} {:>12.2} {:>12.2}",
                case.name,
                ms("native_us"),
                ms("attach_us"),
                ms("recover_us"),
                case.limit
                    .map_or_else(|| "–".to_owned(), |limit| limit.as_millis().to_string()),
                ms("attach_reported_us"),
                ms("recover_reported_us")
            );
        }
        rows.push(row);
    }
    if options.json {
        println!(
            "{}",
            json!({ "bench": "pause", "runs": options.runs, "load": load, "idle": idle, "cases": rows, "above_limit": broken })
        );
    } else {
        for line in &broken {
            println!("above the limit: {line}");
        }
    }
    if options.check && !broken.is_empty() {
        let busy = if idle {
            String::new()
        } else {
            format!(" (the machine was not idle: load {load:.2})")
        };
        bail!("{}{busy}", broken.join("; "));
    }
    Ok(())
}

/// Which medians of a row are above what is promised.
pub(crate) fn above(case: &Case, row: &Value) -> Vec<String> {
    let Some(limit) = case.limit else {
        return Vec::new();
    };
    ["attach", "recover"]
        .into_iter()
        .filter_map(|what| {
            let median = row.get(format!("{what}_us")).and_then(Value::as_u64);
            // A figure that is missing keeps no promise.
            let median = Duration::from_micros(median.unwrap_or(u64::MAX));
            (median > limit).then(|| {
                format!(
                    "{}: {what} {:.2} ms, promised {} ms",
                    case.name,
                    median.as_secs_f64() * 1000.0,
                    limit.as_millis()
                )
            })
        })
        .collect()
}

/// The middle value; of an even number the mean of the two in the middle.
fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    let half = values.len() / 2;
    let upper = values.get(half).copied().unwrap_or(0);
    if values.len().is_multiple_of(2) {
        let lower = half.checked_sub(1).and_then(|index| values.get(index));
        lower.map_or(upper, |lower| lower.midpoint(upper))
    } else {
        upper
    }
}

pub(crate) fn row(case: &Case, samples: &[Sample]) -> Value {
    let median = |of: &dyn Fn(&Sample) -> u64| median(samples.iter().map(of).collect());
    let most = |of: &dyn Fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
    let above_attach = |sample: &Sample| sample.attach.saturating_sub(sample.native);
    let above_recover = |sample: &Sample| sample.recover.saturating_sub(sample.native);
    json!({
        "case": case.name,
        "limit_us": case.limit.map(|limit| u64::try_from(limit.as_micros()).unwrap_or(u64::MAX)),
        "native_us": median(&|sample| sample.native),
        "attach_us": median(&above_attach),
        "attach_max_us": most(&above_attach),
        "recover_us": median(&above_recover),
        "recover_max_us": most(&above_recover),
        "attach_reported_us": median(&|sample| sample.attach_reported),
        "recover_reported_us": median(&|sample| sample.recover_reported),
    })
}

/// One run of a case, on a volume of its own.
///
/// # Errors
/// When any step fails, or the target finds fault with its files.
pub(crate) fn sample(
    namespace: &Namespace,
    binary: &std::path::Path,
    case: &Case,
) -> Result<Sample> {
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
    // A stop past the default bound would be rolled back: here it is to be seen.
    let arguments = ["--no-rules", "--max-pause", "10s"];
    let mut injection = hobble.attach(target.pid(), volume.path(), &arguments)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(stop: u64) -> Sample {
        Sample {
            native: 100,
            attach: stop,
            recover: 1100,
            attach_reported: stop,
            recover_reported: 1000,
        }
    }

    fn case(descriptors: u32) -> Case {
        let options = Pause {
            runs: 1,
            descriptors: vec![descriptors],
            json: true,
            check: true,
        };
        cases(&options).remove(0)
    }

    #[test]
    fn medians_above_the_promise_are_told_and_single_outliers_are_not() {
        let one = case(1);
        let good = row(&one, &[sample(900), sample(3000), sample(90_000)]);
        assert_eq!(above(&one, &good), Vec::<String>::new());
        let bad = row(&one, &[sample(900), sample(3101), sample(90_000)]);
        assert_eq!(
            above(&one, &bad),
            ["1 descriptors: attach 3.00 ms, promised 3 ms"]
        );
        // Twice the descriptors of a case that has a promise have none.
        let other = case(2);
        let slow = row(&other, &[sample(900_000)]);
        assert_eq!(above(&other, &slow), Vec::<String>::new());
    }

    #[test]
    fn every_promise_is_measured_by_default() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            pause: Pause,
        }
        let line = <Line as clap::Parser>::parse_from(["pause"]);
        let limits: Vec<u128> = cases(&line.pause)
            .iter()
            .filter_map(|case| case.limit)
            .map(|limit| limit.as_millis())
            .collect();
        assert_eq!(limits, [3, 10, 40, 200]);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(median(vec![10, 1, 3, 5]), 4);
        assert_eq!(median(vec![7]), 7);
        assert_eq!(median(Vec::new()), 0);
    }
}
