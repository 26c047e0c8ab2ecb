//! What the tables of a host may and may not hold.

use super::{
    environment,
    simulation::{Known, Simulation, Violation, violated},
    workers::{Reporting, Worker},
};
use lb_common::{ServiceKey, slot::NO_BACKEND};
use lb_userspace::{
    apply::reconcile::{Published, fake::FakeMaps},
    desired::model::{
        Backend, BackendId, BackendState, Health, HealthKind, Name, Ports, Protocol, Readiness, Service,
    },
    plan::compile::{from_address, to_address},
};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

const AVOIDED: &str = "a backend known dead or drained gets no share of new flows while a good one exists";
const RESIDENT: &str = "residency holds in every table at every moment";
const REACHED: &str = "every service in the maps is reached by its own VIP and port, and none else";

/// Time after which a worker's death or its replica's word must be in the tables.
const BOUND: Duration = Duration::from_secs(6);

/// Number of slots of each primary, by address.
fn shares(maps: &FakeMaps, index: u32) -> BTreeMap<IpAddr, u32> {
    let view = maps.live_view(index);
    let mut shares = BTreeMap::new();
    let slots = &maps.slots[view.slot_base as usize..(view.slot_base + view.slot_count) as usize];
    for slot in slots.iter().filter(|slot| slot.primary_index() != NO_BACKEND) {
        let address = from_address(&maps.backends[slot.primary_index() as usize].address);
        *shares.entry(address).or_default() += 1;
    }
    shares
}

impl Simulation {
    /// Notes since when a host knows its backends as they are.
    pub fn note_known(&mut self, index: usize) {
        let Some(daemon) = &self.hosts[index].daemon else { return };
        let (desired, now) = (daemon.published.borrow().desired.clone(), environment::now());
        let mut known = BTreeMap::new();
        for (service, s) in &desired.services {
            for (backend, b) in &s.backends {
                let id = BackendId { service: service.clone(), backend: backend.clone() };
                let new = Known {
                    address: b.address,
                    health: s.health.clone(),
                    replica: s.replica.clone(),
                    since: now,
                };
                let same = |k: &&Known| {
                    (k.address, &k.health, &k.replica) == (new.address, &new.health, &new.replica)
                };
                let before = self.hosts[index].known.get(&id).filter(same).map(|k| k.since);
                known.insert(id, Known { since: before.unwrap_or(now), ..new });
            }
        }
        self.hosts[index].known = known;
    }

    /// Checks the tables of a running host.
    pub fn check_tables(&self, index: usize) -> Result<(), Violation> {
        let host = &self.hosts[index];
        let Some(daemon) = &host.daemon else { return Ok(()) };
        let published = daemon.published.borrow().clone();
        // By what the store holds, not by what the reconciler was given.
        let head = daemon.store.head();
        if published.revision == 0 || published.error.is_some() || head.revision.number != published.revision
        {
            return Ok(());
        }
        let maps = host.setup.maps.lock();
        check_keys(&host.setup.name, &maps, &published)?;
        for (name, service) in &head.desired.services {
            if published.problems.contains_key(name) {
                continue;
            }
            let Some(compiled) = published.services.get(name) else {
                return violated(REACHED, format!("{}: {name} is not compiled", host.setup.name));
            };
            let shares = shares(&maps, compiled.index);
            let place = format!("{}: service {name}", host.setup.name);
            check_residency(&place, service, &shares)?;
            let since = daemon.began.max(host.disturbed);
            if environment::now() >= since + BOUND {
                self.check_avoided(&place, (name, service), index, &published, &shares)?;
            }
        }
        Ok(())
    }

