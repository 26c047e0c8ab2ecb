//! `lbd ingress`: wires store, dataplane, reconciler, health checks, replicas, neighbours, API and metrics together.
//!
//! Input: [`Settings`], and a configuration file if there is one. Output: a running daemon, until SIGTERM
//! or SIGINT; the dataplane continues to forward afterwards. Called by [`super::command`].

use super::{
    LiveEngine, ReconcilerClient, attach, describe,
    hardware::Hardware,
    hooks, notify, own_thread, report,
    services_file::{self, load_services, reload},
    state::{self, MEMORY},
    supervise,
};
use crate::{
    apply::{
        announce::{self, Announcement, Announcer, Peers},
        dataplane::{Dataplane, Interfaces, Loads, MapLimits, ProbeDataplane, Reader, Takeover},
        reconcile::{Event, Published, Reconciler},
    },
    clock,
    desired::{
        config::{ConfigError, File, Hook, OnStop, Options, Settings},
        model::{Desired, Health, Locality, Paths},
        store::{Local, LocalFile, Store},
    },
    observed::{
        health::{Checker, HealthRegistry, ProbePrograms, Tunnel, prober_through},
        neighbour::Resolver,
        regions::RegionController,
        replica::{ReplicaRegistry, Scores, Watcher},
    },
    serve::{
        api::{
            self, Control,
            host::HostState,
            store::{FleetMember, HostReport},
        },
        metrics,
    },
};
use anyhow::Context;
use sd_notify::NotifyState;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};
use tokio::sync::{mpsc, watch};

/// How long the start waits for next hops, so that the first tables have them.
const FIRST_HOPS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the start waits for the stored state to be applied, before it serves the API all the same.
const FIRST_APPLY_TIMEOUT: Duration = Duration::from_secs(1);
/// How long requests in progress may still take when lbd stops.
const GRACE: Duration = Duration::from_secs(3);
/// Capacity of the event queues.
const EVENTS: usize = 16_384;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// The start failed, in which case nothing that ran before was changed, or a part of lbd ended.
pub async fn run(
    settings: Settings,
    config: Option<PathBuf>,
    file: Option<File>,
    mistakes: Option<ConfigError>,
) -> anyhow::Result<()> {
    let mut signals = supervise::Signals::new().context("cannot listen for signals")?;
    let (local, store, fleet) = state::open_store(&settings).await?;
    let mistakes = services_file::tolerate(mistakes, &store.head())?;
    let (listener, writers) =
        api::bind(&settings.socket, settings.socket_mode, settings.socket_group.as_deref())?;
    let _socket = SocketFile(settings.socket.clone());
    let metrics = metrics::bind(settings.metrics, settings.metrics_required).await?;

    attach::check_nat_ports(&settings)?;
    let (announcer, announcement) = settings
        .announce
        .as_deref()
        .map(|interface| Announcer::open(interface, Peers::new(fleet.host.clone(), store.clone())))
        .transpose()?
        .unzip();
    let mut dataplane = attach::attach(&settings, &store.head()).await?;
    let (takeover, home) = (dataplane.takeover(), dataplane.home.clone());

    let mut daemon = Daemon { settings, local, store, parts: supervise::Tasks::default() };
    let mut observers = daemon.restore_observers(&fleet.host).await;
    let (events, inbox) = mpsc::channel(EVENTS);
    let core = daemon.start_reconciler(dataplane, &mut observers, &events, inbox).await?;
    let scores = daemon.start_scores(&core, &observers);
    let (control, host, report) =
        daemon.start_control(&core, &observers, fleet, announcement, &events).await?;
    daemon.start_announcements(&control, &core, announcer, &host, report);
    daemon.start_checks(&core, observers, scores, &control, &events);

    control.set_file_problem(mistakes);
    let File { options: file_options, hooks, desired, .. } = file.unwrap_or_default();
    daemon.start_events(&control, config.as_deref(), hooks.clone());
    if let (Some(path), Some(desired)) = (&config, desired) {
        daemon.load_file_services(&control, path, desired).await?;
    }
    daemon.finish_start(&control, core.published.clone(), takeover, home, &events).await?;
    daemon.parts.add("interfaces", infallible(core.hardware.clone().run(events.clone())));
    let (stop, stopped) = watch::channel(false);
    daemon.parts.add_server("API", api::serve(listener, control.clone(), writers, until(stopped.clone())));
    if let Some(listener) = metrics {
        daemon.parts.add_server("metrics", metrics::serve(listener, control.clone(), until(stopped)));
    }
    drop(events);
    notify(&[NotifyState::Ready]);
    tracing::info!(socket = %daemon.settings.socket.display(), "ready");

    let failure = daemon
        .supervise(&mut signals, &control, &core.thread, config.as_deref(), (&file_options, &hooks))
        .await;
    notify(&[NotifyState::Stopping]);
    // Readers of the events would hold up the end of the API.
    control.events().close();
    stop.send_replace(true);
    daemon.parts.finish("API", GRACE).await;
    if daemon.settings.announce.is_some() && daemon.settings.announce_on_stop == OnStop::Withdraw {
        announce::withdraw().await?;
    }
    state::flush(&*daemon.local, &control, &core.memory).await;
    match failure {
        None => Ok(()),
        Some(error) => Err(error.context("lbd is stopping, and the dataplane continues to forward")),
    }
}

