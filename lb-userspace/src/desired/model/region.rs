//! Regions: where backends are, where a service may run, how its new flows are spread over them, and how a new version
//! of a model comes in.
//!
//! Pure data with its own rules. [`crate::plan::policy::region`] decides by it, `compile` enforces it.

use super::{Backend, Name};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A region, as the operator sets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Whether its backends take new flows.
    #[serde(default)]
    pub state: RegionState,
}

/// A region's administrative state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionState {
    /// Takes flows.
    #[default]
    Up,
    /// No new flows to any of its backends; established ones stay. One region at a time.
    Draining,
}

/// How new flows are spread over regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionPolicy {
    /// Each host's own region first; what it has no room for goes to the nearest that has.
    #[default]
    ActiveActive,
    /// All hosts send everything to the first region of `allowed` that is up.
    ActivePassive,
    /// By `weights`, the same on all hosts.
    Weighted,
}

impl RegionPolicy {
    /// The word for it, as the configuration spells it.
    pub fn label(self) -> &'static str {
        match self {
            Self::ActiveActive => "active-active",
            Self::ActivePassive => "active-passive",
            Self::Weighted => "weighted",
        }
    }
}

/// Where a service may run, and how it is spread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRules {
    /// Policy.
    #[serde(default)]
    pub policy: RegionPolicy,
    /// Residency: the only regions that may ever see its packets; if none, any. With `active-passive`, in the order of
    /// preference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Vec<Name>>,
    /// Of `weighted`: share by region; one that is not named gets nothing while another is up.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<Name, u32>,
    /// Of `active-active`: spill begins when this share of the local capacity is in use, in percent.
    #[serde(default = "default_spill_at")]
    pub spill_at_percent: u16,
    /// Spilled flows come back when the local load falls below this, in percent.
    #[serde(default = "default_spill_until")]
    pub spill_until_percent: u16,
    /// Largest share of new flows that may be spilled, in percent.
    #[serde(default = "default_spill_most")]
    pub spill_most_percent: u16,
    /// How long a spill stands before it gets smaller, in seconds.
    #[serde(default = "default_hold_s")]
    pub hold_s: u32,
    /// Within the own region, the own zone comes first in the same way.
    #[serde(default = "default_true")]
    pub zone_first: bool,
}

impl Default for RegionRules {
    fn default() -> Self {
        Self {
            policy: RegionPolicy::default(),
            allowed: None,
            weights: BTreeMap::new(),
            spill_at_percent: default_spill_at(),
            spill_until_percent: default_spill_until(),
            spill_most_percent: default_spill_most(),
            hold_s: default_hold_s(),
            zone_first: true,
        }
    }
}

fn default_spill_at() -> u16 {
    90
}

fn default_spill_until() -> u16 {
    70
}

fn default_spill_most() -> u16 {
    50
}

fn default_hold_s() -> u32 {
    10
}

fn default_true() -> bool {
    true
}

impl RegionRules {
    /// Whether packets may go to this backend: it says where it is, and that is allowed.
    pub fn allows(&self, backend: &Backend) -> bool {
        match (&self.allowed, &backend.region) {
            (None, _) => true,
            (Some(allowed), Some(region)) => allowed.contains(region),
            // Who knows where it is?
            (Some(_), None) => false,
        }
    }

    /// What contradicts itself, for people.
    pub(super) fn check(&self, setting: &mut dyn FnMut(String)) {
        let Self { policy, allowed, weights, spill_at_percent, spill_until_percent, .. } = self;
        if allowed.as_ref().is_some_and(Vec::is_empty) {
            setting(
                "regions.allowed names no region, so that nothing could ever be served: name one, or leave it out \
                 for any"
                    .to_owned(),
            );
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = allowed.iter().flatten().find(|name| !seen.insert(*name)) {
            setting(format!("regions.allowed names {twice} twice"));
        }
        match policy {
            RegionPolicy::ActivePassive if allowed.is_none() => setting(
                "regions.policy active-passive needs an order: name the regions in allowed, the active one first"
                    .to_owned(),
            ),
            RegionPolicy::Weighted if weights.values().all(|&w| w == 0) => setting(
                "regions.policy weighted needs weights, at least one of them above 0: as weights = {eu = 3, us = 1}"
                    .to_owned(),
            ),
            RegionPolicy::ActiveActive | RegionPolicy::ActivePassive if !weights.is_empty() => {
                setting(format!("regions.weights are for policy weighted, and it is {}", policy.label()));
            }
            _ => {}
        }
        if let (Some(allowed), Some(name)) =
            (allowed, weights.keys().find(|w| allowed.as_ref().is_some_and(|a| !a.contains(w))))
        {
            let allowed = list(allowed);
            setting(format!("regions.weights names {name}, which is not allowed: {allowed}"));
        }
        if let Some((name, weight)) = weights.iter().find(|(_, w)| **w > 65_535) {
            setting(format!("regions.weights: {name} has {weight}, above 65535"));
        }
        if *spill_at_percent == 0 || *spill_at_percent > 1_000 {
            setting(format!("regions.spill_at_percent {spill_at_percent}: 1 to 1000"));
        }
        if spill_until_percent.saturating_add(5) > *spill_at_percent {
            setting(format!(
                "regions.spill_until_percent {spill_until_percent}: at least 5 below spill_at_percent \
                 {spill_at_percent}, or flows would go to and fro"
            ));
        }
        if self.spill_most_percent > 100 {
            setting(format!("regions.spill_most_percent {} is above 100", self.spill_most_percent));
        }
        if self.hold_s > 86_400 {
            setting(format!("regions.hold_s {} is above 86400, a day", self.hold_s));
        }
    }
}

/// Names with commas between.
pub fn list<'a>(names: impl IntoIterator<Item = &'a Name>) -> String {
    names.into_iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

/// How far a roll-out is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutState {
    /// The new version has its share, and is watched.
    Running,
    /// The new version has everything.
    Promoted,
    /// The new version has nothing.
    Aborted,
}

