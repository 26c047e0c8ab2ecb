//! The edge to the kernel: programs, links, maps. The only module that touches aya.
//!
//! [`Dataplane`] is the one writer; [`Reader`] may be opened many times. Nothing here decides anything:
//! `reconcile` says what to write and in which order. Errors say what an operator can do about them.

mod advice;
mod attach;
mod batch;
mod bindings;
mod bond;
mod decap;
mod error;
mod extack;
mod grace;
mod guard;
mod kernel;
mod layout;
mod links;
mod load;
mod loads;
mod lookup_cache;
mod mapped;
mod migrate;
mod notes;
mod object;
mod own_sources;
mod pins;
mod probes;
mod reader;
mod refused;
mod slots;
mod stages;
mod sys;
mod takeover;
mod variant;
mod waiting;
mod writer;

pub use decap::{DecapDataplane, DecapOptions, pinned_vips};
pub use error::DataplaneError;
pub use grace::grace_period;
pub use kernel::{Kernel, is_jitted, kernel_version};
pub use links::{Interface, index_of};
pub use loads::Loads;
pub use migrate::Carried;
pub use notes::{Notes, Scan};
pub use pins::detach;
pub use probes::ProbeDataplane;
pub use reader::{FLOW_TABLES, HASH_MAPS, Reader, flow_map};
pub use stages::LeftOut;
pub use takeover::{Identity, Takeover};
pub use variant::PAGE_MTU;
pub use waiting::{Interfaces, Waiting};

use crate::desired::model::Guard;
use attach::{Attached, Request, take};
use aya::{
    Ebpf,
    maps::{
        HashMap, Map, MapData, PerCpuArray,
        xdp::{DevMapHash, XdpMapError},
    },
};
use guard::GuardWriter;
use lb_common::{
    Backend, BackendStats, Flow, FlowKey, Service, ServiceKey, ServiceView, Slot, Vip, VipKey, limits, names,
    quic::{QuicConfig, ServerIdKey},
    settings::{IngressSettings, features},
    slot::LINE,
};
use lb_ebpf::FlowTable;
use load::Switches;
use lookup_cache::Spared;
use mapped::MappedArray;
use own_sources::OwnSources;
use reader::hash_map;
use slots::MappedSlots;
use std::{fs, path::PathBuf, sync::Arc};
use zerocopy::IntoBytes;

/// Sizes of the maps; fixed for as long as the pins live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Services.
    pub services: u32,
    /// Backends over all services.
    pub backends: u32,
    /// Slots of all tables, live and being written.
    pub slots: u32,
    /// Entries of the tables of TCP and of UDP flows, each.
    pub flows: u32,
    /// Recent SYN choices.
    pub syns: u32,
    /// Bindings of mode `nat`.
    pub nat_flows: u32,
    /// Bindings that one processor keeps whose clients have not shown themselves.
    pub nat_young: u32,
    /// Entries of the deny and allow lists together.
    pub guard_entries: u32,
    /// Sources whose rate of new flows is known.
    pub sources: u32,
    /// VIP addresses.
    pub vips: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            services: limits::SERVICES,
            backends: limits::BACKENDS,
            slots: limits::SLOTS,
            flows: limits::FLOWS,
            syns: limits::SYNS,
            nat_flows: limits::NAT_FLOWS,
            nat_young: limits::NAT_YOUNG,
            guard_entries: limits::GUARD_ENTRIES,
            sources: limits::SOURCES,
            vips: limits::VIPS,
        }
    }
}

/// Features that cost something for every packet, and are therefore in the program only while somebody uses them.
pub const ON_DEMAND: u32 = features::GUARD | features::RATE;

/// Features with which the program is loaded: of the `configured` ones those that cost something even where nobody uses
/// them are left out unless they are `used` ([`ON_DEMAND`]), or users' programs are `chained`.
pub const fn loaded_features(configured: u32, chained: bool, used: u32) -> u32 {
    let chain = if chained { features::ALL } else { !features::CHAIN };
    configured & chain & (used | !ON_DEMAND)
}

