//! Rate limits of new flows, as the operator wants them.

use super::{Protocol, Service};
use lb_common::service::flags;
use serde::{Deserialize, Serialize, de};
use std::{fmt, str::FromStr, time::Duration};

/// Number of flows per time: `50`, `50/s`, `30/m` or `100/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Number of flows.
    pub count: u32,
    /// Length of the time in seconds: 1, 60 or 3,600.
    pub per_s: u32,
}

/// Largest rate and largest burst.
const MOST: u32 = 100_000_000;

/// A text that is not a valid rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a valid rate: give N, N/s, N/m or N/h with N from 1 to {MOST}")]
pub struct RateError(String);

impl FromStr for Rate {
    type Err = RateError;
    fn from_str(text: &str) -> Result<Self, RateError> {
        let bad = || RateError(text.to_owned());
        let (count, unit) = text.split_once('/').unwrap_or((text, "s"));
        let per_s = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            _ => return Err(bad()),
        };
        let count = count.parse().ok().filter(|n| (1..=MOST).contains(n)).ok_or_else(bad)?;
        Ok(Self { count, per_s })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per_s {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

impl Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Rate {
    /// Time in which one flow is earned, and time for all but one of a burst, in nanoseconds.
    pub fn intervals(self, burst: Option<u32>) -> (u64, u64) {
        let second = Duration::from_secs(1).as_nanos() as u64;
        let interval = (u64::from(self.per_s) * second / u64::from(self.count)).max(1);
        (interval, interval.saturating_mul(u64::from(self.burst(burst)) - 1))
    }

    /// The given burst, or what one second brings, at least one.
    pub fn burst(self, burst: Option<u32>) -> u32 {
        burst.unwrap_or(self.count / self.per_s).max(1)
    }
}

/// Rate limits of a service in the dataplane's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bits of [`lb_common::service::flags`].
    pub flags: u32,
    /// Interval and tolerance of the service, in nanoseconds.
    pub flow_ns: (u64, u64),
    /// Interval and tolerance of a source, in nanoseconds.
    pub source_ns: (u64, u64),
    /// Leading bits of an IPv4 and an IPv6 address that make up a source.
    pub source_bits: [u32; 2],
}

impl Service {
    /// Converts the rate limits of the service.
    pub fn limits(&self) -> RateLimits {
        let mut limits = RateLimits::default();
        if let Some(rate) = self.new_flow_rate {
            limits.flags |= flags::LIMIT_FLOWS;
            limits.flow_ns = rate.intervals(self.new_flow_burst);
        }
        if let Some(rate) = self.source_rate {
            limits.flags |= flags::LIMIT_SOURCES;
            limits.source_ns = rate.intervals(self.source_burst);
            limits.source_bits = [self.source_prefix_v4.into(), self.source_prefix_v6.into()];
        }
        limits
    }

    /// Reports violated rules for the rate limits.
    pub fn check_limits(&self, setting: &mut dyn FnMut(String)) {
        let is_limited = self.new_flow_rate.is_some() || self.source_rate.is_some();
        if is_limited && self.protocol == Protocol::Udp && self.udp_stateless {
            setting(
                "new_flow_rate and source_rate count flows, which udp_stateless does not track: remove the rate or udp_stateless"
                    .to_owned(),
            );
        }
        for (name, burst, rate) in [
            ("new_flow", self.new_flow_burst, self.new_flow_rate),
            ("source", self.source_burst, self.source_rate),
        ] {
            match burst {
                Some(_) if rate.is_none() => {
                    setting(format!("{name}_burst needs {name}_rate: give both"));
                }
                Some(burst) if burst == 0 || burst > MOST => {
                    setting(format!("{name}_burst {burst} is out of range: 1 to {MOST}"));
                }
                _ => {}
            }
        }
        for (name, bits, width) in [
            ("source_prefix_v4", self.source_prefix_v4, 32),
            ("source_prefix_v6", self.source_prefix_v6, 128),
        ] {
            if bits == 0 || bits > width {
                setting(format!("{name} {bits} is out of range: 1 to {width}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        let rate = |text: &str| text.parse::<Rate>().map(|rate| rate.to_string());
        assert_eq!(rate("50").as_deref(), Ok("50/s"));
        assert_eq!(rate("30/m").as_deref(), Ok("30/m"));
        assert_eq!(rate("100/h").as_deref(), Ok("100/h"));
        for bad in ["", "0", "-1", "5/d", "1.5", "5/", "200000000"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn intervals_are_those_of_the_rate() {
        let intervals = |text: &str, burst| text.parse::<Rate>().unwrap().intervals(burst);
        assert_eq!(intervals("1000", None), (1_000_000, 999_000_000));
        assert_eq!(intervals("30/m", Some(10)), (2_000_000_000, 18_000_000_000));
        // Less than one per second: a burst of one.
        assert_eq!(intervals("30/m", None), (2_000_000_000, 0));
    }
}