/// What the stages of the start share.
struct Daemon {
    settings: Settings,
    local: Arc<LocalFile>,
    store: Arc<dyn Store>,
    parts: supervise::Tasks,
}

/// What is known about backends and regions.
struct Observers {
    health: Arc<HealthRegistry>,
    replicas: Arc<ReplicaRegistry>,
    regions: RegionController,
}

/// The running reconciler, and handles of the dataplane that it owns.
struct Core {
    thread: JoinHandle<()>,
    /// Number of services that were adopted from the maps.
    adopted: usize,
    published: watch::Receiver<Arc<Published>>,
    /// The reconciler's memory, to be saved.
    memory: watch::Receiver<Vec<u8>>,
    reader: Arc<Reader>,
    loads: Arc<Loads>,
    interfaces: Arc<Interfaces>,
    hardware: Arc<Hardware>,
    limits: MapLimits,
}

impl Daemon {
    fn locality(&self) -> Locality {
        Locality { region: self.settings.region.clone(), zone: self.settings.zone.clone() }
    }

    /// Restores health verdicts, replica state and region decisions from the local store.
    async fn restore_observers(&self, host: &str) -> Observers {
        let health = Checker::restore(&*self.local).await;
        let replicas = Watcher::restore(&*self.local).await;
        let who = (self.locality(), host.to_owned());
        let registries = (health.clone(), replicas.clone());
        let regions = RegionController::new(who, self.store.clone(), self.local.clone(), registries).await;
        Observers { health, replicas, regions }
    }

    /// Starts to watch routes and neighbours, and waits for the first next hops.
    async fn watch_next_hops(&mut self) -> anyhow::Result<(Paths, mpsc::Receiver<Paths>)> {
        let (hops_out, mut hops) = mpsc::channel(1);
        let resolver = Resolver::open().context("cannot watch routes and neighbours")?;
        self.parts.add("neighbour watch", resolver.run(self.store.watch(), hops_out));
        let first = match tokio::time::timeout(FIRST_HOPS_TIMEOUT, hops.recv()).await {
            Ok(Some(hops)) => hops,
            Ok(None) | Err(_) => Default::default(),
        };
        Ok((first, hops))
    }

