//! From desired state and observations to the contents of all maps.
//!
//! Input: [`Desired`], [`Observed`], the [`Memory`] of earlier compilations, [`Settings`]. Output: a
//! [`Plan`] (every map's contents), the new memory, and a status of each service for people. Pure:
//! the clock is `Observed::now`. Called by `reconcile`, which writes what differs from the live maps.
//!
//! What a packet already on its way may rely on: a flow that is in no flow table stays with its backend
//! as long as that backend is there. [`service`] says how.

mod behind;
mod entries;
pub mod guard;
mod memory;
mod quic;
mod recall;
mod service;
mod slow;
mod spread;
mod table;

pub use memory::{BackendMemory, Epoch, Memory, Retired, ServiceMemory, Shape, ShapeMember};
pub use recall::Past;
pub use service::needs;

use crate::model::{BackendState, Desired, Health, Here, Name, Observed, Ports, Protocol, Readiness, Share};
use ipnet::{Ipv4Net, Ipv6Net};
use lb_common::{
    Backend, ServiceKey, Slot, Vip, VipKey, limits,
    quic::{QuicConfig, ServerIdKey},
    settings::features,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

/// What a deployment settles once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Outer IPv4 source of ipip packets; its host bits vary by flow. The route's own source if none.
    pub ipip_source_v4: Option<Ipv4Net>,
    /// The same for IPv6.
    pub ipip_source_v6: Option<Ipv6Net>,
    /// Source addresses of translated IPv4 packets. The route's own source if none.
    pub nat_source_v4: Option<Ipv4Net>,
    /// The same for IPv6.
    pub nat_source_v6: Option<Ipv6Net>,
    /// Interfaces that the program is attached to: answers to translated packets must come in by one of them.
    pub attached: BTreeMap<u32, String>,
    /// Sizes of the maps.
    pub limits: Limits,
    /// Bits of [`lb_common::settings::features`] that the program was loaded without.
    pub features_off: u32,
    /// Where this host is.
    pub here: Here,
}

/// Sizes of the maps, set when they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Services.
    pub services: u32,
    /// Backends over all services, those that still drain included.
    pub backends: u32,
    /// Slots of all tables, and of the one being written.
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

impl Default for Limits {
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

/// A service as packets know it. Its name may change; this is its identity in the dataplane.
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
    pub fn of(service: &crate::model::Service) -> Self {
        Self { vip: service.vip, port: service.port, protocol: service.protocol }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} port {}", self.vip, self.protocol, self.port)
    }
}

/// A service's view without what only the place of its table decides.
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
    /// Slots of the table; 0 if the service has no backend at all.
    pub slot_count: u32,
    /// Entries of the list behind it.
    pub list_count: u32,
    /// Slots of the old table behind that.
    pub old_count: u32,
    /// Key of the old table's flow hash.
    pub old_seed: [u64; 2],
    /// See [`lb_common::ServiceView::load_cap`].
    pub load_cap: u32,
    /// Limits of new flows.
    pub limits: crate::model::Limits,
}

/// A service entry with its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// View.
    pub view: View,
    /// Table, and what stands behind it.
    pub table: Arc<Vec<Slot>>,
}

impl ServiceEntry {
    /// The table alone.
    pub fn slots(&self) -> &[Slot] {
        &self.table[..(self.view.slot_count as usize).min(self.table.len())]
    }

    /// Whether some flow that no flow table names may belong elsewhere than to its slot's primary.
    pub fn in_transition(&self) -> bool {
        self.view.old_count > 0 || self.slots().iter().any(|s| s.is_transition())
    }
}

/// How a backend's load is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Of a flow, see [`lb_common::Load::cost`].
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
    /// What of `LOADS` is compiled, by backend index.
    pub costs: BTreeMap<u32, Cost>,
    /// `EGRESS`: interfaces.
    pub egress: BTreeSet<u32>,
    /// `QUIC_CONFIGS`.
    pub quic_configs: BTreeMap<u32, QuicConfig>,
    /// `QUIC_SERVERS`.
    pub quic_servers: BTreeMap<ServerIdKey, u32>,
}

