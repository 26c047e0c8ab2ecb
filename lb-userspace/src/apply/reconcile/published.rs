//! Output of the reconciler: one immutable snapshot per change.

use super::{Problem, mirror::Written, sweep::Sweep};
use crate::{
    desired::model::{BackendId, Desired, Name, Observed},
    histogram::Durations,
    observed::replica::BackendIndices,
    plan::compile::{CompiledBackend, CompiledService},
};
use lb_common::BackendStats;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::watch;

/// One application of a change to the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Revision of the desired state that is in the maps.
    pub revision: u64,
    /// Numbers of entries written.
    pub written: Written,
    /// Time from the arrival of the event to the last write.
    pub took: Duration,
    /// Services that are not as desired in the maps yet.
    #[serde(default)]
    pub waiting: Vec<Name>,
}

/// Data of the tables for API, metrics and status.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Revision of the desired state that is in the maps.
    pub revision: u64,
    /// Desired state of that revision.
    pub desired: Arc<Desired>,
    /// Observations that it was compiled with.
    pub observed: Arc<Observed>,
    /// Services, by name.
    pub services: BTreeMap<Name, Arc<CompiledService>>,
    /// Result of the last sweep, with tracked live flows by backend index.
    pub sweep: Arc<Sweep>,
    /// Counters of removed backends, by service, so that a service's sums never decrease.
    pub retired_stats: BTreeMap<Name, [u64; 3]>,
    /// The last application that wrote something.
    pub applied: Applied,
    /// Services that differ from the desired state, and why.
    pub problems: BTreeMap<Name, Problem>,
    /// Times from verdicts to the maps since lbd started.
    pub verdict_lags: Durations,
    /// Number of slots that are not free.
    pub slots_used: u32,
    /// Error of the last attempt, if it failed: the maps then hold an older state.
    pub error: Option<String>,
}

impl Published {
    /// Status of a backend.
    pub fn backend(&self, id: &BackendId) -> Option<&CompiledBackend> {
        let service = self.services.get(&id.service)?;
        service.backends.iter().find(|b| b.name.as_ref() == Some(&id.backend))
    }

    /// Hash of all tables: equal on hosts that send new flows to the same backends.
    pub fn table_hash(&self) -> u64 {
        let mut hash = Sha256::new();
        for (name, service) in &self.services {
            hash.update(name.as_str());
            hash.update(service.table_hash.to_be_bytes());
        }
        let digest: [u8; 32] = hash.finalize().into();
        digest[..8].iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))
    }

    /// Number of live flows of a backend in the flow tables.
    pub fn tracked_flows(&self, index: u32) -> u64 {
        self.sweep.flows.get(&index).copied().unwrap_or(0)
    }
}

impl BackendIndices for watch::Receiver<Arc<Published>> {
    fn index(&self, id: &BackendId) -> Option<u32> {
        self.borrow().backend(id).map(|b| b.index)
    }

    fn all(&self) -> Vec<(BackendId, u32)> {
        let published = self.borrow().clone();
        let of = |(name, s): (&Name, &Arc<CompiledService>)| {
            let name = name.clone();
            let named = s.backends.iter().filter_map(|b| Some((b.name.clone()?, b.index)));
            named
                .map(|(backend, index)| (BackendId { service: name.clone(), backend }, index))
                .collect::<Vec<_>>()
        };
        published.services.iter().flat_map(of).collect()
    }

    fn desired(&self) -> Arc<Desired> {
        self.borrow().desired.clone()
    }
}

/// Adds a backend's counters to sums.
pub(super) fn add(total: &mut [u64; 3], stats: BackendStats) {
    for (sum, part) in total.iter_mut().zip([stats.packets, stats.bytes, stats.flows]) {
        *sum = sum.wrapping_add(part);
    }
}
