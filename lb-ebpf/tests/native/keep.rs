//! Promises of `choose` over time, against a model of the control plane: whatever changes around it, an
//! established flow stays on its backend while that has an entry, and a repeated SYN goes where the
//! first went.
//!
//! The model's control plane knows each slot's history of primaries. A slot that changed within the
//! drain window is marked as in transition, and its secondary is the primary from before the window; it
//! is tracked until no flow-table entry falls on it. A flow's promise holds while it sends something
//! within each drain window. The same under every scheduler, with loads that come and go, and while the scheduler
//! itself changes.

use crate::world::{TCP_SERVICE, backend, headers, key, tables, tcp};
use lb_common::{
    FlowKey, Slot,
    backend::flags::{DOWN, DRAINING, RESOLVED, USED},
    flow::{CLOSING_S, SYN_TIMEOUT_S, flags::CLOSING},
    load::FLOW,
    service::{
        flags::{COUNT_FLOWS, SECONDS, TRACK_ALL},
        scheduler,
    },
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    FlowTable::{Flows, Syns},
    Tables,
    native::HashTables,
    select::{
        choose::{Choice, choose},
        hash::{flow_hash, slot_of},
    },
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

const SLOTS: u32 = 5;
const BACKENDS: u32 = 6;
const DRAIN_S: u32 = 300;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const FIN: u8 = 0x11;

/// Which slots the control plane marks as in transition.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    /// Those that changed within the window, even if they have changed back.
    Changed,
    /// Those whose primary is another than before the window.
    Differs,
}

/// What the model knows of a flow.
struct Flow {
    backend: u32,
    is_established: bool,
    first_syn_s: u32,
    /// Whether the first SYN's choice must be repeated: it was noted, or nothing has changed since.
    syn_is_binding: bool,
    last_packet_s: u32,
    fin_s: Option<u32>,
}

struct World {
    tables: HashTables,
    mark: Mark,
    scheduler: u8,
    /// Tables with the time from which each was live.
    history: Vec<(u32, Vec<u32>)>,
    /// Flags of each backend that has an entry.
    backends: BTreeMap<u32, u32>,
    removed_s: BTreeMap<u32, u32>,
    flows: BTreeMap<u16, Flow>,
}

impl World {
    fn new(mark: Mark) -> Self {
        let mut tables = tables(Slot::EMPTY, Slot::EMPTY);
        tables.backends.clear();
        tables.services.get_mut(&TCP_SERVICE).unwrap().slot_count = SLOTS;
        let backends = (1..=BACKENDS).map(|i| (i, USED | RESOLVED)).collect();
        let first = (0..SLOTS).map(|slot| slot % BACKENDS + 1).collect();
        let mut world = Self {
            tables,
            mark,
            scheduler: scheduler::MAGLEV,
            history: vec![(0, first)],
            backends,
            removed_s: BTreeMap::new(),
            flows: BTreeMap::new(),
        };
        world.compile();
        world
    }

    fn now_s(&self) -> u32 {
        self.tables.now_s()
    }

    fn slot_of(&self, port: u16) -> u32 {
        let headers = headers(&tcp(ACK, port));
        slot_of(flow_hash(self.tables.services[&TCP_SERVICE].seed, &headers), SLOTS)
    }

