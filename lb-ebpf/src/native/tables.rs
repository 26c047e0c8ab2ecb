//! Tables in hash maps, and a clock that stands still.

use super::std::{
    boxed::Box,
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
    vec,
    vec::Vec,
};
use crate::{
    FlowTable, Frame, Tables,
    nat::{Added, NatScratch, NatTables},
    packet::Sum,
    quic::{QuicTables, Work},
    select::fragments::FragmentTable,
    worker::decap::DecapTables,
};
use lb_common::{
    Address, Backend, BackendStats, Flow, FlowKey, Load, Nat, Reason, Reply, ReplyKey, ServiceKey,
    ServiceView, Slot, Vip, VipKey, exact, flow,
    fragment::{Fragment, FragmentKey},
    load,
    nat::Embryonic,
    passive::{self, PassiveFailure, PassiveFailures},
    quic::{QuicConfig, ServerIdKey},
    stats::IcmpBudget,
};

/// What a flow table does for want of room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Forgets the flow that was looked up or written longest ago, as the kernel's LRU maps roughly do.
    #[default]
    Evict,
    /// Refuses the new one.
    Refuse,
}

/// Flows with the tick of their last use.
#[derive(Default)]
struct Flows {
    entries: HashMap<FlowKey, (Flow, u64)>,
    by_use: BTreeMap<u64, FlowKey>,
    tick: u64,
}

impl Flows {
    fn used(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        let (flow, used) = self.entries.get_mut(key)?;
        self.tick += 1;
        self.by_use.remove(used);
        self.by_use.insert(self.tick, *key);
        *used = self.tick;
        Some(flow)
    }

    fn remove(&mut self, key: &FlowKey) {
        if let Some((_, used)) = self.entries.remove(key) {
            self.by_use.remove(&used);
        }
    }

    fn insert(&mut self, key: &FlowKey, flow: Flow, capacity: usize, when_full: WhenFull) -> bool {
        if let Some(known) = self.used(key) {
            *known = flow;
            return true;
        }
        if self.entries.len() >= capacity {
            match (when_full, self.by_use.first_key_value().map(|(_, oldest)| *oldest)) {
                (WhenFull::Evict, Some(oldest)) => self.remove(&oldest),
                _ => return false,
            }
        }
        self.tick += 1;
        self.by_use.insert(self.tick, *key);
        self.entries.insert(*key, (flow, self.tick));
        true
    }
}

/// All maps of both programs. What only the control plane writes is public.
pub struct HashTables {
    /// `SERVICE_INDEX`.
    pub service_index: HashMap<ServiceKey, u32>,
    /// `EXACT` and `VIP_FILTER`, see [`HashTables::spare_lookups`].
    exact: Option<(HashMap<u32, exact::ExactLine>, HashSet<u32>)>,
    /// `VIPS`.
    pub vips: HashMap<VipKey, Vip>,
    /// `SERVICES`: the live views.
    pub services: HashMap<u32, ServiceView>,
    /// `PRIMARIES` and `SECONDARIES`.
    pub slots: Vec<Slot>,
    /// `BACKENDS`.
    pub backends: HashMap<u32, Backend>,
    /// `CHANGING_BACKENDS`.
    pub changing_backends: HashMap<u32, Backend>,
    /// `DECAP_ADDRESSES`.
    pub decap_addresses: HashSet<Address>,
    /// `DECAP_VIPS`.
    pub decap_vips: HashSet<Address>,
    /// `LOADS`.
    pub loads: RefCell<HashMap<u32, Load>>,
    /// `QUIC_CONFIGS`.
    pub quic_configs: HashMap<u32, QuicConfig>,
    /// `QUIC_SERVERS`.
    pub quic_servers: HashMap<ServerIdKey, u32>,
    /// Flows that each flow table holds at most.
    pub capacity: usize,
    /// Places in the ring of new bindings.
    pub embryonic_room: u32,
    /// What a full flow table does.
    pub when_full: WhenFull,
    /// Whether nothing may be written to the flow tables just now.
    pub is_flooded: Cell<bool>,
    /// `TAKEOVER`.
    pub is_taking_over: Cell<bool>,
    flows: [RefCell<Flows>; 3],
    fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    nats: RefCell<BTreeMap<FlowKey, Nat>>,
    replies: RefCell<BTreeMap<ReplyKey, Reply>>,
    embryonic: [RefCell<HashMap<u32, Embryonic>>; PROCESSORS],
    scratch: [RefCell<NatScratch>; PROCESSORS],
    quic_work: RefCell<Work>,
    now_ns: Cell<u64>,
    reasons: RefCell<Vec<u64>>,
    stats: RefCell<HashMap<u32, BackendStats>>,
    icmp: Cell<IcmpBudget>,
    signs: RefCell<HashMap<u32, PassiveFailures>>,
    turns: RefCell<HashMap<u32, u64>>,
    random: Cell<u64>,
}

