//! Health of each backend: verdict, last probe, and the latest changes.

use super::{Obstacle, ObstacleKind, PassiveReport};
use crate::{
    desired::model::{BackendId, Desired, Health},
    histogram::Durations,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError, RwLock},
    time::Duration,
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
    /// Whether the answer came after the timeout, or has not come yet, although the connection was accepted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
}

/// Why the checks of a backend cannot be made, and since when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotProbed {
    /// Kind of obstacle.
    pub reason: ObstacleKind,
    /// What happened last, in words.
    pub what: String,
    /// Time of the first check that could not be made, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// Checks that could not be made since then.
    pub count: u64,
}

/// What is counted about the probes of all backends, since start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeCounts {
    /// Checks that could not be made, in the order of [`ObstacleKind::ALL`].
    pub not_probed: [u64; ObstacleKind::ALL.len()],
    /// Times from when a probe was due until it began.
    pub lateness: Durations,
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
    /// Probes since start whose answer was late although the connection was accepted.
    #[serde(default)]
    pub late: u64,
    /// Start of the backend's late answers, in milliseconds since 1970 UTC; none if the last answer was in time.
    #[serde(default, skip)]
    pub busy_since_ms: Option<u64>,
    /// Consecutive successes required to become healthy, if flap damping raised them above `rise`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<u32>,
    /// Passive health check failures since start.
    #[serde(default, skip)]
    pub passive: PassiveReport,
    /// Why checks cannot be made at present; none if the last one was made.
    #[serde(default, skip)]
    pub not_probed: Option<NotProbed>,
    /// Address of the worker that the verdict is about.
    #[serde(default)]
    pub address: String,
}

/// Health of all backends.
#[derive(Debug, Default)]
pub struct HealthRegistry {
    entries: RwLock<BTreeMap<BackendId, HealthEntry>>,
    counts: Mutex<ProbeCounts>,
    tunnel_problem: Mutex<Option<String>>,
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

    /// Counters of the probes of all backends.
    pub fn counts(&self) -> ProbeCounts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why probes cannot take the tunnel and go directly; none if they can, or no service wants it.
    pub fn tunnel_problem(&self) -> Option<String> {
        self.tunnel_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets why probes cannot take the tunnel.
    pub(super) fn set_tunnel_problem(&self, problem: Option<String>) {
        *self.tunnel_problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Records how long after its time a probe began.
    pub(super) fn record_lateness(&self, late: Duration) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).lateness.add(late);
    }

    /// Records a check that could not be made: the verdict stands.
    pub(super) fn record_not_probed(&self, id: &BackendId, obstacle: &Obstacle, now_ms: u64) {
        let kind = ObstacleKind::ALL.iter().position(|kind| *kind == obstacle.kind);
        if let Some(kind) = kind {
            self.counts.lock().unwrap_or_else(PoisonError::into_inner).not_probed[kind] += 1;
        }
        self.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                let before = entry.not_probed.take();
                let (since_ms, count) = before.map_or((now_ms, 0), |b| (b.since_ms, b.count));
                entry.not_probed = Some(NotProbed {
                    reason: obstacle.kind,
                    what: obstacle.what.clone(),
                    since_ms,
                    count: count + 1,
                });
            }
        });
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
            (entry.successes, entry.failures, entry.late) = (0, 0, 0);
        }
        Ok(Self { entries: RwLock::new(all.into_iter().collect()), ..Self::default() })
    }
}

impl HealthEntry {
    /// Since when the backend is busy: healthy, with late answers.
    pub fn is_busy(&self) -> Option<u64> {
        self.busy_since_ms.filter(|_| self.health == Health::Healthy)
    }

    /// Whether the verdict is about the worker that has this backend's name in `desired`.
    pub fn is_about(&self, id: &BackendId, desired: &Desired) -> bool {
        let backend = desired.services.get(&id.service).and_then(|s| s.backends.get(&id.backend));
        backend.is_some_and(|b| b.address.to_string() == self.address)
    }

    /// Records a change of verdict.
    pub(super) fn record_transition(&mut self, to: Health, time_ms: u64, reason: String) {
        let from = std::mem::replace(&mut self.health, to);
        self.since_ms = time_ms;
        if to != Health::Healthy {
            self.busy_since_ms = None;
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Transition { time_ms, from, to, reason });
    }
}
