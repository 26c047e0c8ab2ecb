//! Builds the API's answers from store, snapshot, counters and health.

use super::{
    ApiError, Control,
    engine::{Counters, Snapshot},
    find::{find_service, no_backend},
    problems::{
        FoundProblem, general_problems, held_problem, is_checked, not_up_to_date_problems,
        unreachable_problem,
    },
    types::*,
};
use crate::{
    clock,
    desired::{
        model::{Backend, BackendId, BackendState, Health, Name, Readiness, Service},
        store::Stored,
    },
    observed::{health::HealthEntry, replica},
    serve::explain::Explanation,
};
use lb_common::{BackendStats, Reason, reason::Fate};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// Desired state, snapshot and counters, read at one moment.
pub struct StateView {
    stored: Stored,
    snapshot: Arc<Snapshot>,
    counters: Counters,
}

pub(super) fn backend_id(service: &Name, backend: &Name) -> BackendId {
    BackendId { service: service.clone(), backend: backend.clone() }
}

impl Control {
    /// Reads a [`StateView`].
    ///
    /// # Errors
    /// The maps cannot be read.
    pub async fn view(&self) -> Result<StateView, ApiError> {
        let (stored, snapshot) = (self.head(), self.engine.snapshot());
        let counters = self.read_engine(|engine| engine.counters()).await?;
        Ok(StateView { stored, snapshot, counters })
    }

    /// `GET /v1/status`.
    pub fn status(&self, view: &StateView) -> Status {
        self.status_and_problems(view).0
    }

    /// The problems of status, without reading the maps.
    pub(super) fn problems(&self) -> Vec<FoundProblem> {
        let (stored, snapshot) = (self.head(), self.engine.snapshot());
        self.status_and_problems(&StateView { stored, snapshot, counters: Counters::default() }).1
    }

    fn status_and_problems(&self, view: &StateView) -> (Status, Vec<FoundProblem>) {
        let mut status = self.status_of_parts(view);
        let mut problems = Vec::new();
        // One lock and no copies: there may be ten thousand backends.
        self.health.read(|health| {
            for (name, service) in &view.stored.desired.services {
                self.service_status(view, health, name, service, &mut status, &mut problems);
            }
        });
        let now = crate::clock::boot();
        for removed in &view.snapshot.removed {
            let deadline_s = removed.until.saturating_sub(now).as_secs();
            let drain = Drain { flows_left: removed.tracked_flows, deadline_s };
            let backend = format!("{} (removed)", removed.address);
            status.draining.push(DrainingBackend { service: removed.service.clone(), backend, drain });
        }
        let general = general_problems(&status);
        problems.splice(0..0, general);
        problems.extend(self.file_problem().map(|text| FoundProblem::about("config.file", "", text)));
        problems.extend(self.hook_problem().map(|text| FoundProblem::about("config.hook", "", text)));
        problems.extend(self.host_problems().into_iter().map(|text| FoundProblem::of_text("host", text)));
        let regions = self.region_snapshot().problems();
        problems.extend(regions.into_iter().map(|text| FoundProblem::of_text("region", text)));
        problems.extend(not_up_to_date_problems(&view.snapshot));
        status.problems = problems.iter().map(|problem| problem.text.clone()).collect();
        status.healthy = problems.is_empty();
        (status, problems)
    }

