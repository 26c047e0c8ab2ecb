//! Computes how many slots services may need, and whether a desired state can always be applied.
//!
//! Uses settings and memory alone: no table is built, so a check is cheap for any state. Called by `reconcile`. Pure.
//!
//! A service reserves the most slots that its table needs while its size, seed and hash stay the same: the table, the
//! second choices behind it if its scheduler or second chance uses them, and the longest list of turns. So any change
//! of health, weights, backends or marks is written in place. A change of size, seed or hash needs a new region with
//! the old table behind it for the drain time. Such changes wait for each other, so spare room for one is enough, and as
//! much again through which tables are moved where the free slots are not contiguous.

use super::{
    CompileError, DeploymentSettings, Memory, ServiceId, features::check_features, map_values, slot_layout,
    table::Hashing,
};
use crate::desired::model::{Desired, Name, Scheduler, Service};
use lb_common::limits;
use std::collections::{BTreeMap, BTreeSet};

/// Whether second choices are stored behind the service's table.
pub(super) fn has_second_choices(wanted: &Service, settings: &DeploymentSettings) -> bool {
    let is_capped = wanted.scheduler == Scheduler::SourceHash && wanted.load_cap.is_some();
    wanted.scheduler == Scheduler::P2c || is_capped || map_values::has_second_chance_header(wanted, settings)
}

/// Largest number of slots of a service with a table of this size, including everything behind it except an old table.
pub fn max_slots(wanted: &Service, settings: &DeploymentSettings, size: u32) -> u32 {
    if size == 0 {
        return 0;
    }
    let pairs = if has_second_choices(wanted, settings) { 2 } else { 1 };
    size * pairs + slot_layout::max_list_len(wanted)
}

/// A service that needs a new slot region before its change can be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionNeed {
    /// Identity of the service.
    pub id: ServiceId,
    /// Name of the service.
    pub name: Name,
    /// Slots of the region.
    pub slots: u32,
    /// Slots that the service has now, and after the transition.
    pub from_to: (u32, u32),
    /// Hashing of the live table; none if there is no table yet.
    pub live: Option<Hashing>,
}

/// Finds services that need a new slot region: new ones, and those with another size, seed or hash. `live` returns the
/// hashing and the number of owned slots of a service's live table, by index.
pub fn region_needs(
    desired: &Desired,
    memory: &Memory,
    settings: &DeploymentSettings,
    live: impl Fn(u32) -> Option<(Hashing, u32)>,
) -> Vec<RegionNeed> {
    let mut needs = Vec::new();
    for (name, wanted) in &desired.services {
        let id = ServiceId::of(wanted);
        let known = memory.services.get(&id);
        let current = known.and_then(|m| live(m.index)).filter(|(hashing, _)| hashing.size != 0);
        let default = super::ServiceMemory::default();
        let hashing = Hashing::wanted(wanted, known.map_or(&default, |m| &**m));
        if hashing.size == 0 || current.is_some_and(|(live, _)| live == hashing) {
            continue;
        }
        let old = match current {
            None => 0,
            Some((live, _)) => known.and_then(|m| m.base()).map_or(0, |e| e.shape.size).max(live.size),
        };
        let most = max_slots(wanted, settings, hashing.size);
        needs.push(RegionNeed {
            id,
            name: name.clone(),
            slots: most.saturating_add(old),
            from_to: (current.map_or(0, |(_, slots)| slots), most),
            live: current.map(|(live, _)| live),
        });
    }
    needs
}

/// Slots that a state needs: for all tables, and spare ones for the largest change of a table and for moving tables.
struct SlotDemand<'a> {
    tables: u64,
    spare: u64,
    largest: Option<(&'a Name, u32)>,
}

fn slot_demand<'a>(desired: &'a Desired, memory: &Memory, settings: &DeploymentSettings) -> SlotDemand<'a> {
    let mut all = SlotDemand { tables: 0, spare: 0, largest: None };
    let default = super::ServiceMemory::default();
    for (name, wanted) in &desired.services {
        let known = memory.services.get(&ServiceId::of(wanted)).map_or(&default, |m| &**m);
        let size = Hashing::wanted(wanted, known).size;
        let most = u64::from(max_slots(wanted, settings, size));
        let old = known.epochs.iter().map(|e| e.shape.size).max().unwrap_or(0).max(size);
        all.tables += most;
        all.spare = all.spare.max(2 * (most + u64::from(old)));
        if all.largest.is_none_or(|(_, largest)| size > largest) {
            all.largest = Some((name, size));
        }
    }
    all
}

