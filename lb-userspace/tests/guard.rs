//! Compares the packet code's verdicts on deny and allow lists with a plain search, and tests how stores keep the lists.

use ipnet::IpNet;
use lb_common::guard::{GuardKey, GuardState, block, verdict};
use lb_ebpf::guard::{GuardTables, is_denied};
use lb_userspace::{
    desired::{
        model::{
            Desired, Guard, ListName,
            guard::{normal, parse},
        },
        store::delta,
    },
    plan::compile::guard::{ALL_BLOCKS, GuardTable, blocks_of, filter_bit, key_of, net_of},
};
use proptest::prelude::*;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// The maps in memory, with only those words that a prefix touches.
#[derive(Default)]
struct Maps {
    blocks: HashMap<u32, u32>,
    filter: HashMap<u32, u32>,
    entries: HashMap<GuardKey, u32>,
    state: GuardState,
}

impl GuardTables for Maps {
    fn guard_block(&self, word: u32) -> u32 {
        self.blocks.get(&word).copied().unwrap_or(0)
    }
    fn guard_filter(&self, word: u32) -> u32 {
        self.filter.get(&word).copied().unwrap_or(0)
    }
    fn guard_state(&self) -> Option<&GuardState> {
        Some(&self.state)
    }
    fn guard_entry(&self, key: &GuardKey) -> Option<u32> {
        self.entries.get(key).copied()
    }
}

impl Maps {
    /// Writes the words that an added, changed or removed prefix touches.
    fn update(&mut self, table: &GuardTable, net: IpNet) {
        match table.get(net) {
            Some(verdict) => self.entries.insert(key_of(net), verdict),
            None => self.entries.remove(&key_of(net)),
        };
        if let Some(range) = blocks_of(net) {
            let first = range.start() / block::IN_WORD;
            let last = range.end() / block::IN_WORD;
            let states = table.blocks(first * block::IN_WORD..=last * block::IN_WORD + block::IN_WORD - 1);
            for (word, states) in (first..).zip(states.chunks_exact(block::IN_WORD as usize)) {
                let value = states.iter().rev().fold(0, |word, state| word << 2 | u32::from(*state));
                self.blocks.insert(word, value);
            }
        }
        if let Some(bit) = filter_bit(net) {
            self.filter.insert(bit / 32, table.filter_word(bit / 32));
        }
        self.state = GuardState { active: 0, v4: table.v4_mask(), v6: [table.v6_lengths(); 2] };
    }

    fn denies(&self, address: IpAddr) -> bool {
        let bytes = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        is_denied(self, lb_ebpf::packet::parse::words(bytes))
    }
}

/// Addresses close to each other.
fn addresses() -> impl Strategy<Value = IpAddr> {
    let v4 = (0u32..4, 0u32..4, 0u32..8)
        .prop_map(|(a, b, c)| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + (a << 16) + (b << 8) + c * 31)));
    let v6 = (0u128..2, 0u128..3, 0u128..3, 0u128..3, 0u128..4).prop_map(|(a, b, c, d, e)| {
        IpAddr::from(Ipv6Addr::from((0x2001 + a) << 112 | b << 92 | c << 70 | d << 60 | e))
    });
    prop_oneof![v4, v6]
}

