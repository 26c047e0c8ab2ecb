//! Who of a service's backends may take flows, whatever their health, and how the regions and versions share them.
//!
//! Input: the service, and what `regions` decided. Output: reasons against a backend, and weights. Pure.

use crate::{
    desired::model::{Canary, Locality, Name, Region, RegionShares, RegionState, Service},
    plan::policy::{
        self,
        region::{Member, Weighted, weights as region_weights},
    },
};
use std::{collections::BTreeMap, sync::Arc};

/// Why a backend may take no flow, whatever its health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Excluded {
    /// Its region is none of those that the service may run in.
    Residency,
    /// Its region drains.
    Drains,
}

/// Who may take no flow, whatever is decided elsewhere; empty if everybody may.
pub(super) fn excluded(
    wanted: &Service,
    here: &Locality,
    regions: &BTreeMap<Name, Region>,
) -> Vec<Option<Excluded>> {
    let drains = |name: &Name| regions.get(name).is_some_and(|r| r.state == RegionState::Draining);
    let all = wanted.backends.values().map(|b| match b.region.as_ref().unwrap_or(&here.region) {
        _ if !wanted.allows(b) => Some(Excluded::Residency),
        region if drains(region) => Some(Excluded::Drains),
        _ => None,
    });
    let all: Vec<_> = all.collect();
    if all.iter().all(Option::is_none) { Vec::new() } else { all }
}

/// How a service is spread: as was decided, or as goes without knowing anything.
pub(super) fn steer(
    wanted: &Service,
    here: &Locality,
    decided: Option<&Arc<RegionShares>>,
) -> Option<Arc<RegionShares>> {
    if !wanted.is_regional() && wanted.rollout.is_none() {
        return None;
    }
    decided.cloned().or_else(|| policy::region::initial(wanted, here).map(Arc::new))
}

/// Weights by which the table gives each region, zone and version its share.
pub(super) fn steered(
    wanted: &Service,
    here: &Locality,
    steer: Option<&RegionShares>,
    (weights, scale): (&[u32], u32),
    eligible: &[bool],
) -> Weighted {
    let Some(steer) = steer else {
        return Weighted { weights: weights.to_vec(), takes: eligible.to_vec(), scale: 1 };
    };
    let newcomers = steer.canary.as_ref().map(|c| &c.backends);
    // The share is the desired state's; who runs the version was seen.
    let steer = RegionShares {
        canary: wanted
            .rollout
            .as_ref()
            .zip(steer.canary.clone())
            .map(|(rollout, canary)| Canary { permille: rollout.share(), ..canary }),
        ..steer.clone()
    };
    let members: Vec<Member<'_>> = wanted
        .backends
        .iter()
        .zip(weights.iter().zip(eligible))
        .map(|((name, b), (&weight, &eligible))| Member {
            weight,
            eligible,
            region: b.region.as_ref().unwrap_or(&here.region),
            zone: b.zone.as_ref().unwrap_or(&here.zone),
            is_new: steer.canary.is_some() && newcomers.is_some_and(|names| names.contains(name)),
        })
        .collect();
    let heaviest = wanted.seating.iter().map(|turn| turn.1).max().unwrap_or(1).saturating_mul(scale);
    region_weights(&members, &steer, here, heaviest)
}