/// Why a state cannot be compiled. Nothing has been written when this is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// More of something than a map holds.
    #[error(
        "{what} do not fit: {needed} needed, {limit} possible, first without room: {first}; \
         remove some, or start lbd with a larger {option}"
    )]
    TooMany {
        /// Things counted.
        what: &'static str,
        /// How many are needed.
        needed: u64,
        /// How many fit.
        limit: u64,
        /// The first that has no room.
        first: String,
        /// Option that raises the limit.
        option: &'static str,
    },
    /// A service needs what the program was loaded without.
    #[error(
        "service {service}: {what} needs feature {feature}, which lbd was started without: add it to features"
    )]
    FeatureOff {
        /// Service.
        service: Name,
        /// Setting that needs it.
        what: String,
        /// Feature's name in settings.
        feature: &'static str,
    },
    /// There are deny or allow lists, which the program was loaded without.
    #[error("deny and allow lists need feature guard, which lbd was started without: add it to features")]
    GuardOff,
    /// Tables do not fit.
    #[error(
        "Maglev tables do not fit: {needed} slots needed (with {spare} to write a changed table beside the \
         live one), {limit} possible; the largest is that of service {largest} with {largest_slots} slots: \
         give it a smaller table_size, or start lbd with --max-slots {needed}"
    )]
    TooManySlots {
        /// Slots needed, spare ones included.
        needed: u64,
        /// Slots of the largest table, kept free for a change.
        spare: u64,
        /// Slots that exist.
        limit: u64,
        /// Service with the largest table.
        largest: Name,
        /// Its size.
        largest_slots: u32,
    },
}

/// What people want to know about a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Name; of a removed backend that still has flows, none.
    pub name: Option<Name>,
    /// Address.
    pub address: IpAddr,
    /// Index in `BACKENDS`.
    pub index: u32,
    /// Weight.
    pub weight: u32,
    /// Administrative state; a removed backend is draining.
    pub state: BackendState,
    /// Verdict.
    pub health: Health,
    /// What its replica says.
    #[serde(default)]
    pub readiness: Readiness,
    /// Takes new flows.
    pub eligible: bool,
    /// Percent of its weight that its slow start gives it, while it starts.
    #[serde(default)]
    pub slow_start_percent: Option<u8>,
    /// Why it may take no flow, whatever its health: residency, or its region drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded: Option<String>,
    /// Slots whose primary it is.
    pub slots: u32,
    /// Its next hop is known; otherwise the kernel's FIB is asked for each packet.
    pub resolved: bool,
    /// Why packets cannot get there in the service's forwarding mode, and what would help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Of a removed backend: clock in ms since boot from which it may be forgotten, once it has no flow.
    pub removed_until_ms: Option<i64>,
}

/// What people want to know about a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Name.
    pub name: Name,
    /// Identity.
    pub id: ServiceId,
    /// Index in `SERVICES`.
    pub index: u32,
    /// Slots of its table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: u32,
    /// Health is being ignored because too few are healthy.
    pub panic: bool,
    /// What the table gives to each region, where that makes a difference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Share>,
    /// Slots that changed within the drain time.
    pub transition_slots: u32,
    /// Slots whose flows may be in the flow table.
    pub tracked_slots: u32,
    /// Its scheduler places flows where a stateless answer would not find them, or did so until now.
    #[serde(default)]
    pub exceptions: bool,
    /// Of the table's primaries, by address: the same on every host with the same table.
    pub table_hash: u64,
    /// Clock in ms since boot at which the last of them will be stable, if any is not.
    pub transition_until_ms: Option<i64>,
    /// Backends in name order, then removed ones.
    pub backends: Vec<BackendStatus>,
}

/// Result of [`compile`].
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Contents of the maps.
    pub plan: Plan,
    /// To be kept once the plan has been applied.
    pub memory: Memory,
    /// In name order.
    pub status: Vec<Arc<ServiceStatus>>,
    /// Clock in ms since boot at which time alone changes the plan next.
    pub next_change_ms: Option<i64>,
}

/// Work that need not be done again while a service's input stays the same.
#[derive(Default)]
pub struct Cache {
    services: HashMap<ServiceId, service::Cached>,
}