    /// Starts the reconciler with what is known from before.
    async fn start_reconciler(
        &mut self,
        dataplane: Dataplane,
        observers: &mut Observers,
        events: &mpsc::Sender<Event>,
        inbox: mpsc::Receiver<Event>,
    ) -> anyhow::Result<Core> {
        // Next hops first, so that adopted next hops are not lost for a moment.
        let (first_hops, hops) = self.watch_next_hops().await?;
        let (reader, loads, limits) = (dataplane.reader(), dataplane.loads(), dataplane.limits);
        let interfaces = dataplane.interfaces.clone();
        let (frags, left_out) = (dataplane.frags, dataplane.left_out.clone());
        let hardware = Arc::new(Hardware::new(interfaces.clone(), frags, left_out, reader.clone()));
        let saved = self.local.load(MEMORY).await?;
        let attached = interfaces.attached().into_iter().map(|i| (i.ifindex, i.name)).collect();
        let lost = dataplane.left_out.iter().fold(0, |bits, one| bits | one.feature);
        let compile_settings =
            attach::compile_settings(&self.settings, limits, attached, self.locality(), lost);
        let (memory_out, memory) = watch::channel(Vec::new());
        let keep = Box::new(move |bytes| drop(memory_out.send_replace(bytes)));
        let (mut reconciler, published) =
            Reconciler::new(dataplane, compile_settings, saved.as_deref(), keep)
                .context("cannot read the maps")?;
        let head = self.store.head().desired;
        let verdicts = observers.health.read(|all| {
            let known = all.iter().filter(|(id, e)| e.health != Health::Unknown && e.is_about(id, &head));
            known.map(|(id, e)| (id.clone(), e.health)).collect()
        });
        let regions = observers.regions.decide_first(&self.store.head().desired);
        reconciler.prime(verdicts, observers.replicas.readiness(), first_hops, regions);
        if reconciler.wants_history(&self.store.head().desired) {
            reconciler.recall(&state::recent_history(&*self.store).await);
        }
        let adopted = reconciler.adopted();
        let thread = spawn_reconciler(reconciler, inbox)?;
        let saving = state::save_memory(memory.clone(), self.local.clone());
        self.parts.add("saving the reconciler's memory", saving);
        self.parts.add("next hops", forward(hops, events.clone(), Event::Paths));
        Ok(Core { thread, adopted, published, memory, reader, loads, interfaces, hardware, limits })
    }

    /// Starts to compute load scores from replica state.
    fn start_scores(&mut self, core: &Core, observers: &Observers) -> Arc<Scores> {
        let scores = Arc::new(Scores::new(core.loads.clone(), Arc::new(core.published.clone())));
        let run = scores.clone().run(observers.replicas.clone(), core.published.clone());
        self.parts.add("load scores", infallible(run));
        scores
    }

