//! The API's interface to the reconciler and the dataplane: a trait, so that tests serve the API without a
//! kernel.

use super::types::{AppliedStatus, FlowInfo, Interface, Loaded, Room};
use crate::{
    desired::model::{BackendId, Desired, Name, NextHop},
    histogram::Durations,
    serve::explain::{Explanation, Query},
};
use futures_util::future::BoxFuture;
use lb_common::{BackendStats, Reason};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// Why the engine refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The state does not fit the limits of the maps; nothing changed.
    #[error("{what}")]
    Refused {
        /// What does not fit, and what limit would allow it.
        what: String,
    },
    /// Reading or writing the maps failed.
    #[error("{what}")]
    Failed {
        /// Which operation on which map failed, and why.
        what: String,
    },
}

/// The applied state at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Result of the last write to the maps.
    pub applied: AppliedStatus,
    /// State in the maps by service.
    pub services: BTreeMap<Name, AppliedService>,
    /// State in the maps by backend.
    pub backends: BTreeMap<BackendId, AppliedBackend>,
    /// Backends that are no longer desired, kept for their remaining flows.
    pub removed: Vec<Removed>,
    /// How full the maps are.
    pub room: Vec<Room>,
    /// Times from health verdicts to the maps.
    pub verdict_lags: Durations,
    /// Services that could not be brought up to date, and why. They keep their current table and are retried.
    pub problems: BTreeMap<Name, ServiceProblem>,
}

/// Why a service could not be brought up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceProblem {
    /// `no_room` or `not_compiled`.
    pub reason: &'static str,
    /// Human-readable description.
    pub text: String,
}

/// A service in the maps.
#[derive(Clone, Debug, Default)]
pub struct AppliedService {
    /// Index.
    pub index: u32,
    /// Slots of its table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: usize,
    /// Whether health is ignored because too few backends are healthy.
    pub panic: bool,
    /// Slots that remember a previous primary.
    pub transition_slots: u32,
    /// Each region's share of the table, for services with region rules.
    pub regions: Vec<crate::desired::model::Share>,
    /// Whether new flows arrive faster than the flow tables accept them, so that the hash alone places them.
    pub flood: bool,
    /// How often such a flood has begun, summed over all CPUs and tables.
    pub floods: u64,
}

/// A backend in the maps.
#[derive(Clone, Debug, Default)]
pub struct AppliedBackend {
    /// Index.
    pub index: u32,
    /// Slots of the service's table.
    pub slots: u32,
    /// Live flows that the flow tables assign to the backend, at the last count.
    pub tracked_flows: u64,
    /// Percent of the backend's weight in effect during slow start.
    pub slow_start_percent: Option<u8>,
    /// Next hop to the backend.
    pub next_hop: Option<NextHop>,
    /// Whether the next hop is in the maps; otherwise each packet consults the kernel's FIB.
    pub resolved: bool,
    /// Why packets cannot reach the backend: no route, or no answer of the next hop.
    pub unreachable: Option<String>,
    /// Why packets cannot reach the backend.
    pub problem: Option<String>,
    /// Whether the backend can take new flows: healthy, up, and not excluded.
    pub takes_flows: bool,
    /// Whether the ejection limit holds it in although it fails its checks.
    pub held: bool,
    /// Why the backend must not take flows, whatever its health.
    pub excluded: Option<String>,
}

/// A backend that is no longer desired.
#[derive(Clone, Debug)]
pub struct Removed {
    /// Service that the backend belonged to.
    pub service: Name,
    /// Address of the backend; its name may already be reused.
    pub address: IpAddr,
    /// Time since boot after which the backend may be forgotten, once it has no flows.
    pub until: Duration,
    /// Live flows that the flow tables assign to the backend, at the last count.
    pub tracked_flows: u64,
}

/// Counters, summed over CPUs.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// By backend.
    pub backends: BTreeMap<BackendId, BackendStats>,
    /// By service: the sum over its backends, including removed ones.
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

/// Selects the flows to list.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    /// Only flows of this service.
    pub service: Option<Name>,
    /// Only flows to this backend.
    pub backend: Option<Name>,
    /// Largest number of flows to return.
    pub limit: usize,
}

/// Reconciler and dataplane as the API sees them. Methods that read maps block: call them off the async threads.
pub trait Engine: Send + Sync + 'static {
    /// Checks whether a state fits the limits of the maps. Changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Refused`].
    fn check(&self, desired: Arc<Desired>) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Applies a state; returns when the maps are written.
    fn apply(
        &self,
        desired: Arc<Desired>,
        revision: u64,
    ) -> BoxFuture<'_, Result<AppliedStatus, EngineError>>;

    /// Addresses of this host's interfaces, loopback excepted, with the name of the interface.
    fn own_addresses(&self) -> BTreeMap<IpAddr, String> {
        BTreeMap::new()
    }

    /// The applied state. Does not block.
    fn snapshot(&self) -> Arc<Snapshot>;

    /// Resolves after the next change of the snapshot; an engine that cannot tell never does.
    fn changed(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// Interfaces that the program is attached to.
    fn interfaces(&self) -> Vec<Interface>;

    /// Which programs were loaded, and what the kernel supports.
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

    /// Explains where a flow goes, by running the dataplane's code on the live maps. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Failed`].
    fn explain(&self, query: Query) -> Result<Explanation, EngineError>;
}
