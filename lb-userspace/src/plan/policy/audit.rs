//! Audits residency service by service: the rule, the backends by region, and violations.
//!
//! Input: the desired state, which backends take flows, their tracked flows, and the table's shares. Output: a
//! [`Residency`] per service. Pure; called by the API for `lbctl audit residency`.

use crate::desired::model::{Backend, BackendId, Desired, Name, Service, Share, region_list};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A service's residency.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residency {
    /// Service.
    pub service: Name,
    /// Regions in which the service may run; none if any.
    pub allowed: Option<Vec<Name>>,
    /// Backends by region.
    pub places: Vec<BackendsInRegion>,
    /// Each region's share of this host's table.
    pub shares: Vec<Share>,
    /// Violations and warnings; empty if there are none.
    pub findings: Vec<String>,
}

/// Backends in one region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendsInRegion {
    /// Region; none for backends without a region.
    pub region: Option<Name>,
    /// Whether the service may run in the region.
    pub is_allowed: bool,
    /// Number of backends.
    pub backends: u32,
    /// Backends that take new flows.
    pub ready: u32,
}

/// Use of a backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackendUse {
    /// Whether the backend takes new flows.
    pub ready: bool,
    /// Live flows that the flow tables assign to the backend.
    pub flows: u64,
}

/// Audits all services.
pub fn audit(
    desired: &Desired,
    seen: impl Fn(&BackendId) -> BackendUse,
    shares: impl Fn(&Name) -> Vec<Share>,
) -> Vec<Residency> {
    desired.services.iter().map(|(name, service)| audit_service(name, service, &seen, shares(name))).collect()
}

fn audit_service(
    name: &Name,
    service: &Service,
    seen: &impl Fn(&BackendId) -> BackendUse,
    shares: Vec<Share>,
) -> Residency {
    let allowed = service.regions.as_ref().and_then(|rules| rules.allowed.clone());
    let (mut homes, mut findings) = (BTreeMap::<Option<Name>, BackendsInRegion>::new(), Vec::new());
    for (backend, b) in &service.backends {
        let seen = seen(&BackendId { service: name.clone(), backend: backend.clone() });
        let is_allowed = service.allows(b);
        let home = BackendsInRegion { region: b.region.clone(), is_allowed, backends: 0, ready: 0 };
        let home = homes.entry(b.region.clone()).or_insert(home);
        home.backends += 1;
        home.ready += u32::from(seen.ready && is_allowed);
        findings.extend(outside_finding(backend, b, seen, is_allowed));
    }
    let places: Vec<BackendsInRegion> = homes.into_values().collect();
    if let Some(allowed) = &allowed {
        if let Some(share) = shares.iter().find(|s| !allowed.contains(&s.name)) {
            findings.push(format!("violated: the table gives {} ‰ to {}", share.permille, share.name));
        }
        if places.iter().all(|home| home.ready == 0) {
            findings
                .push(format!("no backend takes flows in {}: new flows are refused", region_list(allowed)));
        }
    }
    Residency { service: name.clone(), allowed, places, shares, findings }
}

/// Finding about a backend outside the allowed regions.
fn outside_finding(name: &Name, b: &Backend, seen: BackendUse, is_allowed: bool) -> Option<String> {
    if is_allowed {
        return None;
    }
    let place = match &b.region {
        Some(region) => format!("is in {region}"),
        None => "has no region".to_owned(),
    };
    let flows = match seen.flows {
        0 => String::new(),
        n => format!("; {n} flows are refused there"),
    };
    Some(format!("backend {name} {place} and gets no flows{flows}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_finds_what_is_outside_and_what_is_left() {
        let desired: Desired = serde_json::from_value(serde_json::json!({"services": {
            "bound": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "regions": {"allowed": ["eu"]}, "backends": {
                "a": {"address": "10.1.0.1", "region": "eu"},
                "b": {"address": "10.1.0.2", "region": "us"},
                "c": {"address": "10.1.0.3"}}},
            "free": {"vip": "10.0.0.2", "port": 80, "protocol": "tcp", "backends": {
                "a": {"address": "10.1.0.1", "region": "us"}}},
        }}))
        .unwrap();
        let look = |ready: bool, shares: &[(&str, u16)]| {
            let share = |&(name, permille): &(&str, u16)| Share { name: name.parse().unwrap(), permille };
            let shares: Vec<Share> = shares.iter().map(share).collect();
            audit(
                &desired,
                |id| BackendUse { ready, flows: u64::from(id.backend.as_str() == "b") },
                |_| shares.clone(),
            )
        };
        let found = look(true, &[("eu", 1_000)]);
        assert_eq!(
            found[0].findings,
            [
                "backend b is in us and gets no flows; 1 flows are refused there",
                "backend c has no region and gets no flows"
            ]
        );
        assert_eq!(found[0].places.iter().map(|h| h.ready).sum::<u32>(), 1);
        assert!(found[1].findings.is_empty());
        assert!(look(false, &[])[0].findings[2].contains("no backend takes flows in eu"));
        assert!(look(true, &[("us", 25)])[0].findings[2].starts_with("violated"));
    }
}
