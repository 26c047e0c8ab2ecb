//! Decides which regions a service's new flows go to, from measurements of each region.
//!
//! Input: a service's [`RegionRules`], its regions as one host sees them ([`Place`]: capacity and load from
//! replica state, round-trip time, votes), and the previous decision. Output: a [`RegionDecision`] with shares that always
//! add up, and a reason. Pure; called by `regions`. [`weights`] converts a decision to weights, for `compile`.
//!
//! * **Local first.** As long as the own region has room, it gets all flows. From `spill_at` on, or when work is
//!   pending, the excess goes to the nearest regions with room; it returns when the demand is below `spill_until`.
//! * **Demand is arrivals, not load** ([`estimate`]): neither a backlog nor what others have sent here counts as demand.
//! * **What is free is shared** ([`allocate`]): all hosts compute the same allocation from the same reports.
//! * **Full regions are reported**: as a spill that finds no room, or ([`full`]) where the policy sends nothing elsewhere.
//! * **No flapping** ([`spill`]): a spill grows at once and shrinks after `hold_s`. Shares change in steps.
//! * **No loops.** A spilled packet goes directly to a worker of the other region, and no ingress host sees it
//!   again. A region that asks for slots gives none.
//! * **Residency** is enforced by `compile`, regardless of the decision.
//!
//! ARCHITECTURE.md argues why this is stable. The simulation in `observed::regions` closes the loop with queues, late
//! reports and lies; property tests here assert that constant input comes to rest.

mod allocate;
mod estimate;
mod full;
mod spill;
mod votes;
mod weights;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

pub use spill::Spill;
pub use votes::{Agreed, Vote, count_votes};
pub use weights::{RegionMember, Weighted, weights};

use crate::desired::model::{
    Locality, Name, RegionPolicy, RegionRules, RegionShares, Service, Share, WHOLE, region_list,
};
use serde::{Deserialize, Serialize};
use spill::LocalFirst;
use std::collections::BTreeMap;

/// Step size of shares, in thousandths.
pub const STEP: u16 = 25;

/// A region (or a zone of the own region) as one host sees it, for one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Name.
    pub name: Name,
    /// Whether this is the host's own region or zone.
    pub is_local: bool,
    /// Whether the service may run there.
    pub is_allowed: bool,
    /// Whether the operator drains it.
    pub is_draining: bool,
    /// Whether the votes of the hosts say that it is down.
    pub is_down: bool,
    /// Whether it sends flows of this service elsewhere.
    pub is_spilling: bool,
    /// Whether none of its replicas that take flows runs the version which a roll-out wants.
    #[serde(default)]
    pub lacks_version: bool,
    /// Backends that can take new flows.
    pub backends: u32,
    /// Requests that these backends can run concurrently; none if unknown.
    pub capacity: Option<u64>,
    /// Running and waiting requests of these backends.
    pub load: u64,
    /// Waiting requests of these backends.
    #[serde(default)]
    pub waiting: u64,
    /// Mean service time of a request, in milliseconds; none if the replicas do not count requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_ms: Option<u32>,
    /// Whether too many reports are stale to use the load.
    pub is_stale: bool,
    /// Round-trip time from this host, in microseconds.
    pub rtt_us: Option<u32>,
}

impl Place {
    /// A place that may be used, without measurements.
    pub fn unknown(name: &Name) -> Self {
        Self {
            name: name.clone(),
            is_local: false,
            is_allowed: true,
            is_draining: false,
            is_down: false,
            is_spilling: false,
            lacks_version: false,
            backends: 1,
            capacity: None,
            load: 0,
            waiting: 0,
            service_ms: None,
            is_stale: false,
            rtt_us: None,
        }
    }

    /// Whether it can take flows.
    fn is_usable(&self) -> bool {
        self.is_allowed && !self.is_draining && self.backends > 0
    }
}

/// Decision of another region's or zone's hosts for the service, as they published it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerPlace {
    /// Name of the region or zone.
    pub name: Name,
    /// Shares of its clients' flows.
    pub shares: Vec<Share>,
    /// Round-trip times from there, in microseconds; empty if unknown.
    pub rtt_us: BTreeMap<Name, u32>,
}

