//! Computes weights of regions and versions.
//!
//! Input: the service, and the decision of `regions`. Output: weights. Pure.

use crate::{
    desired::model::{Canary, Locality, RegionShares, Service},
    plan::policy::{
        self,
        region::{RegionMember, Weighted, weights as member_weights},
    },
};
use std::sync::Arc;

/// Region shares of a service: as decided, or the initial ones without a decision.
pub(super) fn region_shares(
    wanted: &Service,
    here: &Locality,
    decided: Option<&Arc<RegionShares>>,
) -> Option<Arc<RegionShares>> {
    if !wanted.is_regional() && wanted.rollout.is_none() {
        return None;
    }
    decided.cloned().or_else(|| policy::region::initial(wanted, here).map(Arc::new))
}

/// Weights with which the table gives each region, zone and version its share.
pub(super) fn region_weights(
    wanted: &Service,
    here: &Locality,
    steer: Option<&RegionShares>,
    (weights, scale): (&[u32], u32),
    eligible: &[bool],
) -> Weighted {
    let Some(steer) = steer else {
        return Weighted {
            weights: weights.to_vec(),
            takes: eligible.to_vec(),
            scale: 1,
            groups: Vec::new(),
        };
    };
    let new_backends = steer.canary.as_ref().map(|c| &c.backends);
    // The share comes from the desired state; the backends of the version were observed.
    let steer = RegionShares {
        canary: wanted.rollout.as_ref().zip(steer.canary.clone()).map(|(rollout, canary)| Canary {
            permille: rollout.share(),
            regions: rollout.regions.clone(),
            ..canary
        }),
        ..steer.clone()
    };
    let members: Vec<RegionMember<'_>> = wanted
        .backends
        .iter()
        .zip(weights.iter().zip(eligible))
        .map(|((name, b), (&weight, &eligible))| RegionMember {
            weight,
            eligible,
            region: b.region.as_ref().unwrap_or(&here.region),
            zone: b.zone.as_ref().unwrap_or(&here.zone),
            is_new: steer.canary.is_some() && new_backends.is_some_and(|names| names.contains(name)),
        })
        .collect();
    let heaviest = wanted.seating.iter().map(|change| change.1).max().unwrap_or(1).saturating_mul(scale);
    member_weights(&members, &steer, here, heaviest)
}
