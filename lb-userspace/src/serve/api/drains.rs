//! Start time of each backend's drain, read from the history of the desired state, so that a restart does not
//! restart the drain time.

use crate::desired::{
    model::{BackendId, BackendState, Desired},
    store::{Store, Stored},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

/// Revisions that are read after a start; a drain that began earlier counts from the oldest of them.
const HISTORY_LIMIT: u64 = 100;

/// Start of each drain, in milliseconds since 1970 UTC.
#[derive(Debug, Default)]
pub struct Drains {
    since_ms: Mutex<BTreeMap<BackendId, u64>>,
}

fn draining_backends(desired: &Desired) -> BTreeSet<BackendId> {
    let all = desired.services.iter().flat_map(|(service, s)| {
        let draining = s.backends.iter().filter(|(_, b)| b.state == BackendState::Draining);
        draining.map(|(backend, _)| BackendId { service: service.clone(), backend: backend.clone() })
    });
    all.collect()
}

impl Drains {
    /// Updates the start times from a new desired state.
    pub fn update(&self, stored: &Stored) {
        let now = draining_backends(&stored.desired);
        let mut since = self.since_ms.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|id, _| now.contains(id));
        for id in now {
            since.entry(id).or_insert(stored.revision.time_ms);
        }
    }

    /// After a start: finds in the history when the current drains began.
    pub async fn restore(&self, store: &dyn Store) {
        let head = store.head();
        let mut open = draining_backends(&head.desired);
        let mut since: BTreeMap<BackendId, u64> =
            open.iter().map(|id| (id.clone(), head.revision.time_ms)).collect();
        let mut number = head.revision.number;
        while !open.is_empty() && number > 1 && head.revision.number - number < HISTORY_LIMIT {
            number -= 1;
            let Ok(stored) = store.get(number).await else { break };
            let then = draining_backends(&stored.desired);
            open.retain(|id| then.contains(id));
            for id in &open {
                since.insert(id.clone(), stored.revision.time_ms);
            }
        }
        *self.since_ms.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// When a backend's drain began, if it drains.
    pub fn since_ms(&self, id: &BackendId) -> Option<u64> {
        self.since_ms.lock().unwrap_or_else(PoisonError::into_inner).get(id).copied()
    }
}
