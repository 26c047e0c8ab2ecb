//! The edge to the kernel: programs, links, maps. The only module that uses aya.
//!
//! [`Dataplane`] is the only writer; any number of [`Reader`]s may be open. This module makes no decisions:
//! `reconcile` determines what is written and in which order. Errors tell the operator what to do.

mod advice;
mod attach;
mod backends;
mod batch;
mod bindings;
mod bond;
mod decap;
mod error;
mod expected;
mod extack;
mod grace;
mod guard;
mod kept;
mod kernel;
mod layout;
mod links;
mod load;
mod loads;
mod lookup_cache;
mod mapped;
mod migrate;
mod object;
mod options;
mod own_addresses;
mod pins;
mod probes;
mod reader;
mod refused;
mod seen;
mod slots;
mod stages;
mod syn_cache;
mod sys;
mod takeover;
mod variant;
mod waiting;
mod writer;

pub use decap::{DecapDataplane, DecapOptions, pinned_vips};
pub use error::DataplaneError;
pub use grace::grace_period;
pub use kernel::{KernelFeatures, is_jitted, kernel_version};
pub use links::{AttachedInterface, index_of};
pub use loads::Loads;
pub use migrate::Migrated;
pub use options::{AttachOptions, MapLimits, ON_DEMAND, loaded_features};
pub use pins::detach;
pub use probes::ProbeDataplane;
pub use reader::{FLOW_TABLES, HASH_MAPS, Reader, flow_map};
pub use seen::interfaces_with_programs;
pub use stages::RefusedProgram;
pub use syn_cache::{Scan, SynCache, now_tick};
pub use takeover::{IndexAssignment, Takeover};
pub use variant::PAGE_MTU;
pub use waiting::{Interfaces, PendingInterface, Repaired};

use crate::desired::model::Guard;
use attach::{Attached, take};
use aya::{
    Ebpf,
    maps::{
        HashMap, Map, MapData, PerCpuArray,
        xdp::{DevMapHash, XdpMapError},
    },
};
use backends::Backends;
use guard::GuardWriter;
use lb_common::{
    Backend, BackendStats, Flow, FlowKey, Service, ServiceKey, ServiceView, Slot, Vip, VipKey, names,
    quic::{QuicConfig, ServerIdKey},
};
use lb_ebpf::FlowTable;
use lookup_cache::LookupCache;
use mapped::MappedArray;
use options::{request, settings, sizes};
use own_addresses::OwnAddresses;
use reader::hash_map;
use slots::MappedSlots;
use std::{fs, path::PathBuf, sync::Arc};

/// The writer of an ingress host's maps.
pub struct Dataplane {
    service_index: HashMap<MapData, ServiceKey, u32>,
    vips: HashMap<MapData, VipKey, Vip>,
    lookup_cache: LookupCache,
    own_addresses: OwnAddresses,
    services: MappedArray<Service>,
    slots: MappedSlots,
    backends: Backends,
    loads: Arc<Loads>,
    egress: DevMapHash<MapData>,
    flows: [HashMap<MapData, FlowKey, Flow>; 2],
    quic_configs: HashMap<MapData, u32, QuicConfig>,
    quic_servers: HashMap<MapData, ServerIdKey, u32>,
    guard: GuardWriter,
    backend_stats: PerCpuArray<MapData, BackendStats>,
    reader: Arc<Reader>,
    /// Interfaces that the program runs on, and those that wait for it.
    pub interfaces: Arc<Interfaces>,
    /// Whether the program is loaded with the frags flag.
    pub frags: bool,
    /// Programs that the kernel refused.
    pub left_out: Vec<RefusedProgram>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    /// Directory in which the maps are pinned.
    pub home: PathBuf,
    /// Actual sizes of the maps; they may differ from the requested ones where maps were taken over.
    pub limits: MapLimits,
    identity: Option<IndexAssignment>,
    takeover: Option<Takeover>,
    bpf: Ebpf,
    /// Options of the attachment, with the features of the running program.
    options: AttachOptions,
    /// Features of [`ON_DEMAND`] that the settings allow.
    may_have: u32,
    _lock: fs::File,
}

