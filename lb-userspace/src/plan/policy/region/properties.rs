//! Property tests for arbitrary fleets: shares add up, residency holds, dead and drained regions get nothing while a
//! better one exists, constant input converges, and a closed loop neither oscillates nor loses demand.

use super::*;
use crate::desired::model::{Locality, RegionPolicy};
use proptest::prelude::*;
use std::collections::BTreeMap;

const REGIONS: [&str; 5] = ["asia", "eu", "sa", "uk", "us"];

fn name(i: usize) -> Name {
    REGIONS[i].parse().unwrap()
}

fn here(i: usize) -> Locality {
    Locality { region: name(i), zone: name(i) }
}

fn place(i: usize) -> impl Strategy<Value = Place> {
    let flags = (prop::bool::weighted(0.8), prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let more = (prop::bool::weighted(0.1), prop::bool::weighted(0.1), 0..4u32);
    let numbers = (prop::option::weighted(0.9, 0..500u64), 0..1_500u64, prop::option::of(1..200_000u32));
    (flags, more, numbers).prop_map(move |(flags, more, (capacity, load, rtt_us))| Place {
        is_local: i == 0,
        is_allowed: flags.0,
        is_draining: flags.1,
        is_down: flags.2,
        is_spilling: more.0,
        is_stale: more.1,
        backends: more.2,
        capacity,
        load,
        waiting: load.saturating_sub(capacity.unwrap_or(0)),
        rtt_us,
        ..Place::unknown(&name(i))
    })
}

fn fleet() -> impl Strategy<Value = (RegionRules, Vec<Place>)> {
    let places = (1..=REGIONS.len()).prop_flat_map(|n| (0..n).map(place).collect::<Vec<_>>());
    let policy = prop_oneof![
        4 => Just(RegionPolicy::ActiveActive),
        1 => Just(RegionPolicy::ActivePassive),
        1 => Just(RegionPolicy::Weighted)
    ];
    let numbers = (50..130u16, 10..45u16, 0..=100u16, prop::collection::vec(0..4u32, REGIONS.len()));
    (places, policy, numbers).prop_map(|(places, policy, (at, below, most, weights))| {
        let mut allowed: Vec<Name> = places.iter().filter(|p| p.is_allowed).map(|p| p.name.clone()).collect();
        allowed.reverse();
        let weights = weights.into_iter().enumerate().map(|(i, w)| (name(i), w)).collect();
        let rules = RegionRules {
            policy,
            allowed: Some(allowed),
            weights,
            spill_at_percent: at,
            spill_until_percent: at - below,
            spill_most_percent: most,
            hold_s: 3,
            zone_first: true,
        };
        (rules, places)
    })
}

fn usable(places: &[Place]) -> bool {
    places.iter().any(|p| p.is_allowed && !p.is_draining && p.backends > 0)
}

fn sum(shares: &[Share]) -> u32 {
    shares.iter().map(|s| u32::from(s.permille)).sum()
}

proptest! {
    #[test]
    fn shares_add_up_and_go_only_where_they_may((rules, places) in fleet(), seconds in prop::collection::vec(0..5u64, 1..12)) {
        let (mut last, mut now_ms) = (RegionDecision::default(), 0);
        for pause in seconds {
            now_ms += pause * 1_000;
            last = decide(&Inputs::alone(&here(0), &rules, (&places, &places), now_ms), &last);
            prop_assert_eq!(sum(&last.shares), if usable(&places) { 1_000 } else { 0 }, "{:?}", last);
            prop_assert!(last.zones.is_empty() || sum(&last.zones) == 1_000);
            let better = places.iter().any(|p| p.is_allowed && !p.is_draining && p.backends > 0 && !p.is_down);
            for share in &last.shares {
                let place = places.iter().find(|p| p.name == share.name).unwrap();
                prop_assert!(place.is_allowed, "never leaves residency");
                prop_assert!(place.backends > 0 && !place.is_draining, "never to nobody, nor to a drained one");
                prop_assert!(!place.is_down || !better, "never to one that is down while another is up");
            }
            let local = places[0].is_allowed && !places[0].is_draining && places[0].backends > 0 && !places[0].is_down;
            if rules.policy == RegionPolicy::ActiveActive && local {
                prop_assert!(last.share_away(&places[0].name) <= rules.spill_most_percent * 10, "the cap holds");
            }
        }
    }

}

proptest! {
    // Each case is minutes of decisions.
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn constant_input_comes_to_rest((rules, places) in fleet()) {
        let mut last = RegionDecision::default();
        let mut changes = Vec::new();
        for second in 0..120u64 {
            let next = decide(&Inputs::alone(&here(0), &rules, (&places, &[]), second * 1_000), &last);
            if next.shares != last.shares {
                changes.push(next.share_away(&places[0].name));
            }
            last = next;
        }
        // No cycle: it turns at most once, when a place that it fills turns out to be overloaded by others.
        let turns: Vec<bool> = changes.windows(2).filter(|p| p[0] != p[1]).map(|p| p[0] < p[1]).collect();
        let turns = turns.windows(2).filter(|pair| pair[0] != pair[1]).count();
        prop_assert!(turns <= 1, "{changes:?}");
        let again = decide(&Inputs::alone(&here(0), &rules, (&places, &[]), 1_000_000), &last);
        prop_assert_eq!(again.shares, last.shares);
    }

    /// Each region's hosts decide for their own demand, and the load follows what all of them decided.
    #[test]
    fn a_closed_loop_settles_and_conserves_demand(
        regions in prop::collection::vec((20..400u64, 0..600u64), 2..5),
        lag in 1..4usize,
    ) {
        let rules = RegionRules { hold_s: 3, ..RegionRules::default() };
        let count = regions.len();
        let total: u64 = regions.iter().map(|(_, demand)| demand).sum();
        let mut decisions = vec![RegionDecision::default(); count];
        let mut loads: Vec<Vec<u64>> = vec![regions.iter().map(|(_, demand)| *demand).collect()];
        let mut history = Vec::new();
        for second in 0..240u64 {
            let seen = loads[loads.len().saturating_sub(lag)].clone();
            let before = decisions.clone();
            for (own, decision) in decisions.iter_mut().enumerate() {
                let places: Vec<Place> = (0..count)
                    .map(|i| {
                        let away = before[i].share_away(&name(i));
                        Place {
                            is_local: i == own,
                            is_spilling: i != own && away > 0 && away < 1_000,
                            capacity: Some(regions[i].0),
                            load: seen[i],
                            rtt_us: Some(1_000 * (1 + i.abs_diff(own) as u32)),
                            ..Place::unknown(&name(i))
                        }
                    })
                    .collect();
                let here = here(own);
                let inputs = Inputs::alone(&here, &rules, (&places, &[]), second * 1_000);
                *decision = decide(&inputs, decision);
                prop_assert_eq!(sum(&decision.shares), 1_000);
            }
            let mut next = vec![0u64; count];
            for (own, decision) in decisions.iter().enumerate() {
                let (demand, mut given) = (regions[own].1, 0);
                for share in decision.shares.iter().filter(|s| s.name != name(own)) {
                    let to = (0..count).find(|&i| name(i) == share.name).unwrap();
                    let part = demand * u64::from(share.permille) / 1_000;
                    next[to] += part;
                    given += part;
                }
                next[own] += demand - given;
            }
            prop_assert_eq!(next.iter().sum::<u64>(), total, "demand is conserved");
            loads.push(next);
            history.push(decisions.iter().map(|d| d.shares.clone()).collect::<Vec<_>>());
        }
        let late = &history[180..];
        let moves = late.windows(2).filter(|pair| pair[0] != pair[1]).count();
        prop_assert!(moves <= 2, "still moving after three minutes: {moves} times in the last; {:?}", late.last());
    }

}

proptest! {
    #[test]
    fn tables_get_what_was_decided(
        members in prop::collection::vec((0..4usize, 0..2usize, 0..5u32, any::<bool>(), any::<bool>()), 0..12),
        shares in prop::collection::vec(0..1_000u16, 4),
        canary in prop::option::of(0..=1_000u16),
        zones in prop::collection::vec(0..2u16, 2),
    ) {
        let names: Vec<Name> = (0..5).map(name).collect();
        let share = |(i, &permille): (usize, &u16)| Share { name: name(i), permille };
        let steer = RegionShares {
            shares: shares.iter().enumerate().filter(|(_, p)| **p > 500).map(share).collect(),
            zones: zones.iter().enumerate().filter(|(_, p)| **p > 0).map(share).collect(),
            order: names[..2].to_vec(),
            canary: canary.map(|permille| crate::desired::model::Canary { permille, ..Default::default() }),
        };
        let list: Vec<RegionMember<'_>> = members
            .iter()
            .map(|&(region, zone, weight, eligible, is_new)| RegionMember {
                weight,
                eligible,
                region: &names[region],
                zone: &names[zone],
                is_new: is_new && canary.is_some(),
            })
            .collect();
        let here = Locality { region: name(0), zone: name(0) };
        let got = weights(&list, &steer, &here, 5);
        let may = |m: &RegionMember<'_>| m.eligible && m.weight > 0;
        prop_assert!(list.iter().zip(&got.takes).all(|(m, takes)| !takes || may(m)), "only who may takes flows");
        prop_assert_eq!(got.takes.iter().any(|&t| t), list.iter().any(may), "somebody does, if anybody may");
        prop_assert_eq!(got.weights.iter().zip(&list).filter(|(w, m)| **w == 0 && m.weight > 0).count(), 0);
        prop_assert_eq!(&weights(&list, &steer, &here, 5), &got);
        if canary.is_none() {
            // By weight, each region gets its share among the existing regions.
            let mut by_region: BTreeMap<&Name, f64> = BTreeMap::new();
            for ((m, &w), _) in list.iter().zip(&got.weights).zip(&got.takes).filter(|(_, t)| **t) {
                *by_region.entry(m.region).or_default() += f64::from(w);
            }
            let there: Vec<&Share> = steer.shares.iter().filter(|s| list.iter().any(|m| may(m) && *m.region == s.name)).collect();
            let (all, whole) = (by_region.values().sum::<f64>(), there.iter().map(|s| f64::from(s.permille)).sum::<f64>());
            for share in there {
                let is = by_region.get(&share.name).copied().unwrap_or(0.0) / all;
                prop_assert!((is - f64::from(share.permille) / whole).abs() < 0.001, "{:?} {:?}", by_region, steer);
            }
        }
    }
}
