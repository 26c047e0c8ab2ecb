//! Compiles desired state and observations into the contents of all maps.
//!
//! Input: [`Desired`], [`Observed`], the [`Memory`] of earlier compilations, [`DeploymentSettings`]. Output: a
//! [`Plan`] (the contents of all maps), the new memory, and a status of each service. Pure:
//! the clock is `Observed::now`. Called by `reconcile`, which writes the differences to the live maps.
//!
//! Guarantee: a flow without an entry in a flow table stays with its backend as long as that backend exists.
//! [`table`] describes how.

mod error;
mod features;
pub mod guard;
mod hold;
mod map_values;
mod memory;
mod pairs;
mod quic;
mod reach;
mod replay_history;
mod residency;
mod room;
mod service;
mod slot_layout;
mod slow;
mod spread;
mod status;
mod table;

pub use error::CompileError;
pub use features::features_needed;
pub use map_values::{from_address, to_address};
pub use memory::{BackendMemory, Epoch, Memory, Quiet, Retired, ServiceMemory, Shape, ShapeMember};
pub use replay_history::Past;
pub use room::{RegionNeed, WaitingForRoom, admit, max_slots, region_needs};
pub use status::{CompiledBackend, CompiledService};
pub use table::Hashing;

use crate::desired::model::{Desired, Locality, Name, Observed, Ports, Protocol};
use ipnet::{Ipv4Net, Ipv6Net};
use lb_common::{
    Backend, ServiceKey, Slot, Vip, VipKey, limits,
    quic::{QuicConfig, ServerIdKey},
    settings::features::GUARD,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

/// Settings of the deployment, fixed at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeploymentSettings {
    /// Outer IPv4 source of ipip packets; its host bits vary by flow. None uses the route's source.
    pub ipip_source_v4: Option<Ipv4Net>,
    /// Outer IPv6 source of ipip packets; its host bits vary by flow. None uses the route's source.
    pub ipip_source_v6: Option<Ipv6Net>,
    /// Source addresses of translated IPv4 packets. None uses the route's source.
    pub nat_source_v4: Option<Ipv4Net>,
    /// Source addresses of translated IPv6 packets. None uses the route's source.
    pub nat_source_v6: Option<Ipv6Net>,
    /// Interfaces that the program is attached to: answers to translated packets must arrive on one of them.
    pub attached: BTreeMap<u32, String>,
    /// Sizes of the maps.
    pub limits: TableLimits,
    /// Bits of [`lb_common::settings::features`] that the program was loaded without.
    pub features_off: u32,
    /// Region and zone of this host.
    pub here: Locality,
}

/// Sizes of the maps, fixed when they are created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableLimits {
    /// Number of services.
    pub services: u32,
    /// Backends of all services, including draining ones.
    pub backends: u32,
    /// Slots of all tables, including one being written.
    pub slots: u32,
    /// Tracked TCP flows.
    pub flows: u32,
    /// Recent SYN choices.
    pub syns: u32,
    /// Tracked UDP flows.
    pub udp_flows: u32,
    /// VIP addresses.
    pub vips: u32,
    /// Entries of the deny and allow lists together.
    pub guard_entries: u32,
}

impl Default for TableLimits {
    fn default() -> Self {
        Self {
            services: limits::SERVICES,
            backends: limits::BACKENDS,
            slots: limits::SLOTS,
            flows: limits::FLOWS,
            syns: limits::SYNS,
            udp_flows: limits::UDP_FLOWS,
            vips: limits::VIPS,
            guard_entries: limits::GUARD_ENTRIES,
        }
    }
}

/// Identity of a service in the dataplane: what packets match. Its name may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceId {
    /// VIP.
    pub vip: IpAddr,
    /// Ports.
    pub port: Ports,
    /// Protocol.
    pub protocol: Protocol,
}

impl ServiceId {
    /// Identity of a desired service.
    pub fn of(service: &crate::desired::model::Service) -> Self {
        Self { vip: service.vip, port: service.port, protocol: service.protocol }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} port {}", self.vip, self.protocol, self.port)
    }
}

/// A service's view, without the fields that depend on the position of its table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Key of the flow hash.
    pub seed: [u64; 2],
    /// Bits of [`lb_common::service::flags`].
    pub flags: u32,
    /// One of [`lb_common::service::scheduler`].
    pub scheduler: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Idle time of UDP flows, in seconds.
    pub udp_timeout_s: u32,
    /// Idle time of tracked TCP flows, in seconds.
    pub tcp_timeout_s: u32,
    /// Slots of the table; 0 if the service has no backends.
    pub slot_count: u32,
    /// Entries of the scheduler's list behind the table.
    pub list_count: u32,
    /// Slots of the old table behind the list.
    pub old_count: u32,
    /// Key of the old table's flow hash.
    pub old_seed: [u64; 2],
    /// See [`lb_common::ServiceView::load_cap`].
    pub load_cap: u32,
    /// See [`lb_common::ServiceView::record_factor`].
    pub record_factor: u32,
    /// Limits of new flows.
    pub limits: crate::desired::model::RateLimits,
}

