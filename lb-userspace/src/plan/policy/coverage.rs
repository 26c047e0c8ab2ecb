//! Where a roll-out's new version runs: by region, and in words.
//!
//! Input: a roll-out, and the replicas of each region. Output: a [`Coverage`], and whether a region lacks the version that
//! its flows are for. Pure; called by `regions`.

use crate::desired::model::{Name, Rollout, RolloutState, WHOLE, region_list};
use serde::{Deserialize, Serialize};

/// Replicas of one region, by version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionVersions {
    /// Region.
    pub region: Name,
    /// Whether the roll-out includes the region.
    pub is_included: bool,
    /// Replicas that report the new version, whether they take flows or not.
    pub new: u32,
    /// Replicas of the new version that take flows.
    pub new_ready: u32,
    /// Other replicas that take flows.
    pub old_ready: u32,
    /// Versions that these report, in order.
    pub old_versions: Vec<String>,
}

impl RegionVersions {
    /// A region without replicas.
    pub fn new(region: Name, rollout: &Rollout) -> Self {
        let is_included = rollout.includes(&region);
        Self { region, is_included, new: 0, new_ready: 0, old_ready: 0, old_versions: Vec::new() }
    }

    /// Whether no replica here takes flows of the version that all of its flows are for.
    ///
    /// The clients of region `is_home` are served by the old version until the region has got the new one. But a region that
    /// has it does not go back to the old one when these replicas are down or drained: other regions serve its clients.
    pub fn lacks_version(&self, rollout: &Rollout, is_home: bool) -> bool {
        match rollout.share_in(&self.region) {
            WHOLE => self.new_ready == 0 && (self.new > 0 || !is_home),
            0 => self.old_ready == 0 && self.new_ready > 0,
            _ => false,
        }
    }
}

/// Where the new version of a roll-out runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    /// In words.
    pub text: String,
    /// Number of regions that have a replica of the new version.
    pub with: u32,
    /// Number of regions in which the service may run and has backends.
    pub of: u32,
    /// Replicas by region, in name order.
    pub regions: Vec<RegionVersions>,
}

impl Coverage {
    /// Sums up the regions of a roll-out.
    pub fn new(rollout: &Rollout, regions: Vec<RegionVersions>) -> Self {
        let with = regions.iter().filter(|r| r.new > 0).count() as u32;
        let of = regions.len() as u32;
        let noun = if of == 1 { "region" } else { "regions" };
        let mut text = format!("{} in {with} of {of} {noun}", rollout.version);
        if rollout.state != RolloutState::Aborted {
            for (place, names) in by_finding(rollout, &regions) {
                text.push_str("; ");
                text.push_str(&place.describe(rollout, &names));
            }
        }
        Self { text, with, of, regions }
    }

    /// Whether the new version is meant to get all flows, and some region has no replica that takes them.
    pub fn is_incomplete(&self, rollout: &Rollout) -> bool {
        rollout.state == RolloutState::Promoted
            && self.regions.iter().any(|r| rollout.includes(&r.region) && r.new_ready == 0)
    }
}

/// Why a region does not serve the new version.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Gap {
    /// It has only other versions.
    Missing(String),
    /// It has the new version, on replicas that take no flows.
    Unready,
    /// The roll-out does not include it yet.
    Waits(String),
}

impl Gap {
    fn of(rollout: &Rollout, region: &RegionVersions) -> Option<Self> {
        let serves = match (region.old_ready, region.old_versions.is_empty()) {
            (0, _) => "nothing".to_owned(),
            (_, true) => "the old version".to_owned(),
            (_, false) => region.old_versions.join(", "),
        };
        match (rollout.includes(&region.region), region.new, region.new_ready) {
            (false, ..) => Some(Self::Waits(serves)),
            (true, 0, _) => Some(Self::Missing(serves)),
            (true, _, 0) => Some(Self::Unready),
            _ => None,
        }
    }

    fn describe(&self, rollout: &Rollout, names: &[&Name]) -> String {
        let list = region_list(names.iter().copied());
        let (s, is) = if names.len() == 1 { ("s", "is") } else { ("", "are") };
        match self {
            Self::Missing(serves) => format!("{list} still serve{s} {serves}"),
            Self::Unready => format!("no replica of {} takes flows in {list}", rollout.version),
            Self::Waits(serves) => format!("{list} {is} not included yet, and serve{s} {serves}"),
        }
    }
}

