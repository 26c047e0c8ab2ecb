//! Reads the decisions of other regions and zones from the reports of their hosts.
//!
//! Input: reports as the store delivers them, one per host. Output: one [`PeerPlace`] per region or zone. The first host by
//! name of a region decides for it. A report that names no share of a service says that its region keeps its flows.

use super::PeerReport;
use crate::{
    desired::model::{Locality, Name, RegionShares, Share, WHOLE},
    plan::policy::region::{PeerPlace, RegionDecision},
};
use std::collections::BTreeMap;

/// Decisions of other regions for a service.
pub fn regions(service: &Name, here: &Locality, peers: &[PeerReport]) -> Vec<PeerPlace> {
    let elsewhere = peers.iter().filter(|p| p.region != here.region.as_str());
    let decided = elsewhere.filter_map(|p| Some((p.region.parse().ok()?, p, &p.steers.get(service)?.shares)));
    first_by_place(decided)
}

/// Decisions of other zones of the own region for a service.
pub fn zones(service: &Name, here: &Locality, peers: &[PeerReport]) -> Vec<PeerPlace> {
    let near = peers.iter().filter(|p| p.region == here.region.as_str() && p.zone != here.zone.as_str());
    let decided = near.filter_map(|p| Some((p.zone.parse().ok()?, p, &p.steers.get(service)?.zones)));
    first_by_place(decided)
}

fn first_by_place<'a>(
    decided: impl Iterator<Item = (Name, &'a PeerReport, &'a Vec<Share>)>,
) -> Vec<PeerPlace> {
    let mut first: BTreeMap<Name, (&PeerReport, &Vec<Share>)> = BTreeMap::new();
    for (place, report, shares) in decided.filter(|(_, _, shares)| !shares.is_empty()) {
        let known = first.entry(place).or_insert((report, shares));
        if report.host < known.0.host {
            *known = (report, shares);
        }
    }
    first
        .into_iter()
        .map(|(name, (report, shares))| PeerPlace {
            name,
            shares: shares.clone(),
            rtt_us: report.rtt_us.clone(),
        })
        .collect()
}

/// Whether hosts of a region send flows of a service to other regions.
pub fn is_spilling(region: &Name, service: &Name, peers: &[PeerReport]) -> bool {
    let of_region = peers.iter().filter(|peer| peer.region == region.as_str());
    of_region.filter_map(|peer| peer.steers.get(service)).any(|steer| {
        let here = steer.shares.iter().find(|s| s.name == *region).map_or(0, |s| s.permille);
        // A region without usable backends sends everything away, and cannot receive a spill anyway.
        here > 0 && here < WHOLE
    })
}

/// Rebuilds a decision to continue from, given only its shares.
pub fn resume_decision(steer: &RegionShares, here: &Locality) -> RegionDecision {
    let away = |shares: &[Share], own: &Name| -> Vec<Share> {
        shares.iter().filter(|s| s.name != *own).cloned().collect()
    };
    let mut decision = RegionDecision {
        shares: steer.shares.clone(),
        zones: steer.zones.clone(),
        order: steer.order.clone(),
        ..RegionDecision::default()
    };
    decision.spill.shares = away(&steer.shares, &here.region);
    decision.zone_spill.shares = away(&steer.zones, &here.zone);
    decision
}
