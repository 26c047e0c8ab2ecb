//! One ingress host: the parts of `lbd ingress`, wired as the daemon does it, over maps in memory, in a runtime of the
//! host's own whose clock is paused. To drop the runtime is to kill the daemon: nothing of it runs on.

use super::{
    bugs::{self, Bug, BugStore},
    disk::{DiskState, SimulatedDisk},
    environment,
    shared::{Cluster, LastKnown, Link, SharedStore},
    workers::Workers,
};
use anyhow::{Context, Result};
use axum::Router;
use futures_util::future::BoxFuture;
use lb_userspace::{
    apply::{
        dataplane::MapLimits,
        reconcile::{Event, Published, Reconciler, Sweep, fake::SharedMaps},
    },
    clock,
    desired::{
        model::{BackendId, Desired, Health, Locality, Name},
        store::{Local, LocalFile, Opener, RedbStore, Store, etcd::Access},
    },
    lbd::{
        ReconcilerClient, report,
        state::{self, MEMORY},
    },
    observed::{
        health::{Checker, HealthRegistry},
        regions::RegionController,
        replica::{LoadSink, ReplicaRegistry, Scores, Watcher},
    },
    plan::compile::{DeploymentSettings, TableLimits},
    serve::{
        api::{
            self, Control, Engine, EngineError,
            engine::{Counters, FlowFilter, Snapshot},
            host::HostState,
            store::{FleetMember, HostReport},
            types::{AppliedStatus, FlowInfo, Interface},
        },
        explain::{Explanation, Query},
    },
};
use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
    task::JoinHandle,
};

/// Capacity of the event queues, as in the daemon.
const EVENTS: usize = 16_384;
/// Interval of sweeps.
const SWEEP: Duration = Duration::from_secs(1);

/// Where a host keeps its desired state.
#[derive(Clone)]
pub enum Place {
    /// In a file.
    File,
    /// In the cluster.
    Shared(Cluster),
}

/// What outlives the daemon, and what it is started with.
pub struct Setup {
    pub name: String,
    pub here: Locality,
    /// Directory of the local data.
    pub directory: PathBuf,
    /// Directory of the store, where the state is kept in a file.
    pub store_directory: PathBuf,
    pub place: Place,
    pub maps: SharedMaps,
    pub limits: TableLimits,
    pub disk: DiskState,
    pub link: Link,
    pub known: LastKnown,
    pub workers: Workers,
    /// Offset of the host's wall clock.
    pub wall_ms: i64,
    pub bug: Option<Bug>,
}

/// A running daemon.
pub struct Daemon {
    runtime: Runtime,
    pub began: Duration,
    pub router: Router,
    pub store: Arc<dyn Store>,
    pub published: watch::Receiver<Arc<Published>>,
    pub health: Arc<HealthRegistry>,
    pub replicas: Arc<ReplicaRegistry>,
    events: mpsc::Sender<Event>,
    parts: Vec<(&'static str, JoinHandle<()>)>,
}

/// The engine of the API without a kernel.
pub struct SimulatedEngine {
    reconciler: ReconcilerClient,
    bug: Option<Bug>,
}

impl SimulatedEngine {
    /// Whether a service has no backend that takes flows.
    pub fn has_idle_service(&self) -> bool {
        self.reconciler.published().services.values().any(|s| s.eligible == 0)
    }
}

impl Engine for SimulatedEngine {
    fn check(&self, desired: Arc<Desired>) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(self.reconciler.check(desired))
    }

    fn apply(
        &self,
        desired: Arc<Desired>,
        revision: u64,
    ) -> BoxFuture<'_, Result<AppliedStatus, EngineError>> {
        Box::pin(async move {
            if bugs::meddle(self.bug, self, revision).await {
                return Ok(AppliedStatus::default());
            }
            self.reconciler.apply(bugs::distort(self.bug, desired), revision).await
        })
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.reconciler.snapshot()
    }

    fn interfaces(&self) -> Vec<Interface> {
        Vec::new()
    }

    fn counters(&self) -> Result<Counters, EngineError> {
        Ok(Counters::default())
    }

    fn flows(&self, _: &FlowFilter) -> Result<(Vec<FlowInfo>, bool), EngineError> {
        Ok((Vec::new(), false))
    }

    fn explain(&self, _: Query) -> Result<Explanation, EngineError> {
        Err(EngineError::Failed { what: "no packets are simulated".to_owned() })
    }
}

/// Load scores, which nothing reads.
struct NoLoads;

impl LoadSink for NoLoads {
    fn set(&self, _: u32, _: u32, _: u32) {}
}

fn map_limits(limits: &TableLimits) -> MapLimits {
    MapLimits {
        services: limits.services,
        backends: limits.backends,
        slots: limits.slots,
        vips: limits.vips,
        guard_entries: limits.guard_entries,
        ..MapLimits::default()
    }
}

