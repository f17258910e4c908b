//! Fault kind `latency`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use std::time::Duration;

use hobble_rules::Op;
use support::{Ask, flags, plan};

/// Delays of the first `count` matches, in milliseconds, sorted.
fn delays(fault: &str, count: u32) -> Vec<f64> {
    let plan = plan(&format!("- fault: {{latency: {fault}}}"));
    let mut delays: Vec<f64> = (0..count)
        .map(|_| Ask::new(Op::Read).of(&plan).delay.as_secs_f64() * 1000.0)
        .collect();
    delays.sort_by(f64::total_cmp);
    delays
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    #[allow(clippy::cast_precision_loss)]
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values
        .iter()
        .map(|value| (value - mean).powi(2))
        .sum::<f64>()
        / count;
    (mean, variance.sqrt())
}

fn assert_near(what: &str, value: f64, expected: f64, tolerance: f64) {
    assert!(
        (value - expected).abs() <= tolerance,
        "{what}: {value}, expected {expected} ± {tolerance}"
    );
}

#[test]
fn a_scalar_is_always_the_same() {
    assert_eq!(delays("20ms", 100), vec![20.0; 100]);
    assert_eq!(delays("{mean: 20ms}", 10), vec![20.0; 10]);
}

#[test]
fn a_jitter_alone_is_uniform() {
    let delays = delays("{mean: 20ms, jitter: 5ms}", 20_000);
    let (mean, deviation) = mean_and_deviation(&delays);
    assert_near("mean", mean, 20.0, 0.1);
    assert_near("deviation", deviation, 5.0 / 3.0_f64.sqrt(), 0.1);
    assert!(delays[0] >= 15.0 && delays[0] < 15.1, "{}", delays[0]);
    assert!(
        delays[19_999] <= 25.0 && delays[19_999] > 24.9,
        "{}",
        delays[19_999]
    );
}

#[test]
fn normal_has_its_mean_deviation_and_quantiles() {
    let delays = delays("{mean: 20ms, jitter: 2ms, distribution: normal}", 20_000);
    let (mean, deviation) = mean_and_deviation(&delays);
    assert_near("mean", mean, 20.0, 0.06);
    assert_near("deviation", deviation, 2.0, 0.06);
    assert_near("16 %", delays[3_173], 18.0, 0.1);
    assert_near("97.7 %", delays[19_545], 24.0, 0.2);
}

#[test]
fn exponential_has_its_mean_and_median() {
    let delays = delays("{mean: 10ms, distribution: exponential}", 20_000);
    assert_near("mean", mean_and_deviation(&delays).0, 10.0, 0.3);
    assert_near("median", delays[10_000], 10.0 * 2.0_f64.ln(), 0.3);
}

#[test]
fn lognormal_has_its_mean_and_deviation() {
    let delays = delays("{mean: 10ms, jitter: 5ms, distribution: lognormal}", 40_000);
    let (mean, deviation) = mean_and_deviation(&delays);
    assert_near("mean", mean, 10.0, 0.1);
    assert_near("deviation", deviation, 5.0, 0.3);
    assert_near("median", delays[20_000], 10.0 / 1.25_f64.sqrt(), 0.1);
}

#[test]
fn pareto_has_its_mean_its_smallest_value_and_its_median() {
    let delays = delays("{mean: 10ms, jitter: 5ms, distribution: pareto}", 40_000);
    let shape = 1.0 + 5.0_f64.sqrt();
    let scale = 10.0 * (shape - 1.0) / shape;
    assert_near("mean", mean_and_deviation(&delays).0, 10.0, 0.15);
    assert_near("smallest", delays[0], scale, 0.01);
    assert_near(
        "median",
        delays[20_000],
        scale * 2.0_f64.powf(1.0 / shape),
        0.1,
    );
}

#[test]
fn delays_are_clamped_and_never_negative() {
    let delays = delays(
        "{mean: 10ms, jitter: 20ms, distribution: normal, min: 5ms, max: 12ms}",
        1_000,
    );
    assert!((delays[0] - 5.0).abs() < 1e-9 && (delays[999] - 12.0).abs() < 1e-9);
    let unclamped = self::delays("{mean: 1ms, jitter: 20ms, distribution: normal}", 1_000);
    assert_eq!(unclamped[0], 0.0);
}

#[test]
fn latencies_of_several_rules_add_up() {
    let plan = flags(&["latency=1s op=read", "latency=2s", "latency=4s op=write"]);
    assert_eq!(Ask::new(Op::Read).of(&plan).delay, Duration::from_secs(3));
    assert_eq!(Ask::new(Op::Write).of(&plan).delay, Duration::from_secs(6));
    assert_eq!(Ask::new(Op::Fsync).of(&plan).delay, Duration::from_secs(2));
}