/// How to attach an ingress host's dataplane.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Interfaces.
    pub interfaces: Vec<String>,
    /// Whether generic mode will do where the driver has none.
    pub allow_generic: bool,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: PathBuf,
    /// Map sizes.
    pub limits: Limits,
    /// The program's settings; its features hold those of [`ON_DEMAND`] that are used from the start.
    pub settings: IngressSettings,
    /// Those of [`ON_DEMAND`] that may be used later.
    pub may_have: u32,
    /// Log level of the program: 0 off, 1 error … 5 trace.
    pub log_level: u8,
}

/// The writer of an ingress host's maps.
pub struct Dataplane {
    service_index: HashMap<MapData, ServiceKey, u32>,
    vips: HashMap<MapData, VipKey, Vip>,
    spared: Spared,
    own_sources: OwnSources,
    services: MappedArray<Service>,
    slots: MappedSlots,
    backends: MappedArray<Backend>,
    loads: Arc<Loads>,
    egress: DevMapHash<MapData>,
    flows: [HashMap<MapData, FlowKey, Flow>; 2],
    quic_configs: HashMap<MapData, u32, QuicConfig>,
    quic_servers: HashMap<MapData, ServerIdKey, u32>,
    guard: GuardWriter,
    backend_stats: PerCpuArray<MapData, BackendStats>,
    reader: Arc<Reader>,
    /// Where the program runs, and where it is yet to run.
    pub interfaces: Arc<Interfaces>,
    /// Whether it is loaded with the frags flag.
    pub frags: bool,
    /// Programs that the kernel refused.
    pub left_out: Vec<LeftOut>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    /// Where the maps are pinned.
    pub home: PathBuf,
    /// Sizes of the maps as they are; those asked for may differ where maps were taken over.
    pub limits: Limits,
    identity: Option<Identity>,
    takeover: Option<Takeover>,
    bpf: Ebpf,
    /// How it was attached, and the features of the program that runs.
    options: AttachOptions,
    /// Those of [`ON_DEMAND`] that the settings allow.
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
        Notes::open(&home)?.draw_key();
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
        let limits = Limits {
            guard_entries: guard.capacity()?,
            services: services.len(),
            slots: slots.len(),
            backends: backends.len(),
            ..options.limits
        };
        let service_index: HashMap<MapData, ServiceKey, u32> = take(&mut bpf, names::SERVICE_INDEX)?;
        let vips: HashMap<MapData, VipKey, Vip> = take(&mut bpf, names::VIPS)?;
        let spared = spare(&mut bpf, &service_index, &vips)?;
        let own_sources = OwnSources::new(take(&mut bpf, names::NAT_SOURCES)?, &backends)?;
        let identity = takeover.as_ref().and_then(Takeover::identity).map(|all| within(&limits, all));
        Ok(Self {
            service_index,
            vips,
            spared,
            own_sources,
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

    /// Who has which index in the maps of another ABI version that forwards, where ours have nothing yet.
    pub fn predecessor(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// What is to be done when the tables are written, if another ABI version forwards; once.
    pub fn takeover(&mut self) -> Option<Takeover> {
        self.takeover.take()
    }

    /// Brings the deny and allow lists up to date; says when the next entry ends, in seconds since 1970 UTC.
    pub fn apply_guard(&mut self, guard: &Guard, now_s: u64) -> Result<Option<u64>, DataplaneError> {
        self.guard.apply(guard, now_s)
    }

    /// Runs the program with just these of the features that cost something even where nobody uses them
    /// ([`ON_DEMAND`]). Where they are others than now it is loaded anew, and replaced under its links in one step.
    pub fn use_features(&mut self, wanted: u32) -> Result<(), DataplaneError> {
        let running = self.options.settings.features;
        // A program that logs has them all from the start: its log is read from maps that go with it.
        if self.options.log_level != 0 || running & ON_DEMAND == wanted & self.may_have {
            return Ok(());
        }
        let mut options = self.options.clone();
        options.settings.features = running & !ON_DEMAND | wanted & self.may_have;
        let (sizes, settings) = (sizes(&options.limits), settings(&options));
        // Nothing is attached anywhere with the program before, and then forgotten.
        let _held = self.interfaces.hold();
        let Some(bpf) = attach::replace(&request(&options, &sizes, &settings), self.frags)? else {
            return Ok(());
        };
        self.bpf = bpf;
        self.options = options;
        // They go with the program; until now it did without.
        self.spared = spare(&mut self.bpf, &self.service_index, &self.vips)?;
        self.own_sources = OwnSources::new(take(&mut self.bpf, names::NAT_SOURCES)?, &self.backends)?;
        Ok(())
    }

    /// A reader of the same maps.
    pub fn reader(&self) -> Arc<Reader> {
        Arc::clone(&self.reader)
    }

    /// The loads that flows are placed by.
    pub fn loads(&self) -> Arc<Loads> {
        Arc::clone(&self.loads)
    }

    /// The loaded object, for aya-log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }

    /// Writes slots from place `base` on.
    pub fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
        for (place, slot) in (base..).zip(slots) {
            self.store_slot(place, *slot)?;
        }
        Ok(())
    }

    /// Writes single slots of a live table. Whoever sees a slot's new primary sees its new secondary too: it is stored
    /// first, and x86 neither reorders two stores nor two loads; elsewhere all programs that may have loaded the old
    /// secondary have ended before a primary is stored.
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

    /// `count` slots from place `base` on; those past the end are left out.
    pub fn read_slots(&self, base: u32, count: u32) -> Vec<Slot> {
        (base..base.saturating_add(count)).map_while(|place| self.slots.load(place)).collect()
    }

    /// A service's entry.
    pub fn service(&self, index: u32) -> Option<Service> {
        self.services.load(index)
    }

    /// Writes one of a service's two views; the live one must be left alone.
    pub fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError> {
        let mut service = self.services.load(index).ok_or(missing(names::SERVICES, index))?;
        service.views[(view & 1) as usize] = *value;
        stored(self.services.store(index, &service), names::SERVICES, index)
    }

    /// Makes one of a service's views the live one: the switch, in one store.
    pub fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError> {
        let offset = std::mem::offset_of!(Service, active);
        stored(self.services.store_u32(index, offset, view & 1), names::SERVICES, index)
    }

    /// Marks a service's entry as taken or free.
    pub fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError> {
        let offset = std::mem::offset_of!(Service, used);
        stored(self.services.store_u32(index, offset, used.into()), names::SERVICES, index)
    }

    /// A backend's entry.
    pub fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.load(index)
    }

    /// Writes backends. Where more than one word of a live entry's way changes, packets are sent by the
    /// kernel's FIB meanwhile: they never see half of one way and half of another.
    pub fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError> {
        let mut torn = false;
        for (index, new) in backends {
            let old = self.backends.load(*index).ok_or(missing(names::BACKENDS, *index))?;
            if is_torn(&old, new) {
                self.store_backend_flags(*index, old.flags & !lb_common::backend::flags::RESOLVED)?;
                torn = true;
            }
        }
        if torn {
            grace_period();
        }
        for (index, new) in backends {
            let resolved = lb_common::backend::flags::RESOLVED;
            let unresolved = Backend { flags: new.flags & !resolved, ..*new };
            let old = self.backends.load(*index).ok_or(missing(names::BACKENDS, *index))?;
            self.own_sources.change(&old, new)?;
            let first = if old.flags & resolved == 0 { &unresolved } else { new };
            stored(self.backends.store(*index, first), names::BACKENDS, *index)?;
            if first.flags != new.flags {
                self.store_backend_flags(*index, new.flags)?;
            }
        }
        Ok(())
    }

    fn store_backend_flags(&mut self, index: u32, flags: u32) -> Result<(), DataplaneError> {
        let offset = std::mem::offset_of!(Backend, flags);
        stored(self.backends.store_u32(index, offset, flags), names::BACKENDS, index)
    }

    /// Sets a backend's counters to zero, for an index that is used again.
    pub fn clear_backend_stats(&mut self, index: u32) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::BACKEND_STATS, source };
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, source)| DataplaneError::Read { map: names::BACKEND_STATS, source })?;
        let zeros = aya::maps::PerCpuValues::try_from(vec![BackendStats::default(); cpus])
            .map_err(|source| DataplaneError::Read { map: names::BACKEND_STATS, source })?;
        self.backend_stats.set(index, zeros, 0).map_err(map)
    }

    /// Points an exact port at a service, or at none.
    pub fn set_service_index(
        &mut self,
        key: &ServiceKey,
        service: Option<u32>,
    ) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::SERVICE_INDEX, source };
        match service {
            Some(index) => {
                self.service_index.insert(key, index, 0).map_err(map)?;
                self.spared.set(key, service)
            }
            None => {
                self.spared.set(key, None)?;
                absent_is_fine(self.service_index.remove(key)).map_err(map)
            }
        }
    }

    /// Writes what else a VIP serves, or that it is no VIP.
    pub fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::VIPS, source };
        match vip {
            Some(vip) => {
                self.spared.add_vip(key.vip)?;
                self.vips.insert(key, vip, 0).map_err(map)
            }
            None => {
                absent_is_fine(self.vips.remove(key)).map_err(map)?;
                self.spared.remove_vip(key.vip)
            }
        }
    }

    /// Allows or forbids an egress interface. One that has just gone away is fine: the kernel's word of it
    /// is on its way.
    pub fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::EGRESS, source };
        if allowed {
            // A program on a bond sees the interface below it that a packet came in by, and answers leave by the bond.
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

    /// Configs of QUIC connection ids.
    pub fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_CONFIGS, source };
        self.quic_configs.iter().collect::<Result<_, _>>().map_err(map)
    }

    /// QUIC server ids.
    pub fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_SERVERS, source };
        self.quic_servers.iter().collect::<Result<_, _>>().map_err(map)
    }

    /// Writes how QUIC connection ids are read, or that they are not.
    pub fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_CONFIGS, source };
        match config {
            Some(config) => self.quic_configs.insert(key, config, 0).map_err(map),
            None => absent_is_fine(self.quic_configs.remove(&key)).map_err(map),
        }
    }

    /// Points a QUIC server id at a backend, or at none.
    pub fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::QUIC_SERVERS, source };
        match backend {
            Some(index) => self.quic_servers.insert(key, index, 0).map_err(map),
            None => absent_is_fine(self.quic_servers.remove(key)).map_err(map),
        }
    }

    /// Forgets a flow.
    pub fn remove_flow(&mut self, table: FlowTable, key: &FlowKey) -> Result<(), DataplaneError> {
        absent_is_fine(self.flows[hash_map(table)].remove(key))
            .map_err(|source| DataplaneError::Map { map: flow_map(table), source })
    }
}

