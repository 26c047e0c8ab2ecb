//! Roll-outs: finds the backends of the new version, and counts the answers of both versions since it began.
//!
//! Input: the replica registry. Output: the backends of the new version, tallies, and a verdict. Called by
//! `controller`.
//!
//! The first host of all by name writes an abort, once.

use super::RolloutShown;
use crate::{
    desired::model::{Answers, BackendId, Name, Report, Rollout, RolloutState, Service},
    observed::replica,
    plan::policy::canary::{CanaryVerdict, Tally, judge},
};
use std::collections::{BTreeMap, BTreeSet};

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
        name: &Name,
        service: &Service,
        rollout: &Rollout,
        registry: &replica::ReplicaRegistry,
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
            verdict: text,
        };
        (new_backends, shown, verdict)
    }
}
