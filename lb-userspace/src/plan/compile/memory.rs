//! State kept between compilations: the indices of services and backends, and the recent epochs of tables.
//!
//! `reconcile` keeps it in a file, so that a restart changes nothing. Indices can also be read back from the
//! live maps ([`Memory::adopt`]), which are authoritative for them.

use super::{Plan, ServiceEntry, ServiceId, TableLimits, map_values, table::Hashing};
use crate::{
    desired::model::{Desired, Ports, Protocol},
    plan::maglev,
};
use lb_common::{backend::mode, service, slot::Slot};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

/// Epochs kept per service. Under flapping the shortest ones are dropped first.
const MAX_EPOCHS: usize = 64;

/// State kept between compilations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Existing services.
    #[serde(with = "pairs")]
    pub services: BTreeMap<ServiceId, Arc<ServiceMemory>>,
    /// Indices of removed services that flow tables may still contain.
    pub retired: Vec<Retired>,
}

/// Indices of a removed service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// Index of the service in `SERVICES`.
    pub service: u32,
    /// Indices of its backends.
    pub backends: Vec<u32>,
    /// Time of the removal, in ms since boot.
    pub since_ms: i64,
}

/// State of a service. Times are in ms since boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceMemory {
    /// Index in `SERVICES`.
    pub index: u32,
    /// Backends by address, including removed ones until they are forgotten.
    pub backends: BTreeMap<IpAddr, BackendMemory>,
    /// Epochs of the table, oldest first: the epoch in effect when the drain window began, and all later ones.
    #[serde(with = "epochs")]
    pub epochs: Vec<Epoch>,
    /// Whether every backend has had a verdict.
    pub settled: bool,
    /// Whether the current scheduler places flows on other backends than their slots' primaries.
    #[serde(default)]
    pub exceptions: bool,
    /// When a slot last got an earlier backend; None if no slot has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier_ms: Option<i64>,
    /// The table in effect with the second choices behind it, and its hashing. Read back from the live table.
    #[serde(skip)]
    pub pairs: Option<(Hashing, Arc<Vec<Slot>>)>,
    /// When each slot last changed its primary (ms since boot), [`i64::MIN`] if not in the window. Derived from `epochs`.
    #[serde(skip)]
    pub changed_ms: Arc<Vec<i64>>,
    /// Slots whose flows may be in the flow table, a bit each. Read back from the live table.
    #[serde(skip)]
    pub tracked: Arc<Vec<u64>>,
}

/// State of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendMemory {
    /// Index in `BACKENDS`.
    pub index: u32,
    /// Start of its slow start, during slow start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ms: Option<i64>,
    /// Whether it could take flows but gets none, because other regions come first: it needs no slow start later.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stands_by: bool,
    /// Whether residency forbids it; after its removal it stays forbidden for its last flows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forbidden: bool,
    /// When the checks took it out, where the service limits that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_ms: Option<i64>,
    /// Time of its removal from the desired state, if removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed_ms: Option<i64>,
}

/// What a sweep of the flow table found of a service that is stable.
#[derive(Clone, Copy, Debug)]
pub enum Quiet<'a> {
    /// Nothing can be said of its slots.
    No,
    /// No flow has an entry.
    All,
    /// No flow has an entry but those of these slots, a bit each, under this hashing: seed, number of slots, and whether
    /// only the client's address is hashed.
    But(([u64; 2], u32, bool), &'a [u64]),
}

/// A period with one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// Start of the period, in ms since boot.
    pub from_ms: i64,
    /// Inputs of the table.
    pub shape: Arc<Shape>,
}

/// All inputs of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Key of the flow hash and seed of the table.
    pub seed: [u64; 2],
    /// Number of slots.
    pub size: u32,
    /// History of seats; empty if the members took their seats in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<maglev::SeatChange>,
    /// Whether flows are hashed by the client's address alone.
    #[serde(default)]
    pub by_source: bool,
    /// Members in address order.
    pub members: Vec<ShapeMember>,
}

/// A member of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(IpAddr, u32, bool, u32)", into = "(IpAddr, u32, bool, u32)")]
pub struct ShapeMember {
    /// Backend's address.
    pub address: IpAddr,
    /// Weight, above 0.
    pub weight: u32,
    /// Whether the member takes new flows.
    pub eligible: bool,
    /// Seat in the table.
    pub seat: u32,
}

