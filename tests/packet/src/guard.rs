//! Deny and allow lists in the program under test, made by the very code that `lbd` makes them with.

use crate::Ingress;
use aya::maps::{Array, HashMap, MapData};
use ipnet::IpNet;
use lb_common::{
    guard::{GuardKey, GuardState, block, level, verdict},
    names,
    rate_limit::SourceKey,
    slot::{LINE, Line},
};
use lb_userspace::plan::compile::guard::{ALL_BLOCKS, GuardTable, key_of};

impl Ingress {
    /// Lists just these prefixes: denied, or an exception.
    pub fn guard<'a>(&mut self, entries: impl IntoIterator<Item = (IpNet, &'a str)>) {
        let mut table = GuardTable::default();
        for (net, list) in entries {
            table.set(net, Some(if list == "deny" { verdict::DENY } else { verdict::ALLOW }));
        }
        self.guard_table(&table);
    }

    /// The same of a table.
    pub fn guard_table(&mut self, table: &GuardTable) {
        let mut map: HashMap<&mut MapData, GuardKey, u32> = self.map(names::GUARD_ENTRIES);
        for key in map.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            map.remove(&key).expect("listed a moment ago");
        }
        for net in table.nets() {
            map.insert(key_of(net), table.get(net).expect("it is in the table"), 0).expect("room");
        }
        let blocks = table.blocks(ALL_BLOCKS);
        let words: Vec<u32> = blocks
            .chunks_exact(block::IN_WORD as usize)
            .map(|states| states.iter().rev().fold(0, |word, state| word << 2 | u32::from(*state)))
            .collect();
        self.lines(names::GUARD_BLOCKS, &words);
        let words = table.filter_words();
        assert_eq!(words.len(), level::WORDS as usize);
        self.lines(names::GUARD_FILTER, &words);
        let state = GuardState { active: 1, v4: table.v4_mask(), v6: [table.v6_lengths(); 2] };
        let mut map: Array<&mut MapData, GuardState> = self.map(names::GUARD_STATE);
        map.set(0, state, 0).expect("one entry");
    }

    fn lines(&mut self, name: &str, words: &[u32]) {
        let mut map: Array<&mut MapData, Line> = self.map(name);
        for (index, words) in (0..).zip(words.chunks_exact(LINE as usize)) {
            let line = Line { words: words.try_into().expect("chunks of a line") };
            if map.get(&index, 0).expect("in range") != line {
                map.set(index, line, 0).expect("in range");
            }
        }
    }

    /// Buckets of sources that are known.
    pub fn sources(&mut self) -> Vec<SourceKey> {
        let map: HashMap<&mut MapData, SourceKey, u64> = self.map(names::SOURCES);
        map.keys().filter_map(Result::ok).collect()
    }
}

impl Ingress {
    /// Memory that the kernel counts for a map, in bytes.
    pub fn memory_of(&self, name: &str) -> Option<u64> {
        use std::os::fd::{AsFd, AsRawFd};
        let fd = self.hash_map(name)?.fd().as_fd().as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
    }

    /// Runs a packet that the program leaves as it is so often; the verdict, and what one run took.
    pub fn run_repeatedly(&self, packet: &[u8], repeat: u32) -> anyhow::Result<(u32, std::time::Duration)> {
        use aya::programs::{TestRun, TestRunOptions};
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = self.program().test_run(options)?;
        Ok((result.return_value, result.duration))
    }
}
