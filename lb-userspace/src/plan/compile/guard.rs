//! Contents of the guard maps: entries, bitmaps, and prefix lengths in use.
//!
//! Input: prefixes and their verdicts, one by one. Output: the words of the maps of [`lb_common::guard`]. Pure. Called by
//! the dataplane's writer, which keeps one [`GuardTable`] beside the maps.

use ipnet::IpNet;
use lb_common::{
    guard::{GuardKey, Lengths, block, level, verdict},
    mapped,
};
use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

/// All prefixes with their verdicts (see [`verdict`]), and derived counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardTable {
    v4: BTreeMap<(u32, u8), u32>,
    v6: BTreeMap<(u128, u8), u32>,
    /// Number of prefixes by length.
    v4_lengths: BTreeMap<u8, u32>,
    v6_lengths: BTreeMap<u8, u32>,
    /// Number of prefixes by the filter bit that they set.
    filter: HashMap<u32, u32>,
}

/// A range of blocks of 256 IPv4 addresses.
pub type Blocks = RangeInclusive<u32>;

/// All blocks.
pub const ALL_BLOCKS: Blocks = 0..=(1 << block::BITS) - 1;

/// Key of a prefix.
pub fn key_of(net: IpNet) -> GuardKey {
    match net {
        IpNet::V4(net) => {
            GuardKey { address: mapped(net.network().octets()), bits: 96 + u32::from(net.prefix_len()) }
        }
        IpNet::V6(net) => GuardKey { address: net.network().octets(), bits: net.prefix_len().into() },
    }
}

/// Prefix of a key; None if the key is not valid.
pub fn net_of(key: &GuardKey) -> Option<IpNet> {
    let v6 = Ipv6Addr::from(key.address);
    match v6.to_ipv4_mapped() {
        Some(v4) if key.bits >= 96 => {
            ipnet::Ipv4Net::new(v4, u8::try_from(key.bits - 96).ok()?).ok().map(IpNet::V4)
        }
        _ => ipnet::Ipv6Net::new(v6, u8::try_from(key.bits).ok()?).ok().map(IpNet::V6),
    }
}

/// Increments or decrements a count; removes it at zero.
fn adjust_count<K: Ord + Copy>(counts: &mut BTreeMap<K, u32>, key: K, up: bool) {
    let n = counts.entry(key).or_default();
    *n = if up { *n + 1 } else { n.saturating_sub(1) };
    if *n == 0 {
        counts.remove(&key);
    }
}

impl GuardTable {
    /// Number of prefixes.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there are no prefixes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Verdict of a prefix, if it is in the table.
    pub fn get(&self, net: IpNet) -> Option<u32> {
        match net {
            IpNet::V4(n) => self.v4.get(&(n.network().into(), n.prefix_len())).copied(),
            IpNet::V6(n) => self.v6.get(&(n.network().into(), n.prefix_len())).copied(),
        }
    }

