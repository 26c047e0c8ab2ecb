//! Applying, adopting and failing, over maps in memory that check each single write.

use super::{fake::*, *};
use crate::desired::model::{
    Backend, BackendState, ForwardingMode, HealthCheck, NextHop, OnDown, Ports, Protocol, Scheduler, Service,
    WhenAllDown,
};
use proptest::prelude::*;
use std::sync::Mutex;

pub(super) fn name(s: &str) -> Name {
    s.parse().unwrap()
}

pub(super) fn service(vip: &str, port: Ports, backends: &[(&str, &str, u32)]) -> Service {
    let backend = |(n, a, w): &(&str, &str, u32)| {
        (
            name(n),
            Backend {
                address: a.parse().unwrap(),
                weight: *w,
                state: BackendState::Up,
                seat: None,
                port: None,
                server_id: None,
                region: None,
                zone: None,
            },
        )
    };
    Service {
        vip: vip.parse().unwrap(),
        port,
        protocol: Protocol::Tcp,
        mode: ForwardingMode::Ipip,
        scheduler: Scheduler::Maglev,
        load_cap: None,
        new_flow_rate: None,
        new_flow_burst: None,
        source_rate: None,
        source_burst: None,
        source_prefix_v4: 32,
        source_prefix_v6: 64,
        second_chance: None,
        table_size: Some(251),
        seed: None,
        drain_s: 300,
        udp_stateless: false,
        quic: Vec::new(),
        tcp_timeout_s: 7_440,
        udp_timeout_s: 60,
        gue_port: 6080,
        on_down: OnDown::Keep,
        when_all_down: WhenAllDown::Keep,
        panic_percent: Some(0),
        max_ejection_percent: None,
        ejection_window_s: 60,
        seating: Vec::new(),
        replica: None,
        regions: None,
        rollout: None,
        slow_start_s: 0,
        health: HealthCheck::default(),
        backends: backends.iter().map(backend).collect(),
    }
}

pub(super) fn desired(services: Vec<(&str, Service)>) -> Arc<Desired> {
    Arc::new(Desired {
        services: services.into_iter().map(|(n, s)| (name(n), s.into())).collect(),
        ..Desired::default()
    })
}

/// A reconciler over shared maps, and the state that it saved.
pub(super) struct Bed {
    pub maps: SharedMaps,
    kept: Arc<Mutex<Vec<u8>>>,
    pub published: watch::Receiver<Arc<Published>>,
    pub reconciler: Reconciler<SharedMaps>,
    settings: DeploymentSettings,
}

fn start(maps: SharedMaps, kept: &Arc<Mutex<Vec<u8>>>) -> Bed {
    start_with(maps, kept, DeploymentSettings::default())
}

/// Starts a reconciler over `maps` with these settings.
pub(super) fn start_with(maps: SharedMaps, kept: &Arc<Mutex<Vec<u8>>>, settings: DeploymentSettings) -> Bed {
    let bytes = kept.lock().unwrap().clone();
    let keep = Arc::clone(kept);
    let (reconciler, published) = Reconciler::new(
        maps.clone(),
        settings.clone(),
        (!bytes.is_empty()).then_some(&bytes),
        Box::new(move |b| *keep.lock().unwrap() = b),
    )
    .unwrap();
    Bed { maps, kept: Arc::clone(kept), published, reconciler, settings }
}

fn bed() -> Bed {
    start(SharedMaps(Arc::new(Mutex::new(FakeMaps::new(16, 32_768, 64)))), &Arc::default())
}

impl Bed {
    /// Applies a state, and returns the answer that the API would get.
    pub fn set(&mut self, desired: &Arc<Desired>, revision: u64) -> Result<Applied, ReconcileError> {
        let (applied, mut answer) = oneshot::channel();
        let event = Event::Desired { desired: Arc::clone(desired), revision, applied: Some(applied) };
        self.reconciler.step(vec![event], clock::boot());
        answer.try_recv().expect("answered within the step")
    }

