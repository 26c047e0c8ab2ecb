//! One simulation: a fleet of hosts, the operations on it, the faults, and the account of both.

use super::{
    bugs::Bug,
    disk::DiskState,
    environment::{self, Random},
    faults::Fault,
    host::{Daemon, Place, Setup},
    invariants::History,
    operations::{Effect, Kind, Operation, Operations},
    shared::{Cluster, LastKnown, Link},
    workers::Workers,
};
use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, header},
};
use http_body_util::BodyExt;
use lb_userspace::{
    apply::reconcile::fake::{FakeMaps, SharedMaps},
    desired::model::{BackendId, Desired, HealthCheck, Locality, ReplicaSource},
    plan::compile::TableLimits,
    serve::api::Peer,
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    path::Path,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tower::ServiceExt;

/// Time that hosts run in turn.
pub const QUANTUM: Duration = Duration::from_millis(20);
/// Lines of the account that a violation shows.
const ACCOUNT: usize = 30;
/// Characters of a body that a line shows.
const LINE: usize = 400;

/// A violated invariant.
#[derive(Clone, Debug)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
}

/// Creates a violation.
pub fn violated<T>(invariant: &'static str, what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { invariant, what: what.into() })
}

/// A host of the fleet.
pub struct Host {
    pub setup: Setup,
    pub daemon: Option<Daemon>,
    /// When a stopped host starts again.
    pub starts_at: Duration,
    /// When the host, its store or its maps were last disturbed.
    pub disturbed: Duration,
    /// Backends that the host knows, and since when they are as they are.
    pub known: BTreeMap<BackendId, Known>,
}

/// What decides how a backend is observed, and since when it is so.
#[derive(Clone)]
pub struct Known {
    pub address: IpAddr,
    pub health: HealthCheck,
    pub replica: Option<ReplicaSource>,
    pub since: Duration,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Answered at this time with a status and a body.
    Answered { at: Duration, status: u16, body: Value },
    /// The caller left before the answer.
    Left,
}

/// A request that was made.
pub struct Asked {
    pub operation: Operation,
    pub host: usize,
    pub at: Duration,
    pub is_dry_run: bool,
    pub by_reader: bool,
    /// Request of the dry run that was made just before.
    pub rehearsal: Option<u64>,
    /// Whether anything was wrong with the host or the store at the time.
    pub is_disturbed: bool,
    pub outcome: Arc<Mutex<Option<Outcome>>>,
}

impl Asked {
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Status and body of the answer.
    pub fn answer(&self) -> Option<(u16, Value)> {
        match self.outcome()? {
            Outcome::Answered { status, body, .. } => Some((status, body)),
            Outcome::Left => None,
        }
    }
}

/// How often each kind of operation met each kind of fault.
pub type Coverage = BTreeMap<(&'static str, &'static str), u64>;

/// A running simulation.
pub struct Simulation {
    pub random: Random,
    pub hosts: Vec<Host>,
    pub cluster: Option<Cluster>,
    pub workers: Workers,
    pub is_regional: bool,
    pub asked: BTreeMap<u64, Asked>,
    next_id: u64,
    pub history: History,
    pub coverage: Coverage,
    pub active: BTreeSet<Fault>,
    account: VecDeque<String>,
    /// Hash of all that has happened.
    pub trace: u64,
    pub bug: Option<Bug>,
    /// A backup, and its newest revision.
    pub backup: Option<(u64, Value)>,
    /// When a wall clock was last wrong.
    pub clock_was_wrong: Option<Duration>,
}

