//! What the API speaks. `lbctl -o json` prints these as they come.

use super::host::HostDrain;
/// `GET /v1/explain`: what the dataplane does with a flow's packets, and why.
pub use crate::serve::explain::Explanation;
use crate::{
    apply::announce::{Announcement, VipState},
    desired::{
        model::{Backend, BackendId, Difference, Health, Name, NextHop, Readiness, Service},
        store::Revision,
    },
    observed::{health, replica},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr};

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Whether all is as it should be: no entry in `problems`.
    pub healthy: bool,
    /// What is not as it should be, for people.
    pub problems: Vec<String>,
    /// Version of lbd.
    pub version: String,
    /// ABI version of programs and maps.
    pub abi: u32,
    /// Process id.
    pub pid: u32,
    /// Time since start, in seconds.
    pub uptime_s: u64,
    /// The store, and whether this host is connected to it.
    pub store: crate::desired::store::Link,
    /// Newest revision of the desired state.
    pub revision: Revision,
    /// Services that the maps hold although the store is empty: forwarded as before until somebody says what is to be.
    #[serde(default, skip_serializing_if = "is_none")]
    pub orphaned_services: usize,
    /// What was last written to the maps.
    pub applied: Applied,
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// The programs as the kernel took them.
    #[serde(default)]
    pub loaded: Loaded,
    /// VIPs that this host announces; none if it never does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announcement: Option<Announcement>,
    /// The drain of this host, if it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_drain: Option<HostDrain>,
    /// Services.
    pub services: usize,
    /// Backends by health and state.
    pub backends: BackendCounts,
    /// Backends that failed their checks.
    pub unhealthy: Vec<Unhealthy>,
    /// Backends that are draining.
    pub draining: Vec<DrainingBackend>,
    /// Replicas that do not say that they serve.
    #[serde(default)]
    pub replicas: Vec<NotReady>,
    /// Services that no new flow can get through.
    pub no_backend: Vec<Name>,
    /// Services where health is ignored, since too few backends are healthy.
    pub panic: Vec<Name>,
    /// Services whose new flows come faster than the flow tables take them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flood: Vec<Name>,
    /// Backends whose next hop is not resolved (the kernel's FIB is asked per packet).
    pub unresolved: Vec<BackendId>,
    /// Reasons that were counted at least once.
    pub reasons: Vec<ReasonCount>,
    /// Room in the maps.
    pub room: Vec<Room>,
    /// Services that could not be brought up to date. They keep their tables, and are tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_up_to_date: Vec<NotUpToDate>,
}

/// A service that could not be brought up to date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotUpToDate {
    /// Service.
    pub service: Name,
    /// `no_room`: it waits for slots. `not_compiled`: this host cannot have it, or not all of it.
    pub reason: String,
    /// What is missing, and what would help.
    pub problem: String,
}

fn is_none(count: &usize) -> bool {
    *count == 0
}

/// What was last written to the maps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// Revision that the maps show.
    pub revision: u64,
    /// Slots that the last write changed.
    pub slots_changed: u64,
    /// From the event to maps written, in microseconds.
    pub took_us: u64,
    /// Why the newest revision is not applied, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Index.
    pub ifindex: u32,
    /// XDP mode: `driver` or `generic`.
    pub mode: String,
    /// Why the driver does not run the program, if lbd knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_generic: Option<String>,
}

/// The programs as the kernel took them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Whether they see packets whose data lies in several pieces (frags), as large MTUs need it.
    pub frags: bool,
    /// What the kernel can do, as it was tried at the start.
    pub kernel: BTreeMap<String, bool>,
    /// Programs that the kernel refused; the rest runs.
    pub left_out: Vec<LeftOut>,
    /// Interfaces that are wanted and not attached yet; they are tried again.
    pub waiting: Vec<WaitingInterface>,
    /// What is wrong with them, for people.
    #[serde(skip)]
    pub problems: Vec<String>,
}

/// A program that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The program.
    pub program: String,
    /// Feature, as in the setting `features`, that this host does without; the program's name if there is none.
    pub feature: String,
    /// Why.
    pub reason: String,
}

/// An interface that is wanted and not attached yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingInterface {
    /// Name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Backends by health and state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendCounts {
    /// All.
    pub total: usize,
    /// Passed their checks, or have none.
    pub healthy: usize,
    /// Failed them.
    pub unhealthy: usize,
    /// No verdict yet.
    pub unknown: usize,
    /// Draining.
    pub draining: usize,
    /// Switched off.
    pub down: usize,
}

/// A backend that failed its checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unhealthy {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// What the last probe said.
    pub reason: String,
    /// Since when, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// A backend that takes no new flows while its old ones end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingBackend {
    /// Service.
    pub service: Name,
    /// Backend; of one that was removed, its address.
    pub backend: String,
    /// Its progress.
    #[serde(flatten)]
    pub drain: Drain,
}