    /// Whether the API would accept a state.
    pub fn check(&mut self, desired: &Arc<Desired>) -> Result<(), ReconcileError> {
        let (fits, mut answer) = oneshot::channel();
        self.reconciler.step(vec![Event::Check { desired: Arc::clone(desired), fits }], clock::boot());
        answer.try_recv().expect("answered within the step")
    }

    fn writes(&self) -> u32 {
        self.maps.0.lock().unwrap().writes
    }

    /// Starts another daemon over the same maps.
    pub fn restart(self) -> Self {
        start_with(self.maps.clone(), &self.kept, self.settings)
    }
}

fn two() -> Arc<Desired> {
    desired(vec![
        ("web", service("10.0.0.1", Ports::One(80), &[("a", "10.1.0.1", 1), ("b", "10.1.0.2", 1)])),
        ("all", service("10.0.0.2", Ports::Any, &[("a", "10.1.0.1", 3)])),
    ])
}

#[test]
fn a_restart_with_the_same_state_writes_nothing() {
    let mut bed = bed();
    bed.set(&two(), 1).unwrap();
    let mut more = (*two()).clone();
    more.service_mut(&name("web")).unwrap().backends.remove(&name("a"));
    bed.set(&Arc::new(more.clone()), 2).unwrap();
    let before = bed.writes();
    let mut bed = bed.restart();
    let applied = bed.set(&Arc::new(more), 2).unwrap();
    assert!(applied.written.is_nothing(), "{applied:?}");
    assert_eq!(bed.writes(), before);
}

#[test]
fn what_comes_before_the_first_state_writes_nothing() {
    let mut bed = bed();
    bed.set(&two(), 1).unwrap();
    let before = bed.writes();
    let mut bed = bed.restart();
    let hop = NextHop {
        path_mtu: None,
        ifindex: 7,
        vlan: 0,
        egress_mac: [2; 6],
        next_hop: [4; 6],
        mtu: 1500,
        source: None,
        is_routed: false,
    };
    let early = vec![
        Event::Paths(Paths {
            next_hops: BTreeMap::from([("10.1.0.1".parse().unwrap(), hop)]),
            ..Paths::default()
        }),
        Event::Health {
            id: BackendId { service: name("web"), backend: name("a") },
            health: Health::Unhealthy,
            at: Duration::ZERO,
        },
        Event::Swept(Arc::default()),
    ];
    bed.reconciler.step(early, clock::boot());
    bed.reconciler.step(Vec::new(), clock::boot());
    assert_eq!(bed.writes(), before, "the services of the last daemon were touched");
    // The last daemon's memory is untouched too: the same state is a restart, not a first start.
    let kept: Kept = serde_json::from_slice(&bed.kept.lock().unwrap()).unwrap();
    assert_eq!(kept.memory.services.len(), 2);
}

#[test]
fn an_unchanged_state_writes_nothing() {
    let mut bed = bed();
    bed.set(&two(), 1).unwrap();
    let before = bed.writes();
    assert!(bed.set(&two(), 2).unwrap().written.is_nothing());
    assert_eq!(bed.writes(), before);
    assert_eq!(bed.published.borrow().revision, 2);
}

#[test]
fn live_flows_are_the_load_of_least_flows() {
    let mut bed = bed();
    let mut state = (*two()).clone();
    state.service_mut(&name("web")).unwrap().scheduler = Scheduler::Lc;
    bed.set(&Arc::new(state), 1).unwrap();
    let indices: Vec<u32> =
        bed.published.borrow().services[&name("web")].backends.iter().map(|b| b.index).collect();
    let sweep = Sweep { flows: BTreeMap::from([(indices[0], 7)]), ..Sweep::default() };
    bed.reconciler.step(vec![Event::Swept(Arc::new(sweep))], clock::boot());
    let maps = bed.maps.0.lock().unwrap();
    let expect: BTreeMap<u32, u64> =
        indices.iter().map(|&i| (i, if i == indices[0] { 7 } else { 0 })).collect();
    assert_eq!(maps.flows, expect, "zero is reported too, and other services are left alone");
}

