//! Tests of the region policy in typical cases.

use super::*;
use crate::desired::model::RegionPolicy;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn place(text: &str, capacity: u64, load: u64) -> Place {
    Place {
        name: name(text),
        is_local: text == "eu",
        is_allowed: true,
        is_draining: false,
        is_down: false,
        is_spilling: false,
        backends: 2,
        capacity: Some(capacity),
        load,
        is_stale: false,
        rtt_us: match text {
            "eu" => None,
            "uk" => Some(8_000),
            _ => Some(80_000),
        },
    }
}

fn rules() -> RegionRules {
    RegionRules { hold_s: 10, ..RegionRules::default() }
}

struct Host {
    rules: RegionRules,
    now_ms: u64,
    last: RegionDecision,
}

impl Host {
    fn new(rules: RegionRules) -> Self {
        Self { rules, now_ms: 0, last: RegionDecision::default() }
    }

    fn after(&mut self, seconds: u64, regions: &[Place]) -> String {
        self.now_ms += seconds * 1_000;
        let inputs = Inputs { rules: &self.rules, regions, zones: &[], now_ms: self.now_ms };
        self.last = decide(&inputs, &self.last);
        let text: Vec<String> =
            self.last.shares.iter().map(|s| format!("{} {}", s.name, s.permille)).collect();
        text.join(", ")
    }
}

#[test]
fn the_own_region_has_everything_until_it_is_full() {
    let mut host = Host::new(rules());
    let at = |load| [place("eu", 100, load), place("uk", 100, 10), place("us", 100, 0)];
    assert_eq!(host.after(1, &at(0)), "eu 1000");
    assert_eq!(host.after(1, &at(89)), "eu 1000");
    // 120 requests, of which 80 % of 100 are to stay: a third goes, in steps. uk has room for 70, of which this region
    // takes half at once, since another region may use it too.
    assert_eq!(host.after(1, &at(120)), "eu 650, uk 275, us 75");
    assert!(host.last.reason.contains("eu is at 120 %"), "{}", host.last.reason);
    assert_eq!(host.after(1, &at(80)), "eu 650, uk 275, us 75", "between the thresholds nothing moves");
    assert_eq!(host.after(1, &at(71)), "eu 650, uk 275, us 75");
    assert_eq!(host.after(1, &at(40)), "eu 650, uk 275, us 75", "it stands for a while");
    // 40 here and 350 ‰ elsewhere are 61 in all, which fit.
    assert_eq!(host.after(10, &at(40)), "eu 1000");
}

#[test]
fn a_spill_is_bounded_and_fills_nobody_up() {
    let mut host = Host::new(rules());
    let near_full = [place("eu", 100, 400), place("uk", 100, 70), place("us", 400, 0)];
    // What fits into uk is less than a step; of the 320 that fit into us half are taken at once.
    assert_eq!(host.after(1, &near_full), "eu 600, us 400");
    assert_eq!(
        host.after(1, &[place("eu", 100, 401), near_full[1].clone(), near_full[2].clone()]),
        "eu 500, us 500"
    );
    assert!(host.last.reason.contains("the configured maximum"), "{}", host.last.reason);
    let mut host = Host::new(rules());
    let all_full = [place("eu", 100, 400), place("uk", 100, 95), place("us", 100, 90)];
    assert_eq!(host.after(1, &all_full), "eu 1000", "its overload is nobody's business");
    assert!(host.last.reason.contains("no other region has room"), "{}", host.last.reason);
    let mut host = Host::new(RegionRules { spill_most_percent: 0, ..rules() });
    assert_eq!(host.after(1, &near_full), "eu 1000");
}

#[test]
fn a_spill_grows_while_it_does_not_help_and_leaves_who_gets_full() {
    let mut host = Host::new(rules());
    let at = |eu, uk| [place("eu", 100, eu), place("uk", 1_000, uk)];
    assert_eq!(host.after(1, &at(100, 0)), "eu 800, uk 200");
    assert_eq!(host.after(1, &at(95, 5)), "eu 800, uk 200", "it has begun to help");
    assert_eq!(host.after(1, &at(110, 5)), "eu 575, uk 425", "the demand grows");
    assert_eq!(host.after(1, &at(85, 899)), "eu 575, uk 425", "what is there stays while it fits");
    assert_eq!(host.after(1, &at(85, 950)), "eu 925, uk 75", "uk needs its room itself");
    assert_eq!(host.after(1, &at(85, 2_000)), "eu 1000");
}

