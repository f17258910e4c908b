//! Durations, sizes and points in time as they are written in a rule.
//!
//! Owns their syntax. Invariant: nothing overflows silently, and nothing without a unit is taken for a duration.

use std::time::Duration;

use crate::fault::attr::Timestamp;

/// The longest duration that can be written: ten years of 365 days.
const LONGEST: u128 = 10 * 365 * 24 * 3600 * 1_000_000_000;

const DURATION_UNITS: [(&str, u128); 9] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// A duration such as `20ms`, `1.5s` or `1h30m`; `0` needs no unit. The error is the cause.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.starts_with('-') {
        return Err("a duration cannot be negative".into());
    }
    if rest.is_empty() {
        return Err("an empty duration; write 20ms, 1.5s, 2m or 1h30m".into());
    }
    let mut total = 0_u128;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (whole, tail) = rest.split_at(digits);
        let (fraction, tail) = match tail.strip_prefix('.') {
            Some(tail) => tail.split_at(
                tail.find(|c: char| !c.is_ascii_digit())
                    .unwrap_or(tail.len()),
            ),
            None => ("", tail),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err("not a duration; write 20ms, 1.5s, 2m or 1h30m".into());
        }
        let tail = tail.trim_start();
        let (unit, tail) = tail.split_at(
            tail.find(|c: char| !c.is_alphabetic())
                .unwrap_or(tail.len()),
        );
        if unit.is_empty() {
            return Err("a duration needs a unit; write 20ms, 1.5s, 2m or 1h30m".into());
        }
        let Some((_, nanos)) = DURATION_UNITS.into_iter().find(|(name, _)| *name == unit) else {
            return Err("unknown unit of time; there are ns, us, ms, s, m, h and d".into());
        };
        let too_long = || "a duration may be ten years at most".to_owned();
        let whole: u128 = if whole.is_empty() {
            0
        } else {
            whole.parse().map_err(|_| too_long())?
        };
        let part = fraction
            .bytes()
            .take(18)
            .fold((0_u128, 1_u128), |(value, scale), digit| {
                (value * 10 + u128::from(digit - b'0'), scale * 10)
            });
        total = whole
            .checked_mul(nanos)
            .and_then(|whole| total.checked_add(whole + part.0 * nanos / part.1))
            .ok_or_else(too_long)?;
        if total > LONGEST {
            return Err(too_long());
        }
        rest = tail.trim_start();
    }
    u64::try_from(total)
        .map(Duration::from_nanos)
        .map_err(|_| "a duration may be ten years at most".into())
}

/// A duration in the shortest exact form that [`parse_duration`] reads.
pub(crate) fn format_duration(duration: Duration) -> String {
    let mut nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".into();
    }
    let mut text = String::new();
    for (name, size) in DURATION_UNITS
        .into_iter()
        .rev()
        .filter(|(name, _)| name.is_ascii())
    {
        if nanos >= size {
            text.push_str(&format!("{}{name}", nanos / size));
            nanos %= size;
        }
    }
    text
}

const SIZE_UNITS: [(&str, u64); 11] = [
    ("B", 1),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("PiB", 1 << 50),
];

/// A size such as `64KiB`, `1MiB` or `4096`. The error is the cause.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err("a size cannot be negative".into());
    }
    let (digits, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    if digits.is_empty() {
        return Err("not a size; write 4096, 64KiB or 1MiB".into());
    }
    let unit = unit.trim_start();
    let scale = match SIZE_UNITS.into_iter().find(|(name, _)| *name == unit) {
        Some((_, scale)) => scale,
        None if unit.is_empty() => 1,
        None => return Err("unknown unit of size; there are B, KiB, MiB, GiB, TiB, PiB and the decimal kB, MB, GB, TB".into()),
    };
    let value: Option<u64> = digits.parse().ok();
    value
        .and_then(|value| value.checked_mul(scale))
        .ok_or_else(|| "a size must fit in 64 bits".into())
}