#[test]
fn what_does_not_fit_keeps_its_table_and_stops_nothing_else() {
    let mut bed = bed();
    bed.set(&two(), 1).unwrap();
    let mut large = (*two()).clone();
    large.service_mut(&name("web")).unwrap().table_size = Some(65_537);
    large.service_mut(&name("web")).unwrap().backends.get_mut(&name("b")).unwrap().state =
        BackendState::Draining;
    large.services.insert(name("new"), service("10.0.0.3", Ports::One(80), &[("c", "10.1.0.3", 1)]).into());
    bed.set(&Arc::new(large.clone()), 2).unwrap();
    let published = bed.published.borrow().clone();
    assert_eq!((published.revision, &published.error), (2, &None));
    assert!(published.services.contains_key(&name("new")));
    let problem = published.problems[&name("web")].to_string();
    assert!(
        published.problems.len() == 1 && problem.contains("no room for a table of 65788 slots"),
        "{problem}"
    );
    let web = &published.services[&name("web")];
    let share = |n: &str| web.backends.iter().find(|b| b.name == Some(name(n))).unwrap().slots;
    assert_eq!((web.table_size, share("a"), share("b")), (251, 251, 0), "it is drained nevertheless");
    // The service is retried without an event; a size that fits ends the problem.
    bed.reconciler.step(Vec::new(), clock::boot());
    assert_eq!(bed.published.borrow().problems.len(), 1);
    large.service_mut(&name("web")).unwrap().table_size = Some(4_093);
    bed.set(&Arc::new(large), 3).unwrap();
    assert!(bed.published.borrow().problems.is_empty());
    assert_eq!(bed.published.borrow().services[&name("web")].table_size, 4_093);
}

#[test]
fn after_a_failed_write_the_next_attempt_finishes() {
    for fails_after in 0..20 {
        let mut bed = bed();
        bed.set(&two(), 1).unwrap();
        let mut next = (*two()).clone();
        next.services.remove(&name("all"));
        next.services
            .insert(name("new"), service("10.0.0.3", Ports::Range(1, 9), &[("c", "10.1.0.3", 1)]).into());
        next.service_mut(&name("web")).unwrap().backends.remove(&name("b"));
        let next = Arc::new(next);
        bed.maps.0.lock().unwrap().fails_after.set(Some(fails_after));
        let first = bed.set(&next, 2);
        bed.maps.0.lock().unwrap().fails_after.set(None);
        if first.is_err() {
            assert!(bed.published.borrow().error.is_some());
            bed.set(&next, 2).unwrap();
        }
        assert!(bed.published.borrow().error.is_none());
        assert!(bed.set(&next, 2).unwrap().written.is_nothing(), "after {fails_after} writes");
        assert_eq!(bed.maps.0.lock().unwrap().keys.len(), 1);
    }
}

