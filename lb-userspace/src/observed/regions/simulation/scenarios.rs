//! Scenarios of the simulation, and the invariants that each run is checked for.

use super::{
    Demand, Region, Sample, Trace, Voice, World, name,
    workers::{Service, Worker},
};
use crate::desired::model::{RegionRules, WHOLE};

/// Slots per worker; a region has two workers.
const SLOTS: usize = 4;
/// Time after which no region may queue while another has a free slot, in seconds. Four times the age of reports is
/// added: a place sees its backlog, sees that those that send to it have reacted, and sees the effect of its own reaction.
const PATIENCE: f64 = 10.0;

/// A region that sends away this share of its new flows or more adds nothing to its backlog, in thousandths.
const DRAINS: u16 = 850;

fn region(mean: f64, demand: Demand) -> Region {
    let workers = vec![Worker::new(SLOTS, mean), Worker::new(SLOTS, mean)];
    Region { workers, demand, delay_ms: 100, credits: [].into() }
}

fn world<const N: usize>(mean: f64, demands: [Demand; N]) -> World {
    World {
        seed: 1,
        rules: RegionRules::default(),
        regions: demands.map(|demand| region(mean, demand)).into(),
        interval_ms: 100,
        counts: true,
        is_even: false,
        event: |_, _| {},
    }
}

impl World {
    fn late(mut self, delay_ms: u64) -> Self {
        self.regions.iter_mut().for_each(|r| r.delay_ms = delay_ms);
        self.interval_ms = delay_ms;
        self
    }

    fn uncounted(mut self) -> Self {
        self.counts = false;
        self
    }

    fn even(mut self) -> Self {
        self.is_even = true;
        self
    }

    fn serving(mut self, service: Service) -> Self {
        self.regions.iter_mut().flat_map(|r| &mut r.workers).for_each(|w| w.service = service);
        self
    }

    /// Runs, and checks what holds always.
    fn check(self, what: &str, seconds: u64) -> Trace {
        let late_s = self.regions.iter().map(|r| r.delay_ms).max().unwrap_or(0) as f64 / 1e3;
        let allowed = self.rules.allowed.clone();
        let trace = self.run(seconds);
        let finished: usize = trace.finished.iter().map(Vec::len).sum();
        assert_eq!(trace.arrived, finished as u64 + trace.left + trace.lost, "{what}: demand is conserved");
        for s in &trace.samples {
            for shares in &s.shares {
                assert_eq!(shares.iter().map(|s| s.permille).sum::<u16>(), WHOLE, "{what} at {}", s.at_s);
                let is_allowed = |name| allowed.as_ref().is_none_or(|all| all.contains(name));
                assert!(shares.iter().all(|s| is_allowed(&s.name)), "{what} at {}: residency", s.at_s);
            }
        }
        let longest = longest_wait(&trace, |i| allowed.as_ref().is_none_or(|all| all.contains(&name(i))));
        println!("{what}: longest queue beside a free slot {longest:.1} s");
        if longest > PATIENCE + 4.0 * late_s {
            print(&trace);
            panic!("{what}: a region queued for {longest:.1} s while another had a free slot");
        }
        trace
    }
}

/// Longest time for which a region had a queue of more than two service times, to which it added, while another had a
/// free slot. Established flows do not move: a backlog to which nothing is added any more is served where it is.
fn longest_wait(trace: &Trace, is_allowed: impl Fn(usize) -> bool) -> f64 {
    let count = trace.finished.len();
    let mut since = vec![vec![None; count]; count];
    let mut longest = 0.0f64;
    for s in &trace.samples {
        for from in (0..count).filter(|&i| is_allowed(i)) {
            for to in (0..count).filter(|&i| i != from && is_allowed(i)) {
                let queues =
                    s.waiting[from] > 2 * s.slots[from] && s.slots[from] > 0 && s.away(from) < DRAINS;
                let holds = queues && s.running[to] < s.slots[to];
                let at = since[from][to].filter(|_| holds).unwrap_or(s.at_s);
                since[from][to] = holds.then_some(at);
                longest = longest.max(if holds { s.at_s - at } else { 0.0 });
            }
        }
    }
    longest
}

/// Difference between the largest and the smallest share that a region sent away.
fn swing(trace: &Trace, from: f64, to: f64) -> u16 {
    let count = trace.finished.len();
    let of = |i: usize| {
        let away: Vec<u16> = trace.between(from, to).map(|s: &Sample| s.away(i)).collect();
        away.iter().max().unwrap_or(&0) - away.iter().min().unwrap_or(&0)
    };
    (0..count).map(of).max().unwrap_or(0)
}

fn print(trace: &Trace) {
    for s in trace.samples.iter().step_by(4) {
        let away: Vec<u16> = (0..s.running.len()).map(|i| s.away(i)).collect();
        println!(
            "{:>5.1} away {away:?} running {:?} waiting {:?} unplaced {:?}",
            s.at_s, s.running, s.waiting, s.unplaced
        );
    }
}

