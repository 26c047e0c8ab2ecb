//! Decides which backends take new flows, from health, state and the replica's own report, with the panic rule.
//! Also computes load scores ([`load`]), flap damping ([`damp`]), the ejection limit ([`eject`]), region shares of new flows ([`region`]), and verdicts
//! on new versions ([`canary`]).
//!
//! Input: a service's backends with weight, state, verdict and readiness. Output: the eligible backends. Pure; called by `compile`, and by `replica` for the load score.

pub mod announce;
pub mod audit;
pub mod canary;
pub mod coverage;
pub mod damp;
pub mod eject;
pub mod load;
pub mod region;

use crate::desired::model::{BackendState, Health, Readiness, Service};

/// Combined observations of one backend, from probes and from its replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendObservation {
    /// Verdict of the probes, or its substitute.
    pub health: Health,
    /// Readiness that the replica reports.
    pub readiness: Readiness,
    /// Whether packets cannot reach it: no route, or no answer of the next hop.
    pub is_unreachable: bool,
}

impl BackendObservation {
    /// Combines both by the service's settings. A lost replica is unhealthy. Without probes, the replica's report is
    /// the verdict; with probes, it only adds to their verdict. Without either, every backend is healthy.
    pub fn of(service: &Service, health: Health, readiness: Readiness) -> Self {
        let probed = !service.health.kind.is_none();
        let readiness = if service.replica.is_some() { readiness } else { Readiness::Unknown };
        let health = match (probed, readiness) {
            (_, Readiness::Lost) => Health::Unhealthy,
            (true, _) => health,
            (false, Readiness::Unknown) if service.replica.is_some() => Health::Unknown,
            (false, _) => Health::Healthy,
        };
        Self { health, readiness, is_unreachable: false }
    }
}

/// A backend as input of [`eligible`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Share of new flows; 0 takes no flows.
    pub weight: u32,
    /// Administrative state.
    pub state: BackendState,
    /// Verdict; [`Health::Healthy`] for a service without a check.
    pub health: Health,
    /// Whether the replica itself declines new flows.
    pub declines: bool,
    /// Whether packets cannot reach it.
    pub is_unreachable: bool,
    /// Whether the ejection limit holds it in although it is unhealthy.
    pub is_held: bool,
}

/// Result of [`eligible`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eligibility {
    /// For each candidate, whether it takes new flows.
    pub eligible: Vec<bool>,
    /// Whether health was ignored because too little of the weight is healthy.
    pub panic: bool,
    /// Whether every backend that could take flows has had a verdict (see [`eligible`]).
    pub settled: bool,
}

