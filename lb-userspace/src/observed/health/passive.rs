//! Signs that a worker may be dead, as hints: the checker probes early for them.
//!
//! Input: counters of the packet programs ([`lb_common::sign`]), looked at in short intervals. Output: hints to the task
//! that checks a backend. A sign is never a verdict: anybody can forge one, and a whole port range of a worker may refuse
//! while its check is fine. So each hint is answered by a probe, and what probes refute is asked about more rarely.

use lb_common::{Address, sign::Signs};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Where signs are counted: the dataplane, outside tests.
pub trait PassiveSource: Send + Sync {
    /// What was counted for a worker's address since whenever; wraps.
    fn signs(&self, worker: &Address) -> Signs;
}

/// Time between two looks at the counters.
pub const LOOK: Duration = Duration::from_millis(100);
/// Least time from a hint that a probe refuted to the next one; each refuted one in a row doubles it.
const REST: Duration = Duration::from_secs(1);
/// At most to this.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Signs heard within some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// ICMP errors.
    pub unreachable: u32,
    /// Resets.
    pub refused: u32,
    /// From the look before the first to the last.
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

/// Signs of one backend, and what came of them, since lbd started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassiveReport {
    /// ICMP errors that say that packets did not reach its address.
    pub unreachable: u64,
    /// SYNs that it answered with a reset (mode `nat`).
    pub refused: u64,
    /// Hints, each of which brought a probe forward.
    pub early: u64,
    /// Hints that the probe refuted.
    pub refuted: u64,
    /// The latest hint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<EarlyProbe>,
}

/// A probe that was brought forward.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlyProbe {
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Why.
    pub what: String,
}

/// What lies between whoever looks at the counters and the task of one backend.
#[derive(Default)]
pub struct Suspicion {
    state: Mutex<State>,
    raised: Notify,
}

#[derive(Default)]
struct State {
    /// Counters at the last look, and when it was.
    before: Option<(Signs, Instant)>,
    /// Heard since the last hint, and from when on.
    gathered: Option<(u32, u32, Instant)>,
    /// When the latest was.
    latest: Option<Instant>,
    /// No hint before.
    quiet_until: Option<Instant>,
    /// Hints in a row that were refuted.
    refuted: u32,
}

impl Suspicion {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the counters in; says how many signs are new: unreachables, refusals.
    pub fn look(&self, signs: Signs, now: Instant) -> (u32, u32) {
        let mut state = self.state();
        // What there was before the first look is nobody's.
        let (before, looked) = state.before.replace((signs, now)).unwrap_or((signs, now));
        let new =
            (signs.unreachable.wrapping_sub(before.unreachable), signs.refused.wrapping_sub(before.refused));
        if new != (0, 0) {
            let (unreachable, refused, since) = state.gathered.unwrap_or((0, 0, looked));
            state.gathered = Some((unreachable.saturating_add(new.0), refused.saturating_add(new.1), since));
            state.latest = Some(now);
            if state.quiet_until.is_none_or(|until| now >= until) {
                self.raised.notify_one();
            }
        }
        new
    }

    /// Waits for the next hint.
    pub async fn hint(&self) -> Hint {
        loop {
            self.raised.notified().await;
            if let Some(hint) = self.take(Instant::now()) {
                return hint;
            }
        }
    }

    fn take(&self, now: Instant) -> Option<Hint> {
        let mut state = self.state();
        if state.quiet_until.is_some_and(|until| now < until) {
            return None;
        }
        let (unreachable, refused, since) = state.gathered.take()?;
        let within = state.latest.unwrap_or(now).duration_since(since);
        Some(Hint { unreachable, refused, within })
    }

    /// A probe found nothing wrong: hints come more rarely for a while.
    pub fn refute(&self, now: Instant) {
        let mut state = self.state();
        // A false alarm of long ago is forgotten.
        let rest = |n: u32| REST.saturating_mul(1 << n.min(16)).min(LONGEST_REST);
        if state.quiet_until.is_some_and(|until| now > until + rest(state.refuted)) {
            state.refuted = 0;
        }
        state.quiet_until = Some(now + rest(state.refuted));
        state.refuted = state.refuted.saturating_add(1);
        state.gathered = None;
    }

    /// The verdict has changed: what was heard until now is of before.
    pub fn forget(&self) {
        let mut state = self.state();
        (state.refuted, state.quiet_until, state.gathered) = (0, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(unreachable: u32, refused: u32) -> Signs {
        Signs { unreachable, refused }
    }

    #[test]
    fn hints_say_what_was_heard() {
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
        assert_eq!(suspicion.look(signs(u32::MAX, 7), at(0)), (0, 0), "of before the start");
        assert_eq!(suspicion.take(at(0)), None);
        assert_eq!(suspicion.look(signs(1, 7), at(100)), (2, 0));
        assert_eq!(suspicion.look(signs(1, 9), at(200)), (0, 2));
        let hint = suspicion.take(at(250)).unwrap();
        assert_eq!(hint, Hint { unreachable: 2, refused: 2, within: Duration::from_millis(200) });
        assert_eq!(suspicion.take(at(300)), None, "only once");
        assert_eq!(suspicion.look(signs(1, 9), at(300)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_refuted_asks_more_rarely() {
        let suspicion = Suspicion::default();
        let start = Instant::now();
        let (mut count, mut hints) = (0, Vec::new());
        suspicion.look(signs(0, 0), start);
        // A sign at every look, for five minutes.
        for look in 1..=3_000u32 {
            let now = start + LOOK * look;
            count += 1;
            suspicion.look(signs(count, 0), now);
            if suspicion.take(now).is_some() {
                hints.push(look / 10);
                suspicion.refute(now);
            }
        }
        assert_eq!(hints, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
        // Quiet for longer than it rested: as new.
        let later = start + Duration::from_secs(1_000);
        suspicion.look(signs(count + 1, 0), later);
        assert!(suspicion.take(later).is_some());
        suspicion.refute(later);
        suspicion.look(signs(count + 2, 0), later + LOOK * 5);
        assert!(suspicion.take(later + LOOK * 5).is_none());
        suspicion.look(signs(count + 3, 0), later + LOOK * 11);
        assert!(suspicion.take(later + LOOK * 11).is_some());
        suspicion.forget();
        suspicion.look(signs(count + 4, 0), later + LOOK * 12);
        assert!(suspicion.take(later + LOOK * 12).is_some());
    }
}
