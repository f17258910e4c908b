//! Fault kind `latency`: the operation takes longer.
//!
//! Owns the checked form and the sampling of the distributions. Invariant: a sample lies between the fault's `min` and `max`, and is a pure function of two
//! draws. The distributions are sampled by inversion and Box–Muller, here, so that no upgrade of a library changes what an old seed produces.

use std::time::Duration;

use crate::check::Checker;
use crate::draw::unit;
use crate::spec::LatencySpec;
use crate::units::format_duration;

/// How long an operation may be delayed at most: what is longer is a hang.
pub const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Shape of the delays around their mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Distribution {
    /// Always the mean.
    Constant,
    /// Evenly between mean − jitter and mean + jitter.
    Uniform,
    /// Normal, the jitter being the standard deviation.
    Normal,
    /// Exponential with the given mean.
    Exponential,
    /// Pareto with the given mean, the jitter being the standard deviation: a heavy tail.
    Pareto,
    /// Log-normal with the given mean, the jitter being the standard deviation.
    Lognormal,
}

impl Distribution {
    /// Every distribution.
    pub const ALL: [Self; 6] = [
        Self::Constant,
        Self::Uniform,
        Self::Normal,
        Self::Exponential,
        Self::Pareto,
        Self::Lognormal,
    ];

    /// The word for it in a rule.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Uniform => "uniform",
            Self::Normal => "normal",
            Self::Exponential => "exponential",
            Self::Pareto => "pareto",
            Self::Lognormal => "lognormal",
        }
    }

    /// Whether `jitter` means something to it. Those for which it does cannot do without.
    #[must_use]
    pub const fn takes_jitter(self) -> bool {
        !matches!(self, Self::Constant | Self::Exponential)
    }
}

/// A checked `latency` fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyFault {
    pub(crate) mean: Duration,
    pub(crate) jitter: Duration,
    pub(crate) distribution: Distribution,
    pub(crate) min: Duration,
    pub(crate) max: Duration,
}

impl LatencyFault {
    /// Always the same delay.
    #[must_use]
    pub const fn constant(delay: Duration) -> Self {
        Self {
            mean: delay,
            jitter: Duration::ZERO,
            distribution: Distribution::Constant,
            min: Duration::ZERO,
            max: LONGEST,
        }
    }

    /// The mean before clamping.
    #[must_use]
    pub const fn mean(&self) -> Duration {
        self.mean
    }

    /// The shape.
    #[must_use]
    pub const fn distribution(&self) -> Distribution {
        self.distribution
    }

    /// Whether a sample depends on chance.
    pub(crate) fn is_random(&self) -> bool {
        self.distribution != Distribution::Constant
    }

    /// The delay that two random numbers stand for.
    pub(crate) fn sample(&self, first: u64, second: u64) -> Duration {
        let mean = self.mean.as_secs_f64();
        let deviation = self.jitter.as_secs_f64();
        let seconds = match self.distribution {
            Distribution::Constant => return self.mean.clamp(self.min, self.max),
            Distribution::Uniform => mean + (2.0 * unit(first) - 1.0) * deviation,
            Distribution::Normal => mean + deviation * standard_normal(first, second),
            Distribution::Exponential => -mean * unit(first).ln(),
            Distribution::Pareto => {
                // Of a Pareto variable with shape a and scale x: mean = a x / (a - 1), (mean / deviation)^2 = a (a - 2).
                let shape = 1.0 + (1.0 + (mean / deviation).powi(2)).sqrt();
                mean * (shape - 1.0) / shape * unit(first).powf(-1.0 / shape)
            }
            Distribution::Lognormal => {
                let variance = (deviation / mean).powi(2).ln_1p();
                (mean.ln() - variance / 2.0 + variance.sqrt() * standard_normal(first, second))
                    .exp()
            }
        };
        // Not a number, infinite or negative end at a bound.
        let delay = if seconds <= 0.0 || seconds.is_nan() {
            Duration::ZERO
        } else {
            Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST)
        };
        delay.clamp(self.min, self.max)
    }
}

/// Box–Muller.
fn standard_normal(first: u64, second: u64) -> f64 {
    (-2.0 * unit(first).ln()).sqrt() * (std::f64::consts::TAU * unit(second)).cos()
}

/// Checks the raw form.
pub(crate) fn check(checker: &mut Checker<'_>, spec: &LatencySpec) -> Option<LatencyFault> {
    let shape = match spec {
        LatencySpec::Fixed(text) => {
            let mean = checked_delay(checker, "fault.latency", text)?;
            if mean.is_zero() {
                checker.warn(
                    "fault.latency",
                    "a delay of nothing: the rule fires without effect",
                );
            }
            return Some(LatencyFault::constant(mean));
        }
        LatencySpec::Shaped(shape) => shape,
    };
    let delay = |checker: &mut Checker<'_>, key: &str, text: &Option<String>| match text {
        Some(text) => checked_delay(checker, &format!("fault.latency.{key}"), text).map(Some),
        None => Some(None),
    };
    let mean = checked_delay(checker, "fault.latency.mean", &shape.mean);
    let jitter = delay(checker, "jitter", &shape.jitter);
    let min = delay(checker, "min", &shape.min);
    let max = delay(checker, "max", &shape.max);
    let words = Distribution::ALL.map(|distribution| (distribution.name(), distribution));
    let distribution = match (&shape.distribution, &shape.jitter) {
        (Some(word), _) => checker.word("fault.latency.distribution", "distribution", word, &words),
        (None, Some(_)) => Some(Distribution::Uniform),
        (None, None) => Some(Distribution::Constant),
    };
    let (mean, jitter, min, max, distribution) = (mean?, jitter?, min?, max?, distribution?);
    let name = distribution.name();
    match jitter {
        Some(_) if !distribution.takes_jitter() => {
            checker.error("fault.latency.jitter", format!("means nothing to `{name}`"));
            return None;
        }
        None if distribution.takes_jitter() => {
            checker.error(
                "fault.latency.distribution",
                format!("`{name}` needs a `jitter`"),
            );
            return None;
        }
        Some(jitter) if jitter.is_zero() => {
            checker
                .error("fault.latency.jitter", "is zero")
                .hint("leave it out, or write `distribution: constant`");
            return None;
        }
        _ => {}
    }
    if mean.is_zero() && !matches!(distribution, Distribution::Uniform | Distribution::Normal) {
        checker.error(
            "fault.latency.mean",
            format!("`{name}` needs a mean above zero"),
        );
        return None;
    }
    let fault = LatencyFault {
        mean,
        jitter: jitter.unwrap_or_default(),
        distribution,
        min: min.unwrap_or_default(),
        max: max.unwrap_or(LONGEST),
    };
    if fault.min > fault.max {
        checker.error("fault.latency.min", "is greater than `max`");
        return None;
    }
    Some(fault)
}

fn checked_delay(checker: &mut Checker<'_>, field: &str, text: &str) -> Option<Duration> {
    let delay = checker.duration(field, text)?;
    if delay > LONGEST {
        checker.error(
            field,
            format!("a delay may be {} at most", format_duration(LONGEST)),
        );
        return None;
    }
    Some(delay)
}
