//! `lbd ingress`: store, dataplane, reconciler, health, replicas, neighbours, API and metrics, wired together.
//!
//! Input: [`Settings`], and a configuration file if there is one. Output: a running daemon, until SIGTERM
//! or SIGINT; the dataplane goes on forwarding after it. Called by the binary.

pub mod args;
pub mod command;
mod hardware;
mod live;
pub mod logging;
mod nat_ports;
mod own_thread;
mod processors;
mod report;
mod supervise;
pub mod worker;
mod worker_route;
pub mod xdp_log;

pub use hardware::TRUNCATED_RISES;
pub use live::Live;

use self::hardware::Hardware;
use crate::{
    apply::{
        announce::{self, Announcer},
        dataplane::{
            AttachOptions, Carried, Dataplane, Kernel, Limits, ON_DEMAND, ProbeDataplane, Takeover,
            loaded_features,
        },
        offloads,
        reconcile::{Event, Reconciler, start_sweeper},
    },
    clock,
    desired::{
        config::{File, OnStop, Options, Settings, SettingsError, export},
        model::{Desired, Health, Locality},
        store::{Local, LocalFile, Opener, Store, Stored, since},
    },
    observed::{
        health::{Checker, ProbePrograms, Tunnel, prober_through},
        neighbour::Resolver,
        regions::RegionController,
        replica::{Scores, Watcher},
    },
    plan::compile::{self, Past},
    serve::{
        api::{
            self, Control,
            host::HostState,
            store::{FleetMember, HostReport},
            types,
        },
        metrics,
    },
};
use anyhow::Context;
use lb_common::{
    limit::{self, Budgets},
    settings::{IngressSettings, features},
};
use sd_notify::NotifyState;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{mpsc, watch};

/// Key of the reconciler's memory in the local store.
const MEMORY: &str = "reconciler";
/// Key of the services that the configuration file last had.
const FILE: &str = "config-file";
/// How long a start waits for next hops, so that the first tables have them.
const FIRST_HOPS: Duration = Duration::from_secs(2);
/// How long a start without memory looks for it in the store's history, and how many revisions at most.
const FIRST_HISTORY: Duration = Duration::from_secs(3);
const HISTORY: usize = 256;
/// How long requests in progress may take when lbd stops.
const GRACE: Duration = Duration::from_secs(3);
/// How long changes of the reconciler's memory are gathered before it is saved. If lbd is killed meanwhile,
/// the maps themselves tell what it would.
const GATHER: Duration = Duration::from_millis(50);
/// Events that wait for the reconciler.
const EVENTS: usize = 16_384;

