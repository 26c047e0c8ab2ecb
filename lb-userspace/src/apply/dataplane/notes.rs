//! The SYN cache and the flow filter ([`lb_common::note`]), by memory map: reads and expires cached SYNs, and rebuilds
//! the filter from the table of flows.

use super::{DataplaneError, grace_period, mapped::MappedArray, reader::pinned};
use aya::maps::MapData;
use lb_common::{
    Flow, FlowKey,
    flow::SYN_TIMEOUT_S,
    names,
    note::{self, Line, State, WAYS},
};
use std::{mem::offset_of, path::Path};

/// The memory-mapped SYN cache and flow filter.
pub struct Notes {
    lines: MappedArray<Line>,
}

/// New contents of the filter, gathered by a scan of the table of flows; see [`Notes::begin`].
pub struct Scan {
    key: [u64; 2],
    /// Generation that ends with the scan.
    ends: u32,
    settled: Vec<(u64, u32)>,
}

impl Scan {
    /// Adds a flow of the table.
    pub fn add(&mut self, key: &FlowKey) {
        let mark = note::mark(self.key, note::words_of(key));
        let (settled, settled_too) = &mut self.settled[note::line_of(mark) as usize];
        *settled |= note::settled_bit(mark);
        *settled_too |= note::settled_too_bit(mark);
    }
}

impl Notes {
    /// Opens the pin.
    pub fn open(pin_path: &Path) -> Result<Self, DataplaneError> {
        Self::new(&pinned(pin_path, names::NOTES)?)
    }

    /// Maps the map into memory.
    pub fn new(map: &MapData) -> Result<Self, DataplaneError> {
        let lines = MappedArray::new(map, names::NOTES, true)?;
        if lines.len() != note::LINES + 1 {
            let (got, want) = (lines.len(), note::LINES + 1);
            return Err(DataplaneError::Layout { map: names::NOTES, got, want });
        }
        Ok(Self { lines })
    }

    /// Reads the common state of the lines.
    pub fn state(&self) -> State {
        zerocopy::transmute!(self.line(note::STATE))
    }

    fn line(&self, place: u32) -> Line {
        self.lines.load(place).expect("`open` has checked the number of lines")
    }

    /// Generates the key, unless there is one: before the first service is written.
    pub fn ensure_key(&self) {
        if self.state().key == [0; 2] {
            self.set_key([rand::random::<u64>() | 1, rand::random()]);
        }
    }

    fn set_key(&self, key: [u64; 2]) {
        for (i, word) in key.into_iter().enumerate() {
            self.put(note::STATE, offset_of!(State, key) + 8 * i, word);
        }
    }

    fn put(&self, place: u32, offset: usize, word: u64) {
        assert!(
            self.lines.store_u64(place, offset, word),
            "`open` has checked the number of lines and mapped them writable"
        );
    }

    fn put_u32(&self, place: u32, offset: usize, word: u32) {
        assert!(
            self.lines.store_u32(place, offset, word),
            "`open` has checked the number of lines and mapped them writable"
        );
    }

    /// Disarms the filter until the next [`Self::settle`]: when this returns, no program uses it. For writers of flows that
    /// do not update the filter.
    pub fn disarm(&self) {
        self.put_u32(note::STATE, offset_of!(State, armed), 0);
        grace_period();
    }

    /// Sets the key, and clears the SYN cache and the filter, which stays disarmed.
    pub fn restart(&self, key: [u64; 2]) {
        self.disarm();
        self.set_key(key);
        for place in 0..note::LINES {
            assert!(
                self.lines.store(place, &Line::default()),
                "`open` has checked the number of lines and mapped them writable"
            );
        }
    }

    fn mark(&self, key: &FlowKey) -> u64 {
        note::mark(self.state().key, note::words_of(key))
    }

    /// Looks up the placement of a flow's SYN; `created_s` holds the SYN's sequence number.
    pub fn get(&self, key: &FlowKey, now_s: u32) -> Option<Flow> {
        let mark = self.mark(key);
        let line = self.line(note::line_of(mark));
        let at = line.heads.iter().position(|head| note::is_of(*head, mark))?;
        let seen_s = now_s.saturating_sub(note::age_s(line.heads[at], now_s));
        Some(Flow::new(note::backend(line.heads[at]), seen_s, line.sequences[at], 0))
    }

    /// Caches a SYN, if it is recent and no newer one of the same flow is cached; true if none was cached.
    pub fn set(&self, key: &FlowKey, flow: &Flow, now_s: u32) -> bool {
        let mark = self.mark(key);
        let head = note::head(mark, flow.backend, flow.last_seen_s);
        now_s.saturating_sub(flow.last_seen_s) <= SYN_TIMEOUT_S
            && self.write(note::line_of(mark), head, flow.created_s, now_s)
    }

    /// Writes a note into a line, unless there is a newer one of the same flow; true if there was none.
    pub fn write(&self, place: u32, head: u64, sequence: u32, now_s: u32) -> bool {
        // Only the fingerprint of the mark is used here, and the head has it in the same place.
        let mark = head;
        let line = self.line(place);
        let known = line.heads.iter().position(|known| note::is_of(*known, mark));
        if known.is_some_and(|at| note::age_s(line.heads[at], now_s) <= note::age_s(head, now_s)) {
            return false;
        }
        let at = (0..WAYS).max_by_key(|at| note::yields(line.heads[*at], mark, now_s)).unwrap_or(0);
        self.put_u32(place, offset_of!(Line, sequences) + 4 * at, sequence);
        self.put(place, offset_of!(Line, heads) + 8 * at, head);
        known.is_none()
    }

