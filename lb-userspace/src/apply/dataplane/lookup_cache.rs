//! The tables that spare the common packet a hash map's cost ([`lb_common::exact`]): kept in step with `SERVICE_INDEX`
//! and `VIPS`, of which they say nothing that is not there.
//!
//! In: what is written to those two. Out: lines of exact ports, and bits of addresses, in memory shared with the
//! program. Used by [`super::Dataplane`] only.

use super::{DataplaneError, mapped::MappedArray};
use lb_common::{
    Address, ServiceKey, exact, names,
    slot::{LINE, Line},
};
use std::collections::{HashMap, HashSet};

/// Both tables of a loaded program.
pub(super) struct Spared {
    lines: MappedArray<exact::Line>,
    filter: MappedArray<Line>,
    vips: HashSet<Address>,
    /// VIPs by their bit of the filter.
    by_bit: HashMap<u32, u32>,
}

impl Spared {
    /// Both tables of a program that is newly loaded: empty, and nobody relies on them yet.
    pub fn new(lines: MappedArray<exact::Line>, filter: MappedArray<Line>) -> Self {
        Self { lines, filter, vips: HashSet::new(), by_bit: HashMap::new() }
    }

    /// Tells the program that all VIPs have been added: what is in the filter no more is passed on at once.
    pub fn arm(&mut self) -> Result<(), DataplaneError> {
        self.set_word(exact::FILTER_ARMED, |_| 1)
    }

