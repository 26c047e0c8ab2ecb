//! Rise and fall: turns runs of probe results into verdicts. Pure.

use crate::{
    desired::model::{Health, HealthCheck},
    plan::policy::damp::Damper,
};
use std::time::Duration;

/// Verdict on one backend, and the current run of equal results.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    health: Health,
    /// Consecutive successes, or consecutive failures as a negative number.
    run: i32,
    falls: Damper,
    /// Passive checks suspect that the backend is dead: probes are frequent until one decides.
    suspected: bool,
}

/// Shortest wait between two probes.
const MIN_WAIT: Duration = Duration::from_millis(10);
/// Longest wait between two probes of a suspected backend.
const MAX_SUSPECTED_WAIT: Duration = Duration::from_secs(1);

impl Verdict {
    /// Starts from the last known verdict.
    pub fn new(health: Health) -> Self {
        Self { health, ..Self::default() }
    }

    /// The current verdict.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Consecutive successes required at `now` to become healthy: `rise`, and more for a flapping backend.
    pub fn required_successes(&self, check: &HealthCheck, now: Duration) -> u32 {
        let factor = if check.damping { self.falls.factor(now) } else { 1 };
        u32::from(check.rise) * factor
    }

    /// Marks a healthy backend as suspected. Rise and fall stay the same; only the waits between probes are short,
    /// until one passes or the verdict becomes unhealthy.
    pub fn suspect(&mut self) {
        self.suspected = self.health == Health::Healthy;
    }

    /// Takes one probe's result, at `now` of a monotonic clock. Returns the old verdict if the verdict has changed.
    pub fn observe(&mut self, ok: bool, check: &HealthCheck, now: Duration) -> Option<Health> {
        self.run = if ok { self.run.max(0).saturating_add(1) } else { self.run.min(0).saturating_sub(1) };
        self.suspected &= !ok;
        let next = if i64::from(self.run) >= i64::from(self.required_successes(check, now)) {
            Health::Healthy
        } else if -self.run >= i32::from(check.fall) {
            Health::Unhealthy
        } else {
            return None;
        };
        if self.health == Health::Healthy && next == Health::Unhealthy {
            self.falls.record_fall(now);
        }
        self.suspected &= next == self.health;
        (next != self.health).then(|| std::mem::replace(&mut self.health, next))
    }

    /// Takes an answer that is late although the connection was accepted: neither a success nor a failure, but the worker's
    /// host is alive, so failures before it no longer count as a row.
    pub fn observe_late(&mut self) {
        self.run = self.run.max(0);
        self.suspected = false;
    }

    /// Takes a probe that stayed without any answer for so long that it decides alone. Returns the old verdict if the
    /// verdict has changed.
    pub fn give_up(&mut self, check: &HealthCheck, now: Duration) -> Option<Health> {
        self.run = 1 - i32::from(check.fall);
        self.observe(false, check, now)
    }

