//! Services and backends, as the operator wants them.

use super::{
    Guard, HealthCheck, Name, Ports, Protocol, QuicConfig, Rate, Region, RegionRules, ReplicaSource, Rollout,
    ServerId,
};
use lb_common::settings::features;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// The complete desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// Services by name. Revisions share them: a change of one among thousands copies and compares only that one.
    #[serde(default)]
    pub services: BTreeMap<Name, Arc<Service>>,
    /// Regions by name. Once one is declared, every region that is used must be.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub regions: BTreeMap<Name, Region>,
    /// Deny and allow lists.
    #[serde(default, skip_serializing_if = "Guard::is_empty")]
    pub guard: Guard,
}

impl Desired {
    /// Returns a service to change; it is copied first if another revision shares it.
    pub fn service_mut(&mut self, name: &Name) -> Option<&mut Service> {
        self.services.get_mut(name).map(Arc::make_mut)
    }

    /// Adopts from `old` what operations created and files usually omit: regions, if this state has none,
    /// running roll-outs, and the deny and allow lists.
    pub fn keep_operations(&mut self, old: &Self) {
        let Self { services, regions, guard } = self;
        if regions.is_empty() {
            regions.clone_from(&old.regions);
        }
        for (name, service) in services {
            let rollout = old.services.get(name).and_then(|s| s.rollout.as_ref());
            if service.rollout.is_none() && service.replica.is_some() && rollout.is_some() {
                Arc::make_mut(service).rollout = rollout.cloned();
            }
        }
        guard.clone_from(&old.guard);
    }

    /// Features in use that the dataplane loads on demand, see [`lb_common::settings::features`].
    pub fn features(&self) -> u32 {
        let is_limited = self.services.values().any(|s| s.limits().flags != 0);
        (if self.guard.is_empty() { 0 } else { features::GUARD })
            | if is_limited { features::RATE } else { 0 }
    }

    /// Shares the services that equal those of `old`.
    pub fn share(&mut self, old: &Self) {
        for (name, service) in &mut self.services {
            if let Some(same) = old.services.get(name).filter(|old| *old == service) {
                service.clone_from(same);
            }
        }
        self.guard.share(&old.guard);
    }
}

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// Consistent hashing: the slot's primary.
    #[default]
    Maglev,
    /// The less loaded of two: the slot's primary and its second choice.
    P2c,
    /// Round robin.
    Rr,
    /// Weighted round robin.
    Wrr,
    /// At random, weighted.
    Random,
    /// The least loaded backend for its weight: by replica reports if there are any, else by live flows.
    Lc,
    /// By the client's address alone: a client stays with one backend, up to `load_cap`.
    SourceHash,
}

impl Scheduler {
    /// Whether a flow is on one of its slot's pair, so that an ingress host without an entry for it can find it there.
    pub fn is_by_pair(self) -> bool {
        matches!(self, Self::Maglev | Self::P2c | Self::SourceHash)
    }
}

/// How packets reach the backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardingMode {
    /// IP in IP.
    #[default]
    Ipip,
    /// Generic UDP encapsulation.
    Gue,
    /// Rewrite of the destination MAC address only: workers on the same segment, with the VIP on `lo`.
    L2,
    /// Full address translation: workers need no software, and answers come back through this host.
    Nat,
    /// This host's own stack, which has the VIP.
    Local,
}

/// What happens to established flows of a backend that is found down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// They stay: the health check may be wrong, and live connections are not cut.
    #[default]
    Keep,
    /// They move to another backend, whose reset tells the client at once.
    Reset,
}

/// What happens to a service's VIP when no backend takes new flows and no other host serves the VIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", try_from = "String")]
pub enum WhenAllDown {
    /// It stays announced for established flows: for the drain time, and while flows remain.
    #[default]
    Keep,
    /// It is withdrawn at once.
    Withdraw,
    /// It stays announced until another host serves it, and packets without a backend are answered: TCP with a reset, UDP
    /// with ICMP port unreachable.
    Reset,
}

impl TryFrom<String> for WhenAllDown {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "keep" => Ok(Self::Keep),
            "withdraw" => Ok(Self::Withdraw),
            "reset" => Ok(Self::Reset),
            _ => Err(format!("when_all_down is keep, withdraw or reset, not {text:?}")),
        }
    }
}

fn is_keep(when: &WhenAllDown) -> bool {
    *when == WhenAllDown::Keep
}