impl From<(IpAddr, u32, bool, u32)> for ShapeMember {
    fn from((address, weight, eligible, seat): (IpAddr, u32, bool, u32)) -> Self {
        Self { address, weight, eligible, seat }
    }
}

impl From<ShapeMember> for (IpAddr, u32, bool, u32) {
    fn from(member: ShapeMember) -> Self {
        (member.address, member.weight, member.eligible, member.seat)
    }
}

impl Shape {
    /// Whether flows hash to the same slots in both tables.
    pub fn is_comparable(&self, other: &Self) -> bool {
        self.seed == other.seed && self.size == other.size && self.by_source == other.by_source
    }
}

impl ServiceMemory {
    /// Drops epochs without slots: no flow was placed by them, and as base they would be used to look up flows of
    /// the drain window.
    pub fn forget_empty(&mut self, shape: &Shape) {
        if shape.size != 0 {
            self.epochs.retain(|e| e.shape.size != 0);
        }
    }

    /// Starts an epoch with this shape at `now_ms`, unless it is the current one; returns whether it did.
    pub fn start_epoch(&mut self, shape: &Arc<Shape>, now_ms: i64, drain_ms: i64) -> bool {
        let is_new = self.epochs.last().is_none_or(|last| last.shape != *shape);
        if is_new {
            let known = self.epochs.iter().find(|e| e.shape == *shape).map(|e| e.shape.clone());
            self.epochs.push(Epoch { from_ms: now_ms, shape: known.unwrap_or_else(|| shape.clone()) });
            if self.epochs.len() > MAX_EPOCHS {
                // Keep the base and the newest epoch.
                let shortest = (1..self.epochs.len() - 1)
                    .min_by_key(|&i| self.epochs[i + 1].from_ms - self.epochs[i].from_ms);
                if let Some(i) = shortest {
                    self.epochs.remove(i);
                }
            }
        }
        let old = self.epochs.iter().skip(1).take_while(|e| e.from_ms <= now_ms - drain_ms).count();
        self.epochs.drain(..old);
        is_new
    }

    /// The epoch in effect when the drain window began, or the first epoch.
    pub fn base(&self) -> Option<&Epoch> {
        self.epochs.first()
    }
}

/// Unused indices, lowest first.
pub struct FreeIndices {
    services: Unused,
    backends: Unused,
}

impl FreeIndices {
    /// Takes an index for a service.
    pub fn take_service(&mut self) -> Option<u32> {
        self.services.next()
    }

    /// Takes an index for a backend.
    pub fn take_backend(&mut self) -> Option<u32> {
        self.backends.next()
    }
}

/// Unused indices of `0..limit`. The used ones are sorted only when an index is taken: most changes
/// need no new index.
struct Unused {
    used: Vec<u32>,
    is_sorted: bool,
    next: u32,
    limit: u32,
}

impl Unused {
    fn of(used: impl Iterator<Item = u32>, limit: u32) -> Self {
        Self { used: used.collect(), is_sorted: false, next: 0, limit }
    }
}

impl Iterator for Unused {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if !self.is_sorted {
            // Highest first, so that the lowest is taken from the end.
            self.used.sort_unstable_by(|a, b| b.cmp(a));
            self.is_sorted = true;
        }
        while self.next < self.limit {
            let candidate = self.next;
            self.next += 1;
            let mut is_used = false;
            while self.used.last().is_some_and(|&u| u <= candidate) {
                is_used |= self.used.pop() == Some(candidate);
            }
            if !is_used {
                return Some(candidate);
            }
        }
        None
    }
}

impl Memory {
    /// Unused indices. Computed once per compilation.
    pub fn free_indices(&self, limits: &TableLimits) -> FreeIndices {
        let retired = || self.retired.iter();
        let services = self.services.values().map(|s| s.index).chain(retired().map(|r| r.service));
        let backends = self.services.values().flat_map(|s| s.backends.values().map(|b| b.index));
        let backends = backends.chain(retired().flat_map(|r| r.backends.iter().copied()));
        FreeIndices {
            services: Unused::of(services, limits.services),
            backends: Unused::of(backends, limits.backends.min(lb_common::limits::MAX_BACKEND_INDEX)),
        }
    }

    /// Retires services that are no longer desired.
    pub fn retire_missing(&mut self, wanted: &BTreeSet<ServiceId>, now_ms: i64) {
        let gone: Vec<ServiceId> = self.services.keys().filter(|id| !wanted.contains(id)).copied().collect();
        for id in gone {
            if let Some(service) = self.services.remove(&id) {
                let backends = service.backends.values().map(|b| b.index).collect();
                self.retired.push(Retired { service: service.index, backends, since_ms: now_ms });
            }
        }
    }

