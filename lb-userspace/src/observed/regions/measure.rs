//! Capacity and load of each region, from the reports of its replicas: implausible capacities are bounded, old reports
//! are marked as stale.
//!
//! Input: a service, the registries, and a monotonic clock. Output: [`Place`]s. The age of a report is measured with the
//! monotonic clock: steps of the host's or the replica's wall clock do not make a report look new or old.

use super::{
    rollouts::runs_new,
    service_time::{ServiceTimes, lower_median, pooled},
};
use crate::{
    desired::model::{
        Backend, BackendId, BackendState, Health, Locality, Name, Readiness, Report, Rollout, Service, WHOLE,
    },
    observed::{
        health,
        replica::{self, scores::stale_after},
    },
    plan::policy::{BackendObservation, coverage::RegionVersions, region::Place},
};
use std::collections::BTreeMap;

/// A replica's capacity counts at most as this many times the median replica's.
const MAX_RATIO: u32 = 8;
/// Smallest number of replicas for which a median is meaningful.
const MIN_FOR_MEDIAN: usize = 2;
/// The trusted median at most doubles or halves in this time, in milliseconds.
const MEDIAN_MS: u64 = 60_000;
/// A replica's backlog per slot counts at most as this many times that of its place's median replica.
const MAX_BACKLOG: u64 = 8;

/// Time of each replica's last report, by a monotonic clock, and what follows from reports over time.
#[derive(Debug, Default)]
pub struct ReportTimes {
    /// Number of reports at the last update, and time of the last report in milliseconds.
    last: BTreeMap<BackendId, (u64, u64)>,
    service_times: ServiceTimes,
}