/// Runs until told to stop.
///
/// # Errors
/// The start failed, in which case nothing that ran before was touched, or a part of lbd ended.
pub async fn run(settings: Settings, config: Option<PathBuf>, file: Option<File>) -> anyhow::Result<()> {
    let mut stop = supervise::Signals::new().context("cannot listen for signals")?;
    let (local, store, sharing) = open_store(&settings).await?;
    let (listener, writers) =
        api::bind(&settings.socket, settings.socket_mode, settings.socket_group.as_deref())?;
    let _socket = SocketFile(settings.socket.clone());
    let metrics = metrics::bind(settings.metrics, settings.metrics_required).await?;

    check_nat_ports(&settings)?;
    let (announcer, announcement) = settings.announce.as_deref().map(Announcer::open).transpose()?.unzip();
    let options = attach_options(&settings, features_at_start(&store.head(), &settings.pin_path));
    let fix_offloads = settings.fix_offloads;
    let attach = move || {
        if fix_offloads {
            // Before the program is there: drivers set their rings up anew for either.
            options.interfaces.iter().for_each(|name| offloads::fix(name));
        }
        Dataplane::attach(&options)
    };
    let mut dataplane = tokio::task::spawn_blocking(attach).await??;
    tell_of(&dataplane);
    xdp_log::start(dataplane.bpf_mut(), settings.xdp_log_level);
    let takeover = dataplane.takeover();
    let home = dataplane.home.clone();

    let book = Checker::restore(&*local).await;
    let replicas = Watcher::restore(&*local).await;
    let here = Locality { region: settings.region.clone(), zone: settings.zone.clone() };
    let who = (here.clone(), sharing.host.clone());
    let books = (book.clone(), replicas.clone());
    let mut steering = RegionController::new(who, store.clone(), local.clone(), books).await;
    let (events, inbox) = mpsc::channel(EVENTS);
    let mut parts = supervise::Parts::default();

    // Next hops first, so that adopted ones are not unlearned for a moment.
    let (hops_out, mut hops) = mpsc::channel(1);
    let resolver = Resolver::open().context("cannot watch routes and neighbours")?;
    parts.add("neighbour watch", resolver.run(store.watch(), hops_out));
    let first_hops = match tokio::time::timeout(FIRST_HOPS, hops.recv()).await {
        Ok(Some(hops)) => hops,
        Ok(None) | Err(_) => Default::default(),
    };

    let (reader, loads) = (dataplane.reader(), dataplane.loads());
    let signs = reader.clone();
    let interfaces = dataplane.interfaces.clone();
    let (frags, left_out) = (dataplane.frags, dataplane.left_out.clone());
    let hardware = Arc::new(Hardware::new(interfaces.clone(), frags, left_out, reader.clone()));
    let limits = dataplane.limits;
    let (keep_out, kept) = watch::channel(Vec::new());
    let last_memory = local.load(MEMORY).await?;
    let attached = interfaces.attached().into_iter().map(|i| (i.ifindex, i.name)).collect();
    let probed = move || interfaces.attached().into_iter().map(|i| i.ifindex).collect();
    let lost = dataplane.left_out.iter().fold(0, |bits, one| bits | one.feature);
    let compile_settings = compile_settings(&settings, limits, attached, here, lost);
    let keep = Box::new(move |bytes| drop(keep_out.send_replace(bytes)));
    let (mut reconciler, published) =
        Reconciler::new(dataplane, compile_settings, last_memory.as_deref(), keep)
            .context("cannot read the maps")?;
    let verdicts = book.read(|all| {
        let known = all.iter().filter(|(_, e)| e.health != Health::Unknown);
        known.map(|(id, e)| (id.clone(), e.health)).collect()
    });
    reconciler.prime(
        verdicts,
        replicas.readiness(),
        first_hops,
        steering.decide_first(&store.head().desired),
    );
    if reconciler.wants_history(&store.head().desired) {
        reconciler.recall(&history(&*store).await);
    }
    let adopted = reconciler.adopted();
    let reconciler = spawn_reconciler(reconciler, inbox)?;
    parts.add("saving the reconciler's memory", save_memory(kept.clone(), local.clone()));
    parts.add("next hops", forward(hops, events.clone(), Event::Paths));

    let scores = Arc::new(Scores::new(loads, Arc::new(published.clone())));
    parts.add("load scores", ended_ok(scores.clone().run(replicas.clone(), published.clone())));
    let engine = Arc::new(Live::new(events.clone(), published.clone(), reader, hardware.clone(), limits));
    let control = Control::with_replicas(store.clone(), engine, book.clone(), replicas.clone());
    let report = HostReport {
        host: sharing.host.clone(),
        region: sharing.region.clone(),
        zone: sharing.zone.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..HostReport::default()
    };
    control.set_fleet_member(sharing);
    let hosting = HostState::restore(local.clone(), announcement).await?;
    control.set_host_state(hosting.clone());
    control.set_region_decisions(steering.snapshots());
    control.set_adopted_services(adopted);
    parts.add("desired state", ended_ok(control.clone().run_apply_loop()));
    if control.orphaned() == 0 {
        let head = control.head();
        control.wait_applied(head.revision.number).await.context("cannot apply the stored state")?;
    }
    if let Some(announcer) = announcer {
        let (first, published, is_draining) = (control.clone(), published.clone(), hosting.is_draining());
        parts.add("announcement", async move {
            first.wait_first_applied().await;
            announcer.run(published, is_draining).await
        });
        parts.add("this host's drain", ended_ok(control.clone().run_drain_sampler()));
    }

    parts.add("report to the other hosts", report::run(control.clone(), store.clone(), report, published));

    parts.add("regions", ended_ok(steering.run(control.clone(), events.clone())));

    let (verdicts_out, verdicts) = mpsc::channel(EVENTS);
    let prober = prober_through(Some(Arc::new(Tunnel::new(Box::new(load_probe_programs), probed))));
    let checker = Checker::new(book, settings.probes, prober.clone(), verdicts_out).with_passive(signs);
    let (watched, locally) = (store.watch(), local.clone());
    parts.add("health checks", own_thread::own_thread("health", move || checker.run(watched, locally)));
    parts.add("verdicts", forward(verdicts, events.clone(), |(id, health)| Event::Health(id, health)));
    let (said_out, said) = mpsc::channel(EVENTS);
    let watcher = Watcher::new(replicas, settings.probes, prober, said_out, scores);
    parts.add("replica state", ended_ok(watcher.run(store.watch(), local.clone())));
    parts.add("readiness", forward(said, events.clone(), |(id, readiness)| Event::Replica(id, readiness)));

    let File { options: said, desired, .. } = file.unwrap_or_default();
    if let (Some(path), Some(desired)) = (&config, desired) {
        let loaded = load_services(&control, &*local, path, desired, Load::IfChanged).await;
        // A store that is away must not keep a host from forwarding.
        match loaded {
            Err(error) if !control.link().connected => {
                tracing::error!("the file's services are not loaded: {}", told(&error));
            }
            other => other?,
        }
    }
    let go_on = take_over_and_sweep(takeover, home, events.clone());
    if control.orphaned() == 0 {
        go_on.await?;
    } else {
        // Another version's program forwards by tables that ours does not have before something is applied.
        let first = control.clone();
        parts.add("first state", async move {
            first.wait_first_applied().await;
            go_on.await?;
            std::future::pending::<anyhow::Result<()>>().await
        });
    }
    parts.add("interfaces", ended_ok(hardware.run(events.clone())));
    let (stop_out, stopped) = watch::channel(false);
    parts.add("API", api::serve(listener, control.clone(), writers, until(stopped.clone())));
    if let Some(listener) = metrics {
        parts.add("metrics", metrics::serve(listener, control.clone(), until(stopped)));
    }
    drop(events);
    notify(&[NotifyState::Ready]);
    tracing::info!(socket = %settings.socket.display(), "ready");

    let failed = loop {
        match stop.next(&mut parts).await {
            supervise::Happened::Reload => reload(&control, &*local, config.as_deref(), &said).await,
            supervise::Happened::Stop(signal) => {
                tracing::info!(signal, "stopping; the dataplane goes on forwarding");
                break None;
            }
            supervise::Happened::Failed(error) => break Some(error),
            supervise::Happened::Watchdog => {
                if !reconciler.is_finished() {
                    notify(&[NotifyState::Watchdog]);
                }
            }
        }
        if reconciler.is_finished() {
            break Some(anyhow::anyhow!("the reconciler ended; see the log above"));
        }
    };
    notify(&[NotifyState::Stopping]);
    stop_out.send_replace(true);
    parts.finish("API", GRACE).await;
    if settings.announce.is_some() && settings.announce_on_stop == OnStop::Withdraw {
        announce::withdraw().await?;
    }
    flush(&*local, &control, &kept).await;
    match failed {
        None => Ok(()),
        Some(error) => Err(error.context("lbd ends; the dataplane goes on forwarding")),
    }
}