/// The tables that spare lookups, filled from what the adopted maps say.
fn spare(
    bpf: &mut Ebpf,
    service_index: &HashMap<MapData, ServiceKey, u32>,
    vips: &HashMap<MapData, VipKey, Vip>,
) -> Result<Spared, DataplaneError> {
    let map = |map| move |source| DataplaneError::Map { map, source };
    let mut spared = Spared::new(map_array(bpf, names::EXACT)?, map_array(bpf, names::VIP_FILTER)?);
    for key in vips.keys() {
        spared.add_vip(key.map_err(map(names::VIPS))?.vip)?;
    }
    spared.arm()?;
    // Last: packets to these ports are not asked the long way whether their source is a VIP.
    for entry in service_index.iter() {
        let (key, index) = entry.map_err(map(names::SERVICE_INDEX))?;
        spared.set(&key, Some(index))?;
    }
    Ok(spared)
}

/// Indices that our maps have room for: what has a higher one gets another.
fn within(limits: &Limits, all: Identity) -> Identity {
    use lb_common::service::NO_SERVICE;
    let fits = |index: &mut u32| {
        if *index >= limits.services {
            *index = NO_SERVICE;
        }
    };
    let mut vips = all.vips;
    for vip in vips.values_mut() {
        fits(&mut vip.any_tcp);
        fits(&mut vip.any_udp);
        let used = (vip.range_count as usize).min(vip.ranges.len());
        let (kept, gone): (Vec<_>, Vec<_>) =
            vip.ranges[..used].iter().copied().partition(|r| r.service < limits.services);
        vip.range_count = kept.len() as u32;
        for (place, range) in vip.ranges.iter_mut().zip(kept.into_iter().chain(gone)) {
            *place = range;
        }
    }
    Identity {
        index: all.index.into_iter().filter(|(_, index)| *index < limits.services).collect(),
        vips,
        backends: all
            .backends
            .into_iter()
            .filter(|(index, b)| *index < limits.backends && b.service < limits.services)
            .collect(),
    }
}

