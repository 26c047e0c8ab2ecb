//! Blocks of the paged KV cache: who holds which, and which hold a known prefix.
//!
//! Pure bookkeeping, no tensors. A block is *held* by one or more sequences, or *cached* (nobody holds it,
//! but its tokens are known and a later prompt with the same beginning may take it), or *free*. Cached blocks
//! are taken, least recently used first, when free ones run out. Called by the scheduler.

use std::collections::{BTreeMap, HashMap};

use crate::backend::BLOCK;

/// Number of a block.
pub type BlockId = u32;

/// A full block's identity: its tokens, after a given chain of blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Prefix {
    /// The chain before it; `ROOT` for none. Chain numbers are never reused, so equality is exact and no
    /// collision of hashes can hand one user's cache to another.
    parent: u64,
    tokens: [u32; BLOCK],
}

/// The empty chain.
pub const ROOT: u64 = 0;

#[derive(Debug, Default, Clone)]
struct Block {
    holders: u32,
    /// Chain number and identity, when full and known.
    known: Option<(u64, Prefix)>,
    /// When it was last let go, for the order of eviction.
    freed_at: u64,
}

/// The bookkeeping of all blocks.
#[derive(Debug)]
pub struct KvCache {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Blocks by identity.
    by_prefix: HashMap<Prefix, BlockId>,
    /// Cached blocks by the time they were let go.
    cached: BTreeMap<u64, BlockId>,
    clock: u64,
    next_chain: u64,
    sharing: bool,
}

