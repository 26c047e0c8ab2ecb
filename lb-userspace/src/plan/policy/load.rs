//! Load score: how loaded a replica is, as one number that the dataplane compares.
//!
//! Input: a [`Report`] and the capacity to assume if the report contains none. Output: a `u32` in
//! millionths of the replica's capacity. Pure; called by `replica` for each report.
//!
//! One million is a replica that runs as many requests as it can. So replicas of different sizes are comparable: one
//! request more costs a small replica more than a large one. The score is the sum of:
//!
//! * *Occupancy*: the larger of running ÷ capacity and the KV cache's use.
//! * *Queue*: a waiting request will take a place and delays all later ones until then; it counts as
//!   four running ones (the weight that vLLM's own balancer uses between its engines).
//! * *WriteBudget*: from nine tenths of the KV cache on, the engine is about to preempt requests and recompute
//!   them. The last tenth costs as much as all the rest.
//!
//! The score is monotonic in running, waiting and cache use, and bounded by [`MAX_SCORE`], which leaves
//! headroom for what the dataplane adds between two reports.

use crate::desired::model::Report;

/// Score of a replica that runs as many requests as it can, with none waiting.
pub const FULL: u32 = 1_000_000;
/// Highest score: a thousand times full.
pub const MAX_SCORE: u32 = 1_000 * FULL;
/// Capacity to assume if neither the replica nor the service defines it (vLLM's `max_num_seqs`).
pub const USUAL_CAPACITY: u32 = 256;
/// Weight of a waiting request, in running ones.
const WAITING_WEIGHT: u64 = 4;
/// Use of the KV cache from which pressure counts.
const PRESSURE_FROM: f64 = 0.9;

/// Capacity of a replica: reported, configured, or assumed.
pub fn capacity(report: &Report, configured: Option<u32>) -> u32 {
    report.capacity.or(configured).unwrap_or(USUAL_CAPACITY).max(1)
}

/// Load score of a report.
pub fn score(report: &Report, configured: Option<u32>) -> u32 {
    let capacity = u64::from(capacity(report, configured));
    let of_capacity = |requests: u64| requests * u64::from(FULL) / capacity;
    let kv = report.kv_cache_usage.unwrap_or(0.0).clamp(0.0, 1.0);
    let full = f64::from(FULL);
    let occupancy = of_capacity(report.running.into()).max((kv * full) as u64);
    let queue = of_capacity(WAITING_WEIGHT * u64::from(report.waiting));
    let pressure = ((kv - PRESSURE_FROM).max(0.0) / (1.0 - PRESSURE_FROM) * full) as u64;
    u32::try_from(occupancy + queue + pressure).unwrap_or(MAX_SCORE).min(MAX_SCORE)
}

/// Amount that one more request adds to a replica's score, at least 1: the dataplane adds it between two reports.
pub fn request_cost(capacity: u32) -> u32 {
    (FULL / capacity.max(1)).max(1)
}

/// Score for a replica without a recent report: the median of the service's other replicas, so that the replica is
/// neither avoided nor flooded.
pub fn neutral(known: &mut [u32]) -> u32 {
    if known.is_empty() {
        return 0;
    }
    let middle = known.len() / 2;
    *known.select_nth_unstable(middle).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::{MOST_REQUESTS, Phase};
    use proptest::prelude::*;

    fn report(running: u32, waiting: u32, kv: Option<f64>, capacity: Option<u32>) -> Report {
        Report {
            phase: Phase::Ready,
            model: None,
            version: None,
            running,
            waiting,
            kv_cache_usage: kv,
            capacity,
            queue: None,
            tokens_per_second: None,
            gpu_memory: None,
            time_ms: None,
            answers: None,
        }
    }

    #[test]
    fn scores_are_in_millionths_of_capacity() {
        for (running, waiting, kv, capacity, expected) in [
            (0, 0, None, None, 0),
            (8, 0, None, Some(8), FULL),
            (4, 0, Some(0.25), Some(8), FULL / 2),
            (1, 0, Some(0.5), Some(8), FULL / 2),
            (8, 2, None, Some(8), 2 * FULL),
            (0, 0, Some(1.0), None, 2 * FULL),
            (256, 0, None, None, FULL),
            (1_000_000, 1_000_000, Some(1.0), Some(1), MAX_SCORE),
        ] {
            let got = score(&report(running, waiting, kv, capacity), None);
            assert_eq!(got, expected, "{running} running, {waiting} waiting, {kv:?} of {capacity:?}");
        }
        assert_eq!(score(&report(2, 0, None, None), Some(4)), FULL / 2);
        assert_eq!(score(&report(2, 0, None, Some(8)), Some(4)), FULL / 4, "the reported capacity wins");
        assert_eq!((request_cost(8), request_cost(0), request_cost(u32::MAX)), (125_000, FULL, 1));
        assert_eq!((neutral(&mut []), neutral(&mut [7]), neutral(&mut [9, 1, 5])), (0, 7, 5));
    }

    fn any_report() -> impl Strategy<Value = Report> {
        let counts = (0..=MOST_REQUESTS, 0..=MOST_REQUESTS);
        let small = (0..300u32, 0..300u32);
        let capacity = proptest::option::of(prop_oneof![1..=512u32, 1..=MOST_REQUESTS]);
        (prop_oneof![counts, small], proptest::option::of(0.0..=1.0), capacity)
            .prop_map(|((running, waiting), kv, capacity)| report(running, waiting, kv, capacity))
    }

    proptest! {
        #[test]
        fn more_of_anything_is_never_a_lower_score(
            base in any_report(), running in 0..1_000u32, waiting in 0..1_000u32, kv in 0.0..=1.0f64,
        ) {
            let before = score(&base, None);
            let more = Report { running: base.running.saturating_add(running), ..base.clone() };
            prop_assert!(score(&more, None) >= before);
            let more = Report { waiting: base.waiting.saturating_add(waiting), ..base.clone() };
            prop_assert!(score(&more, None) >= before);
            let fuller = base.kv_cache_usage.map_or(kv, |old| old.max(kv));
            let more = Report { kv_cache_usage: Some(fuller), ..base.clone() };
            prop_assert!(score(&more, None) >= before);
            let larger = capacity(&base, None).saturating_add(running);
            let roomier = Report { capacity: Some(larger), ..base.clone() };
            prop_assert!(score(&roomier, None) <= before);
        }

        #[test]
        fn one_request_more_shows_unless_the_cache_is_scarcer(running in 0..900u32, capacity in 1..2_000u32) {
            let at = |n| score(&report(n, 0, None, Some(capacity)), None);
            let step = at(running + 1) - at(running);
            prop_assert!(step >= request_cost(capacity) && step <= request_cost(capacity) + 1);
        }

        #[test]
        fn a_score_is_bounded_and_scales(base in any_report(), factor in 1..50u32) {
            let one = score(&base, None);
            prop_assert!(one <= MAX_SCORE);
            // A replica twice the size with twice the requests is as loaded.
            let times = |n: u32| n.saturating_mul(factor);
            let capacity = capacity(&base, None);
            if let (Some(running), Some(waiting)) =
                (base.running.checked_mul(factor), base.waiting.checked_mul(factor))
            {
                let larger = Report { running, waiting, capacity: Some(times(capacity)), ..base.clone() };
                prop_assert_eq!(score(&larger, None), one);
            }
        }
    }
}