/// Regions that do not serve the new version, by the reason; in the order of each reason's first region.
fn by_finding<'a>(rollout: &Rollout, regions: &'a [RegionVersions]) -> Vec<(Gap, Vec<&'a Name>)> {
    let mut found: Vec<(Gap, Vec<&Name>)> = Vec::new();
    for region in regions {
        let Some(finding) = Gap::of(rollout, region) else { continue };
        match found.iter_mut().find(|(known, _)| *known == finding) {
            Some((_, names)) => names.push(&region.region),
            None => found.push((finding, vec![&region.region])),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rollout(more: serde_json::Value) -> Rollout {
        let mut all = json!({"model": "m", "version": "v2", "permille": 50, "state": "promoted"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    /// A region with replicas: of the new version, how many of them take flows, and of v1.
    fn region(name: &str, new: u32, new_ready: u32, old_ready: u32) -> RegionVersions {
        let old_versions = if old_ready > 0 { vec!["v1".to_owned()] } else { Vec::new() };
        RegionVersions {
            new,
            new_ready,
            old_ready,
            old_versions,
            ..RegionVersions::new(name.parse().unwrap(), &rollout(json!({})))
        }
    }

    #[test]
    fn regions_without_the_version_are_named() {
        let text =
            |rollout: &Rollout, regions: &[RegionVersions]| Coverage::new(rollout, regions.to_vec()).text;
        let (all, east) = (rollout(json!({})), rollout(json!({"regions": ["east"], "state": "running"})));
        let (e, n, w) = (region("east", 1, 1, 1), region("north", 0, 0, 2), region("west", 2, 2, 0));
        let three = [e.clone(), n.clone(), w.clone()];
        assert_eq!(text(&all, &three), "v2 in 2 of 3 regions; north still serves v1");
        assert_eq!(text(&all, &[e.clone(), w.clone()]), "v2 in 2 of 2 regions");
        assert_eq!(
            text(&all, &[n.clone(), region("south", 0, 0, 1), w.clone()]),
            "v2 in 1 of 3 regions; north, south still serve v1"
        );
        assert_eq!(
            text(&all, &[region("east", 1, 0, 1), w.clone()]),
            "v2 in 2 of 2 regions; no replica of v2 takes flows in east"
        );
        assert_eq!(
            text(&east, &three),
            "v2 in 2 of 3 regions; north is not included yet, and serves v1; west is not included yet, and serves \
             nothing"
        );
        let aborted = rollout(json!({"state": "aborted"}));
        assert_eq!(text(&aborted, &three), "v2 in 2 of 3 regions", "it gets nothing anywhere");
        let incomplete = |rollout: &Rollout, regions: &[RegionVersions]| {
            Coverage::new(rollout, regions.to_vec()).is_incomplete(rollout)
        };
        assert!(incomplete(&all, &three));
        assert!(!incomplete(&all, &[e.clone(), w.clone()]));
        assert!(incomplete(&all, &[region("east", 1, 0, 1), w]), "its replicas may be down");
        assert!(!incomplete(&east, &three), "it runs: nobody said that it has everything");
    }

    #[test]
    fn a_region_that_has_the_version_does_not_go_back_to_the_old_one() {
        let (all, canary, aborted) =
            (rollout(json!({})), rollout(json!({"state": "running"})), rollout(json!({"state": "aborted"})));
        let only_old = region("north", 0, 0, 2);
        assert!(!only_old.lacks_version(&all, true), "its own clients get what it has");
        assert!(only_old.lacks_version(&all, false), "no room for others");
        let drained = region("east", 1, 0, 1);
        assert!(drained.lacks_version(&all, true) && drained.lacks_version(&all, false));
        assert!(!drained.lacks_version(&canary, true), "most flows are for the old version");
        assert!(!drained.lacks_version(&aborted, true));
        let only_new = region("west", 2, 2, 0);
        assert!(!only_new.lacks_version(&all, false));
        assert!(only_new.lacks_version(&aborted, true), "the version that was aborted is all that it has");
        let other = rollout(json!({"regions": ["east"]}));
        assert!(!region("north", 1, 0, 1).lacks_version(&other, true), "not included: it serves the old one");
    }
}
