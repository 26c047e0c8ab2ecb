//! Tests measuring with replicas that lie, are silent, or reported before the restart; and reports between hosts.

use super::{measure::*, *};
use crate::{
    desired::model::{BackendId, Locality, Phase, Readiness, Report, Service},
    observed::{
        health,
        replica::{self, ReplicaEntry},
    },
};
use serde_json::json;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn id(backend: &str) -> BackendId {
    BackendId { service: name("s"), backend: name(backend) }
}

fn service() -> Service {
    let mut service = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp",
        "replica": {"kind": "stream", "interval_ms": 100, "timeout_ms": 100}, "backends": {}});
    for (i, backend) in ["a", "b", "c", "d"].iter().enumerate() {
        service["backends"][backend] = json!({"address": format!("10.1.0.{i}"), "region": "eu"});
    }
    serde_json::from_value(service).unwrap()
}

fn report(running: u32, capacity: u32) -> Report {
    let text = json!({"phase": "ready", "running": running, "waiting": 0, "capacity": {"running": capacity}});
    Report::parse(text.to_string().as_bytes()).unwrap()
}

fn heard(report: Report, reports: u64) -> ReplicaEntry {
    ReplicaEntry {
        readiness: Readiness::from(report.phase),
        report: Some(report),
        reports,
        ..ReplicaEntry::default()
    }
}

/// Measures region eu at `now_ms`; returns the sum and the notes.
fn eu(
    replicas: &replica::ReplicaRegistry,
    report_times: &mut ReportTimes,
    now_ms: u64,
) -> (crate::plan::policy::region::Place, Vec<String>) {
    report_times.update(replicas, now_ms);
    let here = Locality { region: name("eu"), zone: name("a") };
    let health = health::HealthRegistry::default();
    let backends = measure_backends(&name("s"), &service(), &here, (&health, replicas, report_times), now_ms);
    let mut notes = Vec::new();
    let counting = Counting { most: KnownGood::default().update(&backends, now_ms), versions: None };
    let mut places = sum_places(&backends, |b| Some(&b.region), counting, &mut notes);
    (places.remove(0), notes)
}

#[test]
fn capacity_is_bounded_and_stale_reports_are_named() {
    let (book, mut known) = (replica::ReplicaRegistry::default(), ReportTimes::default());
    book.change(|all| {
        for (backend, running, capacity) in [("a", 4, 8), ("b", 2, 8), ("c", 0, 1_000_000)] {
            all.insert(id(backend), heard(report(running, capacity), 1));
        }
        all.insert(id("d"), heard(Report { phase: Phase::Draining, ..report(7, 8) }, 1));
    });
    let (place, notes) = eu(&book, &mut known, 1_000);
    assert_eq!(
        (place.backends, place.capacity, place.load),
        (3, Some(8 + 8 + 64), 6),
        "one drains, one lies"
    );
    assert_eq!(notes, ["capacity reported by c (1000000) is counted as 64, 8 times the median replica's"]);
    // Only a continues to report: after five intervals and timeouts the others are stale.
    book.change(|all| all.get_mut(&id("a")).unwrap().reports = 2);
    let (place, notes) = eu(&book, &mut known, 2_500);
    assert_eq!((place.is_stale, place.load), (true, 6), "the last good state stands");
    assert_eq!(notes[1], "2 of 3 replicas in eu have not reported recently");
    book.change(|all| all.get_mut(&id("b")).unwrap().reports = 2);
    assert!(!eu(&book, &mut known, 2_600).0.is_stale);
}

#[test]
fn what_was_heard_before_a_restart_is_old_and_who_says_nothing_is_not_measured() {
    let (book, mut known) = (replica::ReplicaRegistry::default(), ReportTimes::default());
    book.change(|all| {
        for backend in ["a", "b", "c"] {
            all.insert(id(backend), heard(report(8, 8), 0));
        }
    });
    let (place, _) = eu(&book, &mut known, 0);
    assert!(place.is_stale && place.capacity == Some(24));
    book.change(|all| {
        for backend in ["b", "c"] {
            all.get_mut(&id(backend)).unwrap().report.as_mut().unwrap().capacity = None;
        }
    });
    assert_eq!(eu(&book, &mut known, 0).0.capacity, None, "one of four says nothing about all");
}

