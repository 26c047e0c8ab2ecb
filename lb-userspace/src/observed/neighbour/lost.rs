//! Which addresses have been out of reach for so long that they count as unreachable. Pure; time is an argument.

use super::table::NoHop;
use std::{collections::BTreeMap, net::IpAddr, time::Duration};
use tokio::time::Instant;

/// How long a next hop may be missing until its backends count as unreachable: a neighbour that was flushed is back sooner.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(2);

/// Addresses that are out of reach, and since when.
#[derive(Debug, Default)]
pub struct Lost {
    since: BTreeMap<IpAddr, Instant>,
}

impl Lost {
    /// Notes which addresses have no next hop now. Returns those that count as unreachable, and why.
    pub fn update(&mut self, missing: &BTreeMap<IpAddr, NoHop>, now: Instant) -> BTreeMap<IpAddr, String> {
        let is_lost = |address: &IpAddr| missing.get(address).is_some_and(|no| no.is_unreachable);
        self.since.retain(|address, _| is_lost(address));
        let mut found = BTreeMap::new();
        for (address, no) in missing.iter().filter(|(_, no)| no.is_unreachable) {
            if *self.since.entry(*address).or_insert(now) + UNREACHABLE_AFTER <= now {
                found.insert(*address, no.why.clone());
            }
        }
        found
    }

    /// When the next address counts as unreachable, if one will.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        self.since.values().map(|since| *since + UNREACHABLE_AFTER).filter(|at| *at > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_unreachable_after_a_while_and_no_longer_than_that() {
        let (mut lost, start) = (Lost::default(), Instant::now());
        let [near, far]: [IpAddr; 2] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().expect("an address"));
        let no = |is_unreachable| NoHop { why: "no route".to_owned(), is_unreachable };
        let missing = BTreeMap::from([(near, no(true)), (far, no(false))]);
        let at = |ms| start + Duration::from_millis(ms);
        assert!(lost.update(&missing, at(0)).is_empty());
        assert_eq!(lost.next(at(0)), Some(at(2_000)));
        assert!(lost.update(&missing, at(1_999)).is_empty());
        assert_eq!(lost.update(&missing, at(2_000)), BTreeMap::from([(near, "no route".to_owned())]));
        assert_eq!(lost.next(at(2_000)), None);
        assert!(lost.update(&BTreeMap::new(), at(3_000)).is_empty(), "it is back");
        assert!(lost.update(&missing, at(3_100)).is_empty(), "the time begins anew");
    }
}