impl Setup {
    /// Starts the daemon.
    ///
    /// # Errors
    /// The start failed, as that of lbd would.
    pub fn start(&self) -> Result<Daemon> {
        environment::set_wall_offset(self.wall_ms);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            // So that a kill can come between any two polls.
            .event_interval(1)
            .build()?;
        let mut parts = Parts::default();
        match runtime.block_on(self.start_parts(&mut parts)) {
            Ok(started) => {
                let Started { control, store, published, health, replicas, events } = started;
                let router = api::router(control);
                let began = environment::now();
                Ok(Daemon {
                    runtime,
                    began,
                    router,
                    store,
                    published,
                    health,
                    replicas,
                    events,
                    parts: parts.0,
                })
            }
            Err(error) => {
                drop(runtime);
                Err(error)
            }
        }
    }

    async fn open_store(&self) -> Result<(LocalFile, Arc<dyn Store>)> {
        let local = LocalFile::open_on(Arc::new(SimulatedDisk(self.disk.clone())), &self.directory)?;
        let store: Arc<dyn Store> = match &self.place {
            Place::File => Arc::new(RedbStore::beside(local.clone(), &self.store_directory, 200)?),
            Place::Shared(cluster) => {
                SharedStore::open(cluster.clone(), self.link.clone(), self.known.clone())
            }
        };
        Ok((local, BugStore::wrap(store, self.bug)))
    }

    async fn start_parts(&self, parts: &mut Parts) -> Result<Started> {
        let (local, store) = self.open_store().await?;
        let local = Arc::new(local);
        let health = Checker::restore(&*local).await;
        let replicas = Watcher::restore(&*local).await;
        let who = (self.here.clone(), self.name.clone());
        let registries = (health.clone(), replicas.clone());
        let mut regions = RegionController::new(who, store.clone(), local.clone(), registries)
            .await
            .with_meter(self.workers.meter());
        let (events, inbox) = mpsc::channel(EVENTS);
        let (reconciler, published, memory) =
            self.reconciler(&local, &store, &health, &replicas, &mut regions).await?;
        let adopted = reconciler.adopted();
        parts.add("reconciler", reconciler.run(inbox));
        parts.add("memory", ignore(state::save_memory(memory, local.clone())));
        let scores = Arc::new(Scores::new(Arc::new(NoLoads), Arc::new(published.clone())));
        parts.add("scores", scores.clone().run(replicas.clone(), published.clone()));
        let reconciler = ReconcilerClient::new(events.clone(), published.clone(), map_limits(&self.limits));
        let engine = Arc::new(SimulatedEngine { reconciler, bug: self.bug });
        let control = Control::with_replicas(store.clone(), engine, health.clone(), replicas.clone());
        let (region, zone) = (self.here.region.to_string(), self.here.zone.to_string());
        let report = HostReport {
            host: self.name.clone(),
            region: region.clone(),
            zone: zone.clone(),
            ..HostReport::default()
        };
        let opener = Opener { local: (*local).clone(), keep: 200, access: Access::default(), id: None };
        control.set_fleet_member(FleetMember { host: self.name.clone(), region, zone, opener });
        let host = HostState::restore(local.clone(), None).await?;
        control.set_host_state(host);
        control.set_region_decisions(regions.snapshots());
        if self.bug != Some(Bug::EmptyStoreWipes) {
            control.set_adopted_services(adopted);
        }
        parts.add("desired state", control.clone().run_apply_loop());
        if control.orphaned() == 0 {
            let head = control.head();
            control.wait_applied(head.revision.number).await.map_err(|e| anyhow::anyhow!("{}", e.message))?;
        }
        parts.add("report", ignore(report::run(control.clone(), store.clone(), report, published.clone())));
        parts.add("member record", control.clone().run_member());
        parts.add("regions", regions.run(control.clone(), events.clone()));
        self.start_checks(parts, &health, &replicas, scores, &store, &local, &events);
        parts.add("sweeps", sweep(events.clone()));
        Ok(Started { control, store, published, health, replicas, events })
    }

    async fn reconciler(
        &self,
        local: &Arc<LocalFile>,
        store: &Arc<dyn Store>,
        health: &HealthRegistry,
        replicas: &ReplicaRegistry,
        regions: &mut RegionController,
    ) -> Result<(Reconciler<SharedMaps>, watch::Receiver<Arc<Published>>, watch::Receiver<Vec<u8>>)> {
        let saved = local.load(MEMORY).await?;
        let settings = DeploymentSettings {
            attached: BTreeMap::from([(2, "eth0".to_owned())]),
            limits: self.limits,
            here: self.here.clone(),
            ..DeploymentSettings::default()
        };
        let (memory_out, memory) = watch::channel(Vec::new());
        let keep = Box::new(move |bytes| drop(memory_out.send_replace(bytes)));
        let (mut reconciler, published) =
            Reconciler::new(self.maps.clone(), settings, saved.as_deref(), keep)
                .context("cannot read the maps")?;
        let verdicts = health.read(|all| {
            let known = all.iter().filter(|(_, e)| e.health != Health::Unknown);
            known.map(|(id, e)| (id.clone(), e.health)).collect()
        });
        let shares = regions.decide_first(&store.head().desired);
        reconciler.prime(verdicts, replicas.readiness(), Default::default(), shares);
        if reconciler.wants_history(&store.head().desired) {
            reconciler.recall(&state::recent_history(&**store).await);
        }
        Ok((reconciler, published, memory))
    }