/// What follows when the tables are written.
async fn take_over_and_sweep(
    takeover: Option<Takeover>,
    home: PathBuf,
    events: mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    if let Some(takeover) = takeover {
        take_over(takeover).await?;
    }
    // Not before all flows are there: it tells which slots have none.
    start_sweeper(home, events).context("cannot start the sweeper")
}

/// Features to load at the start: those of the stored state; all, if the store is empty but something is pinned, which
/// may use them.
fn features_at_start(head: &Stored, pin_path: &Path) -> u32 {
    if head.revision.number == 0 && pin_path.exists() { ON_DEMAND } else { head.desired.features() }
}

/// Lets our program run where another ABI version's does, now that the tables are written.
async fn take_over(takeover: Takeover) -> anyhow::Result<()> {
    let (from, to, began) = (takeover.abi(), lb_common::ABI_VERSION, std::time::Instant::now());
    let carried = tokio::task::spawn_blocking(move || takeover.finish())
        .await?
        .with_context(|| format!("cannot take over from ABI version {from} with {to}"))?;
    let Carried { entries, strangers, no_room, lost } = carried;
    tracing::info!(from, to, ?entries, strangers, no_room, took = ?began.elapsed(), "taken over from another ABI version");
    for (map, abi, what) in lost {
        tracing::warn!(
            map,
            abi,
            what,
            "its flows are lost: they are placed as those of a host that comes anew"
        );
    }
    Ok(())
}

