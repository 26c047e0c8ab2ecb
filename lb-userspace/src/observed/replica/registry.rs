//! What is known of each replica: its last good report, how old that is, and what went wrong.

use crate::desired::model::{BackendId, Readiness, Report};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{PoisonError, RwLock},
};
use tokio::sync::watch;

/// Changes of readiness remembered per replica.
pub const HISTORY: usize = 32;

/// A change of readiness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaTransition {
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Before.
    pub from: Readiness,
    /// After.
    pub to: Readiness,
    /// Why.
    pub reason: String,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// What.
    pub what: String,
}

/// One replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What the policy goes by.
    pub readiness: Readiness,
    /// Since when, in milliseconds since 1970 UTC; 0 before the first.
    pub since_ms: u64,
    /// Last good report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    /// When it came, in milliseconds since 1970 UTC.
    #[serde(default)]
    pub report_ms: u64,
    /// Its load score; see [`crate::plan::policy::load`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<u32>,
    /// A stream is open.
    #[serde(default)]
    pub streaming: bool,
    /// Good reports since the start.
    #[serde(default)]
    pub reports: u64,
    /// Reports that were not believed, since the start.
    #[serde(default)]
    pub refused: u64,
    /// Streams that broke and looks that failed, since the start.
    #[serde(default)]
    pub breaks: u64,
    /// The latest trouble, if there was any since the last good report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Trouble>,
    /// Latest changes of readiness, oldest first.
    #[serde(default)]
    pub history: VecDeque<ReplicaTransition>,
    /// Address that all this is about.
    #[serde(default)]
    pub address: String,
}

impl Entry {
    /// Records a change of readiness; false if it is none.
    pub(super) fn turn(&mut self, to: Readiness, time_ms: u64, reason: &str) -> bool {
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

/// All replicas, and a number that grows with each change.
#[derive(Debug)]
pub struct ReplicaRegistry {
    entries: RwLock<BTreeMap<BackendId, Entry>>,
    changes: watch::Sender<u64>,
}

impl Default for ReplicaRegistry {
    fn default() -> Self {
        Self { entries: RwLock::default(), changes: watch::Sender::new(0) }
    }
}

impl ReplicaRegistry {
    /// What is known of one replica.
    pub fn get(&self, id: &BackendId) -> Option<Entry> {
        self.read(|entries| entries.get(id).cloned())
    }

    /// Looks at all of them at once.
    pub fn read<T>(&self, look: impl FnOnce(&BTreeMap<BackendId, Entry>) -> T) -> T {
        look(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The number of changes so far, watched.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Changes them.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<BackendId, Entry>) -> T) -> T {
        let result = change(&mut self.entries.write().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|n| *n += 1);
        result
    }

    /// Changes one, if it is there.
    pub(super) fn edit<T>(&self, id: &BackendId, edit: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.change(|entries| entries.get_mut(id).map(edit))
    }

    /// What the replicas last said as bytes, for the next start.
    pub fn save(&self) -> Vec<u8> {
        let all: Vec<(BackendId, Entry)> = self.read(|entries| {
            let heard = entries.iter().filter(|(_, e)| e.readiness != Readiness::Unknown);
            let kept = |e: &Entry| Entry { trouble: None, score: None, streaming: false, ..e.clone() };
            heard.map(|(id, e)| (id.clone(), kept(e))).collect()
        });
        serde_json::to_vec(&all).expect("entries are plain data")
    }

    /// A book with what [`ReplicaRegistry::save`] wrote.
    ///
    /// # Errors
    /// The bytes are not such.
    pub fn restore(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut all: Vec<(BackendId, Entry)> = serde_json::from_slice(bytes)?;
        for (_, entry) in &mut all {
            (entry.reports, entry.refused, entry.breaks) = (0, 0, 0);
        }
        let entries = RwLock::new(all.into_iter().collect());
        Ok(Self { entries, ..Self::default() })
    }

    /// What each replica last said, for the reconciler before the first report.
    pub fn readiness(&self) -> BTreeMap<BackendId, Readiness> {
        self.read(|entries| {
            let heard = entries.iter().filter(|(_, e)| e.readiness != Readiness::Unknown);
            heard.map(|(id, e)| (id.clone(), e.readiness)).collect()
        })
    }
}
