//! Status of compiled services and backends, for the API.

use super::{
    Backend, ServiceEntry, ServiceId, ServiceMemory, Shape,
    reach::{forwarding_problem, path_problem},
    service::Input,
    slow,
    table::{PerBackend, table_hash},
};
use crate::{
    desired::model::{BackendState, Health, Name, Readiness, Share, WHOLE},
    plan::policy,
};
use lb_common::slot::NO_BACKEND;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

/// Status of a compiled backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledBackend {
    /// Name; none for a removed backend that still has flows.
    pub name: Option<Name>,
    /// Address.
    pub address: IpAddr,
    /// Index in `BACKENDS`.
    pub index: u32,
    /// Weight.
    pub weight: u32,
    /// Administrative state; a removed backend is draining.
    pub state: BackendState,
    /// Verdict of the health checks.
    pub health: Health,
    /// Readiness that the replica reports.
    #[serde(default)]
    pub readiness: Readiness,
    /// Whether the backend takes new flows.
    pub eligible: bool,
    /// Whether the ejection limit holds it in although it fails its checks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held: bool,
    /// Percent of the backend's weight in effect during slow start.
    #[serde(default)]
    pub slow_start_percent: Option<u8>,
    /// Why the backend must not take flows, whatever its health: residency, or its region drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded: Option<String>,
    /// Slots whose primary is this backend.
    pub slots: u32,
    /// Whether the next hop is known; otherwise each packet consults the kernel's FIB.
    pub resolved: bool,
    /// Why packets cannot reach the backend in the service's forwarding mode, and how to fix it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// For a removed backend: time in ms since boot after which it may be forgotten, once it has no flows.
    pub removed_until_ms: Option<i64>,
}

/// Status of a compiled service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledService {
    /// Name.
    pub name: Name,
    /// Identity in the dataplane.
    pub id: ServiceId,
    /// Index in `SERVICES`.
    pub index: u32,
    /// Slots of the service's table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: u32,
    /// Whether health is ignored because too few backends are healthy.
    pub panic: bool,
    /// Each region's share of the table, for services with region rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Share>,
    /// Slots that changed within the drain time.
    pub transition_slots: u32,
    /// Slots whose flows may be in the flow table.
    pub tracked_slots: u32,
    /// Whether the scheduler places flows, or did until now, where a stateless lookup would not find them.
    #[serde(default)]
    pub exceptions: bool,
    /// Hash of the addresses of the table's primaries: equal on hosts with the same table.
    pub table_hash: u64,
    /// Time in ms since boot at which the last slot in transition becomes stable, if any is in transition.
    pub transition_until_ms: Option<i64>,
    /// Backends in name order, then removed ones.
    pub backends: Vec<CompiledBackend>,
}

/// Each region's share of the table, rounded to thousandths.
fn region_shares(
    input: &Input<'_>,
    share: &dyn Fn(u32) -> u32,
    memory: &ServiceMemory,
    slots: usize,
) -> Vec<Share> {
    if !input.wanted.is_regional() {
        return Vec::new();
    }
    let mut by_region: BTreeMap<&Name, u64> = BTreeMap::new();
    for b in input.wanted.backends.values() {
        let index = memory.backends.get(&b.address).map_or(NO_BACKEND, |known| known.index);
        let region = b.region.as_ref().unwrap_or(&input.settings.here.region);
        *by_region.entry(region).or_default() += u64::from(share(index));
    }
    let permille = |n: u64| ((n * u64::from(WHOLE) + slots as u64 / 2) / slots.max(1) as u64) as u16;
    let shares = by_region.into_iter().map(|(name, n)| Share { name: name.clone(), permille: permille(n) });
    shares.filter(|share| share.permille > 0).collect()
}

/// Status of the backends in the desired state.
fn desired_backends(
    input: &Input<'_>,
    memory: &ServiceMemory,
    (rule, start, held): (&policy::Eligibility, &slow::SlowStart, &[bool]),
    share: &dyn Fn(u32) -> u32,
    is_resolved: &dyn Fn(u32) -> bool,
) -> Vec<CompiledBackend> {
    let observed = input.verdicts.iter().zip(rule.eligible.iter().zip(&start.percent));
    let all = input.wanted.backends.iter().zip(observed).enumerate();
    all.filter_map(|(i, ((name, b), (seen, (&eligible, &slow_start_percent))))| {
        let index = memory.backends.get(&b.address)?.index;
        Some(CompiledBackend {
            name: Some(name.clone()),
            address: b.address,
            index,
            weight: b.weight,
            state: b.state,
            health: seen.health,
            readiness: seen.readiness,
            eligible,
            held: held.get(i) == Some(&true),
            slow_start_percent,
            excluded: input.exclusion_reason(i, b),
            slots: share(index),
            resolved: is_resolved(index),
            problem: forwarding_problem(input, b.address).or_else(|| path_problem(input, b.address)),
            removed_until_ms: None,
        })
    })
    .collect()
}

/// Status of removed backends that still have an index.
fn removed_backends(
    memory: &ServiceMemory,
    drain_ms: i64,
    is_resolved: &dyn Fn(u32) -> bool,
) -> Vec<CompiledBackend> {
    let all = memory.backends.iter().filter_map(|(&address, b)| {
        let removed_ms = b.removed_ms?;
        Some(CompiledBackend {
            name: None,
            address,
            index: b.index,
            weight: 0,
            state: BackendState::Draining,
            health: Health::Unknown,
            readiness: Readiness::Unknown,
            eligible: false,
            held: false,
            slow_start_percent: None,
            excluded: None,
            slots: 0,
            resolved: is_resolved(b.index),
            problem: None,
            removed_until_ms: Some(removed_ms + drain_ms),
        })
    });
    all.collect()
}

/// Builds the status of a compiled service.
pub(super) fn compile_status(
    input: &Input<'_>,
    memory: &ServiceMemory,
    shape: &Shape,
    (rule, start, held): (&policy::Eligibility, &slow::SlowStart, &[bool]),
    entry: &ServiceEntry,
    entries: &[(u32, Backend)],
    drain_ms: i64,
) -> CompiledService {
    let slots = entry.slots();
    let mut shares = PerBackend::<u32>::new(memory);
    slots.iter().for_each(|slot| *shares.get_mut(slot.primary_index()) += 1);
    let resolved: HashMap<u32, bool> =
        entries.iter().map(|(i, b)| (*i, b.flags & lb_common::backend::flags::RESOLVED != 0)).collect();
    let share = |index| shares.get(index);
    let is_resolved = |index| resolved.get(&index).copied().unwrap_or(false);
    let mut backends = desired_backends(input, memory, (rule, start, held), &share, &is_resolved);
    backends.extend(removed_backends(memory, drain_ms, &is_resolved));
    let until = memory.changed_ms.iter().max().map(|&t| t.saturating_add(drain_ms));
    CompiledService {
        name: input.name.clone(),
        id: input.id,
        index: memory.index,
        table_size: shape.size,
        eligible: rule.eligible.iter().filter(|&&e| e).count() as u32,
        panic: rule.panic,
        regions: region_shares(input, &share, memory, slots.len()),
        transition_slots: match entry.view.old_count {
            0 => slots.iter().filter(|s| s.is_transition()).count() as u32,
            _ => slots.len() as u32,
        },
        tracked_slots: slots.iter().filter(|s| s.is_tracked()).count() as u32,
        exceptions: false,
        table_hash: table_hash(memory, shape, slots),
        transition_until_ms: until.filter(|&t| t > input.now_ms),
        backends,
    }
}