/// Opens what belongs to this host, and the store.
async fn open_store(settings: &Settings) -> anyhow::Result<(Arc<LocalFile>, Arc<dyn Store>, FleetMember)> {
    let state_dir = settings.state_dir.clone();
    let local = tokio::task::spawn_blocking(move || LocalFile::open(&state_dir)).await??;
    let opener = Opener {
        local: local.clone(),
        keep: settings.revisions,
        access: settings.store_access.clone(),
        id: settings.store_id.clone(),
    };
    let store = opener.open(&settings.store).await?;
    let link = store.link().borrow().clone();
    let revision = store.head().revision.number;
    tracing::info!(
        engine = link.engine,
        place = link.place,
        connected = link.connected,
        revision,
        "store opened"
    );
    let host = match &settings.host {
        Some(host) => host.clone(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map_or_else(|_| "default".to_owned(), |name| name.trim().to_owned()),
    };
    let (region, zone) = (settings.region.to_string(), settings.zone.to_string());
    Ok((Arc::new(local), store, FleetMember { host, region, zone, opener }))
}

/// States in force within the longest drain time of any service.
async fn history(store: &dyn Store) -> Vec<Past> {
    let head = store.head();
    let drain_s = head.desired.services.values().map(|s| s.drain_s).max().unwrap_or(0);
    let (now_ms, boot_ms) = (clock::unix_ms(), clock::boot().as_millis() as i64);
    let since_ms = now_ms.saturating_sub(u64::from(drain_s) * 1_000);
    let found = tokio::time::timeout(FIRST_HISTORY, since(store, since_ms, HISTORY));
    let found = match found.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::warn!(%error, "transitions that are going on are not known");
            vec![head]
        }
        Err(_) => {
            tracing::warn!("reading the history takes too long: transitions that are going on are not known");
            vec![head]
        }
    };
    tracing::info!(revisions = found.len(), "what tables were made from lately is taken from the history");
    let past = |stored: Stored| Past {
        from_ms: boot_ms - (now_ms as i64 - stored.revision.time_ms as i64),
        desired: stored.desired,
    };
    found.into_iter().map(past).collect()
}

/// An error with its causes, without those that the messages before have told already.
pub fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The API's socket; gone with the daemon, however that ends.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

/// Ports that someone chose must be good ones; the usual ones are only warned of.
fn check_nat_ports(settings: &Settings) -> anyhow::Result<()> {
    use lb_common::settings::features;
    // A pool's addresses are not those of this host's own connections.
    let has_pool = settings.nat_source_v4.is_some() && settings.nat_source_v6.is_some();
    if has_pool || settings.ingress.features & features::NAT == 0 {
        return Ok(());
    }
    match nat_ports::problem(settings.ingress.nat_first, settings.ingress.nat_last) {
        Some(what) if settings.nat_ports_required => Err(SettingsError { setting: "nat_ports", what }.into()),
        Some(what) => {
            tracing::warn!(what, "mode nat");
            Ok(())
        }
        None => Ok(()),
    }
}

