//! Copy of the maps' contents, so that a change is a difference and not a rewrite; and the ordered writing of that
//! difference.
//!
//! Additions go backends → tables → services → keys, removals the other way round, so that a packet never
//! meets a reference to a missing entry. Each write is recorded in the mirror; after a
//! failure the mirror is read back from the maps.

use super::{
    maps::Maps,
    slots::{NoRoom, SlotSpace},
    tables::{LiveService, TableRoom},
};
use crate::{
    apply::dataplane::DataplaneError,
    desired::model::RateLimits,
    plan::compile::{Cost, Hashing, Plan, ServiceEntry, ServiceMemory, View},
};
use lb_common::{
    Backend, ServiceKey, ServiceView, Vip, VipKey,
    backend::flags::USED,
    load::source,
    quic::{QuicConfig, ServerIdKey},
    service::{NO_SERVICE, flags},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Number of entries that one application wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Backends written or cleared.
    pub backends: u32,
    /// Services switched to another view.
    pub services: u32,
    /// Slots written.
    pub slots: u32,
    /// Keys and VIPs written or removed.
    pub keys: u32,
}

impl std::ops::Add for Written {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            backends: self.backends + other.backends,
            services: self.services + other.services,
            slots: self.slots + other.slots,
            keys: self.keys + other.keys,
        }
    }
}

impl Written {
    /// Whether nothing was written.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Copy of the maps' contents.
#[derive(Clone, Debug)]
pub struct Mirror {
    pub(super) services: BTreeMap<u32, LiveService>,
    backends: BTreeMap<u32, Backend>,
    costs: BTreeMap<u32, Cost>,
    keys: BTreeMap<ServiceKey, u32>,
    vips: BTreeMap<VipKey, Vip>,
    egress: BTreeSet<u32>,
    /// Whether to write all of `egress` again.
    is_egress_doubtful: bool,
    quic_configs: BTreeMap<u32, QuicConfig>,
    quic_servers: BTreeMap<ServerIdKey, u32>,
    pub(super) space: SlotSpace,
    /// Number of grace periods so far.
    pub(super) graces: u64,
    /// Services that were removed, with the number of grace periods then: a program may still use their views.
    pub(super) freed: BTreeMap<u32, u64>,
    /// Whether a waiting service may get a region at once: regions were granted, or tables moved.
    pub(super) is_granting: bool,
}

impl Mirror {
    /// Reads the maps. No program may still use an entry that is not live.
    pub fn read(maps: &impl Maps) -> Result<Self, DataplaneError> {
        let (service_count, slot_count, backend_count) = maps.sizes();
        let mut space = SlotSpace::new(slot_count);
        let mut services = BTreeMap::new();
        for index in 0..service_count {
            let Some(service) = maps.service(index).filter(|s| s.used != 0) else { continue };
            let bank = service.active & 1;
            let view = service.views[bank as usize];
            let table = maps.slots(view.slot_base, view.region());
            space.reserve(view.slot_base, view.region());
            let entry = ServiceEntry { view: plan_view(&view), table: Arc::new(table), room: view.region() };
            services.insert(index, LiveService { entry, base: view.slot_base, bank, switched: 0 });
        }
        let used = |i| Some((i, maps.backend(i).filter(|b| b.flags & USED != 0)?));
        let backends: BTreeMap<u32, Backend> = (0..backend_count).filter_map(used).collect();
        Ok(Self {
            services,
            costs: backends.keys().map(|&i| (i, maps.cost(i))).collect(),
            backends,
            keys: maps.keys()?.into_iter().collect(),
            vips: maps.vips()?.into_iter().collect(),
            // Cannot be listed; writing it again does no harm.
            egress: BTreeSet::new(),
            is_egress_doubtful: false,
            quic_configs: maps.quic_configs()?.into_iter().collect(),
            quic_servers: maps.quic_servers()?.into_iter().collect(),
            space,
            graces: 1,
            freed: BTreeMap::new(),
            is_granting: false,
        })
    }

    /// Indices of a plan's backends that are unused in the maps, or belong to another backend.
    pub fn reassigned_backends(&self, plan: &Plan) -> Vec<u32> {
        plan.backends.iter().filter(|(i, b)| self.is_reassigned(**i, b)).map(|(i, _)| *i).collect()
    }

    fn is_reassigned(&self, index: u32, new: &Backend) -> bool {
        let old = self.backends.get(&index);
        old.is_none_or(|old| (old.service, old.address) != (new.service, new.address))
    }

    /// Number of slots that tables own, or that programs may still read.
    pub fn used(&self) -> u32 {
        let owned: u32 = self.services.values().map(|live| live.entry.room).sum();
        owned + self.space.left()
    }

    /// Whether services that wait for a region may get one at the next attempt.
    pub fn has_more(&self) -> bool {
        self.space.left() > 0 || self.is_granting
    }

    /// Whether the live slots of a service are those of its memory.
    pub fn matches_memory(&self, index: u32, memory: &ServiceMemory) -> bool {
        let live = self.services.get(&index).map(|live| Hashing::of(&live.entry.view));
        memory.epochs.last().is_some_and(|e| live == Some(Hashing::from(&*e.shape)))
    }

