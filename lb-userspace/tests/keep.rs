//! Central property of backend selection: whatever the operator and the health checks do, and
//! however often the daemon restarts, a TCP connection that sends a packet at least once per drain time stays on the
//! backend of its handshake, as long as that backend exists. Runs compiled tables with the packet code of the kernel.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_common::{
    Backend, Be16, ServiceKey, ServiceView, backend::flags, flow, load::FLOW, mapped, service::TCP,
    slot::NO_BACKEND,
};
use lb_ebpf::{
    FlowTable, Tables,
    native::HashTables,
    packet::parse::{Headers, tcp, words},
    select::{
        choose::{choose, flow_key},
        hash::flow_hash,
        scheduler::{is_at_home, number_of},
        service::lookup_service,
    },
};
use lb_userspace::{
    desired::model::{
        BackendId, BackendState, Desired, Health, HealthCheck, HealthKind, Name, Observed, Service,
    },
    plan::compile::{Cache, DeploymentSettings, Memory, Plan, Quiet, compile},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

const DRAIN_S: u32 = 300;
const VIP: [u8; 4] = [10, 0, 0, 1];

/// An event of the simulation.
#[derive(Clone, Debug)]
enum Step {
    Add(u8, u32),
    Remove(u8),
    State(u8, BackendState),
    Health(u8, Health),
    /// New connections.
    Connect(u8),
    /// Some connections end.
    Close(u8),
    /// Time passes; every connection sends a packet at least every 250 s.
    Wait(u16),
    /// The daemon is killed and restarted.
    Restart,
    /// The flow tables are scanned.
    Sweep,
    /// Clients whose handshake is not complete retry.
    RepeatSyns,
    /// The operator changes the scheduler.
    Schedule(u8),
    /// The operator changes the seed, and with it every slot.
    Seed(u64),
    /// The operator changes the table's size.
    Size(u8),
    /// A replica reports its load.
    Report(u8, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let backend = 0u8..8;
    let state = prop_oneof![Just(BackendState::Up), Just(BackendState::Draining), Just(BackendState::Down)];
    let health =
        prop_oneof![2 => Just(Health::Healthy), 1 => Just(Health::Unhealthy), 1 => Just(Health::Unknown)];
    let step = prop_oneof![
        4 => (backend.clone(), 1u32..5).prop_map(|(b, w)| Step::Add(b, w)),
        2 => backend.clone().prop_map(Step::Remove),
        3 => (backend.clone(), state).prop_map(|(b, s)| Step::State(b, s)),
        6 => (backend, health).prop_map(|(b, h)| Step::Health(b, h)),
        6 => (1u8..40).prop_map(Step::Connect),
        1 => (1u8..10).prop_map(Step::Close),
        6 => (1u16..700).prop_map(Step::Wait),
        2 => Just(Step::Restart),
        3 => Just(Step::Sweep),
        2 => Just(Step::RepeatSyns),
        2 => (0u8..8).prop_map(Step::Schedule),
        1 => (0u64..3).prop_map(Step::Seed),
        1 => (0u8..3).prop_map(Step::Size),
        4 => (0u8..8, 0u32..9).prop_map(|(b, flows)| Step::Report(b, flows)),
    ];
    prop::collection::vec(step, 1..60)
}

/// A connection, and the backend that its handshake reached: index, and its address.
struct Connection {
    headers: Headers,
    home: Option<(u32, [u8; 16])>,
    established: bool,
}

/// One ingress host.
struct World {
    desired: Desired,
    observed: Observed,
    memory: Memory,
    cache: Cache,
    plan: Plan,
    tables: HashTables,
    connections: Vec<Connection>,
    opened: u32,
    now_s: u32,
}

fn name(i: u8) -> Name {
    format!("b{i}").parse().unwrap()
}

fn address(i: u8) -> IpAddr {
    Ipv4Addr::new(10, 1, 0, i + 1).into()
}

fn to_address(ip: IpAddr) -> lb_common::Address {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn service_name() -> Name {
    "s".parse().unwrap()
}

impl World {
    fn new() -> Self {
        let json = format!(
            r#"{{"vip":"10.0.0.1","port":80,"protocol":"tcp","drain_s":{DRAIN_S},"table_size":251,"panic_percent":20}}"#
        );
        let mut service: Service = serde_json::from_str(&json).unwrap();
        service.health = HealthCheck { kind: HealthKind::Tcp, ..HealthCheck::default() };
        let mut world = Self {
            desired: Desired {
                services: BTreeMap::from([(service_name(), service.into())]),
                ..Desired::default()
            },
            observed: Observed::default(),
            memory: Memory::default(),
            cache: Cache::default(),
            plan: Plan::default(),
            tables: HashTables::default(),
            connections: Vec::new(),
            opened: 0,
            now_s: 0,
        };
        world.now_s = world.tables.now_s();
        // As with `lbctl service add`: the service begins without backends.
        world.compile();
        world
    }

    fn service(&mut self) -> &mut Service {
        self.desired.service_mut(&service_name()).unwrap()
    }

    fn compile(&mut self) {
        self.observed.now = Duration::from_secs(self.now_s.into());
        let compiled = compile(
            &self.desired,
            &self.observed,
            &self.memory,
            &DeploymentSettings::default(),
            &mut self.cache,
        )
        .unwrap();
        self.memory = compiled.memory;
        self.plan = compiled.plan;
        check_plan(&self.plan);
        let tables = &mut self.tables;
        tables.slots.clear();
        tables.services.clear();
        for (&index, entry) in &self.plan.services {
            let view = ServiceView {
                seed: entry.view.seed,
                slot_base: tables.slots.len() as u32,
                slot_count: entry.view.slot_count,
                flags: entry.view.flags,
                scheduler: entry.view.scheduler,
                protocol: entry.view.protocol,
                old_seed: entry.view.old_seed,
                old_count: entry.view.old_count,
                list_count: entry.view.list_count,
                load_cap: entry.view.load_cap,
                ..ServiceView::default()
            };
            assert_eq!(view.region() as usize, entry.table.len(), "the view says what its region holds");
            tables.slots.extend_from_slice(&entry.table);
            tables.services.insert(index, view);
        }
        tables.service_index = self.plan.index.iter().map(|(k, v)| (*k, *v)).collect();
        tables.vips = self.plan.vips.iter().map(|(k, v)| (*k, *v)).collect();
        tables.backends = self.plan.backends.iter().map(|(k, v)| (*k, *v)).collect();
    }

    /// Chooses the backend of a packet.
    fn send(&self, headers: &Headers) -> Option<u32> {
        let (service, _) = lookup_service(&self.tables, headers).unwrap();
        let view = self.tables.service(service).unwrap();
        let hash = flow_hash(view.seed, headers);
        choose(&self.tables, service, view, headers, hash).ok().map(|choice| choice.backend)
    }

    fn connect(&mut self, count: u8) {
        for _ in 0..count {
            self.opened += 1;
            let source = Ipv4Addr::from(0xc0a8_0000 + self.opened / 7).octets();
            let headers = Headers {
                source: words(mapped(source)),
                destination: words(mapped(VIP)),
                source_port: (1_024 + self.opened as u16).to_be(),
                port: 80u16.to_be(),
                protocol: TCP,
                tcp_flags: tcp::SYN,
                ..Headers::default()
            };
            let home = self.send(&headers).map(|index| (index, self.plan.backends[&index].address));
            if home.is_some() {
                self.connections.push(Connection { headers, home, established: false });
            }
        }
    }

    /// Every connection sends a packet; the first one completes the handshake.
    fn show(&mut self) -> Result<(), TestCaseError> {
        let mut connections = std::mem::take(&mut self.connections);
        for c in &mut connections {
            let (index, address) = c.home.expect("only connections with a home are kept");
            let exists = self.plan.backends.get(&index).is_some_and(|b| b.address == address);
            prop_assert!(exists, "backend {} was forgotten while a connection was on it", index);
            c.headers.tcp_flags = tcp::ACK;
            c.established = true;
            let now = self.send(&c.headers);
            prop_assert_eq!(now, Some(index), "a connection moved; {:?}", self.plan.backends[&index].flags);
        }
        self.connections = connections;
        Ok(())
    }

    /// Repeats SYNs. A recorded SYN goes to the same backend, if that is up; a SYN that was not recorded, because its
    /// slot was stable, may go elsewhere, and the connection with it.
    fn repeat_syns(&mut self) -> Result<(), TestCaseError> {
        let mut connections = std::mem::take(&mut self.connections);
        for c in connections.iter_mut().filter(|c| !c.established) {
            let (index, _) = c.home.expect("only connections with a home are kept");
            let key = flow_key(self.plan.backends[&index].service, &c.headers);
            let noted = self.tables.peek(FlowTable::Syns, &key).is_some_and(|s| s.backend == index);
            let now = self.send(&c.headers);
            if noted && self.plan.backends[&index].flags & flags::DOWN == 0 {
                prop_assert_eq!(now, Some(index), "a repeated SYN moved");
            }
            c.home = now.map(|index| (index, self.plan.backends[&index].address));
        }
        connections.retain(|c| c.home.is_some());
        self.connections = connections;
        Ok(())
    }

    fn close(&mut self, count: u8) {
        for _ in 0..count.min(self.connections.len() as u8) {
            let mut c = self.connections.swap_remove(0);
            c.headers.tcp_flags = tcp::ACK | tcp::FIN;
            self.send(&c.headers);
        }
    }

    fn wait(&mut self, seconds: u16) -> Result<(), TestCaseError> {
        let mut left = u32::from(seconds);
        while left > 0 {
            let step = left.min(250);
            // Upper bound of a handshake's duration.
            self.show()?;
            self.tables.advance_s(step);
            self.now_s += step;
            left -= step;
            self.compile();
            self.show()?;
        }
        Ok(())
    }

    /// Does what the reconciler's scan does.
    fn sweep(&mut self) {
        let over = |table, f: &lb_common::Flow| {
            let age_s = self.now_s - f.last_seen_s;
            match table {
                FlowTable::Syns => age_s > flow::SYN_TIMEOUT_S,
                _ => {
                    age_s
                        > if f.flags & flow::flags::CLOSING != 0 { flow::CLOSING_S } else { flow::TCP_IDLE_S }
                }
            }
        };
        let (mut slots, mut named) = (BTreeMap::<u32, Vec<u64>>::new(), BTreeSet::new());
        let mut with_syns = BTreeSet::new();
        for (key, entry) in self.tables.flows(FlowTable::Syns) {
            if over(FlowTable::Syns, &entry) {
                self.tables.forget(FlowTable::Syns, &key);
            } else {
                with_syns.insert(key.service);
                named.insert(entry.backend);
            }
        }
        for (key, entry) in self.tables.flows(FlowTable::Flows) {
            let view = *self.tables.service(key.service).expect("this world's service stays");
            let number = (view.slot_count != 0).then(|| number_of(&view, &key, &mapped(VIP)));
            let slot = number.map(|number| self.tables.slots[(view.slot_base + number) as usize]);
            if over(FlowTable::Flows, &entry)
                || slot.is_some_and(|slot| is_at_home(&view, slot, entry.backend))
            {
                self.tables.forget(FlowTable::Flows, &key);
                continue;
            }
            let bits =
                slots.entry(key.service).or_insert_with(|| vec![0; view.slot_count.div_ceil(64) as usize]);
            if let Some(number) = number {
                bits[number as usize / 64] |= 1 << (number % 64);
            }
            named.insert(entry.backend);
        }
        let stable: BTreeSet<u32> =
            self.plan.services.iter().filter(|(_, s)| !s.in_transition()).map(|(index, _)| *index).collect();
        let plan = &self.plan;
        self.memory.untrack_all(|index| match slots.get(&index) {
            _ if !stable.contains(&index) || with_syns.contains(&index) => Quiet::No,
            None => Quiet::All,
            Some(bits) => {
                let view = &plan.services[&index].view;
                let by_source = view.flags & lb_common::service::flags::HASH_SOURCE != 0;
                Quiet::But((view.seed, view.slot_count, by_source), bits)
            }
        });
        let drained = self.memory.drained(&self.desired, i64::from(self.now_s) * 1_000);
        self.memory.release(&BTreeSet::new(), &drained.into_iter().filter(|i| !named.contains(i)).collect());
        self.compile();
    }

    /// Starts a new daemon from the maps and the file, which may be older than the maps.
    fn restart(&mut self) -> Result<(), TestCaseError> {
        let file = serde_json::to_vec(&self.memory).unwrap();
        self.memory = serde_json::from_slice(&file).unwrap();
        self.memory.adopt(&self.plan, i64::from(self.now_s) * 1_000);
        self.cache = Cache::default();
        let before = self.plan.clone();
        self.compile();
        prop_assert!(before == self.plan, "a restart changed the maps");
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Add(i, weight) => {
                let backend =
                    serde_json::from_value(serde_json::json!({ "address": address(i), "weight": weight }));
                self.service().backends.insert(name(i), backend.unwrap());
            }
            Step::Remove(i) => {
                self.service().backends.remove(&name(i));
            }
            Step::State(i, state) => {
                if let Some(backend) = self.service().backends.get_mut(&name(i)) {
                    backend.state = state;
                }
            }
            Step::Health(i, health) => {
                let id = BackendId { service: service_name(), backend: name(i) };
                self.observed.health.insert(id, health);
            }
            Step::Connect(count) => self.connect(count),
            Step::Close(count) => self.close(count),
            Step::Wait(seconds) => return self.wait(seconds),
            Step::Restart => self.restart()?,
            Step::Sweep => self.sweep(),
            Step::RepeatSyns => self.repeat_syns()?,
            Step::Schedule(i) => {
                let all = ["maglev", "p2c", "rr", "wrr", "random", "lc", "source-hash", "source-hash"];
                let service = self.service();
                service.scheduler = serde_json::from_value(all[i as usize].into()).unwrap();
                service.load_cap = (i == 7).then_some(2);
            }
            Step::Seed(seed) => self.service().seed = Some(seed),
            Step::Size(i) => self.service().table_size = Some([251, 1_021, 4_093][i as usize]),
            Step::Report(i, flows) => {
                let of = |b: &Backend| b.address == to_address(address(i));
                let index = self.plan.backends.iter().find(|(_, b)| of(b)).map(|(index, _)| *index);
                if let Some(index) = index {
                    self.tables.report(index, flows * FLOW);
                }
            }
        }
        self.compile();
        Ok(())
    }
}

/// Reachable entries reference only existing ones, and marks are consistent.
fn check_plan(plan: &Plan) {
    for entry in plan.services.values() {
        for slot in entry.table.iter() {
            assert!(entry.view.old_count == 0 || !slot.is_transition(), "two ways to be in transition");
        }
        let tracked = |s: &lb_common::Slot| s.is_tracked();
        assert!(
            entry.view.old_count == 0 || entry.slots().iter().all(tracked),
            "an old table, but not tracked"
        );
        for slot in entry.table.iter() {
            for index in [slot.primary_index(), slot.secondary_index()] {
                assert!(index == NO_BACKEND || plan.backends.contains_key(&index), "slot names {index}");
            }
            assert!(!slot.is_transition() || slot.is_tracked(), "in transition, but not tracked");
        }
    }
    let services: BTreeSet<u32> = plan.index.values().copied().collect();
    assert!(services.iter().all(|i| plan.services.contains_key(i)));
    assert!(plan.backends.values().all(|b: &Backend| plan.services.contains_key(&b.service)));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_connection_stays_where_it_began(steps in steps()) {
        let mut world = World::new();
        for i in 0..4 {
            world.step(&Step::Add(i, 1))?;
        }
        for step in &steps {
            world.step(step)?;
        }
        world.wait(700)?;
    }
}

/// Regression test: a slot flaps within the drain window, and the start of the window moves past the flap.
#[test]
fn a_flap_and_the_edge_of_the_window() {
    let mut world = World::new();
    for i in 0..4 {
        world.step(&Step::Add(i, 1)).unwrap();
        world.step(&Step::Health(i, Health::Healthy)).unwrap();
    }
    world.step(&Step::Connect(39)).unwrap();
    world.wait(1_000).unwrap();
    for (health, seconds) in
        [(Health::Unhealthy, 7), (Health::Healthy, 40), (Health::Unhealthy, 5), (Health::Healthy, 1)]
    {
        world.step(&Step::Health(2, health)).unwrap();
        world.step(&Step::Connect(39)).unwrap();
        world.wait(seconds).unwrap();
    }
    for _ in 0..700 {
        world.wait(1).unwrap();
    }
    world.sweep();
    assert!(world.connections.len() > 150);
}

/// Self-test of the simulation: without the marks, connections move.
#[test]
fn without_marks_connections_would_move() {
    let mut world = World::new();
    for i in 0..4 {
        world.step(&Step::Add(i, 1)).unwrap();
    }
    world.wait(700).unwrap();
    world.step(&Step::Connect(39)).unwrap();
    world.show().unwrap();
    world.step(&Step::State(0, BackendState::Draining)).unwrap();
    let key = ServiceKey { vip: mapped(VIP), port: Be16::new(80), protocol: TCP, pad: 0 };
    assert!(world.tables.service_index.contains_key(&key));
    for slot in &mut world.tables.slots {
        slot.primary = slot.primary_index();
        slot.secondary = slot.secondary_index();
    }
    assert!(world.show().is_err());
}

/// Self-test of the simulation: without the old table, connections move.
#[test]
fn without_the_old_table_connections_would_move() {
    for forget in [false, true] {
        let mut world = World::new();
        for i in 0..4 {
            world.step(&Step::Add(i, 1)).unwrap();
        }
        world.step(&Step::Connect(39)).unwrap();
        world.show().unwrap();
        world.step(&Step::Seed(1)).unwrap();
        if forget {
            world.tables.services.values_mut().for_each(|view| view.old_count = 0);
        }
        assert_eq!(world.show().is_err(), forget);
    }
}

/// A client that vanished keeps the mark of its own slot until its entry expires, and of no other.
#[test]
fn one_silent_flow_keeps_one_slot_tracked() {
    let mut world = World::new();
    for i in 0..4 {
        world.step(&Step::Add(i, 1)).unwrap();
    }
    world.step(&Step::Connect(39)).unwrap();
    world.wait(1_000).unwrap();
    world.step(&Step::State(2, BackendState::Draining)).unwrap();
    world.show().unwrap();
    // All leave but one, which is on the drained backend and says nothing more.
    let silent = world
        .connections
        .iter()
        .position(|c| c.home.is_some_and(|(_, address)| address == to_address(self::address(2))));
    let silent = world.connections.swap_remove(silent.expect("one of 39 is on each of four backends"));
    world.close(39);
    world.now_s += DRAIN_S + 1;
    world.tables.advance_s(DRAIN_S + 1);
    // The window ends.
    world.compile();
    world.step(&Step::Sweep).unwrap();
    let tracked = |world: &World| {
        let slots = world.plan.services.values().flat_map(|s| s.table.iter());
        slots.filter(|slot| slot.is_tracked()).count()
    };
    assert_eq!((tracked(&world), world.tables.flows(FlowTable::Flows).len()), (1, 1));
    assert_eq!(world.send(&silent.headers), silent.home.map(|(index, _)| index), "it is still followed");
    world.now_s += flow::TCP_IDLE_S + 1;
    world.tables.advance_s(flow::TCP_IDLE_S + 1);
    world.step(&Step::Sweep).unwrap();
    assert_eq!((tracked(&world), world.tables.flows(FlowTable::Flows).len()), (0, 0));
}

/// When a table changes back, flows that it tracked meanwhile are found without their entries.
#[test]
fn entries_that_say_what_the_table_says_are_removed() {
    let mut world = World::new();
    for i in 0..4 {
        world.step(&Step::Add(i, 1)).unwrap();
    }
    world.step(&Step::Connect(39)).unwrap();
    world.wait(1_000).unwrap();
    for state in [BackendState::Draining, BackendState::Up] {
        world.step(&Step::State(2, state)).unwrap();
        world.show().unwrap();
    }
    assert!(!world.tables.flows(FlowTable::Flows).is_empty());
    world.wait(700).unwrap();
    world.step(&Step::Sweep).unwrap();
    assert_eq!(world.tables.flows(FlowTable::Flows), []);
    world.wait(700).unwrap();
    world.step(&Step::Sweep).unwrap();
    assert!(world.plan.services.values().all(|s| s.table.iter().all(|slot| !slot.is_tracked())));
    world.show().unwrap();
}
