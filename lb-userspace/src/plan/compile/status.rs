//! What people want to know about what was compiled.

use super::{
    Backend, ServiceEntry, ServiceId, ServiceMemory, Shape,
    service::{Input, problem},
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

/// What the table gives to each region, as far as thousandths say it.
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

pub(super) fn status(
    input: &Input<'_>,
    memory: &ServiceMemory,
    shape: &Shape,
    (rule, start): (&policy::Eligibility, &slow::Start),
    entry: &ServiceEntry,
    entries: &[(u32, Backend)],
    drain_ms: i64,
) -> ServiceStatus {
    let slots = entry.slots();
    let mut shares = PerBackend::<u32>::new(memory);
    slots.iter().for_each(|slot| *shares.get_mut(slot.primary_index()) += 1);
    let resolved: HashMap<u32, bool> =
        entries.iter().map(|(i, b)| (*i, b.flags & lb_common::backend::flags::RESOLVED != 0)).collect();
    let share = |index| shares.get(index);
    let is_resolved = |index| resolved.get(&index).copied().unwrap_or(false);
    let mut backends: Vec<_> = input
        .wanted
        .backends
        .iter()
        .zip(input.verdicts.iter().zip(rule.eligible.iter().zip(&start.percent)))
        .enumerate()
        .filter_map(|(i, ((name, b), (seen, (&eligible, &slow_start_percent))))| {
            let index = memory.backends.get(&b.address)?.index;
            Some(BackendStatus {
                name: Some(name.clone()),
                address: b.address,
                index,
                weight: b.weight,
                state: b.state,
                health: seen.health,
                readiness: seen.readiness,
                eligible,
                slow_start_percent,
                excluded: input.why_excluded(i, b),
                slots: share(index),
                resolved: is_resolved(index),
                problem: problem(input, b.address),
                removed_until_ms: None,
            })
        })
        .collect();
    backends.extend(memory.backends.iter().filter_map(|(&address, b)| {
        let removed_ms = b.removed_ms?;
        Some(BackendStatus {
            name: None,
            address,
            index: b.index,
            weight: 0,
            state: BackendState::Draining,
            health: Health::Unknown,
            readiness: Readiness::Unknown,
            eligible: false,
            slow_start_percent: None,
            excluded: None,
            slots: 0,
            resolved: is_resolved(b.index),
            problem: None,
            removed_until_ms: Some(removed_ms + drain_ms),
        })
    }));
    let until = memory.changed_ms.iter().max().map(|&t| t.saturating_add(drain_ms));
    ServiceStatus {
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
