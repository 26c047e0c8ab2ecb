//! Regions: where backends are, where a service may run, and how its new flows are spread over them.
//!
//! Pure data with its own rules. [`crate::plan::policy::region`] decides by them, `compile` enforces them.

use super::{Backend, Canary, Name};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A region, as the operator sets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Whether the region's backends take new flows.
    #[serde(default)]
    pub state: RegionState,
}

/// Administrative state of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionState {
    /// Takes flows.
    #[default]
    Up,
    /// No new flows to any of its backends; established ones stay. Only one region may drain at a time.
    Draining,
}

/// Policy by which new flows are spread over regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionPolicy {
    /// Each host's own region first, then the nearest region with free capacity.
    #[default]
    ActiveActive,
    /// All hosts send everything to the first region of `allowed` that is up.
    ActivePassive,
    /// By `weights`, alike on all hosts.
    Weighted,
}

impl RegionPolicy {
    /// Name of the policy in configuration files.
    pub fn label(self) -> &'static str {
        match self {
            Self::ActiveActive => "active-active",
            Self::ActivePassive => "active-passive",
            Self::Weighted => "weighted",
        }
    }
}

/// Where a service may run, and how its new flows are spread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRules {
    /// Policy.
    #[serde(default)]
    pub policy: RegionPolicy,
    /// Residency: the only regions whose backends may get packets of the service; any region if none. With
    /// `active-passive`, in order of preference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<Vec<Name>>,
    /// For `weighted`: share by region; a region without a weight gets flows only when no region with a weight is up.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<Name, u32>,
    /// For `active-active`: share of the local capacity in use from which flows spill to other regions, in percent.
    #[serde(default = "default_spill_at")]
    pub spill_at_percent: u16,
    /// Local load below which spilled flows come back, in percent.
    #[serde(default = "default_spill_until")]
    pub spill_until_percent: u16,
    /// Largest share of new flows that may spill, in percent.
    #[serde(default = "default_spill_most")]
    pub spill_most_percent: u16,
    /// How long the demand must be small before a spill is reduced, in seconds.
    #[serde(default = "default_hold_s")]
    pub hold_s: u32,
    /// Whether, within the own region, the own zone is preferred by the same rule.
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
    90
}

fn default_hold_s() -> u32 {
    10
}

fn default_true() -> bool {
    true
}

impl RegionRules {
    /// Whether packets may go to this backend: its region is given and allowed.
    pub fn allows(&self, backend: &Backend) -> bool {
        match (&self.allowed, &backend.region) {
            (None, _) => true,
            (Some(allowed), Some(region)) => allowed.contains(region),
            // Residency fails closed.
            (Some(_), None) => false,
        }
    }

    /// Reports settings that contradict each other.
    pub(super) fn check(&self, setting: &mut dyn FnMut(String)) {
        let Self { policy, allowed, weights, spill_at_percent, spill_until_percent, .. } = self;
        if allowed.as_ref().is_some_and(Vec::is_empty) {
            setting(
                "regions.allowed is empty, so the service could never be served: name a region, or leave the key out for any \
                 region"
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
                "regions.policy weighted needs weights, at least one of them above 0, such as weights = {eu = 3, us = 1}"
                    .to_owned(),
            ),
            RegionPolicy::ActiveActive | RegionPolicy::ActivePassive if !weights.is_empty() => {
                setting(format!("regions.weights are for policy weighted, but the policy is {}", policy.label()));
            }
            _ => {}
        }
        if let (Some(allowed), Some(name)) =
            (allowed, weights.keys().find(|w| allowed.as_ref().is_some_and(|a| !a.contains(w))))
        {
            let allowed = list(allowed);
            setting(format!(
                "regions.weights names {name}, which is not one of the allowed regions: {allowed}"
            ));
        }
        if let Some((name, weight)) = weights.iter().find(|(_, w)| **w > 65_535) {
            setting(format!("regions.weights: {name} has {weight}, above 65535"));
        }
        if *spill_at_percent == 0 || *spill_at_percent > 1_000 {
            setting(format!("regions.spill_at_percent {spill_at_percent} is out of range: 1 to 1000"));
        }
        if spill_until_percent.saturating_add(5) > *spill_at_percent {
            setting(format!(
                "regions.spill_until_percent {spill_until_percent} must be at least 5 below spill_at_percent \
                 {spill_at_percent}, or flows would move back and forth"
            ));
        }
        if self.spill_most_percent > 100 {
            setting(format!("regions.spill_most_percent {} is above 100", self.spill_most_percent));
        }
        if self.hold_s > 86_400 {
            setting(format!("regions.hold_s {} is above 86400 (a day)", self.hold_s));
        }
    }
}

/// Joins names with commas.
pub fn list<'a>(names: impl IntoIterator<Item = &'a Name>) -> String {
    names.into_iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

/// The whole, in thousandths.
pub const WHOLE: u16 = 1_000;

/// A region's or zone's share of new flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Name of the region or zone.
    pub name: Name,
    /// Share in thousandths, above 0.
    pub permille: u16,
}

/// Region and zone of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locality {
    /// Region.
    pub region: Name,
    /// Zone within the region.
    pub zone: Name,
}

impl Default for Locality {
    fn default() -> Self {
        let name: Name = "default".parse().expect("it is a word of letters");
        Self { region: name.clone(), zone: name }
    }
}

/// Decision of the policy for a service on a host: how new flows are spread over regions, zones and versions.
/// `compile` turns it into weights of the backends that take flows at that time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionShares {
    /// Shares of regions.
    pub shares: Vec<Share>,
    /// Shares of zones within the own region; if empty, all of its backends by weight.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<Share>,
    /// Regions in the order in which they replace those of `shares` when none of them has a backend left.
    #[serde(default)]
    pub order: Vec<Name>,
    /// The new version of the model, while it has a share of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}
