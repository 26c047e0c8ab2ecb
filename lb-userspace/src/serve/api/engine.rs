//! What the API needs of the reconciler and the dataplane, as a trait, so that it is served and tested
//! the same over live maps and over none.

use super::types::{Applied, FlowInfo, Interface, Loaded, Room};
use crate::{
    apply::reconcile::Lags,
    desired::model::{BackendId, Desired, Name, NextHop},
    serve::explain::{Explanation, Query},
};
use futures_util::future::BoxFuture;
use lb_common::{BackendStats, Reason};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// Why the engine refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The state cannot be had with these limits; nothing changed.
    #[error("{what}")]
    Refused {
        /// What does not fit, and what would.
        what: String,
    },
    /// Reading or writing the maps failed.
    #[error("{what}")]
    Failed {
        /// What was done, to what, and why it failed.
        what: String,
    },
}

/// What is applied, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Last write.
    pub applied: Applied,
    /// By service.
    pub services: BTreeMap<Name, ServiceState>,
    /// By backend.
    pub backends: BTreeMap<BackendId, BackendState>,
    /// Backends that are no longer desired, and are kept for the flows that still go there.
    pub removed: Vec<Removed>,
    /// How full the maps are.
    pub room: Vec<Room>,
    /// How long verdicts took to the maps.
    pub verdict_lags: Lags,
    /// Services that are not as they are wanted, and why. They keep the table that they have, and are tried again.
    pub problems: BTreeMap<Name, Problem>,
}

/// Why a service is not as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `no_room` or `not_compiled`.
    pub reason: &'static str,
    /// For people.
    pub text: String,
}

/// A service in the maps.
#[derive(Clone, Debug, Default)]
pub struct ServiceState {
    /// Index.
    pub index: u32,
    /// Slots of its table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: usize,
    /// Whether the panic rule holds.
    pub panic: bool,
    /// Slots that remember a previous primary.
    pub transition_slots: u32,
    /// What the table gives to each region, where that makes a difference.
    pub regions: Vec<crate::desired::model::Share>,
    /// Whether new flows come faster than the flow tables take them, so that they are placed by hash alone.
    pub flood: bool,
    /// How often that has begun, over all processors and tables.
    pub floods: u64,
}

/// A backend in the maps.
#[derive(Clone, Debug, Default)]
pub struct BackendState {
    /// Index.
    pub index: u32,
    /// Slots of the service's table.
    pub slots: u32,
    /// Live flows that the flow tables send there, at the last count.
    pub tracked_flows: u64,
    /// Percent of its weight that its slow start gives it, while it starts.
    pub slow_start_percent: Option<u8>,
    /// How packets get there.
    pub next_hop: Option<NextHop>,
    /// The way is in the maps; otherwise the kernel's routes are asked for each packet.
    pub resolved: bool,
    /// Why packets cannot get there.
    pub problem: Option<String>,
    /// Whether it would take new flows: healthy, up, and allowed to.
    pub takes_flows: bool,
    /// Why it may take no flow, whatever its health.
    pub excluded: Option<String>,
}

/// A backend that is no longer desired.
#[derive(Clone, Debug)]
pub struct Removed {
    /// Its service.
    pub service: Name,
    /// Its address; its name is free for another.
    pub address: IpAddr,
    /// Clock since boot from which it may be forgotten, once no flow goes there.
    pub until: Duration,
    /// Live flows that the flow tables send there, at the last count.
    pub tracked_flows: u64,
}

/// Counters, summed over CPUs.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// By backend.
    pub backends: BTreeMap<BackendId, BackendStats>,
    /// By service: its backends', and what went to backends that are gone.
    pub services: BTreeMap<Name, BackendStats>,
    /// By reason, in the order of [`Reason::ALL`].
    pub reasons: Vec<u64>,
}

impl Counters {
    /// Packets counted for one reason.
    pub fn reason(&self, reason: Reason) -> u64 {
        self.reasons.get(reason as usize).copied().unwrap_or(0)
    }
}

/// Which flows are asked for.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    /// Of this service.
    pub service: Option<Name>,
    /// To this backend.
    pub backend: Option<Name>,
    /// At most so many.
    pub limit: usize,
}

/// Reconciler and dataplane as the API sees them. What reads maps blocks, and is called off the async threads.
pub trait Engine: Send + Sync + 'static {
    /// Whether this state can be had with the limits of the maps. Changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Refused`].
    fn check(&self, desired: Arc<Desired>) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Has this state applied; returns when the maps are written.
    fn apply(&self, desired: Arc<Desired>, revision: u64) -> BoxFuture<'_, Result<Applied, EngineError>>;

    /// What is applied. Does not block.
    fn snapshot(&self) -> Arc<Snapshot>;

    /// Interfaces that the program is attached to.
    fn interfaces(&self) -> Vec<Interface>;

    /// The programs as the kernel took them.
    fn loaded(&self) -> Loaded {
        Loaded::default()
    }

    /// Reads all counters. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Failed`].
    fn counters(&self) -> Result<Counters, EngineError>;

    /// Reads tracked flows, and whether there are more than the limit. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Failed`].
    fn flows(&self, filter: &FlowFilter) -> Result<(Vec<FlowInfo>, bool), EngineError>;

    /// What becomes of a packet, by the dataplane's own code on the live maps. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Failed`].
    fn explain(&self, query: Query) -> Result<Explanation, EngineError>;
}
