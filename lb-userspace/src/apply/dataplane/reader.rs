//! Reads the live dataplane: counters, tables, flows. It has its own handles, so that many readers
//! work beside the single writer; opened from the pins, it needs no daemon.

use super::{
    DataplaneError, batch, bindings::Bindings, mapped::MappedArray, slots::MappedSlots, syn_cache::SynCache,
};
use crate::{clock, observed::health::PassiveSource};
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use lb_common::{
    Address, Backend, BackendStats, Flow, FlowKey, Load, Reason, Service, ServiceKey, Slot, Vip, VipKey,
    guard::{GuardKey, GuardState},
    limits, names,
    passive::{self, PassiveFailures},
    quic::{QuicConfig, ServerIdKey},
    rate_limit::WriteBudget,
    slot::{LINE, Line},
};
use lb_ebpf::FlowTable;
use std::path::Path;

/// Name of a flow table's map.
pub fn flow_map(table: FlowTable) -> &'static str {
    match table {
        FlowTable::Flows => names::FLOWS,
        FlowTable::Syns => names::SYN_CACHE,
        FlowTable::UdpFlows => names::UDP_FLOWS,
    }
}

/// All flow tables.
pub const FLOW_TABLES: [FlowTable; 3] = [FlowTable::Flows, FlowTable::Syns, FlowTable::UdpFlows];

/// Flow tables that are hash maps, whose entries carry their full key.
pub const HASH_MAPS: [FlowTable; 2] = [FlowTable::Flows, FlowTable::UdpFlows];

/// Index in [`HASH_MAPS`].
pub(super) const fn hash_map(table: FlowTable) -> usize {
    matches!(table, FlowTable::UdpFlows) as usize
}

/// Handles for reading.
pub struct Reader {
    service_index: HashMap<MapData, ServiceKey, u32>,
    vips: HashMap<MapData, VipKey, Vip>,
    services: MappedArray<Service>,
    slots: MappedSlots,
    backends: MappedArray<Backend>,
    loads: MappedArray<Load>,
    signs: MappedArray<PassiveFailures>,
    backend_stats: PerCpuArray<MapData, BackendStats>,
    reasons: PerCpuArray<MapData, u64>,
    pressure: PerCpuArray<MapData, WriteBudget>,
    guard_blocks: MappedArray<Line>,
    guard_filter: MappedArray<Line>,
    guard_state: MappedArray<GuardState>,
    guard_entries: HashMap<MapData, GuardKey, u32>,
    quic_configs: HashMap<MapData, u32, QuicConfig>,
    quic_servers: HashMap<MapData, ServerIdKey, u32>,
    flows: [(MapData, HashMap<MapData, FlowKey, Flow>); 2],
    syn_cache: SynCache,
    pub(super) bindings: Bindings,
}

pub(super) fn pinned(pin_path: &Path, name: &'static str) -> Result<MapData, DataplaneError> {
    MapData::from_pin(pin_path.join(name)).map_err(|source| DataplaneError::Map { map: name, source })
}

pub(super) fn typed<M: TryFrom<Map, Error = aya::maps::MapError>>(
    map: Map,
    name: &'static str,
) -> Result<M, DataplaneError> {
    M::try_from(map).map_err(|source| DataplaneError::Map { map: name, source })
}