#[test]
fn a_new_version_is_found_and_counted_from_the_beginning_of_its_roll_out() {
    let (book, mut rollouts) = (replica::ReplicaRegistry::default(), rollouts::Rollouts::default());
    let mut service = service();
    let rollout: Rollout =
        serde_json::from_value(json!({"model": "m", "version": "v2", "permille": 50, "since_ms": 1}))
            .unwrap();
    service.rollout = Some(rollout.clone());
    let say = |backend: &str, version: &str, finished: u64, failed: u64| {
        let answers =
            json!({"finished": finished, "failed": failed, "first_token_ms": 1.0, "first_tokens": finished});
        let text = json!({"phase": "ready", "running": 0, "waiting": 0, "model": "m", "version": version,
            "answers": answers});
        let report = Report::parse(text.to_string().as_bytes()).unwrap();
        book.change(|all| all.insert(id(backend), heard(report, 1)));
    };
    say("a", "v1", 1_000, 900);
    say("b", "v2", 500, 400);
    let mut look = |rollout: &Rollout| {
        let (who, shown, verdict) =
            rollouts.update((&name("s"), &service), rollout, &book, Default::default());
        (who, shown.new.finished, shown.new.failed, shown.old.finished, verdict)
    };
    use crate::plan::policy::canary::CanaryVerdict;
    let first = look(&rollout);
    assert_eq!((first.0, first.1, first.3), ([name("b")].into(), 0, 0), "what was before does not count");
    say("b", "v2", 530, 400);
    assert!(matches!(look(&rollout), (_, 30, 0, 0, CanaryVerdict::Fine(_))));
    // a is upgraded: its new process counts from 0.
    say("a", "v2", 20, 10);
    assert!(matches!(look(&rollout), (_, 50, 10, 0, CanaryVerdict::Abort(_))));
    let again = Rollout { since_ms: 2, ..rollout };
    assert!(
        matches!(look(&again), (_, 0, 0, 0, CanaryVerdict::Waiting(_))),
        "another roll-out is counted anew"
    );
}

/// A replica in a region, as measured.
fn measured(
    region: &str,
    backend: &str,
    (running, waiting): (u64, u64),
    capacity: u32,
    is_new: bool,
) -> MeasuredBackend {
    MeasuredBackend {
        name: name(backend),
        region: name(region),
        zone: name("a"),
        is_placed: true,
        takes: true,
        is_up: Some(true),
        load: Some((running, waiting)),
        capacity: Some(capacity),
        is_new,
        version: Some(if is_new { "v2" } else { "v1" }.to_owned()),
        is_fresh: true,
    }
}

fn sum(backends: &[MeasuredBackend], new: Option<u16>) -> Vec<(String, Option<u64>, u64)> {
    let home = name("eu");
    let rollout = new.map(|permille| -> Rollout {
        serde_json::from_value(json!({"model": "m", "version": "v2", "permille": permille})).unwrap()
    });
    let versions =
        rollout.as_ref().map(|rollout| VersionShares { rollout, zones_of: None, home: Some(&home) });
    let counting = Counting { most: KnownGood::default().update(backends, 0), versions };
    let places = sum_places(backends, |b| Some(&b.region), counting, &mut Vec::new());
    places.into_iter().map(|p| (p.name.to_string(), p.capacity, p.load)).collect()
}

#[test]
fn a_tie_of_liars_does_not_raise_the_bound_on_capacity() {
    let mut west = [
        measured("eu", "ea", (4, 0), 4, false),
        measured("eu", "eb", (4, 0), 4, false),
        measured("us", "wa", (0, 0), 1_000_000, false),
        measured("us", "wb", (0, 0), 1_000_000, false),
    ];
    assert_eq!(sum(&west, None)[1], ("us".to_owned(), Some(64), 0), "the lower median bounds them");
    // The same if the honest ones no longer take flows: what they have said still counts.
    west[0].takes = false;
    assert_eq!(sum(&west, None)[1], ("us".to_owned(), Some(64), 0));
    // And if they are gone: the median that was known changes slowly.
    let mut good = KnownGood::default();
    assert_eq!(good.update(&west, 0), 32);
    assert_eq!(good.update(&west[2..], 59_000), 32);
    assert_eq!(good.update(&west[2..], 60_000), 64);
    assert_eq!(good.update(&west[2..], 61_000), 64);
}

#[test]
fn a_backlog_that_one_replica_claims_is_bounded_by_its_neighbours() {
    let two = [measured("eu", "ea", (4, 1), 4, false), measured("eu", "eb", (900_000, 900_000), 4, false)];
    assert_eq!(sum(&two, None), [("eu".to_owned(), Some(8), 4 + 1 + 4 + 12)]);
}

