//! Observed state, as opposed to desired state: health, readiness of replicas, and next hops.

use super::{Name, Readiness, RegionShares};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

/// Names of a backend and its service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackendId {
    /// Name of the service.
    pub service: Name,
    /// Name of the backend within the service.
    pub backend: Name,
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.backend)
    }
}

/// Result of the health checks of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// No result yet: takes new flows only if no healthy backend is left.
    #[default]
    Unknown,
    /// Passed its checks, or has none.
    Healthy,
    /// Failed its checks.
    Unhealthy,
}

/// The kernel's route to a backend's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHop {
    /// Physical egress interface (the parent where the route names a VLAN interface).
    pub ifindex: u32,
    /// VLAN tag to push, 0 for none.
    pub vlan: u16,
    /// MAC address of the egress interface.
    pub egress_mac: [u8; 6],
    /// MAC address of the next hop.
    pub next_hop: [u8; 6],
    /// Largest IP packet on the path: MTU of the route or of the egress interface.
    pub mtu: u16,
    /// Largest IP packet by what a router further on said, if that is smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_mtu: Option<u16>,
    /// Preferred source address of the route.
    pub source: Option<IpAddr>,
    /// Whether the next hop is a router, and not the backend itself.
    #[serde(default)]
    pub is_routed: bool,
}

impl NextHop {
    /// Largest IP packet on the whole path, as far as is known.
    pub fn path_mtu(&self) -> u16 {
        self.path_mtu.map_or(self.mtu, |told| told.min(self.mtu))
    }
}

/// Next hops and egress interfaces of the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Paths {
    /// Next hops by backend address; an address that is missing is left to the kernel's FIB.
    pub next_hops: BTreeMap<IpAddr, NextHop>,
    /// Backend addresses that packets have not been able to reach for a while, not even by the kernel's FIB, and why.
    pub unreachable: BTreeMap<IpAddr, String>,
    /// Ethernet interfaces that the kernel's FIB may answer with, VLAN interfaces excepted: index and name.
    pub links: BTreeMap<u32, String>,
}

/// All observations that `compile` needs, at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Health; a missing backend is [`Health::Unknown`].
    pub health: BTreeMap<BackendId, Health>,
    /// Readiness of replicas; a missing one is [`Readiness::Unknown`].
    pub replicas: BTreeMap<BackendId, Readiness>,
    /// Next hops and egress interfaces.
    pub paths: Paths,
    /// Shares of regions and versions, where the policy has decided them.
    pub steers: BTreeMap<Name, Arc<RegionShares>>,
    /// Clock (since boot, `CLOCK_MONOTONIC`) of this observation.
    pub now: Duration,
}