/// Inputs of a decision.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// Place of the host.
    pub here: &'a Locality,
    /// The service's rules.
    pub rules: &'a RegionRules,
    /// The service's regions, including the host's own if it has backends there.
    pub regions: &'a [Place],
    /// Zones of the own region.
    pub zones: &'a [Place],
    /// Decisions of other regions.
    pub region_peers: &'a [PeerPlace],
    /// Decisions of other zones of the own region.
    pub zone_peers: &'a [PeerPlace],
    /// Interval of the replicas' reports, in milliseconds.
    pub interval_ms: u64,
    /// A monotonic clock, in milliseconds.
    pub now_ms: u64,
}

impl<'a> Inputs<'a> {
    /// Inputs of a host that hears no other host.
    pub fn alone(
        here: &'a Locality,
        rules: &'a RegionRules,
        (regions, zones): (&'a [Place], &'a [Place]),
        now_ms: u64,
    ) -> Self {
        Self { here, rules, regions, zones, region_peers: &[], zone_peers: &[], interval_ms: 1_000, now_ms }
    }
}

/// A decision, with the state that the next decision needs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RegionDecision {
    /// Shares of the regions, which add up to [`WHOLE`]; empty if no region may take flows.
    pub shares: Vec<Share>,
    /// Shares of the own region's zones; empty if zones are not considered.
    #[serde(default)]
    pub zones: Vec<Share>,
    /// Regions that may take over, best first.
    #[serde(default)]
    pub order: Vec<Name>,
    /// The spill to other regions.
    #[serde(default)]
    pub spill: Spill,
    /// The spill to other zones.
    #[serde(default)]
    pub zone_spill: Spill,
    /// `active-passive`: since when a better region than the active one is up again (monotonic clock).
    #[serde(default)]
    pub better_since_ms: Option<u64>,
    /// `weighted` and `active-passive`: regions that are full, and get their share nevertheless.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub full: Vec<Name>,
    /// Reason in words.
    pub reason: String,
}

impl RegionDecision {
    /// The shares, for `compile`.
    pub fn region_shares(&self) -> RegionShares {
        RegionShares {
            shares: self.shares.clone(),
            zones: self.zones.clone(),
            order: self.order.clone(),
            canary: None,
        }
    }

    /// Share of new flows that leave region `here`, in thousandths.
    pub fn share_away(&self, here: &Name) -> u16 {
        self.shares.iter().filter(|s| s.name != *here).map(|s| s.permille).sum()
    }
}

fn all_to(name: &Name) -> Vec<Share> {
    vec![Share { name: name.clone(), permille: WHOLE }]
}

/// Orders the regions, best first: regions that are down by vote come last; otherwise by the operator's order, or the
/// own region and then the nearest.
fn order_regions(inputs: &Inputs<'_>) -> Vec<Name> {
    let rank = |place: &Place| match (inputs.rules.policy, &inputs.rules.allowed) {
        (RegionPolicy::ActivePassive, Some(allowed)) => {
            (allowed.iter().position(|name| *name == place.name).unwrap_or(usize::MAX), 0)
        }
        _ => (usize::from(!place.is_local), place.rtt_us.unwrap_or(u32::MAX)),
    };
    let mut places: Vec<&Place> = inputs.regions.iter().filter(|p| p.is_allowed && !p.is_draining).collect();
    places.sort_by_key(|p| (p.is_down, rank(p), p.name.clone()));
    places.into_iter().map(|p| p.name.clone()).collect()
}

