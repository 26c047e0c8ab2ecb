//! Which regions a service's new flows go to, from what is measured of each.
//!
//! Input: a service's [`RegionRules`], its regions as one host sees them ([`Place`]: free capacity and demand from
//! replica state, round-trip time, votes), and the decision before. Output: a [`Decision`] with shares that always
//! add up, and why. Pure; called by `regions`. [`weights`] makes weights of a decision, for `compile`.
//!
//! * **Local first.** As long as the own region has room, it gets everything. Load is running and waiting requests
//!   against capacity, as the replicas report them. From `spill_at` on, what is too much goes to the nearest regions
//!   that have room, and no further than these are filled to their own `spill_at`; it comes back below `spill_until`.
//! * **No flapping.** Whether a spill grows or shrinks follows from the local load alone, which the spill itself
//!   can only lower; between the two thresholds nothing moves. A spill grows once a second, and again only while that
//!   did not help; it shrinks after `hold_s`. Shares go in steps.
//! * **No loops.** A packet that was spilled goes straight to a worker of the other region, and no ingress host sees it
//!   again. What could go round is the decision: so nobody spills to a region that spills itself.
//! * **Residency** is not decided here but enforced by `compile`, whatever is decided here.
//!
//! Decisions are shares in steps, so noise in measured capacity changes no share and no table. Demand follows from
//! the load and the share that is away; it bounds how much is moved, and the local load alone decides the direction.
//! Several regions may use the same free capacity: each takes a part of it, up to the middle between the thresholds,
//! and returns a part when it was too much. Property tests assert that constant input comes to rest, and that a
//! closed loop of up to four regions with a lag of up to three seconds does.

mod spill;
mod votes;
mod weights;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

pub use spill::Spill;
pub use votes::{Agreed, Vote, agreed};
pub use weights::{Member, Weighted, weights};

use crate::desired::model::{
    Locality, Name, RegionPolicy, RegionRules, RegionShares, Service, Share, WHOLE, region_list,
};
use serde::{Deserialize, Serialize};
use spill::LocalFirst;

/// Shares go in steps of so many thousandths.
pub const STEP: u16 = 25;

/// A region (or a zone of the own one), as one host sees it, for one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Name.
    pub name: Name,
    /// It is the host's own.
    pub is_local: bool,
    /// The service may run there.
    pub is_allowed: bool,
    /// The operator drains it.
    pub is_draining: bool,
    /// Vantage points agree that it is down.
    pub is_down: bool,
    /// It sends flows of this service elsewhere itself.
    pub is_spilling: bool,
    /// Backends that would take new flows now.
    pub backends: u32,
    /// Requests that they run at once; none if that is not known of them.
    pub capacity: Option<u64>,
    /// Requests that they have, running and waiting.
    pub load: u64,
    /// So much of it is old news that nothing should be concluded.
    pub is_stale: bool,
    /// Round-trip time from here, in microseconds.
    pub rtt_us: Option<u32>,
}

impl Place {
    /// It could take flows.
    fn is_usable(&self) -> bool {
        self.is_allowed && !self.is_draining && self.backends > 0
    }

    /// Requests that still fit until `percent` of its capacity are in use; below 0 when there are more already. None if
    /// that is not known.
    fn room(&self, percent: u16) -> Option<i64> {
        let full = i64::try_from(self.capacity?).ok()?.saturating_mul(percent.into()) / 100;
        Some(full.saturating_sub(i64::try_from(self.load).unwrap_or(i64::MAX)))
    }
}

/// All that is looked at.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// The service's rules.
    pub rules: &'a RegionRules,
    /// Its regions, the host's own among them if it has backends there.
    pub regions: &'a [Place],
    /// Zones of the own region.
    pub zones: &'a [Place],
    /// A steady clock, in milliseconds.
    pub now_ms: u64,
}

/// What was decided, and what the next decision needs to know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Shares of the regions; they add up to [`WHOLE`], or there are none: no region may take anything.
    pub shares: Vec<Share>,
    /// Shares of the own region's zones; none where zones make no difference.
    #[serde(default)]
    pub zones: Vec<Share>,
    /// Regions that may stand in, best first.
    #[serde(default)]
    pub order: Vec<Name>,
    /// The spill to other regions.
    #[serde(default)]
    pub spill: Spill,
    /// The spill to other zones.
    #[serde(default)]
    pub zone_spill: Spill,
    /// `active-passive`: since when a region before the active one is up again (steady clock).
    #[serde(default)]
    pub better_since_ms: Option<u64>,
    /// Why, for people.
    pub reason: String,
}

impl Decision {
    /// What `compile` needs of it.
    pub fn steer(&self) -> RegionShares {
        RegionShares {
            shares: self.shares.clone(),
            zones: self.zones.clone(),
            order: self.order.clone(),
            canary: None,
        }
    }

    /// Share of new flows that leave `here`, in thousandths.
    pub fn away(&self, here: &Name) -> u16 {
        self.shares.iter().filter(|s| s.name != *here).map(|s| s.permille).sum()
    }
}

fn all_to(name: &Name) -> Vec<Share> {
    vec![Share { name: name.clone(), permille: WHOLE }]
}