#[test]
fn capacity_counts_what_both_versions_can_take_by_their_shares() {
    let east = [
        measured("eu", "ea", (8, 5), 8, false),
        measured("eu", "eb", (0, 0), 8, true),
        measured("us", "wa", (0, 0), 8, false),
    ];
    assert_eq!(sum(&east, None)[0], ("eu".to_owned(), Some(16), 13));
    let canary = sum(&east, Some(50));
    assert_eq!(canary[0], ("eu".to_owned(), Some(8), 13), "13 of 8 is overload, not 81 %");
    assert_eq!(canary[1].1, Some(8), "us has the version with most of the flows");
    let promoted = sum(&east, Some(1_000));
    assert_eq!(promoted[0], ("eu".to_owned(), Some(8), 0), "only the new version counts");
    assert_eq!(promoted[1].1, Some(0), "us does not have it, so it has no room");
    assert_eq!(
        sum(&east[..1], Some(1_000))[0].1,
        Some(8),
        "the own region serves its clients by what it has"
    );
}

#[test]
fn the_first_host_of_a_region_tells_where_its_flows_go() {
    let report = |host: &str, region: &str, zone: &str, away: u16| -> PeerReport {
        serde_json::from_value(json!({"host": host, "region": region, "zone": zone, "rtt_us": {"eu": 900},
            "steers": {"s": {"shares": [{"name": region, "permille": 1_000 - away}, {"name": "eu", "permille": away}],
                "zones": [{"name": zone, "permille": 1_000}]}}}))
        .unwrap()
    };
    let all = [report("h2", "us", "a", 100), report("h1", "us", "b", 200), report("h3", "eu", "b", 0)];
    let here = Locality { region: name("eu"), zone: name("a") };
    let regions = peers::regions(&name("s"), &here, &all);
    assert_eq!((regions.len(), regions[0].shares[1].permille, regions[0].rtt_us[&name("eu")]), (1, 200, 900));
    let zones = peers::zones(&name("s"), &here, &all);
    assert_eq!((zones.len(), &zones[0].name), (1, &name("b")));
    // An older report without shares says that the region keeps its flows.
    let old = serde_json::from_value(json!({"host": "h", "region": "us", "zone": "a"})).unwrap();
    assert!(peers::regions(&name("s"), &here, &[old]).is_empty());
}

#[test]
fn capacity_of_a_region_that_a_roll_out_leaves_out_is_that_of_the_old_version() {
    let all = [
        measured("eu", "ea", (0, 0), 8, true),
        measured("us", "wa", (4, 0), 16, false),
        measured("us", "wb", (0, 0), 8, true),
    ];
    let home = name("eu");
    let count = |regions: serde_json::Value| {
        let rollout: Rollout = serde_json::from_value(
            json!({"model": "m", "version": "v2", "permille": 1_000, "regions": regions}),
        )
        .unwrap();
        let versions = Some(VersionShares { rollout: &rollout, zones_of: None, home: Some(&home) });
        let places = sum_places(&all, |b| Some(&b.region), Counting { most: 100, versions }, &mut Vec::new());
        let zones_of = Some(&home);
        let versions = Some(VersionShares { rollout: &rollout, zones_of, home: None });
        let zones =
            sum_places(&all[..1], |b| Some(&b.zone), Counting { most: 100, versions }, &mut Vec::new());
        (places[1].capacity, zones[0].capacity)
    };
    assert_eq!(count(json!([])), (Some(8), Some(8)));
    assert_eq!(count(json!(["eu"])), (Some(16), Some(8)), "us serves the old version");
}

#[test]
fn versions_are_counted_by_region() {
    let mut all = [
        measured("eu", "ea", (0, 0), 8, false),
        measured("eu", "eb", (0, 0), 8, true),
        measured("us", "wa", (0, 0), 8, false),
    ];
    all[1].takes = false;
    let rollout: Rollout = serde_json::from_value(
        json!({"model": "m", "version": "v2", "permille": 1_000, "state": "promoted", "regions": ["eu"]}),
    )
    .unwrap();
    let found = versions_by_region(all.iter(), &rollout);
    let counts: Vec<_> = found.iter().map(|v| (v.region.as_str(), v.new, v.new_ready, v.old_ready)).collect();
    assert_eq!(counts, [("eu", 1, 0, 1), ("us", 0, 0, 1)]);
    assert_eq!((found[0].is_included, found[1].is_included), (true, false));
    assert_eq!(found[0].old_versions, ["v1"]);
}