    /// Forgets retired services and removed backends whose indices no flow table contains any more.
    pub fn release(&mut self, services: &BTreeSet<u32>, backends: &BTreeSet<u32>) {
        self.retired.retain(|r| !services.contains(&r.service));
        for service in self.services.values_mut() {
            let done = |b: &BackendMemory| b.removed_ms.is_some() && backends.contains(&b.index);
            if service.backends.values().any(done) {
                Arc::make_mut(service).backends.retain(|_, b| !done(b));
            }
        }
    }

    /// Removed backends whose drain time is over, by index.
    pub fn drained(&self, desired: &Desired, now_ms: i64) -> BTreeSet<u32> {
        let drain: BTreeMap<ServiceId, i64> =
            desired.services.values().map(|s| (ServiceId::of(s), i64::from(s.drain_s) * 1_000)).collect();
        self.services
            .iter()
            .flat_map(|(id, service)| {
                let drain_ms = drain.get(id).copied().unwrap_or(0);
                service
                    .backends
                    .values()
                    .filter(move |b| b.removed_ms.is_some_and(|t| t + drain_ms <= now_ms))
                    .map(|b| b.index)
            })
            .collect()
    }

    /// Clears the tracked mark of a service's slots, after a scan that began when they had become stable found none of
    /// its flows. The next compilation marks slots that are still in transition again.
    pub fn untrack(&mut self, service: u32) {
        self.untrack_all(|index| if index == service { Quiet::All } else { Quiet::No });
    }

    /// Clears the tracked mark of slots in which no flow has an entry, by service index.
    pub fn untrack_all<'a>(&mut self, quiet: impl Fn(u32) -> Quiet<'a>) {
        for memory in self.services.values_mut() {
            let left: Vec<u64> = match quiet(memory.index) {
                Quiet::No => continue,
                Quiet::All => vec![0; memory.tracked.len()],
                Quiet::But(hashing, slots) => {
                    let shape = memory.epochs.last().map(|epoch| &epoch.shape);
                    if shape.is_none_or(|s| (s.seed, s.size, s.by_source) != hashing) {
                        continue;
                    }
                    memory.tracked.iter().zip(slots).map(|(tracked, slots)| tracked & slots).collect()
                }
            };
            if left.len() == memory.tracked.len() && left != *memory.tracked {
                Arc::make_mut(memory).tracked = Arc::new(left);
            }
        }
    }

    /// Takes indices and tracked slots from the live maps, which are authoritative for them.
    /// Services that the maps do not have are dropped; those that the memory does not have are added.
    pub fn adopt(&mut self, live: &Plan, now_ms: i64) {
        let known = std::mem::take(&mut self.services);
        let live_ids = map_values::service_ids(live);
        for (&index, id) in &live_ids {
            let mut memory = known.get(id).map(|m| (**m).clone()).unwrap_or_default();
            if memory.index != index {
                memory.epochs.clear();
            }
            memory.index = index;
            let of_service = live.backends.iter().filter(|(_, b)| b.service == index);
            memory.backends = of_service
                .map(|(&backend, entry)| {
                    let address = map_values::from_address(&entry.address);
                    let before = memory.backends.get(&address);
                    let removed_ms = before.and_then(|b| b.removed_ms);
                    (
                        address,
                        BackendMemory {
                            index: backend,
                            removed_ms,
                            started_ms: None,
                            stands_by: before.is_some_and(|b| b.stands_by),
                            forbidden: entry.mode == mode::FORBIDDEN,
                            ejected_ms: None,
                        },
                    )
                })
                .collect();
            let entry = live.services.get(&index);
            memory.pairs = entry.and_then(ServiceEntry::pairs);
            let has_earlier = entry.is_some_and(|s| s.slots().iter().any(|slot| slot.has_earlier()));
            memory.earlier_ms = has_earlier.then(|| memory.earlier_ms.unwrap_or(now_ms));
            memory.tracked = Arc::new(entry.map_or_else(Vec::new, |s| tracked_bits(s.slots())));
            memory.exceptions = entry.is_some_and(|s| s.view.flags & service::flags::TRACK_ALL != 0);
            self.services.insert(*id, Arc::new(memory));
        }
        // Entries of services that packets cannot reach any more: an interrupted removal.
        let mut stray: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (&index, entry) in live.backends.iter().filter(|(_, b)| !live_ids.contains_key(&b.service)) {
            stray.entry(entry.service).or_default().push(index);
        }
        for &index in live.services.keys().filter(|i| !live_ids.contains_key(i)) {
            stray.entry(index).or_default();
        }
        let retired: BTreeSet<u32> = self.retired.iter().map(|r| r.service).collect();
        for (service, backends) in stray {
            if !retired.contains(&service) {
                self.retired.push(Retired { service, backends, since_ms: now_ms });
            }
        }
        let live_indices: BTreeSet<u32> = live_ids.keys().copied().collect();
        self.retired.retain(|r| !live_indices.contains(&r.service));
    }

    /// Takes indices from maps whose tables are unknown: any flow may be an exception.
    pub fn adopt_indices(&mut self, live: &Plan, now_ms: i64) {
        self.adopt(live, now_ms);
        for service in self.services.values_mut() {
            Arc::make_mut(service).exceptions = true;
        }
    }

    /// Shifts all times by `by_ms`, after a reboot has restarted the clock.
    pub fn shift_times(&mut self, by_ms: i64) {
        for retired in &mut self.retired {
            retired.since_ms += by_ms;
        }
        for service in self.services.values_mut().map(Arc::make_mut) {
            service.epochs.iter_mut().for_each(|e| e.from_ms += by_ms);
            service.earlier_ms = service.earlier_ms.map(|t| t + by_ms);
            service.backends.values_mut().filter_map(|b| b.removed_ms.as_mut()).for_each(|t| *t += by_ms);
            service.backends.values_mut().filter_map(|b| b.ejected_ms.as_mut()).for_each(|t| *t += by_ms);
        }
    }
}