impl Dataplane {
    /// Loads and attaches, or takes over what an earlier daemon left running.
    pub fn attach(options: &AttachOptions) -> Result<Self, DataplaneError> {
        let sizes = sizes(&options.limits);
        let mut options = options.clone();
        let settings = settings(&options);
        let attached = attach::attach(&request(&options, &sizes, &settings))?;
        let Attached { mut bpf, interfaces, waiting, frags, left_out, adopted, home, takeover, lock } =
            attached;
        let lost = left_out.iter().fold(0, |bits, one| bits | one.feature);
        options.settings.features &= !lost;
        let interfaces = Arc::new(Interfaces::new(
            request(&options, &sizes, &settings).program,
            &options,
            frags,
            interfaces,
            waiting,
        ));
        let reader = Arc::new(Reader::open(&home)?);
        let mut flows = |table| take(&mut bpf, flow_map(table));
        let flows = [flows(FlowTable::Flows)?, flows(FlowTable::UdpFlows)?];
        SynCache::open(&home)?.ensure_key();
        let services: MappedArray<Service> = map_array(&mut bpf, names::SERVICES)?;
        let primaries = array(&mut bpf, names::PRIMARIES);
        let slots = MappedSlots::new(&primaries, &array(&mut bpf, names::SECONDARIES), true)?;
        let backends: MappedArray<Backend> = map_array(&mut bpf, names::BACKENDS)?;
        let guard = GuardWriter::new(
            map_array(&mut bpf, names::GUARD_BLOCKS)?,
            map_array(&mut bpf, names::GUARD_FILTER)?,
            map_array(&mut bpf, names::GUARD_STATE)?,
            reader::pinned(&home, names::GUARD_ENTRIES)?,
        );
        let limits = MapLimits {
            guard_entries: guard.capacity()?,
            services: services.len(),
            slots: slots.len(),
            backends: backends.len(),
            ..options.limits
        };
        let service_index: HashMap<MapData, ServiceKey, u32> = take(&mut bpf, names::SERVICE_INDEX)?;
        let vips: HashMap<MapData, VipKey, Vip> = take(&mut bpf, names::VIPS)?;
        let lookup_cache = LookupCache::fill(&mut bpf, &service_index, &vips)?;
        let own_addresses = OwnAddresses::new(take(&mut bpf, names::OWN_ADDRESSES)?, &backends)?;
        let backends = Backends::new(backends, map_array(&mut bpf, names::CHANGING_BACKENDS)?);
        let identity = takeover.as_ref().and_then(Takeover::identity).map(|all| all.within(&limits));
        Ok(Self {
            service_index,
            vips,
            lookup_cache,
            own_addresses,
            services,
            slots,
            backends,
            loads: Arc::new(Loads::new(map_array(&mut bpf, names::LOADS)?)),
            egress: take(&mut bpf, names::EGRESS)?,
            flows,
            quic_configs: take(&mut bpf, names::QUIC_CONFIGS)?,
            quic_servers: take(&mut bpf, names::QUIC_SERVERS)?,
            guard,
            backend_stats: take(&mut bpf, names::BACKEND_STATS)?,
            reader,
            interfaces,
            frags,
            left_out,
            adopted,
            home,
            limits,
            identity,
            takeover,
            bpf,
            may_have: options.may_have,
            options,
            _lock: lock,
        })
    }

    /// Indices in the maps of another ABI version that forwards, where our maps are still empty.
    pub fn predecessor(&self) -> Option<&IndexAssignment> {
        self.identity.as_ref()
    }

    /// Returns the takeover to finish once the tables are written, if another ABI version forwards; only once.
    pub fn takeover(&mut self) -> Option<Takeover> {
        self.takeover.take()
    }

    /// Updates the deny and allow lists; returns when the next entry expires, in seconds since 1970 UTC.
    pub fn apply_guard(&mut self, guard: &Guard, now_s: u64) -> Result<Option<u64>, DataplaneError> {
        self.guard.apply(guard, now_s)
    }

