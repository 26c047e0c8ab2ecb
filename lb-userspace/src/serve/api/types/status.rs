//! JSON types of `GET /v1/status`.

use super::{Drain, ReasonCount, Room};
use crate::{
    apply::announce::Announcement,
    desired::{
        model::{BackendId, Name, Readiness},
        store::Revision,
    },
    observed::health::NotProbed,
    serve::api::host::HostDrain,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Whether `problems` is empty.
    pub healthy: bool,
    /// Human-readable problems that need attention.
    pub problems: Vec<String>,
    /// Version of lbd.
    pub version: String,
    /// ABI version of programs and maps.
    pub abi: u32,
    /// Process id.
    pub pid: u32,
    /// Time since lbd started, in seconds.
    pub uptime_s: u64,
    /// The store, and whether this host is connected to it.
    pub store: crate::desired::store::StoreLink,
    /// Newest revision of the desired state.
    pub revision: Revision,
    /// Services in the maps although the store is empty: lbd keeps forwarding for them until `accept` or a first change.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub orphaned_services: usize,
    /// What was last written to the maps.
    pub applied: AppliedStatus,
    /// Interfaces that the program is attached to.
    pub interfaces: Vec<Interface>,
    /// Which programs were loaded, and what the kernel supports.
    #[serde(default)]
    pub loaded: Loaded,
    /// VIPs that this host announces; none if lbd does not announce.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announcement: Option<Announcement>,
    /// The drain of this host, if it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_drain: Option<HostDrain>,
    /// Number of services.
    pub services: usize,
    /// Backends by health and state.
    pub backends: BackendCounts,
    /// Backends that failed their health checks.
    pub unhealthy: Vec<CheckedBackend>,
    /// Backends that accept connections, but answer their checks late; they keep their flows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub busy: Vec<CheckedBackend>,
    /// Backends whose checks this host cannot make: their last verdict stands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_probed: Vec<NotProbedBackend>,
    /// Why health checks go directly although services want them to take the tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checks_without_tunnel: Option<String>,
    /// Backends that are draining.
    pub draining: Vec<DrainingBackend>,
    /// Replicas that do not report to be ready.
    #[serde(default)]
    pub replicas: Vec<NotReady>,
    /// Services without a backend for new flows.
    pub no_backend: Vec<Name>,
    /// Services where health is ignored because too few backends are healthy.
    pub panic: Vec<Name>,
    /// Services whose new flows arrive faster than the flow tables accept them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flood: Vec<Name>,
    /// Backends whose next hop is not resolved: each packet consults the kernel's FIB.
    pub unresolved: Vec<BackendId>,
    /// Backends with a smaller MTU on the path than that of this host's interface, as a router said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub narrow_paths: Vec<NarrowPath>,
    /// Reasons with at least one packet.
    pub reasons: Vec<ReasonCount>,
    /// How full the maps are.
    pub room: Vec<Room>,
    /// Services that could not be brought up to date. They keep their current tables and are retried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_up_to_date: Vec<NotUpToDate>,
}

/// A backend whose path has a smaller MTU than this host's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NarrowPath {
    /// The backend.
    pub backend: BackendId,
    /// Largest IP packet on the path, in bytes.
    pub mtu: u16,
}

impl fmt::Display for NarrowPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.backend, self.mtu)
    }
}

/// A service that could not be brought up to date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotUpToDate {
    /// Service.
    pub service: Name,
    /// `no_room`: the service waits for free slots. `not_compiled`: this host cannot serve it, or only in part.
    pub reason: String,
    /// What is wrong, and how to fix it.
    pub problem: String,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What was last written to the maps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppliedStatus {
    /// Revision of the desired state in the maps.
    pub revision: u64,
    /// Slots that the last write changed.
    pub slots_changed: u64,
    /// Time from the event until the maps were written, in microseconds.
    pub took_us: u64,
    /// Why the newest revision could not be applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Services that are not as desired in the maps yet; the problems say why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<String>,
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name of the interface.
    pub name: String,
    /// Index of the interface.
    pub ifindex: u32,
    /// XDP mode: `driver` or `generic`.
    pub mode: String,
    /// Why the driver does not run the program, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_generic: Option<String>,
    /// What is wrong with the interface although the program is attached: down, no carrier, or renamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Which programs were loaded, and what the kernel supports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Whether the programs accept multi-buffer packets (frags), which large MTUs need.
    pub frags: bool,
    /// Kernel features and whether they work, as probed at start.
    pub kernel: BTreeMap<String, bool>,
    /// Programs that the kernel refused to load; the others run.
    pub left_out: Vec<LeftOut>,
    /// Configured interfaces that are not attached yet; lbd retries them.
    pub waiting: Vec<WaitingInterface>,
    /// Human-readable problems of programs and interfaces.
    #[serde(skip)]
    pub problems: Vec<String>,
}

/// A program that the kernel refused to load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Name of the program.
    pub program: String,
    /// Feature, as in the setting `features`, that this host lacks; the program's name if it belongs to no feature.
    pub feature: String,
    /// Why the kernel refused the program.
    pub reason: String,
}

/// A configured interface that is not attached yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingInterface {
    /// Name of the interface.
    pub name: String,
    /// Why the interface is not attached.
    pub reason: String,
}

/// Backends by health and state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendCounts {
    /// All backends.
    pub total: usize,
    /// Backends that passed their checks.
    pub healthy: usize,
    /// Backends that passed their checks, and answer them late now.
    #[serde(default)]
    pub busy: usize,
    /// Backends that nothing checks: no health check, and no replica state.
    #[serde(default)]
    pub unchecked: usize,
    /// Backends that failed their checks.
    pub unhealthy: usize,
    /// Backends without a verdict yet.
    pub unknown: usize,
    /// Backends that drain.
    pub draining: usize,
    /// Backends that are switched off (state down).
    pub down: usize,
}

/// A backend that failed its health checks, or answers them late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedBackend {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// Result of the last probe.
    pub reason: String,
    /// Start of this state, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// A backend whose checks this host cannot make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotProbedBackend {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// What prevents the checks.
    #[serde(flatten)]
    pub obstacle: NotProbed,
}

/// A draining backend: it gets no new flows while its existing flows end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingBackend {
    /// Service.
    pub service: Name,
    /// Backend; for a removed backend, its address.
    pub backend: String,
    /// Progress of the drain.
    #[serde(flatten)]
    pub drain: Drain,
}

/// A replica that does not report to be ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReady {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// State that the replica reports, or that it does not report.
    pub readiness: Readiness,
    /// Start of this state, in milliseconds since 1970 UTC; 0 if the replica has never reported.
    pub since_ms: u64,
    /// Why the replica is in this state.
    pub reason: String,
    /// Live flows that the flow tables still assign to the replica, at the last count.
    pub flows_left: u64,
}
