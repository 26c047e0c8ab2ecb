//! Local first: keeps flows local, and spills the excess to the nearest places with room. Called by [`super::decide`]
//! for regions and zones.
//!
//! Three steps, once per call: [`Estimator`] finds the demand of each place, [`allocate`] divides the free slots among
//! all places that ask, and this module moves the shares towards the own part. It is quick to spill and slow to return:
//!
//! * It **grows** while load is above `at` or work is pending, at most once a second. It does not react twice to
//!   reports that are older than its last change: for the time that reports are late, it assumes the smallest demand
//!   that explains them.
//! * It **shrinks** only after the demand has been below `until` for `hold_ms`, to the share that the demand needs.
//! * What is sent to one place shrinks when that place is overloaded, or when others ask for the same slots.

use super::{
    PeerPlace, Place, STEP,
    allocate::{Allocation, Site, allocate},
    estimate::{Estimate, Estimator},
};
use crate::desired::model::{Name, Share, WHOLE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Shortest time between two increases of a spill.
const RISE_MS: u64 = 1_000;
/// Time from a report to the effect of the decision on it, besides the interval of reports.
const REACTION_MS: u64 = 1_000;
/// A backlog is to be gone after this time, if there is room elsewhere.
const DRAIN_MS: u64 = 5_000;
/// Largest part of a backlog, in slots, by which a place takes less.
const MOST_DRAIN: f64 = 0.5;
/// The same part without a known service time, of at most as many requests as there are slots.
const USUAL_DRAIN: f64 = 0.25;
/// A place with this many times its capacity in load is overloaded: chance alone queues a few requests.
const OVERLOAD: f64 = 1.25;
/// Time for which a spill must find no room before that is reported.
const UNPLACED_MS: u64 = 3_000;

/// The shares that go to other places.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spill {
    /// Shares by destination, in name order.
    pub shares: Vec<Share>,
    /// Time of the last change of the shares (monotonic clock).
    pub changed_ms: u64,
    /// Local load at the last change.
    pub load_then: u64,
    /// Estimate of the slots that the flows of this place's clients need, wherever they run.
    pub demand: u64,
    /// Requests that should be in another place, but no place that may take them has room.
    #[serde(default)]
    pub unplaced: u64,
    /// Since when requests have been without a place.
    #[serde(skip)]
    unplaced_since_ms: Option<u64>,
    /// Since when more should be sent away.
    #[serde(skip)]
    above_since_ms: Option<u64>,
    /// Since when the demand has been small enough to shrink.
    #[serde(skip)]
    below_since_ms: Option<u64>,
    /// Places whose share was cut because they were overloaded, and that still are.
    #[serde(skip)]
    cut: Vec<Name>,
    #[serde(skip)]
    estimator: Estimator,
}

impl Spill {
    fn share_of(&self, place: &Place) -> u16 {
        self.shares.iter().find(|s| s.name == place.name).map_or(0, |s| s.permille)
    }

    /// Notes requests without a place; they count once they have lasted.
    pub(super) fn note_unplaced(&mut self, unplaced: f64, now_ms: u64) {
        self.unplaced_since_ms = (unplaced >= 1.0).then(|| self.unplaced_since_ms.unwrap_or(now_ms));
        let lasts = self.unplaced_since_ms.is_some_and(|at| now_ms.saturating_sub(at) >= UNPLACED_MS);
        self.unplaced = if lasts { unplaced.round() as u64 } else { 0 };
    }

    fn sum(&self) -> u16 {
        self.shares.iter().map(|s| s.permille).sum::<u16>().min(WHOLE)
    }

    /// Replaces the shares by those of another host's decision. `before` is the state before this decision.
    pub fn follow(&mut self, before: &Self, shares: Vec<Share>, now_ms: u64) {
        (self.changed_ms, self.load_then) = (before.changed_ms, before.load_then);
        if shares != before.shares {
            self.changed_ms = now_ms;
        }
        self.shares = shares;
    }
}

/// Inputs of one local-first decision.
pub(super) struct LocalFirst<'a> {
    /// Name of the own place.
    pub here: &'a Name,
    /// The own place, if it can take flows.
    pub local: Option<&'a Place>,
    /// Other places that can take flows, nearest first.
    pub others: &'a [&'a Place],
    /// Decisions of other places.
    pub peers: &'a [PeerPlace],
    /// Load in percent of capacity at which spill begins.
    pub at: u16,
    /// Load in percent of capacity below which spill shrinks.
    pub until: u16,
    /// Largest share that may go elsewhere, in thousandths.
    pub most: u16,
    /// How long the demand must be small before a spill shrinks.
    pub hold_ms: u64,
    /// Interval of the replicas' reports.
    pub interval_ms: u64,
    pub now_ms: u64,
    /// `region` or `zone`, for reasons.
    pub what: &'static str,
}

