//! The region controller: evaluates all inputs, decides, publishes the decisions, and sends them to the reconciler.

use super::{
    Explained, KEY, PeerReport, RegionShown, RegionSnapshot, RolloutShown,
    measure::{self, Counting, KnownGood, MeasuredBackend, ReportTimes, VersionShares},
    peers::{self, is_spilling, resume_decision},
    rollouts::{self, Abort, Rollouts},
    rtt::{self, Meter, Targets, Times},
};
use crate::{
    desired::{
        model::{
            Canary, Desired, Locality, Name, RegionPolicy, RegionRules, RegionShares, RegionState, Rollout,
            RolloutState, Service,
        },
        store::{HostValues, Local, Store},
    },
    observed::{
        health::{self, ProbeTarget},
        replica,
    },
    plan::policy::{
        canary::CanaryVerdict,
        coverage::{Coverage, RegionVersions},
        region::{Agreed, Inputs, Place, RegionDecision, Vote, count_votes, decide},
    },
};
use futures_util::future::BoxFuture;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// Key of the decisions in the host's local store.
const DECISIONS_KEY: &str = "regions";
/// Shortest and longest time between two evaluations.
const TICK: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// Backends per region whose round-trip time is measured.
const RTT_TARGETS: usize = 2;

/// Decides how services are spread over regions and zones.
pub struct RegionController {
    here: Locality,
    host: String,
    store: Arc<dyn Store>,
    local: Arc<dyn Local>,
    health: Arc<health::HealthRegistry>,
    replicas: Arc<replica::ReplicaRegistry>,
    began: Instant,
    report_times: ReportTimes,
    known_good: BTreeMap<Name, KnownGood>,
    rollouts: Rollouts,
    decisions: BTreeMap<Name, RegionDecision>,
    steers: BTreeMap<Name, Arc<RegionShares>>,
    report: PeerReport,
    peer_values: watch::Receiver<HostValues>,
    times: (watch::Sender<Times>, watch::Receiver<Times>),
    targets: watch::Sender<Arc<Targets>>,
    meter: Meter,
    snapshots: watch::Sender<Arc<RegionSnapshot>>,
    aborting: Arc<AtomicBool>,
}

/// Commits changes of the desired state that the daemon itself makes.
pub trait CommitDesired: Send + Sync + 'static {
    /// Stores a change under the daemon's name, if it changes anything. `change` is called again after a conflict.
    fn commit_as_daemon(
        self: Arc<Self>,
        message: String,
        change: Box<dyn FnMut(&mut Desired) + Send>,
    ) -> BoxFuture<'static, Result<(), String>>;
}

/// Hosts whose decisions this host follows; none where it decides itself.
#[derive(Clone, Copy)]
struct Leaders<'a> {
    /// For the shares of regions: the first host of the region by name.
    region: Option<&'a PeerReport>,
    /// For the shares of zones: the first host of the zone by name.
    zone: Option<&'a PeerReport>,
}

impl<'a> Leaders<'a> {
    fn of(peers: &'a [PeerReport], own: &PeerReport) -> Self {
        let first = |in_zone: bool| {
            let near = peers.iter().filter(|p| p.region == own.region && (!in_zone || p.zone == own.zone));
            near.min_by(|a, b| a.host.cmp(&b.host)).filter(|p| p.host < own.host)
        };
        Self { region: first(false), zone: first(true) }
    }
}

/// Result of one evaluation of all services.
struct Evaluation {
    snapshot: RegionSnapshot,
    aborts: Vec<Abort>,
    /// Whether other hosts may follow this one: it is the first of its zone.
    is_leader: bool,
}

