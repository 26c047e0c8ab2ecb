//! Mean service time of a replica: time in a slot per finished request, by Little's law from what it reports.
//!
//! Input: running requests and the count of finished ones, with the time of a monotonic clock. Output: milliseconds. It
//! scales how fast a backlog grows to how many slots are missing. Replicas that do not count requests have none.

use crate::desired::model::BackendId;
use std::collections::BTreeMap;

/// Time constant of the mean, in milliseconds.
const MEMORY_MS: f64 = 30_000.0;
/// Finished requests, weighted by age, from which a mean is meaningful.
const MIN_FINISHED: f64 = 3.0;
/// Shortest and longest plausible service time, in milliseconds.
const RANGE_MS: (f64, f64) = (10.0, 600_000.0);

/// Estimate of one replica's mean service time.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServiceTime {
    last: Option<(u64, u64)>,
    busy_ms: f64,
    finished: f64,
}

impl ServiceTime {
    /// Notes a report. A counter that decreased belongs to a new process.
    pub fn update(&mut self, running: u32, finished: u64, now_ms: u64) {
        let last = self.last.replace((finished, now_ms));
        let Some((before, at)) = last.filter(|&(before, _)| before <= finished) else { return };
        let past_ms = now_ms.saturating_sub(at) as f64;
        let kept = (-past_ms / MEMORY_MS).exp();
        self.busy_ms = self.busy_ms * kept + f64::from(running) * past_ms;
        self.finished = self.finished * kept + (finished - before) as f64;
    }

    /// Mean service time in milliseconds, if enough requests have finished.
    pub fn mean_ms(&self) -> Option<u32> {
        let mean = self.busy_ms / self.finished;
        (self.finished >= MIN_FINISHED && mean > 0.0).then(|| mean.clamp(RANGE_MS.0, RANGE_MS.1) as u32)
    }
}

/// Lower median of the known times: a minority of replicas that lie cannot move it far.
pub fn pooled(times: impl Iterator<Item = Option<u32>>) -> Option<u32> {
    lower_median(times.flatten().collect())
}

/// The middle value; of an even number, the smaller of the two in the middle.
pub fn lower_median(mut values: Vec<u32>) -> Option<u32> {
    values.sort_unstable();
    let middle = values.len().checked_sub(1)? / 2;
    values.get(middle).copied()
}

/// Estimates of all replicas.
pub type ServiceTimes = BTreeMap<BackendId, ServiceTime>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_follows_from_what_runs_and_what_has_finished() {
        let mut time = ServiceTime::default();
        for second in 0..60 {
            time.update(8, second * 40, second * 1_000);
        }
        assert_eq!(time.mean_ms(), Some(200));
        time.update(8, 5, 60_000);
        assert_eq!(time.mean_ms(), Some(200), "a new process counts from 0");
        assert_eq!(ServiceTime::default().mean_ms(), None);
    }

    #[test]
    fn the_lower_median_withstands_a_tie() {
        assert_eq!(lower_median(vec![1_000_000, 4, 1_000_000, 4]), Some(4));
        assert_eq!((lower_median(vec![7]), lower_median(vec![])), (Some(7), None));
    }
}
