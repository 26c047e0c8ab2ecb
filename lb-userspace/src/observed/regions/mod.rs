//! Regions at run time: measures them, exchanges reports between hosts, and decides each service's region shares.
//!
//! Input: desired state, health and replica registries, round-trip times ([`rtt`]), reports of other hosts. Output: the
//! shares of each service, as [`crate::apply::reconcile::Event::Steers`]; [`RegionSnapshot`] for API and metrics; and the
//! abort of a roll-out whose new version performs badly ([`rollouts`]). The decisions themselves are pure functions of
//! [`crate::plan::policy::region`]. Called by the daemon.
//!
//! Hosts of one region and zone must use the same shares, or a flow that routers move from one host to another would be
//! sent to another worker. So the first host of a region by name decides the region's shares, and the first of a zone
//! those between zones; the others follow. A host that is disconnected from the store decides for itself. What they
//! publish also tells other regions where a region's flows go ([`peers`]).
//!
//! What was decided is kept in the local store, so a restart moves nothing. What a host tells is under its lease, so
//! when it dies the next one decides.

mod controller;
pub mod measure;
pub mod peers;
pub mod rollouts;
pub mod rtt;
pub mod service_time;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use controller::{CommitDesired, RegionController};

use crate::{
    desired::model::{Name, RegionPolicy, RegionShares, RegionState, Rollout, RolloutState},
    plan::policy::{
        canary::Tally,
        coverage::Coverage,
        region::{Agreed, Place, RegionDecision, Vote},
    },
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Prefix of the keys of the hosts' reports about regions.
pub const KEY: &str = "regions/";

/// A host's report to the other hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Name of the host.
    pub host: String,
    /// The host's region.
    pub region: String,
    /// The host's zone.
    pub zone: String,
    /// Whether the host sees a region up, for regions with checked backends.
    #[serde(default)]
    pub sees: BTreeMap<Name, bool>,
    /// Round-trip times to regions, in microseconds.
    #[serde(default)]
    pub rtt_us: BTreeMap<Name, u32>,
    /// Region shares of the services for which this host decides.
    #[serde(default)]
    pub steers: BTreeMap<Name, RegionShares>,
}

/// One service's decision with its inputs: `GET /v1/policy/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// Service.
    pub service: Name,
    /// The host's own region.
    pub region: Name,
    /// The host's own zone.
    pub zone: Name,
    /// Policy.
    pub policy: RegionPolicy,
    /// Residency; none if the service may run anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Vec<Name>>,
    /// Host whose decision is in effect on this host.
    pub decided_by: String,
    /// Inputs: regions.
    pub regions: Vec<Place>,
    /// Inputs: zones of the own region.
    pub zones: Vec<Place>,
    /// This host's own decision.
    pub decision: RegionDecision,
    /// Shares in effect.
    pub steer: RegionShares,
    /// Inputs that were bounded, ignored or stale, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The roll-out, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutShown>,
}

impl Explained {
    /// The problem of requests that have no room anywhere, and what to do about it.
    fn no_room(&self) -> Option<String> {
        let Self { service, region, decision, policy, .. } = self;
        let requests = Some(decision.spill.unplaced).filter(|&n| n > 0)?;
        if *policy == RegionPolicy::ActiveActive {
            return Some(format!(
                "service {service}: spill wanted, nowhere to go: about {requests} requests of region {region} have no room in \
                 any allowed region; add replicas, allow more regions (lbctl service set {service} --regions), or limit the \
                 demand"
            ));
        }
        let used = |p: &&Place| decision.full.contains(&p.name);
        let percent = |p: &Place| {
            let capacity = p.capacity.unwrap_or(1).max(1);
            format!("{} at {} %", p.name, p.load.saturating_mul(100) / capacity)
        };
        let full: Vec<String> = self.regions.iter().filter(used).map(percent).collect();
        Some(format!(
            "service {service}: full: {} of the capacity, {requests} requests wait, and policy {} sends them nowhere else; add \
             replicas, {}, or limit the demand",
            full.join(", "),
            policy.label(),
            match policy {
                RegionPolicy::Weighted => "change the weights",
                _ => "use policy active-active",
            }
        ))
    }
}

/// A roll-out and its results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutShown {
    /// Service.
    pub service: Name,
    /// The roll-out as desired, with its state.
    #[serde(flatten)]
    pub rollout: Rollout,
    /// Requests of the new version's replicas since the roll-out began, as seen by this host.
    pub new: Tally,
    /// Requests of all other replicas since the roll-out began.
    pub old: Tally,
    /// Verdict on the new version, in words.
    pub verdict: String,
    /// Where the new version runs.
    #[serde(default)]
    pub coverage: Coverage,
}

impl RolloutShown {
    /// What an operator has to know: it was aborted, or it is not where it should be.
    fn problem(&self) -> Option<String> {
        let Self { service, rollout: Rollout { version, reason, .. }, coverage, .. } = self;
        if self.rollout.state == RolloutState::Aborted {
            return Some(format!("roll-out of {version} on service {service} was aborted: {reason}"));
        }
        let text = &coverage.text;
        coverage.is_incomplete(&self.rollout).then(|| {
            format!("roll-out of {version} on service {service} is promoted, but not everywhere: {text}")
        })
    }
}

/// A region as this host sees it: `GET /v1/regions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionShown {
    /// Name.
    pub name: Name,
    /// Whether this is the host's own region.
    pub is_local: bool,
    /// Whether the region was declared with `lbctl region add`.
    pub is_declared: bool,
    /// State that the operator set.
    pub state: RegionState,
    /// Result of the votes.
    pub agreed: Agreed,
    /// Votes of the hosts.
    pub votes: Vec<Vote>,
    /// Round-trip time from this host, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u32>,
    /// Live ingress hosts in the region.
    pub hosts: usize,
    /// Backends in the region, of all services.
    pub backends: usize,
    /// Backends in the region that can take new flows.
    pub ready: usize,
}

/// All decisions with their inputs.
#[derive(Clone, Debug, Default)]
pub struct RegionSnapshot {
    /// Revision of the desired state that the decisions are based on.
    pub revision: u64,
    /// Decisions by service, only for services with regions or a roll-out.
    pub services: BTreeMap<Name, Explained>,
    /// Regions, by name.
    pub regions: Vec<RegionShown>,
}

impl RegionSnapshot {
    /// Problems that need an operator's attention.
    pub fn problems(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for region in self.regions.iter().filter(|r| r.agreed == Agreed::Down) {
            let who: Vec<&str> = region.votes.iter().filter(|v| !v.is_up).map(|v| v.host.as_str()).collect();
            found.push(format!("region {} is down, according to {}", region.name, who.join(", ")));
        }
        for (name, explained) in &self.services {
            if explained.decision.shares.is_empty() {
                found.push(format!("service {name}: {}", explained.decision.reason));
            }
            found.extend(explained.no_room());
            found.extend(explained.notes.iter().map(|note| format!("service {name}: {note}")));
            found.extend(explained.rollout.as_ref().and_then(RolloutShown::problem));
        }
        found
    }
}