fn none(_: f64) -> f64 {
    0.0
}

/// From 10 to 70 requests per second in a minute, and 70 from then on.
fn ramp(at: f64) -> f64 {
    10.0 + at.min(60.0)
}

fn step_60(at: f64) -> f64 {
    if at < 30.0 { 10.0 } else { 60.0 }
}

fn step_100(at: f64) -> f64 {
    if at < 30.0 { 10.0 } else { 100.0 }
}

#[test]
fn a_ramp_to_nearly_twice_the_capacity_of_a_region_keeps_its_queue_short() {
    for counts in [true, false] {
        let mut world = world(0.2, [ramp, none, none]);
        world.counts = counts;
        let trace = world.check("ramp", 150);
        let (p50, queue) = (trace.median(0, 90.0, 150.0), trace.samples.last().map_or(0, |s| s.waiting[0]));
        println!("counts {counts}: median {p50:.3} s, queue at the end {queue}");
        assert!(p50 < 1.3 * 0.2 && queue < 16, "counts {counts}: median {p50:.3} s, {queue} waiting");
    }
}

#[test]
fn a_step_is_absorbed_and_its_backlog_drained() {
    for (what, demand) in [("step to 60", step_60 as Demand), ("step to 100", step_100)] {
        for (late, counts) in [(100, true), (1_000, true), (5_000, true), (100, false), (1_000, false)] {
            let what = format!("{what}, reports {late} ms late, counts {counts}");
            let mut world = world(0.2, [demand, none, none]).late(late);
            world.counts = counts;
            let trace = world.check(&what, 120);
            let p50 = trace.median(0, 80.0, 120.0);
            println!("{what}: median {p50:.3} s");
            // Five seconds are 25 service times: the shares follow chance only so well.
            let most = if late < 5_000 && (counts || demand(60.0) < 80.0) { 1.3 } else { 2.0 };
            assert!(p50 < most * 0.2, "{what}: median {p50:.3} s");
        }
    }
}

#[test]
fn constant_demand_has_no_limit_cycle() {
    for late in [100, 1_000, 2_500] {
        for (demand, counts) in
            [(step_60 as Demand, true), (step_60, false), (step_100, true), (step_100, false)]
        {
            if late == 2_500 && !counts {
                continue;
            }
            let mut world = world(0.2, [demand, none, none]).late(late).even();
            world.counts = counts;
            let trace = world.check("even", 160);
            let swing = swing(&trace, 110.0, 160.0);
            println!("late {late} counts {counts}: swing {swing}");
            if swing > 50 {
                print(&trace);
            }
            assert!(swing <= 50, "late {late} counts {counts}: {swing} thousandths");
        }
    }
}

#[test]
fn reports_later_than_the_settings_say_cause_no_limit_cycle() {
    for counts in [true, false] {
        let mut world = world(0.2, [step_60, none, none]).late(5_000).even();
        (world.interval_ms, world.counts) = (100, counts);
        let trace = world.run(300);
        let swing = swing(&trace, 200.0, 300.0);
        if swing > 50 {
            print(&trace);
        }
        assert!(swing <= 50, "counts {counts}: {swing} thousandths");
    }
}

#[test]
fn spikes_and_waves_pass() {
    let spike = |at: f64| if (30.0..35.0).contains(&at) { 200.0 } else { 20.0 };
    let trace = world(0.2, [spike, none, none]).check("spike", 120);
    let last = trace.samples.last().map_or(0, |s| s.waiting.iter().sum());
    assert!(last < 8, "{last} still wait");
    fn wave(at: f64, phase: f64) -> f64 {
        30.0 + 28.0 * (std::f64::consts::TAU * (at / 200.0 + phase)).sin()
    }
    for late in [100, 1_000, 5_000] {
        let world =
            world(0.2, [|at| wave(at, 0.0), |at| wave(at, 0.25), |at| wave(at, 0.5), |at| wave(at, 0.75)]);
        world.late(late).check(&format!("diurnal waves, {late} ms late"), 300);
    }
}

#[test]
fn free_slots_are_shared_between_two_that_are_overloaded() {
    let trace = world(0.2, [|_| 60.0, none, |_| 55.0, none]).check("two overloaded", 120);
    for region in [0, 2] {
        let p50 = trace.median(region, 60.0, 120.0);
        assert!(p50 < 0.3, "region {region}: median {p50:.3} s");
    }
    // Neither has room, the third is asked by both for more than it has, and both get about the same.
    let trace = world(0.2, [|_| 70.0, none, |_| 70.0]).check("two ask for one", 120);
    let mean = |i: usize| trace.between(60.0, 120.0).map(|s| f64::from(s.away(i))).sum::<f64>() / 120.0;
    println!("away {:.0} and {:.0}", mean(0), mean(2));
    assert!((mean(0) - mean(2)).abs() < 60.0, "{} and {}", mean(0), mean(2));
    assert!(trace.between(60.0, 120.0).all(|s| s.unplaced[0] + s.unplaced[2] > 0), "both say so");
}