/// Regions that may stand in for each other, best first: those that vantage points think down come last; then by the
/// operator's order, or the own one and the nearest.
fn order(inputs: &Inputs<'_>) -> Vec<Name> {
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
pub fn decide(inputs: &Inputs<'_>, before: &Decision) -> Decision {
    let order = order(inputs);
    let place = |name: &Name| inputs.regions.iter().find(|p| p.name == *name);
    let usable = |and_up: bool| -> Vec<&Place> {
        let all = order.iter().filter_map(place);
        all.filter(|p| p.is_usable() && !(and_up && p.is_down)).collect()
    };
    let (up, mut note) = (usable(true), String::new());
    let candidates = if up.is_empty() {
        // The vote may be wrong, and refusing everything is worse than finding out.
        note = "; vantage points call it down, but nothing else is left".to_owned();
        usable(false)
    } else {
        up
    };
    let mut next = Decision { order: order.clone(), ..Decision::default() };
    let Some(first) = candidates.first() else {
        next.reason = nothing(inputs);
        return next;
    };
    match inputs.rules.policy {
        RegionPolicy::ActiveActive => active_active(inputs, &candidates, before, &mut next),
        RegionPolicy::ActivePassive => active_passive(inputs, &candidates, before, &mut next),
        RegionPolicy::Weighted => {
            let weight = |p: &&Place| inputs.rules.weights.get(&p.name).copied().unwrap_or(0);
            let weights: Vec<u32> = candidates.iter().map(weight).collect();
            next.shares = proportional(&candidates, &weights);
            next.reason = "by weight, over the regions that are up".to_owned();
            if next.shares.is_empty() {
                next.shares = all_to(&first.name);
                next.reason = format!("no region with a weight is up: all to {}", first.name);
            }
        }
    }
    next.reason.push_str(&note);
    zones(inputs, before, &mut next);
    next
}

/// Why nothing may take flows.
fn nothing(inputs: &Inputs<'_>) -> String {
    let elsewhere: Vec<String> = inputs
        .regions
        .iter()
        .filter(|p| !p.is_allowed && p.backends > 0)
        .map(|p| format!("{} in {}", p.backends, p.name))
        .collect();
    let draining = inputs.regions.iter().find(|p| p.is_allowed && p.is_draining && p.backends > 0);
    match (&inputs.rules.allowed, draining) {
        (_, Some(place)) => format!("refused: {} drains, and no other region may take its flows", place.name),
        (Some(allowed), None) if !elsewhere.is_empty() => format!(
            "refused by residency: no backend takes flows in {}, and those elsewhere ({}) may not",
            region_list(allowed),
            elsewhere.join(", ")
        ),
        _ => "refused: no backend takes flows in any region".to_owned(),
    }
}

/// Shares in proportion to weights, which add up exactly: the largest remainders are rounded up.
fn proportional(places: &[&Place], weights: &[u32]) -> Vec<Share> {
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

fn active_active(inputs: &Inputs<'_>, candidates: &[&Place], before: &Decision, next: &mut Decision) {
    let rules = inputs.rules;
    let local = candidates.iter().find(|p| p.is_local).copied();
    let others: Vec<&Place> = candidates.iter().filter(|p| !p.is_local).copied().collect();
    let first = LocalFirst {
        local,
        others: &others,
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

fn active_passive(inputs: &Inputs<'_>, candidates: &[&Place], before: &Decision, next: &mut Decision) {
    let best = &candidates[0].name;
    let active = before.shares.first().map(|s| &s.name);
    let stays = active.filter(|name| *name != best && candidates.iter().any(|p| p.name == **name));
    let Some(active) = stays else {
        next.shares = all_to(best);
        next.reason = format!("{best} is the first in order that is up");
        return;
    };
    let since_ms = before.better_since_ms.unwrap_or(inputs.now_ms);
    let hold_ms = u64::from(inputs.rules.hold_s) * 1_000;
    let stood_ms = inputs.now_ms.saturating_sub(since_ms);
    if stood_ms >= hold_ms {
        next.shares = all_to(best);
        next.reason = format!("{best} is back, and has stood for {} s", hold_ms / 1_000);
    } else {
        next.shares = all_to(active);
        next.better_since_ms = Some(since_ms);
        next.reason = format!(
            "{best} is back, and takes over from {active} when it has stood for {} s",
            hold_ms / 1_000
        );
    }
}

/// The same rule once more, between the zones of the own region: a neighbour of the same region is always allowed, and
/// nothing of the region is ever refused for it.
fn zones(inputs: &Inputs<'_>, before: &Decision, next: &mut Decision) {
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
        local: Some(local),
        others: &others,
        at: inputs.rules.spill_at_percent,
        until: inputs.rules.spill_until_percent,
        // Something must stay, or nothing would be measured any more.
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

/// What goes for a service of which nothing was measured yet; none if it has nothing to do with regions.
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
    let place = |name: &Name| Place {
        name: name.clone(),
        is_local: *name == here.region,
        is_allowed: true,
        is_draining: false,
        is_down: false,
        is_spilling: false,
        backends: 1,
        capacity: None,
        load: 0,
        is_stale: false,
        rtt_us: None,
    };
    let regions: Vec<Place> = names.into_iter().map(place).collect();
    let mut decision =
        decide(&Inputs { rules, regions: &regions, zones: &[], now_ms: 0 }, &Decision::default());
    if rules.zone_first {
        decision.zones = all_to(&here.zone);
    }
    Some(decision.steer())
}
