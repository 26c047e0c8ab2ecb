//! The `ingress` program under test.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues, ProgramArray, xdp::DevMapHash},
    programs::{TestRun, TestRunOptions, Xdp},
    util::nr_cpus,
};
use lb_common::{
    Address, Backend, BackendStats, Flow, FlowKey, Load, Nat, Reason, Reply, ReplyKey, Service, ServiceKey,
    ServiceView, Slot, Vip, VipKey,
    backend::{self, mode, own_address},
    exact,
    fragment::{Fragment, FragmentKey},
    names,
    quic::{QuicConfig, ServerIdKey},
    service::flags,
    settings::IngressSettings,
    slot::{LINE, Line},
    stats::IcmpBudget,
    syn_cache::{CachedSyn, upper_half},
};
use lb_userspace::apply::dataplane::SynCache;

use crate::now_s;

/// What a run left behind.
#[derive(Debug)]
pub struct Run {
    /// XDP verdict.
    pub verdict: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// Runs a program on one packet.
pub(crate) fn run(program: &Xdp, packet: &[u8]) -> Result<Run> {
    let mut out = vec![0; packet.len() + 512];
    let result = program.test_run(TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ..TestRunOptions::default()
    })?;
    out.truncate(result.data_size_out as usize);
    Ok(Run { verdict: result.return_value, packet: out })
}

/// Entries of the arrays that tests use; [`Ingress::reset`] clears these.
pub const USED: u32 = 120;

/// A slot's pair for [`Ingress::service`].
#[derive(Clone, Copy, Debug)]
pub enum Pair {
    /// Primary only.
    Stable(u32),
    /// Primary, and the previous primary.
    Transition(u32, u32),
    /// Primary only, but its flows may be in the flow table.
    Tracked(u32),
    /// No backend.
    Empty,
}

impl Pair {
    fn slot(self) -> Slot {
        use lb_common::slot::{NO_BACKEND, TRACKED, TRANSITION};
        match self {
            Self::Stable(p) => Slot { primary: p, secondary: NO_BACKEND },
            Self::Transition(p, s) => Slot { primary: p | TRACKED, secondary: s | TRANSITION },
            Self::Tracked(p) => Slot { primary: p | TRACKED, secondary: NO_BACKEND },
            Self::Empty => Slot::EMPTY,
        }
    }
}

/// The loaded program and its maps.
pub struct Ingress {
    bpf: Ebpf,
    syn_cache: SynCache,
    /// Lines of `EXACT` and of `VIP_FILTER` that were written.
    spared: (BTreeSet<u32>, BTreeSet<u32>),
}

impl Ingress {
    /// Loads the program with small maps.
    pub fn load(settings: IngressSettings) -> Result<Self> {
        Self::load_with(settings, 0)
    }

    /// The same with a log level.
    pub fn load_with(settings: IngressSettings, log_level: u8) -> Result<Self> {
        Self::load_sized(settings, log_level, 65_536)
    }

