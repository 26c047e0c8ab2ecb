//! Decides which VIPs belong on this host, so that routing daemons announce only served VIPs.
//!
//! Input: for each service its VIP, whether backends take its new flows, and whether one of them has passed its
//! checks; the VIPs that are on the host now, and whether the host drains. Output: a decision for each VIP.
//! Pure; called by `announce`.
//!
//! A VIP is on if any of its services is served: BGP knows addresses, not ports. Adding a VIP needs a backend that is
//! known to be good, keeping it does not: at a cold start backends without a verdict serve, but a host that knows no
//! good worker must not draw clients from hosts that do.

use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

/// State of a service for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceAt {
    /// VIP of the service; several services may share one.
    pub vip: IpAddr,
    /// Whether backends take the service's new flows, including by the panic rule.
    pub served: bool,
    /// Whether one of these backends has passed its checks or has none, or the panic rule ignores checks.
    pub proven: bool,
}

/// Whether a VIP belongs on this host, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VipDecision {
    /// On: a service at this VIP is served.
    Served,
    /// Off: no service at this VIP has a backend that takes new flows.
    NoBackend,
    /// Not added yet: no backend has passed its checks since lbd started.
    Unproven,
    /// Off: the host drains.
    Draining,
}

impl VipDecision {
    /// Whether the VIP belongs on the host.
    pub fn is_on(self) -> bool {
        self == Self::Served
    }
}

impl fmt::Display for VipDecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Served => "served",
            Self::NoBackend => "no backend takes new flows",
            Self::Unproven => "no backend has passed its checks yet",
            Self::Draining => "the host drains",
        })
    }
}

/// Decides for each VIP whether it belongs on this host.
///
/// A VIP is on as long as one service at it is served: removing it because of another service would take the served
/// one down too. It is added only after a backend has passed its checks, so that a host that has just started attracts
/// no clients before it knows a healthy worker; a VIP that is already on (lbd was restarted) stays.
pub fn decide(
    services: &[ServiceAt],
    on: &BTreeSet<IpAddr>,
    is_draining: bool,
) -> BTreeMap<IpAddr, VipDecision> {
    let mut decisions: BTreeMap<IpAddr, VipDecision> = BTreeMap::new();
    for service in services {
        let decision = match service {
            _ if is_draining => VipDecision::Draining,
            ServiceAt { served: false, .. } => VipDecision::NoBackend,
            ServiceAt { proven: false, vip, .. } if !on.contains(vip) => VipDecision::Unproven,
            _ => VipDecision::Served,
        };
        let best = decisions.entry(service.vip).or_insert(decision);
        // The best decision of any service at the VIP wins.
        *best = match (*best, decision) {
            (VipDecision::Served, _) | (_, VipDecision::Served) => VipDecision::Served,
            (VipDecision::Unproven, _) | (_, VipDecision::Unproven) => VipDecision::Unproven,
            (other, _) => other,
        };
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;
    use VipDecision::{Draining, NoBackend, Served, Unproven};

    fn vip(n: u8) -> IpAddr {
        IpAddr::from([10, 99, 0, n])
    }

    fn at(n: u8, served: bool, proven: bool) -> ServiceAt {
        ServiceAt { vip: vip(n), served, proven }
    }

    #[test]
    fn a_vip_is_on_while_any_of_its_services_is_served() {
        let services = [at(1, false, false), at(1, true, true), at(2, false, false), at(2, false, false)];
        let found = decide(&services, &BTreeSet::new(), false);
        assert_eq!(found, BTreeMap::from([(vip(1), Served), (vip(2), NoBackend)]));
    }

    #[test]
    fn without_proof_a_vip_is_not_put_on_but_one_that_is_on_stays() {
        let services = [at(1, true, false), at(2, true, false), at(2, false, false)];
        let found = decide(&services, &BTreeSet::from([vip(1)]), false);
        assert_eq!(found, BTreeMap::from([(vip(1), Served), (vip(2), Unproven)]));
    }

    #[test]
    fn a_host_that_drains_has_none() {
        let services = [at(1, true, true), at(2, false, false)];
        let found = decide(&services, &BTreeSet::from([vip(1)]), true);
        assert_eq!(found, BTreeMap::from([(vip(1), Draining), (vip(2), Draining)]));
    }
}
