//! Allocation of the blocks of the paged KV cache, and prefix caching.
//!
//! Only bookkeeping, without tensors. A block is in one of three states: *used* by one or more sequences; *cached*
//! (unused, but its tokens are known, so a later prompt with the same prefix can reuse it); or *free*. When no free
//! block is left, the least recently used cached block is evicted. Called by the scheduler.

use std::collections::{BTreeMap, HashMap};

use crate::backend::BLOCK_SIZE;

/// Number of a block in the KV cache.
pub type BlockId = u32;

/// Key of a full block in the prefix cache: its tokens and the prefix before them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PrefixKey {
    /// Id of the prefix before this block, or `ROOT_PREFIX`. Ids are not reused, and keys are compared exactly: a
    /// hash collision can never share one user's blocks with another.
    parent: u64,
    tokens: [u32; BLOCK_SIZE],
}

impl PrefixKey {
    fn new(parent: u64, block: &[u32]) -> Self {
        let mut tokens = [0; BLOCK_SIZE];
        tokens.copy_from_slice(block);
        Self { parent, tokens }
    }
}

/// Id of the empty prefix.
pub const ROOT_PREFIX: u64 = 0;

#[derive(Debug, Default, Clone)]
struct Block {
    /// Number of sequences that use the block.
    ref_count: u32,
    /// Id and key of the prefix that ends with this block, if it is in the prefix cache.
    prefix: Option<(u64, PrefixKey)>,
    /// When it was last freed, for LRU eviction.
    freed_at: u64,
}

/// Allocates the blocks of the KV cache.
#[derive(Debug)]
pub struct KvCacheManager {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Prefix cache.
    by_prefix: HashMap<PrefixKey, BlockId>,
    /// Cached blocks by the time at which they were freed.
    cached: BTreeMap<u64, BlockId>,
    clock: u64,
    next_prefix: u64,
    prefix_caching: bool,
}

impl KvCacheManager {
    /// Creates a manager of `count` free blocks.
    pub fn new(count: usize, prefix_caching: bool) -> Self {
        Self {
            blocks: vec![Block::default(); count],
            free: (0..count as BlockId).rev().collect(),
            by_prefix: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
            next_prefix: ROOT_PREFIX + 1,
            prefix_caching,
        }
    }

    /// Returns the number of all blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Returns the number of blocks that can be allocated: free and cached ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Returns the number of blocks that sequences use.
    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// Allocates the cached blocks of the longest cached prefix of `tokens`. At least one token stays uncomputed,
    /// because its logits are needed. Returns the blocks and their prefix ids.
    pub fn allocate_prefix(&mut self, tokens: &[u32]) -> (Vec<BlockId>, Vec<u64>) {
        let (mut blocks, mut prefixes, mut parent) = (Vec::new(), Vec::new(), ROOT_PREFIX);
        if !self.prefix_caching {
            return (blocks, prefixes);
        }
        let usable = tokens.len().saturating_sub(1) / BLOCK_SIZE;
        for chunk in tokens.chunks_exact(BLOCK_SIZE).take(usable) {
            let Some(id) = self.by_prefix.get(&PrefixKey::new(parent, chunk)).copied() else { break };
            let block = &mut self.blocks[id as usize];
            let prefix = block.prefix.as_ref().map_or(ROOT_PREFIX, |p| p.0);
            if block.ref_count == 0 {
                self.cached.remove(&block.freed_at);
            }
            block.ref_count += 1;
            blocks.push(id);
            prefixes.push(prefix);
            parent = prefix;
        }
        (blocks, prefixes)
    }

