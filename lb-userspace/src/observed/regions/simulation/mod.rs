//! Closed-loop simulation of the spill controller: regions with workers, clients that arrive over time, and one host per
//! region that decides from delayed reports, with the functions that the daemon uses.
//!
//! Input: a [`World`], seeded, so that a run repeats exactly. Output: a [`Trace`] with one sample per decision, on which
//! [`scenarios`] asserts the invariants. Time is simulated; nothing sleeps.

mod scenarios;
mod workers;

use super::{
    measure::{Counting, KnownGood, MeasuredBackend, sum_places},
    service_time::pooled,
};
use crate::{
    desired::model::{Locality, Name, RegionRules, Share, WHOLE},
    plan::policy::region::{Inputs, PeerPlace, RegionDecision, decide},
};
use std::collections::{BTreeMap, VecDeque};
use workers::{Random, Worker};

/// Time between two decisions of a region, in milliseconds.
const TICK_MS: u64 = 500;

/// Requests per second of one region's clients, by time in seconds.
type Demand = fn(f64) -> f64;

/// One region.
struct Region {
    workers: Vec<Worker>,
    demand: Demand,
    /// Reports reach the hosts this late.
    delay_ms: u64,
    /// Share of flows that each region is still due.
    credits: BTreeMap<usize, i32>,
}

impl Region {
    /// Queues a request at a worker: the less loaded of two at random, as the scheduler `p2c` does, or of all.
    fn take(&mut self, request: (usize, f64), is_even: bool, random: &mut Random) {
        let alive: Vec<usize> = (0..self.workers.len()).filter(|&w| self.workers[w].is_up).collect();
        let load = |&w: &usize| self.workers[w].load();
        let worker = match is_even {
            true => alive.iter().copied().min_by_key(load),
            false => [0; 2].map(|_| alive[random.below(alive.len())]).into_iter().min_by_key(load),
        };
        self.workers[worker.expect("a region with shares has workers")].queue.push_back(request);
    }
}

/// How a replica reports.
#[derive(Clone, Copy, PartialEq)]
enum Voice {
    Honest,
    /// Its last report stays, and is old.
    Silent,
    /// It claims a million slots, and nothing to do.
    Boasts,
    /// Its numbers are random.
    Garbage,
}

/// All that a run is made of.
struct World {
    seed: u64,
    rules: RegionRules,
    regions: Vec<Region>,
    /// Interval of reports that the settings state, in milliseconds.
    interval_ms: u64,
    /// Whether replicas count finished requests, from which service times follow.
    counts: bool,
    /// Whether arrivals and their division are even, so that any movement is the controller's own.
    is_even: bool,
    /// Runs before each decision: kills and revives workers, changes how they report.
    event: fn(&mut [Region], f64),
}

/// State at one decision time.
struct Sample {
    at_s: f64,
    shares: Vec<Vec<Share>>,
    running: Vec<usize>,
    waiting: Vec<usize>,
    slots: Vec<usize>,
    unplaced: Vec<u64>,
}

impl Sample {
    fn away(&self, region: usize) -> u16 {
        self.shares[region].iter().filter(|s| s.name != name(region)).map(|s| s.permille).sum()
    }
}

/// Result of a run.
struct Trace {
    samples: Vec<Sample>,
    /// Time of arrival and time in the system of each finished request, by the region of its client, in seconds.
    finished: Vec<Vec<(f64, f64)>>,
    arrived: u64,
    left: u64,
    lost: u64,
}

impl Trace {
    /// Median of the times in the system of requests that arrived between these times.
    fn median(&self, region: usize, from: f64, to: f64) -> f64 {
        let mut times: Vec<f64> = self.finished[region]
            .iter()
            .filter(|(at, _)| (from..to).contains(at))
            .map(|(_, took)| *took)
            .collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::INFINITY)
    }

    fn between(&self, from: f64, to: f64) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |s| (from..to).contains(&s.at_s))
    }
}

/// Names sort as their numbers do.
fn name(region: usize) -> Name {
    format!("r{region}").parse().expect("a letter and a digit are a name")
}

fn number(name: &Name) -> usize {
    name.as_str()[1..].parse().expect("names are a letter and a number")
}

/// Chooses a region at random, by share.
fn draw(decision: &RegionDecision, random: &mut Random) -> usize {
    let drawn = (random.unit() * f64::from(WHOLE)) as u16;
    let mut sum = 0;
    let to = decision.shares.iter().find(|s| {
        sum += s.permille;
        drawn < sum
    });
    number(&to.expect("shares add up to the whole").name)
}

/// Distance between two regions, as on a line.
fn rtt_us(a: usize, b: usize) -> u32 {
    1_000 + 20_000 * a.abs_diff(b) as u32
}

/// What a host hears of all replicas and of the other hosts at one time.
#[derive(Clone)]
struct Heard {
    at_ms: u64,
    backends: Vec<Vec<MeasuredBackend>>,
    service_ms: Option<u32>,
    shares: Vec<Vec<Share>>,
}