/// Decides for one service on one host.
pub fn decide(inputs: &Inputs<'_>, before: &RegionDecision) -> RegionDecision {
    let order = order_regions(inputs);
    let place = |name: &Name| inputs.regions.iter().find(|p| p.name == *name);
    let (candidates, note) = candidates(order.iter().filter_map(place).filter(|p| p.is_usable()).collect());
    let mut next = RegionDecision { order: order.clone(), ..RegionDecision::default() };
    let Some(first) = candidates.first() else {
        next.reason = refusal_reason(inputs);
        return next;
    };
    match inputs.rules.policy {
        RegionPolicy::ActiveActive => active_active(inputs, &candidates, before, &mut next),
        RegionPolicy::ActivePassive => active_passive(inputs, &candidates, before, &mut next),
        RegionPolicy::Weighted => {
            let weight = |p: &&Place| inputs.rules.weights.get(&p.name).copied().unwrap_or(0);
            let weights: Vec<u32> = candidates.iter().map(weight).collect();
            next.shares = proportional_shares(&candidates, &weights);
            next.reason = "by weight over the regions that are up".to_owned();
            if next.shares.is_empty() {
                next.shares = all_to(&first.name);
                next.reason = format!("no region with a weight is up: all flows to {}", first.name);
            }
        }
    }
    if inputs.rules.policy != RegionPolicy::ActiveActive {
        full::note(inputs, before, &mut next);
    }
    next.reason.push_str(&note);
    decide_zones(inputs, before, &mut next);
    next
}

/// The usable regions without those that are down or lack the version of a roll-out, if any others are left; and a note.
fn candidates(usable: Vec<&Place>) -> (Vec<&Place>, String) {
    let up: Vec<&Place> = usable.iter().filter(|p| !p.is_down).copied().collect();
    if up.is_empty() {
        // The vote may be wrong, and trying is better than refusing all flows.
        return (usable, "; hosts vote it down, but no other region is left".to_owned());
    }
    let with_version: Vec<&Place> = up.iter().filter(|p| !p.lacks_version).copied().collect();
    if with_version.is_empty() {
        return (up, String::new());
    }
    let note = match up.iter().find(|p| p.lacks_version && p.is_local) {
        Some(home) => format!("; no replica of the rolled-out version takes flows in {}", home.name),
        None => String::new(),
    };
    (with_version, note)
}

/// Why no region may take flows.
fn refusal_reason(inputs: &Inputs<'_>) -> String {
    let elsewhere: Vec<String> = inputs
        .regions
        .iter()
        .filter(|p| !p.is_allowed && p.backends > 0)
        .map(|p| format!("{} in {}", p.backends, p.name))
        .collect();
    let draining = inputs.regions.iter().find(|p| p.is_allowed && p.is_draining && p.backends > 0);
    match (&inputs.rules.allowed, draining) {
        (_, Some(place)) => {
            format!("refused: region {} drains, and no other region may take its flows", place.name)
        }
        (Some(allowed), None) if !elsewhere.is_empty() => format!(
            "refused by residency: no backend takes flows in {}, and backends elsewhere ({}) must not",
            region_list(allowed),
            elsewhere.join(", ")
        ),
        _ => "refused: no backend takes flows in any region".to_owned(),
    }
}

/// Shares in proportion to weights that add up exactly: the largest remainders are rounded up.
fn proportional_shares(places: &[&Place], weights: &[u32]) -> Vec<Share> {
    let sum: u64 = weights.iter().map(|&w| u64::from(w)).sum();
    if sum == 0 {
        return Vec::new();
    }
    let exact = |w: u32| u64::from(w) * u64::from(WHOLE);
    let mut permille: Vec<u64> = weights.iter().map(|&w| exact(w) / sum).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by_key(|&i| (std::cmp::Reverse(exact(weights[i]) % sum), places[i].name.clone()));
    let missing = u64::from(WHOLE) - permille.iter().sum::<u64>();
    by_remainder.iter().take(missing as usize).for_each(|&i| permille[i] += 1);
    let share =
        |(place, permille): (&&Place, u64)| Share { name: place.name.clone(), permille: permille as u16 };
    let mut shares: Vec<Share> = places.iter().zip(permille).filter(|(_, p)| *p > 0).map(share).collect();
    shares.sort_by(|a, b| a.name.cmp(&b.name));
    shares
}

