//! What the reconciler tells the rest: one immutable snapshot per change.

use super::{Problem, mirror::Written, sweep::Sweep};
use crate::{
    desired::model::{BackendId, Desired, Name, Observed},
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
    /// What was written.
    pub written: Written,
    /// From the event's arrival to the last write.
    pub took: Duration,
}

/// Everything that API, metrics and status show of the tables.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Revision that is in the maps.
    pub revision: u64,
    /// That state.
    pub desired: Arc<Desired>,
    /// What it was compiled with.
    pub observed: Arc<Observed>,
    /// Services, by name.
    pub services: BTreeMap<Name, Arc<CompiledService>>,
    /// Tracked live flows by backend index, at the last sweep.
    pub sweep: Arc<Sweep>,
    /// Counters of backends that have gone, by service, so that a service's sums never fall.
    pub retired_stats: BTreeMap<Name, [u64; 3]>,
    /// The last application that wrote something.
    pub applied: Applied,
    /// Services that are not as they are wanted, and why.
    pub problems: BTreeMap<Name, Problem>,
    /// Slots that are not free.
    pub slots_used: u32,
    /// Why the last attempt failed, if it did: the maps then hold an older state.
    pub error: Option<String>,
}

impl Published {
    /// A backend's status.
    pub fn backend(&self, id: &BackendId) -> Option<&CompiledBackend> {
        let service = self.services.get(&id.service)?;
        service.backends.iter().find(|b| b.name.as_ref() == Some(&id.backend))
    }

    /// A hash of all tables: the same on every host that sends new flows to the same backends.
    pub fn table_hash(&self) -> u64 {
        let mut hash = Sha256::new();
        for (name, service) in &self.services {
            hash.update(name.as_str());
            hash.update(service.table_hash.to_be_bytes());
        }
        let digest: [u8; 32] = hash.finalize().into();
        digest[..8].iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))
    }

    /// Live flows of a backend that the flow tables hold.
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

/// Adds up counters.
pub(super) fn add(total: &mut [u64; 3], stats: BackendStats) {
    for (sum, part) in total.iter_mut().zip([stats.packets, stats.bytes, stats.flows]) {
        *sum = sum.wrapping_add(part);
    }
}
