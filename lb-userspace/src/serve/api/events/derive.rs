//! Finds out what happened: compares the host's state with what it was, in one place.
//!
//! Input: desired state, the reconciler's snapshot, verdicts, replica state, decisions about regions, announcement,
//! interfaces, and the problems of status. Output: events. What has a history of its own (verdicts, replicas) is read
//! from that, so no change is lost between two looks; of the rest, the difference counts.

use super::{EventLog, EventSubject};
use crate::{
    clock,
    desired::{
        model::{BackendId, BackendState, Desired, Health, Name, RegionState, Rollout, RolloutState, Share},
        store::{Revision, Stored},
    },
    observed::{health::Transition, replica::ReplicaTransition},
    serve::api::{
        Control, EngineError,
        engine::Snapshot,
        types::{AppliedStatus, Interface},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, sleep_until};

/// Interval of the looks at what tells of no change: interfaces, deadlines of drains, problems.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time for which changes are gathered: a look at ten thousand backends takes some milliseconds.
const GATHER: Duration = Duration::from_millis(50);

/// The host's state at the last look.
#[derive(Default)]
struct LastLook {
    stored: Option<Stored>,
    snapshot: Arc<Snapshot>,
    applied: Option<u64>,
    failure: Option<(u64, String)>,
    verdicts: BTreeMap<BackendId, Option<Transition>>,
    replicas: BTreeMap<BackendId, Option<ReplicaTransition>>,
    replicas_version: u64,
    /// Drains of backends that have not ended, with the service's drain time; the second set: those whose time is over.
    drains: BTreeMap<BackendId, u32>,
    drains_over: BTreeSet<BackendId>,
    is_host_draining: bool,
    interfaces: BTreeMap<String, (u32, String)>,
    vips: BTreeMap<IpAddr, bool>,
    spills: BTreeMap<Name, String>,
    /// Problems by code and subject: since when, the text, and whether the event has been written.
    problems: BTreeMap<(String, String), (Instant, String, bool)>,
    next_problems: Option<Instant>,
}

/// Finds events until the store is closed.
pub async fn run(control: Arc<Control>) {
    let mut last = LastLook::default();
    last.look(&control, true);
    let started = format!("lbd {} has started, pid {}", env!("CARGO_PKG_VERSION"), std::process::id());
    control.events.add("lbd.started", EventSubject::default(), &started, control.head().revision.number);
    let mut store = control.store.watch();
    let mut replicas = control.replicas.changes();
    let mut outcome = control.outcomes();
    let mut announcement = control.announcement_watch();
    loop {
        // Before the look: a change during it is looked at again.
        let applied = control.engine.changed();
        let tick = Instant::now() + INTERVAL;
        let announced = async {
            match &mut announcement {
                Some(watch) => watch.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = applied => {}
            changed = store.changed() => if changed.is_err() { return },
            _ = replicas.changed() => {}
            _ = outcome.changed() => {}
            is_open = announced => if !is_open { announcement = None },
            () = sleep_until(tick) => {}
        }
        sleep(GATHER).await;
        store.mark_unchanged();
        replicas.mark_unchanged();
        outcome.mark_unchanged();
        last.look(&control, false);
    }
}

/// Writes events about one look.
struct EventWriter<'a> {
    log: &'a EventLog,
    revision: u64,
    /// At the first look nothing has happened yet.
    is_first: bool,
}

impl EventWriter<'_> {
    fn add(&self, kind: &'static str, subject: EventSubject, cause: impl AsRef<str>) {
        if !self.is_first {
            self.log.add(kind, subject, cause.as_ref(), self.revision);
        }
    }

    /// One of two kinds.
    fn switch(&self, is_on: bool, kinds: [&'static str; 2], subject: EventSubject, cause: impl AsRef<str>) {
        self.add(kinds[usize::from(!is_on)], subject, cause);
    }
}

impl LastLook {
    fn look(&mut self, control: &Control, is_first: bool) {
        let (stored, snapshot) = (control.head(), control.engine.snapshot());
        let writer = EventWriter { log: &control.events, revision: snapshot.applied.revision, is_first };
        self.desired(&writer, &stored);
        self.applied(&writer, &stored, &snapshot, control.outcome());
        self.interfaces(&writer, control.engine.interfaces(), &control.engine.loaded().waiting);
        self.verdicts(&writer, control);
        self.replicas(&writer, control);
        self.regions(&writer, control);
        if !Arc::ptr_eq(&self.snapshot, &snapshot) {
            self.snapshot(&writer, &snapshot);
            self.snapshot = snapshot.clone();
        }
        self.drains(&writer, control, &stored, &snapshot);
        self.announcement(&writer, control);
        self.problems(&writer, control);
        self.stored = Some(stored);
    }

    /// Drains of regions and roll-outs, from the desired state.
    fn desired(&mut self, writer: &EventWriter<'_>, stored: &Stored) {
        let Some(before) = self.stored.as_ref().filter(|before| before.revision != stored.revision) else {
            return;
        };
        let cause = by(&stored.revision);
        let draining = |state: &Desired| -> BTreeSet<Name> {
            let all = state.regions.iter().filter(|(_, region)| region.state == RegionState::Draining);
            all.map(|(name, _)| name.clone()).collect()
        };
        let (was, is) = (draining(&before.desired), draining(&stored.desired));
        for name in was.symmetric_difference(&is) {
            let kinds = ["region.drain.begun", "region.drain.ended"];
            let subject = EventSubject { region: Some(name.to_string()), ..EventSubject::default() };
            writer.switch(is.contains(name), kinds, subject, &cause);
        }
        let rollout = |state: &Desired, name: &Name| state.services.get(name).and_then(|s| s.rollout.clone());
        let names: BTreeSet<&Name> =
            before.desired.services.keys().chain(stored.desired.services.keys()).collect();
        for name in names {
            let (old, new) = (rollout(&before.desired, name), rollout(&stored.desired, name));
            if old != new {
                let what = rollout_words(old.as_ref(), new.as_ref());
                writer.add(
                    rollout_kind(old.as_ref(), new.as_ref()),
                    EventSubject::of_service(name),
                    format!("{what}; {cause}"),
                );
            }
        }
    }

    /// Revisions that came into the maps, or did not.
    fn applied(
        &mut self,
        writer: &EventWriter<'_>,
        stored: &Stored,
        snapshot: &Snapshot,
        outcome: Option<(u64, Result<AppliedStatus, EngineError>)>,
    ) {
        let failure = match outcome {
            Some((revision, Err(error))) => Some((revision, error.to_string())),
            _ => None,
        };
        if let Some((revision, error)) = &failure
            && self.failure.as_ref() != Some(&(*revision, error.clone()))
        {
            writer.add("apply.failed", EventSubject::default(), format!("revision {revision}: {error}"));
        }
        self.failure = failure;
        let (was, is) = (self.applied, snapshot.applied.revision);
        if was != Some(is) && snapshot.applied.error.is_none() {
            self.applied = Some(is);
            let cause = if stored.revision.number == is { by(&stored.revision) } else { String::new() };
            let AppliedStatus { slots_changed, took_us, .. } = snapshot.applied;
            let skipped = match was {
                Some(was) if is > was + 1 => format!("with revisions {} to {}; ", was + 1, is - 1),
                _ => String::new(),
            };
            let took_ms = took_us as f64 / 1_000.0;
            let cause = format!("{skipped}{cause} ({slots_changed} slots changed in {took_ms:.1} ms)");
            writer.add("revision.applied", EventSubject::default(), cause.trim_start());
        }
    }

    fn interfaces(
        &mut self,
        writer: &EventWriter<'_>,
        attached: Vec<Interface>,
        waiting: &[crate::serve::api::types::WaitingInterface],
    ) {
        let subject =
            |name: &str| EventSubject { interface: Some(name.to_owned()), ..EventSubject::default() };
        let now: BTreeMap<String, (u32, String)> =
            attached.into_iter().map(|i| (i.name, (i.ifindex, i.mode))).collect();
        for name in self.interfaces.keys().filter(|name| !now.contains_key(*name)) {
            let why = waiting.iter().find(|w| w.name == *name).map_or("no longer configured", |w| &w.reason);
            writer.add("interface.lost", subject(name), why);
        }
        for (name, (ifindex, mode)) in &now {
            if self.interfaces.get(name).is_none_or(|(before, _)| before != ifindex) {
                writer.add("interface.attached", subject(name), format!("ifindex {ifindex}, {mode} mode"));
            }
        }
        self.interfaces = now;
    }

    fn verdicts(&mut self, writer: &EventWriter<'_>, control: &Control) {
        control.health.read(|entries| {
            self.verdicts.retain(|id, _| entries.contains_key(id));
            for (id, entry) in entries {
                // An entry that is new while lbd runs tells its whole history.
                let known = self.verdicts.get(id);
                if known.is_some_and(|last| last.as_ref() == entry.history.back()) {
                    continue;
                }
                for transition in news(&entry.history, known.and_then(Option::as_ref)) {
                    let kind = match transition.to {
                        Health::Healthy => "backend.up",
                        Health::Unhealthy => "backend.down",
                        Health::Unknown => continue,
                    };
                    writer.add(kind, EventSubject::of_backend(id), &transition.reason);
                }
                self.verdicts.insert(id.clone(), entry.history.back().cloned());
            }
        });
    }

    fn replicas(&mut self, writer: &EventWriter<'_>, control: &Control) {
        let version = *control.replicas.changes().borrow();
        if version == self.replicas_version && !writer.is_first {
            return;
        }
        self.replicas_version = version;
        control.replicas.read(|entries| {
            self.replicas.retain(|id, _| entries.contains_key(id));
            for (id, entry) in entries {
                let known = self.replicas.get(id);
                if known.is_some_and(|last| last.as_ref() == entry.history.back()) {
                    continue;
                }
                for transition in news(&entry.history, known.and_then(Option::as_ref)) {
                    use crate::desired::model::Readiness as R;
                    let kind = match transition.to {
                        R::Ready => "replica.ready",
                        R::Loading => "replica.loading",
                        R::Draining => "replica.draining",
                        R::Failed => "replica.failed",
                        R::Lost => "replica.lost",
                        R::Unknown => "replica.unknown",
                    };
                    writer.add(kind, EventSubject::of_backend(id), &transition.reason);
                }
                self.replicas.insert(id.clone(), entry.history.back().cloned());
            }
        });
    }

    /// Spill, from the decisions in effect on this host.
    fn regions(&mut self, writer: &EventWriter<'_>, control: &Control) {
        let decisions = control.region_snapshot();
        let mut now = BTreeMap::new();
        for (name, explained) in &decisions.services {
            let decision = &explained.decision;
            let to =
                spilled(&decision.spill.shares, "region").chain(spilled(&decision.zone_spill.shares, "zone"));
            let to: Vec<String> = to.collect();
            if !to.is_empty() {
                now.insert(name.clone(), format!("{}: {}", to.join(", "), decision.reason));
            }
        }
        for (name, cause) in now.iter().filter(|(name, _)| !self.spills.contains_key(*name)) {
            writer.add("spill.begun", EventSubject::of_service(name), cause);
        }
        for name in self.spills.keys().filter(|name| !now.contains_key(*name)) {
            let reason = decisions.services.get(name).map_or("no region rules", |e| &e.decision.reason);
            writer.add("spill.ended", EventSubject::of_service(name), reason);
        }
        self.spills = now;
    }

    /// Panic, floods, unreachable and removed backends, from the reconciler's snapshot.
    fn snapshot(&self, writer: &EventWriter<'_>, now: &Snapshot) {
        for (name, service) in &now.services {
            let before = self.snapshot.services.get(name);
            let subject = || EventSubject::of_service(name);
            let healthy = format!("{} backends take new flows", service.eligible);
            if service.panic != before.is_some_and(|b| b.panic) {
                writer.switch(service.panic, ["panic.begun", "panic.ended"], subject(), &healthy);
            }
            if service.flood != before.is_some_and(|b| b.flood) {
                let cause = if service.flood { "the hash alone places new flows" } else { "" };
                writer.switch(service.flood, ["flood.begun", "flood.ended"], subject(), cause);
            }
        }
        for (id, backend) in &now.backends {
            let before = self.snapshot.backends.get(id).and_then(|b| b.unreachable.as_deref());
            match (before, backend.unreachable.as_deref()) {
                (None, Some(why)) => {
                    writer.add("backend.unreachable", EventSubject::of_backend(id), why);
                }
                (Some(_), None) => writer.add("backend.reachable", EventSubject::of_backend(id), ""),
                _ => {}
            }
        }
        let removed = |snapshot: &Snapshot| -> BTreeMap<(Name, IpAddr), u64> {
            snapshot.removed.iter().map(|r| ((r.service.clone(), r.address), r.tracked_flows)).collect()
        };
        let (was, is) = (removed(&self.snapshot), removed(now));
        let subject = |(service, address): &(Name, IpAddr)| EventSubject {
            backend: Some(address.to_string()),
            ..EventSubject::of_service(service)
        };
        for (id, flows) in is.iter().filter(|(id, _)| !was.contains_key(*id)) {
            let cause = format!("removed; {flows} tracked flows continue");
            writer.add("backend.drain.begun", subject(id), cause);
        }
        for id in was.keys().filter(|id| !is.contains_key(*id)) {
            writer.add("backend.drain.ended", subject(id), "removed, and its drain time is over");
        }
    }

    /// Drains of backends and of this host.
    fn drains(&mut self, writer: &EventWriter<'_>, control: &Control, stored: &Stored, snapshot: &Snapshot) {
        let mut now = BTreeMap::new();
        for (service, s) in &stored.desired.services {
            for (backend, _) in s.backends.iter().filter(|(_, b)| b.state == BackendState::Draining) {
                now.insert(BackendId { service: service.clone(), backend: backend.clone() }, s.drain_s);
            }
        }
        for id in now.keys().filter(|id| !self.drains.contains_key(*id)) {
            writer.add("backend.drain.begun", EventSubject::of_backend(id), by(&stored.revision));
        }
        for id in self.drains.keys().filter(|id| !now.contains_key(*id)) {
            if !self.drains_over.remove(id) {
                writer.add("backend.drain.ended", EventSubject::of_backend(id), by(&stored.revision));
            }
        }
        let now_ms = clock::unix_ms();
        for (id, drain_s) in now.iter().filter(|(id, _)| !self.drains_over.contains(*id)).collect::<Vec<_>>()
        {
            let Some(since_ms) = control.drains.since_ms(id) else { continue };
            if now_ms >= since_ms + u64::from(*drain_s) * 1_000 {
                let flows = snapshot.backends.get(id).map_or(0, |b| b.tracked_flows);
                let cause = format!("the drain time is over; {flows} tracked flows are left");
                writer.add("backend.drain.ended", EventSubject::of_backend(id), cause);
                self.drains_over.insert(id.clone());
            }
        }
        self.drains = now;
        let drain = control.host_drain();
        if drain.is_some() != self.is_host_draining {
            let cause = drain.as_ref().map_or_else(String::new, |d| match d.reason.as_str() {
                "" => format!("by {}", d.author),
                reason => format!("by {}: {reason}", d.author),
            });
            let kinds = ["host.drain.begun", "host.drain.ended"];
            writer.switch(drain.is_some(), kinds, EventSubject::default(), cause);
            self.is_host_draining = drain.is_some();
        }
    }

    fn announcement(&mut self, writer: &EventWriter<'_>, control: &Control) {
        let vips = control.announcement().map(|a| a.vips).unwrap_or_default();
        let kinds = ["vip.announced", "vip.withdrawn"];
        let subject = |vip: &IpAddr, interface: Option<&str>| EventSubject {
            vip: Some(vip.to_string()),
            interface: interface.map(str::to_owned),
            ..EventSubject::default()
        };
        let mut now = BTreeMap::new();
        for state in &vips {
            let was = self.vips.get(&state.vip).copied().unwrap_or(false);
            if state.on != was {
                let subject = subject(&state.vip, Some(&state.interface));
                writer.switch(state.on, kinds, subject, state.decision.to_string());
            }
            now.insert(state.vip, state.on);
        }
        for (vip, _) in self.vips.iter().filter(|(vip, on)| **on && !now.contains_key(*vip)) {
            writer.add(kinds[1], subject(vip, None), "no service has this VIP any more");
        }
        self.vips = now;
    }

    /// Problems of status. One counts when it has been seen at two looks that are an interval apart: what lbd repairs
    /// within that time needs nobody.
    fn problems(&mut self, writer: &EventWriter<'_>, control: &Control) {
        let now = Instant::now();
        if self.next_problems.is_some_and(|next| now < next) {
            return;
        }
        self.next_problems = Some(now + INTERVAL);
        let mut found: BTreeMap<_, _> = control
            .problems()
            .into_iter()
            .map(|problem| ((problem.code.to_owned(), problem.subject), problem.text))
            .collect();
        self.problems.retain(|key, (_, text, is_told)| {
            let is_there = found.contains_key(key);
            if !is_there && *is_told {
                writer.add("problem.ended", EventSubject::default(), text.as_str());
            }
            is_there
        });
        for (key, (since, text, is_told)) in &mut self.problems {
            text.clone_from(&found.remove(key).unwrap_or_default());
            if !*is_told && now.duration_since(*since) >= INTERVAL / 2 {
                writer.add("problem.begun", EventSubject::default(), text.as_str());
                *is_told = true;
            }
        }
        self.problems.extend(found.into_iter().map(|(key, text)| (key, (now, text, false))));
    }
}

/// The author and what changed.
fn by(revision: &Revision) -> String {
    let reason = revision.reason().map(|reason| format!(" ({reason})")).unwrap_or_default();
    format!("by {}: {}{reason}", revision.author, revision.change())
}

/// The entries of a history that follow `last`; all of them if it is not there.
pub(super) fn news<'a, T: PartialEq>(
    history: &'a VecDeque<T>,
    last: Option<&T>,
) -> impl Iterator<Item = &'a T> + use<'a, T> {
    let after = last.and_then(|last| history.iter().rposition(|one| one == last));
    history.iter().skip(after.map_or(0, |at| at + 1))
}

/// Where a spill goes.
fn spilled<'a>(shares: &'a [Share], what: &'a str) -> impl Iterator<Item = String> + 'a {
    shares.iter().map(move |share| {
        format!("{} to {what} {}", crate::desired::model::percent(share.permille), share.name)
    })
}

fn rollout_kind(old: Option<&Rollout>, new: Option<&Rollout>) -> &'static str {
    match (old, new) {
        (_, None) => "rollout.cleared",
        (Some(old), Some(new)) if old.title() == new.title() && old.state != new.state => match new.state {
            RolloutState::Promoted => "rollout.promoted",
            RolloutState::Aborted => "rollout.aborted",
            RolloutState::Running => "rollout.step",
        },
        (Some(old), Some(new)) if old.title() == new.title() => "rollout.step",
        _ => "rollout.started",
    }
}

/// What became of a roll-out.
fn rollout_words(old: Option<&Rollout>, new: Option<&Rollout>) -> String {
    match (old, new) {
        (Some(old), Some(new)) => new.changes(old),
        (None, Some(new)) => format!("roll-out of {} at {}", new.title(), new.scope()),
        (Some(old), None) => format!("roll-out of {} cleared", old.title()),
        (None, None) => String::new(),
    }
}