    #[expect(clippy::too_many_arguments, reason = "what the checks of the daemon are given")]
    fn start_checks(
        &self,
        parts: &mut Parts,
        health: &Arc<HealthRegistry>,
        replicas: &Arc<ReplicaRegistry>,
        scores: Arc<Scores>,
        store: &Arc<dyn Store>,
        local: &Arc<LocalFile>,
        events: &mpsc::Sender<Event>,
    ) {
        let (verdicts_out, verdicts) = mpsc::channel(EVENTS);
        let prober = self.workers.prober();
        let checker = Checker::new(health.clone(), 64, prober.clone(), verdicts_out);
        parts.add("health checks", checker.run(store.watch(), local.clone()));
        let bug = self.bug;
        let verdict = move |(id, health): (BackendId, Health)| {
            let lost = bug == Some(Bug::DeadKeepsSlots) && health == Health::Unhealthy;
            let health = if lost { Health::Healthy } else { health };
            Event::Health { id, health, at: clock::boot() }
        };
        parts.add("verdicts", forward(verdicts, events.clone(), verdict));
        let (readiness_out, readiness) = mpsc::channel(EVENTS);
        let watcher = Watcher::new(replicas.clone(), 64, prober, readiness_out, scores)
            .with_dial(self.workers.dial(self.bug));
        parts.add("replica state", watcher.run(store.watch(), local.clone()));
        parts.add("readiness", forward(readiness, events.clone(), |(id, r)| Event::Replica(id, r)));
        if bug == Some(Bug::NeverPruned) {
            parts.add("old verdicts", repeat_verdicts(store.clone(), events.clone()));
        }
    }
}

/// Tells verdicts of all backends that ever were.
async fn repeat_verdicts(store: Arc<dyn Store>, events: mpsc::Sender<Event>) {
    let mut all: BTreeMap<BackendId, ()> = BTreeMap::new();
    loop {
        for (service, s) in &store.head().desired.services {
            let id = |backend: &Name| BackendId { service: service.clone(), backend: backend.clone() };
            all.extend(s.backends.keys().map(|b| (id(b), ())));
        }
        for id in all.keys().filter(|id| {
            let head = store.head();
            head.desired.services.get(&id.service).is_none_or(|s| !s.backends.contains_key(&id.backend))
        }) {
            let event = Event::Health { id: id.clone(), health: Health::Healthy, at: clock::boot() };
            if events.send(event).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// What [`Setup::start_parts`] makes.
struct Started {
    control: Arc<Control>,
    store: Arc<dyn Store>,
    published: watch::Receiver<Arc<Published>>,
    health: Arc<HealthRegistry>,
    replicas: Arc<ReplicaRegistry>,
    events: mpsc::Sender<Event>,
}

/// Running parts of a daemon.
#[derive(Default)]
struct Parts(Vec<(&'static str, JoinHandle<()>)>);

impl Parts {
    fn add(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.0.push((name, tokio::spawn(part)));
    }
}

async fn ignore(part: impl Future<Output = Result<()>>) {
    let _ = part.await;
}

async fn forward<T>(mut from: mpsc::Receiver<T>, to: mpsc::Sender<Event>, event: impl Fn(T) -> Event) {
    while let Some(value) = from.recv().await {
        if to.send(event(value)).await.is_err() {
            return;
        }
    }
}

/// Reports flow tables without entries.
async fn sweep(events: mpsc::Sender<Event>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let sweep = Sweep { began: clock::boot(), ..Sweep::default() };
        if events.send(Event::Swept(Arc::new(sweep))).await.is_err() {
            return;
        }
    }
}

impl Daemon {
    /// Lets the daemon run until a time since boot.
    pub fn run_until(&self, at: Duration) {
        self.runtime.block_on(async { tokio::time::sleep_until(environment::instant(at)).await });
    }

    /// Lets it run for this many polls, without time.
    pub fn run_polls(&self, mut polls: u64) {
        self.runtime.block_on(std::future::poll_fn(|context| {
            if polls == 0 {
                return std::task::Poll::Ready(());
            }
            polls -= 1;
            context.waker().wake_by_ref();
            std::task::Poll::Pending
        }));
    }

    /// Starts work in the daemon's runtime.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.spawn(work));
    }

    /// Runs work to its end in the daemon's runtime; time may pass.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A part that has ended, if any.
    pub fn ended(&self) -> Option<&'static str> {
        self.parts.iter().find(|(_, handle)| handle.is_finished()).map(|(name, _)| *name)
    }

    /// Number of events that wait.
    pub fn queue(&self) -> usize {
        EVENTS - self.events.capacity()
    }
}
