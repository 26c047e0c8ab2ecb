//! Flap damping: a backend that fell often recently must be up longer before it is trusted again. Pure.
//!
//! Each fall adds a penalty of one, which decays with [`HALF_LIFE`] (like RFC 2439, with one threshold). Two
//! falls cost nothing; each further one doubles the requirement.

use std::time::Duration;

/// Time in which a penalty decays to its half.
pub const HALF_LIFE: Duration = Duration::from_secs(300);
/// Falls that cost nothing.
const FREE: f64 = 2.0;
/// Largest factor.
const MAX_FACTOR: u32 = 16;

/// Penalty of recent falls.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Damper {
    penalty: f64,
    at: Duration,
}

impl Damper {
    fn penalty(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.at).as_secs_f64();
        self.penalty * (-age / HALF_LIFE.as_secs_f64()).exp2()
    }

    /// Records a fall at `now` of a monotonic clock.
    pub fn record_fall(&mut self, now: Duration) {
        self.penalty = self.penalty(now) + 1.0;
        self.at = now;
    }

    /// Factor of the requirement at `now`: 1 to 16.
    pub fn factor(&self, now: Duration) -> u32 {
        let over = (self.penalty(now) - FREE).ceil().max(0.0);
        1u32.checked_shl(over as u32).unwrap_or(MAX_FACTOR).min(MAX_FACTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_falls_are_free_and_old_ones_decay() {
        let at = Duration::from_secs;
        let mut damper = Damper::default();
        let factors: Vec<u32> = (0..8)
            .map(|i| {
                damper.record_fall(at(i));
                damper.factor(at(i))
            })
            .collect();
        assert_eq!(factors, [1, 1, 2, 4, 8, 16, 16, 16]);
        assert_eq!(damper.factor(at(7) + 2 * HALF_LIFE), 1);
    }

    proptest! {
        #[test]
        fn time_only_helps_and_the_factor_is_bounded(
            falls in proptest::collection::vec(0..1_000u64, 0..40), later in 0..10_000u64,
        ) {
            let (mut damper, mut now) = (Damper::default(), Duration::ZERO);
            for gap in falls {
                now += Duration::from_secs(gap);
                let before = damper.factor(now);
                damper.record_fall(now);
                prop_assert!(damper.factor(now) >= before);
            }
            let factor = damper.factor(now);
            prop_assert!((1..=MAX_FACTOR).contains(&factor) && factor.is_power_of_two());
            prop_assert!(damper.factor(now + Duration::from_secs(later)) <= factor);
        }
    }
}