#[test]
fn nobody_spills_to_whom_it_does_not_help() {
    let mut spilling = place("uk", 100, 0);
    spilling.is_spilling = true;
    let mut unmeasured = place("us", 100, 0);
    unmeasured.capacity = None;
    let mut host = Host::new(rules());
    assert_eq!(host.after(1, &[place("eu", 100, 150), spilling.clone(), unmeasured]), "eu 1000");
    assert_eq!(host.after(1, &[place("eu", 100, 150), place("uk", 100, 0)]), "eu 525, uk 475");
    assert_eq!(host.after(1, &[place("eu", 100, 85), spilling]), "eu 1000", "a loop is cut at once");
}

#[test]
fn old_news_change_nothing() {
    let mut host = Host::new(rules());
    assert_eq!(host.after(1, &[place("eu", 100, 150), place("uk", 100, 0)]), "eu 525, uk 475");
    let mut stale = place("eu", 1, 0);
    stale.is_stale = true;
    assert_eq!(host.after(60, &[stale.clone(), place("uk", 100, 0)]), "eu 525, uk 475");
    let mut gone = place("uk", 100, 0);
    gone.backends = 0;
    assert_eq!(host.after(1, &[stale, gone]), "eu 1000", "but that it is gone is no news about capacity");
}

#[test]
fn a_region_without_backends_goes_to_the_nearest() {
    let mut host = Host::new(rules());
    let mut eu = place("eu", 100, 0);
    eu.backends = 0;
    let regions = [eu.clone(), place("us", 100, 0), place("uk", 100, 0)];
    assert_eq!(host.after(1, &regions), "uk 1000");
    assert_eq!(host.last.order, [name("eu"), name("uk"), name("us")]);
    let back = [place("eu", 100, 0), place("us", 100, 0), place("uk", 100, 99)];
    assert_eq!(host.after(1, &back), "eu 1000");
    // With a known demand, the nearest is filled first.
    assert_eq!(host.after(1, &[place("eu", 100, 80), place("us", 100, 0), place("uk", 100, 50)]), "eu 1000");
    assert_eq!(host.after(1, &[eu, place("us", 100, 0), place("uk", 100, 50)]), "uk 500, us 500");
}

#[test]
fn down_needs_agreement_and_is_still_better_than_nothing() {
    let mut host = Host::new(rules());
    let (mut eu, mut uk) = (place("eu", 100, 0), place("uk", 100, 0));
    eu.is_down = true;
    assert_eq!(host.after(1, &[eu.clone(), uk.clone()]), "uk 1000");
    uk.is_down = true;
    assert_eq!(host.after(1, &[eu, uk]), "eu 1000");
    assert!(host.last.reason.contains("no other region is left"));
}

#[test]
fn residency_and_drains_leave_nothing_rather_than_go_elsewhere() {
    let allowed = Some(vec![name("eu")]);
    let mut host = Host::new(RegionRules { allowed, ..rules() });
    let (mut eu, mut us) = (place("eu", 100, 500), place("us", 900, 0));
    us.is_allowed = false;
    assert_eq!(host.after(1, &[eu.clone(), us.clone()]), "eu 1000");
    eu.backends = 0;
    assert_eq!(host.after(1, &[eu.clone(), us.clone()]), "");
    assert_eq!(
        host.last.reason,
        "refused by residency: no backend takes flows in eu, and backends elsewhere (2 in us) must not"
    );
    eu = place("eu", 100, 0);
    eu.is_draining = true;
    assert_eq!(host.after(1, &[eu, us]), "");
    assert!(host.last.reason.starts_with("refused: region eu drains"), "{}", host.last.reason);
}

