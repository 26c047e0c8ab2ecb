//! Estimates each place's own demand, from what is measured in all places and from where their flows were sent.
//!
//! Input: places and the shares in effect, at increasing times. Output: [`Estimates`], in slots: a demand of 8 keeps 8
//! slots busy. Pure; called by `spill`.
//!
//! * **Arrivals**, not load: what has arrived within a time is what was served and by how much the load has grown, so in
//!   slots it is the mean of running requests, plus the growth per second times the service time (Little's law). A
//!   backlog of 500 that no longer grows is no demand for 500 slots. Replicas that do not count requests have no service
//!   time: then a backlog that grows counts as at most one more capacity, and one that falls as none.
//! * **Own demand**: what arrives at a place comes from all that send there, in proportion to what they send. The
//!   maximum-likelihood solution for counts of arrivals is found by expectation maximisation, which conserves the sum and
//!   starts from the previous estimate. Load that was spilled in is thereby no demand of the place that serves it.

use super::Place;
use crate::desired::model::{Name, Share, WHOLE};
use std::collections::BTreeMap;

/// Time constants of measured values, in milliseconds: while a backlog waits, and otherwise.
const FAST_MS: f64 = 1_000.0;
const SLOW_MS: f64 = 5_000.0;
/// Samples that are kept per time over which growth is measured.
const SAMPLES: f64 = 16.0;
/// Iterations of one update; the next update continues.
const ITERATIONS: usize = 24;
/// Smallest demand, in slots: expectation maximisation cannot leave 0.
const LEAST: f64 = 0.02;

/// Time for which an average keeps an old value.
fn weight(past_ms: f64, constant_ms: f64) -> f64 {
    1.0 - (-past_ms / constant_ms).exp()
}

/// Load at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Load {
    at_ms: f64,
    load: f64,
    /// Running requests, summed over time, in request milliseconds.
    served: f64,
}

/// Arrivals at a place, in slots.
#[derive(Clone, Copy, Debug)]
struct Arrivals {
    least: f64,
    likely: f64,
    most: f64,
    /// Over a longer time.
    slow: f64,
}

/// Averages of one place.
#[derive(Clone, Debug, Default, PartialEq)]
struct Averages {
    running: f64,
    waiting: f64,
    load: f64,
    /// Loads within the longest time over which growth is measured.
    samples: Vec<Load>,
    /// Demand of its own clients.
    demand: f64,
    /// Where its flows go: an average over the age of reports.
    sent: BTreeMap<Name, f64>,
    /// The same at the times of its changes, as far as reports may still show it.
    history: Vec<(u64, BTreeMap<Name, f64>)>,
    is_new: bool,
}

/// State of the estimator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Estimator {
    at_ms: Option<u64>,
    places: BTreeMap<Name, Averages>,
}

/// Estimates for one place.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Estimate {
    /// Slots that the flows of its own clients keep busy: the most likely number, and the smallest and largest that
    /// explain the reports, however late they are.
    pub demand: f64,
    pub least: f64,
    pub most: f64,
    /// Requests that it can run concurrently; 0 if it takes no flows.
    pub capacity: f64,
    /// Average running and waiting requests.
    pub load: f64,
    /// Waiting requests, a fast average.
    pub waiting: f64,
}

impl Estimator {
    /// Takes note of the measurements and of the shares in effect (by the place that sends), and estimates.
    pub(super) fn update(
        &mut self,
        places: &[&Place],
        shares: &BTreeMap<&Name, &[Share]>,
        window_ms: u64,
        now_ms: u64,
    ) -> BTreeMap<Name, Estimate> {
        let past_ms = self.at_ms.map_or(0.0, |at| now_ms.saturating_sub(at) as f64);
        self.at_ms = Some(now_ms);
        let is_known = |name: &Name| places.iter().any(|p| p.name == *name) || shares.contains_key(name);
        self.places.retain(|name, _| is_known(name));
        for name in places.iter().map(|p| &p.name).chain(shares.keys().copied()) {
            let averages = self
                .places
                .entry(name.clone())
                .or_insert_with(|| Averages { is_new: true, ..Averages::default() });
            averages.note_shares(
                name,
                shares.get(name).copied().unwrap_or_default(),
                past_ms,
                window_ms as f64 / 2.0,
            );
            averages.note_history(name, shares.get(name).copied().unwrap_or_default(), now_ms, window_ms);
        }
        let mut arrivals: BTreeMap<Name, Arrivals> = BTreeMap::new();
        for place in places {
            let expected = self.expected(&place.name);
            let averages = self.places.get_mut(&place.name).expect("an entry was made for each place");
            let measured = place.capacity.filter(|_| !place.is_stale && place.backends > 0);
            if let Some(capacity) = measured {
                averages.note_load(place, past_ms, window_ms as f64);
                let arrives = averages.arrivals(place, capacity as f64, (expected, window_ms as f64));
                arrivals.insert(place.name.clone(), arrives);
                if std::mem::take(&mut averages.is_new) {
                    averages.demand = arrives.likely.max(LEAST);
                }
            }
        }
        self.attribute(&arrivals);
        // What others may have sent follows from their bounds, so the second pass widens the first.
        let mut bounds: BTreeMap<Name, (f64, f64)> = BTreeMap::new();
        for _ in 0..2 {
            bounds =
                arrivals.iter().map(|(name, a)| (name.clone(), self.bounds(name, *a, &bounds))).collect();
        }
        for (name, (least, most)) in &bounds {
            let averages = self.places.get_mut(name).expect("an entry was made for each place");
            averages.demand = averages.demand.min(*most).max(*least).max(LEAST);
        }
        let estimate = |(name, a): (&Name, &Averages)| {
            let place = places.iter().find(|p| p.name == *name && p.backends > 0);
            let capacity = place.and_then(|p| p.capacity).unwrap_or(0) as f64;
            let running = place.map_or(0.0, |p| p.load.saturating_sub(p.waiting) as f64).max(a.running);
            let is_limited = a.is_backlogged(capacity) && running < 0.95 * capacity;
            let estimate = Estimate {
                demand: a.demand,
                least: bounds.get(name).map_or(a.demand, |b| b.0.min(a.demand)),
                most: bounds.get(name).map_or(a.demand, |b| b.1.max(a.demand)),
                // A backlog beside free slots: something else, such as the KV cache, limits what runs.
                capacity: if is_limited { running.max(capacity / 10.0) } else { capacity },
                load: a.load,
                waiting: a.waiting,
            };
            (name.clone(), estimate)
        };
        self.places.iter().map(estimate).collect()
    }