/// `used`: features that are loaded on demand, and used from the start.
fn attach_options(settings: &Settings, used: u32) -> AttachOptions {
    let log_level = xdp_log::number(settings.xdp_log_level);
    // A program that logs is not loaded anew.
    let used = if log_level == 0 { used } else { ON_DEMAND };
    let limits = Limits {
        services: settings.max_services,
        backends: settings.max_backends,
        slots: settings.max_slots,
        flows: settings.max_flows,
        nat_flows: settings.max_nat_flows,
        nat_young: limit::nat_young(
            settings.max_nat_flows,
            u32::from(settings.ingress.nat_last.saturating_sub(settings.ingress.nat_first)) + 1,
            processors::online(),
        ),
        guard_entries: settings.max_guard_entries,
        ..Limits::default()
    };
    let budgets = Budgets::of(limits.flows, limits.syns, limits.flows, processors::online());
    AttachOptions {
        interfaces: settings.iface.clone(),
        allow_generic: settings.allow_generic,
        pin_path: settings.pin_path.clone(),
        limits,
        settings: IngressSettings {
            features: loaded_features(settings.ingress.features, settings.chain, used),
            syns_per_s: budgets.syns,
            flows_per_s: budgets.flows,
            udp_per_s: budgets.udp,
            ..settings.ingress
        },
        may_have: settings.ingress.features & ON_DEMAND,
        log_level,
    }
}

fn compile_settings(
    settings: &Settings,
    limits: Limits,
    attached: BTreeMap<u32, String>,
    here: Locality,
    lost: u32,
) -> compile::Settings {
    compile::Settings {
        here,
        ipip_source_v4: settings.ipip_source_v4,
        ipip_source_v6: settings.ipip_source_v6,
        nat_source_v4: settings.nat_source_v4,
        nat_source_v6: settings.nat_source_v6,
        attached,
        limits: compile::MapLimits {
            services: limits.services,
            backends: limits.backends,
            slots: limits.slots,
            flows: limits.flows,
            syns: limits.syns,
            udp_flows: limits.flows,
            vips: limits.vips,
            guard_entries: limits.guard_entries,
        },
        features_off: features::ALL & !settings.ingress.features | lost,
    }
}

/// Says how the programs came to run.
fn tell_of(dataplane: &Dataplane) {
    let kernel = Kernel::get();
    tracing::info!(frags = dataplane.frags, ?kernel, "programs loaded");
    for one in &dataplane.left_out {
        tracing::warn!(program = one.program, feature = one.feature_name(), "left out: {}", one.reason);
    }
    for i in dataplane.interfaces.attached() {
        if i.mode == "driver" {
            tracing::info!(interface = i.name, mode = i.mode, adopted = dataplane.adopted, "attached");
        } else {
            let why = i.why_generic.unwrap_or_default();
            tracing::warn!(
                interface = i.name,
                mode = i.mode,
                why,
                "attached in generic mode: much slower than in the driver"
            );
        }
    }
    for waiting in dataplane.interfaces.waiting() {
        tracing::warn!(interface = waiting.name, "not attached, tried again each second: {}", waiting.reason);
    }
}

/// The reconciler compiles and writes maps without pause: on a thread of its own, it delays nobody else.
fn spawn_reconciler(
    reconciler: Reconciler<Dataplane>,
    inbox: mpsc::Receiver<Event>,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Handle::current();
    let run = move || runtime.block_on(reconciler.run(inbox));
    std::thread::Builder::new().name("reconcile".to_owned()).spawn(run).context("cannot start the reconciler")
}

