//! Seeds, changed at random: the same packets in each run, for tests that take no fuzzer.

/// Steele et al.'s SplitMix64: the same packets in each run.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it has no end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// One of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// An offset that is more often in the headers than behind them.
    fn offset(&mut self, len: usize) -> usize {
        if self.below(8) == 0 { self.below(len) } else { self.below(len.min(90)) }
    }
}

/// A seed, changed in up to four places.
pub fn mutate(random: &mut Random, seeds: &[Vec<u8>], frame: &mut Vec<u8>) {
    frame.clear();
    let seed = random.below(seeds.len());
    frame.extend_from_slice(&seeds[seed]);
    for _ in 0..random.below(5) {
        let at = random.offset(frame.len());
        match random.below(12) {
            0..4 => frame[at] = random.next() as u8,
            4..6 => frame[at] ^= 1 << random.below(8),
            6 => frame[at] = [0, 1, 0x7f, 0x80, 0xff, 4, 6, 17, 41, 44, 0x45, 0x60][random.below(12)],
            7 => frame[at] = frame[at].wrapping_add(random.below(5) as u8).wrapping_sub(2),
            // The kernel takes no test frame shorter than an Ethernet header.
            8 => frame.truncate(random.offset(frame.len()).max(14)),
            9 => drop(frame.remove(at)),
            10 => frame.insert(at, random.next() as u8),
            // The rest of another seed.
            _ => {
                let other = &seeds[random.below(seeds.len())];
                frame.truncate(at);
                frame.extend_from_slice(&other[at.min(other.len())..]);
            }
        }
        if frame.len() < 14 {
            frame.resize(14, 0);
        }
    }
}
