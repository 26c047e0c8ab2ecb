//! Times from health verdicts to the maps: a dead worker still gets new flows for so long.

use crate::histogram::Durations;
use std::{mem, time::Duration};

/// Verdicts on their way to the maps.
#[derive(Debug, Default)]
pub(super) struct PendingVerdicts {
    since: Vec<Duration>,
    lags: Durations,
}

impl PendingVerdicts {
    /// Adds a verdict of this time that is not yet in the maps.
    pub(super) fn add(&mut self, at: Duration) {
        self.since.push(at);
    }

    /// Counts the waiting verdicts as written, and returns the histogram.
    pub(super) fn written(&mut self, now: Duration) -> Durations {
        for at in mem::take(&mut self.since) {
            self.lags.add(now.saturating_sub(at));
        }
        self.lags.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_count_when_they_are_written() {
        let mut waiting = PendingVerdicts::default();
        let ms = Duration::from_millis;
        waiting.add(ms(1_000));
        waiting.add(ms(1_400));
        let lags = waiting.written(ms(1_500));
        assert_eq!((lags.count(), lags.sum_s()), (2, 0.6));
        let filled =
            |lags: &Durations| lags.classes().into_iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>();
        assert_eq!(filled(&lags), [(0.1, 1), (0.5, 1)], "an end belongs to its class");
        assert_eq!(waiting.written(ms(9_000)), lags, "each once");
        waiting.add(ms(9_000));
        assert_eq!(filled(&waiting.written(ms(20_000))), [(0.1, 1), (0.5, 1), (f64::INFINITY, 1)]);
    }
}