    /// The tick of the control plane: sweeps, frees, marks.
    fn compile(&mut self) {
        let now_s = self.now_s();
        let window_s = now_s - DRAIN_S;
        for (key, flow) in self.tables.flows(Flows) {
            if flow.flags & CLOSING != 0 && now_s - flow.last_seen_s > CLOSING_S {
                self.tables.forget(Flows, &key);
            }
        }
        for (key, flow) in self.tables.flows(Syns) {
            if now_s - flow.last_seen_s > SYN_TIMEOUT_S {
                self.tables.forget(Syns, &key);
            }
        }
        let named: BTreeSet<u32> =
            [Flows, Syns].iter().flat_map(|t| self.tables.flows(*t)).map(|(_, flow)| flow.backend).collect();
        let freed: Vec<u32> = (self.removed_s.iter())
            .filter(|(i, removed_s)| now_s - **removed_s > DRAIN_S && !named.contains(*i))
            .map(|(i, _)| *i)
            .collect();
        for i in freed {
            self.removed_s.remove(&i);
            self.backends.remove(&i);
            self.flows.retain(|_, flow| flow.backend != i);
        }
        let occupied: BTreeSet<u32> = [Flows, Syns]
            .iter()
            .flat_map(|t| self.tables.flows(*t))
            .map(|(key, _)| self.slot_of(key.source_port.get()))
            .collect();
        let base = self.history.iter().rposition(|(from_s, _)| *from_s <= window_s).unwrap_or(0);
        for slot in 0..SLOTS {
            let primaries: Vec<u32> =
                self.history[base..].iter().map(|(_, table)| table[slot as usize]).collect();
            let (old, new) = (primaries[0], *primaries.last().unwrap());
            let has_changed = primaries.iter().any(|primary| *primary != old);
            let in_transition = match self.mark {
                Mark::Changed => has_changed,
                Mark::Differs => new != old,
            };
            let is_tracked = has_changed || occupied.contains(&slot);
            self.tables.slots[slot as usize] = Slot {
                primary: new | if is_tracked { TRACKED } else { 0 },
                secondary: if in_transition { old | TRANSITION } else { NO_BACKEND },
            };
        }
        self.schedule();
        self.tables.backends = self
            .backends
            .iter()
            .map(|(i, flags)| (*i, lb_common::Backend { flags: *flags, ..backend(*i) }))
            .collect();
    }

    /// The view's scheduler, and what it needs behind the table: second choices, and a list.
    fn schedule(&mut self) {
        let (eligible, table) = (self.eligible(), self.history.last().unwrap().1.clone());
        let second = |slot: u32| {
            let others: Vec<u32> = eligible.iter().copied().filter(|i| *i != table[slot as usize]).collect();
            others.get(slot as usize * 5 % others.len().max(1)).copied().unwrap_or(NO_BACKEND)
        };
        for slot in 0..SLOTS {
            let place = &mut self.tables.slots[slot as usize];
            if !place.is_transition() {
                place.secondary = second(slot);
            }
        }
        let mut behind: Vec<u32> = (0..SLOTS).map(second).collect();
        behind.extend(&eligible);
        self.tables.slots.truncate(SLOTS as usize);
        self.tables.slots.extend(behind.iter().map(|&primary| Slot { primary, secondary: NO_BACKEND }));
        let view = self.tables.services.get_mut(&TCP_SERVICE).unwrap();
        view.scheduler = self.scheduler;
        view.list_count = eligible.len() as u32;
        view.load_cap = 2 * FLOW;
        view.flags = match self.scheduler {
            scheduler::MAGLEV => SECONDS,
            scheduler::LEAST_CONN => SECONDS | TRACK_ALL | COUNT_FLOWS,
            _ => SECONDS | TRACK_ALL,
        };
    }

    fn eligible(&self) -> Vec<u32> {
        self.backends.iter().filter(|(_, flags)| **flags & (DOWN | DRAINING) == 0).map(|(i, _)| *i).collect()
    }

    /// Puts a new table live: slots of backends that take no flow move, and those that `salt` picks.
    fn change(&mut self, salt: u32) {
        let eligible = self.eligible();
        let mut table = self.history.last().unwrap().1.clone();
        for (slot, primary) in table.iter_mut().enumerate() {
            if eligible.is_empty() {
                *primary = NO_BACKEND;
            } else if !eligible.contains(primary) || salt >> slot & 1 == 1 {
                *primary = eligible[(salt as usize / 7 + slot * 3) % eligible.len()];
            }
        }
        self.set(table);
    }

    fn set(&mut self, table: Vec<u32>) {
        let old = &self.history.last().unwrap().1;
        self.unbind((0..SLOTS).filter(|s| old[*s as usize] != table[*s as usize]).collect());
        self.history.push((self.now_s(), table));
        self.compile();
    }

    /// A repeated SYN of these slots need not go where the first went, if that was not noted.
    fn unbind(&mut self, moved: Vec<u32>) {
        let noted: BTreeSet<FlowKey> = self.tables.flows(Syns).into_iter().map(|(key, _)| key).collect();
        for port in self.flows.keys().copied().collect::<Vec<_>>() {
            if moved.contains(&self.slot_of(port)) && !noted.contains(&key(&tcp(SYN, port))) {
                self.flows.get_mut(&port).unwrap().syn_is_binding = false;
            }
        }
    }

