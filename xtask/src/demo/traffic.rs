//! The clients of the demo: new HTTP connections, kept ones, and UDP flows, over
//! IPv4 and IPv6, observed for failures and moves.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use test_support::{
    http::{Account, Load, Running},
    nginx,
    stage::{ECHO, Stage},
    udp::Flows,
};

use super::report::Phase;

const UDP_FLOWS: usize = 60;

/// All clients, running until dropped.
pub struct Traffic {
    fresh: Running,
    kept: Running,
    udp: Vec<Flows>,
    /// Worker that last answered each UDP flow.
    udp_workers: Vec<Vec<Option<String>>>,
}

/// What the clients observed in a period.
pub struct Seen {
    /// Requests that opened a connection each.
    pub fresh: Account,
    /// Requests on connections that stay open.
    pub kept: Account,
    /// Flows that are now answered by another worker, by the earlier worker.
    pub udp_moved: BTreeMap<String, usize>,
    /// Flows without a reply, by the worker that answered before.
    pub udp_lost: BTreeMap<String, usize>,
    started: Instant,
}

impl Traffic {
    /// Starts the clients.
    pub fn start(stage: &Stage) -> Result<Self> {
        let targets = stage.targets(nginx::PORT);
        let load = Load { attempts: 50, ..Load::new(targets) };
        let pause = Duration::from_millis(20);
        let fresh = Load { closing: 8, keeping: 0, pause, ..load.clone() };
        let kept = Load { closing: 0, keeping: 100, pause: Duration::from_millis(400), ..load };
        let client = &stage.bed.client;
        let mut udp = Vec::new();
        let mut udp_workers = Vec::new();
        for target in stage.targets(ECHO) {
            let mut flows = Flows::open(client, target, UDP_FLOWS / 2)?;
            udp_workers.push(flows.exchange()?);
            udp.push(flows);
        }
        Ok(Self {
            fresh: Running::start(client, fresh)?,
            kept: Running::start(client, kept)?,
            udp,
            udp_workers,
        })
    }

    /// Runs `during`, and returns what the clients observed meanwhile.
    pub fn watch<T>(&mut self, during: impl FnOnce() -> Result<T>) -> Result<(T, Seen)> {
        self.fresh.take();
        self.kept.take();
        let started = Instant::now();
        let result = during()?;
        let (udp_moved, udp_lost) = self.exchange_udp()?;
        let seen = Seen { fresh: self.fresh.take(), kept: self.kept.take(), udp_moved, udp_lost, started };
        Ok((result, seen))
    }

    fn exchange_udp(&mut self) -> Result<(BTreeMap<String, usize>, BTreeMap<String, usize>)> {
        let (mut moved, mut lost) = (BTreeMap::new(), BTreeMap::new());
        for (flows, known) in self.udp.iter_mut().zip(&mut self.udp_workers) {
            for (now, before) in flows.exchange()?.into_iter().zip(known) {
                let earlier = before.clone().unwrap_or_else(|| "none".to_owned());
                match now {
                    None => *lost.entry(earlier).or_default() += 1,
                    Some(now) => {
                        if before.as_ref().is_some_and(|before| *before != now) {
                            *moved.entry(earlier).or_default() += 1;
                        }
                        *before = Some(now);
                    }
                }
            }
        }
        Ok((moved, lost))
    }
}

impl Seen {
    /// Creates the phase `name`; `killed` is the worker whose open connections and
    /// flows may break in it.
    pub fn phase(&self, name: &str, killed: Option<&str>) -> Phase {
        let mut all = self.fresh.clone();
        all.requests.extend(self.kept.requests.iter().cloned());
        let mut phase = Phase::new(name, self.started.elapsed().as_secs_f64(), &all);
        let of_killed = |worker: Option<&str>| killed.is_some() && worker == killed;
        let open = all.failures().filter(|request| of_killed(request.worker.as_deref())).count();
        phase.failed_open_to_killed = open;
        phase.failed -= open;
        // A kept connection that leaves its worker breaks.
        phase.moved = self.kept.failures().filter(|request| !of_killed(request.worker.as_deref())).count();
        let others = |counts: &BTreeMap<String, usize>| {
            counts
                .iter()
                .filter(|(worker, _)| !of_killed(Some(worker)))
                .map(|(_, count)| count)
                .sum::<usize>()
        };
        phase.moved += others(&self.udp_moved);
        phase.udp_lost = others(&self.udp_lost);
        let shown = all.failures().filter(|request| !of_killed(request.worker.as_deref())).take(3);
        phase.notes.extend(shown.map(|request| {
            format!("failed: {} {}", request.target, request.failure.as_deref().unwrap_or_default())
        }));
        phase
    }
}