impl RegionController {
    /// Creates the controller of this host, starting from the decisions from before a restart.
    pub async fn new(
        (here, host): (Locality, String),
        store: Arc<dyn Store>,
        local: Arc<dyn Local>,
        (health, replicas): (Arc<health::HealthRegistry>, Arc<replica::ReplicaRegistry>),
    ) -> Self {
        let saved = local.load(DECISIONS_KEY).await.ok().flatten();
        let steers: BTreeMap<Name, RegionShares> =
            saved.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let decisions =
            steers.iter().map(|(name, steer)| (name.clone(), resume_decision(steer, &here))).collect();
        let (region, zone) = (here.region.to_string(), here.zone.to_string());
        let report = PeerReport { host: host.clone(), region, zone, ..PeerReport::default() };
        let peer_values = store.published();
        Self {
            here,
            host,
            store,
            local,
            health,
            replicas,
            began: Instant::now(),
            report_times: ReportTimes::default(),
            known_good: BTreeMap::new(),
            rollouts: Rollouts::default(),
            decisions,
            steers: BTreeMap::new(),
            report,
            peer_values,
            times: watch::channel(Times::default()),
            targets: watch::Sender::default(),
            meter: rtt::handshake(),
            snapshots: watch::Sender::default(),
            aborting: Arc::default(),
        }
    }

    /// Measures round-trip times in another way than by TCP handshakes.
    pub fn with_meter(self, meter: Meter) -> Self {
        Self { meter, ..self }
    }

    /// Watches the decisions with their inputs.
    pub fn snapshots(&self) -> watch::Receiver<Arc<RegionSnapshot>> {
        self.snapshots.subscribe()
    }

    /// Decides for this state before anything is applied.
    pub fn decide_first(&mut self, desired: &Desired) -> BTreeMap<Name, Arc<RegionShares>> {
        let evaluation = self.evaluate(desired);
        self.snapshots.send_replace(Arc::new(evaluation.snapshot));
        self.steers.clone()
    }

    /// Decides whenever an input changes, until the receiver of `events` or the store is gone.
    pub async fn run<E: From<BTreeMap<Name, Arc<RegionShares>>>>(
        mut self,
        control: Arc<impl CommitDesired>,
        events: mpsc::Sender<E>,
    ) {
        let mut desired = self.store.watch();
        let mut reports = self.replicas.changes();
        let (mut peer_values, mut times) = (self.store.published(), self.times.1.clone());
        tokio::spawn(rtt::run(self.targets.subscribe(), self.times.0.clone(), self.meter.clone()));
        let mut sent = None;
        loop {
            let stored = desired.borrow_and_update().clone();
            let (revision, state) = (stored.revision, stored.desired);
            let began = Instant::now();
            let mut evaluation = self.evaluate(&state);
            evaluation.snapshot.revision = revision.number;
            // Evaluations take at most a tenth of the time, however many services there are.
            let pause = TICK.0.max(began.elapsed() * 10);
            self.update_rtt_targets(&state);
            if sent.as_ref() != Some(&self.steers) {
                self.save().await;
                if events.send(self.steers.clone().into()).await.is_err() {
                    return;
                }
                sent = Some(self.steers.clone());
            }
            self.publish_report(&evaluation);
            rollouts::abort(&control, &self.aborting, evaluation.aborts);
            self.snapshots.send_replace(Arc::new(evaluation.snapshot));
            tokio::time::sleep(pause).await;
            tokio::select! {
                changed = desired.changed() => if changed.is_err() { return },
                _ = peer_values.changed() => {}
                _ = times.changed() => {}
                _ = reports.changed() => {}
                () = tokio::time::sleep(TICK.1) => {}
            }
            peer_values.mark_unchanged();
            reports.mark_unchanged();
        }
    }

    /// Reports of all other hosts, by host.
    fn peer_reports(&self) -> Vec<PeerReport> {
        let values = self.peer_values.borrow().clone();
        let all = values.iter().filter(|(key, _)| key.starts_with(KEY));
        all.filter_map(|(_, value)| serde_json::from_slice::<PeerReport>(value).ok())
            .filter(|report| report.host != self.host)
            .collect()
    }

