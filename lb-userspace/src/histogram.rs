//! Histograms of durations, for metrics.

use std::time::Duration;

/// Upper bounds of the buckets; one more bucket holds longer times.
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

/// A histogram of durations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    counts: [u64; ENDS.len() + 1],
    sum: Duration,
}

impl Durations {
    /// Adds a duration.
    pub fn add(&mut self, duration: Duration) {
        let class = ENDS.iter().position(|end| duration <= *end).unwrap_or(ENDS.len());
        self.counts[class] += 1;
        self.sum += duration;
    }

    /// Sum of all durations, in seconds.
    pub fn sum_s(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Upper bound of each bucket in seconds, and the number of durations in this bucket alone; the last is unbounded.
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let ends = ENDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        ends.zip(self.counts).collect()
    }
}
