//! JSON types of the API. `lbctl -o json` prints them unchanged.

mod status;

pub use status::*;

/// `GET /v1/explain`: what the dataplane does with a flow's packets, and why.
pub use crate::serve::explain::Explanation;
use crate::{
    apply::announce::VipState,
    desired::{
        model::{Backend, Difference, Health, Name, NextHop, Service},
        store::Revision,
    },
    observed::{health, replica},
    printable,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// `GET /v1/replicas`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replicas {
    /// Grows with each change; `after=VERSION` waits for the next change.
    pub version: u64,
    /// Replicas of services that watch replica state.
    pub replicas: Vec<ReplicaInfo>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaInfo {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// Kind of source of the replica's state.
    pub source: String,
    /// Milliseconds since the replica's last valid report; none if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// State of the replica.
    #[serde(flatten)]
    pub state: replica::ReplicaEntry,
}

/// Progress of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Live flows that the flow tables still assign to the backend, at the last count (about a second ago).
    pub flows_left: u64,
    /// Seconds until the drain time is over; 0 afterwards.
    pub deadline_s: u64,
}

/// A counter of the dataplane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonCount {
    /// Name of the reason.
    pub reason: String,
    /// What happened to the packets: `pass`, `drop`, `answer`, or `note` (counted, and forwarded).
    pub fate: String,
    /// Number of packets.
    pub packets: u64,
    /// Meaning of the reason.
    pub about: String,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Kind of entries.
    pub what: String,
    /// Entries in use.
    pub used: u64,
    /// Capacity, in entries.
    pub limit: u64,
}

/// `GET /v1/services/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// Name.
    pub name: Name,
    /// Desired state, including backends.
    pub spec: Service,
    /// Actual state.
    pub status: ServiceStatus,
}

/// Actual state of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Index in the maps; none before it is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// Slots of the service's table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: usize,
    /// Whether health is ignored because too few backends are healthy.
    pub panic: bool,
    /// Slots that remember a previous primary.
    pub transition_slots: u32,
    /// State of the VIP on this host, if lbd announces VIPs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<VipState>,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// New flows placed.
    pub flows: u64,
}

/// `GET /v1/services/NAME/backends/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendInfo {
    /// Service.
    pub service: Name,
    /// Name of the backend.
    pub name: Name,
    /// Desired state.
    pub spec: Backend,
    /// Actual state.
    pub status: BackendStatus,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Actual state of a backend.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Index in the maps; none before it is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// Verdict of the health checks.
    pub health: Health,
    /// Whether nothing checks the backend: no health check, and no replica state. Its verdict is `healthy`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unchecked: bool,
    /// Since when the backend is busy, in milliseconds since 1970 UTC: its verdict is `healthy`, it accepts connections, and
    /// answers its checks late. None if the last answer was in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_since_ms: Option<u64>,
    /// Whether the ejection limit holds the backend in although it fails its checks.
    #[serde(default, skip_serializing_if = "is_false")]
    pub held: bool,
    /// Why packets cannot reach the backend: no route, or no answer to ARP or neighbour discovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
    /// Start of the verdict, in milliseconds since 1970 UTC; 0 if there is no verdict yet.
    pub health_since_ms: u64,
    /// Slots of the service's table that belong to this backend.
    pub slots: u32,
    /// Slots of the service's table.
    pub table_size: u32,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// New flows placed.
    pub flows: u64,
    /// Progress of the drain, if the backend drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// Why packets cannot reach the backend in the service's forwarding mode, and how to fix it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Why the backend must not take flows, whatever its health: residency, or its region drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded: Option<String>,
    /// Next hop to the backend; none if it is not resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<NextHop>,
    /// Name of the interface to the next hop; only when one backend is requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Consecutive successes required to become healthy, if flap damping raised them above `rise`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<u32>,
    /// Progress of slow start, in percent of the backend's weight; none outside slow start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start_percent: Option<u8>,
    /// Why checks cannot be made at present, and since when; the last verdict stands. None if the last check was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_probed: Option<health::NotProbed>,
    /// Latest probe; none before the first probe since start, or if the backend is not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe: Option<health::Probe>,
    /// Passive health check failures since start; none if there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signs: Option<health::PassiveReport>,
    /// State of the replica; none if the service does not watch replicas. History only when one backend is requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<replica::ReplicaEntry>,
    /// Latest changes of the verdict, oldest first; only when one backend is requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<health::Transition>,
}

/// `GET /v1/stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Time of the reading, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Counters of each backend.
    pub backends: Vec<BackendCount>,
    /// Counters of the dataplane.
    pub reasons: Vec<ReasonCount>,
}

/// Counters of one backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendCount {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// New flows placed.
    pub flows: u64,
}

/// `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// Tracked flows, at most the requested number.
    pub flows: Vec<FlowInfo>,
    /// Whether there are more flows.
    pub more: bool,
}

/// A tracked flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowInfo {
    /// Table: `tcp`, `syn` (recent SYN choices), `udp` or `nat`.
    pub table: String,
    /// Client.
    pub client: SocketAddr,
    /// Destination port on the VIP.
    pub port: u16,
    /// Service.
    pub service: String,
    /// Backend.
    pub backend: String,
    /// Age of the flow, in seconds.
    pub age_s: u32,
    /// Time since the flow's last packet, in seconds.
    pub idle_s: u32,
    /// Whether the client has closed the connection.
    pub closing: bool,
}

/// Result of a write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Newest revision after the write (for a dry run: the revision that the change was checked against).
    pub revision: u64,
    /// Whether this was a dry run, so nothing was written.
    pub dry_run: bool,
    /// What changed, or would change.
    pub differences: Vec<Difference>,
    /// What was written to the maps; none if nothing was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<AppliedStatus>,
    /// What the change means beyond what was asked for, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// `GET /v1/history`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Revisions, newest first.
    pub revisions: Vec<Revision>,
    /// With `service`, if older revisions were not searched yet: value of `before` for the next request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// `GET /v1/history/REVISION`: one revision, and what it changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevisionChange {
    /// Number, author, time and message.
    pub revision: Revision,
    /// What the revision changed; null if the revision before is no longer kept.
    pub differences: Option<Vec<Difference>>,
}

/// `GET /v1/history/FROM/diff/TO`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevisionDiff {
    /// Revision that is compared.
    pub from: Revision,
    /// Revision that it is compared with.
    pub to: Revision,
    /// What would change the state of `from` into that of `to`.
    pub differences: Vec<Difference>,
}

/// `GET /v1/config`, and body of `PUT /v1/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Revision of this state; in a request, the revision that the change is based on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// The whole desired state.
    pub desired: crate::desired::model::Desired,
}

/// Body of `POST /v1/rollback`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Revision whose state becomes the newest.
    pub revision: u64,
}

/// Query parameters of every write.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteQuery {
    /// Only report what would change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Refuse the write unless this is the newest revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<u64>,
    /// Message for the history; generated from the change if none.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "printable::message")]
    pub message: Option<String>,
    /// Allow a VIP that is an address of this host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// Body of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorInfo,
}

/// An error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    /// Machine-readable code: `not_found`, `invalid`, `conflict`, `exists`, `forbidden`, `not_applied`, ...
    pub code: String,
    /// Human-readable message: what is wrong, and where.
    pub message: String,
    /// What to do, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// Individual findings, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}
