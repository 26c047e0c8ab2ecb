//! Decides by votes of several hosts whether a region is down. Pure; called by `regions`.

use crate::desired::model::Name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A host's vote on a region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// Voting host.
    pub host: String,
    /// Region of the voting host.
    pub from: Name,
    /// Whether the host sees a healthy backend in the region.
    pub is_up: bool,
}

/// Result of the votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Agreed {
    /// No host votes down.
    Up,
    /// Some hosts vote down, but too few: each host judges for itself.
    Hint,
    /// Enough hosts vote down.
    Down,
}

/// Counts votes. A region is down if at least two hosts vote down, more than vote up, and they are in at least two
/// regions if hosts of two regions vote. A host that cannot reach a region may itself be disconnected.
pub fn count_votes(votes: &[Vote]) -> Agreed {
    let regions =
        |votes: &mut dyn Iterator<Item = &Vote>| votes.map(|v| v.from.clone()).collect::<BTreeSet<_>>().len();
    let downs = || votes.iter().filter(|v| !v.is_up);
    let (down, up) = (downs().count(), votes.len() - downs().count());
    let voting_regions = regions(&mut votes.iter());
    if down >= 2 && down > up && regions(&mut downs()) >= voting_regions.min(2) {
        Agreed::Down
    } else if down > 0 {
        Agreed::Hint
    } else {
        Agreed::Up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_vantage_points_of_two_regions_must_agree() {
        let agreed = |votes: &[(&str, bool)]| {
            let vote = |(i, &(from, is_up)): (usize, &(&str, bool))| Vote {
                host: format!("h{i}"),
                from: from.parse().unwrap(),
                is_up,
            };
            count_votes(&votes.iter().enumerate().map(vote).collect::<Vec<_>>())
        };
        assert_eq!(agreed(&[]), Agreed::Up);
        assert_eq!(agreed(&[("eu", true), ("us", true)]), Agreed::Up);
        assert_eq!(agreed(&[("eu", false)]), Agreed::Hint, "a single host may itself be disconnected");
        assert_eq!(
            agreed(&[("eu", false), ("eu", false)]),
            Agreed::Down,
            "the other region's hosts are gone too"
        );
        assert_eq!(agreed(&[("eu", false), ("us", false)]), Agreed::Down);
        assert_eq!(agreed(&[("eu", false), ("eu", false), ("us", true)]), Agreed::Hint, "us sees it");
        assert_eq!(agreed(&[("eu", false), ("eu", false), ("us", true), ("us", true)]), Agreed::Hint);
        assert_eq!(agreed(&[("eu", false), ("us", false), ("asia", true)]), Agreed::Down);
    }
}