/// Passes what comes in on as events, until nobody takes them.
async fn forward<T>(
    mut from: mpsc::Receiver<T>,
    to: mpsc::Sender<Event>,
    event: impl Fn(T) -> Event,
) -> anyhow::Result<()> {
    while let Some(thing) = from.recv().await {
        if to.send(event(thing)).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn save_memory(mut kept: watch::Receiver<Vec<u8>>, store: Arc<LocalFile>) -> anyhow::Result<()> {
    while kept.changed().await.is_ok() {
        tokio::time::sleep(GATHER).await;
        let bytes = kept.borrow_and_update().clone();
        if let Err(error) = store.save(MEMORY, bytes).await {
            tracing::error!(%error, "the reconciler's memory cannot be saved");
        }
    }
    Ok(())
}

async fn ended_ok(part: impl Future<Output = ()>) -> anyhow::Result<()> {
    part.await;
    Ok(())
}

async fn until(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|stop| *stop).await;
}

/// Writes down what would otherwise be saved in a moment.
async fn flush(local: &dyn Local, control: &Control, memory: &watch::Receiver<Vec<u8>>) {
    if let Err(error) = Checker::save(control.health(), local).await {
        tracing::error!(%error, "health verdicts cannot be saved");
    }
    if let Err(error) = Watcher::save(control.replicas(), local).await {
        tracing::error!(%error, "what replicas said cannot be saved");
    }
    let memory = memory.borrow().clone();
    if !memory.is_empty()
        && let Err(error) = local.save(MEMORY, memory).await
    {
        tracing::error!(%error, "the reconciler's memory cannot be saved");
    }
}

/// When a file's services become the desired state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// If they are not those that the file had when it was last loaded: what `lbctl` changed since stays.
    IfChanged,
    /// In any case: the operator asked.
    Always,
}

async fn load_services(
    control: &Control,
    local: &dyn Local,
    path: &Path,
    desired: Desired,
    load: Load,
) -> anyhow::Result<()> {
    let text = export(&desired).into_bytes();
    if load == Load::IfChanged && local.load(FILE).await?.as_ref() == Some(&text) {
        tracing::info!(file = %path.display(), "its services were loaded before; the store's state holds");
        return Ok(());
    }
    let message = format!("services of {}", path.display());
    let query = types::WriteQuery { message: Some(message), ..Default::default() };
    let author = api::Author::daemon();
    let change = control.write(&author, &query, |state| {
        let mut wanted = desired.clone();
        wanted.keep_operations(state);
        *state = wanted;
        Ok(())
    });
    let change = change.await.with_context(|| format!("cannot apply the services of {}", path.display()))?;
    local.save(FILE, text).await?;
    let (revision, changes) = (change.revision, change.differences.len());
    tracing::info!(file = %path.display(), revision, changes, "services loaded");
    Ok(())
}

/// SIGHUP: reads the file again. If it is wrong, says so, and changes nothing.
async fn reload(control: &Control, local: &dyn Local, config: Option<&Path>, said: &Options) {
    let usec = NotifyState::monotonic_usec_now();
    match usec {
        Ok(usec) => notify(&[NotifyState::Reloading, usec]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
    let result = async {
        let path = config.context("there is no --config file to read again")?;
        let owned = path.to_owned();
        let file = tokio::task::spawn_blocking(move || File::read(&owned)).await??;
        file.options.clone().resolve()?;
        if file.options != *said {
            tracing::warn!("[lbd] has changed: that takes a restart of lbd (which loses no packet)");
        }
        match file.desired {
            Some(desired) => load_services(control, local, path, desired, Load::Always).await,
            None => Ok(()),
        }
    };
    match result.await {
        Ok(()) => tracing::info!("configuration read again"),
        Err(error) => tracing::error!("configuration not changed: {}", told(&error)),
    }
    notify(&[NotifyState::Ready]);
}

fn load_probe_programs() -> Result<Box<dyn ProbePrograms>, String> {
    ProbeDataplane::load().map(|programs| Box::new(programs) as _).map_err(|e| e.to_string())
}
