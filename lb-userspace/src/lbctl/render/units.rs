//! Numbers, times and durations as people read them.

use std::time::{Duration, UNIX_EPOCH};

/// Formats bytes with a binary prefix: `512 B`, `1.4 MiB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Formats bytes per second as bits per second: `12.3 Mbit/s`.
pub fn bit_rate(bytes_per_s: f64) -> String {
    scaled(bytes_per_s * 8.0, 1000.0, &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"])
}

/// Formats events per second: `950`, `12.3k`.
pub fn rate(per_s: f64) -> String {
    scaled(per_s, 1000.0, &["", "k", "M", "G"]).trim_end().replace(' ', "")
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} {}", units[0]) } else { format!("{value:.1} {}", units[unit]) }
}

/// Formats a time span by its two largest units: `3m12s`, `2d4h`, `45s`.
pub fn span(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m{s}s"),
        (0, _, _) => format!("{h}h{m}m"),
        _ => format!("{d}d{h}h"),
    }
}

/// Formats microseconds: `850 µs`, `1.2 ms`, `3.1 s`.
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// Formats a part of a whole in percent: `33.3%`; `-` if the whole is 0.
pub fn share(part: u32, whole: u32) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}%", f64::from(part) * 100.0 / f64::from(whole)) }
}

/// Formats a moment in milliseconds since 1970: `2026-11-21 03:59:53Z`.
pub fn time(ms: u64) -> String {
    // humantime ends at the year 9999.
    let time = UNIX_EPOCH + Duration::from_millis(ms.min(253_402_300_799_999));
    humantime::format_rfc3339_seconds(time).to_string().replace('T', " ")
}

/// Parses a duration as flags take it: `500ms`, `2s`, `5m`, `1h`.
///
/// # Errors
/// The text is not a duration; the message says what is accepted.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)) {
        Some(ms) if scale > 0 => Ok(Duration::from_millis(ms)),
        _ => Err("give a number with ms, s, m or h, such as 500ms or 5m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([bytes(0), bytes(1023), bytes(1_500_000)], ["0 B", "1023 B", "1.4 MiB"]);
        assert_eq!([rate(0.0), rate(950.4), rate(12_340.0)], ["0", "950", "12.3k"]);
        assert_eq!(bit_rate(1_250_000.0), "10.0 Mbit/s");
        assert_eq!([span(45), span(192), span(7_260), span(190_000)], ["45s", "3m12s", "2h1m", "2d4h"]);
        assert_eq!([micros(850), micros(1_250), micros(3_100_000)], ["850 µs", "1.2 ms", "3.1 s"]);
        assert_eq!([share(1, 3), share(0, 0)], ["33.3%", "-"]);
    }

    #[test]
    fn times_are_civil_dates() {
        for (ms, expected) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_400_000, "2000-02-29 00:00:00Z"),
            (1_795_233_593_000, "2026-11-21 03:59:53Z"),
            (4_102_444_799_999, "2099-12-31 23:59:59Z"),
        ] {
            assert_eq!(time(ms), expected);
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "5", "s", "5 s", "-1s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
