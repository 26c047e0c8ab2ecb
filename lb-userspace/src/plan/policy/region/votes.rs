//! Whether a region is down, from what several hosts see of it. Pure; called by `regions`.

use crate::desired::model::Name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What one host sees of a region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// Who looks.
    pub host: String,
    /// From which region.
    pub from: Name,
    /// Whether some checked backend there is healthy.
    pub is_up: bool,
}

/// What comes of the votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Agreed {
    /// Nobody says that it is down.
    Up,
    /// Somebody does: a hint, by which each host judges for itself only.
    Hint,
    /// Enough do.
    Down,
}

/// A region is down when at least two hosts say so, more than say the contrary, and from at least two regions where
/// hosts of two regions look. A host that cannot reach a region may itself be what is cut off.
pub fn agreed(votes: &[Vote]) -> Agreed {
    let regions =
        |votes: &mut dyn Iterator<Item = &Vote>| votes.map(|v| v.from.clone()).collect::<BTreeSet<_>>().len();
    let downs = || votes.iter().filter(|v| !v.is_up);
    let (down, up) = (downs().count(), votes.len() - downs().count());
    let looking = regions(&mut votes.iter());
    if down >= 2 && down > up && regions(&mut downs()) >= looking.min(2) {
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
            agreed(&votes.iter().enumerate().map(vote).collect::<Vec<_>>())
        };
        assert_eq!(agreed(&[]), Agreed::Up);
        assert_eq!(agreed(&[("eu", true), ("us", true)]), Agreed::Up);
        assert_eq!(agreed(&[("eu", false)]), Agreed::Hint, "one alone may be what is cut off");
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
