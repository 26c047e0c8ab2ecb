//! The loop: look, decide, tell, and have it applied.

use super::{
    Explained, KEY, PeerReport, RegionShown, RegionSnapshot,
    measure::{self, Known, ReportTimes},
    rollouts::Rollouts,
    rtt::{self, Targets, Times},
};
use crate::{
    desired::{
        model::{
            Canary, Desired, Locality, Name, RegionRules, RegionShares, RegionState, RolloutState, Service,
            Share, WHOLE,
        },
        store::{HostValues, Local, Store},
    },
    observed::{
        health::{self, ProbeTarget},
        replica,
    },
    plan::policy::{
        canary::Verdict,
        region::{Agreed, Decision, Inputs, Vote, agreed, decide},
    },
};
use futures_util::future::BoxFuture;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// Key of what was decided, in what belongs to this host.
const DECIDED: &str = "regions";
/// Shortest time between two decisions, and longest.
const TICK: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// Backends of a region that are asked for the round-trip time.
const ASKED: usize = 2;

/// What decides how services are spread.
pub struct RegionController {
    here: Locality,
    host: String,
    store: Arc<dyn Store>,
    local: Arc<dyn Local>,
    book: Arc<health::HealthRegistry>,
    replicas: Arc<replica::ReplicaRegistry>,
    began: Instant,
    heard: ReportTimes,
    rollouts: Rollouts,
    before: BTreeMap<Name, Decision>,
    steers: BTreeMap<Name, Arc<RegionShares>>,
    said: PeerReport,
    told: watch::Receiver<HostValues>,
    times: (watch::Sender<Times>, watch::Receiver<Times>),
    targets: watch::Sender<Arc<Targets>>,
    shown: watch::Sender<Arc<RegionSnapshot>>,
    aborting: Arc<AtomicBool>,
}

/// Commits changes of the desired state that the daemon itself makes.
pub trait CommitDesired: Send + Sync + 'static {
    /// Stores a change under the daemon's name, if it changes anything; it may be called again after a conflict.
    fn commit_as_daemon(
        self: Arc<Self>,
        message: String,
        change: Box<dyn FnMut(&mut Desired) + Send>,
    ) -> BoxFuture<'static, Result<(), String>>;
}

/// One look at everything.
struct Evaluation {
    steered: RegionSnapshot,
    aborts: Vec<(Name, String, String)>,
}

impl RegionController {
    /// On this host. What it decided before the restart is where it begins.
    pub async fn new(
        (here, host): (Locality, String),
        store: Arc<dyn Store>,
        local: Arc<dyn Local>,
        (book, replicas): (Arc<health::HealthRegistry>, Arc<replica::ReplicaRegistry>),
    ) -> Self {
        let saved = local.load(DECIDED).await.ok().flatten();
        let steers: BTreeMap<Name, RegionShares> =
            saved.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let before = steers.iter().map(|(name, steer)| (name.clone(), resumed(steer, &here))).collect();
        let (region, zone) = (here.region.to_string(), here.zone.to_string());
        let said = PeerReport { host: host.clone(), region, zone, ..PeerReport::default() };
        let told = store.published();
        Self {
            here,
            host,
            store,
            local,
            book,
            replicas,
            began: Instant::now(),
            heard: ReportTimes::default(),
            rollouts: Rollouts::default(),
            before,
            steers: BTreeMap::new(),
            said,
            told,
            times: watch::channel(Times::default()),
            targets: watch::Sender::default(),
            shown: watch::Sender::default(),
            aborting: Arc::default(),
        }
    }

    /// What is decided, and by what.
    pub fn shown(&self) -> watch::Receiver<Arc<RegionSnapshot>> {
        self.shown.subscribe()
    }

    /// Decides for this state with what is known, before anything is applied.
    pub fn first(&mut self, desired: &Desired) -> BTreeMap<Name, Arc<RegionShares>> {
        let look = self.look(desired);
        self.shown.send_replace(Arc::new(look.steered));
        self.steers.clone()
    }