    fn check_avoided(
        &self,
        place: &str,
        (name, service): (&Name, &Service),
        host: usize,
        published: &Published,
        shares: &BTreeMap<IpAddr, u32>,
    ) -> Result<(), Violation> {
        let workers: BTreeMap<IpAddr, Worker> =
            service.backends.values().map(|b| (b.address, self.workers.get(b.address))).collect();
        let is_good = |id: &Name, b: &Backend| {
            let id = BackendId { service: name.clone(), backend: id.clone() };
            let observed = &published.observed;
            let health = observed.health.get(&id).copied().unwrap_or_default();
            let readiness = observed.replicas.get(&id).copied().unwrap_or_default();
            let region = b.region.as_ref().and_then(|r| published.desired.regions.get(r));
            let drains = region.is_some_and(|r| r.state != Default::default());
            let is_ready = service.replica.is_none() || readiness == Readiness::Ready;
            let verdict = service.health.kind == HealthKind::None || health == Health::Healthy;
            b.state == BackendState::Up
                && b.weight > 0
                && verdict
                && is_ready
                && !drains
                && service.allows(b)
                && why_bad(service, b, &workers[&b.address]).is_none()
        };
        let good: Vec<IpAddr> =
            service.backends.iter().filter(|(id, b)| is_good(id, b)).map(|(_, b)| b.address).collect();
        if good.is_empty() {
            return Ok(());
        }
        for (id, b) in service.backends.iter().filter(|(_, b)| !good.contains(&b.address)) {
            let id = BackendId { service: name.clone(), backend: id.clone() };
            let is_new = self.hosts[host].known.get(&id).is_none_or(|k| environment::now() < k.since + BOUND);
            if is_new {
                continue;
            }
            // Two backends may have one address.
            let all: Vec<_> = service.backends.values().filter(|other| other.address == b.address).collect();
            let why = all
                .iter()
                .map(|other| why_bad(service, other, &workers[&b.address]))
                .collect::<Option<Vec<_>>>();
            let slots = shares.get(&b.address).copied().unwrap_or(0);
            if let Some(why) = why
                && slots > 0
            {
                let what =
                    format!("{place}: {id} at {} has {slots} slots, but {}", b.address, why.join(", "));
                return violated(AVOIDED, what);
            }
        }
        Ok(())
    }
}

/// Why a backend must not get new flows, by what the simulation knows for long enough.
fn why_bad(service: &Service, b: &Backend, worker: &Worker) -> Option<String> {
    if b.state != BackendState::Up || b.weight == 0 {
        return Some(format!("it is {:?} with weight {}", b.state, b.weight));
    }
    let now = environment::now();
    let (is_checked, timeout) =
        (service.health.kind != HealthKind::None, Duration::from_millis(service.health.timeout_ms.into()));
    if is_checked && now >= worker.since + BOUND && (!worker.is_alive || worker.delay >= timeout) {
        return Some("its worker is dead".to_owned());
    }
    let is_told = worker.is_alive
        && worker.reporting != Reporting::Silent
        && now >= worker.phase_since.max(worker.since) + BOUND;
    if service.replica.is_some() && is_told && worker.phase != "ready" {
        return Some(format!("its replica says {}", worker.phase));
    }
    None
}

fn check_residency(place: &str, service: &Service, shares: &BTreeMap<IpAddr, u32>) -> Result<(), Violation> {
    for (address, slots) in shares {
        let mut of_address = service.backends.values().filter(|b| b.address == *address).peekable();
        if of_address.peek().is_some() && !of_address.any(|b| service.allows(b)) {
            return violated(RESIDENT, format!("{place}: {address} has {slots} slots, and is not allowed"));
        }
    }
    Ok(())
}

fn check_keys(host: &str, maps: &FakeMaps, published: &Published) -> Result<(), Violation> {
    let mut expected = BTreeMap::new();
    for (name, service) in &published.desired.services {
        let (Ports::One(port), Some(compiled)) = (service.port, published.services.get(name)) else {
            continue;
        };
        let protocol = match service.protocol {
            Protocol::Tcp => lb_common::service::TCP,
            Protocol::Udp => lb_common::service::UDP,
        };
        let key = ServiceKey { vip: to_address(service.vip), port: port.into(), protocol, pad: 0 };
        if !published.problems.contains_key(name) && maps.keys.get(&key) != Some(&compiled.index) {
            return violated(REACHED, format!("{host}: {name} is not reached by {}:{port}", service.vip));
        }
        expected.insert(key, name);
    }
    match maps.keys.keys().find(|key| !expected.contains_key(*key)) {
        Some(key) => violated(REACHED, format!("{host}: {:?} leads to a service that does not exist", key)),
        None => Ok(()),
    }
}
