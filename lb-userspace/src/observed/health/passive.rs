//! Passive health checks (outlier detection): failures seen in traffic make the checker probe early.
//!
//! Input: counters of the packet programs ([`lb_common::passive`]), polled in short intervals. Output: hints to the task
//! that checks a backend. A passive failure is never a verdict: anybody can forge one, and a port range of a worker may
//! refuse connections while its check passes. So each hint triggers a probe, and refuted hints become less frequent.

use lb_common::{Address, passive::PassiveFailures};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Source of the counters: the dataplane, outside tests.
pub trait PassiveSource: Send + Sync {
    /// Counters of a worker's address; they wrap.
    fn signs(&self, worker: &Address) -> PassiveFailures;
}

/// Interval between two polls of the counters.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Shortest time from a refuted hint to the next hint; each further refuted hint in a row doubles it.
const MIN_QUIET: Duration = Duration::from_secs(1);
/// Longest time from a refuted hint to the next hint.
const MAX_QUIET: Duration = Duration::from_secs(60);

/// Passive failures counted within some time, which trigger an early probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Number of ICMP errors.
    pub unreachable: u32,
    /// Number of resets.
    pub refused: u32,
    /// Time from the poll before the first failure to the last failure.
    pub within: Duration,
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |n: u32, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
        let unreachable = count(self.unreachable, "unreachable", "unreachables");
        let refused = count(self.refused, "refused connection", "refused connections");
        match (self.unreachable, self.refused) {
            (_, 0) => write!(f, "{unreachable}")?,
            (0, _) => write!(f, "{refused}")?,
            _ => write!(f, "{unreachable} and {refused}")?,
        }
        write!(f, " in {:.1} s", self.within.as_secs_f64())
    }
}

/// Passive failures of one backend and their early probes, since lbd started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassiveReport {
    /// ICMP errors that report that packets did not reach the backend.
    pub unreachable: u64,
    /// SYNs that the backend answered with a reset (mode `nat`).
    pub refused: u64,
    /// Early probes that passive failures triggered.
    pub early: u64,
    /// Early probes that succeeded.
    pub refuted: u64,
    /// The latest early probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<EarlyProbe>,
}

/// A probe that passive failures triggered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlyProbe {
    /// Time of the trigger, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Passive failures that triggered the probe.
    pub what: String,
}

/// Passes hints from the poller of the counters to the task that checks one backend.
#[derive(Default)]
pub struct Suspicion {
    state: Mutex<State>,
    raised: Notify,
}

#[derive(Default)]
struct State {
    /// Counters and time of the last poll.
    before: Option<(PassiveFailures, Instant)>,
    /// Failures since the last hint, and the time from which they count.
    pending: Option<(u32, u32, Instant)>,
    /// Time of the latest failure.
    latest: Option<Instant>,
    /// No hint before this time.
    quiet_until: Option<Instant>,
    /// Refuted hints in a row.
    refuted: u32,
}

impl Suspicion {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the polled counters; returns the new failures: unreachables, refusals.
    pub fn update(&self, signs: PassiveFailures, now: Instant) -> (u32, u32) {
        let mut state = self.state();
        // Failures from before the first poll do not count.
        let (before, polled) = state.before.replace((signs, now)).unwrap_or((signs, now));
        let new =
            (signs.unreachable.wrapping_sub(before.unreachable), signs.refused.wrapping_sub(before.refused));
        if new != (0, 0) {
            let (unreachable, refused, since) = state.pending.unwrap_or((0, 0, polled));
            state.pending = Some((unreachable.saturating_add(new.0), refused.saturating_add(new.1), since));
            state.latest = Some(now);
            if state.quiet_until.is_none_or(|until| now >= until) {
                self.raised.notify_one();
            }
        }
        new
    }

    /// Waits for the next hint.
    pub async fn next_hint(&self) -> Hint {
        loop {
            self.raised.notified().await;
            if let Some(hint) = self.take_hint(Instant::now()) {
                return hint;
            }
        }
    }

