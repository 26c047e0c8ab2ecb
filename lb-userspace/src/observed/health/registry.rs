//! Health of each backend: verdict, last probe, and the latest changes.

use super::PassiveReport;
use crate::desired::model::{BackendId, Health};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{PoisonError, RwLock},
};

/// Changes of the verdict kept per backend.
pub const HISTORY: usize = 32;

/// A change of a backend's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Time of the change, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Verdict before.
    pub from: Health,
    /// Verdict after.
    pub to: Health,
    /// Result of the deciding probe.
    pub reason: String,
}

/// Result of one probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// End of the probe, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Whether the probe succeeded.
    pub ok: bool,
    /// Result in words.
    pub reason: String,
    /// Duration of the probe, in microseconds.
    pub took_us: u64,
}

/// Health of one backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthEntry {
    /// Verdict.
    pub health: Health,
    /// Start of the verdict, in milliseconds since 1970 UTC; 0 before the first verdict.
    pub since_ms: u64,
    /// Latest changes of the verdict, oldest first.
    #[serde(default)]
    pub history: VecDeque<Transition>,
    /// Latest probe; none before the first probe since start.
    #[serde(default)]
    pub last: Option<Probe>,
    /// Successful probes since start.
    #[serde(default)]
    pub successes: u64,
    /// Failed probes since start.
    #[serde(default)]
    pub failures: u64,
    /// Consecutive successes required to become healthy, if flap damping raised them above `rise`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<u32>,
    /// Passive health check failures since start.
    #[serde(default, skip)]
    pub passive: PassiveReport,
    /// Address of the worker that the verdict is about.
    #[serde(default)]
    pub address: String,
}

/// Health of all backends.
#[derive(Debug, Default)]
pub struct HealthRegistry {
    entries: RwLock<BTreeMap<BackendId, HealthEntry>>,
}

impl HealthRegistry {
    /// Health of one backend.
    pub fn get(&self, id: &BackendId) -> Option<HealthEntry> {
        self.read(|entries| entries.get(id).cloned())
    }

    /// Reads all entries under the lock.
    pub fn read<T>(&self, read: impl FnOnce(&BTreeMap<BackendId, HealthEntry>) -> T) -> T {
        read(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<BackendId, HealthEntry>) -> T) -> T {
        change(&mut self.entries.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serialises verdicts and their history, for the next start.
    pub fn to_bytes(&self) -> Vec<u8> {
        let all: Vec<(BackendId, HealthEntry)> = self.read(|entries| {
            let settled = entries.iter().filter(|(_, e)| e.health != Health::Unknown);
            settled
                .map(|(id, e)| (id.clone(), HealthEntry { last: None, damped: None, ..e.clone() }))
                .collect()
        });
        serde_json::to_vec(&all).expect("entries are plain data")
    }

    /// Creates a registry from the output of [`HealthRegistry::to_bytes`].
    ///
    /// # Errors
    /// The bytes are not valid.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut all: Vec<(BackendId, HealthEntry)> = serde_json::from_slice(bytes)?;
        for (_, entry) in &mut all {
            (entry.successes, entry.failures) = (0, 0);
        }
        Ok(Self { entries: RwLock::new(all.into_iter().collect()) })
    }
}

impl HealthEntry {
    /// Records a change of verdict.
    pub(super) fn record_transition(&mut self, to: Health, time_ms: u64, reason: String) {
        let from = std::mem::replace(&mut self.health, to);
        self.since_ms = time_ms;
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Transition { time_ms, from, to, reason });
    }
}
