//! Tests of the region policy in typical cases.

use super::*;
use crate::desired::model::RegionPolicy;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn place(text: &str, capacity: u64, load: u64) -> Place {
    Place {
        is_local: text == "eu",
        backends: 2,
        capacity: Some(capacity),
        load,
        waiting: load.saturating_sub(capacity),
        rtt_us: match text {
            "eu" => None,
            "uk" => Some(8_000),
            _ => Some(80_000),
        },
        ..Place::unknown(&name(text))
    }
}

fn here() -> Locality {
    Locality { region: name("eu"), zone: name("a") }
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
        let here = here();
        for _ in 0..seconds * 2 {
            self.now_ms += 500;
            let inputs = Inputs::alone(&here, &self.rules, (regions, &[]), self.now_ms);
            self.last = decide(&inputs, &self.last);
        }
        let text: Vec<String> =
            self.last.shares.iter().map(|s| format!("{} {}", s.name, s.permille)).collect();
        text.join(", ")
    }
}

/// Share that leaves the own region.
fn away(host: &Host) -> u16 {
    host.last.share_away(&name("eu"))
}

#[test]
fn the_own_region_has_everything_until_it_is_full() {
    let mut host = Host::new(rules());
    let at = |load| [place("eu", 100, load), place("uk", 100, 10), place("us", 100, 0)];
    assert_eq!(host.after(10, &at(0)), "eu 1000");
    assert_eq!(host.after(30, &at(89)), "eu 1000");
    // The first step of the spill: a load that does not react would make it go on.
    while away(&host) == 0 && host.now_ms < 100_000 {
        host.after(1, &at(94));
    }
    let spilled = host.last.shares.clone();
    assert!((100..300).contains(&away(&host)), "{spilled:?}");
    assert!(spilled.iter().all(|s| s.name != name("us")), "what is near has room: {spilled:?}");
    assert!(host.last.reason.contains("eu is at 94 %"), "{}", host.last.reason);
    host.after(60, &at(80));
    assert_eq!(host.last.shares, spilled, "between the thresholds nothing moves");
    host.after(8, &at(40));
    assert_eq!(host.last.shares, spilled, "it stands for a while");
    assert_eq!(host.after(10, &at(40)), "eu 1000");
}

#[test]
fn a_spill_never_shrinks_as_the_backlog_grows() {
    let mut before = 0;
    for load in (60..2_000).step_by(20) {
        let mut host = Host::new(rules());
        host.after(10, &[place("eu", 100, load), place("uk", 100, 0), place("us", 100, 0)]);
        assert!(away(&host) >= before, "{} at {load}, {before} before", away(&host));
        before = away(&host);
    }
    assert!(before >= 600, "{before}");
    // The same in time.
    let (mut host, mut before) = (Host::new(rules()), 0);
    for load in (60..2_000).step_by(20) {
        host.after(1, &[place("eu", 100, load), place("uk", 100, 0), place("us", 100, 0)]);
        assert!(away(&host) >= before, "{} at {load}, {before} before", away(&host));
        before = away(&host);
    }
}

#[test]
fn a_spill_is_bounded_and_fills_nobody_up() {
    let near_full = [place("eu", 100, 400), place("uk", 100, 85), place("us", 400, 0)];
    let mut host = Host::new(RegionRules { spill_most_percent: 50, ..rules() });
    host.after(10, &near_full);
    assert_eq!(away(&host), 500);
    assert!(host.last.reason.contains("the configured maximum"), "{}", host.last.reason);
    let mut host = Host::new(rules());
    let all_full = [place("eu", 100, 400), place("uk", 100, 110), place("us", 100, 130)];
    assert_eq!(host.after(10, &all_full), "eu 1000", "the others have no room");
    assert!(host.last.reason.contains("spill wanted, nowhere to go"), "{}", host.last.reason);
    assert!(host.last.spill.unplaced > 0);
    let mut host = Host::new(RegionRules { spill_most_percent: 0, ..rules() });
    assert_eq!(host.after(10, &near_full), "eu 1000");
}

#[test]
fn a_region_that_becomes_full_is_left() {
    let mut host = Host::new(rules());
    let at = |eu, uk| [place("eu", 100, eu), place("uk", 1_000, uk)];
    host.after(10, &at(110, 0));
    host.after(20, &at(85, 500));
    let spilled = away(&host);
    assert!(spilled > 100, "{spilled}");
    host.after(20, &at(85, 899));
    assert_eq!(away(&host), spilled, "what is there stays while it fits");
    host.after(30, &at(85, 4_000));
    assert!(away(&host) < spilled / 4, "{}", away(&host));
}

#[test]
fn nobody_spills_to_a_region_that_is_not_measured() {
    let mut unmeasured = place("us", 100, 0);
    unmeasured.capacity = None;
    let mut host = Host::new(rules());
    assert_eq!(host.after(10, &[place("eu", 100, 150), unmeasured]), "eu 1000");
    host.after(10, &[place("eu", 100, 150), place("uk", 100, 0)]);
    assert!(away(&host) > 200, "{}", away(&host));
}