    fn flag(&mut self, index: u32, set: u32, clear: u32, salt: u32) {
        if self.removed_s.contains_key(&index) {
            return;
        }
        if let Some(flags) = self.backends.get_mut(&index) {
            *flags = *flags & !clear | set;
        }
        self.change(salt);
    }

    /// Takes a backend away; its entry stays until nothing names it.
    fn remove(&mut self, index: u32) {
        if let Some(flags) = self.backends.get_mut(&index)
            && !self.removed_s.contains_key(&index)
        {
            *flags |= DRAINING;
            self.removed_s.insert(index, self.tables.now_s());
            self.change(0);
        }
    }

    fn add(&mut self, index: u32, salt: u32) {
        if let Entry::Vacant(entry) = self.backends.entry(index) {
            entry.insert(USED | RESOLVED);
            self.change(salt);
        }
    }

    fn wait(&mut self, s: u32) {
        // The control plane ticks each second at best; here each few.
        for _ in 0..s.div_ceil(5) {
            self.tables.advance_s(5);
            self.compile();
        }
        let now_s = self.now_s();
        self.flows.retain(|_, flow| {
            now_s - flow.last_packet_s < DRAIN_S
                && (flow.is_established || now_s - flow.first_syn_s <= SYN_TIMEOUT_S)
                && flow.fin_s.is_none_or(|fin_s| now_s - fin_s <= CLOSING_S)
        });
    }

    fn send(&mut self, flags: u8, port: u16) -> Option<Choice> {
        let headers = headers(&tcp(flags, port));
        let view = self.tables.services[&TCP_SERVICE];
        let choice = choose(&self.tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).ok();
        if let Some(flow) = self.flows.get_mut(&port) {
            flow.last_packet_s = self.tables.now_s();
        }
        choice
    }

    /// Opens a flow, or repeats its SYN.
    fn syn(&mut self, port: u16) -> Result<(), String> {
        if self.flows.get(&port).is_some_and(|flow| flow.is_established) {
            return Ok(());
        }
        let now_s = self.now_s();
        let Some(choice) = self.send(SYN, port) else { return Ok(()) };
        let flags = self.backends.clone();
        match self.flows.get_mut(&port) {
            Some(flow) if flow.syn_is_binding && flags[&flow.backend] & DOWN == 0 => {
                if choice.backend != flow.backend {
                    return Err(format!("repeated SYN of {port}: first {}, now {choice:?}", flow.backend));
                }
            }
            Some(flow) => {
                (flow.backend, flow.first_syn_s, flow.syn_is_binding) = (choice.backend, now_s, true);
            }
            None => {
                let flow = Flow {
                    backend: choice.backend,
                    is_established: false,
                    first_syn_s: now_s,
                    syn_is_binding: true,
                    last_packet_s: now_s,
                    fin_s: None,
                };
                self.flows.insert(port, flow);
            }
        }
        Ok(())
    }

    /// A later packet of a flow must go where the flow is.
    fn data(&mut self, flags: u8, port: u16) -> Result<(), String> {
        if !self.flows.contains_key(&port) {
            return Ok(());
        }
        let choice = self.send(flags, port);
        let now_s = self.now_s();
        let flow = self.flows.get_mut(&port).expect("looked up above");
        if choice.map(|choice| choice.backend) != Some(flow.backend) {
            return Err(format!("flow {port} was on {}, now {choice:?}", flow.backend));
        }
        flow.is_established = true;
        if flags == FIN {
            flow.fin_s.get_or_insert(now_s);
        }
        Ok(())
    }