impl Simulation {
    /// Builds a fleet from the seed: one host with a file, or several in two regions with a shared store.
    pub fn new(seed: u64, directory: &Path, bug: Option<Bug>) -> Self {
        let mut random = Random(seed ^ 0x51ed_270b_0a1f_39e4);
        let is_shared = random.percent(50);
        let (cluster, workers) = (is_shared.then(Cluster::default), Workers::default());
        let is_regional = is_shared || random.percent(30);
        let names: &[(&str, &str)] =
            if is_shared { &[("eu-1", "eu"), ("eu-2", "eu"), ("us-1", "us")] } else { &[("eu-1", "eu")] };
        // Now and then one host has hardly any room for tables, so that services have to wait there, or are refused.
        let least_slots = random.weighted(&[(60_000, 2), (10_000, 1), (4_000, 1), (2_500, 1)]);
        let setup = |&(name, region): &(&str, &str)| {
            let path = directory.join(name);
            let is_last = names.last().is_some_and(|(last, _)| *last == name);
            let slots = if is_last { least_slots } else { 60_000 };
            let limits = TableLimits {
                services: 64,
                backends: 256,
                slots,
                vips: 16,
                guard_entries: 64,
                ..TableLimits::default()
            };
            let mut maps = FakeMaps::new(limits.services, limits.slots, limits.backends);
            maps.is_large = true;
            Setup {
                name: name.to_owned(),
                here: Locality {
                    region: region.parse().expect("it is valid"),
                    zone: "a".parse().expect("it is valid"),
                },
                directory: path.clone(),
                store_directory: path,
                place: cluster.clone().map_or(Place::File, Place::Shared),
                maps: SharedMaps::new(maps),
                limits,
                disk: DiskState::default(),
                link: Link::default(),
                known: LastKnown::default(),
                workers: workers.clone(),
                wall_ms: 0,
                bug,
            }
        };
        let host = |name| Host {
            setup: setup(name),
            daemon: None,
            starts_at: environment::ORIGIN,
            disturbed: environment::ORIGIN,
            known: BTreeMap::new(),
        };
        Self {
            random,
            hosts: names.iter().map(host).collect(),
            cluster,
            workers,
            is_regional,
            asked: BTreeMap::new(),
            next_id: 1,
            history: History::default(),
            coverage: Coverage::new(),
            active: BTreeSet::new(),
            account: VecDeque::new(),
            trace: 0,
            bug,
            backup: None,
            clock_was_wrong: None,
        }
    }

    /// Adds a line to the account.
    pub fn note(&mut self, line: impl Into<String>) {
        let at = environment::now().saturating_sub(environment::ORIGIN).as_secs_f64();
        if self.account.len() == ACCOUNT {
            self.account.pop_front();
        }
        let line = format!("{at:10.3} s  {}", line.into());
        self.add_to_trace(&line);
        self.account.push_back(line);
    }

    /// Adds something that has happened to the hash of all.
    pub fn add_to_trace(&mut self, text: &str) {
        self.trace = text.bytes().fold(self.trace, |hash, byte| Random(hash ^ u64::from(byte)).draw());
    }

    /// The last lines of the account.
    pub fn account(&self) -> Vec<String> {
        self.account.iter().cloned().collect()
    }