/// Compiles everything.
pub fn compile(
    desired: &Desired,
    observed: &Observed,
    memory: &Memory,
    settings: &Settings,
    cache: &mut Cache,
) -> Result<Compiled, CompileError> {
    let now_ms = observed.now.as_millis() as i64;
    check_counts(desired, settings)?;
    check_guard(desired, settings)?;
    let mut memory = memory.clone();
    memory.retire_missing(desired, now_ms);
    cache.services.retain(|id, _| memory.services.contains_key(id) || desired_has(desired, id));
    let mut free = memory.free_indices(&settings.limits);

    let mut plan = Plan::default();
    let mut status = Vec::with_capacity(desired.services.len());
    let mut next_change_ms: Option<i64> = None;
    let mut backends = Vec::new();
    let mut health = observed.health.iter().peekable();
    let mut replicas = observed.replicas.iter().peekable();
    for (name, wanted) in &desired.services {
        let id = ServiceId::of(wanted);
        let verdicts = service::seen(name, wanted, &mut health, &mut replicas);
        let steer = spread::steer(wanted, &settings.here, observed.steers.get(name));
        let excluded = spread::excluded(wanted, &settings.here, &desired.regions);
        let next_hops = &observed.paths.next_hops;
        let compiled = service::compile(
            &service::Input { name, id, wanted, verdicts, steer, excluded, next_hops, now_ms, settings },
            memory.services.get(&id),
            &mut free,
            cache.services.entry(id).or_default(),
        )?;
        memory.services.insert(id, compiled.memory.clone());
        backends.extend(compiled.backends.iter().copied());
        plan.costs.extend(compiled.costs.iter().copied());
        plan.egress.extend(compiled.egress.iter().copied());
        plan.services.insert(compiled.index, compiled.entry.clone());
        entries::enter(&id, compiled.index, &mut plan);
        quic::enter(wanted, &compiled.memory, &mut plan);
        next_change_ms = match (next_change_ms, compiled.next_change_ms) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        status.push(compiled.status.clone());
    }
    // Until a next hop is known, the kernel's FIB may answer with any interface.
    let room = (limits::EGRESS as usize).saturating_sub(plan.egress.len());
    let others: Vec<u32> = observed.paths.links.difference(&plan.egress).take(room).copied().collect();
    plan.egress.extend(others);
    backends.sort_unstable_by_key(|&(index, _)| index);
    plan.backends = backends.into_iter().collect();
    check_plan(desired, &plan, &status, settings)?;
    check_quic(&plan, desired)?;
    Ok(Compiled { plan, memory, status, next_change_ms })
}

fn desired_has(desired: &Desired, id: &ServiceId) -> bool {
    desired.services.values().any(|s| ServiceId::of(s) == *id)
}

fn check_counts(desired: &Desired, settings: &Settings) -> Result<(), CompileError> {
    let limit = settings.limits.services as usize;
    if let Some(first) = desired.services.keys().nth(limit) {
        return Err(CompileError::TooMany {
            what: "services",
            needed: desired.services.len() as u64,
            limit: limit as u64,
            first: first.to_string(),
            option: "--max-services",
        });
    }
    Ok(())
}

/// Refuses lists that do not fit, or that the program cannot have.
fn check_guard(desired: &Desired, settings: &Settings) -> Result<(), CompileError> {
    if desired.guard.is_empty() {
        return Ok(());
    }
    if settings.features_off & features::GUARD != 0 {
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

fn check_quic(plan: &Plan, desired: &Desired) -> Result<(), CompileError> {
    if plan.quic_configs.len() <= limits::QUIC_CONFIGS as usize {
        return Ok(());
    }
    let last = desired.services.iter().rev().find(|(_, service)| !service.quic.is_empty());
    Err(CompileError::TooMany {
        what: "configs of QUIC connection ids",
        needed: plan.quic_configs.len() as u64,
        limit: u64::from(limits::QUIC_CONFIGS),
        first: last.map_or_else(String::new, |(name, _)| name.to_string()),
        option: "map of them (fixed when lbd is built)",
    })
}

fn check_plan(
    desired: &Desired,
    plan: &Plan,
    status: &[Arc<ServiceStatus>],
    settings: &Settings,
) -> Result<(), CompileError> {
    if plan.vips.len() > settings.limits.vips as usize {
        let first = desired.services.values().map(|s| s.vip).max();
        return Err(CompileError::TooMany {
            what: "VIPs",
            needed: plan.vips.len() as u64,
            limit: u64::from(settings.limits.vips),
            first: first.map_or_else(String::new, |vip| vip.to_string()),
            option: "--max-services",
        });
    }
    if plan.egress.len() > limits::EGRESS as usize {
        return Err(CompileError::TooMany {
            what: "egress interfaces",
            needed: plan.egress.len() as u64,
            limit: u64::from(limits::EGRESS),
            first: plan.egress.last().map_or_else(String::new, ToString::to_string),
            option: "device map (fixed when lbd is built)",
        });
    }
    let slots: u64 = plan.services.values().map(|s| s.table.len() as u64).sum();
    if let Some(largest) = status.iter().max_by_key(|s| s.table_size) {
        let spare = plan.services.values().map(|s| s.table.len() as u64).max().unwrap_or(0);
        if slots + spare > u64::from(settings.limits.slots) {
            return Err(CompileError::TooManySlots {
                needed: slots + spare,
                spare,
                limit: u64::from(settings.limits.slots),
                largest: largest.name.clone(),
                largest_slots: largest.table_size,
            });
        }
    }
    Ok(())
}