    /// Backends whose load is their number of flows, always or while no replica reports.
    pub fn counted(&self) -> impl Iterator<Item = (&u32, &Cost)> {
        self.costs.iter().filter(|(_, cost)| matches!(cost.source, source::FLOWS | source::CAPACITY_OR_FLOWS))
    }

    /// Contents of the maps, as a plan.
    pub fn plan(&self) -> Plan {
        Plan {
            services: self.services.iter().map(|(i, live)| (*i, live.entry.clone())).collect(),
            index: self.keys.clone(),
            vips: self.vips.clone(),
            backends: self.backends.clone(),
            costs: self.costs.clone(),
            egress: self.egress.clone(),
            quic_configs: self.quic_configs.clone(),
            quic_servers: self.quic_servers.clone(),
        }
    }

    /// Makes the maps match `wanted`; `rooms` names the services whose table may not go into any free region. Services
    /// without room keep their table, or get the changes that fit in place; they are returned.
    pub fn apply(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        rooms: &BTreeMap<u32, TableRoom>,
    ) -> Result<(Written, BTreeMap<u32, NoRoom>), DataplaneError> {
        let mut written = Written::default();
        match self.write(maps, wanted, rooms, &mut written) {
            Ok(shortages) => Ok((written, shortages)),
            Err(error) => {
                self.recover(maps);
                Err(error)
            }
        }
    }

    /// Reads the maps back after a failed write: the next attempt writes the missing part.
    pub(super) fn recover(&mut self, maps: &mut impl Maps) {
        // The read treats regions that were given back as free, so programs must have stopped reading them.
        maps.grace_period();
        if let Ok(read) = Self::read(maps) {
            *self = read;
        }
    }

    /// Writes all egress interfaces again at the next change. The kernel removes an interface that is deleted or moved from
    /// the map, and another one may have its index by now.
    pub fn doubt_egress(&mut self) {
        self.is_egress_doubtful = true;
    }

    /// Takes a granted region back from a service that does not use it.
    pub fn take_back(&mut self, (base, room): (u32, u32)) {
        self.space.give_back_unused(base, room);
    }

    fn write(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        rooms: &BTreeMap<u32, TableRoom>,
        written: &mut Written,
    ) -> Result<BTreeMap<u32, NoRoom>, DataplaneError> {
        let is_known = |ifindex: &u32| !self.is_egress_doubtful && self.egress.contains(ifindex);
        let missing: Vec<u32> = wanted.egress.iter().copied().filter(|i| !is_known(i)).collect();
        for ifindex in missing {
            maps.set_egress(ifindex, true)?;
            self.egress.insert(ifindex);
        }
        self.is_egress_doubtful = false;
        self.write_backends(maps, wanted, written)?;
        self.write_quic(maps, wanted, written)?;
        let mut shortages = BTreeMap::new();
        for (index, entry) in &wanted.services {
            let room = rooms.get(index).copied().unwrap_or(TableRoom::Free);
            match self.write_service(maps, wanted, (*index, entry), room, written)? {
                Some(shortage) => drop(shortages.insert(*index, shortage)),
                None => self.is_granting |= matches!(room, TableRoom::Granted(..)),
            }
        }
        self.write_keys(maps, wanted, written)?;
        self.remove(maps, wanted, written)?;
        Ok(shortages)
    }

    /// Writes new and changed backends.
    fn write_backends(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let changed: Vec<(u32, Backend)> = wanted
            .backends
            .iter()
            .filter(|(index, backend)| self.backends.get(index) != Some(backend))
            .map(|(index, backend)| (*index, *backend))
            .collect();
        for (index, _) in changed.iter().filter(|(index, new)| self.is_reassigned(*index, new)) {
            maps.clear_stats(*index)?;
            maps.clear_load(*index)?;
        }
        for (index, cost) in &wanted.costs {
            if self.costs.get(index) != Some(cost) {
                maps.set_cost(*index, *cost)?;
                self.costs.insert(*index, *cost);
            }
        }
        if !changed.is_empty() {
            maps.write_backends(&changed)?;
            written.backends += changed.len() as u32;
            self.backends.extend(changed);
        }
        Ok(())
    }

    /// Writes new and changed QUIC configs and server ids, before a service is routed by them.
    fn write_quic(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        for (key, config) in &wanted.quic_configs {
            if self.quic_configs.get(key) != Some(config) {
                maps.set_quic_config(*key, Some(config))?;
                self.quic_configs.insert(*key, *config);
                written.keys += 1;
            }
        }
        for (key, backend) in &wanted.quic_servers {
            if self.quic_servers.get(key) != Some(backend) {
                maps.set_quic_server(key, Some(*backend))?;
                self.quic_servers.insert(*key, *backend);
                written.keys += 1;
            }
        }
        Ok(())
    }

