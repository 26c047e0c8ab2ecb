//! Times from health verdicts to the maps: a dead worker still gets new flows for so long.

use std::{mem, time::Duration};

/// Upper bounds of the histogram's buckets; one more bucket holds longer times.
const ENDS: [Duration; 9] = [
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(5),
];

/// Histogram of the times from verdicts to the last write for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lags {
    counts: [u64; ENDS.len() + 1],
    sum: Duration,
}

impl Lags {
    fn add(&mut self, lag: Duration) {
        let class = ENDS.iter().position(|end| lag <= *end).unwrap_or(ENDS.len());
        self.counts[class] += 1;
        self.sum += lag;
    }

    /// Sum of all times, in seconds.
    pub fn sum_s(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    /// Number of verdicts.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Upper bound of each bucket in seconds, and the number of verdicts in this bucket alone; the last is unbounded.
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let ends = ENDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        ends.zip(self.counts).collect()
    }
}

/// Verdicts on their way to the maps.
#[derive(Debug, Default)]
pub(super) struct PendingVerdicts {
    since: Vec<Duration>,
    lags: Lags,
}

impl PendingVerdicts {
    /// Adds a verdict of this time that is not yet in the maps.
    pub(super) fn add(&mut self, at: Duration) {
        self.since.push(at);
    }

    /// Counts the waiting verdicts as written, and returns the histogram.
    pub(super) fn written(&mut self, now: Duration) -> Lags {
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
        let filled = |lags: &Lags| lags.classes().into_iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>();
        assert_eq!(filled(&lags), [(0.1, 1), (0.5, 1)], "an end belongs to its class");
        assert_eq!(waiting.written(ms(9_000)), lags, "each once");
        waiting.add(ms(9_000));
        assert_eq!(filled(&waiting.written(ms(20_000))), [(0.1, 1), (0.5, 1), (f64::INFINITY, 1)]);
    }
}
