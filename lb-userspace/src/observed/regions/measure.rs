//! Capacity and load of each region, from the reports of its replicas: implausible capacities are bounded, old reports
//! are marked as stale.
//!
//! Input: a service, the registries, and a monotonic clock. Output: [`Place`]s. The age of a report is measured with the
//! monotonic clock: steps of the host's or the replica's wall clock do not make a report look new or old.

use crate::{
    desired::model::{Backend, BackendId, BackendState, Health, Locality, Name, Readiness, Service},
    observed::{
        health,
        replica::{self, scores::stale_after},
    },
    plan::policy::{BackendObservation, region::Place},
};
use std::collections::{BTreeMap, BTreeSet};

/// A replica's capacity counts at most as this many times the median replica's.
const MAX_RATIO: u32 = 8;
/// Smallest number of replicas for which a median is meaningful.
const MIN_FOR_MEDIAN: usize = 3;

/// Time of each replica's last report, by a monotonic clock.
#[derive(Debug, Default)]
pub struct ReportTimes {
    /// Number of reports at the last update, and time of the last report in milliseconds.
    last: BTreeMap<BackendId, (u64, u64)>,
}

impl ReportTimes {
    /// Notes which replicas have reported since the last update.
    pub fn update(&mut self, registry: &replica::ReplicaRegistry, now_ms: u64) {
        registry.read(|entries| {
            self.last.retain(|id, _| entries.contains_key(id));
            for (id, entry) in entries.iter().filter(|(_, e)| e.report.is_some()) {
                match self.last.get_mut(id) {
                    Some((reports, at)) if *reports != entry.reports => {
                        (*reports, *at) = (entry.reports, now_ms)
                    }
                    Some(_) => {}
                    // An entry from before the restart has no report since.
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

/// Observed state of one backend.
pub struct MeasuredBackend {
    /// Name of the backend.
    pub name: Name,
    /// The backend's region; the host's own if the backend has none.
    pub region: Name,
    /// The backend's zone; the host's own if the backend has none.
    pub zone: Name,
    /// Whether the backend has a region in the desired state.
    pub is_placed: bool,
    /// Whether the backend can take new flows.
    pub takes: bool,
    /// Whether health checks report the backend up; none without checks or verdict.
    pub is_up: Option<bool>,
    /// Requests running and waiting, and capacity, if the replica has ever reported.
    pub load: Option<(u64, Option<u32>)>,
    /// Whether the last report is recent.
    pub is_fresh: bool,
}

/// Collects the observed state of a service's backends.
pub fn measure_backends(
    name: &Name,
    service: &Service,
    here: &Locality,
    (health, replicas, report_times): (&health::HealthRegistry, &replica::ReplicaRegistry, &ReportTimes),
    now_ms: u64,
) -> Vec<MeasuredBackend> {
    let old_ms = service.replica.as_ref().map_or(0, |source| stale_after(source).as_millis() as u64);
    let checked = service.replica.is_some() || service.health.kind != crate::desired::model::HealthKind::None;
    let measure = |(backend, b): (&Name, &Backend)| {
        let id = BackendId { service: name.clone(), backend: backend.clone() };
        let health = health.get(&id).map_or(Health::Unknown, |e| e.health);
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
        let seen = BackendObservation::of(service, health, readiness);
        let up = seen.health != Health::Unhealthy && !seen.readiness.declines();
        MeasuredBackend {
            name: backend.clone(),
            region: b.region.clone().unwrap_or_else(|| here.region.clone()),
            zone: b.zone.clone().unwrap_or_else(|| here.zone.clone()),
            is_placed: b.region.is_some(),
            takes: up && b.state == BackendState::Up && b.weight > 0,
            is_up: (checked && seen.health != Health::Unknown).then_some(seen.health == Health::Healthy),
            load,
            is_fresh: report_times.is_fresh(&id, old_ms, now_ms),
        }
    };
    service.backends.iter().map(measure).collect()
}

/// Sums over the backends of one place.
#[derive(Default)]
struct Sum {
    backends: u32,
    capacity: u64,
    load: u64,
    known: u32,
    stale: u32,
}

/// Sums up backends by region or zone; adds a note for each input that was bounded or is stale.
pub fn sum_places(
    backends: &[MeasuredBackend],
    by: impl Fn(&MeasuredBackend) -> Option<&Name>,
    notes: &mut Vec<String>,
) -> Vec<Place> {
    let mut capacities: Vec<u32> =
        backends.iter().filter(|b| b.takes).filter_map(|b| b.load.and_then(|(_, c)| c)).collect();
    capacities.sort_unstable();
    let most = match capacities.len() {
        n if n >= MIN_FOR_MEDIAN => capacities[n / 2].saturating_mul(MAX_RATIO),
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
            "capacity reported by {} is counted as {most}, {MAX_RATIO} times the median replica's",
            bounded.join(", ")
        ));
    }
    let place = |(name, sum): (&Name, Sum)| {
        // If half of the backends or more report no capacity, the sum does not represent the place.
        let is_measured = sum.known * 2 > sum.backends;
        let is_stale = is_measured && sum.stale * 2 > sum.known;
        if is_stale {
            notes.push(format!(
                "{} of {} replicas in {name} have not reported recently",
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