    /// Arrivals at a place by the present estimates.
    fn expected(&self, name: &Name) -> f64 {
        self.places.values().map(|a| a.demand * a.sent.get(name).copied().unwrap_or(0.0)).sum()
    }

    /// Smallest and largest demand of a place, if reports are of any time within the window: its arrivals, without what
    /// others may have sent, by the largest and smallest share that it may have kept.
    fn bounds(&self, name: &Name, arrives: Arrivals, others: &BTreeMap<Name, (f64, f64)>) -> (f64, f64) {
        let (mut sent_least, mut sent_most) = (0.0, 0.0);
        for (from, other) in self.places.iter().filter(|(from, _)| *from != name) {
            let (least, most) = other.sent_within(name);
            let known = others.get(from).copied().unwrap_or((other.demand, other.demand));
            sent_least += known.0.min(other.demand) * least;
            sent_most += if most > 0.0 { known.1.max(other.demand) * most } else { 0.0 };
        }
        let (kept_least, kept_most) = self.places.get(name).map_or((1.0, 1.0), |own| own.sent_within(name));
        // Where others send too, a short time says little about who sent more.
        let least = if sent_most > 0.5 { arrives.least.min(arrives.slow) } else { arrives.least };
        let over =
            |slots: f64, kept: f64, without: f64| if kept > 0.05 { slots.max(0.0) / kept } else { without };
        (over(least - sent_most, kept_most, 0.0), over(arrives.most - sent_least, kept_least, f64::MAX))
    }

    /// Divides the arrivals at each place among those that send there.
    fn attribute(&mut self, arrivals: &BTreeMap<Name, Arrivals>) {
        if self.places.iter().all(|(name, a)| a.sent.len() == 1 && a.sent.contains_key(name)) {
            // Nobody sends anything elsewhere.
            for (name, arrives) in arrivals {
                self.places.get_mut(name).expect("an entry was made for each place").demand =
                    arrives.likely.max(LEAST);
            }
            return;
        }
        for _ in 0..ITERATIONS {
            let ratios: BTreeMap<&Name, f64> = arrivals
                .iter()
                .map(|(name, arrives)| {
                    (name, arrives.likely.max(LEAST) / self.expected(name).max(LEAST / 100.0))
                })
                .collect();
            let factor = |a: &Averages| {
                let seen = || a.sent.iter().filter_map(|(to, part)| Some((part, ratios.get(to)?)));
                let sum: f64 = seen().map(|(part, _)| part).sum();
                let scaled: f64 = seen().map(|(part, ratio)| part * ratio).sum();
                // What goes where nothing is measured is unknown: it keeps its part.
                scaled + (1.0 - sum).max(0.0)
            };
            let factors: Vec<f64> = self.places.values().map(factor).collect();
            for (averages, factor) in self.places.values_mut().zip(factors) {
                averages.demand = (averages.demand * factor).max(LEAST);
            }
        }
    }
}

impl Averages {
    fn note_shares(&mut self, own: &Name, shares: &[Share], past_ms: f64, lag_ms: f64) {
        let weight = if self.sent.is_empty() { 1.0 } else { weight(past_ms, lag_ms) };
        let sum: f64 = shares.iter().map(|s| f64::from(s.permille)).sum();
        self.sent.values_mut().for_each(|part| *part *= 1.0 - weight);
        if sum == 0.0 {
            *self.sent.entry(own.clone()).or_default() += weight;
        }
        for share in shares.iter().filter(|_| sum > 0.0) {
            let part = f64::from(share.permille) / sum.max(f64::from(WHOLE));
            *self.sent.entry(share.name.clone()).or_default() += part * weight;
        }
        self.sent.retain(|_, part| *part > 1e-4);
    }

