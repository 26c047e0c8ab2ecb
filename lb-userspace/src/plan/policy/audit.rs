//! Residency, service by service: what the rule is, where the backends are, and what is wrong with that.
//!
//! Input: the desired state, where this host is, who takes flows, and flows that are still held. Output: a
//! [`Residency`] per service. Pure; called by the API for `lbctl audit residency`.

use crate::desired::model::{Backend, BackendId, Desired, Name, Service, Share, region_list};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A service's residency.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residency {
    /// Service.
    pub service: Name,
    /// The only regions that it may run in; none if any.
    pub allowed: Option<Vec<Name>>,
    /// Where its backends are.
    pub places: Vec<Home>,
    /// What this host's table gives to each region.
    pub shares: Vec<Share>,
    /// What is wrong; empty if nothing is.
    pub findings: Vec<String>,
}

/// Backends at one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// Region; none of those that do not say.
    pub region: Option<Name>,
    /// Whether the service may run there.
    pub is_allowed: bool,
    /// Backends.
    pub backends: u32,
    /// Those of them that take new flows.
    pub ready: u32,
}

/// What is seen of a backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// It takes new flows.
    pub ready: bool,
    /// Live flows that flow tables send there.
    pub flows: u64,
}

/// Audits all services.
pub fn audit(
    desired: &Desired,
    seen: impl Fn(&BackendId) -> Seen,
    shares: impl Fn(&Name) -> Vec<Share>,
) -> Vec<Residency> {
    desired.services.iter().map(|(name, service)| one(name, service, &seen, shares(name))).collect()
}

fn one(name: &Name, service: &Service, seen: &impl Fn(&BackendId) -> Seen, shares: Vec<Share>) -> Residency {
    let allowed = service.regions.as_ref().and_then(|rules| rules.allowed.clone());
    let (mut homes, mut findings) = (BTreeMap::<Option<Name>, Home>::new(), Vec::new());
    for (backend, b) in &service.backends {
        let seen = seen(&BackendId { service: name.clone(), backend: backend.clone() });
        let is_allowed = service.allows(b);
        let home = Home { region: b.region.clone(), is_allowed, backends: 0, ready: 0 };
        let home = homes.entry(b.region.clone()).or_insert(home);
        home.backends += 1;
        home.ready += u32::from(seen.ready && is_allowed);
        findings.extend(outside(backend, b, seen, is_allowed));
    }
    let places: Vec<Home> = homes.into_values().collect();
    if let Some(allowed) = &allowed {
        if let Some(share) = shares.iter().find(|s| !allowed.contains(&s.name)) {
            findings.push(format!("violated: the table gives {} ‰ to {}", share.permille, share.name));
        }
        if places.iter().all(|home| home.ready == 0) {
            findings.push(format!("nothing is left in {}: new flows are refused", region_list(allowed)));
        }
    }
    Residency { service: name.clone(), allowed, places, shares, findings }
}

/// What is wrong with a backend outside.
fn outside(name: &Name, b: &Backend, seen: Seen, is_allowed: bool) -> Option<String> {
    if is_allowed {
        return None;
    }
    let place = match &b.region {
        Some(region) => format!("is in {region}"),
        None => "does not say where it is".to_owned(),
    };
    let flows = match seen.flows {
        0 => String::new(),
        n => format!("; {n} flows are refused there"),
    };
    Some(format!("backend {name} {place}, and gets nothing{flows}"))
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
                |id| Seen { ready, flows: u64::from(id.backend.as_str() == "b") },
                |_| shares.clone(),
            )
        };
        let found = look(true, &[("eu", 1_000)]);
        assert_eq!(
            found[0].findings,
            [
                "backend b is in us, and gets nothing; 1 flows are refused there",
                "backend c does not say where it is, and gets nothing"
            ]
        );
        assert_eq!(found[0].places.iter().map(|h| h.ready).sum::<u32>(), 1);
        assert!(found[1].findings.is_empty());
        assert!(look(false, &[])[0].findings[2].contains("nothing is left in eu"));
        assert!(look(true, &[("us", 25)])[0].findings[2].starts_with("violated"));
    }
}