    /// The same with room for so many flows in each flow table.
    pub fn load_sized(settings: IngressSettings, log_level: u8, flows: u32) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        loader
            .override_global(names::SETTINGS, &settings, true)
            .override_global(names::LOG_LEVEL, &log_level, true)
            .map_max_entries(names::PRIMARIES, 65_536 / LINE)
            .map_max_entries(names::SECONDARIES, 65_536 / LINE)
            .map_max_entries(names::SERVICES, 128)
            .map_max_entries(names::BACKENDS, 256)
            .map_max_entries(names::CHANGING_BACKENDS, 256)
            .map_max_entries(names::BACKEND_STATS, 256)
            // More than any run makes bindings: which of them go depends on which processor made them.
            .map_max_entries(names::NAT_EMBRYONIC, 1 << 18);
        for table in [names::FLOWS, names::UDP_FLOWS] {
            loader.map_max_entries(table, flows);
        }
        let mut bpf =
            loader.load(lb_userspace::apply::objects::INGRESS).context("load the ingress object")?;
        let program: &mut Xdp = bpf.program_mut(names::PROGRAM_INGRESS).context("program")?.try_into()?;
        program.load().context("the verifier refused the ingress program")?;
        for (name, place) in names::stage::INGRESS_PROGRAMS {
            let program: &mut Xdp = bpf.program_mut(name).context("stage")?.try_into()?;
            program.load().with_context(|| format!("the verifier refused stage {name}"))?;
            let fd = program.fd()?.try_clone()?;
            let mut stages: ProgramArray<_> = bpf.map_mut(names::STAGES).context("stages")?.try_into()?;
            stages.set(place, &fd, 0)?;
        }
        let Some(Map::Array(map)) = bpf.map(names::SYN_CACHE) else {
            anyhow::bail!("the SYN cache is not an array")
        };
        let syn_cache = SynCache::new(map)?;
        let mut ingress = Self { bpf, syn_cache, spared: Default::default() };
        ingress.set_filter(exact::FILTER_ARMED, 1);
        Ok(ingress)
    }

    /// Writes what spares the lookup of an exact port, as `lbd` does.
    fn spare(&mut self, key: &ServiceKey, index: u32) {
        let (place, entry) = exact::entry(key, index);
        let mut lines: Array<&mut MapData, exact::ExactLine> = self.map(names::EXACT);
        let mut line = lines.get(&place, 0).expect("in range");
        let known = line.entries.iter().position(|known| known.is_of(&entry));
        let free = line.entries.iter().position(|known| known.port_and_service == 0);
        if let Some(at) = known.or(free) {
            line.entries[at] = entry;
            lines.set(place, line, 0).expect("in range");
        }
        self.spared.0.insert(place);
    }

    /// Sets bits of a word of the filter of VIPs.
    fn set_filter(&mut self, word: u32, bits: u32) {
        let mut lines: Array<&mut MapData, Line> = self.map(names::VIP_FILTER);
        let mut line = lines.get(&(word / LINE), 0).expect("in range");
        line.words[(word % LINE) as usize] |= bits;
        lines.set(word / LINE, line, 0).expect("in range");
        if word != exact::FILTER_ARMED {
            self.spared.1.insert(word / LINE);
        }
    }

    /// The program, for its figures.
    pub fn program(&self) -> &Xdp {
        self.program_named(names::PROGRAM_INGRESS)
    }

    /// One of the object's programs.
    pub fn program_named(&self, name: &str) -> &Xdp {
        self.bpf.program(name).and_then(|p| p.try_into().ok()).expect("loaded in `load`")
    }

    /// Empties a place of `STAGES`, as if its program had not been loaded.
    pub fn clear_stage(&mut self, place: u32) {
        let mut stages: ProgramArray<&mut MapData> = self.map(names::STAGES);
        stages.clear_index(&place).expect("a place with a program");
    }

    /// Runs one packet through the program.
    pub fn run(&self, packet: &[u8]) -> Result<Run> {
        run(self.program(), packet)
    }

    pub(crate) fn hash_map(&self, name: &str) -> Option<&MapData> {
        match self.bpf.map(name) {
            Some(Map::HashMap(data)) => Some(data),
            _ => None,
        }
    }

    pub(crate) fn map<'a, M: TryFrom<&'a mut Map>>(&'a mut self, name: &str) -> M
    where
        M::Error: std::fmt::Debug,
    {
        M::try_from(self.bpf.map_mut(name).expect("map of lb_common::names")).expect("its type")
    }

    /// Writes an exact-port service at `index` whose slots all hold `pairs`, repeated.
    pub fn service(&mut self, index: u32, key: ServiceKey, pairs: &[Pair], view: ServiceView) {
        let slot_count = if pairs.is_empty() { 0 } else { 251 };
        let slot_base = index * 1_024;
        {
            for i in 0..slot_count {
                self.set_slot(slot_base + i, pairs[i as usize % pairs.len()].slot());
            }
        }
        let view = ServiceView { slot_base, slot_count, protocol: key.protocol, ..view };
        let other = ServiceView { slot_base: u32::MAX, slot_count: 1, ..view };
        let service = Service { active: 1, used: 1, views: [other, view], reserved: [0] };
        let mut services: Array<&mut MapData, Service> = self.map(names::SERVICES);
        services.set(index, service, 0).expect("in range");
        if u16::from(key.port) != 0 {
            let mut keys: HashMap<&mut MapData, ServiceKey, u32> = self.map(names::SERVICE_INDEX);
            keys.insert(key, index, 0).expect("room");
            self.spare(&key, index);
        }
        self.vip(key.vip, Vip::EMPTY);
    }

    /// A view with the usual settings.
    pub fn view() -> ServiceView {
        ServiceView { seed: [0x1234_5678, 0x9abc_def0], udp_timeout_s: 60, ..ServiceView::default() }
    }

    /// The same for a UDP service without memory.
    pub fn stateless_view() -> ServiceView {
        ServiceView { flags: flags::UDP_STATELESS, ..Self::view() }
    }

    /// Writes what else a VIP serves.
    pub fn vip(&mut self, vip: lb_common::Address, value: Vip) {
        let mut vips: HashMap<&mut MapData, VipKey, Vip> = self.map(names::VIPS);
        vips.insert(VipKey { vip }, value, 0).expect("room");
        let bit = exact::filter_bit(exact::words(&vip));
        self.set_filter(bit / 32, 1 << (bit % 32));
    }

    /// Writes a backend, and from where its packets come in mode `nat`, as `lbd` does.
    pub fn backend(&mut self, index: u32, backend: Backend) {
        let is_used = backend.flags & backend::flags::USED != 0;
        let mut own: HashMap<&mut MapData, Address, u32> = self.map(names::OWN_ADDRESSES);
        if is_used && backend.mode == mode::NAT && backend.source_bits == 0 {
            own.insert(backend.source, own_address::TRANSLATED, 0).expect("room");
        }
        if is_used {
            own.insert(backend.address, own_address::WORKER, 0).expect("room");
        }
        let mut backends: Array<&mut MapData, Backend> = self.map(names::BACKENDS);
        backends.set(index, backend, 0).expect("in range");
    }

    /// Writes a backend's entry before the change that is under way.
    pub fn changing_backend(&mut self, index: u32, backend: Backend) {
        let mut backends: Array<&mut MapData, Backend> = self.map(names::CHANGING_BACKENDS);
        backends.set(index, backend, 0).expect("in range");
    }

    /// Writes a backend's load.
    pub fn set_load(&mut self, index: u32, load: Load) {
        let mut loads: Array<&mut MapData, Load> = self.map(names::LOADS);
        loads.set(index, load, 0).expect("in range");
    }

    /// A backend's load.
    pub fn get_load(&mut self, index: u32) -> Load {
        let loads: Array<&mut MapData, Load> = self.map(names::LOADS);
        loads.get(&index, 0).expect("in range")
    }

    /// Allows an egress interface.
    pub fn egress(&mut self, ifindex: u32) {
        let mut egress: DevMapHash<&mut MapData> = self.map(names::EGRESS);
        egress.insert(ifindex, ifindex, None, 0).expect("an interface of this host");
    }

    /// A flow table's entry; of [`names::SYN_CACHE`] as if it were one.
    pub fn flow(&mut self, table: &str, key: &FlowKey) -> Option<Flow> {
        if table == names::SYN_CACHE {
            let syn = self.syn_cache.get(key);
            let seen_s = now_s().saturating_sub(syn.age_s);
            return syn.is_some().then(|| Flow::new(syn.backend, seen_s, u32::from(syn.sequence) << 16, 0));
        }
        let flows: HashMap<&mut MapData, FlowKey, Flow> = self.map(table);
        flows.get(key, 0).ok()
    }

    /// Entries of a flow table.
    pub fn flows(&mut self, table: &str) -> Vec<(FlowKey, Flow)> {
        let flows: HashMap<&mut MapData, FlowKey, Flow> = self.map(table);
        flows.iter().filter_map(Result::ok).collect()
    }

    /// Number of cached SYNs.
    pub fn cached_syns(&self) -> usize {
        let mut count = 0;
        self.syn_cache.for_each(|_, _, _| count += 1);
        count
    }

    /// The SYN cache and the flow filter.
    pub fn syn_cache(&self) -> &SynCache {
        &self.syn_cache
    }

    /// Writes a flow table's entry.
    pub fn set_flow(&mut self, table: &str, key: FlowKey, flow: Flow) {
        if table == names::SYN_CACHE {
            let age_s = now_s().saturating_sub(flow.last_seen_s);
            let syn = CachedSyn { backend: flow.backend, sequence: upper_half(flow.created_s), age_s };
            assert!(self.syn_cache.set(&key, syn), "a new one");
            return;
        }
        let mut flows: HashMap<&mut MapData, FlowKey, Flow> = self.map(table);
        flows.insert(key, flow, 0).expect("room");
    }

    /// Writes how QUIC connection ids are read.
    pub fn quic_config(&mut self, key: u32, config: QuicConfig) {
        let mut configs: HashMap<&mut MapData, u32, QuicConfig> = self.map(names::QUIC_CONFIGS);
        configs.insert(key, config, 0).expect("room");
    }

    /// Points a QUIC server id at a backend.
    pub fn quic_server(&mut self, key: ServerIdKey, backend: u32) {
        let mut servers: HashMap<&mut MapData, ServerIdKey, u32> = self.map(names::QUIC_SERVERS);
        servers.insert(key, backend, 0).expect("room");
    }

    /// Empties all tables and zeroes all counters.
    pub fn reset(&mut self) {
        fn clear<K: Pod, V: Pod>(mut map: HashMap<&mut MapData, K, V>) {
            let keys: Vec<K> = map.keys().filter_map(Result::ok).collect();
            for key in keys {
                map.remove(&key).expect("listed a moment ago");
            }
        }
        clear::<ServiceKey, u32>(self.map(names::SERVICE_INDEX));
        clear::<VipKey, Vip>(self.map(names::VIPS));
        let (lines, words) = std::mem::take(&mut self.spared);
        for place in lines {
            let mut map: Array<&mut MapData, exact::ExactLine> = self.map(names::EXACT);
            map.set(place, exact::ExactLine::default(), 0).expect("in range");
        }
        for place in words {
            let mut map: Array<&mut MapData, Line> = self.map(names::VIP_FILTER);
            map.set(place, Line::default(), 0).expect("in range");
        }
        clear::<Address, u32>(self.map(names::OWN_ADDRESSES));
        clear::<u32, QuicConfig>(self.map(names::QUIC_CONFIGS));
        clear::<ServerIdKey, u32>(self.map(names::QUIC_SERVERS));
        self.forget_flows();
        for index in 0..USED {
            self.set_service(index, Service::default());
            self.backend(index, Backend::default());
        }
        self.zero::<u64>(names::REASONS, Reason::COUNT);
        self.zero::<BackendStats>(names::BACKEND_STATS, USED);
        self.zero::<IcmpBudget>(names::ICMP_BUDGET, 1);
    }

    fn zero<V: Pod + Default + Clone>(&mut self, name: &str, entries: u32) {
        let cpus = nr_cpus().expect("the kernel lists its processors");
        let mut map: PerCpuArray<&mut MapData, V> = self.map(name);
        for index in 0..entries {
            let zeros = PerCpuValues::try_from(vec![V::default(); cpus]).expect("one for each");
            map.set(index, zeros, 0).expect("in range");
        }
    }

    /// Empties the flow tables, and what is known of fragments.
    pub fn forget_flows(&mut self) {
        let mut fragments: HashMap<&mut MapData, FragmentKey, Fragment> = self.map(names::FRAGMENTS);
        for key in fragments.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _ = fragments.remove(&key);
        }
        self.syn_cache.clear();
        for table in [names::FLOWS, names::UDP_FLOWS] {
            let mut flows: HashMap<&mut MapData, FlowKey, Flow> = self.map(table);
            let keys: Vec<FlowKey> = flows.keys().filter_map(Result::ok).collect();
            for key in keys {
                flows.remove(&key).expect("listed a moment ago");
            }
        }
    }

    /// Bindings of mode `nat`, by the client's side and by the worker's.
    pub fn bindings(&mut self) -> (Vec<(FlowKey, Nat)>, Vec<(ReplyKey, Reply)>) {
        let nats: HashMap<&mut MapData, FlowKey, Nat> = self.map(names::NAT_FLOWS);
        let nats = nats.iter().map(|entry| entry.expect("nobody else is here")).collect();
        let replies: HashMap<&mut MapData, ReplyKey, Reply> = self.map(names::NAT_REPLIES);
        (nats, replies.iter().map(|entry| entry.expect("nobody else is here")).collect())
    }

    /// Empties the maps of bindings.
    pub fn forget_bindings(&mut self) {
        let (nats, replies) = self.bindings();
        let mut map: HashMap<&mut MapData, FlowKey, Nat> = self.map(names::NAT_FLOWS);
        nats.iter().for_each(|(key, _)| map.remove(key).expect("listed a moment ago"));
        let mut map: HashMap<&mut MapData, ReplyKey, Reply> = self.map(names::NAT_REPLIES);
        replies.iter().for_each(|(key, _)| map.remove(key).expect("listed a moment ago"));
    }

    /// Writes a service's entry as it is.
    pub fn set_service(&mut self, index: u32, service: Service) {
        let mut services: Array<&mut MapData, Service> = self.map(names::SERVICES);
        services.set(index, service, 0).expect("in range");
    }

    /// Writes a slot as it is.
    pub fn set_slot(&mut self, place: u32, slot: Slot) {
        for (name, word) in [(names::PRIMARIES, slot.primary), (names::SECONDARIES, slot.secondary)] {
            let mut lines: Array<&mut MapData, Line> = self.map(name);
            let mut line = lines.get(&(place / LINE), 0).expect("in range");
            line.words[(place % LINE) as usize] = word;
            lines.set(place / LINE, line, 0).expect("in range");
        }
    }

    /// Makes a port lead to a service.
    pub fn set_key(&mut self, key: ServiceKey, index: u32) {
        let mut keys: HashMap<&mut MapData, ServiceKey, u32> = self.map(names::SERVICE_INDEX);
        keys.insert(key, index, 0).expect("room");
        self.spare(&key, index);
    }

    /// A reason's counter over all CPUs.
    pub fn count(&mut self, reason: Reason) -> u64 {
        let counts: PerCpuArray<&mut MapData, u64> = self.map(names::REASONS);
        counts.get(&(reason as u32), 0).expect("in range").iter().sum()
    }

    /// All reasons that were counted.
    pub fn counts(&mut self) -> Vec<(Reason, u64)> {
        Reason::ALL.iter().map(|r| (*r, self.count(*r))).filter(|(_, n)| *n != 0).collect()
    }

    /// A backend's counters over all CPUs.
    pub fn stats(&mut self, backend: u32) -> BackendStats {
        let stats: PerCpuArray<&mut MapData, BackendStats> = self.map(names::BACKEND_STATS);
        stats.get(&backend, 0).expect("in range").iter().fold(BackendStats::default(), |a, b| BackendStats {
            packets: a.packets + b.packets,
            bytes: a.bytes + b.bytes,
            flows: a.flows + b.flows,
        })
    }
}