/// Decides which backends take new flows.
///
/// A healthy backend takes flows unless the operator has switched it off (weight 0, or state not up) or its replica
/// declines (reports loading, draining or failed). A backend without a verdict takes flows only until the service is
/// `settled`, that is until all have had their first verdict: at a cold start nothing is known and all serve, while a
/// backend added later must pass its checks first. If no backend is healthy, those without a verdict serve.
/// If less than `panic_percent` of the weight would serve, health is ignored, so that the rest is not overloaded.
/// A backend that the ejection limit holds in serves as a healthy one does.
/// Last, an unreachable backend takes no flows while a reachable one does: packets to it are lost for certain.
pub fn eligible(candidates: &[Candidate], settled: bool, panic_percent: u8) -> Eligibility {
    let wanted = |c: &Candidate| c.weight > 0 && c.state == BackendState::Up && !c.declines;
    let weight_of = |flags: &[bool]| -> u64 {
        candidates.iter().zip(flags).filter(|&(_, &f)| f).map(|(c, _)| u64::from(c.weight)).sum()
    };
    let all: Vec<bool> = candidates.iter().map(wanted).collect();
    let has = |health| candidates.iter().any(|c| wanted(c) && c.health == health);
    let unknown_serves = !settled || !has(Health::Healthy);
    let mut eligible: Vec<bool> = candidates
        .iter()
        .map(|c| {
            wanted(c)
                && match c.health {
                    Health::Healthy => true,
                    Health::Unknown => unknown_serves,
                    Health::Unhealthy => c.is_held,
                }
        })
        .collect();
    let panic = weight_of(&eligible) * 100 < u64::from(panic_percent) * weight_of(&all);
    if panic {
        eligible = all;
    }
    if candidates.iter().zip(&eligible).any(|(c, &takes)| takes && !c.is_unreachable) {
        for (takes, c) in eligible.iter_mut().zip(candidates) {
            *takes &= !c.is_unreachable;
        }
    }
    Eligibility { eligible, panic, settled: settled || !has(Health::Unknown) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use BackendState::{Down, Draining, Up};
    use Health::{Healthy, Unhealthy, Unknown};

    fn rule(candidates: &[(u32, BackendState, Health)], settled: bool, panic: u8) -> (Vec<bool>, bool, bool) {
        let candidates: Vec<_> = candidates
            .iter()
            .map(|&(weight, state, health)| Candidate {
                weight,
                state,
                health,
                declines: false,
                is_unreachable: false,
                is_held: false,
            })
            .collect();
        let e = eligible(&candidates, settled, panic);
        (e.eligible, e.panic, e.settled)
    }

    #[test]
    fn state_weight_and_health_each_take_a_backend_out() {
        let all = [
            (1, Up, Healthy),
            (0, Up, Healthy),
            (1, Draining, Healthy),
            (1, Down, Healthy),
            (1, Up, Unhealthy),
        ];
        assert_eq!(rule(&all, true, 0), (vec![true, false, false, false, false], false, true));
    }

    #[test]
    fn at_a_cold_start_all_serve_until_each_has_had_a_verdict() {
        assert_eq!(rule(&[(1, Up, Unknown), (1, Up, Unknown)], false, 0), (vec![true, true], false, false));
        assert_eq!(rule(&[(1, Up, Healthy), (1, Up, Unknown)], false, 0), (vec![true, true], false, false));
        assert_eq!(rule(&[(1, Up, Healthy), (1, Up, Unhealthy)], false, 0), (vec![true, false], false, true));
    }

    #[test]
    fn a_backend_added_later_must_pass_its_checks_first_unless_nothing_else_is_left() {
        assert_eq!(rule(&[(1, Up, Healthy), (1, Up, Unknown)], true, 0), (vec![true, false], false, true));
        assert_eq!(rule(&[(1, Up, Unhealthy), (1, Up, Unknown)], true, 0), (vec![false, true], false, true));
    }

    #[test]
    fn panic_counts_weight_and_leaves_the_operators_word_alone() {
        let most_down = [(1, Up, Healthy), (9, Up, Unhealthy), (5, Down, Unhealthy)];
        assert_eq!(rule(&most_down, true, 10), (vec![true, false, false], false, true));
        assert_eq!(rule(&most_down, true, 11), (vec![true, true, false], true, true));
        assert_eq!(rule(&[(1, Up, Unhealthy)], true, 0).0, [false]);
        assert_eq!(rule(&[(1, Up, Unhealthy)], true, 1), (vec![true], true, true));
    }

    #[test]
    fn a_replica_that_declines_takes_nothing_even_under_panic() {
        let candidate = |health, declines| Candidate {
            weight: 1,
            state: Up,
            health,
            declines,
            is_unreachable: false,
            is_held: false,
        };
        let rule = |all: &[Candidate], panic| eligible(all, true, panic);
        let e = rule(&[candidate(Healthy, true), candidate(Healthy, false)], 50);
        assert_eq!(
            (e.eligible, e.panic),
            (vec![false, true], false),
            "a declining backend does not count as missing"
        );
        let e = rule(&[candidate(Healthy, true), candidate(Unhealthy, false)], 50);
        assert_eq!((e.eligible, e.panic), (vec![false, true], true));
        assert_eq!(rule(&[candidate(Healthy, true)], 100).eligible, [false]);
    }

    #[test]
    fn an_unreachable_backend_serves_only_where_none_is_reachable() {
        let candidate = |health, is_unreachable| Candidate {
            weight: 1,
            state: Up,
            health,
            declines: false,
            is_unreachable,
            is_held: false,
        };
        let rule = |all: &[Candidate], panic| eligible(all, true, panic).eligible;
        let (near, far) = (candidate(Healthy, false), candidate(Healthy, true));
        assert_eq!(rule(&[near, far], 0), [true, false]);
        assert_eq!(rule(&[far, far], 0), [true, true], "the kernel may know a way that lbd does not");
        assert_eq!(rule(&[near, far, far], 100), [true, false, false], "even under panic");
        assert_eq!(rule(&[candidate(Unhealthy, false), far], 0), [false, true]);
        let unhealthy = candidate(Unhealthy, false);
        assert_eq!(rule(&[unhealthy, far], 100), [true, false], "health is ignored, the way is not");
    }

    #[test]
    fn probes_and_reports_are_put_together_by_what_the_service_asks_for() {
        let service = |health: &str, replica: &str| -> Service {
            let json = format!(
                r#"{{"vip":"10.0.0.1","port":80,"protocol":"tcp","health":{{"kind":"{health}"}}{replica}}}"#
            );
            serde_json::from_str(&json).unwrap()
        };
        let replica = r#","replica":{"kind":"stream"}"#;
        for (kind, with, health, readiness, expected) in [
            ("none", "", Unknown, Readiness::Unknown, Healthy),
            ("none", "", Unknown, Readiness::Lost, Healthy),
            ("tcp", "", Unhealthy, Readiness::Ready, Unhealthy),
            ("none", replica, Healthy, Readiness::Unknown, Unknown),
            ("none", replica, Healthy, Readiness::Ready, Healthy),
            ("none", replica, Healthy, Readiness::Draining, Healthy),
            ("none", replica, Healthy, Readiness::Lost, Unhealthy),
            ("tcp", replica, Healthy, Readiness::Unknown, Healthy),
            ("tcp", replica, Unknown, Readiness::Ready, Unknown),
            ("tcp", replica, Unhealthy, Readiness::Ready, Unhealthy),
            ("tcp", replica, Healthy, Readiness::Lost, Unhealthy),
        ] {
            let seen = BackendObservation::of(&service(kind, with), health, readiness);
            assert_eq!(seen.health, expected, "{kind} {with} {health:?} {readiness:?}");
        }
        assert_eq!(
            BackendObservation::of(&service("tcp", ""), Healthy, Readiness::Draining).readiness,
            Readiness::Unknown
        );
    }
}