    /// A status without what is counted service by service, and without problems.
    fn status_of_parts(&self, view: &StateView) -> Status {
        let mut applied = view.snapshot.applied.clone();
        if let Some((_, Err(error))) = self.outcome() {
            applied.error.get_or_insert_with(|| error.to_string());
        }
        Status {
            healthy: false,
            problems: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: lb_common::ABI_VERSION,
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            store: self.link(),
            revision: view.stored.revision.clone(),
            orphaned_services: self.orphaned(),
            applied,
            interfaces: self.engine.interfaces(),
            loaded: self.engine.loaded(),
            announcement: self.announcement(),
            host_drain: self.host_drain(),
            services: view.stored.desired.services.len(),
            backends: BackendCounts::default(),
            unhealthy: Vec::new(),
            busy: Vec::new(),
            not_probed: Vec::new(),
            checks_without_tunnel: self.health.tunnel_problem(),
            draining: Vec::new(),
            replicas: Vec::new(),
            no_backend: Vec::new(),
            panic: Vec::new(),
            flood: Vec::new(),
            unresolved: Vec::new(),
            narrow_paths: Vec::new(),
            reasons: view.reasons(),
            room: view.snapshot.room.clone(),
            not_up_to_date: view
                .snapshot
                .problems
                .iter()
                .map(|(service, problem)| NotUpToDate {
                    service: service.clone(),
                    reason: problem.reason.to_owned(),
                    problem: problem.text.clone(),
                })
                .collect(),
        }
    }

    fn service_status(
        &self,
        view: &StateView,
        health: &BTreeMap<BackendId, HealthEntry>,
        name: &Name,
        service: &Service,
        status: &mut Status,
        problems: &mut Vec<FoundProblem>,
    ) {
        let (mut unreachable, mut takes_flows) = (Vec::new(), false);
        let unknown = HealthEntry::default();
        let mut held = Vec::new();
        for (backend, b) in &service.backends {
            let id = backend_id(name, backend);
            let entry = health.get(&id).unwrap_or(&unknown);
            let counts = &mut status.backends;
            counts.total += 1;
            match entry.health {
                Health::Healthy if !is_checked(service) => counts.unchecked += 1,
                Health::Healthy if entry.busy_since_ms.is_some() => counts.busy += 1,
                Health::Healthy => counts.healthy += 1,
                Health::Unhealthy => counts.unhealthy += 1,
                Health::Unknown => counts.unknown += 1,
            }
            match b.state {
                BackendState::Up => {}
                BackendState::Draining => counts.draining += 1,
                BackendState::Down => counts.down += 1,
            }
            // Backends that an operator drained or switched off are not a problem.
            if entry.health == Health::Unhealthy && b.state == BackendState::Up {
                let reason = unhealthy_reason(entry, service.health.rise);
                let (service, backend) = (name.clone(), backend.clone());
                status.unhealthy.push(CheckedBackend { service, backend, reason, since_ms: entry.since_ms });
            }
            if let Some(since_ms) = entry.is_busy().filter(|_| is_checked(service)) {
                let reason = entry.last.as_ref().map(|probe| probe.reason.clone()).unwrap_or_default();
                let (service, backend) = (name.clone(), backend.clone());
                status.busy.push(CheckedBackend { service, backend, reason, since_ms });
            }
            let is_probed = entry.not_probed.is_none();
            if let Some(obstacle) = entry.not_probed.clone() {
                let (service, backend) = (name.clone(), backend.clone());
                status.not_probed.push(NotProbedBackend { service, backend, obstacle });
            }
            let applied = view.snapshot.backends.get(&id);
            if let Some(entry) = self.replica_entry(&id, service).filter(|e| e.readiness != Readiness::Ready)
            {
                let (service, backend) = (name.clone(), backend.clone());
                let (readiness, since_ms, reason) =
                    (entry.readiness, entry.since_ms, not_ready_reason(&entry));
                let flows_left = applied.map_or(0, |a| a.tracked_flows);
                status.replicas.push(NotReady { service, backend, readiness, since_ms, reason, flows_left });
            }
            if let Some(drain) = self.drain_progress(view, &id, service) {
                let (service, backend) = (name.clone(), backend.to_string());
                status.draining.push(DrainingBackend { service, backend, drain });
            }
            if let Some(problem) = applied.and_then(|a| a.problem.as_ref()) {
                problems.push(FoundProblem::about("backend.path", &id, format!("{id}: {problem}")));
            }
            let told = applied.and_then(|a| a.next_hop).and_then(|hop| hop.path_mtu);
            status.narrow_paths.extend(told.map(|mtu| NarrowPath { backend: id.clone(), mtu }));
            if let Some(why) = applied.and_then(|a| a.unreachable.as_ref())
                && b.state == BackendState::Up
                && !(is_checked(service) && is_probed)
            {
                takes_flows |= applied.is_some_and(|a| a.slots > 0);
                unreachable.push(format!("{id} ({why})"));
            }
            if applied.is_some_and(|a| a.held) {
                held.push(backend.clone());
            }
            if applied.is_some_and(|a| !a.resolved) {
                status.unresolved.push(id);
            }
        }
        let text = held_problem(name, service, &held);
        problems.extend(text.map(|text| FoundProblem::about("backend.held", name, text)));
        let text = unreachable_problem(&unreachable, takes_flows);
        problems.extend(text.map(|text| FoundProblem::about("backend.unreachable", name, text)));
        let applied = view.snapshot.services.get(name);
        if applied.is_some_and(|a| a.eligible == 0) {
            status.no_backend.push(name.clone());
        }
        if applied.is_some_and(|a| a.panic) {
            status.panic.push(name.clone());
        }
        if applied.is_some_and(|a| a.flood) {
            status.flood.push(name.clone());
        }
    }

