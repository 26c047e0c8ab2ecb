//! Writes load scores to the dataplane: directly from a report to the array, without a compilation.
//!
//! Input: scores by backend as reports arrive; the backends' indices, as the reconciler publishes them.
//! Output: writes to a [`LoadSink`]. A backend that gets an index after its report gets its score then; an
//! index that is reused by another backend is set to 0; a replica without a recent report gets the
//! median of its service.

use super::ReplicaRegistry;
use crate::{
    clock,
    desired::model::{BackendId, Desired, ReplicaSource},
    plan::policy::load,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// Destination of scores: the dataplane's array with one number per backend index, or a test.
pub trait LoadSink: Send + Sync {
    /// Sets a backend's load score, and the cost that one more flow adds: the dataplane adds costs until the next
    /// report. A cost of 0 means that nobody reports any more, and clears the score. Takes only a few memory stores.
    fn set(&self, backend_index: u32, score: u32, cost: u32);
}

/// Current index of each backend, and the applied desired state.
pub trait BackendIndices: Send + Sync {
    /// Index of a backend; None if it has none yet.
    fn index(&self, id: &BackendId) -> Option<u32>;
    /// Indices of all backends.
    fn all(&self) -> Vec<(BackendId, u32)>;
    /// The applied desired state.
    fn desired(&self) -> Arc<Desired>;
}

/// Interval of [`Scores::refresh`] without changes.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// A report is stale after this many intervals plus timeouts.
const STALE_FACTOR: u32 = 5;

/// Age from which a report is stale.
pub fn stale_after(source: &ReplicaSource) -> Duration {
    Duration::from_millis(u64::from(source.interval_ms) + u64::from(source.timeout_ms)) * STALE_FACTOR
}

/// Writes scores to the dataplane.
pub struct Scores {
    sink: Arc<dyn LoadSink>,
    indices: Arc<dyn BackendIndices>,
    /// Last written backend and score, by index.
    written: Mutex<BTreeMap<u32, (BackendId, u32)>>,
}

impl Scores {
    /// Creates a writer to `sink`, with the indices of `indices`.
    pub fn new(sink: Arc<dyn LoadSink>, indices: Arc<dyn BackendIndices>) -> Self {
        Self { sink, indices, written: Mutex::default() }
    }

    /// Writes the score of a new report, even if it is unchanged: the report already contains the flows whose costs the
    /// dataplane has added meanwhile.
    pub fn report(&self, id: &BackendId, score: u32, cost: u32) {
        if let Some(index) = self.indices.index(id) {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            self.sink.set(index, score, cost);
            written.insert(index, (id.clone(), score));
        }
    }

    /// Updates the scores of replicas that had none, whose index changed, or whose report is stale.
    pub fn refresh(&self, registry: &ReplicaRegistry, now_ms: u64) {
        let desired = self.indices.desired();
        let by_index: BTreeMap<u32, BackendId> =
            self.indices.all().into_iter().map(|(id, i)| (i, id)).collect();
        let mut wanted: BTreeMap<u32, (BackendId, Option<u32>, u32)> = BTreeMap::new();
        let mut known: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        registry.read(|entries| {
            for (&index, id) in &by_index {
                let source = desired.services.get(&id.service).and_then(|s| s.replica.as_ref());
                let (Some(source), Some(entry)) = (source, entries.get(id)) else { continue };
                let stale_ms = stale_after(source).as_millis() as u64;
                let is_fresh = now_ms.saturating_sub(entry.report_ms) <= stale_ms;
                let score = entry.score.filter(|_| is_fresh);
                if let Some(score) = score {
                    known.entry(id.service.as_str()).or_default().push(score);
                }
                let capacity = entry.report.as_ref().map(|r| load::capacity(r, source.capacity));
                let capacity = capacity.or(source.capacity).unwrap_or(load::USUAL_CAPACITY);
                wanted.insert(index, (id.clone(), score, load::request_cost(capacity)));
            }
        });
        let neutral: BTreeMap<String, u32> =
            known.iter_mut().map(|(service, all)| ((*service).to_owned(), load::neutral(all))).collect();
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.retain(|index, (id, _)| {
            let stays = wanted.get(index).is_some_and(|(now, ..)| now == id);
            if !stays {
                self.sink.set(*index, 0, 0);
            }
            stays
        });
        for (index, (id, score, cost)) in wanted {
            let before = written.get(&index).map(|(_, score)| *score);
            let neutral = neutral.get(id.service.as_str()).copied();
            match (score.or(neutral), before) {
                // A report that arrived meanwhile has already written its own score.
                (Some(_), Some(_)) if score.is_some() => {}
                (Some(score), _) if before != Some(score) => {
                    self.sink.set(index, score, cost);
                    written.insert(index, (id, score));
                }
                // No replica of the service reports any more.
                (None, Some(_)) => {
                    self.sink.set(index, 0, 0);
                    written.remove(&index);
                }
                _ => {}
            }
        }
    }

    /// Refreshes when the reconciler publishes, and every [`REFRESH_INTERVAL`], until the reconciler is gone.
    pub async fn run(
        self: Arc<Self>,
        registry: Arc<ReplicaRegistry>,
        mut published: watch::Receiver<Arc<impl Send + Sync>>,
    ) {
        loop {
            self.refresh(&registry, clock::unix_ms());
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(REFRESH_INTERVAL) => {}
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{desired::model::Readiness, observed::replica::ReplicaEntry};

    /// Remembers what was set, in order.
    #[derive(Default)]
    pub struct Fake(pub Mutex<Vec<(u32, u32)>>);

    impl LoadSink for Fake {
        fn set(&self, backend_index: u32, score: u32, _cost: u32) {
            self.0.lock().unwrap().push((backend_index, score));
        }
    }

    impl Fake {
        fn take(&self) -> Vec<(u32, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    /// Backends of one service at given indices.
    pub struct Fixed(pub Mutex<Vec<(BackendId, u32)>>, pub Arc<Desired>);

    impl BackendIndices for Fixed {
        fn index(&self, id: &BackendId) -> Option<u32> {
            self.0.lock().unwrap().iter().find(|(found, _)| found == id).map(|(_, index)| *index)
        }
        fn all(&self) -> Vec<(BackendId, u32)> {
            self.0.lock().unwrap().clone()
        }
        fn desired(&self) -> Arc<Desired> {
            self.1.clone()
        }
    }

    fn id(backend: &str) -> BackendId {
        BackendId { service: "s".parse().unwrap(), backend: backend.parse().unwrap() }
    }

    #[test]
    fn scores_follow_their_backends() {
        let desired = serde_json::json!({"services": {"s": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp",
            "replica": {"kind": "stream", "interval_ms": 100, "timeout_ms": 100}}}});
        let desired: Arc<Desired> = Arc::new(serde_json::from_value(desired).unwrap());
        let (fake, places) = (Arc::new(Fake::default()), Arc::new(Fixed(Mutex::default(), desired)));
        let scores = Scores::new(fake.clone(), places.clone());
        let book = ReplicaRegistry::default();
        let heard = |score, report_ms| ReplicaEntry {
            readiness: Readiness::Ready,
            score,
            report_ms,
            ..ReplicaEntry::default()
        };
        book.change(|all| {
            all.insert(id("a"), heard(Some(10), 5_000));
            all.insert(id("b"), heard(Some(30), 5_000));
            all.insert(id("c"), heard(None, 0));
        });
        scores.report(&id("a"), 10, 1);
        assert_eq!(fake.take(), [], "it has no index yet");
        *places.0.lock().unwrap() = vec![(id("a"), 3), (id("b"), 4), (id("c"), 5)];
        scores.refresh(&book, 5_100);
        assert_eq!(fake.take(), [(3, 10), (4, 30), (5, 30)], "a replica without a report gets the median");
        scores.report(&id("a"), 10, 1);
        assert_eq!(fake.take(), [(3, 10)], "written again: the dataplane may have added to it");
        scores.refresh(&book, 5_200);
        assert_eq!(fake.take(), []);
        book.change(|all| all.insert(id("b"), heard(Some(30), 1_000)));
        scores.refresh(&book, 5_300);
        assert_eq!(fake.take(), [(4, 10), (5, 10)], "the report of b is stale");
        *places.0.lock().unwrap() = vec![(id("b"), 3)];
        scores.refresh(&book, 5_400);
        assert_eq!(
            fake.take(),
            [(3, 0), (4, 0), (5, 0)],
            "the index is reused by a backend without a report"
        );
        *places.0.lock().unwrap() = vec![(id("a"), 3), (id("b"), 4)];
        scores.refresh(&book, 5_500);
        assert_eq!(fake.take(), [(3, 10), (4, 10)]);
        scores.refresh(&book, 60_000);
        assert_eq!(fake.take(), [(3, 0), (4, 0)], "nobody reports: the service goes by what else is known");
    }
}
