//! The SYN cache and the flow filter ([`lb_common::syn_cache`]), by memory map: reads and expires cached SYNs, and
//! rebuilds the filter from the table of flows.

use super::{DataplaneError, grace_period, mapped::MappedArray, reader::pinned};
use crate::clock;
use aya::maps::MapData;
use lb_common::{
    FlowKey, names,
    syn_cache::{self, CachedSyn, State, SynCacheLine, SynLine, WAYS},
};
use std::{mem::offset_of, path::Path, time::Duration};

/// The memory-mapped SYN cache and flow filter.
pub struct SynCache {
    lines: MappedArray<SynCacheLine>,
}

/// New contents of the filter, gathered by a scan of the table of flows; see [`SynCache::begin`].
pub struct Scan {
    key: [u64; 2],
    /// Epoch that ends with the scan.
    ends: u32,
    swept: Vec<(u64, u16)>,
}

impl Scan {
    /// Adds a flow of the table.
    pub fn add(&mut self, key: &FlowKey) {
        let hash = syn_cache::hash(self.key, syn_cache::words_of(key));
        let (first, second) = &mut self.swept[syn_cache::line_of(hash) as usize];
        *first |= syn_cache::swept_bit(hash);
        *second |= syn_cache::swept_second_bit(hash);
    }
}

const CHECKED: &str = "`new` has checked the number of lines and mapped them writable";

/// A line of the memory-mapped cache.
struct MappedLine<'a> {
    lines: &'a MappedArray<SynCacheLine>,
    place: u32,
}

impl SynLine for MappedLine<'_> {
    fn head(&self, way: usize) -> u64 {
        self.lines.load_u64(self.place, offset_of!(SynCacheLine, heads) + 8 * way).expect(CHECKED)
    }

    fn sequence(&self, way: usize) -> u16 {
        self.lines.load_u16(self.place, offset_of!(SynCacheLine, sequences) + 2 * way).expect(CHECKED)
    }

    fn set_head(&self, way: usize, head: u64) {
        assert!(
            self.lines.store_u64(self.place, offset_of!(SynCacheLine, heads) + 8 * way, head),
            "{CHECKED}"
        );
    }

    fn set_sequence(&self, way: usize, sequence: u16) {
        let offset = offset_of!(SynCacheLine, sequences) + 2 * way;
        assert!(self.lines.store_u16(self.place, offset, sequence), "{CHECKED}");
    }
}

/// Tick of a time of the boot clock.
fn tick_of(now: Duration) -> u32 {
    syn_cache::tick_of(now.as_nanos() as u64)
}

/// The current tick.
pub fn now_tick() -> u32 {
    tick_of(clock::boot())
}

impl SynCache {
    /// Opens the pin.
    pub fn open(pin_path: &Path) -> Result<Self, DataplaneError> {
        Self::new(&pinned(pin_path, names::SYN_CACHE)?)
    }

    /// Maps the map into memory.
    pub fn new(map: &MapData) -> Result<Self, DataplaneError> {
        let lines = MappedArray::new(map, names::SYN_CACHE, true)?;
        if lines.len() != syn_cache::LINES + 1 {
            let (got, want) = (lines.len(), syn_cache::LINES + 1);
            return Err(DataplaneError::Layout { map: names::SYN_CACHE, got, want });
        }
        Ok(Self { lines })
    }

    /// Reads the common state of the lines.
    pub fn state(&self) -> State {
        zerocopy::transmute!(self.lines.load(syn_cache::STATE).expect(CHECKED))
    }

