//! Services, backends, and the rules that a desired state must keep.

use super::{HealthCheck, HealthKind, Name, Ports, Protocol};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// Everything the operator asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// Services by name.
    #[serde(default)]
    pub services: BTreeMap<Name, Service>,
}

/// How new flows are placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// Consistent hashing: the slot's primary.
    #[default]
    Maglev,
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
}

/// What becomes of established flows when their backend is found down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// They stay: the verdict may be wrong, and a connection that lives is not cut.
    #[default]
    Keep,
    /// They move to another backend, whose reset tells the client at once.
    Reset,
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
    /// Slots of the Maglev table (a prime of `limits::TABLE_SIZES`); chosen by backend count if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_size: Option<u32>,
    /// Seed of the flow hash and the tables; derived from VIP, port and protocol if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How long a changed slot remembers its previous primary, and how long a draining backend
    /// may keep its flows, in seconds.
    #[serde(default = "default_drain_s")]
    pub drain_s: u32,
    /// UDP only: place each packet by hash alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub udp_stateless: bool,
    /// UDP only: idle time after which a flow is forgotten, in seconds.
    #[serde(default = "default_udp_timeout_s")]
    pub udp_timeout_s: u32,
    /// Destination port of GUE packets.
    #[serde(default = "default_gue_port")]
    pub gue_port: u16,
    /// Established flows of a backend that is down.
    #[serde(default)]
    pub on_down: OnDown,
    /// When fewer than this share of the backends' weight is healthy, health is ignored, in percent; 0: never.
    #[serde(default)]
    pub panic_percent: u8,
    /// Health check.
    #[serde(default)]
    pub health: HealthCheck,
    /// Backends by name.
    #[serde(default)]
    pub backends: BTreeMap<Name, Backend>,
}

fn default_drain_s() -> u32 {
    300
}

fn default_udp_timeout_s() -> u32 {
    120
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
    /// Worker's address.
    pub address: IpAddr,
    /// Share of new flows relative to the other backends', 0 to 65,535; 0 takes none.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Administrative state.
    #[serde(default)]
    pub state: BackendState,
}

/// A rule that a desired state breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Two services would take the same packets.
    #[error(
        "services {first} and {second} overlap: both take {vip} {protocol} port {port}; change one of the ports or remove one"
    )]
    Overlap {
        /// A service.
        first: Name,
        /// The other.
        second: Name,
        /// Their VIP.
        vip: IpAddr,
        /// Their protocol.
        protocol: Protocol,
        /// The second's ports.
        port: Ports,
    },
    /// A setting is out of its range or contradicts another.
    #[error("service {service}: {what}")]
    Setting {
        /// Service.
        service: Name,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// The same for one backend.
    #[error("backend {service}/{backend}: {what}")]
    Backend {
        /// Service.
        service: Name,
        /// Backend.
        backend: Name,
        /// What is wrong, and what would be right.
        what: String,
    },
}

impl Desired {
    /// All rules that this state breaks, in name order; empty if it is valid.
    pub fn check(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        let all: Vec<_> = self.services.iter().collect();
        for (i, (first, a)) in all.iter().enumerate() {
            for (second, b) in &all[i + 1..] {
                if a.vip == b.vip && a.protocol == b.protocol && a.port.conflicts(&b.port) {
                    found.push(Invalid::Overlap {
                        first: (*first).clone(),
                        second: (*second).clone(),
                        vip: b.vip,
                        protocol: b.protocol,
                        port: b.port,
                    });
                }
            }
        }
        for (name, service) in all {
            service.check(name, &mut found);
        }
        found
    }
}

impl Service {
    /// Appends the rules that this service breaks by itself.
    fn check(&self, name: &Name, found: &mut Vec<Invalid>) {
        let mut setting = |what: String| found.push(Invalid::Setting { service: name.clone(), what });
        if self.vip.is_unspecified() || self.vip.is_multicast() {
            setting(format!("VIP {} is no unicast address", self.vip));
        }
        if let Some(size) = self.table_size
            && !lb_common::limits::TABLE_SIZES.contains(&size)
        {
            setting(format!("table_size {size} is not one of {:?}", lb_common::limits::TABLE_SIZES));
        }
        if self.panic_percent > 100 {
            setting(format!("panic_percent {} is above 100", self.panic_percent));
        }
        if self.udp_timeout_s == 0 {
            setting("udp_timeout_s is 0: at least 1".to_owned());
        }
        if self.udp_stateless && self.protocol != Protocol::Udp {
            setting("udp_stateless is for UDP services only".to_owned());
        }
        let health = &self.health;
        if health.kind != HealthKind::None {
            if health.port.is_none() && !matches!(self.port, Ports::One(_)) {
                setting(format!("health needs a port: the service's own is {}", self.port));
            }
            if health.interval_ms < 10 || health.timeout_ms == 0 || health.rise == 0 || health.fall == 0 {
                setting("health: interval_ms at least 10, timeout_ms, rise and fall at least 1".to_owned());
            }
            if health.jitter_percent > 50 {
                setting(format!("health: jitter_percent {} is above 50", health.jitter_percent));
            }
        }
        if !self.backends.is_empty() && self.backends.values().all(|b| b.weight == 0) {
            setting("all weights are 0: give at least one backend a weight".to_owned());
        }
        let mut addresses = BTreeMap::new();
        for (backend, b) in &self.backends {
            let mut refuse = |what: String| {
                found.push(Invalid::Backend { service: name.clone(), backend: backend.clone(), what })
            };
            if b.weight > 65_535 {
                refuse(format!("weight {} is above 65535", b.weight));
            }
            if b.address.is_unspecified() || b.address.is_multicast() {
                refuse(format!("address {} is no unicast address", b.address));
            }
            if b.address == self.vip {
                refuse(format!("address {} is the service's own VIP", b.address));
            }
            if let Some(other) = addresses.insert(b.address, backend) {
                refuse(format!("address {} is already that of backend {other}", b.address));
            }
        }
    }
}