    /// All prefixes.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.v4.keys().filter_map(|(address, bits)| {
            ipnet::Ipv4Net::new(Ipv4Addr::from(*address), *bits).ok().map(IpNet::V4)
        });
        let v6 = self.v6.keys().filter_map(|(address, bits)| {
            ipnet::Ipv6Net::new(Ipv6Addr::from(*address), *bits).ok().map(IpNet::V6)
        });
        v4.chain(v6)
    }

    /// Sets a prefix's verdict; None removes the prefix.
    pub fn set(&mut self, net: IpNet, verdict: Option<u32>) {
        match net {
            IpNet::V4(n) => {
                let key = (n.network().into(), n.prefix_len());
                let before = match verdict {
                    Some(verdict) => self.v4.insert(key, verdict),
                    None => self.v4.remove(&key),
                };
                if before.is_some() != verdict.is_some() {
                    adjust_count(&mut self.v4_lengths, key.1, verdict.is_some());
                }
            }
            IpNet::V6(n) => {
                let key = (n.network().into(), n.prefix_len());
                let before = match verdict {
                    Some(verdict) => self.v6.insert(key, verdict),
                    None => self.v6.remove(&key),
                };
                if before.is_some() != verdict.is_some() {
                    adjust_count(&mut self.v6_lengths, key.1, verdict.is_some());
                    self.adjust_filter_bit(filter_bit(net), verdict.is_some());
                }
            }
        }
    }

    fn adjust_filter_bit(&mut self, bit: Option<u32>, up: bool) {
        let Some(bit) = bit else { return };
        let n = self.filter.entry(bit).or_default();
        *n = if up { *n + 1 } else { n.saturating_sub(1) };
        if *n == 0 {
            self.filter.remove(&bit);
        }
    }

    /// Lengths of IPv4 prefixes that are longer than a block, see [`lb_common::guard::GuardState::v4`].
    pub fn v4_mask(&self) -> u32 {
        let long = self.v4_lengths.keys().filter(|bits| u32::from(**bits) > block::BITS);
        long.fold(0, |mask, bits| mask | 1 << (u32::from(*bits) - block::BITS - 1))
    }

    /// Lengths of IPv6 prefixes, longest first.
    pub fn v6_lengths(&self) -> Lengths {
        let mut lengths = Lengths::NONE;
        for bits in self.v6_lengths.keys().rev() {
            add_length(&mut lengths, *bits);
        }
        lengths
    }

    /// One word of the filter.
    pub fn filter_word(&self, word: u32) -> u32 {
        (0..32).fold(0, |bits, i| bits | u32::from(self.filter.contains_key(&(word * 32 + i))) << i)
    }

    /// The whole filter.
    pub fn filter_words(&self) -> Vec<u32> {
        let mut words = vec![0u32; level::WORDS as usize];
        for bit in self.filter.keys() {
            words[(bit / 32) as usize] |= 1 << (bit % 32);
        }
        words
    }

    /// State bits of these blocks, see [`block`].
    pub fn blocks(&self, range: Blocks) -> Vec<u8> {
        /// Flags collected per block: as in [`block`], and whether it contains longer prefixes.
        const DENY: u8 = 1;
        const LONG_DENY: u8 = 2;
        const LONG: u8 = 4;
        let (first, last) = (*range.start(), *range.end());
        let mut found = vec![0u8; (last - first + 1) as usize];
        let mut fill = |address: u32, bits: u8, verdict: u32| {
            let from = (address >> 8).max(first);
            let to = ((address | (u32::MAX.checked_shr(bits.into()).unwrap_or(0))) >> 8).min(last);
            if from <= to {
                let value = if verdict == verdict::DENY { DENY } else { 0 };
                found[(from - first) as usize..=(to - first) as usize].fill(value);
            }
        };
        // Fill with prefixes that begin before the range and reach into it, shortest first; then with those that begin
        // in it. Prefixes are nested or disjoint, so each one overwrites those that contain it.
        for bits in self.v4_lengths.keys().filter(|bits| u32::from(**bits) <= block::BITS) {
            let address = (first << 8) & !u32::MAX.checked_shr((*bits).into()).unwrap_or(0);
            if let Some(verdict) = self.v4.get(&(address, *bits)) {
                fill(address, *bits, *verdict);
            }
        }
        let within = || self.v4.range((first << 8, 0)..=(last << 8 | 0xff, u8::MAX));
        for ((address, bits), verdict) in within().filter(|((_, bits), _)| u32::from(*bits) <= block::BITS) {
            fill(*address, *bits, *verdict);
        }
        for ((address, _), verdict) in within().filter(|((_, bits), _)| u32::from(*bits) > block::BITS) {
            found[((address >> 8) - first) as usize] |=
                LONG | if *verdict == verdict::DENY { LONG_DENY } else { 0 };
        }
        for state in &mut found {
            let needs_lookup = *state & LONG_DENY != 0 || *state & (DENY | LONG) == DENY | LONG;
            *state = *state & DENY | if needs_lookup { block::ASK as u8 } else { 0 };
        }
        found
    }
}

/// Appends a length; earlier ones are longer.
pub fn add_length(lengths: &mut Lengths, bits: u8) {
    let number = level::of(bits.into()) / 16;
    lengths.bits[lengths.count as usize] = [bits, number as u8];
    lengths.count += 1;
    lengths.levels |= 1 << number;
}

/// Blocks whose bits depend on a prefix; None for IPv6.
pub fn blocks_of(net: IpNet) -> Option<Blocks> {
    let IpNet::V4(net) = net else { return None };
    Some(u32::from(net.network()) >> 8..=u32::from(net.broadcast()) >> 8)
}

/// Bit of the filter that a prefix sets; None for IPv4, and for lengths without a filter.
pub fn filter_bit(net: IpNet) -> Option<u32> {
    let IpNet::V6(net) = net else { return None };
    match level::of(net.prefix_len().into()) {
        0 => None,
        level => Some(level::bit((u128::from(net.network()) >> 64) as u64, level)),
    }
}

/// Sorts ranges of blocks, and joins those that touch.
pub fn join_ranges(mut ranges: Vec<Blocks>) -> Vec<Blocks> {
    ranges.sort_by_key(|range| *range.start());
    let mut joined: Vec<Blocks> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=(*last.end()).max(*range.end());
            }
            _ => joined.push(range),
        }
    }
    joined
}
