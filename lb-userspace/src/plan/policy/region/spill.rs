//! Local first: keeps flows local, and spills the excess to the nearest places with room. Called by [`super::decide`]
//! for regions and zones.

use super::{Place, STEP};
use crate::desired::model::{Share, WHOLE};
use serde::{Deserialize, Serialize};

/// Shortest time between two increases of a spill.
const RISE_MS: u64 = 1_000;
/// An increase that has not lowered the load after this time was too small.
const SETTLE_MS: u64 = 5_000;

/// The shares that go to other places.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spill {
    /// Shares by destination, in name order.
    pub shares: Vec<Share>,
    /// Time of the last change of the shares (monotonic clock).
    pub changed_ms: u64,
    /// Local load at the last change.
    pub load_then: u64,
    /// Last estimate of the requests that would be local without the spill.
    pub demand: u64,
}

impl Spill {
    fn share_of(&self, place: &Place) -> u16 {
        self.shares.iter().find(|s| s.name == place.name).map_or(0, |s| s.permille)
    }

    fn sum(&self) -> u16 {
        self.shares.iter().map(|s| s.permille).sum::<u16>().min(WHOLE)
    }
}

/// Inputs of one local-first decision.
pub(super) struct LocalFirst<'a> {
    /// The own place, if it can take flows.
    pub local: Option<&'a Place>,
    /// Other places that can take flows, nearest first.
    pub others: &'a [&'a Place],
    /// Load in percent of capacity at which spill begins.
    pub at: u16,
    /// Load in percent of capacity below which spill shrinks.
    pub until: u16,
    /// Largest share that may go elsewhere, in thousandths.
    pub most: u16,
    /// How long a spill is held before it shrinks.
    pub hold_ms: u64,
    pub now_ms: u64,
    /// `region` or `zone`, for reasons.
    pub what: &'static str,
}

fn percent(permille: u16) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}