    fn step(&mut self, op: &Op) -> Result<(), String> {
        match *op {
            Op::Syn(port) => self.syn(port)?,
            Op::Data(port) => self.data(ACK, port)?,
            Op::Fin(port) => self.data(FIN, port)?,
            Op::Wait(s) => self.wait(s),
            Op::Change(salt) => self.change(salt),
            Op::Down(i) => self.flag(i, DOWN, 0, 0),
            Op::Up(i, salt) => self.flag(i, 0, DOWN | DRAINING, salt),
            Op::Drain(i) => self.flag(i, DRAINING, 0, 0),
            Op::Remove(i) => self.remove(i),
            Op::Add(i, salt) => self.add(i, salt),
            Op::Report(i, flows) => self.tables.report(i, flows * FLOW),
            Op::Schedule(scheduler) => {
                self.scheduler = scheduler;
                // What the scheduler before did not note may be placed anew.
                self.unbind((0..SLOTS).collect());
                self.change(0);
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Op {
    Syn(u16),
    Data(u16),
    Fin(u16),
    Wait(u32),
    Change(u32),
    Down(u32),
    Up(u32, u32),
    Drain(u32),
    Remove(u32),
    Add(u32, u32),
    Report(u32, u32),
    Schedule(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let port = 1u16..24;
    let index = 1..=BACKENDS;
    prop_oneof![
        6 => port.clone().prop_map(Op::Syn),
        12 => port.clone().prop_map(Op::Data),
        1 => port.prop_map(Op::Fin),
        4 => (1u32..150).prop_map(Op::Wait),
        2 => any::<u32>().prop_map(Op::Change),
        1 => index.clone().prop_map(Op::Down),
        2 => (index.clone(), any::<u32>()).prop_map(|(i, salt)| Op::Up(i, salt)),
        1 => index.clone().prop_map(Op::Drain),
        1 => index.clone().prop_map(Op::Remove),
        1 => (index.clone(), any::<u32>()).prop_map(|(i, salt)| Op::Add(i, salt)),
        3 => (index, 0u32..9).prop_map(|(i, flows)| Op::Report(i, flows)),
        1 => (scheduler::MAGLEV..=scheduler::BOUNDED_LOAD).prop_map(Op::Schedule),
    ]
}

proptest! {
    #![proptest_config(crate::world::cases(400))]
    #[test]
    fn flows_stay(first in scheduler::MAGLEV..=scheduler::BOUNDED_LOAD, ops in prop::collection::vec(op(), 1..160)) {
        let mut world = World::new(Mark::Changed);
        world.scheduler = first;
        world.compile();
        for (i, op) in ops.iter().enumerate() {
            world.step(op).map_err(|error| TestCaseError::fail(format!("step {i}, {op:?}: {error}")))?;
        }
    }
}

/// A backend that is down for a moment: its slots leave and come back.
fn flap(mark: Mark) -> Result<(), String> {
    let mut world = World::new(mark);
    let before = world.history[0].1.clone();
    let during = vec![BACKENDS; SLOTS as usize];
    for port in 1..50 {
        world.syn(port)?;
        world.data(ACK, port)?;
    }
    world.wait(10);
    world.set(during);
    world.wait(5);
    world.set(before);
    for _ in 0..80 {
        world.wait(5);
        for port in 1..50 {
            world.data(ACK, port)?;
        }
    }
    Ok(())
}

#[test]
fn a_slot_that_changed_back_keeps_its_flows() {
    flap(Mark::Changed).unwrap();
}

/// Why the control plane must mark a slot that has changed back: when the window has passed the first
/// change but not the second, the primary of between looks like the previous one.
#[test]
fn without_its_mark_it_would_lose_them() {
    flap(Mark::Differs).unwrap_err();
}

#[test]
fn several_changes_in_one_window_keep_flows() {
    let mut world = World::new(Mark::Changed);
    for port in 1..20 {
        world.syn(port).unwrap();
        world.data(ACK, port).unwrap();
    }
    for round in 0..12_u16 {
        world.set(vec![u32::from(round) % BACKENDS + 1; SLOTS as usize]);
        world.wait(40);
        world.syn(100 + round).unwrap();
        world.wait(5);
        for port in (1..20).chain(100..=100 + round) {
            world.data(ACK, port).unwrap();
        }
    }
    assert_eq!(world.flows.len(), 19 + 12, "the model has lost none of them either");
}

/// Found by `flows_stay`: a client reuses the port of a flow whose backend went down, and the backend
/// comes back between the SYN and what follows.
#[test]
fn a_backend_that_comes_back_does_not_take_the_next_flow() {
    let mut world = World::new(Mark::Changed);
    world.set(vec![6; SLOTS as usize]);
    world.syn(16).unwrap();
    world.data(ACK, 16).unwrap();
    world.flag(6, DOWN, 0, 0);
    world.wait(DRAIN_S);
    world.syn(16).unwrap();
    assert_ne!(world.flows[&16].backend, 6);
    world.flag(6, 0, DOWN, 0);
    world.syn(16).unwrap();
    world.data(ACK, 16).unwrap();
}