    /// Starts to follow the desired state, and applies it once, unless the store is empty but the maps hold services.
    async fn start_control(
        &mut self,
        core: &Core,
        observers: &Observers,
        fleet: FleetMember,
        announcement: Option<watch::Receiver<Announcement>>,
        events: &mpsc::Sender<Event>,
    ) -> anyhow::Result<(Arc<Control>, Arc<HostState>, HostReport)> {
        let (published, hardware) = (core.published.clone(), core.hardware.clone());
        let reconciler = ReconcilerClient::new(events.clone(), published, core.limits);
        let engine = Arc::new(LiveEngine::new(reconciler, core.reader.clone(), hardware));
        let (health, replicas) = (observers.health.clone(), observers.replicas.clone());
        let control = Control::with_replicas(self.store.clone(), engine, health, replicas);
        let report = HostReport {
            host: fleet.host.clone(),
            region: fleet.region.clone(),
            zone: fleet.zone.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..HostReport::default()
        };
        control.set_fleet_member(fleet);
        let host = HostState::restore(self.local.clone(), announcement).await?;
        control.set_host_state(host.clone());
        control.set_region_decisions(observers.regions.snapshots());
        control.set_adopted_services(core.adopted);
        self.parts.add("desired state", infallible(control.clone().run_apply_loop()));
        if control.orphaned() == 0 {
            // Whatever is stored: the API must serve, so that it can be repaired.
            let number = control.head().revision.number;
            match tokio::time::timeout(FIRST_APPLY_TIMEOUT, control.wait_applied(number)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(revision = number, %error, "the stored state is not wholly in force; serving the API meanwhile");
                }
                Err(_) => {
                    tracing::warn!(
                        revision = number,
                        "the stored state is still being applied; serving the API meanwhile"
                    );
                }
            }
        }
        Ok((control, host, report))
    }

    /// Starts to announce VIPs once the first state is applied, and to report to the other hosts.
    fn start_announcements(
        &mut self,
        control: &Arc<Control>,
        core: &Core,
        announcer: Option<Announcer>,
        host: &HostState,
        report: HostReport,
    ) {
        if let Some(announcer) = announcer {
            let (first, published, is_draining) =
                (control.clone(), core.published.clone(), host.is_draining());
            self.parts.add("announcement", async move {
                wait_first_written(&first, published.clone()).await;
                announcer.run(published, is_draining).await
            });
            self.parts.add("this host's drain", infallible(control.clone().run_drain_sampler()));
        }
        let run = report::run(control.clone(), self.store.clone(), report, core.published.clone());
        self.parts.add("report to the other hosts", run);
        self.parts.add("member record", infallible(control.clone().run_member()));
    }

    /// Starts region decisions, health checks and replica state.
    fn start_checks(
        &mut self,
        core: &Core,
        observers: Observers,
        scores: Arc<Scores>,
        control: &Arc<Control>,
        events: &mpsc::Sender<Event>,
    ) {
        let Observers { health, replicas, regions } = observers;
        self.parts.add("regions", infallible(regions.run(control.clone(), events.clone())));
        let (verdicts_out, verdicts) = mpsc::channel(EVENTS);
        let interfaces = core.interfaces.clone();
        let probed = move || interfaces.attached().into_iter().map(|i| i.ifindex).collect();
        let tunnel = Arc::new(Tunnel::new(Box::new(load_probe_programs), probed));
        let prober = prober_through(Some((tunnel, health.clone())));
        let checker = Checker::new(health, self.settings.probes, prober.clone(), verdicts_out)
            .with_passive(core.reader.clone());
        let (watch, local) = (self.store.watch(), self.local.clone());
        self.parts.add("health checks", own_thread::own_thread("health", move || checker.run(watch, local)));
        let health_event = |(id, health)| Event::Health { id, health, at: clock::boot() };
        self.parts.add("verdicts", forward(verdicts, events.clone(), health_event));
        let (readiness_out, readiness) = mpsc::channel(EVENTS);
        let watcher = Watcher::new(replicas, self.settings.probes, prober, readiness_out, scores);
        self.parts.add("replica state", infallible(watcher.run(self.store.watch(), self.local.clone())));
        let replica_event = |(id, readiness)| Event::Replica(id, readiness);
        self.parts.add("readiness", forward(readiness, events.clone(), replica_event));
    }

    /// Starts to find events, and to run hooks for them.
    fn start_events(&mut self, control: &Arc<Control>, config: Option<&Path>, hooks: Vec<Hook>) {
        self.parts.add("events", infallible(control.clone().run_events()));
        let programs = hooks.iter().filter_map(|hook| hook.run.first()).map(Path::new);
        let problem =
            config.filter(|_| !hooks.is_empty()).into_iter().chain(programs).find_map(hooks::unsafe_file);
        if let Some(why) = problem {
            control.set_hook_problem(why);
            return;
        }
        let socket = self.settings.socket.display().to_string();
        self.parts.add("hooks", infallible(hooks::run(hooks, control.events().clone(), socket)));
    }

    /// Loads the services of the configuration file, if they have changed.
    async fn load_file_services(
        &self,
        control: &Control,
        path: &Path,
        desired: Desired,
    ) -> anyhow::Result<()> {
        match load_services(control, &*self.local, path, desired).await {
            // Neither an unreachable store nor a file that does not fit must prevent a host from forwarding.
            Err(error) if !control.link().connected || control.head().revision.number > 0 => {
                control.set_file_problem(Some(describe(&error)));
                Ok(())
            }
            other => other,
        }
    }

    /// Takes over from another ABI version and starts the sweeper, once a state is applied.
    async fn finish_start(
        &mut self,
        control: &Arc<Control>,
        published: watch::Receiver<Arc<Published>>,
        takeover: Option<Takeover>,
        home: PathBuf,
        events: &mpsc::Sender<Event>,
    ) -> anyhow::Result<()> {
        let finish = attach::take_over_and_sweep(takeover, home, events.clone());
        let written = wait_first_written(control, published.clone());
        if tokio::time::timeout(Duration::ZERO, written).await.is_ok() {
            return finish.await;
        }
        // A program of another ABI version forwards with its own tables until the first state is in the maps.
        let first = control.clone();
        self.parts.add("first state", async move {
            wait_first_written(&first, published).await;
            finish.await?;
            std::future::pending::<anyhow::Result<()>>().await
        });
        Ok(())
    }

    /// Handles signals until lbd is to stop; returns the error if a part failed.
    async fn supervise(
        &mut self,
        signals: &mut supervise::Signals,
        control: &Control,
        reconciler: &JoinHandle<()>,
        config: Option<&Path>,
        file: (&Options, &[Hook]),
    ) -> Option<anyhow::Error> {
        loop {
            match signals.next(&mut self.parts).await {
                supervise::Incident::Reload => reload(control, &*self.local, config, file).await,
                supervise::Incident::Stop(signal) => {
                    tracing::info!(signal, "stopping: the dataplane continues to forward");
                    return None;
                }
                supervise::Incident::Failed(error) => return Some(error),
                supervise::Incident::Watchdog => {
                    if !reconciler.is_finished() {
                        notify(&[NotifyState::Watchdog]);
                    }
                }
            }
            if reconciler.is_finished() {
                return Some(anyhow::anyhow!("the reconciler ended: see the log above"));
            }
        }
    }
}