    fn line(&self, place: u32) -> MappedLine<'_> {
        MappedLine { lines: &self.lines, place }
    }

    /// Generates the key, unless there is one: before the first service is written.
    pub fn ensure_key(&self) {
        if self.state().key == [0; 2] {
            self.set_key([rand::random::<u64>() | 1, rand::random()]);
        }
    }

    fn set_key(&self, key: [u64; 2]) {
        for (i, word) in key.into_iter().enumerate() {
            let is_stored = self.lines.store_u64(syn_cache::STATE, offset_of!(State, key) + 8 * i, word);
            assert!(is_stored, "{CHECKED}");
        }
    }

    fn set_state(&self, offset: usize, word: u32) {
        assert!(self.lines.store_u32(syn_cache::STATE, offset, word), "{CHECKED}");
    }

    /// Disarms the filter until the next [`Self::settle`]: when this returns, no program uses it. For writers of flows that
    /// do not update the filter.
    pub fn disarm(&self) {
        self.set_state(offset_of!(State, armed), 0);
        grace_period();
    }

    /// Sets the key, and clears the SYN cache and the filter, which stays disarmed.
    pub fn restart(&self, key: [u64; 2]) {
        self.disarm();
        self.set_key(key);
        for place in 0..syn_cache::LINES {
            assert!(self.lines.store(place, &SynCacheLine::default()), "{CHECKED}");
        }
    }

    fn hash(&self, key: &FlowKey) -> u64 {
        syn_cache::hash(self.state().key, syn_cache::words_of(key))
    }

    /// Looks up the placement of a flow's SYN.
    pub fn get(&self, key: &FlowKey) -> CachedSyn {
        let hash = self.hash(key);
        syn_cache::find(&self.line(syn_cache::line_of(hash)), hash, now_tick)
    }

    /// Caches a SYN that was placed `age_s` ago, if no newer one of its flow is cached; true if none was cached.
    pub fn set(&self, key: &FlowKey, syn: CachedSyn) -> bool {
        let hash = self.hash(key);
        self.write_syn(syn_cache::line_of(hash), hash, syn)
    }

    /// Caches a SYN of a flow of which the tag of the hash is known, in a line that it may belong to; see [`Self::set`].
    pub fn write_syn(&self, place: u32, hash: u64, syn: CachedSyn) -> bool {
        let now = clock::boot();
        let written = now.saturating_sub(Duration::from_secs(syn.age_s.into()));
        let head = syn_cache::head(hash, syn.backend, tick_of(written));
        self.write(place, head, syn.sequence, tick_of(now))
    }

    /// Writes an entry into a line, unless there is a newer one of the same flow; true if there was none.
    pub fn write(&self, place: u32, head: u64, sequence: u16, tick: u32) -> bool {
        let line = self.line(place);
        let known = (0..WAYS).map(|way| line.head(way)).find(|known| syn_cache::is_of(*known, head));
        if known.is_some_and(|known| syn_cache::age_s(known, tick) <= syn_cache::age_s(head, tick)) {
            return false;
        }
        syn_cache::insert(&line, head, sequence, tick);
        known.is_none()
    }

    /// Calls `each` with the line, head and upper half of the sequence number of every entry.
    pub fn for_each(&self, mut each: impl FnMut(u32, u64, u16)) {
        for place in 0..syn_cache::LINES {
            let line = self.line(place);
            for way in 0..WAYS {
                let head = line.head(way);
                if head != 0 {
                    each(place, head, line.sequence(way));
                }
            }
        }
    }

    /// Removes an entry if it is unchanged.
    pub fn remove(&self, place: u32, head: u64) {
        let line = self.line(place);
        if let Some(way) = (0..WAYS).find(|way| line.head(*way) == head) {
            self.lines.clear_u64(place, offset_of!(SynCacheLine, heads) + 8 * way, head);
        }
    }

    /// Removes all entries.
    pub fn clear(&self) {
        self.for_each(|place, head, _| self.remove(place, head));
    }

    /// Begins a new epoch of the filter. A scan of the table finds the entries written before this returns; later
    /// entries set their bits in the new epoch.
    pub fn begin(&self) -> Scan {
        let state = self.state();
        let ends = state.epoch & 1;
        self.set_state(offset_of!(State, epoch), ends ^ 1);
        // Programs that use the old epoch have written their entries when this returns.
        grace_period();
        Scan { key: state.key, ends, swept: vec![(0, 0); syn_cache::LINES as usize] }
    }

    /// Applies a complete scan to the filter, and ends the old epoch.
    pub fn settle(&self, scan: &Scan) {
        let added = offset_of!(SynCacheLine, added) + 2 * scan.ends as usize;
        for (place, &(first, second)) in scan.swept.iter().enumerate() {
            let place = place as u32;
            let is_stored = (self.lines.load_u64(place, offset_of!(SynCacheLine, swept)) == Some(first)
                || self.lines.store_u64(place, offset_of!(SynCacheLine, swept), first))
                && self.lines.store_u16(place, offset_of!(SynCacheLine, swept_second), second)
                // A word of its own: programs write that of the other epoch.
                && self.lines.store_u16(place, added, 0);
            assert!(is_stored, "{CHECKED}");
        }
        self.set_state(offset_of!(State, armed), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::{Be16, mapped};

    fn key(port: u16) -> FlowKey {
        FlowKey {
            source: mapped([10, 0, 0, 1]),
            source_port: Be16::new(port),
            port: Be16::new(80),
            service: 1,
        }
    }

    fn cache() -> SynCache {
        let cache = SynCache { lines: MappedArray::private(syn_cache::LINES + 1) };
        cache.ensure_key();
        cache
    }

    #[test]
    fn a_cached_syn_is_found_until_it_is_removed() {
        let cache = cache();
        let syn = |port: u16| CachedSyn { backend: port.into(), sequence: port + 7, age_s: 10 };
        for port in 0..1_000 {
            assert!(cache.set(&key(port), syn(port)));
        }
        for port in 0..1_000 {
            let found = cache.get(&key(port));
            assert_eq!((found.backend, found.sequence), (port.into(), port + 7));
            assert!((9..=20).contains(&found.age_s), "{found:?}");
        }
        assert!(!cache.get(&key(1_000)).is_some());
        let mut count = 0;
        cache.for_each(|place, head, _| {
            count += 1;
            if syn_cache::backend(head).is_multiple_of(2) {
                cache.remove(place, head);
            }
        });
        assert_eq!(count, 1_000);
        assert_eq!((0..1_000).filter(|port| cache.get(&key(*port)).is_some()).count(), 500);
    }

    #[test]
    fn a_newer_entry_of_the_flow_stays_and_the_oldest_of_the_line_is_evicted() {
        let cache = cache();
        let head = |flow: u64, backend, tick| syn_cache::head(flow << 34, backend, tick);
        assert!(cache.write(3, head(1, 10, 500), 0, 500));
        assert!(!cache.write(3, head(1, 11, 450), 0, 500), "an older one of the flow");
        assert!(!cache.write(3, head(1, 12, 510), 0, 510));
        for flow in 2..=WAYS as u64 {
            assert!(cache.write(3, head(flow, 10, 500 + flow as u32), 0, 520));
        }
        assert!(cache.write(3, head(9, 10, 520), 0, 520));
        let mut left = Vec::new();
        cache.for_each(|_, head, _| left.push(head >> 34));
        left.sort_unstable();
        assert_eq!(left, [1, 3, 4, 5, 9], "the second was the oldest");
    }

    /// Programs write the filter; lbd only rebuilds it.
    impl syn_cache::FilterLine for MappedLine<'_> {
        fn swept(&self) -> (u64, u16) {
            let line = self.lines.load(self.place).unwrap();
            (line.swept, line.swept_second)
        }
        fn added(&self) -> [u16; 2] {
            self.lines.load(self.place).unwrap().added
        }
        fn set_added(&self, is_first: bool, bits: u16) {
            let offset = offset_of!(SynCacheLine, added) + 2 * usize::from(!is_first);
            assert!(self.lines.store_u16(self.place, offset, bits));
        }
    }

    /// Sets the filter bit for an entry in the table, as the program does.
    fn record(cache: &SynCache, key: &FlowKey) {
        let hash = cache.hash(key);
        syn_cache::add(&cache.line(syn_cache::line_of(hash)), cache.state().epoch, hash);
    }

    fn may_hold(cache: &SynCache, key: &FlowKey) -> bool {
        let hash = cache.hash(key);
        syn_cache::may_hold(&cache.line(syn_cache::line_of(hash)), hash)
    }

    #[test]
    fn the_filter_has_what_the_table_has_and_forgets_the_rest() {
        let cache = cache();
        let (old, during, gone) = (key(1), key(2), key(3));
        record(&cache, &old);
        record(&cache, &gone);
        assert_eq!(cache.state().armed, 0);
        for round in 0..4 {
            let mut scan = cache.begin();
            scan.add(&old);
            if round == 0 {
                record(&cache, &during);
            } else if round < 3 {
                scan.add(&during);
            }
            assert!(may_hold(&cache, &old) && (round == 3 || may_hold(&cache, &during)));
            cache.settle(&scan);
            assert!(may_hold(&cache, &old) && !may_hold(&cache, &gone));
            assert_eq!(may_hold(&cache, &during), round < 3);
        }
        assert_eq!(cache.state().armed, 1);
        cache.restart([8, 9]);
        assert_eq!((cache.state().armed, cache.state().key), (0, [8, 9]));
        assert!(!may_hold(&cache, &old));
    }
}