/// A service entry with its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// View without positions.
    pub view: View,
    /// Table, followed by second choices, list and old table.
    pub table: Arc<Vec<Slot>>,
    /// Slots that the service owns: the table's, and spare ones for a longer list.
    pub room: u32,
}

impl ServiceEntry {
    /// Slots of the table alone.
    pub fn slots(&self) -> &[Slot] {
        &self.table[..(self.view.slot_count as usize).min(self.table.len())]
    }

    /// The table with the second choices behind it, and its hashing; None without second choices.
    pub fn pairs(&self) -> Option<(Hashing, Arc<Vec<Slot>>)> {
        let has_seconds = self.view.flags & lb_common::service::flags::SECONDS != 0;
        has_seconds.then(|| (Hashing::of(&self.view), self.table.clone()))
    }

    /// Whether a flow without an entry may belong to another backend than its slot's primary.
    pub fn in_transition(&self) -> bool {
        self.view.old_count > 0 || self.slots().iter().any(|s| s.is_transition())
    }
}

/// How a backend's load is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Cost of a flow, see [`lb_common::Load::cost`].
    pub flow: u32,
    /// One of [`lb_common::load::source`].
    pub source: u32,
}

/// Contents of all maps that the control plane writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// `SERVICES` and `SLOTS`, by service index.
    pub services: BTreeMap<u32, ServiceEntry>,
    /// `SERVICE_INDEX`.
    pub index: BTreeMap<ServiceKey, u32>,
    /// `VIPS`.
    pub vips: BTreeMap<VipKey, Vip>,
    /// `BACKENDS`, by index.
    pub backends: BTreeMap<u32, Backend>,
    /// Compiled part of `LOADS`, by backend index.
    pub costs: BTreeMap<u32, Cost>,
    /// `EGRESS`: interfaces.
    pub egress: BTreeSet<u32>,
    /// `QUIC_CONFIGS`.
    pub quic_configs: BTreeMap<u32, QuicConfig>,
    /// `QUIC_SERVERS`.
    pub quic_servers: BTreeMap<ServerIdKey, u32>,
}

/// Result of [`compile`].
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Contents of the maps.
    pub plan: Plan,
    /// New memory, to be kept once the plan has been applied.
    pub memory: Memory,
    /// Status of the services, in name order.
    pub status: Vec<Arc<CompiledService>>,
    /// Next time in ms since boot at which the plan changes without a new input.
    pub next_change_ms: Option<i64>,
    /// Services that cannot be compiled as desired, and why. They keep their current table, or are compiled without
    /// what does not fit.
    pub failed: BTreeMap<Name, CompileError>,
    /// Services that are not in the plan, because they wait or failed: their map entries must stay.
    pub unchanged: Vec<ServiceId>,
}

/// Results that are reused while a service's input stays the same.
#[derive(Default)]
pub struct Cache {
    services: HashMap<ServiceId, service::Cached>,
}

/// Compiles all services, or returns the first error; no service waits for room.
///
/// # Errors
/// As [`admit`].
pub fn compile(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    settings: &DeploymentSettings,
    cache: &mut Cache,
) -> Result<Compiled, CompileError> {
    admit(desired, &Desired::default(), memory, settings)?;
    let mut compiled = compile_each(desired, observed, memory, settings, cache, &WaitingForRoom::default());
    match compiled.failed.pop_first() {
        None => Ok(compiled),
        Some((_, error)) => Err(error),
    }
}

/// Compiles each service separately. Services that fail or wait are left out of the plan, and reported.
pub fn compile_each(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    settings: &DeploymentSettings,
    cache: &mut Cache,
    waiting: &WaitingForRoom,
) -> Compiled {
    let now_ms = observed.now.as_millis() as i64;
    let mut memory = memory.clone();
    let ids: BTreeSet<ServiceId> = desired.services.values().map(|s| ServiceId::of(s)).collect();
    memory.retire_missing(&ids, now_ms);
    cache.services.retain(|id, _| ids.contains(id));
    let mut free = memory.free_indices(&settings.limits);
    let mut vips: BTreeSet<IpAddr> = memory.services.keys().map(|id| id.vip).collect();

    let mut all = Compiled::default();
    let mut backends = Vec::new();
    let mut health = observed.health.iter().peekable();
    let mut replicas = observed.replicas.iter().peekable();
    for (name, wanted) in &desired.services {
        let id = ServiceId::of(wanted);
        let input = service::Input {
            name,
            id,
            wanted,
            verdicts: service::observations(
                name,
                wanted,
                &mut health,
                &mut replicas,
                &observed.paths.unreachable,
            ),
            steer: spread::region_shares(wanted, &settings.here, observed.steers.get(name)),
            excluded: residency::excluded_backends(wanted, &settings.here, &desired.regions),
            next_hops: &observed.paths.next_hops,
            links: &observed.paths.links,
            now_ms,
            settings,
            held: waiting.changing.get(&id).copied(),
        };
        let cached = cache.services.entry(id).or_default();
        let compiled = match check_maps(&input, &all.plan, &mut vips) {
            Ok(()) if waiting.new.contains(&id) => Ok(None),
            Ok(()) => service::compile(&input, memory.services.get(&id), &mut free, cached).map(Some),
            Err(error) => Err(error),
        };
        let compiled = match compiled {
            Ok(Some(compiled)) => compiled,
            Ok(None) => {
                all.keep_unchanged(id, cached);
                continue;
            }
            Err(error) => {
                all.failed.insert(name.clone(), error);
                all.keep_unchanged(id, cached);
                continue;
            }
        };
        if let Some(error) = &compiled.missing_indices {
            all.failed.insert(name.clone(), error.clone());
        }
        memory.services.insert(id, compiled.memory.clone());
        backends.extend(compiled.backends.iter().copied());
        quic::add_configs(wanted, &compiled.memory, &mut all.plan);
        all.add_service(&id, &compiled);
    }
    all.plan.allow_links(observed);
    backends.sort_unstable_by_key(|&(index, _)| index);
    all.plan.backends = backends.into_iter().collect();
    all.memory = memory;
    all
}