/// Removes the API's socket when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Waits until a first state is in the maps: applied without an error, or with one that concerns something else than the
/// services' tables.
async fn wait_first_written(control: &Control, mut published: watch::Receiver<Arc<Published>>) {
    tokio::select! {
        biased;
        () = control.wait_first_applied() => {}
        _ = published.wait_for(|published| published.revision > 0) => {}
    }
}

/// Runs the reconciler on its own thread, because it compiles and writes maps without yielding. The thread has a runtime of
/// its own: that of the daemon ends first when lbd stops, and timers of a runtime that has ended panic.
fn spawn_reconciler(
    reconciler: Reconciler<Dataplane>,
    inbox: mpsc::Receiver<Event>,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .context("cannot start the reconciler's runtime")?;
    let run = move || runtime.block_on(reconciler.run(inbox));
    std::thread::Builder::new().name("reconcile".to_owned()).spawn(run).context("cannot start the reconciler")
}

/// Forwards received values as events, until the receiver of events is gone.
async fn forward<T>(
    mut from: mpsc::Receiver<T>,
    to: mpsc::Sender<Event>,
    event: impl Fn(T) -> Event,
) -> anyhow::Result<()> {
    while let Some(value) = from.recv().await {
        if to.send(event(value)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Turns a part that cannot fail into one that supervision accepts.
async fn infallible(part: impl Future<Output = ()>) -> anyhow::Result<()> {
    part.await;
    Ok(())
}

/// Waits until the flag is set or its sender is gone.
async fn until(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|stop| *stop).await;
}

fn load_probe_programs() -> Result<Box<dyn ProbePrograms>, String> {
    ProbeDataplane::load().map(|programs| Box::new(programs) as _).map_err(|e| e.to_string())
}