    /// Writes new and changed keys and VIPs.
    fn write_keys(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let is_live = |index: u32| self.services.contains_key(&index);
        let vips: Vec<(VipKey, Vip)> =
            wanted.vips.iter().map(|(k, vip)| (*k, only_live(vip, is_live))).collect();
        for (key, vip) in &vips {
            if self.vips.get(key) != Some(vip) {
                maps.set_vip(key, Some(vip))?;
                self.vips.insert(*key, *vip);
                written.keys += 1;
            }
        }
        for (key, index) in wanted.index.iter().filter(|(_, index)| self.services.contains_key(index)) {
            if self.keys.get(key) != Some(index) {
                maps.set_key(key, Some(*index))?;
                self.keys.insert(*key, *index);
                written.keys += 1;
            }
        }
        Ok(())
    }

    /// Removes unwanted keys, VIPs, services, backends and interfaces.
    fn remove(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        for key in removed_keys(&self.keys, &wanted.index) {
            maps.set_key(&key, None)?;
            self.keys.remove(&key);
            written.keys += 1;
        }
        for key in removed_keys(&self.vips, &wanted.vips) {
            maps.set_vip(&key, None)?;
            self.vips.remove(&key);
            written.keys += 1;
        }
        for index in removed_keys(&self.services, &wanted.services) {
            maps.set_used(index, false)?;
            self.freed.insert(index, self.graces);
            if let Some(live) = self.services.remove(&index) {
                self.space.give_back(live.base, live.entry.room);
            }
            written.services += 1;
        }
        for key in removed_keys(&self.quic_configs, &wanted.quic_configs) {
            maps.set_quic_config(key, None)?;
            self.quic_configs.remove(&key);
            written.keys += 1;
        }
        for key in removed_keys(&self.quic_servers, &wanted.quic_servers) {
            maps.set_quic_server(&key, None)?;
            self.quic_servers.remove(&key);
            written.keys += 1;
        }
        let cleared: Vec<(u32, Backend)> = removed_keys(&self.backends, &wanted.backends)
            .into_iter()
            .map(|i| (i, Backend::default()))
            .collect();
        if !cleared.is_empty() {
            maps.write_backends(&cleared)?;
            written.backends += cleared.len() as u32;
            for (index, _) in &cleared {
                self.backends.remove(index);
                self.costs.remove(index);
            }
        }
        for ifindex in self.egress.clone().difference(&wanted.egress) {
            maps.set_egress(*ifindex, false)?;
            self.egress.remove(ifindex);
        }
        Ok(())
    }
}

/// The VIP without references to services that are not live.
fn only_live(vip: &Vip, is_live: impl Fn(u32) -> bool) -> Vip {
    let mut live = *vip;
    for index in [&mut live.any_tcp, &mut live.any_udp] {
        if *index != NO_SERVICE && !is_live(*index) {
            *index = NO_SERVICE;
        }
    }
    let used = (vip.range_count as usize).min(vip.ranges.len());
    if vip.ranges[..used].iter().all(|range| is_live(range.service)) {
        return live;
    }
    live.ranges = Vip::EMPTY.ranges;
    let ranges = vip.ranges[..used].iter().filter(|range| is_live(range.service));
    live.range_count = ranges.clone().count() as u32;
    live.ranges.iter_mut().zip(ranges).for_each(|(place, range)| *place = *range);
    live
}

/// Extracts the part of a view that a plan holds.
fn plan_view(view: &ServiceView) -> View {
    View {
        seed: view.seed,
        flags: view.flags,
        scheduler: view.scheduler,
        protocol: view.protocol,
        udp_timeout_s: view.udp_timeout_s,
        tcp_timeout_s: view.tcp_timeout_s,
        slot_count: view.slot_count,
        list_count: view.list_count,
        old_count: view.old_count,
        old_seed: view.old_seed,
        load_cap: view.load_cap,
        record_factor: view.record_factor,
        limits: RateLimits {
            flags: view.flags & (flags::LIMIT_FLOWS | flags::LIMIT_SOURCES),
            flow_ns: (view.flow_interval_ns, view.flow_tolerance_ns),
            source_ns: (view.source_interval_ns, view.source_tolerance_ns),
            source_bits: view.source_bits,
        },
    }
}

/// Builds the complete view of a service whose region is at `base`.
pub(super) fn service_view(view: &View, base: u32) -> ServiceView {
    ServiceView {
        seed: view.seed,
        slot_base: base,
        slot_count: view.slot_count,
        list_count: view.list_count,
        old_count: view.old_count,
        old_seed: view.old_seed,
        load_cap: view.load_cap,
        record_factor: view.record_factor,
        flags: view.flags,
        scheduler: view.scheduler,
        protocol: view.protocol,
        udp_timeout_s: view.udp_timeout_s,
        tcp_timeout_s: view.tcp_timeout_s,
        flow_interval_ns: view.limits.flow_ns.0,
        flow_tolerance_ns: view.limits.flow_ns.1,
        source_interval_ns: view.limits.source_ns.0,
        source_tolerance_ns: view.limits.source_ns.1,
        source_bits: view.limits.source_bits,
        ..ServiceView::default()
    }
}

/// Keys of `have` that `want` shortages.
fn removed_keys<K: Ord + Copy, A, B>(have: &BTreeMap<K, A>, want: &BTreeMap<K, B>) -> Vec<K> {
    have.keys().filter(|key| !want.contains_key(key)).copied().collect()
}
