//! Divides the free slots of all places among the places that ask for them.
//!
//! Input: demand, capacity and backlog of each place, and whom each prefers. Output: slots given to each, and what found
//! no room. Pure, and equal on all hosts that see the same; called by `spill`.
//!
//! * All places are filled to one level: the middle between the two thresholds, or as far above it as the whole demand
//!   requires, at most the whole capacity.
//! * A place that asks gives nothing, so no load moves in a circle.
//! * Each asks the nearest place with room. A place that is asked for more than it has gives each the same, but no more
//!   than it asks for (max-min fairness); the rest asks the next.

/// A place as input of [`allocate`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Site {
    /// Slots that its clients need.
    pub demand: f64,
    /// Slots that it has.
    pub capacity: f64,
    /// Slots that its backlog needs until it is gone.
    pub drain: f64,
    /// Whether it sends flows elsewhere, or is about to.
    pub asks: bool,
    /// Whether others may send flows to it.
    pub gives: bool,
    /// Indexes of the other places, in the order in which it asks them.
    pub order: Vec<usize>,
}

/// Result of [`allocate`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Allocation {
    /// Slots by the place that asked and the place that gives.
    pub given: Vec<Vec<f64>>,
    /// Slots that each asked for in vain.
    pub unplaced: Vec<f64>,
    /// Whether a place was asked for more than it has.
    pub is_contended: Vec<bool>,
}

/// Smallest amount of slots that is moved.
const LEAST: f64 = 1e-6;
/// A place with a backlog keeps at least this part of its slots for new flows.
const LEAST_KEPT: f64 = 0.05;

/// Divides the free slots. `low` is the level of use that is aimed at, and `high` the level up to which others are
/// filled while a backlog drains.
pub(super) fn allocate(sites: &[Site], low: f64, high: f64) -> Allocation {
    let demand: f64 = sites.iter().map(|s| s.demand).sum();
    let capacity: f64 = sites.iter().filter(|s| s.gives || s.asks).map(|s| s.capacity).sum();
    let whole = high.max(1.0);
    let level = if capacity > 0.0 { (demand / capacity).clamp(low, whole) } else { whole };
    let is_draining = sites.iter().any(|s| s.asks && s.drain > 0.0);
    let fills = if is_draining { level.max(high) } else { level };
    let excess = |s: &Site| {
        let kept = (level * s.capacity - s.drain).max(LEAST_KEPT * s.capacity);
        if s.asks { (s.demand - kept).max(0.0) } else { 0.0 }
    };
    let mut left: Vec<f64> = sites.iter().map(excess).collect();
    let room = |(s, &asked): (&Site, &f64)| match s.gives && asked <= LEAST {
        true => (fills * s.capacity - s.drain - s.demand).max(0.0),
        false => 0.0,
    };
    let mut rooms: Vec<f64> = sites.iter().zip(&left).map(room).collect();
    let count = sites.len();
    let mut result = Allocation {
        given: vec![vec![0.0; count]; count],
        unplaced: Vec::new(),
        is_contended: vec![false; count],
    };
    // Each round satisfies a place that asks, or empties a place that gives.
    for _ in 0..2 * count {
        let mut asks: Vec<Vec<usize>> = vec![Vec::new(); count];
        for (from, site) in sites.iter().enumerate().filter(|(from, _)| left[*from] > LEAST) {
            if let Some(&to) = site.order.iter().find(|&&to| rooms[to] > LEAST && to != from) {
                asks[to].push(from);
            }
        }
        if asks.iter().all(Vec::is_empty) {
            break;
        }
        for (to, from) in asks.into_iter().enumerate().filter(|(_, from)| !from.is_empty()) {
            grant(from, rooms.get_mut(to).expect("it is one of the places"), &mut left, |f, slots| {
                result.given[f][to] += slots;
            });
        }
    }
    for (to, contended) in result.is_contended.iter_mut().enumerate() {
        let givers = result.given.iter().filter(|row| row[to] > LEAST).count();
        *contended = givers > 1 && rooms[to] <= LEAST;
    }
    result.unplaced = left;
    result
}

/// Divides the room of one place among those that ask for it: the smallest requests first, each at most an equal part.
fn grant(mut from: Vec<usize>, room: &mut f64, left: &mut [f64], mut note: impl FnMut(usize, f64)) {
    from.sort_by(|&a, &b| left[a].total_cmp(&left[b]));
    let count = from.len();
    for (i, f) in from.into_iter().enumerate() {
        let granted = left[f].min(*room / (count - i) as f64);
        note(f, granted);
        left[f] -= granted;
        *room -= granted;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(demand: f64, capacity: f64, order: &[usize]) -> Site {
        let asks = demand >= 0.9 * capacity;
        Site { demand, capacity, drain: 0.0, asks, gives: true, order: order.to_vec() }
    }

    #[test]
    fn free_slots_are_shared_by_those_that_ask() {
        let sites = [site(20.0, 10.0, &[1, 2]), site(2.0, 10.0, &[0, 2]), site(15.0, 10.0, &[1, 0])];
        let got = allocate(&sites, 0.8, 0.9);
        let (first, third) = (got.given[0][1], got.given[2][1]);
        assert!((first + third - 8.0).abs() < 0.01, "all that is free is used: {got:?}");
        assert!((first - third).abs() < 0.01, "both lack more than half of it: {got:?}");
        assert!((got.unplaced.iter().sum::<f64>() - 7.0).abs() < 0.01, "{got:?}");
        assert!(got.is_contended[1] && !got.is_contended[0]);
    }

    #[test]
    fn all_are_filled_to_one_level_that_is_as_low_as_the_demand_allows() {
        let sites = [site(14.0, 8.0, &[1, 2]), site(0.0, 8.0, &[]), site(0.0, 8.0, &[])];
        let got = allocate(&sites, 0.8, 0.9);
        assert!((got.given[0][1] - 6.4).abs() < 0.01 && (got.given[0][2] - 1.2).abs() < 0.01, "{got:?}");
        let sites = [site(22.0, 8.0, &[1, 2]), site(0.0, 8.0, &[]), site(0.0, 8.0, &[])];
        let got = allocate(&sites, 0.8, 0.9);
        assert!((got.given[0][1] - got.given[0][2]).abs() < 0.01, "{got:?}");
        assert!(got.unplaced.iter().all(|&u| u < 0.01), "{got:?}");
    }

    #[test]
    fn a_place_that_asks_gives_nothing() {
        let got = allocate(&[site(20.0, 10.0, &[1]), site(9.5, 10.0, &[0])], 0.8, 0.9);
        assert_eq!(got.given[1][0], 0.0, "{got:?}");
    }
}
