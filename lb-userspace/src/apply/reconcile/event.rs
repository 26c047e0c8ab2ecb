//! Input of the reconciler, and the errors that keep a desired state out of the maps.

use super::{Applied, Sweep};
use crate::{
    apply::dataplane::DataplaneError,
    desired::model::{BackendId, Desired, Health, Name, Paths, Readiness, RegionShares},
    plan::compile::CompileError,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::oneshot;

/// Something that may change the maps.
#[derive(Debug)]
pub enum Event {
    /// A new desired state.
    Desired {
        /// The state.
        desired: Arc<Desired>,
        /// Revision of the state.
        revision: u64,
        /// Receives the result once the state is in the maps, or an error.
        applied: Option<oneshot::Sender<Result<Applied, ReconcileError>>>,
    },
    /// Checks whether a state would fit, without changing anything.
    Check {
        /// The state.
        desired: Arc<Desired>,
        /// Receives the result.
        fits: oneshot::Sender<Result<(), ReconcileError>>,
    },
    /// Health of a backend.
    Health {
        /// The backend.
        id: BackendId,
        /// Its health; [`Health::Unknown`] removes the verdict.
        health: Health,
        /// Time of the verdict, by the clock since boot.
        at: Duration,
    },
    /// Readiness that a backend's replica reports.
    Replica(BackendId, Readiness),
    /// Shares of regions and versions, for all services.
    Steers(BTreeMap<Name, Arc<RegionShares>>),
    /// Next hops of all backends.
    Paths(Paths),
    /// All interfaces that the program is attached to, index and name, after it was attached or detached.
    Attached(BTreeMap<u32, String>),
    /// Result of a sweep of the flow tables.
    Swept(Arc<Sweep>),
}

impl From<BTreeMap<Name, Arc<RegionShares>>> for Event {
    fn from(steers: BTreeMap<Name, Arc<RegionShares>>) -> Self {
        Self::Steers(steers)
    }
}

/// Sets what is observed of a backend, or removes it if it is the default: nothing; true if that is a change.
pub(super) fn set_or_remove<T: Default + PartialEq>(
    all: &mut BTreeMap<BackendId, T>,
    id: BackendId,
    value: T,
) -> bool {
    if value == T::default() {
        return all.remove(&id).is_some();
    }
    let is_changed = all.get(&id) != Some(&value);
    all.insert(id, value);
    is_changed
}

/// Why a state is not in the maps.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The state cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A map could not be written; the next attempt writes the missing part.
    #[error(transparent)]
    Apply(#[from] DataplaneError),
    /// Another state of the same batch of events failed, and this one with it.
    #[error("{0}")]
    Together(String),
}