    /// Runs the program with exactly these of the features of [`ON_DEMAND`]. If they differ from the present ones, the
    /// program is loaded again, and replaced under its links in one step.
    pub fn use_features(&mut self, wanted: u32) -> Result<(), DataplaneError> {
        let running = self.options.settings.features;
        // A program that logs has all features from the start, because its log is read from maps that belong to it.
        if self.options.log_level != 0 || running & ON_DEMAND == wanted & self.may_have {
            return Ok(());
        }
        let mut options = self.options.clone();
        options.settings.features = running & !ON_DEMAND | wanted & self.may_have;
        let (sizes, settings) = (sizes(&options.limits), settings(&options));
        // No interface is attached with the old program meanwhile, and then missed.
        let _held = self.interfaces.hold();
        let Some(bpf) = attach::replace(&request(&options, &sizes, &settings), self.frags)? else {
            return Ok(());
        };
        self.bpf = bpf;
        self.options = options;
        // These maps belong to the program; it has run without them until now.
        self.lookup_cache = LookupCache::fill(&mut self.bpf, &self.service_index, &self.vips)?;
        self.own_addresses =
            OwnAddresses::new(take(&mut self.bpf, names::OWN_ADDRESSES)?, self.backends.entries())?;
        self.backends.renew(map_array(&mut self.bpf, names::CHANGING_BACKENDS)?);
        Ok(())
    }

    /// Returns a reader of the same maps.
    pub fn reader(&self) -> Arc<Reader> {
        Arc::clone(&self.reader)
    }

    /// Returns the writer of loads, by which flows are placed.
    pub fn loads(&self) -> Arc<Loads> {
        Arc::clone(&self.loads)
    }

    /// Returns the loaded object, for aya-log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }

    /// Writes slots from index `base` on.
    pub fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
        for (place, slot) in (base..).zip(slots) {
            self.store_slot(place, *slot)?;
        }
        Ok(())
    }

    /// Writes single slots of a live table. A reader that sees a slot's new primary sees its new secondary too: the secondary
    /// is stored first, and x86 reorders neither two stores nor two loads; on other targets, all programs that may have
    /// loaded the old secondary have ended before a primary is stored.
    pub fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<(), DataplaneError> {
        const IN_ORDER: bool = cfg!(target_arch = "x86_64");
        if !IN_ORDER && !slots.is_empty() {
            for &(place, slot) in slots {
                stored(self.slots.store_secondary(place, slot), names::SECONDARIES, place)?;
            }
            grace_period();
        }
        slots.iter().try_for_each(|&(place, slot)| self.store_slot(place, slot))
    }

    /// Writes one slot, live or not.
    pub fn store_slot(&mut self, place: u32, slot: Slot) -> Result<(), DataplaneError> {
        stored(self.slots.store(place, slot), names::PRIMARIES, place)
    }

    /// Reads `count` slots from index `base` on; those past the end are left out.
    pub fn read_slots(&self, base: u32, count: u32) -> Vec<Slot> {
        (base..base.saturating_add(count)).map_while(|place| self.slots.load(place)).collect()
    }

    /// Reads a service's entry.
    pub fn service(&self, index: u32) -> Option<Service> {
        self.services.load(index)
    }

    /// Writes one of a service's two views; it must not be the live one.
    pub fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError> {
        let mut service = self.services.load(index).ok_or(missing(names::SERVICES, index))?;
        service.views[(view & 1) as usize] = *value;
        stored(self.services.store(index, &service), names::SERVICES, index)
    }

    /// Makes one of a service's views the live one, in one store.
    pub fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError> {
        let offset = std::mem::offset_of!(Service, active);
        stored(self.services.store_u32(index, offset, view & 1), names::SERVICES, index)
    }

    /// Marks a service's entry as taken or free.
    pub fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError> {
        let offset = std::mem::offset_of!(Service, used);
        stored(self.services.store_u32(index, offset, used.into()), names::SERVICES, index)
    }

    /// Reads a backend's entry.
    pub fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.entries().load(index)
    }

    /// Writes backends. A packet sees all of an entry's old next hop or all of its new one.
    pub fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError> {
        let own_addresses = &mut self.own_addresses;
        self.backends.write(backends, |old, new| own_addresses.change(old, new), grace_period)
    }

    /// Sets a backend's counters to zero, for an index that is reused.
    pub fn clear_backend_stats(&mut self, index: u32) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::BACKEND_STATS, source };
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, source)| DataplaneError::Read { map: names::BACKEND_STATS, source })?;
        let zeros = aya::maps::PerCpuValues::try_from(vec![BackendStats::default(); cpus])
            .map_err(|source| DataplaneError::Read { map: names::BACKEND_STATS, source })?;
        self.backend_stats.set(index, zeros, 0).map_err(map)
    }

    /// Points an exact port at a service, or removes it.
    pub fn set_service_index(
        &mut self,
        key: &ServiceKey,
        service: Option<u32>,
    ) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::SERVICE_INDEX, source };
        match service {
            Some(index) => {
                self.service_index.insert(key, index, 0).map_err(map)?;
                self.lookup_cache.set(key, service)
            }
            None => {
                self.lookup_cache.set(key, None)?;
                absent_is_fine(self.service_index.remove(key)).map_err(map)
            }
        }
    }

    /// Writes the port ranges and any-port services of a VIP, or removes the VIP.
    pub fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::VIPS, source };
        match vip {
            Some(vip) => {
                self.lookup_cache.add_vip(key.vip)?;
                self.vips.insert(key, vip, 0).map_err(map)
            }
            None => {
                absent_is_fine(self.vips.remove(key)).map_err(map)?;
                self.lookup_cache.remove_vip(key.vip)
            }
        }
    }

    /// Allows or forbids an egress interface. An interface that has just disappeared is not an error: a notification of the
    /// kernel will follow.
    pub fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::EGRESS, source };
        if allowed {
            // A program on a bond sees the slave interface that a packet arrived on, and answers leave by the bond.
            let out = bond::over(ifindex).unwrap_or(ifindex);
            match self.egress.insert(ifindex, out, None, 0) {
                Err(_) if nix::net::if_::if_indextoname(ifindex).is_err() => Ok(()),
                Err(XdpMapError::MapError(source)) => Err(map(source)),
                Err(XdpMapError::ChainedProgramNotSupported) => unreachable!("no program is chained"),
                Ok(()) => Ok(()),
            }
        } else {
            absent_is_fine(self.egress.remove(ifindex)).map_err(map)
        }
    }

    /// Lists the configs of QUIC connection ids.
    pub fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_CONFIGS, source };
        self.quic_configs.iter().collect::<Result<_, _>>().map_err(map)
    }

    /// Lists the QUIC server ids.
    pub fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_SERVERS, source };
        self.quic_servers.iter().collect::<Result<_, _>>().map_err(map)
    }

    /// Writes the format of QUIC connection ids of a config, or removes it.
    pub fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_CONFIGS, source };
        match config {
            Some(config) => self.quic_configs.insert(key, config, 0).map_err(map),
            None => absent_is_fine(self.quic_configs.remove(&key)).map_err(map),
        }
    }

    /// Points a QUIC server id at a backend, or removes it.
    pub fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_SERVERS, source };
        match backend {
            Some(index) => self.quic_servers.insert(key, index, 0).map_err(map),
            None => absent_is_fine(self.quic_servers.remove(key)).map_err(map),
        }
    }

    /// Removes a flow.
    pub fn remove_flow(&mut self, table: FlowTable, key: &FlowKey) -> Result<(), DataplaneError> {
        absent_is_fine(self.flows[hash_map(table)].remove(key))
            .map_err(|source| DataplaneError::Map { map: flow_map(table), source })
    }
}

fn map_array<T>(bpf: &mut Ebpf, name: &'static str) -> Result<MappedArray<T>, DataplaneError>
where
    T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + Default,
{
    MappedArray::new(&array(bpf, name), name, true)
}

fn array(bpf: &mut Ebpf, name: &'static str) -> MapData {
    match bpf.take_map(name) {
        Some(Map::Array(data)) => data,
        _ => unreachable!("the object was built with this array"),
    }
}

fn missing(map: &'static str, index: u32) -> DataplaneError {
    DataplaneError::Index { map, index }
}

fn stored(done: bool, map: &'static str, index: u32) -> Result<(), DataplaneError> {
    if done { Ok(()) } else { Err(missing(map, index)) }
}

fn absent_is_fine(result: Result<(), aya::maps::MapError>) -> Result<(), aya::maps::MapError> {
    use aya::maps::MapError;
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