    /// Allocates `count` blocks without contents, or returns None and allocates nothing if too few are available.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            let id = match self.free.pop() {
                Some(id) => id,
                None => self.evict()?,
            };
            self.blocks[id as usize].ref_count = 1;
            out.push(id);
        }
        Some(out)
    }

    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.cached.pop_first()?;
        if let Some((_, key)) = self.blocks[id as usize].prefix.take() {
            self.by_prefix.remove(&key);
        }
        Some(id)
    }

    /// Adds a used block, now full of `tokens`, to the prefix cache. Returns the id of the prefix that ends with it.
    pub fn cache_full_block(&mut self, id: BlockId, parent: u64, tokens: &[u32]) -> u64 {
        let key = PrefixKey::new(parent, tokens);
        if !self.prefix_caching {
            return ROOT_PREFIX;
        }
        if let Some(other) = self.by_prefix.get(&key) {
            // Another sequence has computed the same block meanwhile. That one stays in the prefix cache.
            return self.blocks[*other as usize].prefix.as_ref().map_or(ROOT_PREFIX, |p| p.0);
        }
        let prefix = self.next_prefix;
        self.next_prefix += 1;
        self.by_prefix.insert(key.clone(), id);
        self.blocks[id as usize].prefix = Some((prefix, key));
        prefix
    }

    /// Frees the blocks of a sequence.
    pub fn free(&mut self, blocks: &[BlockId]) {
        // In reverse, so that the end of a prefix is evicted before its beginning.
        for id in blocks.iter().rev() {
            let block = &mut self.blocks[*id as usize];
            debug_assert!(block.ref_count > 0, "block {id} freed twice");
            block.ref_count = block.ref_count.saturating_sub(1);
            if block.ref_count > 0 {
                continue;
            }
            if block.prefix.is_some() {
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

    fn fill(cache: &mut KvCacheManager, blocks: &[BlockId], tokens: &[u32]) {
        let mut parent = ROOT_PREFIX;
        for (id, chunk) in blocks.iter().zip(tokens.chunks_exact(BLOCK_SIZE)) {
            parent = cache.cache_full_block(*id, parent, chunk);
        }
    }

    #[test]
    fn a_cached_prefix_is_shared_and_stays_cached_after_its_first_sequence_ends() {
        let mut cache = KvCacheManager::new(8, true);
        let tokens: Vec<u32> = (0..40).collect();
        let blocks = cache.allocate(3).unwrap();
        fill(&mut cache, &blocks, &tokens);
        let (shared, _) = cache.allocate_prefix(&tokens);
        assert_eq!(shared, blocks[..2]);
        cache.free(&blocks);
        cache.free(&shared);
        assert_eq!((cache.used(), cache.available()), (0, 8));
        // Exactly two blocks long: the last token must still be computed, so only one block is reused.
        assert_eq!(cache.allocate_prefix(&tokens[..32]).0, blocks[..1]);
    }

    #[test]
    fn equal_tokens_after_a_different_prefix_are_not_shared() {
        let mut cache = KvCacheManager::new(8, true);
        let first: Vec<u32> = (0..48).collect();
        let blocks = cache.allocate(3).unwrap();
        fill(&mut cache, &blocks, &first);
        let mut second = first.clone();
        second[0] = 99;
        assert!(cache.allocate_prefix(&second).0.is_empty());
    }

    #[test]
    fn eviction_starts_at_the_end_of_the_least_recently_used_prefix() {
        let mut cache = KvCacheManager::new(4, true);
        let tokens: Vec<u32> = (0..64).collect();
        let blocks = cache.allocate(4).unwrap();
        fill(&mut cache, &blocks, &tokens);
        cache.free(&blocks);
        let fresh = cache.allocate(1).unwrap();
        assert_eq!(fresh[0], blocks[3]);
        assert_eq!(cache.allocate_prefix(&tokens).0, blocks[..3]);
        assert!(cache.allocate(1).is_none());
    }

    proptest! {
        /// Holds for random sequences of allocations and frees.
        #[test]
        fn blocks_are_neither_lost_nor_allocated_twice(actions in prop::collection::vec((0u8..4, 0usize..6, 0u32..3), 1..200)) {
            let mut cache = KvCacheManager::new(12, true);
            let mut sequences: Vec<Vec<BlockId>> = Vec::new();
            for (action, size, salt) in actions {
                let tokens: Vec<u32> = (0..(size * BLOCK_SIZE) as u32 + 1).map(|t| t / 20 * salt).collect();
                match action {
                    0 | 1 => {
                        let (mut blocks, _) = cache.allocate_prefix(&tokens);
                        match cache.allocate(size + 1 - blocks.len()) {
                            Some(more) => {
                                blocks.extend(more);
                                fill(&mut cache, &blocks, &tokens);
                                sequences.push(blocks);
                            }
                            None => cache.free(&blocks),
                        }
                    }
                    _ if !sequences.is_empty() => {
                        let blocks = sequences.swap_remove(size % sequences.len());
                        cache.free(&blocks);
                    }
                    _ => {}
                }
                let mut used: Vec<BlockId> = sequences.iter().flatten().copied().collect();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len(), cache.used());
            }
            for blocks in &sequences {
                cache.free(blocks);
            }
            prop_assert_eq!(cache.available(), 12);
        }
    }
}
