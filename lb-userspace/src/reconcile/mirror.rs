//! What the maps hold, kept beside them so that a change is a difference and not a rewrite; and the
//! ordered writing of that difference.
//!
//! Adding goes backends → tables → services → keys, removing the other way round, so that a packet never
//! meets a reference to something that is not there. What was written is recorded after each write; after a
//! failure the mirror is read back from the maps.

use super::{
    maps::Maps,
    slots::{NoRoom, SlotSpace},
};
use crate::{
    compile::{Cost, Plan, ServiceEntry, View},
    dataplane::DataplaneError,
    model::Limits,
};
use lb_common::{
    Backend, ServiceKey, ServiceView, Vip, VipKey,
    backend::flags::USED,
    quic::{QuicConfig, ServerIdKey},
    service::flags,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// Least time between two switches of one service: a program that still reads the view that is written next
/// has ended. (A processor halted for longer reads a mixture; the program then finds a backend of
/// another service, or none, and drops that one packet.)
const VIEW_REST: Duration = Duration::from_millis(2);

/// What one application wrote.
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

impl Written {
    /// Whether nothing was written.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Why an application failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The tables do not fit; nothing was written.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// A map could not be written; the maps were read back and will be compared again.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
}

/// A live service.
#[derive(Clone, Debug)]
struct Live {
    entry: ServiceEntry,
    /// First slot of its table.
    base: u32,
    /// Which view is live.
    bank: u32,
    switched: Option<Duration>,
}

/// The mirror.
#[derive(Clone, Debug)]
pub struct Mirror {
    services: BTreeMap<u32, Live>,
    backends: BTreeMap<u32, Backend>,
    costs: BTreeMap<u32, Cost>,
    keys: BTreeMap<ServiceKey, u32>,
    vips: BTreeMap<VipKey, Vip>,
    egress: BTreeSet<u32>,
    quic_configs: BTreeMap<u32, QuicConfig>,
    quic_servers: BTreeMap<ServerIdKey, u32>,
    space: SlotSpace,
}

impl Mirror {
    /// Reads the maps.
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
            let entry = ServiceEntry { view: kept(&view), table: Arc::new(table) };
            services.insert(index, Live { entry, base: view.slot_base, bank, switched: None });
        }
        let used = |i| Some((i, maps.backend(i).filter(|b| b.flags & USED != 0)?));
        let backends: BTreeMap<u32, Backend> = (0..backend_count).filter_map(used).collect();
        Ok(Self {
            services,
            costs: backends.keys().map(|&i| (i, maps.cost(i))).collect(),
            backends,
            keys: maps.keys()?.into_iter().collect(),
            vips: maps.vips()?.into_iter().collect(),
            // Cannot be listed; written once more, which does no harm.
            egress: BTreeSet::new(),
            quic_configs: maps.quic_configs()?.into_iter().collect(),
            quic_servers: maps.quic_servers()?.into_iter().collect(),
            space,
        })
    }

    /// Indices of the backends that the maps hold.
    pub fn backends(&self) -> BTreeSet<u32> {
        self.backends.keys().copied().collect()
    }

    /// Backends whose load is the number of their flows.
    pub fn counted(&self) -> impl Iterator<Item = (&u32, &Cost)> {
        self.costs.iter().filter(|(_, cost)| cost.source == lb_common::load::source::FLOWS)
    }

    /// What the maps hold, as a plan.
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

    /// Makes the maps hold what is wanted.
    pub fn apply(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        clock: impl Fn() -> Duration,
    ) -> Result<Written, ApplyError> {
        let regions = self.plan_regions(wanted, clock())?;
        let mut written = Written::default();
        match self.write(maps, wanted, &regions, &clock, &mut written) {
            Ok(()) => Ok(written),
            Err(error) => {
                // What was written is in the maps; what was not will be found missing next time.
                if let Ok(read) = Self::read(maps) {
                    *self = read;
                }
                Err(error.into())
            }
        }
    }

    /// Regions for tables that change; all of them or none.
    fn plan_regions(&mut self, wanted: &Plan, now: Duration) -> Result<BTreeMap<u32, u32>, NoRoom> {
        let mut space = self.space.clone();
        let mut regions = BTreeMap::new();
        for (index, entry) in &wanted.services {
            let same = self.services.get(index).is_some_and(|live| same_table(&live.entry, entry));
            if !same && !entry.table.is_empty() {
                regions.insert(*index, space.take(entry.table.len() as u32, now)?);
            }
        }
        self.space = space;
        Ok(regions)
    }

    fn write(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        regions: &BTreeMap<u32, u32>,
        clock: &impl Fn() -> Duration,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        for ifindex in wanted.egress.difference(&self.egress.clone()) {
            maps.set_egress(*ifindex, true)?;
            self.egress.insert(*ifindex);
        }
        self.write_backends(maps, wanted, written)?;
        self.write_quic(maps, wanted, written)?;
        for (index, entry) in &wanted.services {
            self.write_service(maps, *index, entry, regions.get(index).copied(), clock, written)?;
        }
        self.write_keys(maps, wanted, written)?;
        self.remove(maps, wanted, clock(), written)
    }

    /// New and changed backends.
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
        for (index, _) in changed.iter().filter(|(index, _)| !self.backends.contains_key(index)) {
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

    /// New and changed QUIC configs and server ids, before a service is routed by them.
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

    /// Writes a service beside its live view and switches, if anything of it differs.
    fn write_service(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        entry: &ServiceEntry,
        region: Option<u32>,
        clock: &impl Fn() -> Duration,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let live = self.services.get(&index);
        let same = live.is_some_and(|live| same_table(&live.entry, entry));
        if same && live.is_some_and(|live| live.entry.view == entry.view) {
            return Ok(());
        }
        let base = region.or(live.filter(|_| same).map(|live| live.base)).unwrap_or(0);
        if region.is_some() {
            maps.write_slots(base, &entry.table)?;
            written.slots += entry.table.len() as u32;
        }
        let bank = live.map_or(0, |live| live.bank ^ 1);
        if let Some(rest) = live.and_then(|live| (live.switched? + VIEW_REST).checked_sub(clock())) {
            std::thread::sleep(rest);
        }
        maps.write_view(index, bank, &full(&entry.view, base))?;
        maps.set_active(index, bank)?;
        if live.is_none() {
            maps.set_used(index, true)?;
        }
        let now = clock();
        let new = Live { entry: entry.clone(), base, bank, switched: Some(now) };
        if let Some(old) = self.services.insert(index, new)
            && !same
        {
            self.space.give_back(old.base, old.entry.table.len() as u32, now);
        }
        written.services += 1;
        Ok(())
    }

    /// New and changed keys and VIPs.
    fn write_keys(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        for (key, vip) in &wanted.vips {
            if self.vips.get(key) != Some(vip) {
                maps.set_vip(key, Some(vip))?;
                self.vips.insert(*key, *vip);
                written.keys += 1;
            }
        }
        for (key, index) in &wanted.index {
            if self.keys.get(key) != Some(index) {
                maps.set_key(key, Some(*index))?;
                self.keys.insert(*key, *index);
                written.keys += 1;
            }
        }
        Ok(())
    }

    /// What is no longer wanted: keys, VIPs, services, backends, interfaces.
    fn remove(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        now: Duration,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        for key in gone(&self.keys, &wanted.index) {
            maps.set_key(&key, None)?;
            self.keys.remove(&key);
            written.keys += 1;
        }
        for key in gone(&self.vips, &wanted.vips) {
            maps.set_vip(&key, None)?;
            self.vips.remove(&key);
            written.keys += 1;
        }
        for index in gone(&self.services, &wanted.services) {
            maps.set_used(index, false)?;
            if let Some(live) = self.services.remove(&index) {
                self.space.give_back(live.base, live.entry.table.len() as u32, now);
            }
            written.services += 1;
        }
        for key in gone(&self.quic_configs, &wanted.quic_configs) {
            maps.set_quic_config(key, None)?;
            self.quic_configs.remove(&key);
            written.keys += 1;
        }
        for key in gone(&self.quic_servers, &wanted.quic_servers) {
            maps.set_quic_server(&key, None)?;
            self.quic_servers.remove(&key);
            written.keys += 1;
        }
        let cleared: Vec<(u32, Backend)> =
            gone(&self.backends, &wanted.backends).into_iter().map(|i| (i, Backend::default())).collect();
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

/// Whether two services have the same table; an unchanged one is the same allocation.
fn same_table(a: &ServiceEntry, b: &ServiceEntry) -> bool {
    Arc::ptr_eq(&a.table, &b.table) || a.table == b.table
}

/// What a plan keeps of a view.
fn kept(view: &ServiceView) -> View {
    View {
        seed: view.seed,
        flags: view.flags,
        scheduler: view.scheduler,
        protocol: view.protocol,
        udp_timeout_s: view.udp_timeout_s,
        slot_count: view.slot_count,
        list_count: view.list_count,
        old_count: view.old_count,
        old_seed: view.old_seed,
        load_cap: view.load_cap,
        limits: Limits {
            flags: view.flags & (flags::LIMIT_FLOWS | flags::LIMIT_SOURCES),
            flow_ns: (view.flow_interval_ns, view.flow_tolerance_ns),
            source_ns: (view.source_interval_ns, view.source_tolerance_ns),
            source_bits: view.source_bits,
        },
    }
}

/// The view of a region at `base`.
fn full(view: &View, base: u32) -> ServiceView {
    ServiceView {
        seed: view.seed,
        slot_base: base,
        slot_count: view.slot_count,
        list_count: view.list_count,
        old_count: view.old_count,
        old_seed: view.old_seed,
        load_cap: view.load_cap,
        flags: view.flags,
        scheduler: view.scheduler,
        protocol: view.protocol,
        udp_timeout_s: view.udp_timeout_s,
        flow_interval_ns: view.limits.flow_ns.0,
        flow_tolerance_ns: view.limits.flow_ns.1,
        source_interval_ns: view.limits.source_ns.0,
        source_tolerance_ns: view.limits.source_ns.1,
        source_bits: view.limits.source_bits,
        ..ServiceView::default()
    }
}

/// Keys of `have` that `want` lacks.
fn gone<K: Ord + Copy, A, B>(have: &BTreeMap<K, A>, want: &BTreeMap<K, B>) -> Vec<K> {
    have.keys().filter(|key| !want.contains_key(key)).copied().collect()
}