    /// Decides whenever there is news, until nobody wants it any more.
    pub async fn run<E: From<BTreeMap<Name, Arc<RegionShares>>>>(
        mut self,
        control: Arc<impl CommitDesired>,
        events: mpsc::Sender<E>,
    ) {
        let mut desired = self.store.watch();
        let mut reports = self.replicas.changes();
        let (mut told, mut times) = (self.store.published(), self.times.1.clone());
        tokio::spawn(rtt::run(self.targets.subscribe(), self.times.0.clone()));
        let mut sent = None;
        loop {
            let stored = desired.borrow_and_update().clone();
            let (revision, state) = (stored.revision, stored.desired);
            let began = Instant::now();
            let mut look = self.look(&state);
            look.steered.revision = revision.number;
            // However many there are, most of the time is others'.
            let rest = TICK.0.max(began.elapsed() * 10);
            self.ask_for_times(&state);
            if sent.as_ref() != Some(&self.steers) {
                self.save().await;
                if events.send(self.steers.clone().into()).await.is_err() {
                    return;
                }
                sent = Some(self.steers.clone());
            }
            self.say(&look);
            self.abort(&control, look.aborts);
            self.shown.send_replace(Arc::new(look.steered));
            tokio::time::sleep(rest).await;
            tokio::select! {
                changed = desired.changed() => if changed.is_err() { return },
                _ = told.changed() => {}
                _ = times.changed() => {}
                _ = reports.changed() => {}
                () = tokio::time::sleep(TICK.1) => {}
            }
            told.mark_unchanged();
            reports.mark_unchanged();
        }
    }

    /// What hosts tell, this one not counted; by host.
    fn others(&self) -> Vec<PeerReport> {
        let told = self.told.borrow().clone();
        let all = told.iter().filter(|(key, _)| key.starts_with(KEY));
        all.filter_map(|(_, value)| serde_json::from_slice::<PeerReport>(value).ok())
            .filter(|said| said.host != self.host)
            .collect()
    }

    fn look(&mut self, desired: &Desired) -> Evaluation {
        let now_ms = self.began.elapsed().as_millis() as u64;
        self.heard.look(&self.replicas, now_ms);
        let others = if self.store.link().borrow().connected { self.others() } else { Vec::new() };
        let times = self.times.1.borrow().clone();
        let wanted: Vec<(&Name, &Arc<Service>)> =
            desired.services.iter().filter(|(_, s)| s.is_regional() || s.rollout.is_some()).collect();
        let books = (&*self.book, &*self.replicas, &self.heard);
        let known: Vec<Vec<Known>> =
            wanted.iter().map(|(name, s)| measure::backends(name, s, &self.here, books, now_ms)).collect();
        self.said.sees = sees(known.iter().flatten());
        self.said.rtt_us = (*times).clone();
        let regions = self.regions(desired, &others, &known);
        self.rollouts.retain(|name| desired.services.get(name).is_some_and(|s| s.rollout.is_some()));
        let leader = others.iter().filter(|s| s.region == self.said.region && s.zone == self.said.zone);
        let leader = leader.min_by(|a, b| a.host.cmp(&b.host)).filter(|s| s.host < self.host);
        let is_first = others.iter().all(|said| said.host > self.host);
        let (mut steered, mut aborts) = (RegionSnapshot::default(), Vec::new());
        let mut steers = BTreeMap::new();
        let mut decided = BTreeMap::new();
        for ((name, service), backends) in wanted.into_iter().zip(&known) {
            let (explained, decision, abort) =
                self.service(name, service, backends, (&regions, &others, leader), now_ms);
            if let Some(why) = abort.filter(|_| is_first) {
                let version = service.rollout.as_ref().map(|r| r.version.clone()).unwrap_or_default();
                aborts.push((name.clone(), version, why));
            }
            let steer = match self.steers.get(name) {
                Some(same) if **same == explained.steer => same.clone(),
                _ => Arc::new(explained.steer.clone()),
            };
            steers.insert(name.clone(), steer);
            decided.insert(name.clone(), decision);
            steered.services.insert(name.clone(), explained);
        }
        (self.steers, self.before) = (steers, decided);
        steered.regions = regions;
        Evaluation { steered, aborts }
    }

