//! Workers of the simulation: slots with a service time each, and one queue in order of arrival.

use super::{Voice, name};
use crate::{
    desired::model::Name,
    observed::regions::{measure::MeasuredBackend, service_time::ServiceTime},
};
use std::collections::VecDeque;

/// Random numbers that repeat (SplitMix64).
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Distribution of the service times of a worker, with a mean of `mean` seconds.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Service {
    Fixed,
    Exponential,
    /// Pareto with exponent 1.5: infinite variance, cut at 50 times the mean.
    Heavy,
}

impl Service {
    fn draw(self, mean: f64, random: &mut Random) -> f64 {
        let unit = 1.0 - random.unit();
        match self {
            Self::Fixed => mean,
            Self::Exponential => -unit.ln() * mean,
            Self::Heavy => (mean / 3.0 * unit.powf(-1.0 / 1.5)).min(mean * 50.0),
        }
    }
}

/// A replica.
pub(super) struct Worker {
    pub slots: usize,
    pub mean: f64,
    pub service: Service,
    pub is_up: bool,
    pub voice: Voice,
    /// End time, client's region and arrival time of the running requests.
    pub running: Vec<(f64, usize, f64)>,
    /// Client's region and arrival time.
    pub queue: VecDeque<(usize, f64)>,
    pub lost: u64,
    finished: u64,
    now: f64,
    /// What it reported last.
    said: (u64, u64),
    time: ServiceTime,
}

impl Worker {
    pub fn new(slots: usize, mean: f64) -> Self {
        Self {
            slots,
            mean,
            service: Service::Fixed,
            is_up: true,
            voice: Voice::Honest,
            running: Vec::new(),
            queue: VecDeque::new(),
            lost: 0,
            finished: 0,
            now: 0.0,
            said: (0, 0),
            time: ServiceTime::default(),
        }
    }

    pub fn load(&self) -> usize {
        self.running.len() + self.queue.len()
    }

    /// Requests of a worker that dies are lost to their clients, who do not come again.
    pub fn die(&mut self) {
        self.is_up = false;
        self.lost += self.load() as u64;
        self.running.clear();
        self.queue.clear();
    }

    /// Runs until a time: each slot that becomes free takes the oldest waiting request.
    pub fn run(&mut self, until: f64, random: &mut Random, finished: &mut [Vec<(f64, f64)>]) {
        while self.running.len() < self.slots {
            let Some((client, at)) = self.queue.pop_front() else { break };
            let end = at.max(self.now) + self.service.draw(self.mean, random);
            self.running.push((end, client, at));
        }
        while let Some(first) = (0..self.running.len())
            .min_by(|&a, &b| self.running[a].0.total_cmp(&self.running[b].0))
            .filter(|&i| self.running[i].0 <= until)
        {
            let (end, client, at) = self.running.swap_remove(first);
            self.finished += 1;
            finished[client].push((at, end - at));
            if let Some((client, at)) = self.queue.pop_front() {
                let end = end.max(at) + self.service.draw(self.mean, random);
                self.running.push((end, client, at));
            }
        }
        self.now = until;
    }

    /// Mean service time, as the daemon estimates it.
    pub fn service_ms(&mut self, now_ms: u64) -> Option<u32> {
        self.time.update(self.running.len() as u32, self.finished, now_ms);
        self.time.mean_ms()
    }

    pub fn measured(&mut self, region: &Name, number: usize, random: &mut Random) -> MeasuredBackend {
        let honest = (self.running.len() as u64, self.queue.len() as u64);
        let (said, slots) = match self.voice {
            Voice::Honest => (honest, self.slots as u32),
            Voice::Silent => (self.said, self.slots as u32),
            Voice::Boasts => ((0, 0), 1_000_000),
            Voice::Garbage => {
                let mut any = || random.next() % 1_000_000;
                ((any(), any()), 1 + any() as u32)
            }
        };
        self.said = said;
        MeasuredBackend {
            name: format!("{region}-{number}").parse().expect("letters, digits and a dash are a name"),
            region: region.clone(),
            zone: name(0),
            is_placed: true,
            takes: self.is_up,
            is_up: Some(self.is_up),
            load: Some((said.0, said.1)),
            capacity: Some(slots),
            version: None,
            is_fresh: self.voice != Voice::Silent,
            is_new: false,
        }
    }
}
