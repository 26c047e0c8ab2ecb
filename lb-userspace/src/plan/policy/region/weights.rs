//! From shares to weights: so that a table that is dealt by weight gives each region, zone and version its share.
//!
//! Input: backends with weight, place and version, and a [`RegionShares`]. Output: weights, and who takes flows. Pure and
//! exact on every host: the same shares give the same weights. Called by `compile`.
//!
//! A spill moves its own share of the slots and about a tenth of that more; when it ends every slot is back where it
//! was.

use crate::desired::model::{Locality, Name, RegionShares, Share, WHOLE};
use std::collections::BTreeMap;

/// Parts that a weight is divided into at most.
const FINEST: u32 = 1 << 16;
/// Largest weight that a table is dealt by.
const HEAVIEST: u32 = 1 << 31;

/// A backend, as far as its share is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Its weight.
    pub weight: u32,
    /// It may take flows.
    pub eligible: bool,
    /// Its region.
    pub region: &'a Name,
    /// Its zone.
    pub zone: &'a Name,
    /// It runs the version that comes in.
    pub is_new: bool,
}

/// Weights for a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weighted {
    /// Of each member.
    pub weights: Vec<u32>,
    /// Which members take new flows.
    pub takes: Vec<bool>,
    /// How many times as much a full weight counts in them.
    pub scale: u32,
}

/// Members that share one share.
type Group<'a> = (&'a Name, bool, Option<&'a Name>);

/// What of `shares` goes to each of those that are there, as parts of 1; if to nobody, all to the best of the rest.
fn present<'a>(
    shares: &'a [Share],
    there: impl Fn(&Name) -> bool,
    best: Option<&'a Name>,
) -> Vec<(&'a Name, f64)> {
    let left: Vec<&Share> = shares.iter().filter(|s| s.permille > 0 && there(&s.name)).collect();
    let sum: f64 = left.iter().map(|s| f64::from(s.permille)).sum();
    match (left.is_empty(), best) {
        (false, _) => left.iter().map(|s| (&s.name, f64::from(s.permille) / sum)).collect(),
        (true, Some(best)) => vec![(best, 1.0)],
        (true, None) => Vec::new(),
    }
}

/// Works out the weights. `heaviest` is the largest weight that the table's history knows.
pub fn weights<'a>(
    members: &'a [Member<'a>],
    steer: &'a RegionShares,
    here: &'a Locality,
    heaviest: u32,
) -> Weighted {
    let mut sums: BTreeMap<(&'a Name, bool, &'a Name), u64> = BTreeMap::new();
    for m in members.iter().filter(|m| m.eligible && m.weight > 0) {
        *sums.entry((m.region, m.is_new, m.zone)).or_default() += u64::from(m.weight);
    }
    let groups = groups(&sums, steer, here);
    let mut totals: BTreeMap<Group<'a>, u64> = BTreeMap::new();
    let group = |region: &'a Name, is_new: bool, zone: &'a Name| -> Group<'a> {
        let zoned = groups.contains_key(&(region, is_new, Some(zone)));
        (region, is_new, zoned.then_some(zone))
    };
    for (&(region, is_new, zone), &weight) in &sums {
        *totals.entry(group(region, is_new, zone)).or_default() += weight;
    }
    // What one unit of weight gets.
    let rates: BTreeMap<Group<'a>, f64> = groups
        .iter()
        .filter(|(_, share)| **share > 0.0)
        .filter_map(|(g, share)| Some((*g, share / *totals.get(g).filter(|&&t| t > 0)? as f64)))
        .collect();
    let most = rates.values().copied().fold(0.0, f64::max);
    let rate = |m: &Member<'a>| -> f64 {
        if !m.eligible || m.weight == 0 {
            return 0.0;
        }
        rates.get(&group(m.region, m.is_new, m.zone)).map_or(0.0, |rate| rate / most)
    };
    let rates: Vec<f64> = members.iter().map(rate).collect();
    let is_plain = rates.iter().all(|&r| r == 0.0 || r > 1.0 - 1e-9);
    let heaviest = members.iter().map(|m| m.weight).chain([heaviest, 1]).max().unwrap_or(1);
    let scale = if is_plain { 1 } else { (HEAVIEST / heaviest).clamp(1, FINEST) };
    let weight = |(m, &rate): (&Member<'a>, &f64)| match rate > 0.0 {
        true => ((f64::from(m.weight) * f64::from(scale) * rate).round() as u32).max(1),
        // It keeps its place in the table.
        false => m.weight * scale,
    };
    Weighted {
        weights: members.iter().zip(&rates).map(weight).collect(),
        takes: rates.iter().map(|&rate| rate > 0.0).collect(),
        scale,
    }
}

/// Each group's part of all flows: regions first, in each the versions, in the own one its zones.
fn groups<'a>(
    sums: &BTreeMap<(&'a Name, bool, &'a Name), u64>,
    steer: &'a RegionShares,
    here: &'a Locality,
) -> BTreeMap<Group<'a>, f64> {
    let has = |region: &Name, is_new: Option<bool>| {
        sums.keys().any(|(r, n, _)| *r == region && is_new.is_none_or(|is_new| *n == is_new))
    };
    // Somebody who may take flows is better than nobody, whatever was decided before he was all that is left.
    let stands_in = |is_new: Option<bool>| -> Option<&'a Name> {
        let known = steer.order.iter().find(|region| has(region, is_new));
        let any = || sums.keys().find(|(_, n, _)| is_new.is_none_or(|is_new| *n == is_new)).map(|(r, ..)| *r);
        known.or_else(any)
    };
    let mut parts: BTreeMap<(&'a Name, bool), f64> = BTreeMap::new();
    for (region, share) in present(&steer.shares, |r| has(r, None), stands_in(None)) {
        let new = match (&steer.canary, has(region, Some(true)), has(region, Some(false))) {
            (Some(canary), true, true) => f64::from(canary.permille.min(WHOLE)) / f64::from(WHOLE),
            // Only the new version is here: what is not its share goes to the old one elsewhere, if that is anywhere.
            (Some(canary), true, false) => match stands_in(Some(false)) {
                Some(other) => {
                    let new = f64::from(canary.permille.min(WHOLE)) / f64::from(WHOLE);
                    *parts.entry((other, false)).or_default() += share * (1.0 - new);
                    *parts.entry((region, true)).or_default() += share * new;
                    continue;
                }
                None => 1.0,
            },
            // Promoted, and only the old one is here: as long as nobody runs the new one here, it serves.
            (_, is_new, _) => f64::from(u8::from(is_new && !has(region, Some(false)))),
        };
        *parts.entry((region, true)).or_default() += share * new;
        *parts.entry((region, false)).or_default() += share * (1.0 - new);
    }
    let mut groups = BTreeMap::new();
    for ((region, is_new), part) in parts.into_iter().filter(|(_, part)| *part > 0.0) {
        let in_zone = |zone: &Name| sums.contains_key(&(region, is_new, zone));
        let zones = match *region == here.region {
            true => present(&steer.zones, in_zone, None),
            false => Vec::new(),
        };
        if zones.is_empty() {
            groups.insert((region, is_new, None), part);
        }
        groups.extend(zones.into_iter().map(|(zone, share)| ((region, is_new, Some(zone)), part * share)));
    }
    groups
}