/// Checks that `desired` can be applied, whatever happens later; `current` is the state in effect, which may not fit this
/// host: another host may have stored it, or this one started with less. What does not fit already, and does not grow, does
/// not refuse a change of something else, or nobody could repair it step by step.
///
/// # Errors
/// What does not fit, or which feature is missing.
pub fn admit(
    desired: &Desired,
    current: &Desired,
    memory: &Memory,
    settings: &DeploymentSettings,
) -> Result<(), CompileError> {
    if desired.guard != current.guard && desired.guard.len() >= current.guard.len() {
        super::check_guard(desired, settings)?;
    }
    for (name, wanted) in &desired.services {
        if current.services.get(name) != Some(wanted) {
            check_features(name, wanted, settings)?;
        }
    }
    unless_before(admit_indices(desired, memory, settings), || admit_indices(current, memory, settings))?;
    unless_before(admit_vips(desired, settings), || admit_vips(current, settings))?;
    unless_before(admit_quic(desired), || admit_quic(current))?;
    let wanted = slot_demand(desired, memory, settings);
    let (needed, limit) = (wanted.tables + wanted.spare, u64::from(settings.limits.slots));
    let Some((largest, largest_slots)) = wanted.largest.filter(|_| needed > limit) else { return Ok(()) };
    let now = slot_demand(current, memory, settings);
    if needed <= now.tables + now.spare {
        return Ok(());
    }
    Err(CompileError::TooManySlots {
        needed,
        spare: wanted.spare,
        limit,
        largest: largest.clone(),
        largest_slots,
    })
}

/// Drops the error that a map is too small if the state before needed as many entries of it.
fn unless_before(
    now: Result<(), CompileError>,
    before: impl FnOnce() -> Result<(), CompileError>,
) -> Result<(), CompileError> {
    match now {
        Err(CompileError::TooMany { what, needed, .. })
            if matches!(
                before(),
                Err(CompileError::TooMany { what: same, needed: had, .. }) if same == what && needed <= had
            ) =>
        {
            Ok(())
        }
        now => now,
    }
}

/// Checks the indices of services and backends, including those that flow tables may still contain.
fn admit_indices(
    desired: &Desired,
    memory: &Memory,
    settings: &DeploymentSettings,
) -> Result<(), CompileError> {
    let wanted: BTreeSet<ServiceId> = desired.services.values().map(|s| ServiceId::of(s)).collect();
    let leaving = memory.services.iter().filter(|(id, _)| !wanted.contains(id));
    let (mut services, mut backends) = leaving.fold((0, 0), |(s, b), (_, m)| (s + 1, b + m.backends.len()));
    services += memory.retired.len();
    backends += memory.retired.iter().map(|r| r.backends.len()).sum::<usize>();
    let mut over: [Option<&Name>; 2] = [None; 2];
    let most_backends = settings.limits.backends.min(limits::MAX_BACKEND_INDEX) as usize;
    for (name, service) in &desired.services {
        let known = memory.services.get(&ServiceId::of(service)).map(|m| &m.backends);
        let addresses: BTreeSet<_> = service.backends.values().map(|b| b.address).collect();
        services += 1;
        backends += addresses.len();
        backends += known.map_or(0, |known| known.keys().filter(|a| !addresses.contains(a)).count());
        if services > settings.limits.services as usize {
            over[0].get_or_insert(name);
        }
        if backends > most_backends {
            over[1].get_or_insert(name);
        }
    }
    let counts = [
        ("services", services, settings.limits.services as usize, "--max-services"),
        ("backends", backends, most_backends, "--max-backends"),
    ];
    for ((what, needed, limit, option), first) in counts.into_iter().zip(over) {
        if let Some(first) = first {
            let (needed, limit, first) = (needed as u64, limit as u64, first.to_string());
            return Err(CompileError::TooMany { what, needed, limit, first, option });
        }
    }
    Ok(())
}

fn admit_vips(desired: &Desired, settings: &DeploymentSettings) -> Result<(), CompileError> {
    let vips: BTreeSet<_> = desired.services.values().map(|s| s.vip).collect();
    let limit = settings.limits.vips as usize;
    match vips.iter().nth(limit) {
        None => Ok(()),
        Some(first) => Err(CompileError::TooMany {
            what: "VIPs",
            needed: vips.len() as u64,
            limit: limit as u64,
            first: first.to_string(),
            option: "--max-services",
        }),
    }
}

fn admit_quic(desired: &Desired) -> Result<(), CompileError> {
    let mut needed = 0;
    let mut over = None;
    for (name, service) in &desired.services {
        needed += service.quic.len() as u64;
        if needed > u64::from(limits::QUIC_CONFIGS) {
            over.get_or_insert(name);
        }
    }
    over.map_or(Ok(()), |first| Err(too_many_quic(needed, first)))
}

/// Error for more QUIC-LB configs than the map holds.
pub(super) fn too_many_quic(needed: u64, first: &Name) -> CompileError {
    CompileError::TooMany {
        what: "configs of QUIC connection ids",
        needed,
        limit: u64::from(limits::QUIC_CONFIGS),
        first: first.to_string(),
        option: "map of them (fixed when lbd is built)",
    }
}

/// Services whose change waits for free slots.
#[derive(Clone, Debug, Default)]
pub struct WaitingForRoom {
    /// Services that wait for their first table: left out, or unchanged.
    pub new: BTreeSet<ServiceId>,
    /// Services that wait for a change of size, seed or hash, with the hashing that they keep meanwhile.
    pub changing: BTreeMap<ServiceId, Hashing>,
}
