//! Roll-outs: who runs the new version, and what both versions have answered since it began.
//!
//! Input: the replica book. Output: the backends of the new version, tallies, and a verdict. Called by `steering`.
//!
//! The first host of all by name writes an abort, once.

use super::RolloutShown;
use crate::{
    desired::model::{Answers, BackendId, Name, Rollout, RolloutState, Service},
    observed::replica,
    plan::policy::canary::{Tally, Verdict, judge},
};
use std::collections::{BTreeMap, BTreeSet};

/// What was counted for one roll-out.
#[derive(Debug, Default)]
struct Count {
    /// Model, version and beginning: another roll-out is counted anew.
    of: (String, String, u64),
    /// By backend: whether it ran the new version, and its counters.
    last: BTreeMap<Name, (bool, Answers)>,
    new: Tally,
    old: Tally,
}

/// All roll-outs that are known, by service.
#[derive(Debug, Default)]
pub struct Rollouts {
    counts: BTreeMap<Name, Count>,
}

impl Rollouts {
    /// Forgets services that are gone or have no roll-out.
    pub fn retain(&mut self, still: impl Fn(&Name) -> bool) {
        self.counts.retain(|name, _| still(name));
    }

    /// Backends of a service that run the new version, and how it does.
    pub fn look(
        &mut self,
        name: &Name,
        service: &Service,
        rollout: &Rollout,
        book: &replica::ReplicaRegistry,
    ) -> (BTreeSet<Name>, RolloutShown, Verdict) {
        let of = (rollout.model.clone(), rollout.version.clone(), rollout.since_ms);
        let count = self.counts.entry(name.clone()).or_default();
        if count.of != of {
            *count = Count { of, ..Count::default() };
        }
        (count.new.replicas, count.new.counting, count.old.replicas, count.old.counting) = (0, 0, 0, 0);
        let mut newcomers = BTreeSet::new();
        book.read(|entries| {
            for backend in service.backends.keys() {
                let id = BackendId { service: name.clone(), backend: backend.clone() };
                let Some(report) = entries.get(&id).and_then(|e| e.report.as_ref()) else { continue };
                let is_new = report.version.as_ref() == Some(&rollout.version)
                    && report.model.as_ref().is_none_or(|model| *model == rollout.model);
                if is_new {
                    newcomers.insert(backend.clone());
                }
                let tally = if is_new { &mut count.new } else { &mut count.old };
                tally.replicas += 1;
                let Some(answers) = report.answers else { continue };
                tally.counting += 1;
                if let Some((was_new, before)) = count.last.insert(backend.clone(), (is_new, answers)) {
                    // Another version is another process.
                    let before = if was_new == is_new { before } else { Answers::default() };
                    tally.add(&before, &answers);
                }
            }
        });
        count.last.retain(|backend, _| service.backends.contains_key(backend));
        let verdict = match rollout.state {
            RolloutState::Running => judge(rollout, &count.new, &count.old),
            RolloutState::Promoted => Verdict::Fine("it has everything".to_owned()),
            RolloutState::Aborted => Verdict::Fine("it has nothing".to_owned()),
        };
        let text = match &verdict {
            Verdict::Waiting(text) => format!("not judged yet: {text}"),
            Verdict::Fine(text) => text.clone(),
            Verdict::Abort(text) => format!("to be aborted: {text}"),
        };
        let shown = RolloutShown {
            service: name.clone(),
            rollout: rollout.clone(),
            new: count.new,
            old: count.old,
            verdict: text,
        };
        (newcomers, shown, verdict)
    }
}