impl ReportTimes {
    /// Notes which replicas have reported since the last update.
    pub fn update(&mut self, registry: &replica::ReplicaRegistry, now_ms: u64) {
        registry.read(|entries| {
            self.last.retain(|id, _| entries.contains_key(id));
            self.service_times.retain(|id, _| entries.contains_key(id));
            for (id, entry, report) in entries.iter().filter_map(|(id, e)| Some((id, e, e.report.as_ref()?)))
            {
                match self.last.get_mut(id) {
                    Some((reports, at)) if *reports != entry.reports => {
                        (*reports, *at) = (entry.reports, now_ms);
                        if let Some(answers) = report.answers {
                            let time = self.service_times.entry(id.clone()).or_default();
                            time.update(report.running, answers.finished, now_ms);
                        }
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

    /// Mean service time of a service's replicas in milliseconds, if they count requests.
    pub fn service_ms(&self, name: &Name, service: &Service) -> Option<u32> {
        let id = |backend: &Name| BackendId { service: name.clone(), backend: backend.clone() };
        pooled(service.backends.keys().map(|b| self.service_times.get(&id(b))?.mean_ms()))
    }
}

/// Median capacity of a service's replicas that is trusted: it changes slowly, so a majority that begins to lie is
/// bounded by what was known before.
#[derive(Clone, Copy, Debug, Default)]
pub struct KnownGood {
    median: Option<u32>,
    changed_ms: u64,
}

impl KnownGood {
    /// Updates the median by all replicas that have ever reported, whether they take flows or not. Returns the largest
    /// capacity that one replica counts for.
    pub fn update(&mut self, backends: &[MeasuredBackend], now_ms: u64) -> u32 {
        let all: Vec<u32> = backends.iter().filter_map(|b| b.capacity.filter(|_| b.load.is_some())).collect();
        let is_enough = all.len() >= MIN_FOR_MEDIAN;
        let next = match (self.median, lower_median(all).filter(|_| is_enough)) {
            (Some(good), Some(_)) if now_ms.saturating_sub(self.changed_ms) < MEDIAN_MS => Some(good),
            (Some(good), Some(now)) => Some(now.clamp(good / 2, good.saturating_mul(2))),
            (good, now) => good.or(now),
        };
        if next != self.median {
            (self.median, self.changed_ms) = (next, now_ms);
        }
        self.median.map_or(u32::MAX, |median| median.saturating_mul(MAX_RATIO))
    }
}

/// A roll-out, for the shares of its versions.
#[derive(Clone, Copy, Debug)]
pub struct VersionShares<'a> {
    /// The roll-out.
    pub rollout: &'a Rollout,
    /// Region of the places, if they are zones; none if they are regions.
    pub zones_of: Option<&'a Name>,
    /// Region whose own flows are served by whatever it has; all places if none.
    pub home: Option<&'a Name>,
}

/// How to count capacities.
#[derive(Clone, Copy, Debug)]
pub struct Counting<'a> {
    /// Largest capacity that one replica counts for.
    pub most: u32,
    /// Shares of versions during a roll-out.
    pub versions: Option<VersionShares<'a>>,
}

/// Observed state of one backend.
#[derive(Clone, Debug)]
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
    /// Requests running and waiting, if the replica has ever reported.
    pub load: Option<(u64, u64)>,
    /// Requests that the replica can run concurrently: reported, or configured.
    pub capacity: Option<u32>,
    /// Whether the replica runs the version that is being rolled out.
    pub is_new: bool,
    /// Version that the replica reports.
    pub version: Option<String>,
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
    let checked = service.replica.is_some() || !service.health.kind.is_none();
    let measure = |(backend, b): (&Name, &Backend)| {
        let id = BackendId { service: name.clone(), backend: backend.clone() };
        let health = health.get(&id).map_or(Health::Unknown, |e| e.health);
        let (readiness, report) = replicas.read(|all| match all.get(&id) {
            Some(entry) if service.replica.is_some() => (entry.readiness, entry.report.clone()),
            _ => (Readiness::Unknown, None),
        });
        let configured = service.replica.as_ref().and_then(|source| source.capacity);
        let is_new = |r: &Report| service.rollout.as_ref().is_some_and(|rollout| runs_new(r, rollout));
        let seen = BackendObservation::of(service, health, readiness);
        let up = seen.health != Health::Unhealthy && !seen.readiness.declines();
        MeasuredBackend {
            name: backend.clone(),
            region: b.region.clone().unwrap_or_else(|| here.region.clone()),
            zone: b.zone.clone().unwrap_or_else(|| here.zone.clone()),
            is_placed: b.region.is_some(),
            takes: up && b.state == BackendState::Up && b.weight > 0,
            is_up: (checked && seen.health != Health::Unknown).then_some(seen.health == Health::Healthy),
            load: report.as_ref().map(|r| (r.running.into(), r.waiting.into())),
            capacity: report.as_ref().and_then(|r| r.capacity.or(configured)),
            is_new: report.as_ref().is_some_and(is_new),
            version: report.as_ref().and_then(|r| r.version.clone()),
            is_fresh: report_times.is_fresh(&id, old_ms, now_ms),
        }
    };
    service.backends.iter().map(measure).collect()
}

/// Versions of a service's replicas by region, in name order.
pub fn versions_by_region<'a>(
    backends: impl Iterator<Item = &'a MeasuredBackend>,
    rollout: &Rollout,
) -> Vec<RegionVersions> {
    let mut regions: BTreeMap<&Name, RegionVersions> = BTreeMap::new();
    for b in backends {
        let empty = || RegionVersions::new(b.region.clone(), rollout);
        let region = regions.entry(&b.region).or_insert_with(empty);
        region.new += u32::from(b.is_new);
        if !b.takes {
            continue;
        }
        if b.is_new {
            region.new_ready += 1;
            continue;
        }
        region.old_ready += 1;
        if let Some(version) = &b.version
            && let Err(at) = region.old_versions.binary_search(version)
        {
            region.old_versions.insert(at, version.clone());
        }
    }
    regions.into_values().collect()
}

/// Sums over the backends of one place and version.
#[derive(Clone, Copy, Default)]
struct Sum {
    backends: u32,
    capacity: u64,
    running: u64,
    waiting: u64,
    known: u32,
    stale: u32,
}

impl Sum {
    /// Adds a replica. `backlog` is the median of its place, in thousandths of a request per slot.
    fn add(&mut self, b: &MeasuredBackend, most: u32, backlog: u32) {
        self.backends += 1;
        let (Some((running, waiting)), Some(capacity)) = (b.load, b.capacity) else { return };
        let capacity = u64::from(capacity.min(most));
        self.known += 1;
        self.stale += u32::from(!b.is_fresh);
        self.capacity += capacity;
        // What runs beyond the capacity waits for it.
        let running_here = running.min(capacity);
        self.running += running_here;
        let bound = capacity * (1_000 + MAX_BACKLOG * u64::from(backlog)) / 1_000;
        self.waiting += waiting.saturating_add(running - running_here).min(bound);
    }

    fn and(self, other: Self) -> Self {
        Self {
            backends: self.backends + other.backends,
            capacity: self.capacity + other.capacity,
            running: self.running + other.running,
            waiting: self.waiting + other.waiting,
            known: self.known + other.known,
            stale: self.stale + other.stale,
        }
    }

    /// Scales to all versions what is one version's part.
    fn whole(self, part: u16) -> Self {
        let whole = |n: u64| n.saturating_mul(WHOLE.into()) / u64::from(part.max(1));
        Self {
            capacity: whole(self.capacity),
            running: whole(self.running),
            waiting: whole(self.waiting),
            ..self
        }
    }
}

/// What both versions of a place can take together: each gets its share of the flows, so the one that is full first
/// limits both. A version without a share does not count, and a spill has no room where its version is missing.
fn limiting(old: Sum, new: Sum, share: u16, is_home: bool) -> Sum {
    let backends = old.backends + new.backends;
    let parts = [(old, WHOLE - share.min(WHOLE)), (new, share.min(WHOLE))];
    let mut served = parts.into_iter().filter(|(sum, part)| sum.backends > 0 && *part > 0);
    let limits = match (old.backends > 0, new.backends > 0) {
        (true, true) => {
            let first = served.next().expect("one of two shares that add up to the whole is above 0");
            served.fold(first.0.whole(first.1), |least, (sum, part)| {
                let sum = sum.whole(part);
                if sum.capacity < least.capacity { sum } else { least }
            })
        }
        // Where only one version runs, most of the flows that come must be for it.
        _ if is_home || served.next().is_some_and(|(_, part)| part >= WHOLE / 2) => old.and(new),
        _ => Sum { capacity: 0, ..old.and(new) },
    };
    Sum { backends, ..limits }
}

/// Lower median of the replicas' backlogs in each place, in thousandths of a request per slot.
fn median_backlogs<'a>(
    backends: &'a [MeasuredBackend],
    by: &impl Fn(&'a MeasuredBackend) -> Option<&'a Name>,
    most: u32,
) -> BTreeMap<&'a Name, u32> {
    let mut all: BTreeMap<&Name, Vec<u32>> = BTreeMap::new();
    for b in backends.iter().filter(|b| b.takes) {
        if let (Some(name), Some((running, waiting)), Some(capacity)) = (by(b), b.load, b.capacity) {
            let capacity = u64::from(capacity.min(most)).max(1);
            let waiting = waiting.saturating_add(running.saturating_sub(capacity));
            all.entry(name).or_default().push((waiting * 1_000 / capacity).min(u32::MAX.into()) as u32);
        }
    }
    all.into_iter().filter_map(|(name, backlogs)| Some((name, lower_median(backlogs)?))).collect()
}

/// Sums up backends by region or zone; adds a note for each input that was bounded or is stale.
pub fn sum_places<'a>(
    backends: &'a [MeasuredBackend],
    by: impl Fn(&'a MeasuredBackend) -> Option<&'a Name>,
    counting: Counting<'_>,
    notes: &mut Vec<String>,
) -> Vec<Place> {
    let most = counting.most;
    let backlogs = median_backlogs(backends, &by, most);
    let mut sums: BTreeMap<&Name, [Sum; 2]> = BTreeMap::new();
    let mut bounded = Vec::new();
    for b in backends {
        let Some(name) = by(b) else { continue };
        let versions = sums.entry(name).or_default();
        if !b.takes {
            continue;
        }
        versions[usize::from(b.is_new)].add(b, most, backlogs.get(name).copied().unwrap_or(0));
        if let Some(capacity) = b.capacity.filter(|&c| c > most) {
            bounded.push(format!("{} ({capacity})", b.name));
        }
    }
    if !bounded.is_empty() {
        notes.push(format!(
            "capacity reported by {} is counted as {most}, {MAX_RATIO} times the median replica's",
            bounded.join(", ")
        ));
    }
    let place = |(name, [old, new]): (&Name, [Sum; 2])| {
        let sum = match counting.versions {
            Some(VersionShares { rollout, zones_of, home }) => {
                let share = rollout.share_in(zones_of.unwrap_or(name));
                limiting(old, new, share, home.is_none_or(|home| home == name))
            }
            None => old.and(new),
        };
        // If half of the backends or more report no capacity, the sum does not represent the place.
        let counted = old.and(new);
        let is_measured = counted.known * 2 > counted.backends;
        let is_stale = is_measured && counted.stale * 2 > counted.known;
        if is_stale {
            notes.push(format!(
                "{} of {} replicas in {name} have not reported recently",
                counted.stale, counted.known
            ));
        }
        Place {
            name: name.clone(),
            is_allowed: true,
            backends: sum.backends,
            capacity: is_measured.then_some(sum.capacity),
            load: sum.running + sum.waiting,
            waiting: sum.waiting,
            is_stale,
            ..Place::unknown(name)
        }
    };
    sums.into_iter().map(place).collect()
}