impl Reader {
    /// Opens the pins of a running dataplane.
    pub fn open(pin_path: &Path) -> Result<Self, DataplaneError> {
        let flows = |table| {
            let name = flow_map(table);
            let typed = typed(Map::HashMap(pinned(pin_path, name)?), name)?;
            Ok::<_, DataplaneError>((pinned(pin_path, name)?, typed))
        };
        let mapped = |name| MappedArray::<Line>::new(&pinned(pin_path, name)?, name, false);
        Ok(Self {
            service_index: typed(
                Map::HashMap(pinned(pin_path, names::SERVICE_INDEX)?),
                names::SERVICE_INDEX,
            )?,
            vips: typed(Map::HashMap(pinned(pin_path, names::VIPS)?), names::VIPS)?,
            services: MappedArray::new(&pinned(pin_path, names::SERVICES)?, names::SERVICES, false)?,
            slots: MappedSlots::new(
                &pinned(pin_path, names::PRIMARIES)?,
                &pinned(pin_path, names::SECONDARIES)?,
                false,
            )?,
            backends: MappedArray::new(&pinned(pin_path, names::BACKENDS)?, names::BACKENDS, false)?,
            loads: MappedArray::new(&pinned(pin_path, names::LOADS)?, names::LOADS, false)?,
            signs: MappedArray::new(
                &pinned(pin_path, names::PASSIVE_FAILURES)?,
                names::PASSIVE_FAILURES,
                false,
            )?,
            backend_stats: typed(
                Map::PerCpuArray(pinned(pin_path, names::BACKEND_STATS)?),
                names::BACKEND_STATS,
            )?,
            reasons: typed(Map::PerCpuArray(pinned(pin_path, names::REASONS)?), names::REASONS)?,
            pressure: typed(Map::PerCpuArray(pinned(pin_path, names::WRITE_BUDGETS)?), names::WRITE_BUDGETS)?,
            guard_blocks: mapped(names::GUARD_BLOCKS)?,
            guard_filter: mapped(names::GUARD_FILTER)?,
            guard_state: MappedArray::new(&pinned(pin_path, names::GUARD_STATE)?, names::GUARD_STATE, false)?,
            guard_entries: typed(
                Map::HashMap(pinned(pin_path, names::GUARD_ENTRIES)?),
                names::GUARD_ENTRIES,
            )?,
            quic_configs: typed(Map::HashMap(pinned(pin_path, names::QUIC_CONFIGS)?), names::QUIC_CONFIGS)?,
            quic_servers: typed(Map::HashMap(pinned(pin_path, names::QUIC_SERVERS)?), names::QUIC_SERVERS)?,
            flows: [flows(FlowTable::Flows)?, flows(FlowTable::UdpFlows)?],
            syn_cache: SynCache::open(pin_path)?,
            bindings: Bindings::open(pin_path)?,
        })
    }