/// Sizes of the maps that can be chosen.
fn sizes(l: &Limits) -> Vec<(&'static str, u32)> {
    vec![
        (names::SERVICE_INDEX, l.services),
        (names::SERVICES, l.services),
        (names::VIPS, l.vips),
        (names::PRIMARIES, l.slots.div_ceil(LINE)),
        (names::SECONDARIES, l.slots.div_ceil(LINE)),
        (names::BACKENDS, l.backends),
        (names::BACKEND_STATS, l.backends),
        (names::QUIC_SERVERS, l.backends),
        (names::LOADS, l.backends),
        (names::TURNS, l.services),
        (names::FLOWS, l.flows),
        (names::UDP_FLOWS, l.flows),
        (names::NAT_FLOWS, l.nat_flows),
        (names::NAT_REPLIES, l.nat_flows),
        (names::NAT_YOUNG, l.nat_young),
        (names::GUARD_ENTRIES, l.guard_entries),
        (names::SOURCES, l.sources),
        (names::LIMITS, l.services),
        (names::PRESSURE, l.services),
    ]
}

/// The settings global, for what the kernel takes.
fn settings(options: &AttachOptions) -> impl Fn(Switches) -> Vec<u8> + use<> {
    let settings = options.settings;
    move |switches| {
        let Switches { kernel, features } = switches;
        IngressSettings { kernel, features, ..settings }.as_bytes().to_vec()
    }
}

