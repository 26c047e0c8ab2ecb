//! What the reconciler is told, and why what was asked for is not in the maps.

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
        /// Its revision.
        revision: u64,
        /// Told when it is in the maps, or why not.
        applied: Option<oneshot::Sender<Result<Applied, ReconcileError>>>,
    },
    /// Would this state fit? Changes nothing.
    Check {
        /// The state.
        desired: Arc<Desired>,
        /// Told.
        fits: oneshot::Sender<Result<(), ReconcileError>>,
    },
    /// A backend's verdict.
    Health {
        /// Whose.
        id: BackendId,
        /// The verdict.
        health: Health,
        /// When it was told, on the boot's clock.
        at: Duration,
    },
    /// What a backend's replica says.
    Replica(BackendId, Readiness),
    /// How services are spread over regions and versions, all of them.
    Steers(BTreeMap<Name, Arc<RegionShares>>),
    /// All next hops.
    Paths(Paths),
    /// Interfaces that the program is attached to, all of them: index and name.
    Attached(BTreeMap<u32, String>),
    /// A sweep of the flow tables.
    Swept(Arc<Sweep>),
}

impl From<BTreeMap<Name, Arc<RegionShares>>> for Event {
    fn from(steers: BTreeMap<Name, Arc<RegionShares>>) -> Self {
        Self::Steers(steers)
    }
}

/// Why a state is not in the maps.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// It cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A map could not be written; what was not will be found missing at the next attempt.
    #[error(transparent)]
    Apply(#[from] DataplaneError),
    /// A state that came at the same moment failed, and this one with it.
    #[error("{0}")]
    Together(String),
}
