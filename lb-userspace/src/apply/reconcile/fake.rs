//! Maps in memory that check, at each write, what a packet could meet at that moment. For tests, and for those of other
//! crates with the feature `test-support`.

use super::Maps;
use crate::{apply::dataplane::DataplaneError, plan::compile::Cost};
use lb_common::{
    Backend, BackendStats, Service, ServiceKey, ServiceView, Slot, Vip, VipKey,
    backend::flags::USED,
    quic::{QuicConfig, ServerIdKey},
    service::NO_SERVICE,
    slot::NO_BACKEND,
};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Maps in memory.
#[derive(Default)]
pub struct FakeMaps {
    /// Entries of services, by index.
    pub services: Vec<Service>,
    /// All slots.
    pub slots: Vec<Slot>,
    /// Entries of backends, by index.
    pub backends: Vec<Backend>,
    /// Exact ports.
    pub keys: BTreeMap<ServiceKey, u32>,
    /// VIPs.
    pub vips: BTreeMap<VipKey, Vip>,
    /// Allowed egress interfaces.
    pub egress: BTreeSet<u32>,
    /// Formats of QUIC connection ids.
    pub quic_configs: BTreeMap<u32, QuicConfig>,
    /// QUIC server ids.
    pub quic_servers: BTreeMap<ServerIdKey, u32>,
    /// Counters of backends.
    pub stats: BTreeMap<u32, BackendStats>,
    /// How loads are counted.
    pub costs: BTreeMap<u32, Cost>,
    /// Live flows that were reported.
    pub flows: BTreeMap<u32, u64>,
    /// Number of writes.
    pub writes: u32,
    /// Writes until one fails.
    pub fails_after: Cell<Option<u32>>,
    /// Number of grace periods waited for.
    pub graces: u32,
    /// Slots that programs may still read although no live view refers to them.
    pub stale: Vec<(u32, u32)>,
    /// Views, by service and bank, that programs may still use although they are not live.
    pub stale_views: BTreeSet<(u32, u32)>,
    /// Skips the checks after each write: for tests with many slots.
    pub is_large: bool,
}

/// Maps that a test can inspect while a reconciler owns them.
#[derive(Clone)]
pub struct SharedMaps(pub Arc<Mutex<FakeMaps>>);

impl SharedMaps {
    /// Wraps maps.
    pub fn new(maps: FakeMaps) -> Self {
        Self(Arc::new(Mutex::new(maps)))
    }

    /// The maps. A failed check leaves them as they are, for the test's report.
    pub fn lock(&self) -> MutexGuard<'_, FakeMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether two regions, of a base and a length, share a slot. An empty one shares none, wherever it lies.
fn overlap((a, n): (u32, u32), (b, m): (u32, u32)) -> bool {
    n > 0 && m > 0 && a < b + m && b < a + n
}

impl FakeMaps {
    /// Creates maps with this many entries.
    pub fn new(services: u32, slots: u32, backends: u32) -> Self {
        Self {
            services: vec![Service::default(); services as usize],
            slots: vec![Slot { primary: 7, secondary: 7 }; slots as usize],
            backends: vec![Backend::default(); backends as usize],
            ..Self::default()
        }
    }

    /// The view of a service that packets use.
    pub fn live_view(&self, index: u32) -> &ServiceView {
        let service = &self.services[index as usize];
        &service.views[(service.active & 1) as usize]
    }

    fn write(&mut self) -> Result<(), DataplaneError> {
        self.writes += 1;
        if let Some(left) = self.fails_after.get() {
            self.fails_after.set(left.checked_sub(1));
            if left == 0 {
                return Err(DataplaneError::Index { map: "FAKE", index: 0 });
            }
        }
        Ok(())
    }

    /// Region of the live view of a service.
    fn region(&self, index: u32) -> Option<(u32, u32)> {
        let is_used = self.services[index as usize].used == 1;
        is_used.then(|| (self.live_view(index).slot_base, self.live_view(index).region()))
    }

    /// Regions of all live views. Those of services that never had a backend are empty.
    fn live_regions(&self) -> Vec<(u32, u32)> {
        (0..self.services.len() as u32).filter_map(|index| self.region(index)).collect()
    }

    /// Records the part of a region that is no longer live, and may still be read.
    fn leave(&mut self, old: Option<(u32, u32)>, new: Option<(u32, u32)>) {
        let Some((base, count)) = old else { return };
        let kept = new.filter(|(b, _)| *b == base).map_or(0, |(_, n)| n.min(count));
        self.stale.push((base + kept, count - kept));
    }

    fn assert_unread(&self, base: u32, count: u32) {
        let is_stale = self.stale.iter().any(|stale| overlap(*stale, (base, count)));
        assert!(!is_stale, "slots {base} to {} may still be read", base + count);
    }

    fn check(&self) {
        if !self.is_large {
            self.check_all();
        }
    }

