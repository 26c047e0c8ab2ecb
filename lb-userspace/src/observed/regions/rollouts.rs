//! Roll-outs: finds the backends of the new version, and counts the answers of both versions since it began.
//!
//! Input: the replica registry. Output: the backends of the new version, tallies, and a verdict. Called by
//! `controller`.
//!
//! The first host of all by name writes an abort, once, for all services with the roll-out.

use super::{CommitDesired, RolloutShown};
use crate::{
    desired::model::{Answers, BackendId, Desired, Name, Report, Rollout, RolloutState, Service},
    observed::replica,
    plan::policy::{
        canary::{CanaryVerdict, Tally, judge},
        coverage::Coverage,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// Whether a replica reports the version that is being rolled out.
pub fn runs_new(report: &Report, rollout: &Rollout) -> bool {
    report.version.as_ref() == Some(&rollout.version)
        && report.model.as_ref().is_none_or(|model| *model == rollout.model)
}

/// Counts of one roll-out.
#[derive(Debug, Default)]
struct Count {
    /// Model, version and start: identifies the roll-out that is counted.
    key: (String, String, u64),
    /// By backend: whether it ran the new version, and its last counters.
    last: BTreeMap<Name, (bool, Answers)>,
    new: Tally,
    old: Tally,
}

/// Counts of all roll-outs, by service.
#[derive(Debug, Default)]
pub struct Rollouts {
    counts: BTreeMap<Name, Count>,
}

impl Rollouts {
    /// Removes the counts of services without a roll-out.
    pub fn retain(&mut self, has_rollout: impl Fn(&Name) -> bool) {
        self.counts.retain(|name, _| has_rollout(name));
    }

    /// Updates the counts of a service's roll-out. Returns the backends of the new version, its results, and a verdict.
    pub fn update(
        &mut self,
        (name, service): (&Name, &Service),
        rollout: &Rollout,
        registry: &replica::ReplicaRegistry,
        coverage: Coverage,
    ) -> (BTreeSet<Name>, RolloutShown, CanaryVerdict) {
        let key = (rollout.model.clone(), rollout.version.clone(), rollout.since_ms);
        let count = self.counts.entry(name.clone()).or_default();
        if count.key != key {
            *count = Count { key, ..Count::default() };
        }
        (count.new.replicas, count.new.counting, count.old.replicas, count.old.counting) = (0, 0, 0, 0);
        let mut new_backends = BTreeSet::new();
        registry.read(|entries| {
            for backend in service.backends.keys() {
                let id = BackendId { service: name.clone(), backend: backend.clone() };
                let Some(report) = entries.get(&id).and_then(|e| e.report.as_ref()) else { continue };
                let is_new = runs_new(report, rollout);
                if is_new {
                    new_backends.insert(backend.clone());
                }
                let tally = if is_new { &mut count.new } else { &mut count.old };
                tally.replicas += 1;
                let Some(answers) = report.answers else { continue };
                tally.counting += 1;
                if let Some((was_new, before)) = count.last.insert(backend.clone(), (is_new, answers)) {
                    // A new version is a new process, whose counters start at 0.
                    let before = if was_new == is_new { before } else { Answers::default() };
                    tally.add(&before, &answers);
                }
            }
        });
        count.last.retain(|backend, _| service.backends.contains_key(backend));
        let verdict = match rollout.state {
            RolloutState::Running => judge(rollout, &count.new, &count.old),
            RolloutState::Promoted if coverage.is_incomplete(rollout) => {
                CanaryVerdict::Fine("the new version does not get all flows".to_owned())
            }
            RolloutState::Promoted => CanaryVerdict::Fine("the new version gets all flows".to_owned()),
            RolloutState::Aborted => CanaryVerdict::Fine("the new version gets no flows".to_owned()),
        };
        let text = match &verdict {
            CanaryVerdict::Waiting(text) => format!("not judged yet: {text}"),
            CanaryVerdict::Fine(text) => text.clone(),
            CanaryVerdict::Abort(text) => format!("will be aborted: {text}"),
        };
        let shown = RolloutShown {
            service: name.clone(),
            rollout: rollout.clone(),
            new: count.new,
            old: count.old,
            coverage,
            verdict: text,
        };
        (new_backends, shown, verdict)
    }
}

/// A roll-out that must be aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Service whose replicas perform badly.
    service: Name,
    model: String,
    version: String,
    why: String,
}

impl Abort {
    /// Aborts the roll-out of a service.
    pub fn new(service: &Name, rollout: &Rollout, why: String) -> Self {
        let (model, version) = (rollout.model.clone(), rollout.version.clone());
        Self { service: service.clone(), model, version, why }
    }

    /// Aborts the roll-out on all services that run it: a version that fails on one of them is not sent to the clients of
    /// another. Skips a roll-out of another version, and one that no longer runs.
    pub fn apply(&self, desired: &mut Desired) {
        let runs = |r: &Rollout| {
            (&r.model, &r.version, r.state) == (&self.model, &self.version, RolloutState::Running)
        };
        let all = desired.services.iter().filter(|(_, s)| s.rollout.as_ref().is_some_and(runs));
        for name in all.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            let Some(rollout) = desired.service_mut(&name).and_then(|s| s.rollout.as_mut()) else { continue };
            rollout.state = RolloutState::Aborted;
            rollout.reason = match name == self.service {
                true => self.why.clone(),
                false => format!("on service {}, {}", self.service, self.why),
            };
        }
    }
}

/// Aborts roll-outs whose new version performs badly; at most one task writes at a time.
pub fn abort(control: &Arc<impl CommitDesired>, aborting: &Arc<AtomicBool>, aborts: Vec<Abort>) {
    if aborts.is_empty() || aborting.swap(true, Relaxed) {
        return;
    }
    let (control, aborting) = (control.clone(), aborting.clone());
    tokio::spawn(async move {
        for abort in aborts {
            let Abort { service, model, version, why } = &abort;
            tracing::debug!(%service, model, version, why, "aborting roll-out on all services");
            let message = format!("roll-out of {version} of {model} aborted: on service {service}, {why}");
            let change = {
                let abort = abort.clone();
                move |desired: &mut Desired| abort.apply(desired)
            };
            let done = control.clone().commit_as_daemon(message, Box::new(change));
            if let Err(error) = done.await {
                tracing::error!(%service, %error, "cannot abort roll-out");
            }
        }
        aborting.store(false, Relaxed);
    });
}
