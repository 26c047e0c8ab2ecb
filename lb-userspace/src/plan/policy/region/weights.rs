//! Converts shares to weights, so that a table built by weight gives each region, zone and version its share.
//!
//! Input: backends with weight, region, zone and version, and [`RegionShares`]. Output: weights, and which backends take
//! flows. Pure and equal on every host: the same shares give the same weights. Called by `compile`.
//!
//! A spill moves its own share of the slots and about a tenth of that more; when it ends every slot is back where it
//! was.

use crate::desired::model::{Canary, Locality, Name, RegionShares, Share, WHOLE};
use std::collections::BTreeMap;

/// Largest factor by which weights are scaled up.
const MAX_SCALE: u32 = 1 << 16;
/// Largest weight of a table.
const MAX_WEIGHT: u32 = 1 << 31;

/// A backend as input of [`weights`].
#[derive(Clone, Copy, Debug)]
pub struct RegionMember<'a> {
    /// Weight of the backend.
    pub weight: u32,
    /// Whether the backend may take flows.
    pub eligible: bool,
    /// Region of the backend.
    pub region: &'a Name,
    /// Zone of the backend.
    pub zone: &'a Name,
    /// Whether the backend runs the version that is being rolled out.
    pub is_new: bool,
}

/// Weights for a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weighted {
    /// Weight of each member.
    pub weights: Vec<u32>,
    /// Whether each member takes new flows.
    pub takes: Vec<bool>,
    /// Factor of these weights over the configured ones.
    pub scale: u32,
    /// Number of each member's group, from 1: members of a group have one share together. Empty if there is one group.
    pub groups: Vec<u32>,
}

/// Members that share one share: region, version, and zone if zones count.
type Group<'a> = (&'a Name, bool, Option<&'a Name>);

/// Normalises the shares of existing places to a sum of 1; if none exists, gives everything to `best`.
fn normalize_shares<'a>(
    shares: &'a [Share],
    exists: impl Fn(&Name) -> bool,
    best: Option<&'a Name>,
) -> Vec<(&'a Name, f64)> {
    let left: Vec<&Share> = shares.iter().filter(|s| s.permille > 0 && exists(&s.name)).collect();
    let sum: f64 = left.iter().map(|s| f64::from(s.permille)).sum();
    match (left.is_empty(), best) {
        (false, _) => left.iter().map(|s| (&s.name, f64::from(s.permille) / sum)).collect(),
        (true, Some(best)) => vec![(best, 1.0)],
        (true, None) => Vec::new(),
    }
}

/// Computes the weights. `heaviest` is the largest weight in the table's history.
pub fn weights<'a>(
    members: &'a [RegionMember<'a>],
    steer: &'a RegionShares,
    here: &'a Locality,
    heaviest: u32,
) -> Weighted {
    let mut sums: BTreeMap<(&'a Name, bool, &'a Name), u64> = BTreeMap::new();
    for m in members.iter().filter(|m| m.eligible && m.weight > 0) {
        *sums.entry((m.region, m.is_new, m.zone)).or_default() += u64::from(m.weight);
    }
    let groups = group_parts(&sums, steer, here);
    let mut totals: BTreeMap<Group<'a>, u64> = BTreeMap::new();
    let group = |region: &'a Name, is_new: bool, zone: &'a Name| -> Group<'a> {
        let zoned = groups.contains_key(&(region, is_new, Some(zone)));
        (region, is_new, zoned.then_some(zone))
    };
    for (&(region, is_new, zone), &weight) in &sums {
        *totals.entry(group(region, is_new, zone)).or_default() += weight;
    }
    // Share per unit of weight.
    let rates: BTreeMap<Group<'a>, f64> = groups
        .iter()
        .filter(|(_, share)| **share > 0.0)
        .filter_map(|(g, share)| Some((*g, share / *totals.get(g).filter(|&&t| t > 0)? as f64)))
        .collect();
    let most = rates.values().copied().fold(0.0, f64::max);
    let rate = |m: &RegionMember<'a>| -> f64 {
        if !m.eligible || m.weight == 0 {
            return 0.0;
        }
        rates.get(&group(m.region, m.is_new, m.zone)).map_or(0.0, |rate| rate / most)
    };
    let rates: Vec<f64> = members.iter().map(rate).collect();
    let is_plain = rates.iter().all(|&r| r == 0.0 || r > 1.0 - 1e-9);
    let heaviest = members.iter().map(|m| m.weight).chain([heaviest, 1]).max().unwrap_or(1);
    let scale = if is_plain { 1 } else { (MAX_WEIGHT / heaviest).clamp(1, MAX_SCALE) };
    let weight = |(m, &rate): (&RegionMember<'a>, &f64)| match rate > 0.0 {
        true => ((f64::from(m.weight) * f64::from(scale) * rate).round() as u32).max(1),
        // Keeps its seat in the table.
        false => m.weight * scale,
    };
    Weighted {
        weights: members.iter().zip(&rates).map(weight).collect(),
        takes: rates.iter().map(|&rate| rate > 0.0).collect(),
        scale,
        groups: number_groups(members.iter().map(|m| group(m.region, m.is_new, m.zone))),
    }
}