/// Strategy: states of a few services and backends, with changing names and addresses.
fn any_desired() -> impl Strategy<Value = Arc<Desired>> {
    let backends = proptest::collection::btree_map(0u8..6, (0u32..4, 0u8..3), 0..5);
    let one = (0u8..3, 0u8..3, backends);
    proptest::collection::btree_map(0u8..4, one, 0..4).prop_map(|services| {
        let mut state = Desired::default();
        for (i, (vip, port, backends)) in services {
            let ports = match port {
                0 => Ports::Any,
                1 => Ports::Range(100, 200),
                _ => Ports::One(80),
            };
            let mut s = service(&format!("10.0.0.{}", vip + 1), ports, &[]);
            s.scheduler = [Scheduler::Maglev, Scheduler::P2c, Scheduler::Wrr, Scheduler::SourceHash]
                [(i as usize + backends.len()) % 4];
            s.seed = (backends.len() == 3).then_some(3);
            for (b, (weight, st)) in backends {
                let state = [BackendState::Up, BackendState::Draining, BackendState::Down][st as usize];
                let address = format!("10.1.0.{}", b + 1).parse().unwrap();
                s.backends.insert(
                    name(&format!("b{b}")),
                    Backend {
                        address,
                        weight,
                        state,
                        seat: None,
                        port: None,
                        server_id: None,
                        region: None,
                        zone: None,
                    },
                );
            }
            state.services.insert(name(&format!("s{i}")), s.into());
        }
        // Only states that the model allows reach the reconciler.
        while let Some(bad) = state.check().first().map(|_| state.services.keys().next().cloned()) {
            match bad {
                Some(bad) => state.services.remove(&bad),
                None => break,
            };
        }
        Arc::new(state)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// From any state to any other, with restarts in between: the maps end as planned, and no single write
    /// in between leaves a packet with a dangling reference (the maps assert that).
    #[test]
    fn the_maps_end_as_wanted(states in proptest::collection::vec((any_desired(), any::<bool>()), 1..6)) {
        let mut bed = bed();
        for (revision, (state, restart)) in states.into_iter().enumerate() {
            if restart {
                bed = bed.restart();
            }
            bed.set(&state, revision as u64 + 1).unwrap();
            prop_assert!(bed.published.borrow().problems.is_empty());
            let keys = bed.maps.0.lock().unwrap().keys.len();
            let exact = state.services.values().filter(|s| matches!(s.port, Ports::One(_))).count();
            prop_assert_eq!(keys, exact);
            prop_assert!(bed.set(&state, revision as u64 + 1).unwrap().written.is_nothing());
        }
    }
}

#[test]
fn what_is_known_of_a_removed_backend_is_forgotten() {
    let mut bed = bed();
    let mut tell = |event| bed.reconciler.step(vec![event], clock::boot());
    let id = |n: &str| BackendId { service: name("web"), backend: name(n) };
    let web = service("10.0.0.1", Ports::One(80), &[("a", "10.1.0.1", 1), ("b", "10.1.0.2", 1)]);
    tell(Event::Desired { desired: desired(vec![("web", web)]), revision: 1, applied: None });
    for backend in ["a", "b"] {
        tell(Event::Health { id: id(backend), health: Health::Healthy, at: clock::boot() });
        tell(Event::Replica(id(backend), Readiness::Ready));
    }
    tell(Event::Health { id: id("b"), health: Health::Unknown, at: clock::boot() });
    tell(Event::Replica(id("b"), Readiness::Unknown));
    let observed = bed.published.borrow().observed.clone();
    assert_eq!(observed.health.keys().collect::<Vec<_>>(), [&id("a")]);
    assert_eq!(observed.replicas.keys().collect::<Vec<_>>(), [&id("a")]);
}

#[test]
fn the_index_of_a_removed_service_is_reused_after_a_grace_period() {
    let mut bed = bed();
    let web = |seed| {
        let backends = [("a", "10.1.0.1", 1)];
        desired(vec![("web", Service { seed: Some(seed), ..service("10.0.0.1", Ports::One(80), &backends) })])
    };
    let other = desired(vec![("other", service("10.0.0.2", Ports::One(80), &[("b", "10.1.0.2", 1)]))]);
    bed.set(&web(1), 1).unwrap();
    // Another seed: the first view was in use until now.
    bed.set(&web(2), 2).unwrap();
    bed.set(&desired(vec![]), 3).unwrap();
    bed.reconciler.age(Duration::from_secs(1_000));
    let sweep = Sweep { began: clock::boot(), ..Sweep::default() };
    bed.reconciler.step(vec![Event::Swept(Arc::new(sweep))], clock::boot());
    let graces = bed.maps.lock().graces;
    bed.set(&other, 4).unwrap();
    let maps = bed.maps.lock();
    assert_eq!(maps.keys.values().collect::<Vec<_>>(), [&0], "the index is used again");
    assert!(maps.graces > graces, "no program reads the old view any more");
}