impl RolloutState {
    /// The word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Promoted => "promoted",
            Self::Aborted => "aborted",
        }
    }
}

/// A new version of a model that takes part of a service's new flows: those of its replicas that report it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Model, as replicas report it.
    pub model: String,
    /// Its new version.
    pub version: String,
    /// Share of new flows that go to it while it runs, in thousandths.
    pub permille: u16,
    /// How far it is.
    #[serde(default = "running")]
    pub state: RolloutState,
    /// When it began, in milliseconds since 1970 UTC.
    #[serde(default)]
    pub since_ms: u64,
    /// Why it is as it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// It is aborted when more than this share of the new version's requests fail, in percent; 0: never.
    #[serde(default = "default_most_errors")]
    pub most_errors_percent: u8,
    /// And when its time to first token is more than so many percent of the old version's; 0: never.
    #[serde(default = "default_most_latency")]
    pub most_latency_percent: u32,
    /// Requests of the new version that it takes to judge it.
    #[serde(default = "default_least_requests")]
    pub least_requests: u32,
}

impl Rollout {
    /// Share of new flows that go to the new version, in thousandths.
    pub fn share(&self) -> u16 {
        match self.state {
            RolloutState::Running => self.permille.min(1_000),
            RolloutState::Promoted => 1_000,
            RolloutState::Aborted => 0,
        }
    }

    pub(super) fn check(&self, setting: &mut dyn FnMut(String)) {
        for (what, text) in [("model", &self.model), ("version", &self.version)] {
            if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
                setting(format!(
                    "rollout.{what} {text:?}: 1 to 256 printable bytes, as the replicas report it"
                ));
            }
        }
        if self.permille == 0 || self.permille > 1_000 {
            setting(format!("rollout.permille {}: 1 to 1000", self.permille));
        }
        if self.most_errors_percent > 100 {
            setting(format!("rollout.most_errors_percent {} is above 100", self.most_errors_percent));
        }
        if (1..=100).contains(&self.most_latency_percent) || self.most_latency_percent > 100_000 {
            setting(format!(
                "rollout.most_latency_percent {}: more than 100 (as slow as the old version), or 0 for never",
                self.most_latency_percent
            ));
        }
        if self.least_requests == 0 {
            setting("rollout.least_requests 0: at least 1".to_owned());
        }
    }
}

fn running() -> RolloutState {
    RolloutState::Running
}

fn default_most_errors() -> u8 {
    5
}

fn default_most_latency() -> u32 {
    200
}

fn default_least_requests() -> u32 {
    20
}

/// All of something, in thousandths.
pub const WHOLE: u16 = 1_000;

/// A region's or zone's share of new flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Region or zone.
    pub name: Name,
    /// In thousandths, above 0.
    pub permille: u16,
}

/// Where a host is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locality {
    /// Region.
    pub region: Name,
    /// Zone within it.
    pub zone: Name,
}

impl Default for Locality {
    fn default() -> Self {
        let name: Name = "default".parse().expect("it is a word of letters");
        Self { region: name.clone(), zone: name }
    }
}

/// What the policy has decided for a service on a host: how new flows are spread over regions, zones and versions.
/// `compile` makes weights of it, of those backends that take flows at that moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionShares {
    /// Regions with a share.
    pub shares: Vec<Share>,
    /// Zones of the own region with a share of that; if empty, all by weight.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<Share>,
    /// Regions in the order in which they stand in when none of `shares` has a backend left.
    #[serde(default)]
    pub order: Vec<Name>,
    /// A new version of the model, while it has a share of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

/// A new version's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// Its share of new flows, in thousandths.
    pub permille: u16,
    /// Backends whose replicas run it.
    pub backends: BTreeSet<Name>,
}