/// Own part of an allocation.
struct SpillPlan {
    /// Slots that have to leave.
    excess: f64,
    /// Thousandths of the demand by place, in the order of `others`.
    targets: Vec<f64>,
    /// Thousandths of the demand that have to leave, and find room.
    placed: f64,
    unplaced: f64,
    /// Full slots and waiting requests by capacity of each place that is overloaded, otherwise 0.
    overload: Vec<f64>,
    /// Whether a place is overloaded, by whatever.
    is_full: Vec<bool>,
    /// Whether others ask for a place's slots.
    contended: Vec<bool>,
}

impl SpillPlan {
    /// Thousandths of a demand that have to leave, whether there is room or not.
    fn share_away(&self, demand: f64) -> f64 {
        self.excess / demand.max(1e-9) * f64::from(WHOLE)
    }
}

fn percent(permille: u16) -> String {
    format!("{}.{} %", permille / 10, permille % 10)
}

/// Rounds up to a whole number of steps.
fn in_steps(permille: f64) -> u16 {
    let steps = (permille / f64::from(STEP) - 0.02).ceil().max(0.0) as u16;
    steps.saturating_mul(STEP).min(WHOLE)
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
        let mut next = before.clone();
        if self.local.is_some() && next.sum() == WHOLE {
            // After a failover the local place starts without a spill.
            self.set(&mut next, Vec::new());
        }
        let estimates = self.estimate(&mut next);
        let reason = match self.local {
            Some(local) => self.spill(local, &mut next, &estimates),
            None => self.fail_over(&mut next, &estimates),
        };
        (next, reason)
    }

    /// Reports are at most this old, and show what was decided before.
    fn window_ms(&self) -> u64 {
        self.interval_ms + REACTION_MS
    }

    fn estimate(&self, spill: &mut Spill) -> BTreeMap<Name, Estimate> {
        let own = self.shares(spill);
        let mut shares: BTreeMap<&Name, &[Share]> =
            self.peers.iter().map(|peer| (&peer.name, &peer.shares[..])).collect();
        shares.insert(self.here, &own);
        let places: Vec<&Place> = self.local.iter().chain(self.others).copied().collect();
        spill.estimator.update(&places, &shares, self.window_ms(), self.now_ms)
    }

    /// Allocates the free slots of all places, if the own demand is `demand`.
    fn plan(&self, estimates: &BTreeMap<Name, Estimate>, spill: &Spill, demand: f64) -> SpillPlan {
        let (at, until) = (f64::from(self.at) / 100.0, f64::from(self.until) / 100.0);
        let place = |name: &Name| self.others.iter().find(|p| p.name == *name);
        let mut names: Vec<&Name> = self.others.iter().map(|p| &p.name).collect();
        let nearest: Vec<usize> = (1..=names.len()).collect();
        names.extend(
            self.peers.iter().map(|p| &p.name).filter(|name| place(name).is_none() && *name != self.here),
        );
        let all: Vec<&Name> = std::iter::once(self.here).chain(names.iter().copied()).collect();
        let site = |name: &&Name| {
            let e = estimates.get(*name).copied().unwrap_or_default();
            let here = self.local.filter(|p| p.name == **name);
            let place = here.or(place(name).copied());
            let peer = self.peers.iter().find(|p| p.name == **name);
            let spills = peer.is_some_and(|p| p.shares.iter().any(|s| s.name != p.name));
            let capacity = if place.is_some() { e.capacity } else { 0.0 };
            Site {
                demand: if *name == self.here { demand } else { e.demand },
                capacity,
                drain: self.drain(place, (e.waiting - capacity / 8.0).max(0.0), capacity),
                asks: *name == self.here || spills || capacity == 0.0 || e.load >= at * capacity,
                gives: place.is_some_and(|p| !p.is_stale && p.capacity.is_some()),
                order: match peer {
                    _ if *name == self.here => nearest.clone(),
                    Some(peer) => order_of(peer, &all),
                    None => Vec::new(),
                },
            }
        };
        let sites: Vec<Site> = all.iter().map(site).collect();
        let Allocation { given, unplaced, is_contended } = allocate(&sites, at.midpoint(until), at);
        let part = |to: usize| given[0][to] / demand.max(1e-9) * f64::from(WHOLE);
        let is_full = |p: &&Place| {
            let e = estimates.get(&p.name).copied().unwrap_or_default();
            let is_over = e.load > OVERLOAD * at.max(1.0) * e.capacity && e.waiting > e.capacity / 4.0;
            is_over || e.waiting > 2.0 * e.capacity
        };
        let overload = |p: &&Place| {
            let e = estimates.get(&p.name).copied().unwrap_or_default();
            let is_mine = is_full(p) && spill.share_of(p) > 0;
            if is_mine { 1.0 + e.waiting / e.capacity.max(1.0) } else { 0.0 }
        };
        SpillPlan {
            excess: given[0].iter().sum::<f64>() + unplaced[0],
            placed: nearest.iter().map(|&to| part(to)).sum(),
            targets: nearest.iter().map(|&to| part(to)).collect(),
            unplaced: unplaced[0],
            overload: self.others.iter().map(overload).collect(),
            is_full: self.others.iter().map(is_full).collect(),
            contended: nearest.iter().map(|&to| is_contended[to]).collect(),
        }
    }

    /// Slots by which a place takes less until its backlog is gone.
    fn drain(&self, place: Option<&Place>, backlog: f64, capacity: f64) -> f64 {
        let within_ms = DRAIN_MS.max(2 * self.window_ms()) as f64;
        match place.and_then(|p| p.service_ms) {
            Some(ms) => backlog * (f64::from(ms) / within_ms).min(MOST_DRAIN),
            None => USUAL_DRAIN * backlog.min(capacity),
        }
    }

    fn spill(&self, local: &Place, next: &mut Spill, estimates: &BTreeMap<Name, Estimate>) -> String {
        let (what, name) = (self.what, &local.name);
        if local.is_stale {
            let kept = self.present_shares(next);
            self.set(next, kept);
            return format!("the reports of {name} are stale: keeping the previous decision");
        }
        let Some(capacity) = local.capacity.filter(|&c| c > 0) else {
            self.set(next, Vec::new());
            return format!("own {what} {name}, whose capacity is unknown");
        };
        let own = estimates.get(self.here).copied().unwrap_or_default();
        // To leave, as little as may be necessary, and to each place, as little as may fill it.
        let is_quiet = self.now_ms.saturating_sub(next.changed_ms) >= self.window_ms();
        let likely = if is_quiet { own.demand } else { own.demand.midpoint(own.most.min(4.0 * own.demand)) };
        let mut plan = self.plan(estimates, next, likely);
        if is_quiet {
            self.use_free_slots(&mut plan, next, estimates);
        }
        let needed = self.plan(estimates, next, own.least);
        let limit = |percent: u16| f64::from(percent) / 100.0 * own.capacity;
        let is_pending = own.waiting * 2.0 >= own.capacity;
        let rises = own.load >= limit(self.at) || is_pending;
        let falls = !is_pending && (own.load < limit(self.until) || own.most < limit(self.until));
        let since_ms = self.now_ms.saturating_sub(next.changed_ms);
        let mut given = self.keep(next, &plan, since_ms);
        self.note_cuts(next, &plan, &given);
        let wanted = in_steps(needed.share_away(own.least)).min(self.most);
        let is_held = self.holds_below(next, falls);
        let may_rise = next.sum() == 0 || since_ms >= RISE_MS;
        if self.waits_for_senders(next, rises && wanted > next.sum()) {
            // Nothing: what is sent here goes first.
        } else if rises && may_rise {
            self.give(&mut given, (&plan, &next.cut), wanted);
        } else if !rises && falls && !is_held {
            take(&mut given, in_steps(plan.placed));
            next.below_since_ms = None;
        }
        take(&mut given, self.most);
        self.set(next, given.iter().copied().enumerate().filter(|(_, share)| *share > 0).collect());
        next.demand = own.demand.round() as u64;
        next.note_unplaced(if rises { needed.unplaced } else { 0.0 }, self.now_ms);
        let used = local.load.saturating_mul(100) / capacity;
        self.reason(name, used, (rises, falls && is_held), next)
    }

    /// What is free although all shares had their effect may be used, whatever the estimates say: half of it per step.
    fn use_free_slots(&self, plan: &mut SpillPlan, spill: &Spill, estimates: &BTreeMap<Name, Estimate>) {
        let demand = estimates.get(self.here).map_or(0.0, |own| own.demand).max(1.0);
        for (target, place) in plan.targets.iter_mut().zip(self.others) {
            let e = estimates.get(&place.name).copied().unwrap_or_default();
            let free = f64::from(self.at.min(100)) / 100.0 * e.capacity - e.load;
            let more = free / 2.0 / demand * f64::from(WHOLE);
            if more > 0.0 && place.capacity.is_some() && !place.is_stale {
                *target = target.max(f64::from(spill.share_of(place)) + more);
            }
        }
    }

    /// Whether a spill must not grow yet: others send to this place, and take that back when it is overloaded.
    fn waits_for_senders(&self, spill: &mut Spill, wants: bool) -> bool {
        spill.above_since_ms = wants.then(|| spill.above_since_ms.unwrap_or(self.now_ms));
        let receives =
            self.peers.iter().any(|p| p.name != *self.here && p.shares.iter().any(|s| s.name == *self.here));
        let waits_ms = self.window_ms() + RISE_MS;
        receives && spill.above_since_ms.is_some_and(|at| self.now_ms.saturating_sub(at) < waits_ms)
    }

    /// Whether a spill must not shrink yet.
    fn holds_below(&self, spill: &mut Spill, falls: bool) -> bool {
        let since = falls.then(|| spill.below_since_ms.unwrap_or(self.now_ms));
        spill.below_since_ms = since;
        since.is_some_and(|at| self.now_ms.saturating_sub(at.max(spill.changed_ms)) < self.hold_ms)
    }

    fn reason(&self, name: &Name, used: u64, (rises, is_held): (bool, bool), spill: &Spill) -> String {
        let what = self.what;
        let nowhere = match spill.unplaced {
            0 => String::new(),
            n => format!("; spill wanted, nowhere to go: no allowed {what} has room for about {n} requests"),
        };
        if spill.shares.is_empty() {
            return match (rises, self.most) {
                (true, 0) => format!("{name} is at {used} % of its capacity, and spill is disabled"),
                (true, _) if self.others.is_empty() => {
                    format!(
                        "{name} is at {used} % of its capacity, and no other {what} may take flows{nowhere}"
                    )
                }
                (true, _) => {
                    format!(
                        "{name} is at {used} % of its capacity, and keeps the flows of its own clients{nowhere}"
                    )
                }
                (false, _) => format!("own {what} {name}, at {used} % of its capacity"),
            };
        }
        let to: Vec<String> =
            spill.shares.iter().map(|s| format!("{} to {}", percent(s.permille), s.name)).collect();
        let why = match (rises, is_held) {
            (true, _) if spill.sum() >= self.most => ", the configured maximum",
            (false, true) => ", holding the spill for a while",
            _ => "",
        };
        format!("{name} is at {used} % of its capacity: {} spill{why}{nowhere}", to.join(", "))
    }

    /// Shares of a spill to places that still exist.
    fn present_shares(&self, spill: &Spill) -> Vec<(usize, u16)> {
        let all = self.others.iter().enumerate().map(|(i, place)| (i, spill.share_of(place)));
        all.filter(|(_, p)| *p > 0).collect()
    }

    /// What each place keeps of its share: less if it is overloaded or contended, nothing if it is not measured.
    fn keep(&self, spill: &Spill, plan: &SpillPlan, since_ms: u64) -> Vec<u16> {
        let keep = |(i, place): (usize, &&Place)| {
            let (has, target) = (spill.share_of(place), in_steps(plan.targets[i]));
            if place.capacity.is_none_or(|c| c == 0) {
                return 0;
            }
            let may_cut = !place.is_stale && since_ms >= self.window_ms();
            let fits = (f64::from(has) / plan.overload[i].max(1.0)) as u16 / STEP * STEP;
            match (plan.overload[i] > 0.0, plan.contended[i]) {
                (true, _) if may_cut => {
                    has.saturating_sub(STEP).min(target.max(fits).max(has / 2 / STEP * STEP))
                }
                (_, true) if may_cut && target + STEP < has => target,
                _ => has,
            }
        };
        self.others.iter().enumerate().map(keep).collect()
    }

    /// Remembers places that have just lost share by overload, until they are no longer overloaded.
    fn note_cuts(&self, spill: &mut Spill, plan: &SpillPlan, given: &[u16]) {
        let places = self.others.iter().zip(given).zip(plan.is_full.iter().zip(&plan.overload));
        let cut = places.filter(|((place, share), (is_full, overload))| {
            let is_cut = **overload > 0.0 && **share < spill.share_of(place);
            **is_full && (is_cut || spill.cut.contains(&place.name))
        });
        spill.cut = cut.map(|((place, _), _)| place.name.clone()).collect();
    }

    /// Raises the sum of the shares to `goal`: each place gets up to its target, the nearest first. One that was cut gets no
    /// more while it is overloaded, or it would be cut and raised for ever.
    fn give(&self, given: &mut [u16], (plan, cut): (&SpillPlan, &[Name]), goal: u16) {
        let mut sum: u16 = given.iter().sum();
        for ((share, target), place) in given.iter_mut().zip(&plan.targets).zip(self.others) {
            if cut.contains(&place.name) {
                continue;
            }
            let more = goal.saturating_sub(sum).min(in_steps(*target).saturating_sub(*share));
            *share += more;
            sum += more;
        }
    }

    /// Without a local place, sends all flows elsewhere: to the nearest places with room, and the rest by capacity.
    fn fail_over(&self, next: &mut Spill, estimates: &BTreeMap<Name, Estimate>) -> String {
        let Some(nearest) = self.others.first() else {
            self.set(next, Vec::new());
            return "no backend takes flows".to_owned();
        };
        let demand = estimates.get(self.here).map_or(0.0, |e| e.demand);
        let plan = self.plan(estimates, next, demand);
        let since_ms = self.now_ms.saturating_sub(next.changed_ms);
        let is_over = plan.overload.iter().any(|o| *o > 0.0) && since_ms >= self.window_ms();
        let is_gone = self.present_shares(next).iter().map(|(_, share)| share).sum::<u16>() < WHOLE;
        if is_gone || is_over {
            let given = self.all_away(&plan, demand, next.demand == 0);
            let differs =
                self.others.iter().zip(&given).any(|(p, g)| next.share_of(p).abs_diff(*g) > 2 * STEP);
            if is_gone || differs {
                self.set(next, given.into_iter().enumerate().filter(|(_, share)| *share > 0).collect());
            }
        }
        next.note_unplaced(plan.unplaced, self.now_ms);
        let to: Vec<String> =
            next.shares.iter().map(|s| format!("{} to {}", percent(s.permille), s.name)).collect();
        match to.len() {
            1 => format!("the own {} takes no flows: all to {}, the nearest", self.what, nearest.name),
            _ => format!("the own {} takes no flows: {}", self.what, to.join(", ")),
        }
    }

    /// All flows by the plan; what has no room goes where the most capacity is.
    fn all_away(&self, plan: &SpillPlan, demand: f64, is_unknown: bool) -> Vec<u16> {
        let mut given: Vec<u16> = vec![0; self.others.len()];
        if is_unknown && plan.overload.iter().all(|o| *o == 0.0) {
            given[0] = WHOLE;
            return given;
        }
        let capacity = |p: &&Place| p.capacity.filter(|_| !p.is_stale).unwrap_or(0) as f64;
        let whole: f64 = self.others.iter().map(capacity).sum();
        let rest = plan.unplaced / demand.max(1e-9) * f64::from(WHOLE);
        let mut left = WHOLE;
        for (i, place) in self.others.iter().enumerate() {
            let extra = if whole > 0.0 { rest * capacity(place) / whole } else { 0.0 };
            given[i] = in_steps(plan.targets[i] + extra).min(left);
            left -= given[i];
        }
        given[0] += left;
        given
    }

    /// Puts shares in effect, keeping the time of the last change.
    fn set(&self, spill: &mut Spill, given: Vec<(usize, u16)>) {
        let share = |(i, permille): (usize, u16)| Share { name: self.others[i].name.clone(), permille };
        let mut shares: Vec<Share> = given.into_iter().map(share).collect();
        shares.sort_by(|a, b| a.name.cmp(&b.name));
        if shares != spill.shares {
            (spill.shares, spill.changed_ms) = (shares, self.now_ms);
            spill.load_then = self.local.map_or(0, |p| p.load);
        }
    }
}

/// Lowers the sum of the shares to `goal`, the farthest first.
fn take(given: &mut [u16], goal: u16) {
    let mut sum: u16 = given.iter().sum();
    for share in given.iter_mut().rev() {
        let cut = sum.saturating_sub(goal).min(*share);
        *share -= cut;
        sum -= cut;
    }
}

/// Places in the order in which a peer asks them: the nearest to it first.
fn order_of(peer: &PeerPlace, all: &[&Name]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..all.len()).filter(|&i| *all[i] != peer.name).collect();
    order.sort_by_key(|&i| (peer.rtt_us.get(all[i]).copied().unwrap_or(u32::MAX), all[i]));
    order
}