    /// Calls `each` with the line, head and sequence number of every note.
    pub fn for_each(&self, mut each: impl FnMut(u32, u64, u32)) {
        for place in 0..note::LINES {
            for way in 0..WAYS {
                let head = self.lines.load_u64(place, offset_of!(Line, heads) + 8 * way).unwrap_or(0);
                if head != 0 {
                    let sequence = self.lines.load_u32(place, offset_of!(Line, sequences) + 4 * way);
                    each(place, head, sequence.unwrap_or(0));
                }
            }
        }
    }

    /// Removes a note if it is unchanged.
    pub fn remove(&self, place: u32, head: u64) {
        let line = self.line(place);
        if let Some(at) = line.heads.iter().position(|known| *known == head) {
            self.lines.clear_u64(place, offset_of!(Line, heads) + 8 * at, head);
        }
    }

    /// Removes all notes.
    pub fn clear(&self) {
        self.for_each(|place, head, _| self.remove(place, head));
    }

    /// Begins a new generation of the filter. A scan of the table finds the entries written before this returns; later
    /// entries set their bits in the new generation.
    pub fn begin(&self) -> Scan {
        let state = self.state();
        let ends = state.generation & 1;
        self.put_u32(note::STATE, offset_of!(State, generation), ends ^ 1);
        // Programs that use the old generation have written their entries when this returns.
        grace_period();
        Scan { key: state.key, ends, settled: vec![(0, 0); note::LINES as usize] }
    }

    /// Applies a complete scan to the filter, and ends the old generation.
    pub fn settle(&self, scan: &Scan) {
        let recent = offset_of!(Line, recent) + 2 * scan.ends as usize;
        for (place, (settled, settled_too)) in scan.settled.iter().enumerate() {
            let place = place as u32;
            if self.lines.load_u64(place, offset_of!(Line, settled)) != Some(*settled) {
                self.put(place, offset_of!(Line, settled), *settled);
            }
            if self.lines.load_u32(place, offset_of!(Line, settled_too)) != Some(*settled_too) {
                self.put_u32(place, offset_of!(Line, settled_too), *settled_too);
            }
            // A separate half of the word: programs write to the other half.
            self.lines.clear_u16(place, recent);
        }
        self.put_u32(note::STATE, offset_of!(State, armed), 1);
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

    fn notes() -> Notes {
        let notes = Notes { lines: MappedArray::private(note::LINES + 1) };
        notes.ensure_key();
        notes
    }

    #[test]
    fn what_is_noted_is_found_until_it_is_removed() {
        let notes = notes();
        for port in 0..1_000 {
            notes.set(&key(port), &Flow::new(u32::from(port), 5_000, 7 + u32::from(port), 0), 5_010);
        }
        for port in 0..1_000 {
            let found = notes.get(&key(port), 5_020).map(|n| (n.backend, n.last_seen_s, n.created_s));
            assert_eq!(found, Some((u32::from(port), 5_000, 7 + u32::from(port))));
        }
        assert_eq!(notes.get(&key(1_000), 5_020), None);
        let mut count = 0;
        notes.for_each(|place, head, _| {
            count += 1;
            if note::backend(head).is_multiple_of(2) {
                notes.remove(place, head);
            }
        });
        assert_eq!(count, 1_000);
        assert_eq!((0..1_000).filter(|port| notes.get(&key(*port), 5_020).is_some()).count(), 500);
    }

    #[test]
    fn a_newer_note_stays_and_the_oldest_gives_way() {
        let notes = notes();
        let head = |flow: u64, backend, now_s| note::head(flow << 32, backend, now_s);
        assert!(notes.write(3, head(1, 10, 1_000), 0, 1_000));
        assert!(!notes.write(3, head(1, 11, 990), 0, 1_000), "an older one of the same flow");
        assert!(!notes.write(3, head(1, 12, 1_005), 0, 1_005));
        for flow in 2..=4 {
            assert!(notes.write(3, head(flow, 10, 1_000 + flow as u32), 0, 1_010));
        }
        assert!(notes.write(3, head(5, 10, 1_010), 0, 1_010));
        let mut left = Vec::new();
        notes.for_each(|_, head, _| left.push(head >> 32));
        left.sort_unstable();
        assert_eq!(left, [1, 3, 4, 5], "the second was the oldest");
    }

    /// Sets the filter bit for an entry in the table, as the program does.
    fn record(notes: &Notes, key: &FlowKey) {
        let (state, mark) = (notes.state(), notes.mark(key));
        let place = note::line_of(mark);
        let mut line = notes.line(place);
        line.recent[(state.generation & 1) as usize] |= note::recent_bit(mark);
        assert!(notes.lines.store(place, &line));
    }

    fn may_have(notes: &Notes, key: &FlowKey) -> bool {
        let mark = notes.mark(key);
        let line = notes.line(note::line_of(mark));
        note::may_have(line.settled, line.settled_too, line.recent, mark)
    }

    #[test]
    fn the_filter_has_what_the_table_has_and_forgets_the_rest() {
        let notes = notes();
        let (old, during, gone) = (key(1), key(2), key(3));
        record(&notes, &old);
        record(&notes, &gone);
        assert_eq!(notes.state().armed, 0);
        for round in 0..4 {
            let mut scan = notes.begin();
            scan.add(&old);
            if round == 0 {
                record(&notes, &during);
            } else if round < 3 {
                scan.add(&during);
            }
            assert!(may_have(&notes, &old) && (round == 3 || may_have(&notes, &during)));
            notes.settle(&scan);
            assert!(may_have(&notes, &old) && !may_have(&notes, &gone));
            assert_eq!(may_have(&notes, &during), round < 3);
        }
        assert_eq!(notes.state().armed, 1);
        notes.restart([8, 9]);
        assert_eq!((notes.state().armed, notes.state().key), (0, [8, 9]));
        assert!(!may_have(&notes, &old));
    }
}