impl Compiled {
    /// Adds a compiled service, without its backends.
    fn add_service(&mut self, id: &ServiceId, compiled: &service::ServiceOutput) {
        let plan = &mut self.plan;
        plan.costs.extend(compiled.costs.iter().copied());
        plan.egress.extend(compiled.egress.iter().copied());
        plan.services.insert(compiled.index, compiled.entry.clone());
        map_values::add_service(id, compiled.index, plan);
        self.next_change_ms = [self.next_change_ms, compiled.next_change_ms].into_iter().flatten().min();
        self.status.push(compiled.status.clone());
    }

    /// Keeps a service's map entries and its last status.
    fn keep_unchanged(&mut self, id: ServiceId, cached: &service::Cached) {
        self.unchanged.push(id);
        self.status.extend(cached.status().cloned());
    }
}

impl Plan {
    /// Allows all interfaces as egress, since the kernel's FIB may choose any of them until a next hop is known; at
    /// most as many as the map holds.
    fn allow_links(&mut self, observed: &Observed) {
        let limit = limits::EGRESS as usize;
        while self.egress.len() > limit {
            self.egress.pop_last();
        }
        let room = limit - self.egress.len();
        let others: Vec<u32> =
            observed.paths.links.keys().filter(|i| !self.egress.contains(i)).take(room).copied().collect();
        self.egress.extend(others);
    }

    /// Copies a service's entries from the live maps.
    pub fn copy_service(&mut self, id: &ServiceId, index: u32, live: &Self) {
        let Some(entry) = live.services.get(&index) else { return };
        self.services.insert(index, entry.clone());
        map_values::add_service(id, index, self);
        for (&backend, entry) in live.backends.iter().filter(|(_, b)| b.service == index) {
            self.backends.insert(backend, *entry);
            self.costs.extend(live.costs.get(&backend).map(|cost| (backend, *cost)));
            self.egress.extend(Some(entry.ifindex).filter(|i| live.egress.contains(i)));
        }
        let is_own = |key: u32| (0..8).any(|config| key == lb_common::quic::config_key(index, config));
        self.quic_configs.extend(live.quic_configs.iter().filter(|(key, _)| is_own(**key)));
        self.quic_servers.extend(live.quic_servers.iter().filter(|(key, _)| key.service == index));
    }
}

/// Checks that the shared maps have room for a service, besides the services before it and the VIPs in use.
fn check_maps(
    input: &service::Input<'_>,
    plan: &Plan,
    vips: &mut BTreeSet<IpAddr>,
) -> Result<(), CompileError> {
    let limit = input.settings.limits.vips as usize;
    if vips.len() >= limit && !vips.contains(&input.id.vip) {
        return Err(CompileError::TooMany {
            what: "VIPs",
            needed: vips.len() as u64 + 1,
            limit: limit as u64,
            first: input.id.vip.to_string(),
            option: "--max-services",
        });
    }
    vips.insert(input.id.vip);
    let configs = plan.quic_configs.len() + input.wanted.quic.len();
    if !input.wanted.quic.is_empty() && configs > limits::QUIC_CONFIGS as usize {
        return Err(room::too_many_quic(configs as u64, input.name));
    }
    Ok(())
}

/// Checks that the deny and allow lists fit.
///
/// # Errors
/// The lists do not fit, or the program was loaded without them.
pub fn check_guard(desired: &Desired, settings: &DeploymentSettings) -> Result<(), CompileError> {
    if desired.guard.is_empty() {
        return Ok(());
    }
    if settings.features_off & GUARD != 0 {
        return Err(CompileError::GuardOff);
    }
    let (needed, limit) = (desired.guard.len(), settings.limits.guard_entries as usize);
    if needed <= limit {
        return Ok(());
    }
    let all = desired.guard.deny.iter().chain(desired.guard.allow.iter());
    Err(CompileError::TooMany {
        what: "entries of the deny and allow lists",
        needed: needed as u64,
        limit: limit as u64,
        first: all.skip(limit).map(|(net, _)| net.to_string()).next().unwrap_or_default(),
        option: "--max-guard-entries",
    })
}
