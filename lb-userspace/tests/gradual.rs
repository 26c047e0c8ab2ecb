//! Tests of replica reports and slow start in compiled tables.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_common::backend::flags::{DOWN, DRAINING};
use lb_userspace::{
    desired::model::{BackendId, Desired, Health, Observed, Readiness},
    plan::compile::{Cache, Compiled, DeploymentSettings, Memory, compile},
};
use std::time::Duration;

#[derive(Default)]
struct Host {
    observed: Observed,
    memory: Memory,
    cache: Cache,
}

fn id(backend: &str) -> BackendId {
    BackendId { service: "s".parse().unwrap(), backend: backend.parse().unwrap() }
}

impl Host {
    fn at(&mut self, seconds: u64, desired: &Desired) -> Compiled {
        self.observed.now = Duration::from_secs(seconds);
        let settings = DeploymentSettings::default();
        let compiled = compile(desired, &self.observed, &self.memory, &settings, &mut self.cache).unwrap();
        self.memory = compiled.memory.clone();
        compiled
    }

    fn health(&mut self, backend: &str, health: Health) {
        self.observed.health.insert(id(backend), health);
    }

    fn says(&mut self, backend: &str, readiness: Readiness) {
        self.observed.replicas.insert(id(backend), readiness);
    }
}

fn service(settings: &str, backends: usize) -> Desired {
    let list: Vec<_> =
        (1..=backends).map(|i| format!(r#""b{i}":{{"address":"10.1.0.{i}","seat":{}}}"#, i - 1)).collect();
    let list = list.join(",");
    serde_json::from_str(&format!(
        r#"{{"services":{{"s":{{"vip":"10.0.0.1","port":80,"protocol":"tcp","table_size":4093,{settings},
            "backends":{{{list}}}}}}}}}"#
    ))
    .unwrap()
}

fn slots(compiled: &Compiled, backend: usize) -> u32 {
    compiled.status[0].backends[backend - 1].slots
}

/// Number of slots whose primary differs.
fn moved(a: &Compiled, b: &Compiled) -> usize {
    let table = |c: &Compiled| c.plan.services.values().next().unwrap().table.clone();
    table(a).iter().zip(table(b).iter()).filter(|(x, y)| x.primary_index() != y.primary_index()).count()
}

const SLOW: &str = r#""health":{"kind":"tcp"},"slow_start_s":30"#;

#[test]
fn a_backend_that_is_healthy_again_gets_its_share_in_four_steps() {
    let (mut host, desired) = (Host::default(), service(SLOW, 4));
    for backend in ["b1", "b2", "b3", "b4"] {
        host.health(backend, Health::Healthy);
    }
    let whole = host.at(1, &desired);
    assert!(
        whole.status[0].backends.iter().all(|b| b.slow_start_percent.is_none()),
        "a cold start is not slow"
    );
    let share = slots(&whole, 4);
    host.health("b4", Health::Unhealthy);
    assert_eq!(slots(&host.at(2, &desired), 4), 0);
    host.health("b4", Health::Healthy);
    let (mut before, mut total) = (host.at(3, &desired), 0);
    let mut seen = vec![(3, slots(&before, 4), before.status[0].backends[3].slow_start_percent)];
    for second in 4..=40 {
        let next = host.at(second, &desired);
        let changed = moved(&before, &next);
        if changed > 0 {
            seen.push((second, slots(&next, 4), next.status[0].backends[3].slow_start_percent));
            total += changed;
        }
        before = next;
    }
    let times: Vec<_> = seen.iter().map(|(at, _, percent)| (*at, *percent)).collect();
    assert_eq!(times, [(3, Some(12)), (13, Some(25)), (23, Some(50)), (33, None)]);
    // Of four backends' weights: 1 in 25, 2 in 26, 4 in 28, 8 in 32 parts.
    for ((_, got, _), part) in seen.iter().zip([1.0 / 25.0, 2.0 / 26.0, 4.0 / 28.0, 0.25]) {
        assert!((f64::from(*got) - part * 4_093.0).abs() < 3.0, "{seen:?}");
    }
    assert_eq!(moved(&whole, &before), 0, "in the end the table is as it was");
    let grown = (share - seen[0].1) as usize;
    assert!(total < grown + grown / 4, "{total} slots moved for {grown}");
    let next_ms = host.at(41, &desired).next_change_ms;
    assert!(next_ms.is_none_or(|at| at >= 300_000), "nothing more is due: {next_ms:?}");
}

#[test]
fn the_next_step_is_announced_and_a_new_backend_starts_slowly_too() {
    let mut host = Host::default();
    for backend in ["b1", "b2", "b3", "b4"] {
        host.health(backend, Health::Healthy);
    }
    host.at(1, &service(SLOW, 3));
    let desired = service(SLOW, 4);
    let compiled = host.at(100, &desired);
    assert_eq!(compiled.status[0].backends[3].slow_start_percent, Some(12));
    assert_eq!(compiled.next_change_ms, Some(110_000));
    // A drain does not start slow start, its end does; a backend of weight 0 has no slow start.
    let mut drained = desired.clone();
    let s = drained.service_mut(&"s".parse().unwrap()).unwrap();
    s.backends.get_mut(&"b1".parse().unwrap()).unwrap().state =
        lb_userspace::desired::model::BackendState::Draining;
    let compiled = host.at(200, &drained);
    assert_eq!(slots(&compiled, 1), 0);
    let compiled = host.at(300, &desired);
    assert_eq!(compiled.status[0].backends[0].slow_start_percent, Some(12));
    assert_eq!(compiled.status[0].backends[3].slow_start_percent, None);
    // The last remaining backend serves all flows, even during slow start.
    for backend in ["b2", "b3", "b4"] {
        host.health(backend, Health::Unhealthy);
    }
    assert_eq!(slots(&host.at(301, &desired), 1), 4_093);
}

#[test]
fn a_replicas_word_takes_its_slots_and_leaves_its_flows() {
    let (mut host, desired) = (Host::default(), service(r#""replica":{"kind":"stream"}"#, 3));
    assert_eq!(host.at(1, &desired).status[0].eligible, 3, "at a cold start all serve");
    for backend in ["b1", "b2", "b3"] {
        host.says(backend, Readiness::Ready);
    }
    let whole = host.at(2, &desired);
    for (said, bits) in [
        (Readiness::Draining, DRAINING),
        (Readiness::Loading, DRAINING),
        (Readiness::Failed, DRAINING | DOWN),
        (Readiness::Lost, DOWN),
    ] {
        host.says("b2", said);
        let compiled = host.at(3, &desired);
        assert_eq!(slots(&compiled, 2), 0, "{said}");
        assert_eq!(moved(&whole, &compiled) as u32, slots(&whole, 2), "{said}: only its own slots move");
        let index = compiled.status[0].backends[1].index;
        assert_eq!(compiled.plan.backends[&index].flags & (DRAINING | DOWN), bits, "{said}");
    }
    host.says("b2", Readiness::Ready);
    assert_eq!(moved(&whole, &host.at(4, &desired)), 0);
    // Replica reports affect only services that watch replicas.
    host.says("b1", Readiness::Draining);
    assert_eq!(host.at(5, &service(r#""drain_s":300"#, 3)).status[0].eligible, 3);
}