    /// Checks the invariants that packets rely on.
    ///
    /// # Panics
    /// One of them does not hold.
    pub fn check_all(&self) {
        for (key, index) in &self.keys {
            assert_eq!(self.services[*index as usize].used, 1, "{key:?} leads to a free service");
        }
        for (key, backend) in &self.quic_servers {
            let entry = &self.backends[*backend as usize];
            assert!(entry.flags & USED != 0, "{key:?} leads to a free backend");
            assert_eq!(entry.service, key.service, "{key:?} leads to another service's backend");
        }
        for vip in self.vips.values() {
            let ranges = vip.ranges[..vip.range_count as usize].iter().map(|r| r.service);
            for index in ranges.chain([vip.any_tcp, vip.any_udp]).filter(|i| *i != NO_SERVICE) {
                assert_eq!(self.services[index as usize].used, 1, "a VIP leads to a free service");
            }
        }
        let mut regions: Vec<(u32, u32)> = Vec::new();
        for (index, _) in self.services.iter().enumerate().filter(|(_, s)| s.used == 1) {
            let view = self.live_view(index as u32);
            let (base, count) = (view.slot_base, view.region());
            assert!(!regions.iter().any(|other| overlap(*other, (base, count))), "tables overlap");
            regions.push((base, count));
            for slot in &self.slots[base as usize..(base + count) as usize] {
                for backend in [slot.primary_index(), slot.secondary_index()] {
                    if backend != NO_BACKEND {
                        let entry = &self.backends[backend as usize];
                        assert!(entry.flags & USED != 0, "service {index} leads to a free backend {backend}");
                        assert_eq!(entry.service, index as u32, "service {index} leads to another's backend");
                    }
                }
            }
        }
    }
}

impl Maps for SharedMaps {
    fn sizes(&self) -> (u32, u32, u32) {
        let m = self.lock();
        (m.services.len() as u32, m.slots.len() as u32, m.backends.len() as u32)
    }
    fn keys(&self) -> Result<Vec<(ServiceKey, u32)>, DataplaneError> {
        Ok(self.lock().keys.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn vips(&self) -> Result<Vec<(VipKey, Vip)>, DataplaneError> {
        Ok(self.lock().vips.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn service(&self, index: u32) -> Option<Service> {
        self.lock().services.get(index as usize).copied()
    }
    fn slots(&self, base: u32, count: u32) -> Vec<Slot> {
        self.lock().slots[base as usize..(base + count) as usize].to_vec()
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        self.lock().backends.get(index as usize).copied()
    }
    fn backend_stats(&self, index: u32) -> BackendStats {
        self.lock().stats.get(&index).copied().unwrap_or_default()
    }
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        let written = (base, slots.len() as u32);
        assert!(!m.live_regions().iter().any(|live| overlap(*live, written)), "a live table is written");
        m.assert_unread(base, slots.len() as u32);
        m.slots[base as usize..base as usize + slots.len()].copy_from_slice(slots);
        Ok(())
    }
    fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        for &(place, slot) in slots {
            m.write()?;
            m.assert_unread(place, 1);
            // A packet may arrive between the two writes.
            m.slots[place as usize].secondary = slot.secondary;
            if slots.len() < 8 {
                m.check();
            }
            m.slots[place as usize].primary = slot.primary;
        }
        m.check();
        Ok(())
    }
    fn grace_period(&mut self) {
        let mut m = self.lock();
        m.graces += 1;
        m.stale.clear();
        m.stale_views.clear();
    }
    fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        assert!(!m.stale_views.contains(&(index, view & 1)), "a view that may still be read is written");
        let service = &mut m.services[index as usize];
        assert!(service.used == 0 || service.active & 1 != view & 1, "the live view is written");
        service.views[(view & 1) as usize] = *value;
        Ok(())
    }
    fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        let old = m.region(index);
        if old.is_some() {
            m.stale_views.insert((index, view & 1 ^ 1));
        }
        m.services[index as usize].active = view & 1;
        let new = m.region(index);
        m.leave(old, new);
        m.check();
        Ok(())
    }
    fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        let old = m.region(index);
        m.services[index as usize].used = used.into();
        if !used {
            m.leave(old, None);
        }
        m.check();
        Ok(())
    }
    fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        for (index, backend) in backends {
            m.backends[*index as usize] = *backend;
        }
        m.check();
        Ok(())
    }
    fn clear_stats(&mut self, index: u32) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        m.stats.remove(&index);
        Ok(())
    }
    fn cost(&self, index: u32) -> Cost {
        self.lock().costs.get(&index).copied().unwrap_or_default()
    }
    fn set_cost(&mut self, index: u32, cost: Cost) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        m.costs.insert(index, cost);
        Ok(())
    }
    fn clear_load(&mut self, index: u32) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        m.flows.remove(&index);
        m.costs.remove(&index);
        Ok(())
    }
    fn report_flows(&self, index: u32, flows: u64) {
        self.lock().flows.insert(index, flows);
    }
    fn set_key(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        match service {
            Some(index) => m.keys.insert(*key, index),
            None => m.keys.remove(key),
        };
        m.check();
        Ok(())
    }
    fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        match vip {
            Some(vip) => m.vips.insert(*key, *vip),
            None => m.vips.remove(key),
        };
        m.check();
        Ok(())
    }
    fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        if allowed {
            m.egress.insert(ifindex)
        } else {
            m.egress.remove(&ifindex)
        };
        Ok(())
    }
    fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError> {
        Ok(self.lock().quic_configs.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError> {
        Ok(self.lock().quic_servers.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        match config {
            Some(config) => m.quic_configs.insert(key, *config),
            None => m.quic_configs.remove(&key),
        };
        m.check();
        Ok(())
    }
    fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError> {
        let mut m = self.lock();
        m.write()?;
        match backend {
            Some(index) => m.quic_servers.insert(*key, index),
            None => m.quic_servers.remove(key),
        };
        m.check();
        Ok(())
    }
}
