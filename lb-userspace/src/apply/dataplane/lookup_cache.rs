//! Writer of the tables that spare most packets a hash map lookup ([`lb_common::exact`]): updated together with
//! `SERVICE_INDEX` and `VIPS`, of which they are a subset.
//!
//! Input: the writes to those two maps. Output: lines of exact ports, and bits of addresses, in memory shared with the
//! program. Used by [`super::Dataplane`] only.

use super::{DataplaneError, map_array, mapped::MappedArray};
use aya::{
    Ebpf,
    maps::{HashMap as KernelMap, MapData},
};
use lb_common::{
    Address, ServiceKey, Vip, VipKey, exact, names,
    slot::{LINE, Line},
};
use std::collections::{HashMap, HashSet};

/// Lookup cache of a loaded program: both tables.
pub(super) struct LookupCache {
    lines: MappedArray<exact::ExactLine>,
    filter: MappedArray<Line>,
    vips: HashSet<Address>,
    /// Number of VIPs for each bit of the filter.
    by_bit: HashMap<u32, u32>,
}

impl LookupCache {
    /// Tables of a newly loaded program: empty, and not used yet.
    pub fn new(lines: MappedArray<exact::ExactLine>, filter: MappedArray<Line>) -> Self {
        Self { lines, filter, vips: HashSet::new(), by_bit: HashMap::new() }
    }

    /// Fills the lookup cache from the adopted maps.
    pub fn fill(
        bpf: &mut Ebpf,
        service_index: &KernelMap<MapData, ServiceKey, u32>,
        vips: &KernelMap<MapData, VipKey, Vip>,
    ) -> Result<Self, DataplaneError> {
        let map = |map| move |source| DataplaneError::Map { map, source };
        let mut lookup_cache = Self::new(map_array(bpf, names::EXACT)?, map_array(bpf, names::VIP_FILTER)?);
        for key in vips.keys() {
            lookup_cache.add_vip(key.map_err(map(names::VIPS))?.vip)?;
        }
        lookup_cache.arm()?;
        // Last: packets to a cached port skip the lookup that tells whether their source is a VIP.
        for entry in service_index.iter() {
            let (key, index) = entry.map_err(map(names::SERVICE_INDEX))?;
            lookup_cache.set(&key, Some(index))?;
        }
        Ok(lookup_cache)
    }

    /// Tells the program that all VIPs have been added: from now on, addresses outside the filter skip the lookup.
    pub fn arm(&mut self) -> Result<(), DataplaneError> {
        self.set_word(exact::FILTER_ARMED, |_| 1)
    }