/// A backend's administrative state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendState {
    /// Takes flows.
    #[default]
    Up,
    /// No new flows; established ones stay.
    Draining,
    /// Switched off.
    Down,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Address that clients connect to.
    pub vip: IpAddr,
    /// Ports.
    pub port: Ports,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Forwarding mode.
    #[serde(default)]
    pub mode: ForwardingMode,
    /// Scheduler.
    #[serde(default)]
    pub scheduler: Scheduler,
    /// With `source-hash`: when a backend has more load than this many flows of a backend of mean weight, a new flow goes to
    /// the slot's second choice if that has less load; no limit if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_cap: Option<u32>,
    /// With `gue`: packets carry the other backends that may have their flow, and a worker without the flow sends the packet
    /// on. Default: on for TCP, off for UDP, whose services must use connected sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_chance: Option<bool>,
    /// Slots of the Maglev table (a prime of `limits::TABLE_SIZES`); by the number of backends if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_size: Option<u32>,
    /// Seed of the flow hash and the tables; derived from VIP, port and protocol if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How long a changed slot remembers its previous primary, and how long a draining backend
    /// keeps its established flows, in seconds.
    #[serde(default = "default_drain_s")]
    pub drain_s: u32,
    /// Time in which a new or recovered backend grows to its full share, in seconds; 0: at once.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slow_start_s: u32,
    /// UDP only: place each packet by hash alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub udp_stateless: bool,
    /// UDP only: idle time after which a flow is removed, in seconds.
    #[serde(default = "default_udp_timeout_s")]
    pub udp_timeout_s: u32,
    /// TCP only: idle time after which a tracked flow is removed, in seconds.
    #[serde(default = "default_tcp_timeout_s", skip_serializing_if = "is_default_tcp_timeout_s")]
    pub tcp_timeout_s: u32,
    /// UDP only: configs of QUIC connection ids, by which packets are routed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quic: Vec<QuicConfig>,
    /// Destination port of GUE packets.
    #[serde(default = "default_gue_port")]
    pub gue_port: u16,
    /// What happens to established flows of a backend that is down.
    #[serde(default)]
    pub on_down: OnDown,
    /// What happens to the VIP when no backend takes new flows. The default is not written: hosts of versions
    /// without this key read the same state.
    #[serde(default, skip_serializing_if = "is_keep")]
    pub when_all_down: WhenAllDown,
    /// Panic threshold: when less than this share of the backends' weight is healthy, health is ignored, in percent; 0: never.
    /// None in a file or request that does not name it, see [`Desired::assign_defaults`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic_percent: Option<u8>,
    /// Ejection limit: checks alone take out at most this share of the backends' weight within the window, in percent; no
    /// limit if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ejection_percent: Option<u8>,
    /// Time for which an ejection counts, in seconds.
    #[serde(default = "default_ejection_window_s", skip_serializing_if = "is_default_ejection_window_s")]
    pub ejection_window_s: u32,
    /// History of the seats, oldest turn first: seat and weight, or 0 for a seat that was left. Maintained
    /// by the daemon; if empty, backends came in the order of their seats. See [`crate::plan::maglev`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seating: Vec<(u32, u32)>,
    /// Rate limit of new flows of the service; no limit if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_flow_rate: Option<Rate>,
    /// Burst of the service's rate limit; what one second brings if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_flow_burst: Option<u32>,
    /// Rate limit of new flows of one source; no limit if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_rate: Option<Rate>,
    /// Burst of a source's rate limit; what one second brings if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_burst: Option<u32>,
    /// Leading bits of an IPv4 address that make up a source.
    #[serde(default = "default_source_v4", skip_serializing_if = "is_source_v4")]
    pub source_prefix_v4: u8,
    /// Leading bits of an IPv6 address that make up a source.
    #[serde(default = "default_source_v6", skip_serializing_if = "is_source_v6")]
    pub source_prefix_v6: u8,
    /// Health check.
    #[serde(default = "HealthCheck::unset", skip_serializing_if = "HealthCheck::is_unset")]
    pub health: HealthCheck,
    /// Source of the state of its replicas, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaSource>,
    /// Residency and spread over regions; if none, any region, the own region first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<RegionRules>,
    /// Roll-out of a new version of its model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// Backends by name.
    #[serde(default)]
    pub backends: BTreeMap<Name, Backend>,
}

impl Service {
    /// Whether packets of this service may go to this backend, by residency.
    pub fn allows(&self, backend: &Backend) -> bool {
        self.regions.as_ref().is_none_or(|rules| rules.allows(backend))
    }

    /// Whether regions or zones influence the service's flows.
    pub fn is_regional(&self) -> bool {
        self.regions.is_some() || self.backends.values().any(|b| b.region.is_some() || b.zone.is_some())
    }

    /// Panic threshold in force, in percent.
    pub fn panic_threshold(&self) -> u8 {
        self.panic_percent.unwrap_or(0)
    }

    /// Whether packets carry other backends that may have their flow.
    pub fn has_second_chance(&self) -> bool {
        self.mode == ForwardingMode::Gue
            && self.scheduler.is_by_pair()
            && self.second_chance.unwrap_or(self.protocol == Protocol::Tcp)
    }
}

fn default_drain_s() -> u32 {
    300
}

fn default_source_v4() -> u8 {
    32
}

fn default_source_v6() -> u8 {
    64
}

fn is_source_v4(bits: &u8) -> bool {
    *bits == default_source_v4()
}

fn is_source_v6(bits: &u8) -> bool {
    *bits == default_source_v6()
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

fn default_ejection_window_s() -> u32 {
    60
}

fn is_default_ejection_window_s(value: &u32) -> bool {
    *value == default_ejection_window_s()
}

fn default_udp_timeout_s() -> u32 {
    120
}

fn default_tcp_timeout_s() -> u32 {
    lb_common::flow::TCP_IDLE_S
}

fn is_default_tcp_timeout_s(value: &u32) -> bool {
    *value == default_tcp_timeout_s()
}

fn default_gue_port() -> u16 {
    lb_common::settings::GUE_PORT
}

fn default_weight() -> u32 {
    1
}

/// A backend of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// Address of the worker.
    pub address: IpAddr,
    /// Mode nat only: port of the worker, if it is not the service's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Share of new flows relative to the other backends, 0 to 65,535; 0 takes none.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Administrative state.
    #[serde(default)]
    pub state: BackendState,
    /// Position in the Maglev table, unique in the service; if none, its former or a free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seat: Option<u32>,
    /// Server id in the QUIC connection ids that the worker issues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_id: Option<ServerId>,
    /// Region of the backend; if none, the region of each ingress host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Name>,
    /// Zone within the region; if none, the zone of each ingress host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
}
