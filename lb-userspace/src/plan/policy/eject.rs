//! Limits how much of a service's weight checks alone may take out within a time (Envoy's `max_ejection_percent`). Pure.
//!
//! Workers that fail together often fail for one reason that is not theirs: a network, a check that is wrong, this host.
//! Beyond the limit, a backend that fails its checks is held in until an earlier ejection is older than the window. The
//! first ejection is always allowed, or a service of two backends could not lose one.

use crate::desired::model::Service;

/// The limit of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EjectionLimit {
    /// Share of the weight, in percent.
    pub percent: u8,
    /// Time for which an ejection counts, in ms.
    pub window_ms: i64,
}

impl EjectionLimit {
    /// The limit of a service, if it has one.
    pub fn of(service: &Service) -> Option<Self> {
        let percent = service.max_ejection_percent.filter(|percent| *percent < 100)?;
        Some(Self { percent, window_ms: i64::from(service.ejection_window_s) * 1_000 })
    }
}

/// A backend that could take flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejectable {
    /// Share of new flows.
    pub weight: u32,
    /// Whether it fails its checks.
    pub fails: bool,
    /// Whether it took new flows until now.
    pub was_in: bool,
    /// When the checks took it out, if they did.
    pub ejected_ms: Option<i64>,
}

/// Result of [`limit_ejections`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ejections {
    /// For each backend, when it was ejected.
    pub ejected_ms: Vec<Option<i64>>,
    /// For each backend, whether it is held in although it fails its checks.
    pub held: Vec<bool>,
    /// When the next ejection may be allowed.
    pub next_ms: Option<i64>,
}

/// Decides which failing backends are taken out, in their order.
pub fn limit_ejections(all: &[Ejectable], limit: EjectionLimit, now_ms: i64) -> Ejections {
    let total: u64 = all.iter().map(|b| u64::from(b.weight)).sum();
    let is_recent = |at: i64| at > now_ms.saturating_sub(limit.window_ms);
    let known = |b: &Ejectable| b.ejected_ms.filter(|_| b.fails);
    let mut recent: u64 =
        all.iter().filter(|b| known(b).is_some_and(is_recent)).map(|b| u64::from(b.weight)).sum();
    let mut result = Ejections::default();
    for b in all {
        let fits = (recent + u64::from(b.weight)) * 100 <= u64::from(limit.percent) * total;
        let ejected_ms = match (b.fails, b.ejected_ms) {
            (false, _) => None,
            (true, Some(at)) => Some(at),
            // It takes nothing away from the service.
            (true, None) if !b.was_in => Some(now_ms.saturating_sub(limit.window_ms)),
            (true, None) if fits || recent == 0 => {
                recent += u64::from(b.weight);
                Some(now_ms)
            }
            (true, None) => None,
        };
        result.ejected_ms.push(ejected_ms);
        result.held.push(b.fails && ejected_ms.is_none());
    }
    if result.held.contains(&true) {
        let ends = result.ejected_ms.iter().flatten().filter(|at| is_recent(**at));
        result.next_ms = ends.map(|at| at + limit.window_ms).min();
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: EjectionLimit = EjectionLimit { percent: 50, window_ms: 1_000 };

    fn backend(weight: u32, fails: bool, ejected_ms: Option<i64>) -> Ejectable {
        Ejectable { weight, fails, was_in: ejected_ms.is_none(), ejected_ms }
    }

    #[test]
    fn no_more_than_the_limit_goes_at_once_and_the_rest_after_the_window() {
        let all = [backend(1, true, None); 4];
        let first = limit_ejections(&all, LIMIT, 10_000);
        assert_eq!(first.ejected_ms, [Some(10_000), Some(10_000), None, None]);
        assert_eq!((first.held, first.next_ms), (vec![false, false, true, true], Some(11_000)));
        let all: Vec<_> = first.ejected_ms.iter().map(|&at| backend(1, true, at)).collect();
        assert_eq!(limit_ejections(&all, LIMIT, 10_999).held, [false, false, true, true]);
        let later = limit_ejections(&all, LIMIT, 11_000);
        assert_eq!((later.held, later.next_ms), (vec![false; 4], None));
    }

    #[test]
    fn the_first_may_always_go_and_one_that_was_out_costs_nothing() {
        let heavy = [backend(9, true, None), backend(1, false, None)];
        assert_eq!(limit_ejections(&heavy, LIMIT, 0).held, [false, false]);
        let zero = EjectionLimit { percent: 0, ..LIMIT };
        let both = [backend(1, true, None), backend(1, true, None)];
        assert_eq!(limit_ejections(&both, zero, 0).held, [false, true]);
        let new = Ejectable { was_in: false, ..backend(1, true, None) };
        let all = [new, new, new, backend(1, true, None)];
        assert_eq!(limit_ejections(&all, LIMIT, 5_000).held, [false; 4]);
        let recovered = [backend(1, false, Some(1)), backend(1, true, None)];
        assert_eq!(limit_ejections(&recovered, LIMIT, 2).ejected_ms, [None, Some(2)]);
    }

    proptest! {
        #[test]
        fn within_a_window_at_most_the_limit_or_one_goes(
            fails in proptest::collection::vec((1..20u32, any::<bool>()), 1..12), percent in 0..=100u8, now in 0..9_000i64,
        ) {
            let limit = EjectionLimit { percent, window_ms: 1_000 };
            let mut all: Vec<_> = fails.iter().map(|&(weight, fails)| backend(weight, fails, None)).collect();
            let total: u32 = all.iter().map(|b| b.weight).sum();
            for step in 0..20 {
                let found = limit_ejections(&all, limit, now + step * 300);
                for (b, at) in all.iter_mut().zip(&found.ejected_ms) {
                    b.ejected_ms = *at;
                }
                let recent: Vec<u32> = all.iter()
                    .filter(|b| b.ejected_ms.is_some_and(|at| at > now + step * 300 - 1_000))
                    .map(|b| b.weight).collect();
                let sum: u32 = recent.iter().sum();
                prop_assert!(recent.len() <= 1 || sum * 100 <= u32::from(percent) * total);
                prop_assert_eq!(found.held.contains(&true), found.next_ms.is_some());
            }
            prop_assert!(percent == 0 || all.len() > 6 || all.iter().all(|b| b.fails == b.ejected_ms.is_some()));
        }
    }
}