    /// One service.
    ///
    /// # Errors
    /// No service has this name.
    pub fn service(&self, view: &StateView, name: &Name) -> Result<ServiceInfo, ApiError> {
        let service = find_service(&view.stored, name)?;
        Ok(self.service_info(view, name, service))
    }

    /// All services.
    pub fn services(&self, view: &StateView) -> Vec<ServiceInfo> {
        let all = view.stored.desired.services.iter();
        all.map(|(name, service)| self.service_info(view, name, service)).collect()
    }

    fn service_info(&self, view: &StateView, name: &Name, service: &Service) -> ServiceInfo {
        let mut info = view.service_info(name, service);
        info.status.vip = self.announcement().and_then(|a| a.vip(service.vip).cloned());
        info
    }

    /// Backends of one service, or of all.
    ///
    /// # Errors
    /// No service has this name.
    pub fn backends(&self, view: &StateView, service: Option<&Name>) -> Result<Vec<BackendInfo>, ApiError> {
        let list = |name: &Name, s: &Service| -> Vec<BackendInfo> {
            s.backends.iter().map(|(backend, b)| self.backend_info(view, name, s, backend, b)).collect()
        };
        match service {
            Some(name) => Ok(list(name, find_service(&view.stored, name)?)),
            None => Ok(view.stored.desired.services.iter().flat_map(|(name, s)| list(name, s)).collect()),
        }
    }

    /// One backend, with the history of its health.
    ///
    /// # Errors
    /// No service or backend has this name.
    pub fn backend(&self, view: &StateView, service: &Name, backend: &Name) -> Result<BackendInfo, ApiError> {
        let s = find_service(&view.stored, service)?;
        let b = s.backends.get(backend).ok_or_else(|| no_backend(service, backend, s))?;
        let mut info = self.backend_info(view, service, s, backend, b);
        let id = backend_id(service, backend);
        if let Some(entry) = self.health.get(&id) {
            info.status.history = entry.history.into();
        }
        info.status.replica = self.replica_entry(&id, s);
        info.status.interface = info.status.next_hop.and_then(|hop| interface_name(hop.ifindex));
        Ok(info)
    }

    /// Adds what the checks say about the backends that an explained flow goes to, where it is not plainly healthy.
    pub(super) fn explain_checks(&self, explanation: &mut Explanation) {
        let Some(service) = explanation.service.as_deref().and_then(|name| name.parse::<Name>().ok()) else {
            return;
        };
        let now_ms = clock::unix_ms();
        let ago = |since_ms: u64| now_ms.saturating_sub(since_ms) / 1_000;
        let chosen = explanation.answers.iter().filter_map(|answer| answer.backend.as_ref()?.name.clone());
        let chosen: BTreeSet<String> = chosen.collect();
        for backend in chosen.iter().filter_map(|name| name.parse::<Name>().ok()) {
            let entry = self.health.get(&backend_id(&service, &backend)).unwrap_or_default();
            if let Some(since_ms) = entry.is_busy() {
                let why = entry.last.as_ref().map(|probe| probe.reason.as_str()).unwrap_or_default();
                explanation.steps.push(format!("{backend} is busy for {} s: {why}", ago(since_ms)));
            }
            if let Some(obstacle) = &entry.not_probed {
                explanation.steps.push(format!(
                    "{backend} cannot be checked for {} s, its last verdict stands: {}",
                    ago(obstacle.since_ms),
                    obstacle.what
                ));
            }
        }
    }