fn prefixes() -> impl Strategy<Value = IpNet> {
    (addresses(), 0u8..=128).prop_map(|(address, bits)| {
        // Short IPv4 prefixes fill millions of blocks, so they are rare.
        let bits = if address.is_ipv4() { 12 + bits % 21 } else { bits };
        IpNet::new(address, bits).expect("in range").trunc()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Adds, changes and removes entries one by one; after each step the maps agree with a plain search.
    #[test]
    fn the_longest_prefix_decides(
        changes in proptest::collection::vec((prefixes(), 0u8..5), 1..40),
        asked in proptest::collection::vec(addresses(), 40),
    ) {
        let (mut table, mut maps, mut plain) = (GuardTable::default(), Maps::default(), HashMap::new());
        for (net, kind) in changes {
            let verdict = match kind {
                0 | 1 => Some(verdict::DENY),
                2 | 3 => Some(verdict::ALLOW),
                _ => None,
            };
            table.set(net, verdict);
            match verdict {
                Some(verdict) => plain.insert(net, verdict),
                None => plain.remove(&net),
            };
            maps.update(&table, net);
        }
        prop_assert_eq!(table.len(), plain.len());
        for address in asked {
            let longest = plain.iter().filter(|(n, _)| n.contains(&address)).max_by_key(|(n, _)| n.prefix_len());
            let denied = longest.is_some_and(|(_, verdict)| *verdict == verdict::DENY);
            prop_assert_eq!(maps.denies(address), denied, "{}: {:?}", address, longest);
        }
        // The table read back from the maps is equal.
        let mut read = GuardTable::default();
        for (key, verdict) in &maps.entries {
            read.set(net_of(key).expect("a key of ours"), Some(*verdict));
        }
        prop_assert_eq!(read, table);
    }

    /// Applying the difference of two states to one yields the other, including each list entry.
    #[test]
    fn a_difference_of_lists_is_applied(
        old in proptest::collection::vec((prefixes(), any::<bool>(), 0u64..3), 0..30),
        new in proptest::collection::vec((prefixes(), any::<bool>(), 0u64..3), 0..30),
        kept in 0usize..30,
    ) {
        let state = |entries: &[(IpNet, bool, u64)]| {
            let mut guard = Guard::default();
            for (net, denies, until) in entries {
                let name = if *denies { ListName::Deny } else { ListName::Allow };
                guard.list_mut(name).insert(*net, *until);
            }
            Desired { guard, ..Desired::default() }
        };
        let new: Vec<_> = old.iter().take(kept).copied().chain(new).collect();
        let (old, mut new) = (state(&old), state(&new));
        new.share(&old);
        let difference = delta::diff(&old, &new).unwrap();
        prop_assert_eq!(&delta::apply(&old, &difference).unwrap(), &new);
        prop_assert!(new.check().is_empty(), "{:?}", new.check());
        let text = serde_json::to_string(&new).unwrap();
        prop_assert_eq!(serde_json::from_str::<Desired>(&text).unwrap(), new);
    }

    #[test]
    fn what_is_printed_is_read(net in prefixes()) {
        prop_assert_eq!(parse(&net.to_string()), Ok(normal(net)));
    }
}

#[test]
fn all_of_ipv4_is_painted() {
    let mut table = GuardTable::default();
    table.set("0.0.0.0/0".parse().unwrap(), Some(verdict::DENY));
    table.set("10.0.0.0/8".parse().unwrap(), Some(verdict::ALLOW));
    table.set("10.9.8.7/32".parse().unwrap(), Some(verdict::DENY));
    table.set("203.0.113.5/32".parse().unwrap(), Some(verdict::ALLOW));
    let blocks = table.blocks(ALL_BLOCKS);
    let of = |a: u32, b: u32, c: u32| u32::from(blocks[(a << 16 | b << 8 | c) as usize]);
    assert_eq!(of(0, 0, 0), block::DENY);
    assert_eq!(of(255, 255, 255), block::DENY);
    assert_eq!(of(9, 255, 255), block::DENY);
    assert_eq!((of(10, 0, 0), of(10, 255, 255)), (0, 0));
    assert_eq!(of(11, 0, 0), block::DENY);
    assert_eq!(of(10, 9, 8), block::ASK);
    assert_eq!(of(203, 0, 113), block::DENY | block::ASK);
}

/// A change of one entry of a long list takes few bytes.
#[test]
fn a_change_costs_what_it_changes() {
    let mut old = Desired::default();
    for i in 0..100_000u32 {
        let address = Ipv4Addr::from(i.wrapping_mul(2_654_435_761));
        old.guard.deny.insert(IpNet::from(IpAddr::from(address)), 0);
    }
    let mut new = old.clone();
    new.guard.deny.insert(parse("192.0.2.0/24").unwrap(), 0);
    let text = delta::diff(&old, &new).unwrap().to_string();
    assert_eq!(text, r#"{"guard":{"deny":{"4-c00":{"192.0.2.0/24":0}}}}"#);
}