    fn note_history(&mut self, own: &Name, shares: &[Share], now_ms: u64, window_ms: u64) {
        let sum: f64 = shares.iter().map(|s| f64::from(s.permille)).sum();
        let mut parts: BTreeMap<Name, f64> = shares
            .iter()
            .map(|s| (s.name.clone(), f64::from(s.permille) / sum.max(f64::from(WHOLE))))
            .collect();
        if sum == 0.0 {
            parts.insert(own.clone(), 1.0);
        }
        if self.history.last().is_none_or(|(_, last)| *last != parts) {
            self.history.push((now_ms, parts));
        }
        // The last change before the window was in effect within it.
        let old = self.history.iter().rposition(|(at, _)| now_ms.saturating_sub(*at) >= window_ms);
        self.history.drain(..old.unwrap_or(0));
    }

    /// Smallest and largest part that it sent to a place within the window.
    fn sent_within(&self, to: &Name) -> (f64, f64) {
        let parts = self.history.iter().map(|(_, parts)| parts.get(to).copied().unwrap_or(0.0));
        parts.fold((1.0, 0.0), |(least, most), part| (part.min(least), part.max(most)))
    }

    fn note_load(&mut self, place: &Place, past_ms: f64, window_ms: f64) {
        let (load, waiting) = (place.load as f64, place.waiting.min(place.load) as f64);
        let (is_new, running) = (self.is_new, load - waiting);
        for (average, value, constant_ms) in [
            (&mut self.running, running, SLOW_MS),
            (&mut self.waiting, waiting, FAST_MS),
            (&mut self.load, load, SLOW_MS),
        ] {
            let weight = if is_new { 1.0 } else { weight(past_ms, constant_ms) };
            *average += (value - *average) * weight;
        }
        let before = self.samples.last().copied();
        let (at_ms, served) =
            before.map_or((0.0, 0.0), |b| (b.at_ms + past_ms, b.served + running * past_ms));
        let longest = span_ms(place, SLOW_MS, window_ms);
        // The newest sample is replaced while it is too near to the one before it.
        if self.samples.len() >= 2 && at_ms - self.samples[self.samples.len() - 2].at_ms < longest / SAMPLES {
            self.samples.pop();
        }
        self.samples.push(Load { at_ms, load, served });
        let old = self.samples.iter().rposition(|s| at_ms - s.at_ms >= longest);
        self.samples.drain(..old.unwrap_or(0));
    }

    /// Mean of running requests, and growth of the load per second, over about the last `span_ms`.
    fn over(&self, span_ms: f64) -> (f64, f64) {
        let Some(last) = self.samples.last() else { return (0.0, 0.0) };
        let then = self.samples.iter().rev().find(|s| last.at_ms - s.at_ms >= span_ms * 0.9);
        let then = then.or(self.samples.first()).filter(|s| s.at_ms < last.at_ms);
        then.map_or((self.running, 0.0), |then| {
            let past_ms = last.at_ms - then.at_ms;
            ((last.served - then.served) / past_ms, (last.load - then.load) * 1e3 / past_ms)
        })
    }

    fn is_backlogged(&self, capacity: f64) -> bool {
        self.waiting >= capacity / 2.0 && self.waiting > 0.0
    }

    /// Arrivals in slots. A change is seen only in part at first, so there may be more.
    fn arrivals(&self, place: &Place, capacity: f64, (expected, window_ms): (f64, f64)) -> Arrivals {
        let is_full = self.is_backlogged(capacity) || self.running >= 0.95 * capacity;
        let span = span_ms(place, if is_full { FAST_MS } else { SLOW_MS }, window_ms);
        let (running, growth) = self.over(span);
        let (slow, slow_growth) = self.over(span_ms(place, SLOW_MS, window_ms));
        if let Some(ms) = place.service_ms {
            let grows = growth * f64::from(ms) / 1e3;
            let likely = (running + grows).max(0.0);
            // The newer half shows more of a step that has just begun.
            let newer = self.over(span / 2.0).1.max(0.0) * f64::from(ms) / 1e3;
            let most = if is_full { likely.max(running + 1.5 * newer) + grows.max(0.0) } else { likely };
            return Arrivals { least: likely, likely, most, slow: slow + slow_growth * f64::from(ms) / 1e3 };
        }
        if !self.is_backlogged(capacity) {
            return Arrivals { least: running, likely: running, most: running, slow };
        }
        // Without a service time, a backlog says only which of both is more: what arrives, or what is served.
        let twice = running + self.waiting.min(capacity);
        match growth < 0.0 {
            true => {
                Arrivals { least: expected.min(running), likely: expected.min(running), most: running, slow }
            }
            false if expected > 1.1 * running => {
                Arrivals { least: running, likely: expected, most: twice.max(expected), slow }
            }
            false => Arrivals { least: running, likely: twice, most: twice, slow },
        }
    }
}

/// Time over which growth is measured: at least the age of reports and a service time.
fn span_ms(place: &Place, least_ms: f64, window_ms: f64) -> f64 {
    least_ms.max(window_ms).max(place.service_ms.unwrap_or(0).into())
}
