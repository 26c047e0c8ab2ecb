//! Regions at run time: what is measured of them, what hosts tell each other of them, and what is decided.
//!
//! Input: desired state, health and replica books, round-trip times ([`rtt`]), what other hosts tell. Output: how each
//! service is spread, as [`crate::apply::reconcile::Event::Steers`]; [`RegionSnapshot`] for API and metrics; and a roll-out that
//! is aborted when its new version does badly ([`rollouts`]). The decisions themselves are pure functions of
//! [`crate::plan::policy::region`]. Called by the daemon.
//!
//! Hosts of one region and zone must spread alike, or a flow that routers move from one to the other would be sent to
//! another worker. So the first of them by name decides, and tells; the others follow it. One that is cut off from
//! the store decides for itself.
//!
//! What was decided is kept in the local store, so a restart moves nothing. What a host tells is under its lease, so
//! when it dies the next one decides.

mod controller;
pub mod measure;
pub mod rollouts;
pub mod rtt;
#[cfg(test)]
mod tests;

pub use controller::{CommitDesired, RegionController};

use crate::{
    desired::model::{Name, RegionPolicy, RegionShares, RegionState, Rollout},
    plan::policy::{
        canary::Tally,
        region::{Agreed, Decision, Place, Vote},
    },
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Keys of what hosts tell about regions begin with this.
pub const KEY: &str = "regions/";

/// What a host tells the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Who.
    pub host: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// Whether it sees a region up, for those of which it can say.
    #[serde(default)]
    pub sees: BTreeMap<Name, bool>,
    /// Round-trip times to regions, in microseconds.
    #[serde(default)]
    pub rtt_us: BTreeMap<Name, u32>,
    /// How services are spread, if it is the one that decides.
    #[serde(default)]
    pub steers: BTreeMap<Name, RegionShares>,
}

/// One service's decision with all that it was made of: `GET /v1/policy/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// Service.
    pub service: Name,
    /// The host's own region.
    pub region: Name,
    /// Its zone.
    pub zone: Name,
    /// Policy.
    pub policy: RegionPolicy,
    /// Residency; none if it may run anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Vec<Name>>,
    /// Host whose decision holds here.
    pub decided_by: String,
    /// Inputs: regions.
    pub regions: Vec<Place>,
    /// Inputs: zones of the own region.
    pub zones: Vec<Place>,
    /// What was decided here.
    pub decision: Decision,
    /// What holds.
    pub steer: RegionShares,
    /// What was bounded, left out or taken from before, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The roll-out, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutShown>,
}

/// A roll-out and how it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutShown {
    /// Service.
    pub service: Name,
    /// What the operator asked for, or what came of it.
    #[serde(flatten)]
    pub rollout: Rollout,
    /// What the new version's replicas have answered since it began, as this host saw it.
    pub new: Tally,
    /// The same of all others.
    pub old: Tally,
    /// What is made of it.
    pub verdict: String,
}

/// A region as this host sees it: `GET /v1/regions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionShown {
    /// Name.
    pub name: Name,
    /// It is this host's.
    pub is_local: bool,
    /// It was declared, and is no mistake.
    pub is_declared: bool,
    /// As the operator set it.
    pub state: RegionState,
    /// What the vantage points agree on.
    pub agreed: Agreed,
    /// Their votes.
    pub votes: Vec<Vote>,
    /// Round-trip time from here, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u32>,
    /// Ingress hosts there that are alive.
    pub hosts: usize,
    /// Backends there, of all services.
    pub backends: usize,
    /// Those of them that would take new flows.
    pub ready: usize,
}

/// Everything that was decided, and by what.
#[derive(Clone, Debug, Default)]
pub struct RegionSnapshot {
    /// Revision of the desired state that this was decided on.
    pub revision: u64,
    /// By service; those that have nothing to do with regions or roll-outs are left out.
    pub services: BTreeMap<Name, Explained>,
    /// Regions, by name.
    pub regions: Vec<RegionShown>,
}

impl RegionSnapshot {
    /// What an operator should look at.
    pub fn problems(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for region in self.regions.iter().filter(|r| r.agreed == Agreed::Down) {
            let who: Vec<&str> = region.votes.iter().filter(|v| !v.is_up).map(|v| v.host.as_str()).collect();
            found.push(format!("region {} is down, as {} agree", region.name, who.join(", ")));
        }
        for (name, explained) in &self.services {
            if explained.decision.shares.is_empty() {
                found.push(format!("service {name}: {}", explained.decision.reason));
            }
            found.extend(explained.notes.iter().map(|note| format!("service {name}: {note}")));
            if let Some(rollout) = &explained.rollout
                && rollout.rollout.state == crate::desired::model::RolloutState::Aborted
            {
                let Rollout { version, reason, .. } = &rollout.rollout;
                found.push(format!("roll-out of {version} on service {name} was aborted: {reason}"));
            }
        }
        found
    }
}
