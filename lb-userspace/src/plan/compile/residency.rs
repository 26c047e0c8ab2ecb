//! Residency and drains of regions: backends that must not take flows, whatever their health.
//!
//! Input: the service, and the states of regions. Output: reasons of exclusion. Pure. `service` gives excluded backends no
//! slots, and those that residency forbids the mode `FORBIDDEN`, with which the packet code drops their flows.

use super::service::Input;
use crate::desired::model::{self, Locality, Name, Region, RegionState, Service, region_list};
use std::collections::BTreeMap;

/// Why a backend must not take flows, whatever its health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Excluded {
    /// The service may not run in the backend's region.
    Residency,
    /// The backend's region drains.
    RegionDrains,
}

/// Excluded backends, in the order of the service's backends; empty if none is excluded.
pub(super) fn excluded_backends(
    wanted: &Service,
    here: &Locality,
    regions: &BTreeMap<Name, Region>,
) -> Vec<Option<Excluded>> {
    let drains = |name: &Name| regions.get(name).is_some_and(|r| r.state == RegionState::Draining);
    let all = wanted.backends.values().map(|b| match b.region.as_ref().unwrap_or(&here.region) {
        _ if !wanted.allows(b) => Some(Excluded::Residency),
        region if drains(region) => Some(Excluded::RegionDrains),
        _ => None,
    });
    let all: Vec<_> = all.collect();
    if all.iter().all(Option::is_none) { Vec::new() } else { all }
}

impl Input<'_> {
    pub(super) fn is_excluded(&self, backend: usize) -> bool {
        self.excluded.get(backend).is_some_and(Option::is_some)
    }

    /// Why a backend is excluded, in words.
    pub(super) fn exclusion_reason(&self, backend: usize, b: &model::Backend) -> Option<String> {
        let region = b.region.as_ref().unwrap_or(&self.settings.here.region);
        let allowed = self.wanted.regions.iter().flat_map(|rules| rules.allowed.iter().flatten());
        match (*self.excluded.get(backend)?)? {
            Excluded::Residency if b.region.is_none() => {
                Some(format!("residency: only {}, and the backend has no region", region_list(allowed)))
            }
            Excluded::Residency => Some(format!("residency: only {}, not {region}", region_list(allowed))),
            Excluded::RegionDrains => Some(format!("region {region} drains")),
        }
    }
}