    fn evaluate(&mut self, desired: &Desired) -> Evaluation {
        let now_ms = self.began.elapsed().as_millis() as u64;
        self.report_times.update(&self.replicas, now_ms);
        let peers = if self.store.link().borrow().connected { self.peer_reports() } else { Vec::new() };
        let times = self.times.1.borrow().clone();
        let wanted: Vec<(&Name, &Arc<Service>)> =
            desired.services.iter().filter(|(_, s)| s.is_regional() || s.rollout.is_some()).collect();
        let registries = (&*self.health, &*self.replicas, &self.report_times);
        let measured: Vec<Vec<MeasuredBackend>> = wanted
            .iter()
            .map(|(name, s)| measure::measure_backends(name, s, &self.here, registries, now_ms))
            .collect();
        self.report.sees = visible_regions(measured.iter().flatten());
        self.report.rtt_us = (*times).clone();
        let regions = self.show_regions(desired, &peers, &measured);
        self.known_good.retain(|name, _| desired.services.contains_key(name));
        self.rollouts.retain(|name| desired.services.get(name).is_some_and(|s| s.rollout.is_some()));
        let leaders = Leaders::of(&peers, &self.report);
        let is_leader = leaders.zone.is_none();
        let is_first = peers.iter().all(|peer| peer.host > self.host);
        let (mut snapshot, mut aborts) = (RegionSnapshot::default(), Vec::new());
        let mut steers = BTreeMap::new();
        let mut decisions = BTreeMap::new();
        for ((name, service), backends) in wanted.into_iter().zip(&measured) {
            let (explained, decision, abort) =
                self.decide_service(name, service, backends, (&regions, &peers, leaders), now_ms);
            aborts.extend(abort.filter(|_| is_first));
            let steer = match self.steers.get(name) {
                Some(same) if **same == explained.steer => same.clone(),
                _ => Arc::new(explained.steer.clone()),
            };
            steers.insert(name.clone(), steer);
            decisions.insert(name.clone(), decision);
            snapshot.services.insert(name.clone(), explained);
        }
        (self.steers, self.decisions) = (steers, decisions);
        snapshot.regions = regions;
        Evaluation { snapshot, aborts, is_leader }
    }

