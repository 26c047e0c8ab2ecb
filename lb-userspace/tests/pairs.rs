//! Property test: a host to which routers move a flow knows only its slot, and the slot names every backend that the
//! flow may be on, however tables change within the drain time.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_common::{Slot, slot::NO_BACKEND};
use lb_userspace::{
    desired::model::{BackendId, BackendState, Desired, Health, Observed, RegionShares, Share},
    plan::compile::{Cache, DeploymentSettings, Memory, Plan, compile},
};
use proptest::prelude::*;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

const BACKENDS: u8 = 8;
const DRAIN_S: u64 = 60;

/// Service `s` with backends 0 to 3 in region `here` and 4 to 7 in region `there`.
fn service() -> Desired {
    let backend = |i: u8| {
        let region = if i < 4 { "here" } else { "there" };
        format!(r#""b{i}":{{"address":"10.1.0.{i}","region":"{region}"}}"#)
    };
    let backends: Vec<String> = (0..BACKENDS).map(backend).collect();
    serde_json::from_str(&format!(
        r#"{{"services":{{"s":{{"vip":"10.0.0.1","port":80,"protocol":"tcp","table_size":251,"mode":"gue",
            "scheduler":"p2c","drain_s":{DRAIN_S},"backends":{{{}}}}}}}}}"#,
        backends.join(",")
    ))
    .unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    /// The share of the other region, in steps of 2.5 %.
    Spill(u16),
    Weight(u8, u32),
    State(u8, BackendState),
    Health(u8, bool),
    Wait(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let states = prop_oneof![Just(BackendState::Up), Just(BackendState::Draining)];
    prop_oneof![
        4 => (0..41u16).prop_map(Step::Spill),
        2 => (0..BACKENDS, 0..4u32).prop_map(|(i, weight)| Step::Weight(i, weight)),
        2 => (0..BACKENDS, states).prop_map(|(i, state)| Step::State(i, state)),
        2 => (0..BACKENDS, any::<bool>()).prop_map(|(i, good)| Step::Health(i, good)),
        2 => (1..20u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ]
}

struct Host {
    desired: Desired,
    observed: Observed,
    memory: Memory,
    cache: Cache,
    plan: Plan,
    now_s: u64,
}

impl Host {
    fn new() -> Self {
        let mut host = Self {
            desired: service(),
            observed: Observed::default(),
            memory: Memory::default(),
            cache: Cache::default(),
            plan: Plan::default(),
            now_s: 1_000,
        };
        for i in 0..BACKENDS {
            host.observed.health.insert(id(i), Health::Healthy);
        }
        host.spill(0);
        host.compile();
        host
    }

    fn spill(&mut self, steps: u16) {
        let share = |name: &str, permille| Share { name: name.parse().unwrap(), permille };
        let shares = vec![share("here", 1_000 - 25 * steps), share("there", 25 * steps)];
        let shares = RegionShares { shares, ..RegionShares::default() };
        self.observed.steers.insert("s".parse().unwrap(), Arc::new(shares));
    }

    fn compile(&mut self) {
        self.observed.now = Duration::from_secs(self.now_s);
        let mut settings = DeploymentSettings::default();
        settings.here.region = "here".parse().unwrap();
        let compiled =
            compile(&self.desired, &self.observed, &self.memory, &settings, &mut self.cache).unwrap();
        (self.memory, self.plan) = (compiled.memory, compiled.plan);
    }

    fn apply(&mut self, step: &Step) {
        let backend =
            |desired: &mut Desired, i: u8, change: &dyn Fn(&mut lb_userspace::desired::model::Backend)| {
                let service = desired.service_mut(&"s".parse().unwrap()).unwrap();
                change(service.backends.get_mut(&id(i).backend).unwrap());
            };
        match *step {
            Step::Spill(steps) => self.spill(steps),
            Step::Weight(i, weight) => backend(&mut self.desired, i, &|b| b.weight = weight),
            Step::State(i, state) => backend(&mut self.desired, i, &|b| b.state = state),
            Step::Health(i, good) => {
                let health = if good { Health::Healthy } else { Health::Unhealthy };
                self.observed.health.insert(id(i), health);
            }
            Step::Wait(seconds) => self.now_s += seconds,
            Step::Restart => {
                self.memory = serde_json::from_slice(&serde_json::to_vec(&self.memory).unwrap()).unwrap();
                self.memory.adopt(&self.plan, self.now_s as i64 * 1_000);
                self.cache = Cache::default();
            }
        }
        self.compile();
    }

    fn slots(&self) -> impl Iterator<Item = [Slot; 2]> + '_ {
        let table = &self.plan.services[&0].table;
        (0..251).map(|i| [table[i], table[251 + i]])
    }

    /// Where new flows of a slot are placed: primary and second choice.
    fn places([slot, behind]: [Slot; 2]) -> [u32; 2] {
        [slot.primary_index(), behind.primary_index()]
    }

    /// Backends that a packet of a slot can name, of those that are not down, by the order of the packet code.
    fn named(&self, [slot, behind]: [Slot; 2]) -> Vec<u32> {
        let previous = if slot.is_transition() { slot.secondary_index() } else { NO_BACKEND };
        let earlier = if slot.has_earlier() { behind.secondary_index() } else { NO_BACKEND };
        let mut named = Vec::new();
        for index in [slot.primary_index(), behind.primary_index(), previous, earlier] {
            if !named.contains(&index) && self.is_alive(index) && named.len() < 3 {
                named.push(index);
            }
        }
        named
    }

    fn is_alive(&self, index: u32) -> bool {
        let down = lb_common::backend::flags::DOWN;
        self.plan.backends.get(&index).is_some_and(|b| b.flags & down == 0)
    }

    fn region(&self, index: u32) -> Option<u8> {
        self.plan.backends.get(&index).map(|b| b.address[15] / 4)
    }
}

fn id(i: u8) -> BackendId {
    BackendId { service: "s".parse().unwrap(), backend: format!("b{i}").parse().unwrap() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_host_finds_the_flows_from_before_the_window(steps in proptest::collection::vec(step(), 1..25)) {
        let mut host = Host::new();
        let before: Vec<[u32; 2]> = host.slots().map(Host::places).collect();
        let began = host.now_s;
        for step in &steps {
            host.apply(step);
            if host.now_s >= began + DRAIN_S {
                break;
            }
            for (number, (slot, pair)) in host.slots().zip(&before).enumerate() {
                let named: BTreeSet<u32> = host.named(slot).into_iter().collect();
                for index in pair.iter().filter(|&&i| host.is_alive(i)) {
                    prop_assert!(named.contains(index), "slot {number}: {pair:?} before, {named:?} named after {step:?}");
                }
                let [primary, second] = Host::places(slot);
                prop_assert!(
                    second == NO_BACKEND || host.region(primary) == host.region(second),
                    "slot {number}: load decides between regions"
                );
            }
        }
    }
}