    /// One service: what is known, what is decided, and what holds.
    fn service(
        &mut self,
        name: &Name,
        service: &Service,
        backends: &[Known],
        (regions, others, leader): (&[RegionShown], &[PeerReport], Option<&PeerReport>),
        now_ms: u64,
    ) -> (Explained, Decision, Option<String>) {
        let default = RegionRules::default();
        let rules = service.regions.as_ref().unwrap_or(&default);
        let mut notes = Vec::new();
        // One that does not say where it is is nowhere, where that matters.
        let is_somewhere = |b: &Known| b.is_placed || rules.allowed.is_none();
        let mut places = measure::places(backends, |b| is_somewhere(b).then_some(&b.region), &mut notes);
        for place in &mut places {
            let shown = regions.iter().find(|r| r.name == place.name);
            place.is_local = place.name == self.here.region;
            place.is_allowed = rules.allowed.as_ref().is_none_or(|names| names.contains(&place.name));
            place.is_draining = shown.is_some_and(|r| r.state == RegionState::Draining);
            place.is_down = shown.is_some_and(|r| r.agreed == Agreed::Down);
            place.rtt_us = shown.and_then(|r| r.rtt_us).filter(|_| !place.is_local);
            place.is_spilling = is_spilling(&place.name, name, others);
        }
        let is_here = |b: &Known| is_somewhere(b) && b.region == self.here.region;
        let mut zones = measure::places(backends, |b| is_here(b).then_some(&b.zone), &mut Vec::new());
        zones.iter_mut().for_each(|zone| zone.is_local = zone.name == self.here.zone);
        let inputs = Inputs { rules, regions: &places, zones: &zones, now_ms };
        let before = self.before.get(name).cloned().unwrap_or_default();
        let mut decision = decide(&inputs, &before);
        let (mut steer, mut decided_by) = (decision.steer(), self.host.clone());
        if let Some(leader) = leader
            && let Some(theirs) = leader.steers.get(name)
        {
            // Where it is to be taken up from, should the leader go.
            let resumed = resumed(theirs, &self.here);
            let changed = resumed.spill.shares != before.spill.shares;
            decision.spill = resumed.spill;
            decision.zone_spill = resumed.zone_spill;
            decision.spill.changed_ms = if changed { now_ms } else { before.spill.changed_ms };
            steer = RegionShares { canary: None, ..theirs.clone() };
            decided_by.clone_from(&leader.host);
        }
        let mut abort = None;
        let rollout = service.rollout.as_ref().map(|rollout| {
            let (backends, shown, verdict) = self.rollouts.look(name, service, rollout, &self.replicas);
            if let (Verdict::Abort(why), RolloutState::Running) = (verdict, rollout.state) {
                abort = Some(why);
            }
            steer.canary = Some(Canary { permille: rollout.share(), backends });
            shown
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

    /// All regions that anybody names, with the votes on them.
    fn regions(&self, desired: &Desired, others: &[PeerReport], known: &[Vec<Known>]) -> Vec<RegionShown> {
        let mut names: BTreeSet<Name> = desired.regions.keys().cloned().collect();
        names.insert(self.here.region.clone());
        names.extend(known.iter().flatten().map(|b| b.region.clone()));
        names.extend(others.iter().filter_map(|said| said.region.parse().ok()));
        let times = self.times.1.borrow().clone();
        let all = || others.iter().chain([&self.said]);
        let shown = |name: Name| {
            let votes: Vec<Vote> = all()
                .filter_map(|said| {
                    let from = said.region.parse().ok()?;
                    Some(Vote { host: said.host.clone(), from, is_up: *said.sees.get(&name)? })
                })
                .collect();
            let there = || known.iter().flatten().filter(|b| b.region == name);
            RegionShown {
                is_local: name == self.here.region,
                is_declared: desired.regions.contains_key(&name),
                state: desired.regions.get(&name).map_or(RegionState::Up, |r| r.state),
                agreed: agreed(&votes),
                votes,
                rtt_us: times.get(&name).copied(),
                hosts: all().filter(|said| said.region == name.as_str()).count(),
                backends: there().count(),
                ready: there().filter(|b| b.takes).count(),
                name,
            }
        };
        names.into_iter().map(shown).collect()
    }

    /// Whom to ask how far away regions are.
    fn ask_for_times(&self, desired: &Desired) {
        let mut targets = Targets::new();
        let mut asked: BTreeSet<SocketAddr> = BTreeSet::new();
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
                if known.len() < ASKED && address.port() != 0 && asked.insert(address) {
                    known.push(address);
                }
            }
        }
        targets.retain(|_, addresses| !addresses.is_empty());
        self.targets.send_if_modified(|before| {
            let is_other = **before != targets;
            if is_other {
                *before = Arc::new(targets);
            }
            is_other
        });
    }

    /// Tells the others, if there is something new.
    fn say(&mut self, look: &Evaluation) {
        let own =
            |(name, e): (&Name, &Explained)| (name.clone(), RegionShares { canary: None, ..e.steer.clone() });
        let led = |(_, e): &(&Name, &Explained)| e.decided_by == self.host;
        let steers = look.steered.services.iter().filter(led).map(own).collect();
        let said = PeerReport { steers, ..self.said.clone() };
        let key = format!("{KEY}{}", self.host);
        let value = serde_json::to_vec(&said).expect("names and numbers have a JSON form");
        if self.told.borrow().get(&key) != Some(&value) {
            self.store.publish(&key, Some(value));
        }
        self.said = said;
    }

    /// Has what was decided ready for the next start.
    async fn save(&self) {
        let plain: BTreeMap<&Name, &RegionShares> =
            self.steers.iter().map(|(name, s)| (name, &**s)).collect();
        let bytes = serde_json::to_vec(&plain).expect("names and numbers have a JSON form");
        if let Err(error) = self.local.save(DECIDED, bytes).await {
            tracing::error!(%error, "what was decided for regions cannot be saved");
        }
    }

    /// Aborts roll-outs that do badly; one write at a time.
    fn abort(&self, control: &Arc<impl CommitDesired>, aborts: Vec<(Name, String, String)>) {
        if aborts.is_empty() || self.aborting.swap(true, Relaxed) {
            return;
        }
        let (control, aborting) = (control.clone(), self.aborting.clone());
        tokio::spawn(async move {
            for (service, version, why) in aborts {
                tracing::warn!(%service, version, why, "roll-out aborted");
                let message = format!("roll-out of {version} on {service} aborted: {why}");
                let (named, of, reason) = (service.clone(), version.clone(), why.clone());
                let change = move |desired: &mut Desired| {
                    let rollout = desired.service_mut(&named).and_then(|s| s.rollout.as_mut());
                    // Unless it is another one, or somebody was faster.
                    if let Some(rollout) =
                        rollout.filter(|r| r.version == of && r.state == RolloutState::Running)
                    {
                        rollout.state = RolloutState::Aborted;
                        rollout.reason.clone_from(&reason);
                    }
                };
                let done = control.clone().commit_as_daemon(message, Box::new(change));
                if let Err(error) = done.await {
                    tracing::error!(%service, %error, "roll-out not aborted");
                }
            }
            aborting.store(false, Relaxed);
        });
    }
}

/// Regions of which something can be said: up if any of their checked backends is.
fn sees<'a>(known: impl Iterator<Item = &'a Known>) -> BTreeMap<Name, bool> {
    let mut sees: BTreeMap<Name, bool> = BTreeMap::new();
    for b in known {
        if let Some(is_up) = b.is_up {
            *sees.entry(b.region.clone()).or_default() |= is_up;
        }
    }
    sees
}

/// Whether hosts of a region send flows of a service elsewhere.
fn is_spilling(region: &Name, service: &Name, others: &[PeerReport]) -> bool {
    let of_region = others.iter().filter(|said| said.region == region.as_str());
    of_region.filter_map(|said| said.steers.get(service)).any(|steer| {
        let here = steer.shares.iter().find(|s| s.name == *region).map_or(0, |s| s.permille);
        // One that has nobody left sends everything away, and takes nothing anyhow.
        here > 0 && here < WHOLE
    })
}

/// A decision to go on from, of which only the outcome is known.
fn resumed(steer: &RegionShares, here: &Locality) -> Decision {
    let away = |shares: &[Share], own: &Name| -> Vec<Share> {
        shares.iter().filter(|s| s.name != *own).cloned().collect()
    };
    let mut decision = Decision {
        shares: steer.shares.clone(),
        zones: steer.zones.clone(),
        order: steer.order.clone(),
        ..Decision::default()
    };
    decision.spill.shares = away(&steer.shares, &here.region);
    decision.zone_spill.shares = away(&steer.zones, &here.zone);
    decision
}