    /// Decides for one service. Returns the decision with its inputs, and the abort of its roll-out, if it must be.
    fn decide_service(
        &mut self,
        name: &Name,
        service: &Service,
        backends: &[MeasuredBackend],
        (regions, peers, leaders): (&[RegionShown], &[PeerReport], Leaders<'_>),
        now_ms: u64,
    ) -> (Explained, RegionDecision, Option<Abort>) {
        let default = RegionRules::default();
        let rules = service.regions.as_ref().unwrap_or(&default);
        let service_ms = self.report_times.service_ms(name, service);
        let mut notes = Vec::new();
        // Under residency, a backend without a region belongs to no region.
        let has_place = |b: &MeasuredBackend| b.is_placed || rules.allowed.is_none();
        let most = self.known_good.entry(name.clone()).or_default().update(backends, now_ms);
        let here = &self.here.region;
        // By these policies, clients of all regions have the same shares, so no region is the home of any.
        let home = (rules.policy == RegionPolicy::ActiveActive).then_some(here);
        let rollout = service.rollout.as_ref();
        let versions = |home, zones_of| rollout.map(|rollout| VersionShares { rollout, zones_of, home });
        let counting = Counting { most, versions: versions(home, None) };
        let is_allowed = |region| rules.allowed.as_ref().is_none_or(|names| names.contains(region));
        let placed = || backends.iter().filter(|b| has_place(b) && is_allowed(&b.region));
        let by_version = rollout.map_or_else(Vec::new, |r| measure::versions_by_region(placed(), r));
        let mut places =
            measure::sum_places(backends, |b| has_place(b).then_some(&b.region), counting, &mut notes);
        for place in &mut places {
            self.describe_place(place, regions, service_ms);
            place.is_allowed = is_allowed(&place.name);
            place.lacks_version = rollout.is_some_and(|rollout| {
                let region = by_version.iter().find(|v| v.region == place.name);
                region.is_some_and(|v| v.lacks_version(rollout, home.is_none_or(|home| *home == place.name)))
            });
            // By weight, every region sends flows elsewhere, and takes its share nevertheless.
            place.is_spilling =
                rules.policy == RegionPolicy::ActiveActive && is_spilling(&place.name, name, peers);
        }
        let is_here = |b: &MeasuredBackend| has_place(b) && b.region == self.here.region;
        let counting = Counting { most, versions: versions(None, Some(here)) };
        let mut zones =
            measure::sum_places(backends, |b| is_here(b).then_some(&b.zone), counting, &mut Vec::new());
        for zone in &mut zones {
            (zone.is_local, zone.service_ms) = (zone.name == self.here.zone, service_ms);
        }
        let inputs = Inputs {
            here: &self.here,
            rules,
            regions: &places,
            zones: &zones,
            region_peers: &peers::regions(name, &self.here, peers),
            zone_peers: &peers::zones(name, &self.here, peers),
            interval_ms: service.replica.as_ref().map_or(0, |source| source.interval_ms.into()),
            now_ms,
        };
        let before = self.decisions.get(name).cloned().unwrap_or_default();
        let mut decision = decide(&inputs, &before);
        let (mut steer, decided_by) = self.follow_leaders(name, &mut decision, &before, leaders, now_ms);
        let judged = rollout.map(|rollout| self.judge_rollout((name, service), rollout, by_version));
        let (rollout, abort) = judged.map_or((None, None), |(shown, canary, abort)| {
            steer.canary = Some(canary);
            (Some(shown), abort)
        });
        let explained = Explained {
            service: name.clone(),
            region: self.here.region.clone(),
            zone: self.here.zone.clone(),
            policy: rules.policy,
            allowed: rules.allowed.clone(),
            decided_by,
            regions: places,
            zones,
            decision: decision.clone(),
            steer,
            notes,
            rollout,
        };
        (explained, decision, abort)
    }

    /// Fills in what is known of a region whatever the service.
    fn describe_place(&self, place: &mut Place, regions: &[RegionShown], service_ms: Option<u32>) {
        let shown = regions.iter().find(|r| r.name == place.name);
        place.is_local = place.name == self.here.region;
        place.is_draining = shown.is_some_and(|r| r.state == RegionState::Draining);
        place.is_down = shown.is_some_and(|r| r.agreed == Agreed::Down);
        place.rtt_us = shown.and_then(|r| r.rtt_us).filter(|_| !place.is_local);
        place.service_ms = service_ms;
    }

    /// Judges a roll-out. Returns its results, the share and backends of the new version, and the abort, if it must be.
    fn judge_rollout(
        &mut self,
        (name, service): (&Name, &Service),
        rollout: &Rollout,
        by_version: Vec<RegionVersions>,
    ) -> (RolloutShown, Canary, Option<Abort>) {
        let coverage = Coverage::new(rollout, by_version);
        let (backends, shown, verdict) =
            self.rollouts.update((name, service), rollout, &self.replicas, coverage);
        let abort = match (verdict, rollout.state) {
            (CanaryVerdict::Abort(why), RolloutState::Running) => Some(Abort::new(name, rollout, why)),
            _ => None,
        };
        let (permille, regions) = (rollout.share(), rollout.regions.clone());
        (shown, Canary { permille, regions, backends }, abort)
    }

    /// Replaces the decision by those of the hosts that this one follows. Returns the shares in effect, and who decided.
    fn follow_leaders(
        &self,
        name: &Name,
        decision: &mut RegionDecision,
        before: &RegionDecision,
        leaders: Leaders<'_>,
        now_ms: u64,
    ) -> (RegionShares, String) {
        let (mut steer, mut decided_by) = (decision.region_shares(), self.host.clone());
        // All hosts of a region have its load, so one of them decides where its flows go; and one per zone, between zones.
        if let Some((leader, theirs)) = leaders.region.and_then(|l| Some((l, l.steers.get(name)?))) {
            let resumed = resume_decision(theirs, &self.here);
            decision.spill.follow(&before.spill, resumed.spill.shares, now_ms);
            (steer.shares, steer.order) = (theirs.shares.clone(), theirs.order.clone());
            decided_by.clone_from(&leader.host);
        }
        if let Some(theirs) = leaders.zone.and_then(|leader| leader.steers.get(name)) {
            let resumed = resume_decision(theirs, &self.here);
            decision.zone_spill.follow(&before.zone_spill, resumed.zone_spill.shares, now_ms);
            steer.zones.clone_from(&theirs.zones);
        }
        (steer, decided_by)
    }

    /// All known regions, with the votes on them.
    fn show_regions(
        &self,
        desired: &Desired,
        peers: &[PeerReport],
        measured: &[Vec<MeasuredBackend>],
    ) -> Vec<RegionShown> {
        let mut names: BTreeSet<Name> = desired.regions.keys().cloned().collect();
        names.insert(self.here.region.clone());
        names.extend(measured.iter().flatten().map(|b| b.region.clone()));
        names.extend(peers.iter().filter_map(|peer| peer.region.parse().ok()));
        let times = self.times.1.borrow().clone();
        let all = || peers.iter().chain([&self.report]);
        let shown = |name: Name| {
            let votes: Vec<Vote> = all()
                .filter_map(|report| {
                    let from = report.region.parse().ok()?;
                    Some(Vote { host: report.host.clone(), from, is_up: *report.sees.get(&name)? })
                })
                .collect();
            let there = || measured.iter().flatten().filter(|b| b.region == name);
            RegionShown {
                is_local: name == self.here.region,
                is_declared: desired.regions.contains_key(&name),
                state: desired.regions.get(&name).map_or(RegionState::Up, |r| r.state),
                agreed: count_votes(&votes),
                votes,
                rtt_us: times.get(&name).copied(),
                hosts: all().filter(|report| report.region == name.as_str()).count(),
                backends: there().count(),
                ready: there().filter(|b| b.takes).count(),
                name,
            }
        };
        names.into_iter().map(shown).collect()
    }

    /// Chooses the addresses whose round-trip times are measured.
    fn update_rtt_targets(&self, desired: &Desired) {
        let mut targets = Targets::new();
        let mut chosen: BTreeSet<SocketAddr> = BTreeSet::new();
        for service in desired.services.values().filter(|s| s.is_regional()) {
            for backend in service.backends.values() {
                let Some(region) = backend.region.as_ref().filter(|r| **r != self.here.region) else {
                    continue;
                };
                let mut address = ProbeTarget::of(service, backend).address;
                if let Some(port) = service.replica.as_ref().and_then(|source| source.port)
                    && address.port() == 0
                {
                    address.set_port(port);
                }
                let known = targets.entry(region.clone()).or_default();
                if known.len() < RTT_TARGETS && address.port() != 0 && chosen.insert(address) {
                    known.push(address);
                }
            }
        }
        targets.retain(|_, addresses| !addresses.is_empty());
        self.targets.send_if_modified(|before| {
            let is_changed = **before != targets;
            if is_changed {
                *before = Arc::new(targets);
            }
            is_changed
        });
    }

    /// Publishes this host's report to the other hosts, if it has changed.
    fn publish_report(&mut self, evaluation: &Evaluation) {
        let shares =
            |(name, e): (&Name, &Explained)| (name.clone(), RegionShares { canary: None, ..e.steer.clone() });
        let steers = match evaluation.is_leader {
            true => evaluation.snapshot.services.iter().map(shares).collect(),
            false => BTreeMap::new(),
        };
        let report = PeerReport { steers, ..self.report.clone() };
        let key = format!("{KEY}{}", self.host);
        let value = serde_json::to_vec(&report).expect("names and numbers have a JSON form");
        if self.peer_values.borrow().get(&key) != Some(&value) {
            self.store.publish(&key, Some(value));
        }
        self.report = report;
    }

    /// Saves the shares for the next start.
    async fn save(&self) {
        let plain: BTreeMap<&Name, &RegionShares> =
            self.steers.iter().map(|(name, s)| (name, &**s)).collect();
        let bytes = serde_json::to_vec(&plain).expect("names and numbers have a JSON form");
        if let Err(error) = self.local.save(DECISIONS_KEY, bytes).await {
            tracing::error!(%error, "cannot save the decisions about regions");
        }
    }
}

/// Regions with checked backends: up if any of them is up.
fn visible_regions<'a>(measured: impl Iterator<Item = &'a MeasuredBackend>) -> BTreeMap<Name, bool> {
    let mut sees: BTreeMap<Name, bool> = BTreeMap::new();
    for b in measured {
        if let Some(is_up) = b.is_up {
            *sees.entry(b.region.clone()).or_default() |= is_up;
        }
    }
    sees
}
