//! State of each replica: the last valid report, its age, and the latest error.

use crate::desired::model::{BackendId, Readiness, Report};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{PoisonError, RwLock},
};
use tokio::sync::watch;

/// Changes of readiness kept per replica.
pub const HISTORY: usize = 32;

/// A change of a replica's readiness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaTransition {
    /// Time of the change, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Readiness before.
    pub from: Readiness,
    /// Readiness after.
    pub to: Readiness,
    /// Why it changed.
    pub reason: String,
}

/// An error of a replica's source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Time of the error, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Description.
    pub what: String,
}

/// State of one replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplicaEntry {
    /// Readiness that the policy uses.
    pub readiness: Readiness,
    /// Start of this readiness, in milliseconds since 1970 UTC; 0 before the first report.
    pub since_ms: u64,
    /// Last valid report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    /// Arrival of the last valid report, in milliseconds since 1970 UTC.
    #[serde(default)]
    pub report_ms: u64,
    /// Load score; see [`crate::plan::policy::load`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<u32>,
    /// Whether a stream is open.
    #[serde(default)]
    pub streaming: bool,
    /// Valid reports since start.
    #[serde(default)]
    pub reports: u64,
    /// Refused reports since start.
    #[serde(default)]
    pub refused: u64,
    /// Broken streams and failed polls since start.
    #[serde(default)]
    pub breaks: u64,
    /// The latest error since the last valid report, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Trouble>,
    /// Latest changes of readiness, oldest first.
    #[serde(default)]
    pub history: VecDeque<ReplicaTransition>,
    /// Address of the worker that this entry is about.
    #[serde(default)]
    pub address: String,
}

impl ReplicaEntry {
    /// Records a readiness; returns whether it has changed.
    pub(super) fn record_readiness(&mut self, to: Readiness, time_ms: u64, reason: &str) -> bool {
        let from = std::mem::replace(&mut self.readiness, to);
        if from == to {
            return false;
        }
        self.since_ms = time_ms;
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(ReplicaTransition { time_ms, from, to, reason: reason.to_owned() });
        true
    }
}

/// State of all replicas, and a version that grows with each change.
#[derive(Debug)]
pub struct ReplicaRegistry {
    entries: RwLock<BTreeMap<BackendId, ReplicaEntry>>,
    changes: watch::Sender<u64>,
}

impl Default for ReplicaRegistry {
    fn default() -> Self {
        Self { entries: RwLock::default(), changes: watch::Sender::new(0) }
    }
}

impl ReplicaRegistry {
    /// State of one replica.
    pub fn get(&self, id: &BackendId) -> Option<ReplicaEntry> {
        self.read(|entries| entries.get(id).cloned())
    }

    /// Reads all entries under the lock.
    pub fn read<T>(&self, read: impl FnOnce(&BTreeMap<BackendId, ReplicaEntry>) -> T) -> T {
        read(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Watches the version, which grows with each change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Changes entries under the lock, and increments the version.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<BackendId, ReplicaEntry>) -> T) -> T {
        let result = change(&mut self.entries.write().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|n| *n += 1);
        result
    }

    /// Changes one entry, if it exists.
    pub(super) fn edit<T>(&self, id: &BackendId, edit: impl FnOnce(&mut ReplicaEntry) -> T) -> Option<T> {
        self.change(|entries| entries.get_mut(id).map(edit))
    }

    /// Serialises the last reports, for the next start.
    pub fn to_bytes(&self) -> Vec<u8> {
        let all: Vec<(BackendId, ReplicaEntry)> = self.read(|entries| {
            let reported = entries.iter().filter(|(_, e)| e.readiness != Readiness::Unknown);
            let kept =
                |e: &ReplicaEntry| ReplicaEntry { trouble: None, score: None, streaming: false, ..e.clone() };
            reported.map(|(id, e)| (id.clone(), kept(e))).collect()
        });
        serde_json::to_vec(&all).expect("entries are plain data")
    }

    /// Creates a registry from the output of [`ReplicaRegistry::to_bytes`].
    ///
    /// # Errors
    /// The bytes are not valid.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut all: Vec<(BackendId, ReplicaEntry)> = serde_json::from_slice(bytes)?;
        for (_, entry) in &mut all {
            (entry.reports, entry.refused, entry.breaks) = (0, 0, 0);
        }
        let entries = RwLock::new(all.into_iter().collect());
        Ok(Self { entries, ..Self::default() })
    }

    /// Last known readiness of each replica, for the reconciler before the first report.
    pub fn readiness(&self) -> BTreeMap<BackendId, Readiness> {
        self.read(|entries| {
            let reported = entries.iter().filter(|(_, e)| e.readiness != Readiness::Unknown);
            reported.map(|(id, e)| (id.clone(), e.readiness)).collect()
        })
    }
}