    fn take_hint(&self, now: Instant) -> Option<Hint> {
        let mut state = self.state();
        if state.quiet_until.is_some_and(|until| now < until) {
            return None;
        }
        let (unreachable, refused, since) = state.pending.take()?;
        let within = state.latest.unwrap_or(now).duration_since(since);
        Some(Hint { unreachable, refused, within })
    }

    /// The early probe succeeded: hints become less frequent for a while.
    pub fn refute(&self, now: Instant) {
        let mut state = self.state();
        // Old false alarms no longer count.
        let quiet = |n: u32| MIN_QUIET.saturating_mul(1 << n.min(16)).min(MAX_QUIET);
        if state.quiet_until.is_some_and(|until| now > until + quiet(state.refuted)) {
            state.refuted = 0;
        }
        state.quiet_until = Some(now + quiet(state.refuted));
        state.refuted = state.refuted.saturating_add(1);
        state.pending = None;
    }

    /// The verdict has changed: failures until now belong to the old one.
    pub fn reset(&self) {
        let mut state = self.state();
        (state.refuted, state.quiet_until, state.pending) = (0, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(unreachable: u32, refused: u32) -> PassiveFailures {
        PassiveFailures { unreachable, refused }
    }

    #[test]
    fn hints_describe_the_failures() {
        let hint =
            |unreachable, refused, ms| Hint { unreachable, refused, within: Duration::from_millis(ms) };
        assert_eq!(hint(3, 0, 1_000).to_string(), "3 unreachables in 1.0 s");
        assert_eq!(hint(1, 0, 100).to_string(), "1 unreachable in 0.1 s");
        assert_eq!(hint(0, 1, 100).to_string(), "1 refused connection in 0.1 s");
        assert_eq!(hint(1, 2, 12_340).to_string(), "1 unreachable and 2 refused connections in 12.3 s");
    }

    #[tokio::test(start_paused = true)]
    async fn counters_are_differences_and_may_wrap() {
        let (suspicion, start) = (Suspicion::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(suspicion.update(signs(u32::MAX, 7), at(0)), (0, 0), "from before the start");
        assert_eq!(suspicion.take_hint(at(0)), None);
        assert_eq!(suspicion.update(signs(1, 7), at(100)), (2, 0));
        assert_eq!(suspicion.update(signs(1, 9), at(200)), (0, 2));
        let hint = suspicion.take_hint(at(250)).unwrap();
        assert_eq!(hint, Hint { unreachable: 2, refused: 2, within: Duration::from_millis(200) });
        assert_eq!(suspicion.take_hint(at(300)), None, "only once");
        assert_eq!(suspicion.update(signs(1, 9), at(300)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn refuted_hints_become_less_frequent() {
        let suspicion = Suspicion::default();
        let start = Instant::now();
        let (mut count, mut hints) = (0, Vec::new());
        suspicion.update(signs(0, 0), start);
        // A failure at every poll, for five minutes.
        for poll in 1..=3_000u32 {
            let now = start + POLL_INTERVAL * poll;
            count += 1;
            suspicion.update(signs(count, 0), now);
            if suspicion.take_hint(now).is_some() {
                hints.push(poll / 10);
                suspicion.refute(now);
            }
        }
        assert_eq!(hints, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
        // Quiet for longer than the pause: the count starts again.
        let later = start + Duration::from_secs(1_000);
        suspicion.update(signs(count + 1, 0), later);
        assert!(suspicion.take_hint(later).is_some());
        suspicion.refute(later);
        suspicion.update(signs(count + 2, 0), later + POLL_INTERVAL * 5);
        assert!(suspicion.take_hint(later + POLL_INTERVAL * 5).is_none());
        suspicion.update(signs(count + 3, 0), later + POLL_INTERVAL * 11);
        assert!(suspicion.take_hint(later + POLL_INTERVAL * 11).is_some());
        suspicion.reset();
        suspicion.update(signs(count + 4, 0), later + POLL_INTERVAL * 12);
        assert!(suspicion.take_hint(later + POLL_INTERVAL * 12).is_some());
    }
}
