//! Requests with heavy-tailed service times on workers that serve a few at once, placed by the packet code itself.
//!
//! In: [`Case`]. Out: [`Delays`] in queue. Tables come from `compile`, choices from `choose` over native tables whose
//! clock is the simulation's; the same seed gives every scheduler the same requests at the same times.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    net::Ipv4Addr,
    time::Duration,
};

use lb_common::{Load, ServiceView, load::FLOW, mapped, service::TCP};
use lb_ebpf::{
    native::HashTables,
    packet::parse::{Headers, tcp, words},
    select::{choose::choose, hash::flow_hash},
};
use lb_userspace::{
    desired::model::{Desired, Observed, Scheduler},
    plan::compile::{Cache, DeploymentSettings, Memory, compile},
};

/// Requests that a worker serves at once; more wait.
pub const AT_ONCE: usize = 8;
/// Mean time of service, in seconds.
pub const MEAN_S: f64 = 4.0;
/// Shape of its lognormal distribution.
pub const SIGMA: f64 = 1.3;

/// Who places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Placer {
    /// A scheduler of ours.
    Ours(Scheduler),
    /// The shortest queue of all, known without delay: nobody places better without knowing service times.
    Ideal,
}

/// One simulation.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub placer: Placer,
    pub workers: usize,
    /// Share of what the workers can do.
    pub load: f64,
    /// Time between two reports of a worker, in seconds.
    pub report_s: f64,
    pub requests: usize,
    pub seed: u64,
}

/// Time in queue, in seconds.
#[derive(Clone, Debug)]
pub struct Delays {
    pub p50: f64,
    pub p99: f64,
    pub mean: f64,
    /// Flows that stood in a table because their backend was not their slot's primary, as a share.
    pub elsewhere: f64,
}

/// Random numbers (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }

    /// Box and Muller 1958.
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

#[derive(Clone, Default)]
struct Worker {
    running: usize,
    /// Times of arrival and of service.
    waiting: VecDeque<(f64, f64)>,
}

impl Worker {
    fn queue(&self) -> usize {
        self.running + self.waiting.len()
    }
}

/// A time that can be ordered.
#[derive(PartialEq)]
struct At(f64);
impl Eq for At {}
impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// An ingress host in front of the workers.
struct Host {
    tables: HashTables,
    view: ServiceView,
    /// Worker of each backend index.
    worker: BTreeMap<u32, usize>,
    index: Vec<u32>,
}

const VIP: [u8; 4] = [10, 0, 0, 1];
const SERVICE: u32 = 0;

impl Host {
    fn new(scheduler: Scheduler, workers: usize) -> Self {
        let address = |i: usize| Ipv4Addr::from(0x0a01_0000 + i as u32 + 1);
        let backends: BTreeMap<String, serde_json::Value> =
            (0..workers).map(|i| (format!("w{i}"), serde_json::json!({ "address": address(i) }))).collect();
        let desired: Desired = serde_json::from_value(serde_json::json!({ "services": { "s": {
            "vip": "10.0.0.1", "port": 80, "protocol": "tcp", "scheduler": scheduler, "backends": backends,
        }}}))
        .expect("it is what the model asks for");
        // Long after the service was made: nothing is in transition.
        let observed = Observed { now: Duration::from_secs(1_000), ..Observed::default() };
        let mut cache = Cache::default();
        let plan =
            compile(&desired, &observed, &Memory::default(), &DeploymentSettings::default(), &mut cache)
                .expect("it fits")
                .plan;
        let entry = &plan.services[&SERVICE];
        let view = ServiceView {
            seed: entry.view.seed,
            slot_count: entry.view.slot_count,
            flags: entry.view.flags,
            scheduler: entry.view.scheduler,
            protocol: TCP,
            list_count: entry.view.list_count,
            ..ServiceView::default()
        };
        let mut tables = HashTables::default();
        tables.capacity = 1_000;
        tables.slots = entry.table.to_vec();
        tables.backends = plan.backends.iter().map(|(k, v)| (*k, *v)).collect();
        *tables.loads.borrow_mut() =
            plan.costs.iter().map(|(k, c)| (*k, Load { cost: c.flow, ..Load::default() })).collect();
        let at = |i: usize| mapped(address(i).octets());
        let find = |i| plan.backends.iter().find(|(_, b)| b.address == at(i)).map_or(u32::MAX, |(k, _)| *k);
        let index: Vec<u32> = (0..workers).map(find).collect();
        let worker = index.iter().enumerate().map(|(i, index)| (*index, i)).collect();
        Self { tables, view, worker, index }
    }