fn active_active(
    inputs: &Inputs<'_>,
    candidates: &[&Place],
    before: &RegionDecision,
    next: &mut RegionDecision,
) {
    let rules = inputs.rules;
    let local = candidates.iter().find(|p| p.is_local).copied();
    let others: Vec<&Place> = candidates.iter().filter(|p| !p.is_local).copied().collect();
    let first = LocalFirst {
        here: &inputs.here.region,
        local,
        others: &others,
        peers: inputs.region_peers,
        interval_ms: inputs.interval_ms,
        at: rules.spill_at_percent,
        until: rules.spill_until_percent,
        most: rules.spill_most_percent.min(100) * 10,
        hold_ms: u64::from(rules.hold_s) * 1_000,
        now_ms: inputs.now_ms,
        what: "region",
    };
    (next.spill, next.reason) = first.decide(&before.spill);
    next.shares = first.shares(&next.spill);
}

fn active_passive(
    inputs: &Inputs<'_>,
    candidates: &[&Place],
    before: &RegionDecision,
    next: &mut RegionDecision,
) {
    let best = &candidates[0].name;
    let active = before.shares.first().map(|s| &s.name);
    let stays = active.filter(|name| *name != best && candidates.iter().any(|p| p.name == **name));
    let Some(active) = stays else {
        next.shares = all_to(best);
        next.reason = format!("{best} is the first region in order that is up");
        return;
    };
    let since_ms = before.better_since_ms.unwrap_or(inputs.now_ms);
    let hold_ms = u64::from(inputs.rules.hold_s) * 1_000;
    let up_ms = inputs.now_ms.saturating_sub(since_ms);
    if up_ms >= hold_ms {
        next.shares = all_to(best);
        next.reason = format!("{best} is up again, and has been for {} s", hold_ms / 1_000);
    } else {
        next.shares = all_to(active);
        next.better_since_ms = Some(since_ms);
        next.reason = format!("{best} is up again, and takes over from {active} after {} s", hold_ms / 1_000);
    }
}

/// Applies local first between the zones of the own region. Every zone of the region is allowed, and zones never cause
/// flows to be refused.
fn decide_zones(inputs: &Inputs<'_>, before: &RegionDecision, next: &mut RegionDecision) {
    let has_share = |name: &Name| next.shares.iter().any(|s| s.name == *name);
    let is_here = inputs.regions.iter().any(|p| p.is_local && has_share(&p.name));
    if !inputs.rules.zone_first || !is_here {
        return;
    }
    let usable: Vec<&Place> = inputs.zones.iter().filter(|p| p.is_usable()).collect();
    let Some(local) = usable.iter().find(|p| p.is_local).copied() else { return };
    let mut others: Vec<&Place> = usable.into_iter().filter(|p| !p.is_local).collect();
    others.sort_by_key(|p| p.name.clone());
    if others.is_empty() {
        return;
    }
    let first = LocalFirst {
        here: &local.name,
        local: Some(local),
        others: &others,
        peers: inputs.zone_peers,
        interval_ms: inputs.interval_ms,
        at: inputs.rules.spill_at_percent,
        until: inputs.rules.spill_until_percent,
        // Keep some flows local, so that the local load is still measured.
        most: 900,
        hold_ms: u64::from(inputs.rules.hold_s) * 1_000,
        now_ms: inputs.now_ms,
        what: "zone",
    };
    let reason;
    (next.zone_spill, reason) = first.decide(&before.zone_spill);
    next.zones = first.shares(&next.zone_spill);
    next.reason = format!("{}; {reason}", next.reason);
}

/// Shares of a service without measurements; None for a service without regions.
pub fn initial(service: &Service, here: &Locality) -> Option<RegionShares> {
    if !service.is_regional() {
        return None;
    }
    let default = RegionRules::default();
    let rules = service.regions.as_ref().unwrap_or(&default);
    let mut names: Vec<&Name> = service
        .backends
        .values()
        .filter(|b| rules.allows(b))
        .map(|b| b.region.as_ref().unwrap_or(&here.region))
        .collect();
    names.sort();
    names.dedup();
    let place = |name: &Name| Place { is_local: *name == here.region, ..Place::unknown(name) };
    let regions: Vec<Place> = names.into_iter().map(place).collect();
    let inputs = Inputs::alone(here, rules, (&regions, &[]), 0);
    let mut decision = decide(&inputs, &RegionDecision::default());
    if rules.zone_first {
        decision.zones = all_to(&here.zone);
    }
    Some(decision.region_shares())
}