fn request<'a>(
    options: &'a AttachOptions,
    sizes: &'a [(&'static str, u32)],
    settings: &'a dyn Fn(Switches) -> Vec<u8>,
) -> Request<'a> {
    let is_chained = options.settings.features & features::CHAIN != 0;
    Request {
        object: crate::apply::objects::INGRESS,
        program: if is_chained { names::PROGRAM_ROOT } else { names::PROGRAM_INGRESS },
        stages: &names::stage::INGRESS_PROGRAMS,
        chained: is_chained.then_some(names::PROGRAM_INGRESS),
        maps: &names::INGRESS_MAPS,
        shared: &names::SHARED,
        has_flows: true,
        sizes,
        features: options.settings.features,
        settings,
        log_level: options.log_level,
        pin_path: &options.pin_path,
        interfaces: &options.interfaces,
        allow_generic: options.allow_generic,
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

/// Whether a reader could see half of an old way and half of the new one.
fn is_torn(old: &Backend, new: &Backend) -> bool {
    use lb_common::backend::flags::{RESOLVED, USED};
    // An entry that is being cleared is in no table any more.
    if old.flags & RESOLVED == 0 || new.flags & USED == 0 {
        return false;
    }
    let (a, b): (&[u64; 8], &[u64; 8]) = (zerocopy::transmute_ref!(old), zerocopy::transmute_ref!(new));
    (0..8).filter(|i| a[*i] != b[*i]).count() > 1
}