    /// Runs a number of steps, with a quiet time after every twenty.
    pub fn run(&mut self, steps: u64) -> Result<(), Violation> {
        for step in 1..=steps {
            self.step()?;
            if step % 20 == 0 || step == steps {
                self.quiet()?;
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), Violation> {
        if self.random.percent(25) {
            self.inject()?;
        } else {
            self.operate();
        }
        let pause = self.random.weighted(&[(1, 3), (20, 3), (100, 3), (400, 2), (2_000, 2), (8_000, 2)]);
        self.advance(Duration::from_millis(pause))?;
        self.check_step()
    }

    /// Lets time pass for all hosts.
    pub fn advance(&mut self, by: Duration) -> Result<(), Violation> {
        let end = environment::now() + by;
        while environment::now() < end {
            let next = (environment::now() + QUANTUM).min(end);
            for index in 0..self.hosts.len() {
                let host = &mut self.hosts[index];
                environment::set_wall_offset(host.setup.wall_ms);
                if host.daemon.is_none() && host.starts_at <= environment::now() {
                    self.start(index)?;
                }
                let host = &mut self.hosts[index];
                if let Some(daemon) = &host.daemon {
                    daemon.run_until(next);
                    if let Some(part) = daemon.ended() {
                        return violated(
                            "no part of lbd ends by itself",
                            format!("{}: {part}", host.setup.name),
                        );
                    }
                }
            }
            environment::set_now(next);
        }
        Ok(())
    }

    /// Starts a host's daemon; a start that fails for a fault that is active is repeated.
    fn start(&mut self, index: usize) -> Result<(), Violation> {
        let name = self.hosts[index].setup.name.clone();
        match self.hosts[index].setup.start() {
            Ok(daemon) => {
                self.hosts[index].daemon = Some(daemon);
                self.hosts[index].disturbed = environment::now();
                self.note(format!("{name}: lbd started"));
                self.check_start(index)
            }
            Err(error) => {
                let setup = &self.hosts[index].setup;
                let is_explained = setup.disk.is_filling()
                    || !setup.link.is_good()
                    || self.active.contains(&Fault::MapsFail);
                self.note(format!("{name}: lbd did not start: {error:#}"));
                self.hosts[index].starts_at = environment::now() + Duration::from_secs(1);
                if is_explained { Ok(()) } else { violated("lbd starts", format!("{name}: {error:#}")) }
            }
        }
    }

    /// Hosts that run.
    pub fn running(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|&i| self.hosts[i].daemon.is_some()).collect()
    }

    /// The newest state that a running host knows.
    pub fn head(&self) -> (u64, Arc<Desired>) {
        let heads = self.hosts.iter().filter_map(|h| h.daemon.as_ref()).map(|d| d.store.head());
        heads
            .max_by_key(|s| s.revision.number)
            .map_or_else(Default::default, |s| (s.revision.number, s.desired))
    }

    /// Makes one request, or a dry run and then the same request.
    fn operate(&mut self) {
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let host = self.random.one_of(&running);
        let kind = self.random.weighted(&[
            (Kind::ServiceAdd, 12),
            (Kind::ServiceSet, 10),
            (Kind::ServiceRemove, 3),
            (Kind::BackendAdd, 12),
            (Kind::BackendSet, 8),
            (Kind::BackendRemove, 4),
            (Kind::BackendDrain, 6),
            (Kind::BackendUndrain, 4),
            (Kind::RegionAdd, 3),
            (Kind::RegionRemove, 1),
            (Kind::RegionDrain, 2),
            (Kind::RegionUndrain, 3),
            (Kind::GuardChange, 4),
            (Kind::ConfigApply, 3),
            (Kind::Rollback, 3),
            (Kind::Rollout, 3),
            (Kind::Restore, 2),
            (Kind::Operate, 3),
            (Kind::Lock, 2),
            (Kind::HostDrain, 2),
            (Kind::Read, 8),
            (Kind::Invalid, 4),
            (Kind::Reader, 6),
            (Kind::DryRun, 6),
            (Kind::Cancelled, 6),
        ]);
        let (revision, head) = self.head();
        let is_regional = self.is_regional;
        let backup = self.backup.as_ref();
        let operation =
            Operations { random: &mut self.random, head: &head, revision, is_regional, backup }.make(kind);
        self.cover(kind);
        let rehearsal = (kind == Kind::DryRun && operation.has_dry_run)
            .then(|| self.ask(host, operation.clone(), true, false, None));
        let by_reader = kind == Kind::Reader;
        let tries_dry_run = by_reader && self.random.percent(50);
        self.ask(host, operation, tries_dry_run, by_reader, rehearsal);
    }

    /// Counts the faults that an operation meets.
    fn cover(&mut self, kind: Kind) {
        let has_problems =
            |h: &Host| h.daemon.as_ref().is_some_and(|d| !d.published.borrow().problems.is_empty());
        if self.hosts.iter().any(has_problems) {
            self.active.insert(Fault::NoRoom);
        } else {
            self.active.remove(&Fault::NoRoom);
        }
        let met: Vec<Fault> = self.active.iter().copied().collect();
        if met.is_empty() {
            *self.coverage.entry((kind.label(), "none")).or_default() += 1;
        }
        for fault in met {
            *self.coverage.entry((kind.label(), fault.label())).or_default() += 1;
        }
    }

    /// Sends a request to a host; returns its id.
    pub fn ask(
        &mut self,
        host: usize,
        operation: Operation,
        is_dry_run: bool,
        by_reader: bool,
        rehearsal: Option<u64>,
    ) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let mut path = operation.path.clone();
        let mut add = |query: String| {
            let sign = if path.contains('?') { '&' } else { '?' };
            path = format!("{path}{sign}{query}");
        };
        let is_write = !matches!(operation.effect, Effect::Nothing) || operation.kind == Kind::Invalid;
        if is_write {
            add(format!("message=op-{id}"));
        }
        if is_dry_run {
            add("dry_run=true".to_owned());
        }
        let peer = if by_reader {
            Peer { user: "reader".to_owned(), may_write: false }
        } else {
            Peer { user: "root".to_owned(), may_write: true }
        };
        let polls = (operation.kind == Kind::Cancelled).then(|| self.random.below(12));
        let name = &self.hosts[host].setup.name;
        let body: String = operation.body.to_string().chars().take(LINE).collect();
        let line = format!("{name}: op-{id} {} {path} {body} by {}", operation.method, peer.user);
        self.note(line);
        let outcome = Arc::new(Mutex::new(None));
        if let Some(daemon) = &self.hosts[host].daemon {
            let request = request(&operation, &path, peer);
            daemon.spawn(answer(daemon.router.clone(), request, polls, outcome.clone(), self.bug));
        }
        let is_disturbed = self.is_disturbed(host);
        let at = environment::now();
        self.asked.insert(
            id,
            Asked { operation, host, at, is_dry_run, by_reader, rehearsal, is_disturbed, outcome },
        );
        id
    }