#[test]
fn the_passive_one_waits_and_so_does_the_way_back() {
    let rules = RegionRules {
        policy: RegionPolicy::ActivePassive,
        allowed: Some(vec![name("us"), name("eu")]),
        ..rules()
    };
    let mut host = Host::new(rules);
    let up = [place("eu", 100, 0), place("us", 100, 900)];
    assert_eq!(host.after(1, &up), "us 1000", "the order counts, not who is near or full");
    let mut down = up.clone();
    down[1].is_down = true;
    assert_eq!(host.after(1, &down), "eu 1000");
    assert_eq!(host.after(1, &up), "eu 1000", "it must stand for a while");
    assert_eq!(host.after(9, &down), "eu 1000");
    assert_eq!(host.after(9, &up), "eu 1000", "and from its return on");
    assert_eq!(host.after(10, &up), "us 1000");
}

#[test]
fn weights_hold_over_those_that_are_up() {
    let weights = [("eu", 2), ("us", 1), ("uk", 0)].map(|(n, w)| (name(n), w)).into();
    let mut host = Host::new(RegionRules { policy: RegionPolicy::Weighted, weights, ..rules() });
    let all = [place("eu", 100, 0), place("us", 100, 0), place("uk", 100, 0)];
    assert_eq!(host.after(1, &all), "eu 667, us 333");
    let mut gone = all.clone();
    gone[0].backends = 0;
    assert_eq!(host.after(1, &gone), "us 1000");
    gone[1].backends = 0;
    assert_eq!(host.after(1, &gone), "uk 1000");
}

#[test]
fn zones_spill_within_their_region() {
    let zone = |text: &str, load| {
        let mut zone = place(text, 100, load);
        zone.is_local = text == "a";
        zone
    };
    let regions = [place("eu", 200, 120)];
    let look = |load, before: &RegionDecision| {
        let zones = [zone("a", load), zone("b", 20)];
        decide(&Inputs { rules: &rules(), regions: &regions, zones: &zones, now_ms: 1_000 }, before)
    };
    let shares =
        |d: &RegionDecision| d.zones.iter().map(|s| (s.name.to_string(), s.permille)).collect::<Vec<_>>();
    let calm = look(50, &RegionDecision::default());
    assert_eq!(shares(&calm), [("a".to_owned(), 1_000)]);
    let full = look(100, &calm);
    assert_eq!(shares(&full), [("a".to_owned(), 800), ("b".to_owned(), 200)]);
    assert_eq!(full.shares, all_to(&name("eu")));
}

#[test]
fn a_service_of_which_nothing_is_known_stays_at_home() {
    let service = |regions: serde_json::Value| -> Service {
        serde_json::from_value(serde_json::json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp",
            "regions": regions, "backends": {
            "a": {"address": "10.1.0.1", "region": "eu"}, "b": {"address": "10.1.0.2", "region": "us"}}}))
        .unwrap()
    };
    let here = |region: &str| Locality { region: name(region), zone: name("z") };
    let all = service(serde_json::json!({}));
    assert_eq!(initial(&all, &here("us")).unwrap().shares, all_to(&name("us")));
    assert_eq!(initial(&all, &here("asia")).unwrap().shares, all_to(&name("eu")));
    let bound = service(serde_json::json!({"allowed": ["eu"]}));
    assert_eq!(initial(&bound, &here("us")).unwrap().order, [name("eu")]);
    let mut plain = all;
    plain.regions = None;
    plain.backends.values_mut().for_each(|b| b.region = None);
    assert_eq!(initial(&plain, &here("us")), None);
}