    /// Points an exact port at a service, or at none. Where its line has no room, packets find it the long way.
    pub fn set(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError> {
        let (index, entry) = exact::entry(key, service.unwrap_or_default());
        let missing = || DataplaneError::Index { map: names::EXACT, index };
        let mut line = self.lines.load(index).ok_or_else(missing)?;
        let known = line.entries.iter().position(|known| known.is_of(&entry));
        let free = || line.entries.iter().position(|known| known.port_and_service == 0);
        let Some(place) = known.or_else(|| service.and_then(|_| free())) else { return Ok(()) };
        line.entries[place] = if service.is_some() { entry } else { exact::Entry::default() };
        if self.lines.store(index, &line) { Ok(()) } else { Err(missing()) }
    }

    /// Adds a VIP. To be called before packets may find it.
    pub fn add_vip(&mut self, vip: Address) -> Result<(), DataplaneError> {
        if self.vips.insert(vip) {
            let bit = exact::filter_bit(exact::words(&vip));
            *self.by_bit.entry(bit).or_default() += 1;
            self.set_word(bit / 32, |word| word | 1 << (bit % 32))?;
        }
        Ok(())
    }

    /// Takes a VIP out. To be called when packets find it no more.
    pub fn remove_vip(&mut self, vip: Address) -> Result<(), DataplaneError> {
        if !self.vips.remove(&vip) {
            return Ok(());
        }
        let bit = exact::filter_bit(exact::words(&vip));
        let left = self.by_bit.entry(bit).and_modify(|n| *n -= 1).or_default();
        if *left == 0 {
            self.by_bit.remove(&bit);
            self.set_word(bit / 32, |word| word & !(1 << (bit % 32)))?;
        }
        Ok(())
    }

    fn set_word(&mut self, word: u32, change: impl FnOnce(u32) -> u32) -> Result<(), DataplaneError> {
        let index = word / LINE;
        let missing = || DataplaneError::Index { map: names::VIP_FILTER, index };
        let line = self.filter.load(index).ok_or_else(missing)?;
        let at = (word % LINE) as usize;
        if self.filter.store_u32(index, at * size_of::<u32>(), change(line.words[at])) {
            Ok(())
        } else {
            Err(missing())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::{Be16, mapped, service::TCP};

    fn spared() -> Spared {
        Spared::new(MappedArray::private(exact::LINES), MappedArray::private(exact::FILTER_WORDS / LINE))
    }

    fn key(vip: Address, port: u16) -> ServiceKey {
        ServiceKey { vip, port: Be16::new(port), protocol: TCP, pad: 0 }
    }

    fn vip(n: u32) -> Address {
        let [_, a, b, c] = n.to_be_bytes();
        mapped([10, a, b, c])
    }

    /// What a program finds.
    fn find(spared: &Spared, key: &ServiceKey) -> Option<u32> {
        let (line, wanted) = exact::entry(key, 0);
        let line = spared.lines.load(line).expect("inside");
        let entry = line.entries.iter().find(|entry| entry.is_of(&wanted))?;
        Some((entry.port_and_service >> 32) as u32)
    }

    fn may_be_vip(spared: &Spared, vip: &Address) -> bool {
        let bit = exact::filter_bit(exact::words(vip));
        let line = spared.filter.load(bit / 32 / LINE).expect("inside");
        line.words[(bit / 32 % LINE) as usize] >> (bit % 32) & 1 != 0
    }

    #[test]
    fn ports_come_change_and_go() {
        let mut spared = spared();
        let (a, b) = (key(vip(1), 80), key(vip(1), 81));
        spared.set(&a, Some(5)).unwrap();
        spared.set(&b, Some(6)).unwrap();
        assert_eq!((find(&spared, &a), find(&spared, &b)), (Some(5), Some(6)));
        spared.set(&a, Some(7)).unwrap();
        spared.set(&b, None).unwrap();
        spared.set(&b, None).unwrap();
        assert_eq!((find(&spared, &a), find(&spared, &b)), (Some(7), None));
    }

    #[test]
    fn a_full_line_leaves_the_rest_to_the_index_and_takes_them_later() {
        let mut spared = spared();
        let line = exact::entry(&key(vip(0), 80), 0).0;
        let same: Vec<ServiceKey> =
            (0..).map(|n| key(vip(n), 80)).filter(|key| exact::entry(key, 0).0 == line).take(3).collect();
        for (service, key) in (1..).zip(&same) {
            spared.set(key, Some(service)).unwrap();
        }
        let found: Vec<_> = same.iter().map(|key| find(&spared, key)).collect();
        assert_eq!(found, [Some(1), Some(2), None]);
        spared.set(&same[0], None).unwrap();
        spared.set(&same[2], Some(3)).unwrap();
        let found: Vec<_> = same.iter().map(|key| find(&spared, key)).collect();
        assert_eq!(found, [None, Some(2), Some(3)]);
    }

    #[test]
    fn nearly_all_of_as_many_services_as_there_can_be_find_room() {
        let mut spared = spared();
        let keys: Vec<ServiceKey> = (0..lb_common::limits::SERVICES).map(|n| key(vip(n), 443)).collect();
        for key in &keys {
            spared.set(key, Some(1)).unwrap();
        }
        let found = keys.iter().filter(|key| find(&spared, key).is_some()).count();
        assert!(found * 100 > keys.len() * 98, "{found} of {}", keys.len());
    }

    #[test]
    fn a_bit_stays_while_a_vip_has_it() {
        let mut spared = spared();
        let first = vip(0);
        let bit = exact::filter_bit(exact::words(&first));
        let second =
            (1..).map(vip).find(|other| exact::filter_bit(exact::words(other)) == bit).expect("many have it");
        spared.add_vip(first).unwrap();
        spared.add_vip(first).unwrap();
        spared.add_vip(second).unwrap();
        spared.remove_vip(first).unwrap();
        spared.remove_vip(first).unwrap();
        assert!(may_be_vip(&spared, &second));
        spared.remove_vip(second).unwrap();
        assert!(!may_be_vip(&spared, &second));
        let armed =
            |spared: &Spared| spared.filter.load(exact::FILTER_ARMED / LINE).map(|line| line.words[0]);
        assert_eq!(armed(&spared), Some(0));
        spared.arm().unwrap();
        assert_eq!(armed(&spared), Some(1));
    }
}