/// A replica that does not say that it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotReady {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// What it says, or that it cannot be heard.
    pub readiness: Readiness,
    /// Since when, in milliseconds since 1970 UTC; 0 if never heard.
    pub since_ms: u64,
    /// Why.
    pub reason: String,
    /// Live flows that the flow tables still send there, at the last count.
    pub flows_left: u64,
}

/// `GET /v1/replicas`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replicas {
    /// Grows with each change; `after=VERSION` waits for the next.
    pub version: u64,
    /// Replicas of services that ask for their state.
    pub replicas: Vec<ReplicaInfo>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaInfo {
    /// Service.
    pub service: Name,
    /// Backend.
    pub backend: Name,
    /// Where its state comes from.
    pub source: String,
    /// Milliseconds since its last good report; none if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// What is known of it.
    #[serde(flatten)]
    pub state: replica::Entry,
}

/// Progress of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Live flows that the flow tables still send there, at the last count (a second ago or so).
    pub flows_left: u64,
    /// Seconds until the drain time is over; 0 when it is.
    pub deadline_s: u64,
}

/// A counter of the dataplane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonCount {
    /// Name.
    pub reason: String,
    /// What became of the packets: `pass`, `drop`, `answer`, or `note` (forwarded all the same).
    pub fate: String,
    /// Packets.
    pub packets: u64,
    /// What it means.
    pub about: String,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Of what.
    pub what: String,
    /// Entries in use.
    pub used: u64,
    /// Entries there is room for.
    pub limit: u64,
}

/// `GET /v1/services/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// Name.
    pub name: Name,
    /// What is desired, backends included.
    pub spec: Service,
    /// What is.
    pub status: ServiceStatus,
}

/// What a service is like now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Index in the maps; none before it is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// Slots of its table.
    pub table_size: u32,
    /// Backends that take new flows.
    pub eligible: usize,
    /// Whether health is ignored, since too few backends are healthy.
    pub panic: bool,
    /// Slots that remember a previous primary.
    pub transition_slots: u32,
    /// Its VIP on this host, where VIPs are announced.
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
    /// Name.
    pub name: Name,
    /// What is desired.
    pub spec: Backend,
    /// What is.
    pub status: BackendStatus,
}

/// What a backend is like now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Index in the maps; none before it is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// Verdict.
    pub health: Health,
    /// Since when, in milliseconds since 1970 UTC; 0 if there is none yet.
    pub health_since_ms: u64,
    /// Slots of the service's table that are its own.
    pub slots: u32,
    /// Slots of that table.
    pub table_size: u32,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// New flows placed.
    pub flows: u64,
    /// Progress of its drain, if it is draining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// Why packets cannot get there in the service's forwarding mode, and what would help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Why it may take no flow, whatever its health: residency, or its region drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded: Option<String>,
    /// How packets get there; none if it is not resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<NextHop>,
    /// Successes in a row that it needs to be healthy again, where that is more than `rise` because it flaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damped: Option<u32>,
    /// How far its slow start is, in percent of its weight; none if it is not starting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start_percent: Option<u8>,
    /// Latest probe; none if there was none since the start, or it is not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe: Option<health::Probe>,
    /// Signs that it may be dead, heard since the start; none if there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signs: Option<health::PassiveReport>,
    /// What its replica says; none if the service does not ask. History only where one backend is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<replica::Entry>,
    /// Latest changes of its verdict, oldest first; only where one backend is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<health::Transition>,
}

/// `GET /v1/stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// When, in milliseconds since 1970 UTC.
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
    /// Tracked flows, at most as many as asked for.
    pub flows: Vec<FlowInfo>,
    /// Whether there are more.
    pub more: bool,
}

/// A tracked flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowInfo {
    /// Table: `tcp`, `syn` (recent SYN choices), `udp` or `nat`.
    pub table: String,
    /// Client.
    pub client: SocketAddr,
    /// Port of the VIP that it came for.
    pub port: u16,
    /// Service.
    pub service: String,
    /// Backend.
    pub backend: String,
    /// Age, in seconds.
    pub age_s: u32,
    /// Time since its last packet, in seconds.
    pub idle_s: u32,
    /// Whether its client has closed it.
    pub closing: bool,
}

/// What a write changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Newest revision now (of a dry run: the one it was checked against).
    pub revision: u64,
    /// Whether nothing was written because it was only tried.
    pub dry_run: bool,
    /// What changed, or would.
    pub differences: Vec<Difference>,
    /// What was written to the maps; none if nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<Applied>,
}

/// `GET /v1/history`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Revisions, newest first.
    pub revisions: Vec<Revision>,
}

/// `GET /v1/config`, and body of `PUT /v1/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Revision that it is, or that the change started from.
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

/// Query of every write.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteQuery {
    /// Only say what would change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Refuse if the newest revision is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<u64>,
    /// What the change is for; made from the change if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
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
    /// For programs: `not_found`, `invalid`, `conflict`, `exists`, `forbidden`, `not_applied`, ...
    pub code: String,
    /// For people: what is wrong, and where.
    pub message: String,
    /// What to do, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// Single findings, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}