#[test]
fn an_abort_stops_the_roll_out_on_all_services_of_the_model() {
    let service = |port: u16, rollout: serde_json::Value| json!({"vip": "10.0.0.1", "port": port, "protocol": "tcp", "rollout": rollout});
    let running = |model: &str, version: &str| json!({"model": model, "version": version, "permille": 50});
    let mut desired: crate::desired::model::Desired = serde_json::from_value(json!({"services": {
        "chat": service(1, running("m", "v2")), "batch": service(2, running("m", "v2")),
        "other": service(3, running("n", "v2")), "newer": service(4, running("m", "v3")),
        "done": service(5, json!({"model": "m", "version": "v2", "permille": 50, "state": "promoted"})),
        "none": service(6, json!(null)),
    }}))
    .unwrap();
    let judged = desired.services[&name("chat")].rollout.clone().unwrap();
    rollouts::Abort::new(&name("chat"), &judged, "20.0 % of 50 requests failed".to_owned())
        .apply(&mut desired);
    let state = |service: &str| {
        let rollout = desired.services[&name(service)].rollout.as_ref();
        rollout.map(|r| (r.state, r.reason.as_str()))
    };
    let why = "20.0 % of 50 requests failed";
    assert_eq!(state("chat"), Some((RolloutState::Aborted, why)));
    let there = format!("on service chat, {why}");
    assert_eq!(state("batch"), Some((RolloutState::Aborted, there.as_str())));
    for (service, expected) in
        [("other", RolloutState::Running), ("newer", RolloutState::Running), ("done", RolloutState::Promoted)]
    {
        assert_eq!(state(service).map(|s| s.0), Some(expected), "{service}");
    }
}

/// A snapshot with one service, whose decision is given.
fn problems(policy: &str, decision: serde_json::Value, rollout: serde_json::Value) -> Vec<String> {
    let place = |name: &str, load: u64| {
        json!({"name": name, "is_local": name == "eu", "is_allowed": true, "is_draining": false, "is_down": false,
            "is_spilling": false, "backends": 1, "capacity": 8, "load": load, "is_stale": false, "rtt_us": null})
    };
    let share = json!([{"name": "eu", "permille": 1000}]);
    let mut all = json!({"shares": share, "reason": "why"});
    all.as_object_mut().unwrap().extend(decision.as_object().unwrap().clone());
    let explained: Explained = serde_json::from_value(json!({"service": "s", "region": "eu", "zone": "a",
        "policy": policy, "decided_by": "h", "regions": [place("eu", 16), place("us", 28)], "zones": [],
        "decision": all, "steer": {"shares": share}, "rollout": rollout}))
    .unwrap();
    let services = [(name("s"), explained)].into();
    RegionSnapshot { services, ..RegionSnapshot::default() }.problems()
}

#[test]
fn full_regions_are_a_problem_under_every_policy() {
    let unplaced = json!({"shares": [], "changed_ms": 0, "load_then": 0, "demand": 0, "unplaced": 28});
    let full = json!({"spill": unplaced, "full": ["eu", "us"]});
    assert_eq!(
        problems("weighted", full.clone(), json!(null)),
        [
            "service s: full: eu at 200 %, us at 350 % of the capacity, 28 requests wait, and policy weighted sends them \
          nowhere else; add replicas, change the weights, or limit the demand"
        ]
    );
    assert!(
        problems("active-passive", full, json!(null))[0]
            .contains("add replicas, use policy active-active, or"),
    );
    let spill = problems("active-active", json!({"spill": unplaced}), json!(null));
    assert!(
        spill[0].starts_with("service s: spill wanted, nowhere to go: about 28 requests of region eu"),
        "{spill:?}"
    );
    assert!(problems("weighted", json!({}), json!(null)).is_empty());
}

#[test]
fn a_promoted_version_that_a_region_lacks_is_a_problem() {
    let region = |name: &str, new: u32| {
        json!({"region": name, "is_included": true, "new": new, "new_ready": new, "old_ready": 1,
            "old_versions": ["v1"]})
    };
    let shown = |state: &str, us: u32| {
        let tally = json!({"replicas": 0, "counting": 0, "finished": 0, "failed": 0, "first_token_ms": 0.0,
            "first_tokens": 0});
        let rollout = json!({"model": "m", "version": "v2", "permille": 50, "state": state});
        let regions = serde_json::from_value(json!([region("eu", 1), region("us", us)])).unwrap();
        let coverage = crate::plan::policy::coverage::Coverage::new(
            &serde_json::from_value(rollout.clone()).unwrap(),
            regions,
        );
        let mut all =
            json!({"service": "s", "new": tally, "old": tally, "verdict": "", "coverage": coverage});
        all.as_object_mut().unwrap().extend(rollout.as_object().unwrap().clone());
        all
    };
    assert_eq!(
        problems("active-active", json!({}), shown("promoted", 0)),
        [
            "roll-out of v2 on service s is promoted, but not everywhere: v2 in 1 of 2 regions; us still serves v1"
        ]
    );
    assert!(problems("active-active", json!({}), shown("promoted", 1)).is_empty());
    assert!(problems("active-active", json!({}), shown("running", 0)).is_empty(), "it is not finished");
}
