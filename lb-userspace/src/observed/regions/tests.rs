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
    let mut places = sum_places(&backends, |b| Some(&b.region), &mut notes);
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
        let (who, shown, verdict) = rollouts.update(&name("s"), &service, rollout, &book);
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