    /// State of a backend's replica, if its service watches replicas.
    fn replica_entry(&self, id: &BackendId, service: &Service) -> Option<replica::ReplicaEntry> {
        service.replica.as_ref().map(|_| self.replicas.get(id).unwrap_or_default())
    }

    /// `GET /v1/replicas`: of one service, or of all. With `after`, waits at most `wait` for a newer version.
    ///
    /// # Errors
    /// No service has this name.
    pub async fn replicas_after(
        &self,
        service: Option<&Name>,
        after: Option<u64>,
        wait: Duration,
    ) -> Result<Replicas, ApiError> {
        let mut changes = self.replicas.changes();
        if let Some(after) = after {
            // On timeout the current state is the answer.
            let _ = tokio::time::timeout(wait, changes.wait_for(|&version| version > after)).await;
        }
        let version = *changes.borrow();
        let (stored, now) = (self.head(), clock::unix_ms());
        if let Some(name) = service {
            find_service(&stored, name)?;
        }
        let asked = stored.desired.services.iter().filter(|(name, _)| service.is_none_or(|s| s == *name));
        let replicas = asked.flat_map(|(name, s)| {
            let source = s.replica.as_ref().map(|r| r.kind.label().to_owned());
            let backends = s.backends.keys().filter_map(move |backend| {
                let state = self.replica_entry(&backend_id(name, backend), s)?;
                let age_ms = state.report.is_some().then(|| now.saturating_sub(state.report_ms));
                let (service, backend) = (name.clone(), backend.clone());
                Some(ReplicaInfo { service, backend, source: source.clone()?, age_ms, state })
            });
            backends.collect::<Vec<_>>()
        });
        Ok(Replicas { version, replicas: replicas.collect() })
    }

    /// Progress of a backend's drain, if it drains.
    fn drain_progress(&self, view: &StateView, id: &BackendId, service: &Service) -> Option<Drain> {
        let since_ms = self.drains.since_ms(id)?;
        let deadline_ms = since_ms + u64::from(service.drain_s) * 1_000;
        let flows_left = view.snapshot.backends.get(id).map_or(0, |b| b.tracked_flows);
        Some(Drain { flows_left, deadline_s: deadline_ms.saturating_sub(clock::unix_ms()).div_ceil(1_000) })
    }

    fn backend_info(
        &self,
        view: &StateView,
        service: &Name,
        s: &Service,
        name: &Name,
        b: &Backend,
    ) -> BackendInfo {
        let id = backend_id(service, name);
        let entry = self.health.get(&id).unwrap_or_default();
        let busy_since_ms = entry.is_busy().filter(|_| is_checked(s));
        let HealthEntry { health, since_ms, last, damped, passive, not_probed, .. } = entry;
        let applied = view.snapshot.backends.get(&id);
        let stats = view.backend_stats(&id);
        let status = BackendStatus {
            index: applied.map(|a| a.index),
            health,
            unchecked: !is_checked(s),
            busy_since_ms,
            held: applied.is_some_and(|a| a.held),
            unreachable: applied.and_then(|a| a.unreachable.clone()),
            health_since_ms: since_ms,
            slots: applied.map_or(0, |a| a.slots),
            table_size: view.snapshot.services.get(service).map_or(0, |s| s.table_size),
            packets: stats.packets,
            bytes: stats.bytes,
            flows: stats.flows,
            drain: self.drain_progress(view, &id, s),
            next_hop: applied.and_then(|a| a.next_hop),
            interface: None,
            damped,
            not_probed,
            slow_start_percent: applied.and_then(|a| a.slow_start_percent),
            problem: applied.and_then(|a| a.problem.clone()),
            excluded: applied.and_then(|a| a.excluded.clone()),
            last_probe: last.filter(|_| !s.health.kind.is_none()),
            signs: Some(passive).filter(|h| h.unreachable + h.refused > 0),
            replica: self
                .replica_entry(&id, s)
                .map(|e| replica::ReplicaEntry { history: Default::default(), ..e }),
            history: Vec::new(),
        };
        BackendInfo { service: service.clone(), name: name.clone(), spec: b.clone(), status }
    }
}