#[test]
fn when_all_are_full_each_serves_its_own_and_says_so() {
    let trace = world(0.2, [|_| 60.0, |_| 50.0, |_| 45.0]).check("all full", 90);
    let quiet = trace.between(15.0, 90.0).filter(|s| s.unplaced[0] == 0).count();
    assert!(quiet < 8, "silent in {quiet} samples");
    let most = trace.between(30.0, 90.0).map(|s| s.away(0).max(s.away(1)).max(s.away(2))).max();
    assert!(most <= Some(100), "{most:?}");
}

#[test]
fn what_was_spilled_in_is_no_demand_of_the_region_that_serves_it() {
    let mut world = world(0.2, [|_| 300.0, |_| 80.0, none]);
    world.regions.iter_mut().flat_map(|r| &mut r.workers).for_each(|w| w.slots = 4 * SLOTS);
    let trace = world.check("spilled in", 60);
    assert!(trace.samples.iter().all(|s| s.away(2) == 0), "a region without clients never spills");
    let most = trace.between(20.0, 60.0).map(|s| s.away(1)).max();
    assert!(most <= Some(0), "{most:?}");
}

#[test]
fn service_times_may_have_a_heavy_tail_or_be_long() {
    for service in [Service::Exponential, Service::Heavy] {
        world(0.2, [step_60, none, none]).serving(service).check("heavy tail", 120);
        world(0.2, [step_60, none, none]).serving(service).uncounted().check("heavy tail", 120);
    }
    let step = |at: f64| if at < 60.0 { 0.4 } else { 1.4 };
    for counts in [true, false] {
        let mut world = world(10.0, [step, none, none]).serving(Service::Exponential);
        world.counts = counts;
        let trace = world.check("10 s per request", 500);
        let p50 = trace.median(0, 200.0, 500.0);
        println!("10 s per request: median {p50:.1} s");
        assert!(p50 < 13.0, "median {p50:.1} s");
    }
}

#[test]
fn workers_die_and_come_back() {
    let mut world = world(0.2, [|_| 22.0, none, |_| 10.0]);
    world.event = |regions, at| {
        let worker = &mut regions[0].workers[0];
        if (30.0..60.0).contains(&at) && worker.is_up {
            worker.die();
        }
        worker.is_up = !(30.0..60.0).contains(&at);
        // Then the whole region.
        for worker in &mut regions[0].workers {
            if (90.0..120.0).contains(&at) && worker.is_up {
                worker.die();
            }
        }
        regions[0].workers[1].is_up = !(90.0..120.0).contains(&at);
        if (90.0..120.0).contains(&at) {
            regions[0].workers[0].is_up = false;
        }
    };
    let trace = world.check("deaths", 180);
    assert!(trace.median(0, 40.0, 60.0) < 0.3 && trace.median(0, 100.0, 120.0) < 0.3);
    assert!(trace.between(150.0, 180.0).all(|s| s.away(0) == 0), "all is back at home");
}

#[test]
fn liars_and_silence_are_bounded() {
    for (voice, most) in [(Voice::Boasts, 0.26), (Voice::Silent, 0.26), (Voice::Garbage, 4.0)] {
        let mut world = world(0.2, [ramp, none, none]);
        // One worker of the farthest region.
        world.regions[2].workers[1].voice = voice;
        // Half of a region that claims to be full is not used, and its claims are answered like any other's.
        let trace = if voice == Voice::Garbage { world.run(150) } else { world.check("one liar", 150) };
        let (p50, queue) = (trace.median(0, 100.0, 150.0), trace.samples.last().map_or(0, |s| s.waiting[0]));
        println!("one liar: median {p50:.3} s, {queue} wait");
        assert!(p50 < most, "median {p50:.3} s, {queue} wait");
    }
}

#[test]
fn residency_bounds_where_a_spill_may_go() {
    let mut world = world(0.2, [ramp, none, none]);
    world.rules.allowed = Some(vec![name(0), name(2)]);
    let trace = world.check("residency", 150);
    assert!(trace.samples.iter().any(|s| s.away(0) > 300));
}

#[test]
fn eight_regions_with_random_demands_settle() {
    for seed in 1..3 {
        let mut world =
            world(0.2, [|_| 70.0, |_| 10.0, |_| 5.0, |_| 50.0, none, |_| 45.0, |_| 20.0, |_| 30.0]);
        world.seed = seed;
        let trace = world.late(1_000).check("eight regions", 80);
        for region in [0, 3, 5] {
            let p50 = trace.median(region, 50.0, 80.0);
            assert!(p50 < 0.3, "region {region}: median {p50:.3} s");
        }
    }
}