impl KvCache {
    /// `count` free blocks; `sharing` off forgets prefixes.
    pub fn new(count: usize, sharing: bool) -> Self {
        Self {
            blocks: vec![Block::default(); count],
            free: (0..count as BlockId).rev().collect(),
            by_prefix: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
            next_chain: ROOT + 1,
            sharing,
        }
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that a sequence could get now.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Blocks held by sequences.
    pub fn held(&self) -> usize {
        self.total() - self.available()
    }

    /// Takes the longest known chain of full blocks at the start of `tokens`, leaving at least one token to
    /// compute. Gives the blocks (now held) and their chain numbers.
    pub fn take_prefix(&mut self, tokens: &[u32]) -> (Vec<BlockId>, Vec<u64>) {
        let (mut blocks, mut chains, mut parent) = (Vec::new(), Vec::new(), ROOT);
        if !self.sharing {
            return (blocks, chains);
        }
        let usable = tokens.len().saturating_sub(1) / BLOCK;
        for chunk in tokens.chunks_exact(BLOCK).take(usable) {
            let mut key = Prefix { parent, tokens: [0; BLOCK] };
            key.tokens.copy_from_slice(chunk);
            let Some(id) = self.by_prefix.get(&key).copied() else { break };
            let block = &mut self.blocks[id as usize];
            let chain = block.known.as_ref().map_or(ROOT, |k| k.0);
            if block.holders == 0 {
                self.cached.remove(&block.freed_at);
            }
            block.holders += 1;
            blocks.push(id);
            chains.push(chain);
            parent = chain;
        }
        (blocks, chains)
    }

    /// `count` fresh blocks, or None (and nothing taken) when there are not so many.
    pub fn take(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            let id = match self.free.pop() {
                Some(id) => id,
                None => self.evict()?,
            };
            self.blocks[id as usize].holders = 1;
            out.push(id);
        }
        Some(out)
    }

    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.cached.pop_first()?;
        if let Some((_, prefix)) = self.blocks[id as usize].known.take() {
            self.by_prefix.remove(&prefix);
        }
        Some(id)
    }

    /// Says that a held block is now full of `tokens`, after the chain `parent`. Gives its chain number.
    pub fn filled(&mut self, id: BlockId, parent: u64, tokens: &[u32]) -> u64 {
        let mut key = Prefix { parent, tokens: [0; BLOCK] };
        key.tokens.copy_from_slice(tokens);
        if !self.sharing {
            return ROOT;
        }
        if let Some(other) = self.by_prefix.get(&key) {
            // Somebody computed the same meanwhile: theirs stays the shared one, ours stays private.
            return self.blocks[*other as usize].known.as_ref().map_or(ROOT, |k| k.0);
        }
        let chain = self.next_chain;
        self.next_chain += 1;
        self.by_prefix.insert(key.clone(), id);
        self.blocks[id as usize].known = Some((chain, key));
        chain
    }

    /// Lets go of a sequence's blocks.
    pub fn release(&mut self, blocks: &[BlockId]) {
        // Last first: of a chain, its end is evicted before its beginning.
        for id in blocks.iter().rev() {
            let block = &mut self.blocks[*id as usize];
            debug_assert!(block.holders > 0, "block {id} released twice");
            block.holders = block.holders.saturating_sub(1);
            if block.holders > 0 {
                continue;
            }
            if block.known.is_some() {
                self.clock += 1;
                block.freed_at = self.clock;
                self.cached.insert(self.clock, *id);
            } else {
                self.free.push(*id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fill(cache: &mut KvCache, blocks: &[BlockId], tokens: &[u32]) {
        let mut parent = ROOT;
        for (id, chunk) in blocks.iter().zip(tokens.chunks_exact(BLOCK)) {
            parent = cache.filled(*id, parent, chunk);
        }
    }

    #[test]
    fn a_prefix_is_shared_and_survives_its_first_holder() {
        let mut cache = KvCache::new(8, true);
        let tokens: Vec<u32> = (0..40).collect();
        let blocks = cache.take(3).unwrap();
        fill(&mut cache, &blocks, &tokens);
        let (shared, _) = cache.take_prefix(&tokens);
        assert_eq!(shared, blocks[..2]);
        cache.release(&blocks);
        cache.release(&shared);
        assert_eq!((cache.held(), cache.available()), (0, 8));
        // Exactly two blocks long: the last token must still be computed, so only one block is taken.
        assert_eq!(cache.take_prefix(&tokens[..32]).0, blocks[..1]);
    }

    #[test]
    fn the_same_tokens_after_another_beginning_are_not_shared() {
        let mut cache = KvCache::new(8, true);
        let first: Vec<u32> = (0..48).collect();
        let blocks = cache.take(3).unwrap();
        fill(&mut cache, &blocks, &first);
        let mut second = first.clone();
        second[0] = 99;
        assert!(cache.take_prefix(&second).0.is_empty());
    }

    #[test]
    fn eviction_takes_the_end_of_the_oldest_chain_first() {
        let mut cache = KvCache::new(4, true);
        let tokens: Vec<u32> = (0..64).collect();
        let blocks = cache.take(4).unwrap();
        fill(&mut cache, &blocks, &tokens);
        cache.release(&blocks);
        let fresh = cache.take(1).unwrap();
        assert_eq!(fresh[0], blocks[3]);
        assert_eq!(cache.take_prefix(&tokens).0, blocks[..3]);
        assert!(cache.take(1).is_none());
    }

    proptest! {
        /// Whatever is done in whatever order, blocks are neither lost nor handed out twice.
        #[test]
        fn no_block_is_lost(actions in prop::collection::vec((0u8..4, 0usize..6, 0u32..3), 1..200)) {
            let mut cache = KvCache::new(12, true);
            let mut sequences: Vec<Vec<BlockId>> = Vec::new();
            for (action, size, flavour) in actions {
                let tokens: Vec<u32> = (0..(size * BLOCK) as u32 + 1).map(|t| t / 20 * flavour).collect();
                match action {
                    0 | 1 => {
                        let (mut blocks, _) = cache.take_prefix(&tokens);
                        match cache.take(size + 1 - blocks.len()) {
                            Some(more) => {
                                blocks.extend(more);
                                fill(&mut cache, &blocks, &tokens);
                                sequences.push(blocks);
                            }
                            None => cache.release(&blocks),
                        }
                    }
                    _ if !sequences.is_empty() => {
                        let blocks = sequences.swap_remove(size % sequences.len());
                        cache.release(&blocks);
                    }
                    _ => {}
                }
                let mut held: Vec<BlockId> = sequences.iter().flatten().copied().collect();
                held.sort_unstable();
                held.dedup();
                prop_assert_eq!(held.len(), cache.held());
            }
            for blocks in &sequences {
                cache.release(blocks);
            }
            prop_assert_eq!(cache.available(), 12);
        }
    }
}
