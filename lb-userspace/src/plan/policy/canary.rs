//! Judges a new version of a model: compares its requests with those of the old version in the same period.
//!
//! Input: counts of each version's replicas since the roll-out began, and the roll-out's limits. Output: a
//! [`CanaryVerdict`]. Pure; called by `regions`.

use crate::desired::model::{Answers, Rollout};
use serde::{Deserialize, Serialize};

/// Answers of the replicas of one version since the roll-out began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Replicas that report this version.
    pub replicas: u32,
    /// Replicas of this version that count their answers.
    pub counting: u32,
    /// Finished requests.
    pub finished: u64,
    /// Finished requests that failed because of the replica.
    pub failed: u64,
    /// Sum of the times to first token, in milliseconds.
    pub first_token_ms: f64,
    /// Number of requests with a first token.
    pub first_tokens: u64,
}

impl Tally {
    /// Adds a replica's counts between two reports. A counter that decreased was reset by a restart of the process.
    pub fn add(&mut self, before: &Answers, now: &Answers) {
        let since = |before: u64, now: u64| if now >= before { now - before } else { now };
        self.finished = self.finished.saturating_add(since(before.finished, now.finished));
        self.failed = self.failed.saturating_add(since(before.failed, now.failed));
        let tokens = since(before.first_tokens, now.first_tokens);
        let was_reset = now.first_tokens < before.first_tokens || now.first_token_ms < before.first_token_ms;
        let ms = if was_reset { now.first_token_ms } else { now.first_token_ms - before.first_token_ms };
        if ms.is_finite() && ms >= 0.0 {
            self.first_tokens = self.first_tokens.saturating_add(tokens);
            self.first_token_ms += ms;
        }
    }

    /// Share of failed requests, in percent.
    pub fn errors_percent(&self) -> f64 {
        if self.finished == 0 {
            0.0
        } else {
            self.failed.min(self.finished) as f64 * 100.0 / self.finished as f64
        }
    }

    /// Mean time to first token, in milliseconds.
    pub fn latency_ms(&self) -> Option<f64> {
        (self.first_tokens > 0).then(|| self.first_token_ms / self.first_tokens as f64)
    }
}

/// CanaryVerdict on a roll-out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CanaryVerdict {
    /// Not enough data yet.
    Waiting(String),
    /// The new version is within its limits.
    Fine(String),
    /// The roll-out must be aborted.
    Abort(String),
}

/// Judges the new version against the old one.
///
/// Aborts on errors above the limit and above those of the old version in the same period (a client that sends invalid
/// requests to both must not abort the new one), or on a mean latency above the limit in percent of the old version's.
pub fn judge(rollout: &Rollout, new: &Tally, old: &Tally) -> CanaryVerdict {
    let Rollout { version, least_requests, most_errors_percent, most_latency_percent, .. } = rollout;
    if new.replicas == 0 {
        return CanaryVerdict::Waiting(format!("no replica reports version {version}"));
    }
    if new.counting == 0 {
        return CanaryVerdict::Waiting(
            "the replicas of the new version do not count their answers, so the roll-out is not aborted automatically".to_owned(),
        );
    }
    let least = u64::from(*least_requests);
    if new.finished < least {
        return CanaryVerdict::Waiting(format!("{} of {least} required requests", new.finished));
    }
    let (errors, usual) =
        (new.errors_percent(), if old.finished >= least { old.errors_percent() } else { 0.0 });
    if *most_errors_percent > 0 && errors > f64::from(*most_errors_percent) && errors > usual {
        return CanaryVerdict::Abort(format!(
            "{errors:.1} % of {} requests failed, more than the limit of {most_errors_percent} % (old version: {usual:.1} %)",
            new.finished
        ));
    }
    if let (Some(new_ms), Some(old_ms)) = (new.latency_ms(), old.latency_ms())
        && *most_latency_percent > 0
        && new.first_tokens >= least
        && old.first_tokens >= least
        && new_ms > old_ms * f64::from(*most_latency_percent) / 100.0
    {
        return CanaryVerdict::Abort(format!(
            "mean time to first token is {new_ms:.0} ms, more than the limit of {most_latency_percent} % of the old version's {old_ms:.0} ms"
        ));
    }
    let latency =
        new.latency_ms().map_or_else(String::new, |ms| format!(", mean time to first token {ms:.0} ms"));
    CanaryVerdict::Fine(format!("{errors:.1} % of {} requests failed{latency}", new.finished))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout() -> Rollout {
        serde_json::from_str(r#"{"model":"m","version":"v2","permille":50}"#).unwrap()
    }

    fn tally(finished: u64, failed: u64, latency_ms: f64) -> Tally {
        let first_token_ms = latency_ms * (finished - failed) as f64;
        Tally { replicas: 1, counting: 1, finished, failed, first_token_ms, first_tokens: finished - failed }
    }

    #[test]
    fn a_new_version_is_judged_by_the_old_one_and_by_its_limits() {
        let old = tally(1_000, 10, 100.0);
        let abort = |new: Tally, old: Tally| matches!(judge(&rollout(), &new, &old), CanaryVerdict::Abort(_));
        for (new, old, expected) in [
            (tally(19, 19, 0.0), old, false),
            (tally(20, 2, 100.0), old, true),
            (tally(20, 1, 100.0), old, false),
            (tally(100, 10, 100.0), tally(100, 20, 100.0), false),
            (tally(100, 0, 201.0), old, true),
            (tally(100, 0, 199.0), old, false),
            (tally(100, 0, 900.0), tally(3, 0, 1.0), false),
            (Tally { counting: 0, ..tally(100, 100, 0.0) }, old, false),
            (Tally { replicas: 0, ..tally(100, 100, 0.0) }, old, false),
        ] {
            assert_eq!(abort(new, old), expected, "{new:?} by {old:?}");
        }
        let never = Rollout { most_errors_percent: 0, most_latency_percent: 0, ..rollout() };
        assert!(matches!(judge(&never, &tally(100, 100, 0.0), &old), CanaryVerdict::Fine(_)));
    }

    #[test]
    fn counters_of_a_restarted_process_count_from_zero() {
        let at =
            |finished, failed, ms| Answers { finished, failed, first_token_ms: ms, first_tokens: finished };
        let mut tally = Tally::default();
        tally.add(&at(100, 10, 1_000.0), &at(150, 10, 2_000.0));
        assert_eq!((tally.finished, tally.failed, tally.first_token_ms), (50, 0, 1_000.0));
        tally.add(&at(150, 10, 2_000.0), &at(5, 5, 70.0));
        assert_eq!((tally.finished, tally.failed, tally.first_token_ms), (55, 5, 1_070.0));
        tally.add(&at(5, 5, 70.0), &at(6, 5, f64::NAN));
        assert_eq!(tally.first_token_ms, 1_070.0);
    }
}
