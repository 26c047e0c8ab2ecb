//! A host that has just started replays the store's history, and builds the same tables, including transitions, as a
//! host that has seen the changes.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_userspace::{
    desired::model::{Backend, BackendState, Desired, Name, Observed, Service},
    plan::compile::{Cache, Compiled, DeploymentSettings, Memory, Past, compile},
};
use proptest::prelude::*;
use std::{net::IpAddr, sync::Arc, time::Duration};

const DRAIN_S: u32 = 300;

/// An operator's change of a service, and the seconds before it.
#[derive(Clone, Debug)]
enum Step {
    Add(u8, u32),
    Remove(u8),
    State(u8, BackendState),
    RemoveService,
    Reseed(u64),
}

fn steps() -> impl Strategy<Value = Vec<(u16, bool, Step)>> {
    let backend = 0u8..6;
    let state = prop_oneof![Just(BackendState::Up), Just(BackendState::Draining), Just(BackendState::Down)];
    let step = prop_oneof![
        6 => (backend.clone(), 0u32..5).prop_map(|(b, w)| Step::Add(b, w)),
        3 => backend.clone().prop_map(Step::Remove),
        3 => (backend, state).prop_map(|(b, s)| Step::State(b, s)),
        1 => Just(Step::RemoveService),
        1 => (0u64..3).prop_map(Step::Reseed),
    ];
    prop::collection::vec((1u16..200, any::<bool>(), step), 1..30)
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn take(desired: &mut Desired, second: bool, step: &Step) {
    let (service, port) = if second { ("t", 81) } else { ("s", 80) };
    let old = desired.clone();
    if matches!(step, Step::RemoveService) {
        desired.services.remove(&name(service));
    } else {
        let empty = format!(
            r#"{{"vip":"10.0.0.1","port":{port},"protocol":"tcp","drain_s":{DRAIN_S},"table_size":251}}"#
        );
        let entry = desired.services.entry(name(service));
        let entry = entry.or_insert_with(|| Arc::new(serde_json::from_str::<Service>(&empty).unwrap()));
        let s = Arc::make_mut(entry);
        let key = |b: &u8| name(&format!("b{b}"));
        match step {
            Step::Add(b, weight) => {
                let address = format!("10.1.0.{}", b + 1);
                let new: Backend = serde_json::from_str(&format!(r#"{{"address":"{address}"}}"#)).unwrap();
                s.backends.entry(key(b)).or_insert(new).weight = *weight;
            }
            // Backends from before the window are not replayed for a service without backends; no flow depends on them.
            Step::Remove(b) => {
                if s.backends.len() > 1 {
                    s.backends.remove(&key(b));
                }
            }
            Step::State(b, state) => {
                if let Some(backend) = s.backends.get_mut(&key(b)) {
                    backend.state = *state;
                }
            }
            Step::Reseed(seed) => s.seed = Some(*seed),
            Step::RemoveService => {}
        }
    }
    desired.assign_seats(&old);
}

/// What packets see: for each slot of each service, the backend, and the previous one if the slot is in transition.
type Seen = Vec<(String, Vec<(Option<[u8; 16]>, Option<[u8; 16]>)>)>;

fn seen(compiled: &Compiled) -> Seen {
    let plan = &compiled.plan;
    let address = |index: u32| plan.backends.get(&index).map(|b| b.address);
    let of_service = compiled.status.iter().map(|status| {
        let table = &plan.services[&status.index].table;
        let slots = table.iter().map(|s| {
            let (is, was) = (address(s.primary_index()), address(s.secondary_index()));
            (is, was.filter(|_| s.is_transition() && was != is))
        });
        let mut slots: Vec<_> = slots.collect();
        // Tables without backends are equal, whatever their size.
        if slots.iter().all(|s| *s == (None, None)) {
            slots.clear();
        }
        (status.name.to_string(), slots)
    });
    of_service.collect()
}

/// The first slot that differs between two hosts.
fn difference(a: &Seen, b: &Seen) -> Option<String> {
    if a == b {
        return None;
    }
    for ((name, a), (other, b)) in a.iter().zip(b) {
        if name != other || a.len() != b.len() {
            return Some(format!("{name} with {} slots, {other} with {}", a.len(), b.len()));
        }
        if let Some(i) = (0..a.len()).find(|&i| a[i] != b[i]) {
            return Some(format!("{name}, slot {i}: {:?} and {:?}", a[i], b[i]));
        }
    }
    Some(format!("{} and {} services", a.len(), b.len()))
}

fn run(memory: &Memory, desired: &Desired, now_s: u64) -> Compiled {
    let observed = Observed { now: Duration::from_secs(now_s), ..Observed::default() };
    compile(desired, &observed, memory, &DeploymentSettings::default(), &mut Cache::default()).unwrap()
}

proptest! {
    #[test]
    fn history_tells_what_memory_does(steps in steps(), later in 0u64..400, lost in any::<bool>()) {
        let mut desired = Desired::default();
        let mut memory = Memory::default();
        let mut now_s = 1_000;
        let mut past = vec![(0, Arc::new(desired.clone()))];
        for (seconds, second, step) in &steps {
            now_s += u64::from(*seconds);
            take(&mut desired, *second, step);
            memory = run(&memory, &desired, now_s).memory;
            past.push((now_s, Arc::new(desired.clone())));
        }
        now_s += later;
        let witness = run(&memory, &desired, now_s);

        // As `store::since` finds it.
        let since = now_s.saturating_sub(DRAIN_S.into());
        let first = past.iter().rposition(|(from, _)| *from <= since).unwrap_or(0);
        let past: Vec<Past> = past[first..]
            .iter()
            .map(|(from, desired)| Past { from_ms: *from as i64 * 1_000, desired: desired.clone() })
            .collect();
        let mut newcomer = Memory::default();
        if lost {
            // The maps exist, but the memory file does not.
            newcomer.adopt(&witness.plan, now_s as i64 * 1_000);
        }
        prop_assert!(newcomer.lacks_history(&desired) || desired.services.is_empty());
        newcomer.replay_history(&past, &DeploymentSettings::default(), now_s as i64 * 1_000);
        prop_assert!(!newcomer.lacks_history(&desired));
        let told = run(&newcomer, &desired, now_s);
        prop_assert_eq!(difference(&seen(&told), &seen(&witness)), None);
        let hashes = |c: &Compiled| -> Vec<u64> {
            c.status.iter().filter(|s| s.eligible > 0).map(|s| s.table_hash).collect()
        };
        prop_assert_eq!(hashes(&told), hashes(&witness));
    }
}

/// Packets of a removed backend's flows still go to it.
#[test]
fn a_newcomer_gives_a_removed_backend_an_index() {
    let mut desired = Desired::default();
    for b in 0..3 {
        take(&mut desired, false, &Step::Add(b, 1));
    }
    let before = desired.clone();
    take(&mut desired, false, &Step::Remove(0));
    let past = [(1_000, before), (2_000_000, desired.clone())]
        .map(|(from_ms, desired)| Past { from_ms, desired: Arc::new(desired) });
    let mut memory = Memory::default();
    memory.replay_history(&past, &DeploymentSettings::default(), 2_100_000);
    let compiled = run(&memory, &desired, 2_100);
    let status = &compiled.status[0];
    assert_eq!(status.backends.len(), 3);
    let gone = status.backends.iter().find(|b| b.name.is_none()).unwrap();
    assert_eq!(gone.address, "10.1.0.1".parse::<IpAddr>().unwrap());
    let table = &compiled.plan.services[&status.index].table;
    let theirs = table.iter().filter(|s| s.is_transition() && s.secondary_index() == gone.index).count();
    assert!((80..90).contains(&theirs), "{theirs} of 251 slots");
}

/// Clocks that were changed, and hosts whose clocks differ.
#[test]
fn odd_times_do_no_harm() {
    let mut desired = Desired::default();
    let mut past = Vec::new();
    for (b, from_ms) in [(0, 5_000_000), (1, -7_000), (2, 900_000), (3, i64::MAX), (4, i64::MIN)] {
        take(&mut desired, false, &Step::Add(b, 1));
        past.push(Past { from_ms, desired: Arc::new(desired.clone()) });
    }
    let mut memory = Memory::default();
    memory.replay_history(&past, &DeploymentSettings::default(), 1_000_000);
    let service = memory.services.values().next().unwrap();
    assert!(service.epochs.iter().all(|e| e.from_ms <= 1_000_000));
    assert!(service.epochs.is_sorted_by_key(|e| e.from_ms));
    run(&memory, &desired, 1_000);
}