    /// Wait before the next probe. `random` in 0 to 1 spreads it by the check's jitter. Without a verdict
    /// probes are ten times as frequent, so that a new backend soon gets flows; for a suspected backend too, so
    /// that a dead one soon gets no more.
    pub fn wait(&self, check: &HealthCheck, random: f64) -> Duration {
        let interval = Duration::from_millis(check.interval_ms.into());
        let interval = match self.health {
            Health::Unknown => interval / 10,
            _ if self.suspected => (interval / 10).min(MAX_SUSPECTED_WAIT),
            _ => interval,
        };
        let jitter = f64::from(check.jitter_percent.min(100)) / 100.0;
        interval.mul_f64(1.0 + jitter * (2.0 * random.clamp(0.0, 1.0) - 1.0)).max(MIN_WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check() -> HealthCheck {
        HealthCheck { rise: 2, fall: 3, interval_ms: 1_000, jitter_percent: 20, ..HealthCheck::default() }
    }

    /// Results as text (`+` success, `-` failure) and the verdict after each (`h`, `u`, `?`).
    fn run(start: Health, results: &str) -> (String, usize) {
        let (mut verdict, mut changes) = (Verdict::new(start), 0);
        let after = results.chars().map(|c| {
            let before = verdict.health();
            if let Some(old) = verdict.observe(c == '+', &check(), Duration::ZERO) {
                assert_eq!(old, before);
                assert_ne!(verdict.health(), before);
                changes += 1;
            } else {
                assert_eq!(verdict.health(), before);
            }
            match verdict.health() {
                Health::Healthy => 'h',
                Health::Unhealthy => 'u',
                Health::Unknown => '?',
            }
        });
        (after.collect(), changes)
    }

    #[test]
    fn rise_and_fall_count_runs() {
        for (start, results, expected, changes) in [
            (Health::Unknown, "++", "?h", 1),
            (Health::Unknown, "---", "??u", 1),
            (Health::Unknown, "+-+-+--+--", "??????????", 0),
            (Health::Unknown, "-++", "??h", 1),
            (Health::Healthy, "--+--+---", "hhhhhhhhu", 1),
            (Health::Healthy, "++++", "hhhh", 0),
            (Health::Unhealthy, "+-+-++", "uuuuuh", 1),
            (Health::Unhealthy, "----", "uuuu", 0),
            (Health::Unhealthy, "++---++", "uhhhuuh", 3),
        ] {
            assert_eq!(run(start, results), (expected.to_owned(), changes), "{start:?} {results}");
        }
    }

    #[test]
    fn a_flapping_backend_must_pass_more_probes() {
        let (mut verdict, mut now) = (Verdict::new(Health::Healthy), Duration::ZERO);
        let mut rises = Vec::new();
        for _ in 0..7 {
            while verdict.health() == Health::Healthy {
                now += Duration::from_secs(1);
                verdict.observe(false, &check(), now);
            }
            let mut passed = 0;
            while verdict.health() == Health::Unhealthy {
                now += Duration::from_secs(1);
                passed += 1;
                verdict.observe(true, &check(), now);
            }
            rises.push(passed);
        }
        assert_eq!(rises, [2, 2, 4, 8, 16, 32, 32]);
        assert_eq!(verdict.required_successes(&HealthCheck { damping: false, ..check() }, now), 2);
        assert_eq!(
            verdict.required_successes(&check(), now + Duration::from_secs(1_500)),
            2,
            "the penalty has decayed"
        );
    }

    #[test]
    fn suspicion_shortens_waits_until_a_probe_decides() {
        let wait = |v: &Verdict| v.wait(&check(), 0.5).as_millis();
        let mut verdict = Verdict::new(Health::Healthy);
        verdict.suspect();
        assert_eq!(wait(&verdict), 100);
        // Refuted.
        verdict.observe(true, &check(), Duration::ZERO);
        assert_eq!(wait(&verdict), 1_000);
        // Confirmed: as many failures as usual, in a shorter time.
        verdict.suspect();
        for _ in 0..2 {
            assert_eq!(verdict.observe(false, &check(), Duration::ZERO), None);
            assert_eq!(wait(&verdict), 100);
        }
        assert_eq!(verdict.observe(false, &check(), Duration::ZERO), Some(Health::Healthy));
        assert_eq!((verdict.health(), wait(&verdict)), (Health::Unhealthy, 1_000));
        // An unhealthy backend is not suspected.
        verdict.suspect();
        assert_eq!(wait(&verdict), 1_000);
        let slow = HealthCheck { interval_ms: 60_000, ..check() };
        let mut verdict = Verdict::new(Health::Healthy);
        verdict.suspect();
        assert_eq!(verdict.wait(&slow, 0.5), MAX_SUSPECTED_WAIT);
    }

    #[test]
    fn late_answers_break_a_row_of_failures_and_a_long_silence_decides_alone() {
        let mut verdict = Verdict::new(Health::Healthy);
        for _ in 0..10 {
            for _ in 0..2 {
                assert_eq!(verdict.observe(false, &check(), Duration::ZERO), None);
            }
            verdict.observe_late();
        }
        assert_eq!(verdict.give_up(&check(), Duration::ZERO), Some(Health::Healthy));
        assert_eq!(verdict.health(), Health::Unhealthy);
        assert_eq!(verdict.observe(true, &check(), Duration::ZERO), None);
        verdict.observe_late();
        assert_eq!(verdict.observe(true, &check(), Duration::ZERO), Some(Health::Unhealthy), "rise is 2");
    }

    #[test]
    fn waits_are_jittered_and_short_without_a_verdict() {
        let ms = |v: Verdict, r| v.wait(&check(), r).as_millis();
        let settled = Verdict::new(Health::Healthy);
        assert_eq!([ms(settled, 0.0), ms(settled, 0.5), ms(settled, 1.0)], [800, 1_000, 1_200]);
        assert_eq!(ms(Verdict::default(), 0.5), 100);
        let fast = HealthCheck { interval_ms: 10, ..check() };
        assert_eq!(Verdict::default().wait(&fast, 0.0), MIN_WAIT);
    }
}