    /// Worker of the flow number `n`, and whether a stateless answer would not find it.
    fn place(&self, n: u32) -> (usize, bool) {
        let headers = Headers {
            source: words(mapped((0xc0a8_0000 + n / 20_000).to_be_bytes())),
            destination: words(mapped(VIP)),
            source_port: ((n % 20_000) as u16 + 1_024).to_be(),
            port: 80u16.to_be(),
            protocol: TCP,
            tcp_flags: tcp::SYN,
            ..Headers::default()
        };
        let hash = flow_hash(self.view.seed, &headers);
        let backend =
            choose(&self.tables, SERVICE, &self.view, &headers, hash).expect("there are backends").backend;
        let primary = self.tables.slots[lb_ebpf::select::hash::slot_of(hash, self.view.slot_count) as usize]
            .primary_index();
        (self.worker[&backend], backend != primary)
    }

    fn report(&self, worker: usize, queue: usize) {
        self.tables.report(self.index[worker], queue as u32 * FLOW);
    }
}

/// Runs a case.
pub fn simulate(case: &Case) -> Delays {
    let scheduler = match case.placer {
        Placer::Ours(scheduler) => scheduler,
        Placer::Ideal => Scheduler::Maglev,
    };
    let host = Host::new(scheduler, case.workers);
    let mut random = Random(case.seed);
    let mut workers = vec![Worker::default(); case.workers];
    // Ends of service, and reports, which workers send at times of their own.
    let mut ends: BinaryHeap<Reverse<(At, usize)>> = BinaryHeap::new();
    let mut reports: BinaryHeap<Reverse<(At, usize)>> =
        (0..case.workers).map(|w| Reverse((At(random.unit() * case.report_s), w))).collect();
    let mean_gap_s = MEAN_S / (case.load * (case.workers * AT_ONCE) as f64);
    let mu = MEAN_S.ln() - SIGMA * SIGMA / 2.0;
    let (mut now_s, mut told_s) = (0.0, 0.0);
    let mut delays = Vec::with_capacity(case.requests);
    let mut elsewhere = 0usize;
    for n in 0..case.requests {
        now_s += random.exponential(mean_gap_s);
        let service_s = (mu + SIGMA * random.normal()).exp();
        let lot = random.next();
        // What happens before this request comes, in order of time.
        loop {
            let end = ends.peek().map_or(f64::INFINITY, |Reverse((At(t), _))| *t);
            let report = reports.peek().map_or(f64::INFINITY, |Reverse((At(t), _))| *t);
            if end.min(report) > now_s {
                break;
            }
            if end <= report {
                let Some(Reverse((At(t), w))) = ends.pop() else { break };
                match workers[w].waiting.pop_front() {
                    Some((came_s, service_s)) => {
                        delays.push(t - came_s);
                        ends.push(Reverse((At(t + service_s), w)));
                    }
                    None => workers[w].running -= 1,
                }
            } else {
                let Some(Reverse((At(t), w))) = reports.pop() else { break };
                host.report(w, workers[w].queue());
                reports.push(Reverse((At(t + case.report_s), w)));
            }
        }
        host.tables.advance_ns(((now_s - told_s) * 1e9) as u64);
        told_s = now_s;
        let w = match case.placer {
            Placer::Ideal => {
                let least = workers.iter().map(Worker::queue).min().unwrap_or(0);
                let all: Vec<usize> = (0..workers.len()).filter(|&w| workers[w].queue() == least).collect();
                all[lot as usize % all.len()]
            }
            Placer::Ours(_) => {
                let (w, is_elsewhere) = host.place(n as u32);
                elsewhere += usize::from(is_elsewhere);
                w
            }
        };
        if workers[w].running < AT_ONCE {
            workers[w].running += 1;
            delays.push(0.0);
            ends.push(Reverse((At(now_s + service_s), w)));
        } else {
            workers[w].waiting.push_back((now_s, service_s));
        }
    }
    // The queues were empty at first.
    delays.drain(..delays.len() / 10);
    delays.sort_by(f64::total_cmp);
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
    Delays {
        p50: at(0.5),
        p99: at(0.99),
        mean: delays.iter().sum::<f64>() / delays.len() as f64,
        elsewhere: elsewhere as f64 / case.requests as f64,
    }
}