impl StateView {
    /// The desired state.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    fn backend_stats(&self, id: &BackendId) -> BackendStats {
        self.counters.backends.get(id).copied().unwrap_or_default()
    }

    fn service_info(&self, name: &Name, spec: &Service) -> ServiceInfo {
        let applied = self.snapshot.services.get(name);
        let stats = self.counters.services.get(name).copied().unwrap_or_default();
        let status = ServiceStatus {
            index: applied.map(|a| a.index),
            table_size: applied.map_or(0, |a| a.table_size),
            eligible: applied.map_or(0, |a| a.eligible),
            panic: applied.is_some_and(|a| a.panic),
            transition_slots: applied.map_or(0, |a| a.transition_slots),
            vip: None,
            packets: stats.packets,
            bytes: stats.bytes,
            flows: stats.flows,
        };
        ServiceInfo { name: name.clone(), spec: spec.clone(), status }
    }

    /// `GET /v1/stats`.
    pub fn stats_info(&self) -> Stats {
        let backends = self.counters.backends.iter().map(|(id, s)| BackendCount {
            service: id.service.clone(),
            backend: id.backend.clone(),
            packets: s.packets,
            bytes: s.bytes,
            flows: s.flows,
        });
        Stats { time_ms: clock::unix_ms(), backends: backends.collect(), reasons: self.reasons() }
    }

    /// Reasons with at least one packet.
    fn reasons(&self) -> Vec<ReasonCount> {
        let counted = Reason::ALL.iter().map(|&r| (r, self.counters.reason(r))).filter(|(_, n)| *n > 0);
        counted
            .map(|(r, packets)| ReasonCount {
                reason: r.label().to_owned(),
                fate: fate_label(r).to_owned(),
                packets,
                about: r.describe().to_owned(),
            })
            .collect()
    }
}

/// Name of an interface of this host.
fn interface_name(ifindex: u32) -> Option<String> {
    nix::net::if_::if_indextoname(ifindex).ok()?.into_string().ok()
}

/// Why a backend is unhealthy. A last probe that passed is no reason: a backend needs several in a row.
fn unhealthy_reason(entry: &HealthEntry, rise: u8) -> String {
    let of_verdict = || entry.history.back().map(|t| t.reason.clone()).unwrap_or_default();
    match &entry.last {
        Some(probe) if probe.ok => {
            format!("{}; the last probe passed ({}), {rise} in a row are needed", of_verdict(), probe.reason)
        }
        Some(probe) => probe.reason.clone(),
        None => of_verdict(),
    }
}

/// Why a replica is not ready.
fn not_ready_reason(entry: &replica::ReplicaEntry) -> String {
    match (&entry.trouble, entry.history.back()) {
        (Some(trouble), _) if entry.readiness == Readiness::Unknown => trouble.what.clone(),
        (_, Some(transition)) => transition.reason.clone(),
        (Some(trouble), None) => trouble.what.clone(),
        (None, None) => "no report yet".to_owned(),
    }
}

/// Serialised name of a reason's fate: what happens to its packets.
pub fn fate_label(reason: Reason) -> &'static str {
    match reason.fate() {
        Fate::Pass => "pass",
        Fate::Drop => "drop",
        Fate::Answer => "answer",
        Fate::Note => "note",
    }
}