impl Default for HashTables {
    fn default() -> Self {
        Self {
            service_index: HashMap::new(),
            exact: None,
            vips: HashMap::new(),
            services: HashMap::new(),
            slots: Vec::new(),
            backends: HashMap::new(),
            changing_backends: HashMap::new(),
            loads: RefCell::default(),
            decap_addresses: HashSet::new(),
            decap_vips: HashSet::new(),
            quic_configs: HashMap::new(),
            quic_servers: HashMap::new(),
            capacity: usize::MAX,
            embryonic_room: u32::MAX,
            when_full: WhenFull::Evict,
            is_flooded: Cell::new(false),
            is_taking_over: Cell::new(false),
            flows: Default::default(),
            fragments: RefCell::default(),
            nats: RefCell::default(),
            replies: RefCell::default(),
            embryonic: Default::default(),
            quic_work: RefCell::default(),
            scratch: [const { RefCell::new(NatScratch::EMPTY) }; PROCESSORS],
            // A host that has been up for a while: ages can be subtracted.
            now_ns: Cell::new(100_000 * 1_000_000_000),
            reasons: RefCell::new(vec![0; Reason::COUNT as usize]),
            stats: RefCell::default(),
            icmp: Cell::default(),
            signs: RefCell::default(),
            turns: RefCell::default(),
            random: Cell::new(0x9e37_79b9_7f4a_7c15),
        }
    }
}

/// Number of processors that tests may simulate.
const PROCESSORS: usize = 2;

