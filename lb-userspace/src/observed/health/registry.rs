//! What is known of each backend's health: verdict, last probe, and the latest changes.

use super::PassiveReport;
use crate::desired::model::{BackendId, Health};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{PoisonError, RwLock},
};

/// Changes remembered per backend.
pub const HISTORY: usize = 32;

/// A change of verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Verdict before.
    pub from: Health,
    /// Verdict after.
    pub to: Health,
    /// What the deciding probe said.
    pub reason: String,
}

/// One probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// When it ended, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Whether it succeeded.
    pub ok: bool,
    /// What it said.
    pub reason: String,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// One backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Verdict.
    pub health: Health,
    /// Since when, in milliseconds since 1970 UTC; 0 before the first.
    pub since_ms: u64,
    /// Latest changes, oldest first.
    #[serde(default)]
    pub history: VecDeque<Transition>,
    /// Latest probe; none before the first one since the start.
    #[serde(default)]
    pub last: Option<Probe>,
    /// Probes that succeeded since the start.
    #[serde(default)]
    pub successes: u64,
    /// Probes that failed since the start.
    #[serde(default)]
    pub failures: u64,
    /// Successes in a row that it needs to be healthy again, where it fell so often that they are more than `rise`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<u32>,
    /// Signs that it may be dead, heard since the start.
    #[serde(default, skip)]
    pub heard: PassiveReport,
    /// Address that the verdict is about.
    #[serde(default)]
    pub address: String,
}

/// All backends.
#[derive(Debug, Default)]
pub struct HealthRegistry {
    entries: RwLock<BTreeMap<BackendId, Entry>>,
}

impl HealthRegistry {
    /// What is known of one backend.
    pub fn get(&self, id: &BackendId) -> Option<Entry> {
        self.read(|entries| entries.get(id).cloned())
    }

    /// Looks at all of them at once.
    pub fn read<T>(&self, look: impl FnOnce(&BTreeMap<BackendId, Entry>) -> T) -> T {
        look(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<BackendId, Entry>) -> T) -> T {
        change(&mut self.entries.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Verdicts and their history as bytes, for the next start.
    pub fn save(&self) -> Vec<u8> {
        let all: Vec<(BackendId, Entry)> = self.read(|entries| {
            let settled = entries.iter().filter(|(_, e)| e.health != Health::Unknown);
            settled.map(|(id, e)| (id.clone(), Entry { last: None, damped: None, ..e.clone() })).collect()
        });
        serde_json::to_vec(&all).expect("entries are plain data")
    }

    /// A book with what [`HealthRegistry::save`] wrote.
    ///
    /// # Errors
    /// The bytes are not such.
    pub fn restore(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let mut all: Vec<(BackendId, Entry)> = serde_json::from_slice(bytes)?;
        for (_, entry) in &mut all {
            (entry.successes, entry.failures) = (0, 0);
        }
        Ok(Self { entries: RwLock::new(all.into_iter().collect()) })
    }
}

impl Entry {
    /// Records a change of verdict.
    pub(super) fn turn(&mut self, to: Health, time_ms: u64, reason: String) {
        let from = std::mem::replace(&mut self.health, to);
        self.since_ms = time_ms;
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Transition { time_ms, from, to, reason });
    }
}