/// Bitmap of a table's tracked slots.
fn tracked_bits(table: &[Slot]) -> Vec<u64> {
    let mut bits = vec![0u64; table.len().div_ceil(64)];
    for (i, _) in table.iter().enumerate().filter(|(_, s)| s.is_tracked()) {
        bits[i / 64] |= 1 << (i % 64);
    }
    bits
}

/// Identity of a service from fields of map entries.
pub(super) fn service_id(vip: IpAddr, port: Ports, protocol: u8) -> ServiceId {
    let protocol = if protocol == service::UDP { Protocol::Udp } else { Protocol::Tcp };
    ServiceId { vip, port, protocol }
}

/// Serialises a map whose keys are not strings as a list of pairs.
mod pairs {
    use super::{Arc, BTreeMap, ServiceId, ServiceMemory};
    use serde::{Deserialize, Deserializer, Serializer};

    type Services = BTreeMap<ServiceId, Arc<ServiceMemory>>;

    pub fn serialize<S: Serializer>(map: &Services, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(map.iter().map(|(id, service)| (id, &**service)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Services, D::Error> {
        let list = Vec::<(ServiceId, ServiceMemory)>::deserialize(from)?;
        Ok(list.into_iter().map(|(id, service)| (id, Arc::new(service))).collect())
    }
}

/// Serialises epochs with each shape written once: flapping repeats the same few shapes.
mod epochs {
    use super::{Arc, Epoch, Shape};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Serialize, Deserialize)]
    struct StoredEpochs<S> {
        shapes: Vec<S>,
        /// Start, and position in `shapes`.
        from: Vec<(i64, usize)>,
    }

    pub fn serialize<S: Serializer>(epochs: &[Epoch], to: S) -> Result<S::Ok, S::Error> {
        let mut file = StoredEpochs { shapes: Vec::<&Shape>::new(), from: Vec::new() };
        for epoch in epochs {
            let known = file.shapes.iter().position(|shape| **shape == *epoch.shape);
            let at = known.unwrap_or_else(|| {
                file.shapes.push(&epoch.shape);
                file.shapes.len() - 1
            });
            file.from.push((epoch.from_ms, at));
        }
        file.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Epoch>, D::Error> {
        let file = StoredEpochs::<Shape>::deserialize(from)?;
        let shapes: Vec<Arc<Shape>> = file.shapes.into_iter().map(Arc::new).collect();
        let epoch = |(from_ms, at): (i64, usize)| {
            let shape = shapes.get(at).ok_or_else(|| D::Error::custom("epoch without a shape"))?;
            Ok(Epoch { from_ms, shape: shape.clone() })
        };
        file.from.into_iter().map(epoch).collect()
    }
}