    /// Points an exact port at a service, or removes it. Where its line is full, packets find it in `SERVICE_INDEX`.
    pub fn set(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError> {
        let (index, entry) = exact::entry(key, service.unwrap_or_default());
        let missing = || DataplaneError::Index { map: names::EXACT, index };
        let mut line = self.lines.load(index).ok_or_else(missing)?;
        let known = line.entries.iter().position(|known| known.is_of(&entry));
        let free = || line.entries.iter().position(|known| known.port_and_service == 0);
        let Some(place) = known.or_else(|| service.and_then(|_| free())) else { return Ok(()) };
        // One store takes an entry away: its other words stay until the place is used again.
        line.entries[place] =
            if service.is_some() { entry } else { exact::Entry { port_and_service: 0, ..entry } };
        if self.lines.store(index, &line) { Ok(()) } else { Err(missing()) }
    }

    /// Adds a VIP. Call it before packets can find the VIP.
    pub fn add_vip(&mut self, vip: Address) -> Result<(), DataplaneError> {
        if self.vips.insert(vip) {
            let bit = exact::filter_bit(exact::words(&vip));
            *self.by_bit.entry(bit).or_default() += 1;
            self.set_word(bit / 32, |word| word | 1 << (bit % 32))?;
        }
        Ok(())
    }

    /// Removes a VIP. Call it when packets can no longer find the VIP.
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

    fn lookup_cache() -> LookupCache {
        LookupCache::new(MappedArray::private(exact::LINES), MappedArray::private(exact::FILTER_WORDS / LINE))
    }

    fn key(vip: Address, port: u16) -> ServiceKey {
        ServiceKey { vip, port: Be16::new(port), protocol: TCP, pad: 0 }
    }

    fn vip(n: u32) -> Address {
        let [_, a, b, c] = n.to_be_bytes();
        mapped([10, a, b, c])
    }

    /// Looks a port up as a program does.
    fn find(lookup_cache: &LookupCache, key: &ServiceKey) -> Option<u32> {
        let (line, wanted) = exact::entry(key, 0);
        let line = lookup_cache.lines.load(line).expect("inside");
        let entry = line.entries.iter().find(|entry| entry.is_of(&wanted))?;
        Some((entry.port_and_service >> 32) as u32)
    }

    fn may_be_vip(lookup_cache: &LookupCache, vip: &Address) -> bool {
        let bit = exact::filter_bit(exact::words(vip));
        let line = lookup_cache.filter.load(bit / 32 / LINE).expect("inside");
        line.words[(bit / 32 % LINE) as usize] >> (bit % 32) & 1 != 0
    }

    #[test]
    fn ports_come_change_and_go() {
        let mut lookup_cache = lookup_cache();
        let (a, b) = (key(vip(1), 80), key(vip(1), 81));
        lookup_cache.set(&a, Some(5)).unwrap();
        lookup_cache.set(&b, Some(6)).unwrap();
        assert_eq!((find(&lookup_cache, &a), find(&lookup_cache, &b)), (Some(5), Some(6)));
        lookup_cache.set(&a, Some(7)).unwrap();
        lookup_cache.set(&b, None).unwrap();
        lookup_cache.set(&b, None).unwrap();
        assert_eq!((find(&lookup_cache, &a), find(&lookup_cache, &b)), (Some(7), None));
    }

    /// Of an entry that is removed, a program sees all or nothing: never the port without its VIP.
    #[test]
    fn a_removal_is_one_store() {
        let mut lookup_cache = lookup_cache();
        let key = key(vip(1), 80);
        lookup_cache.set(&key, Some(5)).unwrap();
        let (line, entry) = exact::entry(&key, 5);
        let before = lookup_cache.lines.load(line).expect("inside");
        lookup_cache.set(&key, None).unwrap();
        let after = lookup_cache.lines.load(line).expect("inside");
        let place = before.entries.iter().position(|known| *known == entry).expect("it was written");
        assert_eq!(after.entries[place], exact::Entry { port_and_service: 0, ..entry });
    }

    #[test]
    fn a_full_line_leaves_the_rest_to_the_index_and_takes_them_later() {
        let mut lookup_cache = lookup_cache();
        let line = exact::entry(&key(vip(0), 80), 0).0;
        let same: Vec<ServiceKey> =
            (0..).map(|n| key(vip(n), 80)).filter(|key| exact::entry(key, 0).0 == line).take(3).collect();
        for (service, key) in (1..).zip(&same) {
            lookup_cache.set(key, Some(service)).unwrap();
        }
        let found: Vec<_> = same.iter().map(|key| find(&lookup_cache, key)).collect();
        assert_eq!(found, [Some(1), Some(2), None]);
        lookup_cache.set(&same[0], None).unwrap();
        lookup_cache.set(&same[2], Some(3)).unwrap();
        let found: Vec<_> = same.iter().map(|key| find(&lookup_cache, key)).collect();
        assert_eq!(found, [None, Some(2), Some(3)]);
    }

    #[test]
    fn nearly_all_of_as_many_services_as_there_can_be_find_room() {
        let mut lookup_cache = lookup_cache();
        let keys: Vec<ServiceKey> = (0..lb_common::limits::SERVICES).map(|n| key(vip(n), 443)).collect();
        for key in &keys {
            lookup_cache.set(key, Some(1)).unwrap();
        }
        let found = keys.iter().filter(|key| find(&lookup_cache, key).is_some()).count();
        assert!(found * 100 > keys.len() * 98, "{found} of {}", keys.len());
    }

    #[test]
    fn a_bit_stays_while_a_vip_has_it() {
        let mut lookup_cache = lookup_cache();
        let first = vip(0);
        let bit = exact::filter_bit(exact::words(&first));
        let second =
            (1..).map(vip).find(|other| exact::filter_bit(exact::words(other)) == bit).expect("many have it");
        lookup_cache.add_vip(first).unwrap();
        lookup_cache.add_vip(first).unwrap();
        lookup_cache.add_vip(second).unwrap();
        lookup_cache.remove_vip(first).unwrap();
        lookup_cache.remove_vip(first).unwrap();
        assert!(may_be_vip(&lookup_cache, &second));
        lookup_cache.remove_vip(second).unwrap();
        assert!(!may_be_vip(&lookup_cache, &second));
        let armed = |lookup_cache: &LookupCache| {
            lookup_cache.filter.load(exact::FILTER_ARMED / LINE).map(|line| line.words[0])
        };
        assert_eq!(armed(&lookup_cache), Some(0));
        lookup_cache.arm().unwrap();
        assert_eq!(armed(&lookup_cache), Some(1));
    }
}