/// A point in time as in RFC 3339, such as `2030-01-01T00:00:00Z`. The error is the cause.
pub(crate) fn parse_timestamp(text: &str) -> Result<Timestamp, String> {
    read_timestamp(text).ok_or_else(|| "not a time; write 2030-01-01T00:00:00Z, {sec: …, nsec: …}, or +1h or -1h from the true time".into())
}

fn read_timestamp(text: &str) -> Option<Timestamp> {
    let number = |text: &str, low: i64, high: i64| {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        plain
            .then(|| text.parse::<i64>().ok())
            .flatten()
            .filter(|value| (low..=high).contains(value))
    };
    let (date, rest) = text.split_once(['T', 't', ' '])?;
    let mut date = date.splitn(3, '-');
    let year = date
        .next()
        .filter(|year| year.len() == 4)
        .and_then(|year| number(year, 0, 9999))?;
    let month = number(date.next()?, 1, 12)?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let longest = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    let day = number(date.next()?, 1, longest)?;

    let zone = rest.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = rest.split_at(zone);
    let offset = match zone.split_at_checked(1)? {
        ("Z" | "z", "") => 0,
        (sign, hours_minutes) => {
            let (hours, minutes) = hours_minutes.split_once(':')?;
            let seconds = number(hours, 0, 23)? * 3600 + number(minutes, 0, 59)? * 60;
            if sign == "-" { -seconds } else { seconds }
        }
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut clock = clock.splitn(3, ':');
    let seconds = number(clock.next()?, 0, 23)? * 3600
        + number(clock.next()?, 0, 59)? * 60
        + number(clock.next()?, 0, 59)?;
    number(fraction, 0, i64::MAX).filter(|_| fraction.len() <= 9)?;
    let nsec = format!("{fraction:0<9}").parse().ok()?;

    // Days since 1970-01-01 in the proleptic Gregorian calendar, with years that begin in March.
    let year = if month <= 2 { year - 1 } else { year };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * ((month + 9) % 12) + 2) / 5
        + day
        - 1
        - 719_468;
    Some(Timestamp {
        sec: days * 86_400 + seconds - offset,
        nsec,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, nanos) in [
            ("20ms", 20_000_000),
            ("1.5s", 1_500_000_000),
            ("1h30m", 5_400_000_000_000),
            ("1m 30s", 90_000_000_000),
            ("100us", 100_000),
            ("100µs", 100_000),
            (".5s", 500_000_000),
            ("0", 0),
            ("0s", 0),
            ("2d", 172_800_000_000_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_nanos(nanos)),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_a_duration_is_refused() {
        for text in [
            "",
            "20",
            "-1s",
            "1x",
            "ms",
            "1s2",
            "99999999999999999999999999999999999999999d",
            "1e3s",
            "11y",
            "4000d",
            ".",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_survive_printing() {
        for nanos in [0, 1, 999, 1_500_000, 90_000_000_000, 86_400_000_000_001] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
        assert_eq!(format_duration(Duration::from_millis(90_020)), "1m30s20ms");
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("64KiB"), Ok(65536));
        assert_eq!(parse_size("1 MiB"), Ok(1 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("5kB"), Ok(5000));
        for text in [
            "",
            "KiB",
            "-1",
            "1K",
            "1kib",
            "18446744073709551616",
            "99999999PiB",
            "1.5KiB",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read() {
        for (text, sec, nsec) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("1969-12-31T23:59:59Z", -1, 0),
            ("2000-02-29T12:34:56.5Z", 951_827_696, 500_000_000),
            ("2038-01-19T03:14:08+00:00", 2_147_483_648, 0),
            ("2030-01-01T01:00:00+01:00", 1_893_456_000, 0),
        ] {
            assert_eq!(parse_timestamp(text), Ok(Timestamp { sec, nsec }), "{text}");
        }
        for text in [
            "",
            "2030-01-01",
            "2030-02-30T00:00:00Z",
            "2030-01-01T24:00:00Z",
            "2030-01-01T00:00:00",
            "soon",
        ] {
            assert!(parse_timestamp(text).is_err(), "{text}");
        }
    }
}