    /// Looks up the service of an exact port.
    pub fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.service_index.get(key, 0).ok()
    }

    /// Looks up the port ranges and any-port services of a VIP.
    pub fn vip(&self, key: &VipKey) -> Option<Vip> {
        self.vips.get(key, 0).ok()
    }

    /// Lists all exact-port services.
    pub fn service_keys(&self) -> Result<Vec<(ServiceKey, u32)>, DataplaneError> {
        let map = names::SERVICE_INDEX;
        self.service_index
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|source| DataplaneError::Map { map, source })
    }

    /// Lists all VIPs.
    pub fn vips(&self) -> Result<Vec<(VipKey, Vip)>, DataplaneError> {
        let map = names::VIPS;
        self.vips.iter().collect::<Result<_, _>>().map_err(|source| DataplaneError::Map { map, source })
    }

    /// Reads a service's entry.
    pub fn service(&self, index: u32) -> Option<Service> {
        self.services.load(index)
    }

    /// Reads a slot, by its index in the map of all slots.
    pub fn slot(&self, place: u32) -> Option<Slot> {
        self.slots.load(place)
    }

    /// Whether a backend has this address.
    pub fn has_worker(&self, address: &Address) -> bool {
        (0..self.backends.len())
            .filter_map(|index| self.backends.load(index))
            .any(|b| b.flags & lb_common::backend::flags::USED != 0 && b.address == *address)
    }

    /// Reads a backend's entry.
    pub fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.load(index)
    }

    /// Reads a backend's load.
    pub fn load(&self, index: u32) -> Option<Load> {
        self.loads.load(index)
    }

    /// Sizes of the maps: services, slots, backends.
    pub fn sizes(&self) -> (u32, u32, u32) {
        (self.services.len(), self.slots.len(), self.backends.len())
    }

    /// Reads a backend's counters, summed over all CPUs; zero past the end.
    pub fn backend_stats(&self, index: u32) -> BackendStats {
        let Ok(stats) = self.backend_stats.get(&index, 0) else { return BackendStats::default() };
        stats.iter().fold(BackendStats::default(), |a, b| BackendStats {
            packets: a.packets.wrapping_add(b.packets),
            bytes: a.bytes.wrapping_add(b.bytes),
            flows: a.flows.wrapping_add(b.flows),
        })
    }

    /// Reads the write budgets of a service, by CPU.
    pub fn pressure(&self, service: u32) -> Result<Vec<WriteBudget>, DataplaneError> {
        let map = names::WRITE_BUDGETS;
        let all = self.pressure.get(&service, 0);
        all.map(|all| all.to_vec()).map_err(|source| DataplaneError::Map { map, source })
    }

    /// Reads the counters of all reasons, summed over all CPUs.
    pub fn reasons(&self) -> Vec<(Reason, u64)> {
        reasons(&self.reasons)
    }

    /// Reads a word of the bitmap of IPv4 blocks, or of the filter of IPv6 prefixes.
    pub fn guard_word(&self, of_blocks: bool, word: u32) -> u32 {
        let lines = if of_blocks { &self.guard_blocks } else { &self.guard_filter };
        lines.load_u32(word / LINE, (word % LINE) as usize * 4).unwrap_or(0)
    }

    /// Reads the prefix lengths of the lists.
    pub fn guard_state(&self) -> Option<GuardState> {
        self.guard_state.load(0)
    }

    /// Reads the verdict of a prefix.
    pub fn guard_entry(&self, key: &GuardKey) -> Option<u32> {
        self.guard_entries.get(key, 0).ok()
    }

    /// Reads the format of QUIC connection ids, by [`lb_common::quic::config_key`].
    pub fn quic_config(&self, key: u32) -> Option<QuicConfig> {
        self.quic_configs.get(&key, 0).ok()
    }

    /// Looks up the backend of a QUIC server id.
    pub fn quic_server(&self, key: &ServerIdKey) -> Option<u32> {
        self.quic_servers.get(key, 0).ok()
    }

    /// Indices of all services in use.
    pub fn used_services(&self) -> impl Iterator<Item = u32> {
        let used = |service: &u32| self.services.load_u32(*service, std::mem::offset_of!(Service, used));
        (0..self.services.len()).filter(move |service| used(service) == Some(1))
    }

    /// Maximum number of flows of a table.
    pub fn flow_room(&self, table: FlowTable) -> u32 {
        if table == FlowTable::Syns {
            return limits::SYNS;
        }
        self.flows[hash_map(table)].0.info().map_or(u32::MAX, |info| info.max_entries())
    }

    /// Looks up a tracked flow. That of a cached SYN has the upper half of its sequence number as `created_s`.
    pub fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        if table == FlowTable::Syns {
            let syn = self.syn_cache.get(key);
            let seen_s = clock::boot_s().saturating_sub(syn.age_s);
            return syn.is_some().then(|| Flow::new(syn.backend, seen_s, u32::from(syn.sequence) << 16, 0));
        }
        self.flows[hash_map(table)].1.get(key, 0).ok()
    }

    /// The SYN cache and the flow filter.
    pub fn syn_cache(&self) -> &SynCache {
        &self.syn_cache
    }

    /// Calls `each` with every entry of one of [`HASH_MAPS`]; see [`batch::for_each`] for concurrent changes.
    pub fn for_each_flow(
        &self,
        table: FlowTable,
        each: impl FnMut(FlowKey, Flow),
    ) -> Result<(), DataplaneError> {
        batch::for_each(&self.flows[hash_map(table)].0, flow_map(table), each)
    }
}

impl Reader {
    /// Removes a flow. The sweeper has only these handles, so the reader writes flows, bindings and the SYN cache.
    pub fn remove_flow(&self, table: FlowTable, key: &FlowKey) -> Result<(), DataplaneError> {
        let map = flow_map(table);
        batch::delete(&self.flows[hash_map(table)].0, key)
            .map_err(|source| DataplaneError::Read { map, source })
    }
}

/// Sums a program's reason counters over all CPUs.
pub(super) fn reasons(map: &PerCpuArray<MapData, u64>) -> Vec<(Reason, u64)> {
    let count = |r: &Reason| map.get(&(*r as u32), 0).map(|v| v.iter().sum()).unwrap_or(0);
    Reason::ALL.iter().map(|r| (*r, count(r))).collect()
}

impl PassiveSource for Reader {
    fn signs(&self, worker: &Address) -> PassiveFailures {
        self.signs.load(passive::index_of(worker)).unwrap_or_default()
    }
}