/// Numbers groups from 1; nothing if there is only one.
fn number_groups<'a>(groups: impl Iterator<Item = Group<'a>>) -> Vec<u32> {
    let mut numbers = BTreeMap::new();
    let all: Vec<u32> = groups
        .map(|group| {
            let next = numbers.len() as u32 + 1;
            *numbers.entry(group).or_insert(next)
        })
        .collect();
    if numbers.len() > 1 { all } else { Vec::new() }
}

/// Each group's part of all flows: by region, within it by version, and in the own region by zone.
fn group_parts<'a>(
    sums: &BTreeMap<(&'a Name, bool, &'a Name), u64>,
    steer: &'a RegionShares,
    here: &'a Locality,
) -> BTreeMap<Group<'a>, f64> {
    let has = |region: &Name, is_new: Option<bool>| {
        sums.keys().any(|(r, n, _)| *r == region && is_new.is_none_or(|is_new| *n == is_new))
    };
    // A remaining region that may take flows is better than refusing flows, even against the decision.
    let fallback = |is_new: Option<bool>| -> Option<&'a Name> {
        let known = steer.order.iter().find(|region| has(region, is_new));
        let any = || sums.keys().find(|(_, n, _)| is_new.is_none_or(|is_new| *n == is_new)).map(|(r, ..)| *r);
        known.or_else(any)
    };
    let mut parts: BTreeMap<(&'a Name, bool), f64> = BTreeMap::new();
    for (region, share) in normalize_shares(&steer.shares, |r| has(r, None), fallback(None)) {
        let share_in = |canary: &Canary| f64::from(canary.share_in(region)) / f64::from(WHOLE);
        let new = match (&steer.canary, has(region, Some(true)), has(region, Some(false))) {
            (Some(canary), true, true) => share_in(canary),
            // Only the new version exists in this region: the rest goes to the old version elsewhere, if it exists.
            (Some(canary), true, false) => match fallback(Some(false)) {
                Some(other) => {
                    let new = share_in(canary);
                    *parts.entry((other, false)).or_default() += share * (1.0 - new);
                    *parts.entry((region, true)).or_default() += share * new;
                    continue;
                }
                None => 1.0,
            },
            // Without a canary, or with only one version in this region, the existing version serves.
            (_, is_new, _) => f64::from(u8::from(is_new && !has(region, Some(false)))),
        };
        *parts.entry((region, true)).or_default() += share * new;
        *parts.entry((region, false)).or_default() += share * (1.0 - new);
    }
    let mut groups = BTreeMap::new();
    for ((region, is_new), part) in parts.into_iter().filter(|(_, part)| *part > 0.0) {
        let in_zone = |zone: &Name| sums.contains_key(&(region, is_new, zone));
        let zones = match *region == here.region {
            true => normalize_shares(&steer.zones, in_zone, None),
            false => Vec::new(),
        };
        if zones.is_empty() {
            groups.insert((region, is_new, None), part);
        }
        groups.extend(zones.into_iter().map(|(zone, share)| ((region, is_new, Some(zone)), part * share)));
    }
    groups
}