#[test]
fn old_news_change_nothing() {
    let mut host = Host::new(rules());
    let spilled = host.after(10, &[place("eu", 100, 150), place("uk", 100, 0)]);
    assert_ne!(spilled, "eu 1000");
    let mut stale = place("eu", 1, 0);
    stale.is_stale = true;
    assert_eq!(host.after(60, &[stale.clone(), place("uk", 100, 0)]), spilled);
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
    assert_eq!(host.after(30, &[place("eu", 100, 80), place("us", 100, 0), place("uk", 100, 50)]), "eu 1000");
    host.after(1, &[eu, place("us", 100, 0), place("uk", 100, 50)]);
    let uk = host.last.shares.iter().find(|s| s.name == name("uk")).map_or(0, |s| s.permille);
    assert!((250..500).contains(&uk), "{:?}", host.last.shares);
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
        (1..20).fold(before.clone(), |d, tick| {
            decide(&Inputs::alone(&here(), &rules(), (&regions, &zones), tick * 500), &d)
        })
    };
    let shares =
        |d: &RegionDecision| d.zones.iter().map(|s| (s.name.to_string(), s.permille)).collect::<Vec<_>>();
    let calm = look(50, &RegionDecision::default());
    assert_eq!(shares(&calm), [("a".to_owned(), 1_000)]);
    let full = look(100, &RegionDecision::default());
    assert!(
        matches!(&shares(&full)[..], [(a, home), (b, _)] if a == "a" && b == "b" && *home < 850),
        "{full:?}"
    );
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

#[test]
fn a_region_without_the_version_is_left_while_another_has_it() {
    let lacks = |text: &str| Place { lacks_version: true, ..place(text, 100, 10) };
    let mut host = Host::new(rules());
    let all = [lacks("eu"), lacks("uk"), place("us", 100, 10)];
    assert_eq!(host.after(1, &all), "us 1000", "the nearest lacks it as well");
    assert!(
        host.last.reason.ends_with("; no replica of the rolled-out version takes flows in eu"),
        "{}",
        host.last.reason
    );
    assert_eq!(host.after(1, &[lacks("eu"), lacks("uk")]), "eu 1000", "any version rather than none");
    let down = Place { is_down: true, ..place("us", 100, 10) };
    assert_eq!(host.after(1, &[lacks("eu"), down]), "eu 1000", "and rather than a region that is down");
    assert_eq!(host.after(1, &[place("eu", 100, 10), lacks("uk")]), "eu 1000");
    // It is no destination of a spill either, and its weight goes to the others.
    let full = Host::after(&mut Host::new(rules()), 20, &[place("eu", 100, 300), lacks("uk")]);
    assert_eq!(full, "eu 1000");
    let weights = [("eu", 1), ("uk", 1)].map(|(n, w)| (name(n), w)).into();
    let mut host = Host::new(RegionRules { policy: RegionPolicy::Weighted, weights, ..rules() });
    assert_eq!(host.after(1, &[place("eu", 100, 10), lacks("uk")]), "eu 1000");
}

#[test]
fn full_regions_are_reported_by_policies_that_send_nothing_elsewhere() {
    let weights: BTreeMap<Name, u32> = [("eu", 3), ("us", 1)].map(|(n, w)| (name(n), w)).into();
    let weighted = RegionRules { policy: RegionPolicy::Weighted, weights, ..rules() };
    let passive = RegionRules {
        policy: RegionPolicy::ActivePassive,
        allowed: Some(["eu", "us"].map(name).into()),
        ..rules()
    };
    let full_for = |rules: &RegionRules, seconds: u64, eu: u64, us: u64| {
        let mut host = Host::new(rules.clone());
        host.after(seconds, &[place("eu", 100, eu), place("us", 100, us)]);
        let full: Vec<String> = host.last.full.iter().map(ToString::to_string).collect();
        (full.join(" "), host.last.spill.unplaced, host.last.reason)
    };
    let (full, waiting, reason) = full_for(&weighted, 10, 200, 350);
    assert_eq!((full.as_str(), waiting), ("eu us", 350));
    assert_eq!(reason, "by weight over the regions that are up; full: eu at 200 %, us at 350 %");
    assert_eq!(full_for(&weighted, 10, 50, 350).0, "us");
    assert_eq!(
        full_for(&weighted, 10, 149, 149),
        (String::new(), 0, "by weight over the regions that are up".into())
    );
    assert_eq!(full_for(&weighted, 2, 200, 350).0, "", "a moment is no finding");
    assert_eq!(full_for(&passive, 10, 200, 350).0, "eu", "the passive one gets nothing");
    assert_eq!(full_for(&passive, 10, 20, 350).0, "");
    // It ends with the load.
    let mut host = Host::new(weighted);
    host.after(10, &[place("eu", 100, 300), place("us", 100, 0)]);
    assert_eq!(host.last.full, [name("eu")]);
    host.after(1, &[place("eu", 100, 90), place("us", 100, 0)]);
    assert!(host.last.full.is_empty() && host.last.spill.unplaced == 0);
}
