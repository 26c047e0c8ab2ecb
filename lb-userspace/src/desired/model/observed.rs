//! What was seen, as against what is desired: health verdicts, replicas' readiness, and next hops.

use super::{Name, Readiness, RegionShares};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::Duration};

/// One backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackendId {
    /// Service's name.
    pub service: Name,
    /// Backend's name within it.
    pub backend: Name,
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.backend)
    }
}

/// A probe's verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// No verdict yet: takes new flows only if nothing healthy is left.
    #[default]
    Unknown,
    /// Passed its checks, or has none.
    Healthy,
    /// Failed its checks.
    Unhealthy,
}

/// How the kernel would reach a backend's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextHop {
    /// Physical egress interface (the parent where the route names a VLAN interface).
    pub ifindex: u32,
    /// Tag to push, 0 for none.
    pub vlan: u16,
    /// Egress interface's MAC.
    pub egress_mac: [u8; 6],
    /// Next hop's MAC.
    pub next_hop: [u8; 6],
    /// Largest IP packet on the path: route MTU or egress MTU.
    pub mtu: u16,
    /// Preferred source address of the route.
    pub source: Option<IpAddr>,
    /// Whether it is a router, and not the backend itself.
    #[serde(default)]
    pub is_routed: bool,
}

/// How the host sends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Paths {
    /// Next hops by backend address; an address that is missing is left to the kernel's FIB.
    pub next_hops: BTreeMap<IpAddr, NextHop>,
    /// Ethernet interfaces that the kernel's FIB may answer with, VLAN interfaces excepted: index and name.
    pub links: BTreeMap<u32, String>,
}

/// All observations that `compile` needs, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Verdicts; a backend that is missing is [`Health::Unknown`].
    pub health: BTreeMap<BackendId, Health>,
    /// What replicas say; one that is missing is [`Readiness::Unknown`].
    pub replicas: BTreeMap<BackendId, Readiness>,
    /// How the host sends.
    pub paths: Paths,
    /// How services are spread over regions and versions, where that was decided.
    pub steers: BTreeMap<Name, Arc<RegionShares>>,
    /// Clock (since boot, `CLOCK_MONOTONIC`) of this observation.
    pub now: Duration,
}