    /// Whether anything may delay the requests to a host.
    fn is_disturbed(&self, host: usize) -> bool {
        let Host { setup, disturbed, .. } = &self.hosts[host];
        let fails = setup.maps.lock().fails_after.get().is_some();
        setup.disk.is_filling()
            || !setup.link.is_good()
            || fails
            || environment::now() < *disturbed + Duration::from_secs(5)
    }
}

fn request(operation: &Operation, path: &str, peer: Peer) -> Request<Body> {
    let body = if operation.body.is_null() { Body::empty() } else { Body::from(operation.body.to_string()) };
    let mut request = Request::builder()
        .method(operation.method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body)
        .expect("method and path are valid");
    request.extensions_mut().insert(ConnectInfo(peer));
    request
}

/// Sends a request and records the answer; with `polls`, the caller leaves after so many.
async fn answer(
    router: Router,
    mut request: Request<Body>,
    polls: Option<u64>,
    outcome: Arc<Mutex<Option<Outcome>>>,
    bug: Option<Bug>,
) {
    let is_dry_run = request.uri().query().is_some_and(|query| query.contains("dry_run=true"));
    if bug == Some(Bug::DryRunUnauthorised) && is_dry_run {
        request.extensions_mut().insert(ConnectInfo(Peer { user: "reader".to_owned(), may_write: true }));
    }
    let is_export = request.uri().path() == "/v1/config" && request.method() == "GET";
    let call = async {
        let Ok(response) = router.oneshot(request).await;
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let mut body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if bug == Some(Bug::DryRunLies) && is_dry_run && status == 200 {
            body["differences"] = Value::Array(Vec::new());
        }
        if bug == Some(Bug::ExportForgets) && is_export {
            forget_drain_times(&mut body);
        }
        Outcome::Answered { at: environment::now(), status, body }
    };
    let found = match polls {
        None => call.await,
        Some(mut left) => {
            let mut call = pin!(call);
            std::future::poll_fn(|context| {
                if left == 0 {
                    return std::task::Poll::Ready(Outcome::Left);
                }
                left -= 1;
                call.as_mut().poll(context)
            })
            .await
        }
    };
    *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
}

pub fn forget_drain_times(config: &mut Value) {
    if let Some(services) = config["desired"]["services"].as_object_mut() {
        for service in services.values_mut().filter_map(Value::as_object_mut) {
            service.remove("drain_s");
        }
    }
}