impl LocalFirst<'_> {
    /// Shares of all places including the local one, in name order.
    pub fn shares(&self, spill: &Spill) -> Vec<Share> {
        let mut shares = spill.shares.clone();
        if let Some(local) = self.local {
            let permille = WHOLE - spill.sum();
            shares.extend((permille > 0).then(|| Share { name: local.name.clone(), permille }));
        }
        shares.sort_by(|a, b| a.name.cmp(&b.name));
        shares
    }

    /// Decides the spill, with a reason.
    pub fn decide(&self, before: &Spill) -> (Spill, String) {
        match self.local {
            Some(local) => self.spill(local, before),
            None => self.fail_over(before),
        }
    }

    fn spill(&self, local: &Place, before: &Spill) -> (Spill, String) {
        let (what, name) = (self.what, &local.name);
        // After a failover the local place starts without a spill.
        let sum = before.sum();
        let had = if sum < WHOLE { before.clone() } else { Spill::default() };
        if local.is_stale {
            let kept = self.remaining_shares(&had);
            let reason = format!("the reports of {name} are stale: keeping the previous decision");
            return (self.build_spill(&had, kept, had.demand, local.load), reason);
        }
        let Some(capacity) = local.capacity.filter(|&c| c > 0) else {
            let reason = format!("own {what} {name}, whose capacity is unknown");
            return (self.build_spill(&had, Vec::new(), 0, local.load), reason);
        };
        // A failover spill was reset above, since it says nothing about the demand.
        let away = had.sum();
        let demand = local.load.saturating_mul(WHOLE.into()) / u64::from(WHOLE - away);
        let in_use = |percent: u16| u128::from(capacity) * u128::from(percent);
        let load = u128::from(local.load) * 100;
        let (rises, falls) = (load >= in_use(self.at), away > 0 && load < in_use(self.until));
        let since_ms = self.now_ms.saturating_sub(had.changed_ms);
        let stays = u128::from(demand) * 200;
        let middle = in_use(self.at) + in_use(self.until);
        let kept_here = (middle * u128::from(WHOLE)).checked_div(stays).unwrap_or(WHOLE.into());
        let wanted = WHOLE - kept_here.min(WHOLE.into()) as u16;
        let mut why = "";
        let goal = if rises {
            let helped = local.load <= had.load_then && since_ms < SETTLE_MS;
            if away > 0 && (since_ms < RISE_MS || helped) {
                why = ", waiting for the effect of the current spill";
                away
            } else {
                wanted.div_ceil(STEP).saturating_mul(STEP).max(away).min(self.most)
            }
        } else if falls {
            if since_ms < self.hold_ms {
                why = ", holding the spill for a while";
                away
            } else {
                (wanted / STEP * STEP).min(away)
            }
        } else {
            away
        };
        let goal = goal.min(self.most);
        let spill = self.build_spill(&had, self.distribute(&had, goal, demand), demand, local.load);
        let used = u64::try_from(load / u128::from(capacity)).unwrap_or(u64::MAX);
        let sent = spill.sum();
        let reason = match (rises, sent) {
            (true, 0) if self.most == 0 => {
                format!("{name} is at {used} % of its capacity, and spill is disabled")
            }
            (true, 0) => format!("{name} is at {used} % of its capacity, and no other {what} has room"),
            (false, 0) => format!("own {what} {name}, at {used} % of its capacity"),
            (_, sent) => {
                let to: Vec<String> =
                    spill.shares.iter().map(|s| format!("{} to {}", percent(s.permille), s.name)).collect();
                let short = if rises && sent < goal { ", others have no more room" } else { why };
                let most = if rises && sent == self.most { ", the configured maximum" } else { "" };
                format!("{name} is at {used} % of its capacity: {} spill{short}{most}", to.join(", "))
            }
        };
        (spill, reason)
    }

    /// Shares of a spill to places that still exist.
    fn remaining_shares(&self, before: &Spill) -> Vec<(usize, u16)> {
        self.others
            .iter()
            .enumerate()
            .map(|(i, place)| (i, before.share_of(place)))
            .filter(|(_, p)| *p > 0)
            .collect()
    }

    /// Thousandths of the demand that another place keeps, and its limit.
    ///
    /// A place keeps its share while it is not above its own threshold, and gets more only up to the middle of the two
    /// thresholds, so that the spill does not make it spill itself. Other hosts may use the same room at the same time, so
    /// each takes only its part of the room; if too much was sent, each host takes back a part.
    fn limits(&self, place: &Place, before: &Spill, demand: u64) -> (u16, u16) {
        let (Some(room), false) = (place.room(self.at), place.is_spilling) else { return (0, 0) };
        let (has, parts) = (before.share_of(place), self.others.len().max(1) as i128);
        let demand = i128::from(demand.max(1));
        let whole = i128::from(WHOLE);
        let in_steps = |n: i128| (n.clamp(0, whole) / i128::from(STEP) * i128::from(STEP)) as u16;
        if room < 0 {
            let (too_much, load) = (-i128::from(room), i128::from(place.load.max(1)));
            let ours = demand * i128::from(has) / whole;
            let cut = (too_much / parts).max(too_much * ours / load).max(1) * whole / demand;
            let keeps = in_steps(i128::from(has) - cut);
            return (keeps, keeps);
        }
        let more = place.room(self.middle()).unwrap_or(0).max(0);
        (has, has.saturating_add(in_steps(i128::from(more) / parts * whole / demand)).min(WHOLE))
    }

    fn middle(&self) -> u16 {
        self.at.midpoint(self.until)
    }

    /// Brings the sum of the shares to `goal`, as far as places have room, with few changes: surplus is taken from the
    /// farthest place, missing share is given to the nearest.
    fn distribute(&self, before: &Spill, goal: u16, demand: u64) -> Vec<(usize, u16)> {
        let limits: Vec<(u16, u16)> =
            self.others.iter().map(|place| self.limits(place, before, demand)).collect();
        let mut given: Vec<u16> = limits.iter().map(|(keeps, _)| *keeps).collect();
        let mut sum: u16 = given.iter().sum();
        for share in given.iter_mut().rev() {
            let cut = sum.saturating_sub(goal).min(*share);
            *share -= cut;
            sum -= cut;
        }
        for (share, &(_, limit)) in given.iter_mut().zip(&limits) {
            let more = goal.saturating_sub(sum).min(limit.saturating_sub(*share));
            *share += more;
            sum += more;
        }
        given.into_iter().enumerate().filter(|(_, share)| *share > 0).collect()
    }

    /// Without a local place, sends all flows elsewhere: to the nearest places with room, and the rest to the nearest.
    fn fail_over(&self, before: &Spill) -> (Spill, String) {
        let Some(nearest) = self.others.first() else {
            return (Spill::default(), "no backend takes flows".to_owned());
        };
        let demand = before.demand;
        let mut given = if demand > 0 { self.distribute(before, WHOLE, demand) } else { Vec::new() };
        let rest = WHOLE - given.iter().map(|(_, share)| share).sum::<u16>();
        match given.iter_mut().find(|(i, _)| *i == 0) {
            Some((_, share)) => *share += rest,
            None if rest > 0 => given.push((0, rest)),
            None => {}
        }
        let spill = self.build_spill(before, given, demand, before.load_then);
        let to: Vec<String> =
            spill.shares.iter().map(|s| format!("{} to {}", percent(s.permille), s.name)).collect();
        let reason = match to.len() {
            1 => format!("the own {} takes no flows: all to {}, the nearest", self.what, nearest.name),
            _ => format!("the own {} takes no flows: {}", self.what, to.join(", ")),
        };
        (spill, reason)
    }

    /// Builds a spill with these shares, keeping the time of the last change.
    fn build_spill(&self, before: &Spill, given: Vec<(usize, u16)>, demand: u64, load: u64) -> Spill {
        let share = |(i, permille): (usize, u16)| Share { name: self.others[i].name.clone(), permille };
        let mut shares: Vec<Share> = given.into_iter().map(share).collect();
        shares.sort_by(|a, b| a.name.cmp(&b.name));
        let (changed_ms, load_then) =
            if shares == before.shares { (before.changed_ms, before.load_then) } else { (self.now_ms, load) };
        Spill { shares, changed_ms, load_then, demand }
    }
}
