//! Capacity and demand of each region, from what its replicas report: never a lie in full, never old news as new.
//!
//! Input: a service, the books, and a steady clock. Output: [`Place`]s. How old a report is goes by a clock of our own:
//! neither a step of the host's clock nor one of the replica's makes anything look new or old.

use crate::{
    desired::model::{Backend, BackendId, BackendState, Health, Locality, Name, Readiness, Service},
    observed::{
        health,
        replica::{self, scores::old_after},
    },
    plan::policy::{Seen, region::Place},
};
use std::collections::{BTreeMap, BTreeSet};

/// A replica is believed to have so many times the capacity of the middle one at most.
const BIGGEST: u32 = 8;
/// From so many replicas on there is a middle one.
const ENOUGH: usize = 3;

/// When each replica was last heard, by a steady clock.
#[derive(Debug, Default)]
pub struct ReportTimes {
    /// Reports counted then, and when the last of them came.
    last: BTreeMap<BackendId, (u64, u64)>,
}

impl ReportTimes {
    /// Looks who has reported since the last look.
    pub fn look(&mut self, book: &replica::ReplicaRegistry, now_ms: u64) {
        book.read(|entries| {
            self.last.retain(|id, _| entries.contains_key(id));
            for (id, entry) in entries.iter().filter(|(_, e)| e.report.is_some()) {
                match self.last.get_mut(id) {
                    Some((reports, at)) if *reports != entry.reports => {
                        (*reports, *at) = (entry.reports, now_ms)
                    }
                    Some(_) => {}
                    // What is left from before the restart was not heard now.
                    None if entry.reports == 0 => {}
                    None => drop(self.last.insert(id.clone(), (entry.reports, now_ms))),
                }
            }
        });
    }

    fn is_fresh(&self, id: &BackendId, old_ms: u64, now_ms: u64) -> bool {
        self.last.get(id).is_some_and(|(_, at)| now_ms.saturating_sub(*at) <= old_ms)
    }
}

/// One backend, as far as is known.
pub struct Known {
    /// Its name.
    pub name: Name,
    /// Its region and zone, the host's own where it says none.
    pub region: Name,
    /// Zone.
    pub zone: Name,
    /// It says itself where it is.
    pub is_placed: bool,
    /// It would take new flows.
    pub takes: bool,
    /// Whether checks say that it is up; none if nothing is checked, or nothing known yet.
    pub is_up: Option<bool>,
    /// Requests that it has, and can run at once; if its replica has ever said.
    pub load: Option<(u64, Option<u32>)>,
    /// That is not old.
    pub is_fresh: bool,
}

/// Everything known of a service's backends.
pub fn backends(
    name: &Name,
    service: &Service,
    here: &Locality,
    (book, replicas, heard): (&health::HealthRegistry, &replica::ReplicaRegistry, &ReportTimes),
    now_ms: u64,
) -> Vec<Known> {
    let old_ms = service.replica.as_ref().map_or(0, |source| old_after(source).as_millis() as u64);
    let checked = service.replica.is_some() || service.health.kind != crate::desired::model::HealthKind::None;
    let known = |(backend, b): (&Name, &Backend)| {
        let id = BackendId { service: name.clone(), backend: backend.clone() };
        let health = book.get(&id).map_or(Health::Unknown, |e| e.health);
        let (readiness, load) = replicas.read(|all| match all.get(&id) {
            Some(entry) if service.replica.is_some() => {
                let load = entry.report.as_ref().map(|r| {
                    let capacity = r.capacity.or(service.replica.as_ref().and_then(|s| s.capacity));
                    (u64::from(r.running) + u64::from(r.waiting), capacity)
                });
                (entry.readiness, load)
            }
            _ => (Readiness::Unknown, None),
        });
        let seen = Seen::of(service, health, readiness);
        let up = seen.health != Health::Unhealthy && !seen.readiness.declines();
        Known {
            name: backend.clone(),
            region: b.region.clone().unwrap_or_else(|| here.region.clone()),
            zone: b.zone.clone().unwrap_or_else(|| here.zone.clone()),
            is_placed: b.region.is_some(),
            takes: up && b.state == BackendState::Up && b.weight > 0,
            is_up: (checked && seen.health != Health::Unknown).then_some(seen.health == Health::Healthy),
            load,
            is_fresh: heard.is_fresh(&id, old_ms, now_ms),
        }
    };
    service.backends.iter().map(known).collect()
}

/// What is put together by name.
#[derive(Default)]
struct Sum {
    backends: u32,
    capacity: u64,
    load: u64,
    known: u32,
    stale: u32,
}

/// Sums up by region (or zone), and says what was not believed.
pub fn places(
    backends: &[Known],
    by: impl Fn(&Known) -> Option<&Name>,
    notes: &mut Vec<String>,
) -> Vec<Place> {
    let mut capacities: Vec<u32> =
        backends.iter().filter(|b| b.takes).filter_map(|b| b.load.and_then(|(_, c)| c)).collect();
    capacities.sort_unstable();
    let most = match capacities.len() {
        n if n >= ENOUGH => capacities[n / 2].saturating_mul(BIGGEST),
        _ => u32::MAX,
    };
    let mut sums: BTreeMap<&Name, Sum> = BTreeMap::new();
    let (mut bounded, mut names) = (Vec::new(), BTreeSet::new());
    for b in backends {
        let Some(name) = by(b) else { continue };
        let sum = sums.entry(name).or_default();
        names.insert(name);
        if !b.takes {
            continue;
        }
        sum.backends += 1;
        let Some((load, Some(capacity))) = b.load else { continue };
        if capacity > most {
            bounded.push(format!("{} ({capacity})", b.name));
        }
        sum.known += 1;
        sum.stale += u32::from(!b.is_fresh);
        sum.capacity = sum.capacity.saturating_add(capacity.min(most).into());
        sum.load = sum.load.saturating_add(load);
    }
    if !bounded.is_empty() {
        notes.push(format!(
            "capacity claimed by {} is counted as {most}, {BIGGEST} times that of the middle replica",
            bounded.join(", ")
        ));
    }
    let place = |(name, sum): (&Name, Sum)| {
        // Where few say how much they can, the sum says nothing about all.
        let is_measured = sum.known * 2 > sum.backends;
        let is_stale = is_measured && sum.stale * 2 > sum.known;
        if is_stale {
            notes.push(format!(
                "{} of {} replicas in {name} have not been heard for long",
                sum.stale, sum.known
            ));
        }
        Place {
            name: name.clone(),
            is_local: false,
            is_allowed: true,
            is_draining: false,
            is_down: false,
            is_spilling: false,
            backends: sum.backends,
            capacity: is_measured.then_some(sum.capacity),
            load: sum.load,
            is_stale,
            rtt_us: None,
        }
    };
    sums.into_iter().map(place).collect()
}
