//! A roll-out: how a new version of a model gets its share of a service's new flows.
//!
//! Pure data with its own rules. `observed::regions` finds the replicas of the version and judges them, `compile`
//! enforces the share.

use super::{
    Name,
    region::{WHOLE, list},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Formats thousandths as a percentage: `5 %`, `2.5 %`.
pub fn percent(permille: u16) -> String {
    match permille % 10 {
        0 => format!("{} %", permille / 10),
        tenth => format!("{}.{tenth} %", permille / 10),
    }
}

/// State of a roll-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutState {
    /// The new version has its share, and is monitored.
    Running,
    /// The new version gets all new flows.
    Promoted,
    /// The new version gets no new flows.
    Aborted,
}

impl RolloutState {
    /// Name of the state in configuration files.
    pub fn label(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Promoted => "promoted",
            Self::Aborted => "aborted",
        }
    }
}

/// A roll-out: a new version of a model gets part of a service's new flows, on the replicas that report it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// Name of the model, as replicas report it.
    pub model: String,
    /// New version, as replicas report it.
    pub version: String,
    /// Share of new flows for the new version while the roll-out runs, in thousandths.
    pub permille: u16,
    /// Regions whose replicas of the new version get flows, in the order in which they were added; all if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Name>,
    /// State of the roll-out.
    #[serde(default = "running")]
    pub state: RolloutState,
    /// Start time, in milliseconds since 1970 UTC.
    #[serde(default)]
    pub since_ms: u64,
    /// Why the roll-out is in this state.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Abort when more than this share of the new version's requests fail, in percent; 0: never.
    #[serde(default = "default_most_errors")]
    pub most_errors_percent: u8,
    /// Abort when the new version's time to first token is above this share of the old version's, in percent; 0: never.
    #[serde(default = "default_most_latency")]
    pub most_latency_percent: u32,
    /// Requests that the new version must have answered before it is judged.
    #[serde(default = "default_least_requests")]
    pub least_requests: u32,
}

impl Rollout {
    /// Share of new flows for the new version, in thousandths.
    pub fn share(&self) -> u16 {
        match self.state {
            RolloutState::Running => self.permille.min(1_000),
            RolloutState::Promoted => 1_000,
            RolloutState::Aborted => 0,
        }
    }

    /// Whether the roll-out includes a region.
    pub fn includes(&self, region: &Name) -> bool {
        self.regions.is_empty() || self.regions.contains(region)
    }

    /// Share of the new version among the new flows that a region's backends get, in thousandths.
    pub fn share_in(&self, region: &Name) -> u16 {
        if self.includes(region) { self.share() } else { 0 }
    }

    /// `v2 of llama-8b`.
    pub fn title(&self) -> String {
        format!("{} of {}", self.version, self.model)
    }

    /// `5 %`, or `5 % in east, west`.
    pub fn scope(&self) -> String {
        let share = percent(self.share());
        if self.regions.is_empty() { share } else { format!("{share} in {}", list(&self.regions)) }
    }

    /// How it differs from an earlier state, in words; of another version, it is a new roll-out.
    pub fn changes(&self, before: &Self) -> String {
        let is_same =
            (&self.model, &self.version, self.since_ms) == (&before.model, &before.version, before.since_ms);
        if !is_same {
            return format!(
                "roll-out of {} at {} replaces that of {}",
                self.title(),
                self.scope(),
                before.title()
            );
        }
        let mut changes = Vec::new();
        if self.state != before.state {
            let reason = if self.reason.is_empty() { String::new() } else { format!(" ({})", self.reason) };
            changes.push(format!("{}{reason}", self.state.label()));
        }
        if (self.permille, &self.regions) != (before.permille, &before.regions) {
            changes.push(format!("{} → {}", before.scope(), self.scope()));
        }
        for (what, from, to) in [
            ("most_errors_percent", before.most_errors_percent.into(), self.most_errors_percent.into()),
            ("most_latency_percent", before.most_latency_percent, self.most_latency_percent),
            ("least_requests", before.least_requests, self.least_requests),
        ] {
            if from != to {
                changes.push(format!("{what} {from} → {to}"));
            }
        }
        if changes.is_empty() {
            changes.push(format!("reason {:?} → {:?}", before.reason, self.reason));
        }
        format!("roll-out of {}: {}", self.title(), changes.join(", "))
    }

    pub(super) fn check(&self, setting: &mut dyn FnMut(String)) {
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.regions.iter().find(|name| !seen.insert(*name)) {
            setting(format!("rollout.regions names {twice} twice"));
        }
        for (what, text) in [("model", &self.model), ("version", &self.version)] {
            if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
                setting(format!(
                    "rollout.{what} {text:?} must have 1 to 256 printable bytes, as the replicas report it"
                ));
            }
        }
        if self.permille == 0 || self.permille > 1_000 {
            setting(format!("rollout.permille {} is out of range: 1 to 1000", self.permille));
        }
        if self.most_errors_percent > 100 {
            setting(format!("rollout.most_errors_percent {} is above 100", self.most_errors_percent));
        }
        if (1..=100).contains(&self.most_latency_percent) || self.most_latency_percent > 100_000 {
            setting(format!(
                "rollout.most_latency_percent {} must be above 100 (as slow as the old version), or 0 for never",
                self.most_latency_percent
            ));
        }
        if self.least_requests == 0 {
            setting("rollout.least_requests is 0: give at least 1".to_owned());
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

/// Share and backends of a new version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// Share of new flows, in thousandths.
    pub permille: u16,
    /// Regions with this share; in others the new version gets nothing. All if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<Name>,
    /// Backends whose replicas run the new version.
    pub backends: BTreeSet<Name>,
}

impl Canary {
    /// Share of the new version in a region, in thousandths.
    pub fn share_in(&self, region: &Name) -> u16 {
        match self.regions.is_empty() || self.regions.contains(region) {
            true => self.permille.min(WHOLE),
            false => 0,
        }
    }
}