/// Share that a table would give to each member.
fn table(members: &[(&str, &str, u32, bool, bool)], steer: &RegionShares) -> (Vec<u32>, u32) {
    let names: Vec<(Name, Name)> = members.iter().map(|m| (name(m.0), name(m.1))).collect();
    let members: Vec<RegionMember<'_>> = members
        .iter()
        .zip(&names)
        .map(|(&(_, _, weight, eligible, is_new), (region, zone))| RegionMember {
            weight,
            eligible,
            region,
            zone,
            is_new,
        })
        .collect();
    let here = Locality { region: name("eu"), zone: name("a") };
    let got = weights(&members, steer, &here, 1);
    let sum: u64 = got.weights.iter().zip(&got.takes).filter(|(_, t)| **t).map(|(w, _)| u64::from(*w)).sum();
    let share = |(&w, &takes): (&u32, &bool)| {
        if takes { ((u64::from(w) * 1_000 + sum / 2) / sum.max(1)) as u32 } else { 0 }
    };
    (got.weights.iter().zip(&got.takes).map(share).collect(), got.scale)
}

fn steer(shares: &[(&str, u16)], new: Option<u16>) -> RegionShares {
    RegionShares {
        shares: shares.iter().map(|&(n, permille)| Share { name: name(n), permille }).collect(),
        order: ["eu", "uk", "us"].map(name).into(),
        canary: new.map(|permille| crate::desired::model::Canary { permille, ..Default::default() }),
        ..RegionShares::default()
    }
}

#[test]
fn weights_give_each_region_its_share_whatever_its_size() {
    let fleet = [
        ("eu", "a", 1, true, false),
        ("eu", "b", 3, true, false),
        ("uk", "a", 5, true, false),
        ("us", "a", 1, true, false),
    ];
    assert_eq!(table(&fleet, &steer(&[("eu", 1_000)], None)), (vec![250, 750, 0, 0], 1));
    let (shares, scale) = table(&fleet, &steer(&[("eu", 600), ("uk", 300), ("us", 100)], None));
    assert_eq!((shares, scale > 1_000), (vec![150, 450, 300, 100], true));
    let zoned = RegionShares {
        zones: vec![Share { name: name("a"), permille: 500 }, Share { name: name("b"), permille: 500 }],
        ..steer(&[("eu", 800), ("uk", 200)], None)
    };
    assert_eq!(table(&fleet, &zoned).0, [400, 400, 200, 0]);
    let gone = RegionShares { zones: vec![Share { name: name("c"), permille: 1_000 }], ..zoned };
    assert_eq!(table(&fleet, &gone).0, [200, 600, 200, 0], "a zone that has nobody makes no difference");
}

#[test]
fn who_is_gone_is_stood_in_for() {
    let fleet = |eu, uk| [("eu", "a", 1, eu, false), ("uk", "a", 1, uk, false), ("us", "a", 1, true, false)];
    let half = steer(&[("eu", 500), ("uk", 500)], None);
    assert_eq!(table(&fleet(false, true), &half).0, [0, 1_000, 0]);
    assert_eq!(table(&fleet(false, false), &half).0, [0, 0, 1_000]);
    assert_eq!(table(&fleet(false, false), &RegionShares::default()).0, [0, 0, 1_000]);
}

#[test]
fn a_new_version_has_its_share_and_no_more() {
    let one = [("eu", "a", 1, true, true), ("eu", "a", 9, true, false), ("us", "a", 1, true, false)];
    assert_eq!(table(&one, &steer(&[("eu", 1_000)], Some(50))).0, [50, 950, 0]);
    assert_eq!(table(&one, &steer(&[("eu", 1_000)], Some(1_000))).0, [1_000, 0, 0]);
    assert_eq!(table(&one, &steer(&[("eu", 1_000)], Some(0))).0, [0, 1_000, 0]);
    let gone = [("eu", "a", 1, false, true), ("eu", "a", 9, true, false)];
    assert_eq!(
        table(&gone, &steer(&[("eu", 1_000)], Some(1_000))).0,
        [0, 1_000],
        "until it comes, the old one serves"
    );
    // All of the own region run it: the rest goes elsewhere, rather than to a version that has 5 %.
    let only = [("eu", "a", 1, true, true), ("us", "a", 1, true, false)];
    assert_eq!(table(&only, &steer(&[("eu", 1_000)], Some(50))).0, [50, 950]);
    assert_eq!(table(&only[..1], &steer(&[("eu", 1_000)], Some(0))).0, [1_000], "nobody else is left at all");
}