impl World {
    fn run(mut self, seconds: u64) -> Trace {
        let count = self.regions.len();
        let mut random = Random(self.seed);
        let mut decisions = vec![RegionDecision::default(); count];
        let mut goods = vec![KnownGood::default(); count];
        let mut heard: VecDeque<Heard> = VecDeque::new();
        let mut next_arrival: Vec<f64> = vec![0.0; count];
        let mut trace =
            Trace { samples: Vec::new(), finished: vec![Vec::new(); count], arrived: 0, left: 0, lost: 0 };
        for tick in 0..seconds * 1_000 / TICK_MS {
            let now_ms = tick * TICK_MS;
            let now = now_ms as f64 / 1e3;
            (self.event)(&mut self.regions, now);
            heard.push_back(self.report(now_ms, &decisions, &mut random));
            while heard.len() > 40 {
                heard.pop_front();
            }
            decisions = (0..count)
                .map(|own| self.decide(own, now_ms, &heard, (&decisions[own], &mut goods[own])))
                .collect();
            trace.samples.push(self.sample(now, &decisions));
            let until = now + TICK_MS as f64 / 1e3;
            for (own, next) in next_arrival.iter_mut().enumerate() {
                trace.arrived += self.arrive(own, &decisions[own], (next, until), &mut random);
            }
            for region in &mut self.regions {
                for worker in &mut region.workers {
                    worker.run(until, &mut random, &mut trace.finished);
                }
            }
        }
        trace.left = self.regions.iter().flat_map(|r| &r.workers).map(|w| w.load() as u64).sum();
        trace.lost = self.regions.iter().flat_map(|r| &r.workers).map(|w| w.lost).sum();
        trace
    }

    /// Sends the arrivals of one region until a time to workers, by the shares. Returns their number.
    fn arrive(
        &mut self,
        own: usize,
        decision: &RegionDecision,
        (next, until): (&mut f64, f64),
        random: &mut Random,
    ) -> u64 {
        let mut arrived = 0;
        while *next < until {
            let rate = (self.regions[own].demand)(*next);
            if rate <= 0.0 {
                *next += 0.1;
                continue;
            }
            let at = *next;
            *next += if self.is_even { 1.0 / rate } else { -(1.0 - random.unit()).ln() / rate };
            let to = if self.is_even { self.deal(own, decision) } else { draw(decision, random) };
            arrived += 1;
            // As in a table, the next region in order stands in for one whose workers are dead, before any report.
            let is_alive = |region: &usize| self.regions[*region].workers.iter().any(|w| w.is_up);
            let next = [to].into_iter().chain(decision.order.iter().map(number)).find(is_alive);
            let to = next.expect("some region has workers");
            self.regions[to].take((own, at), self.is_even, random);
        }
        arrived
    }

    /// Chooses regions in turn, each as often as its share says.
    fn deal(&mut self, own: usize, decision: &RegionDecision) -> usize {
        let credits = &mut self.regions[own].credits;
        for share in &decision.shares {
            *credits.entry(number(&share.name)).or_default() += i32::from(share.permille);
        }
        let shares = decision.shares.iter().map(|s| number(&s.name));
        let to = shares.max_by_key(|to| credits[to]).expect("shares add up to the whole");
        *credits.entry(to).or_default() -= i32::from(WHOLE);
        to
    }

    fn report(&mut self, now_ms: u64, decisions: &[RegionDecision], random: &mut Random) -> Heard {
        let (mut backends, mut times) = (Vec::new(), Vec::new());
        for (i, region) in self.regions.iter_mut().enumerate() {
            let of = |(n, w): (usize, &mut Worker)| w.measured(&name(i), n, random);
            backends.push(region.workers.iter_mut().enumerate().map(of).collect());
            times.extend(region.workers.iter_mut().map(|w| w.service_ms(now_ms)));
        }
        let service_ms = pooled(times.into_iter()).filter(|_| self.counts);
        Heard {
            at_ms: now_ms,
            backends,
            service_ms,
            shares: decisions.iter().map(|d| d.shares.clone()).collect(),
        }
    }

    fn decide(
        &self,
        own: usize,
        now_ms: u64,
        heard: &VecDeque<Heard>,
        (before, good): (&RegionDecision, &mut KnownGood),
    ) -> RegionDecision {
        let seen = |region: usize| {
            let late = now_ms.saturating_sub(self.regions[region].delay_ms);
            heard.iter().rev().find(|h| h.at_ms <= late).unwrap_or(&heard[0])
        };
        let backends: Vec<MeasuredBackend> =
            (0..self.regions.len()).flat_map(|i| seen(i).backends[i].clone()).collect();
        let counting = Counting { most: good.update(&backends, now_ms), versions: None };
        let mut places = sum_places(&backends, |b| Some(&b.region), counting, &mut Vec::new());
        for place in &mut places {
            let at = number(&place.name);
            place.is_local = at == own;
            place.is_allowed = self.rules.allowed.as_ref().is_none_or(|names| names.contains(&place.name));
            place.rtt_us = (at != own).then(|| rtt_us(own, at));
            place.service_ms = seen(own).service_ms;
        }
        let peer = |i: usize| PeerPlace {
            name: name(i),
            shares: seen(i).shares[i].clone(),
            rtt_us: (0..self.regions.len()).map(|to| (name(to), rtt_us(i, to))).collect::<BTreeMap<_, _>>(),
        };
        let peers: Vec<PeerPlace> = (0..self.regions.len()).filter(|&i| i != own).map(peer).collect();
        let here = Locality { region: name(own), zone: name(own) };
        let inputs = Inputs {
            here: &here,
            rules: &self.rules,
            regions: &places,
            zones: &[],
            region_peers: &peers,
            zone_peers: &[],
            interval_ms: self.interval_ms,
            now_ms,
        };
        decide(&inputs, before)
    }

    fn sample(&self, at_s: f64, decisions: &[RegionDecision]) -> Sample {
        let alive = |r: &Region, value: fn(&Worker) -> usize| {
            r.workers.iter().filter(|w| w.is_up).map(value).sum::<usize>()
        };
        let of = |value: fn(&Worker) -> usize| self.regions.iter().map(|r| alive(r, value)).collect();
        Sample {
            at_s,
            shares: decisions.iter().map(|d| d.shares.clone()).collect(),
            running: of(|w| w.running.len()),
            waiting: of(|w| w.queue.len()),
            slots: of(|w| w.slots),
            unplaced: decisions.iter().map(|d| d.spill.unplaced).collect(),
        }
    }
}