super::std::thread_local! {
    static PROCESSOR: Cell<usize> = const { Cell::new(0) };
    static BEFORE_ACCESS: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
    static IS_NESTED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` in this thread as one processor of several that use the same tables, each with per-processor maps of its own.
/// `before_access` is called before each access to a shared table that changes while packets pass; it may let another
/// thread go on. Accesses within the access to another entry are not interrupted.
pub fn run_on<R>(processor: usize, before_access: impl Fn() + 'static, f: impl FnOnce() -> R) -> R {
    PROCESSOR.set(processor);
    BEFORE_ACCESS.with(|hook| *hook.borrow_mut() = Some(Box::new(before_access)));
    let result = f();
    BEFORE_ACCESS.with(|hook| *hook.borrow_mut() = None);
    PROCESSOR.set(0);
    result
}

fn before_access() {
    if !IS_NESTED.get() {
        BEFORE_ACCESS.with(|hook| hook.borrow().iter().for_each(|hook| hook()));
    }
}

/// Calls `f` on an entry that it reads or writes in place.
fn in_place<R>(f: impl FnOnce() -> R) -> R {
    before_access();
    let outer = IS_NESTED.replace(true);
    let result = f();
    IS_NESTED.set(outer);
    result
}

impl HashTables {
    fn table(&self, table: FlowTable) -> &RefCell<Flows> {
        &self.flows[match table {
            FlowTable::Flows => 0,
            FlowTable::Syns => 1,
            FlowTable::UdpFlows => 2,
        }]
    }

    /// Fills `EXACT` and `VIP_FILTER` from what services there are, as `lbd` does.
    pub fn spare_lookups(&mut self) {
        let mut lines: HashMap<u32, exact::ExactLine> = HashMap::new();
        for (key, service) in &self.service_index {
            let (line, entry) = exact::entry(key, *service);
            let line = lines.entry(line).or_default();
            if let Some(free) = line.entries.iter_mut().find(|known| known.port_and_service == 0) {
                *free = entry;
            }
        }
        let bits = self.vips.keys().map(|key| exact::filter_bit(exact::words(&key.vip))).collect();
        self.exact = Some((lines, bits));
    }

    /// Reports a backend's load, as `lbd` does.
    pub fn report(&self, backend: u32, score: u32) {
        let mut loads = self.loads.borrow_mut();
        let entry = loads.entry(backend).or_insert(Load { cost: load::FLOW, ..Load::default() });
        entry.report = load::report(score, load::next((entry.report >> 32) as u32));
    }

    /// Moves the clock forward.
    pub fn advance_ns(&self, by_ns: u64) {
        self.now_ns.set(self.now_ns.get() + by_ns);
    }

    /// Moves the clock forward by seconds.
    pub fn advance_s(&self, by_s: u32) {
        self.advance_ns(u64::from(by_s) * 1_000_000_000);
    }

    /// A flow table's entry, without counting as a use of it.
    pub fn peek(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        self.table(table).borrow().entries.get(key).map(|(flow, _)| *flow)
    }

    /// A flow table's entries, ordered by key.
    pub fn flows(&self, table: FlowTable) -> Vec<(FlowKey, Flow)> {
        let mut flows: Vec<_> =
            self.table(table).borrow().entries.iter().map(|(key, (flow, _))| (*key, *flow)).collect();
        flows.sort_by_key(|(key, _)| *key);
        flows
    }

    /// Forgets all flows.
    pub fn forget_flows(&self) {
        for flows in &self.flows {
            *flows.borrow_mut() = Flows::default();
        }
        self.fragments.borrow_mut().clear();
    }

    /// A reason's counter.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.reasons.borrow()[reason as usize]
    }

    /// All counters that are not zero.
    pub fn counts(&self) -> Vec<(Reason, u64)> {
        Reason::ALL.iter().map(|r| (*r, self.counted(*r))).filter(|(_, n)| *n != 0).collect()
    }

    /// A backend's counters.
    pub fn stats(&self, backend: u32) -> BackendStats {
        self.stats.borrow().get(&backend).copied().unwrap_or_default()
    }

    /// Passive failures of a worker.
    pub fn signs(&self, worker: &Address) -> PassiveFailures {
        self.signs.borrow().get(&passive::index_of(worker)).copied().unwrap_or_default()
    }

    /// Packets forwarded to all backends.
    pub fn packets(&self) -> u64 {
        self.stats.borrow().values().map(|stats| stats.packets).sum()
    }

    fn count_one(&self, reason: Reason) {
        self.reasons.borrow_mut()[reason as usize] += 1;
    }
}

impl Tables for HashTables {
    fn is_taking_over(&self) -> bool {
        self.is_taking_over.get()
    }

    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.service_index.get(key).copied()
    }

    fn exact(&self, line: u32) -> Option<&exact::ExactLine> {
        self.exact.as_ref()?.0.get(&line)
    }

    fn is_no_vip(&self, bit: u32) -> bool {
        self.exact.as_ref().is_some_and(|(_, bits)| !bits.contains(&bit))
    }

    fn has_vip_bit(&self, bit: u32) -> bool {
        self.exact.as_ref().is_some_and(|(_, bits)| bits.contains(&bit))
    }

    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        self.vips.get(key)
    }

    fn service(&self, index: u32) -> Option<&ServiceView> {
        self.services.get(&index)
    }

    fn primary(&self, place: u32) -> Option<u32> {
        self.slots.get(place as usize).map(|slot| slot.primary)
    }

    fn secondary(&self, place: u32) -> Option<u32> {
        self.slots.get(place as usize).map(|slot| slot.secondary)
    }

    fn backend(&self, index: u32) -> Option<&Backend> {
        self.backends.get(&index)
    }

    fn changing_backend(&self, index: u32) -> Option<&Backend> {
        self.changing_backends.get(&index)
    }

    fn is_worker(&self, address: [u32; 4]) -> bool {
        use lb_common::backend::flags::USED;
        let address: Address = zerocopy::transmute!(address);
        self.backends.values().any(|b| b.flags & USED != 0 && b.address == address)
    }

    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        before_access();
        self.table(table).borrow_mut().used(key).copied()
    }

    fn record(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        before_access();
        self.table(table).borrow_mut().insert(key, *flow, self.capacity, self.when_full)
    }

    fn touch(&self, table: FlowTable, key: &FlowKey, now_s: u32, flags: u32) {
        before_access();
        if let Some(flow) = self.table(table).borrow_mut().used(key) {
            flow.last_seen_s = now_s;
            flow.flags = flags;
        }
    }

    fn keep(&self, key: &FlowKey, now_s: u32, data_len: u32) {
        before_access();
        if let Some(flow) = self.table(FlowTable::Flows).borrow_mut().used(key) {
            flow.last_seen_s = now_s;
            if data_len != 0 {
                flow.flags &= !flow::flags::CLOSING;
            }
        }
    }

    fn forget(&self, table: FlowTable, key: &FlowKey) {
        before_access();
        self.table(table).borrow_mut().remove(key);
    }

    fn load(&self, backend: u32, now_s: u32) -> u32 {
        let loads = self.loads.borrow();
        loads.get(&backend).map_or(0, |l| load::total(l.report, l.added, now_s))
    }

    fn charge(&self, backend: u32, now_s: u32) {
        let mut loads = self.loads.borrow_mut();
        let entry = loads.entry(backend).or_insert(Load { cost: load::FLOW, ..Load::default() });
        entry.added = load::charged(entry.report, entry.added, now_s, entry.cost);
    }

    fn next_turn(&self, service: u32) -> u64 {
        let mut turns = self.turns.borrow_mut();
        let turn = turns.entry(service).or_default();
        *turn += 1;
        *turn - 1
    }

    fn random(&self) -> u32 {
        // xorshift64 (Marsaglia 2003): tests want the same each time.
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x >> 32) as u32
    }

    fn now_s(&self) -> u32 {
        (self.now_ns.get() / 1_000_000_000) as u32
    }

    fn count(&self, reason: Reason) {
        self.count_one(reason);
    }

    fn account(&self, backend: u32, bytes: u32, new_flow: bool) {
        let mut stats = self.stats.borrow_mut();
        let stats = stats.entry(backend).or_default();
        stats.packets += 1;
        stats.bytes += u64::from(bytes);
        stats.flows += u64::from(new_flow);
    }

    fn count_failure(&self, worker: &Address, sign: PassiveFailure) {
        let mut all = self.signs.borrow_mut();
        let signs = all.entry(passive::index_of(worker)).or_default();
        match sign {
            PassiveFailure::Unreachable => signs.unreachable += 1,
            PassiveFailure::Refused => signs.refused += 1,
        }
    }

    fn take_icmp(&self, per_s: u32, burst: u32) -> bool {
        let mut budget = self.icmp.get();
        let taken = budget.take(self.now_ns.get(), per_s, burst);
        self.icmp.set(budget);
        taken
    }

    fn admits(&self, _: u32, _: FlowTable, _: u32) -> bool {
        !self.is_flooded.get()
    }

    fn admits_record(&self, _: u32, _: &ServiceView, _: u32) -> bool {
        !self.is_flooded.get()
    }
}

impl FragmentTable for HashTables {
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        in_place(|| self.fragments.borrow_mut().get_mut(key).map(f))
    }

    fn record_fragment(&self, key: &FragmentKey, fragment: &Fragment) -> bool {
        before_access();
        self.fragments.borrow_mut().insert(*key, *fragment);
        true
    }
}

impl QuicTables for HashTables {
    fn quic_config(&self, key: u32) -> Option<&QuicConfig> {
        self.quic_configs.get(&key)
    }

    fn with_work<R>(&self, f: impl FnOnce(&mut Work) -> R) -> Option<R> {
        Some(f(&mut self.quic_work.borrow_mut()))
    }

    fn quic_server(&self, key: &ServerIdKey) -> Option<u32> {
        self.quic_servers.get(key).copied()
    }
}

impl DecapTables for HashTables {
    fn is_ours(&self, address: &Address) -> bool {
        self.decap_addresses.contains(address)
    }

    fn is_served(&self, vip: &Address) -> bool {
        self.decap_vips.contains(vip)
    }

    fn count(&self, reason: Reason) {
        self.count_one(reason);
    }
}

impl HashTables {
    /// Bindings by client, ordered by key.
    pub fn nats(&self) -> Vec<(FlowKey, Nat)> {
        self.nats.borrow().iter().map(|(key, nat)| (*key, *nat)).collect()
    }

    /// Bindings by worker, ordered by key.
    pub fn replies(&self) -> Vec<(ReplyKey, Reply)> {
        self.replies.borrow().iter().map(|(key, reply)| (*key, *reply)).collect()
    }

    fn add<K: Ord + Copy, V: Copy>(&self, map: &RefCell<BTreeMap<K, V>>, key: &K, value: &V) -> Added {
        before_access();
        let mut map = map.borrow_mut();
        if map.contains_key(key) {
            return Added::Taken;
        }
        if map.len() >= self.capacity {
            return Added::Full;
        }
        map.insert(*key, *value);
        Added::Done
    }
}

impl NatTables for HashTables {
    fn nat<R>(&self, key: &FlowKey, f: impl FnOnce(&mut Nat) -> R) -> Option<R> {
        in_place(|| self.nats.borrow_mut().get_mut(key).map(f))
    }

    fn reply<R>(&self, key: &ReplyKey, f: impl FnOnce(&mut Reply) -> R) -> Option<R> {
        in_place(|| self.replies.borrow_mut().get_mut(key).map(f))
    }

    fn add_nat(&self, key: &FlowKey, nat: &Nat) -> Added {
        self.add(&self.nats, key, nat)
    }

    fn add_reply(&self, key: &ReplyKey, reply: &Reply) -> Added {
        self.add(&self.replies, key, reply)
    }

    fn remove_nat(&self, key: &FlowKey) -> bool {
        before_access();
        self.nats.borrow_mut().remove(key).is_some()
    }

    fn remove_reply(&self, key: &ReplyKey) -> bool {
        before_access();
        self.replies.borrow_mut().remove(key).is_some()
    }

    fn is_translated(&self, source: &Address) -> bool {
        use lb_common::backend::{flags::USED, mode::NAT};
        let is_single = |b: &Backend| b.flags & USED != 0 && b.mode == NAT && b.source_bits == 0;
        self.backends.values().any(|b| is_single(b) && b.source == *source)
    }

    fn embryonic<R>(&self, place: u32, f: impl FnOnce(&mut Embryonic) -> R) -> Option<R> {
        if place >= self.embryonic_room {
            return None;
        }
        Some(f(self.embryonic[PROCESSOR.get()].borrow_mut().entry(place).or_insert(Embryonic::EMPTY)))
    }

    fn sum<F: Frame>(&self, frame: &F, offset: usize, len: usize) -> Option<u32> {
        let mut memory = Sum::EMPTY;
        frame.sum_of(offset, len, &mut memory)
    }

    fn scratch<R>(&self, f: impl FnOnce(&mut NatScratch) -> R) -> Option<R> {
        Some(f(&mut self.scratch[PROCESSOR.get()].borrow_mut()))
    }
}
