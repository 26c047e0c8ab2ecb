//! Selects the sequences of each step, and the number of tokens of each.
//!
//! Owns the waiting queue, the running sequences and the [`KvCacheManager`]; no tensors, and no clock except the
//! times that requests carry. Each step takes one token of every decoding sequence first, then prompt tokens up to a
//! budget (chunked prefill). The sequence with the fewest tokens left goes first, so that a long prompt does not delay
//! a short one; in every fourth step the oldest goes first, so that no prompt starves. Called by the engine.

use std::collections::VecDeque;

use super::{
    kv_cache::{BlockId, KvCacheManager, ROOT_PREFIX},
    output::OutputText,
    request::{Event, GenerationParams, Request, Task},
    sampling::{Sampler, TokenLogprobs},
};
use crate::backend::BLOCK_SIZE;

/// State of a generation.
#[derive(Debug)]
pub struct Generation {
    /// Samples its tokens.
    pub sampler: Sampler,
    /// Its text.
    pub text: OutputText,
}

/// A request inside the engine.
#[derive(Debug)]
pub struct Sequence {
    /// The request.
    pub request: Request,
    /// Number in order of arrival.
    pub id: u64,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    /// Number of leading tokens whose keys and values are in the KV cache.
    pub computed_tokens: usize,
    /// Its KV blocks, in order.
    pub block_table: Vec<BlockId>,
    /// Prefix ids of its full blocks.
    pub prefixes: Vec<u64>,
    /// Sampler and text; None for embeddings.
    pub generation: Option<Generation>,
    /// Prompt tokens found in the prefix cache when it first started.
    pub cached_tokens: usize,
    /// Sum of hidden states so far, for embeddings.
    pub hidden_sum: Vec<f32>,
    /// Log-probabilities of the prompt so far.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Time of its first step.
    pub first_scheduled: Option<std::time::Instant>,
    /// Time of its latest token.
    pub last_token: Option<std::time::Instant>,
}

impl Sequence {
    /// Creates a sequence of which nothing is computed.
    pub fn new(request: Request, id: u64) -> Self {
        let generation = match &request.task {
            Task::Generate(params) => Some(Generation {
                sampler: Sampler::new(params.sampling.clone(), &request.prompt),
                text: OutputText::new(params.stop.clone(), params.include_stop, params.skip_special),
            }),
            Task::Embed => None,
        };
        Self {
            tokens: request.prompt.clone(),
            request,
            id,
            computed_tokens: 0,
            block_table: Vec::new(),
            prefixes: Vec::new(),
            generation,
            cached_tokens: 0,
            hidden_sum: Vec::new(),
            prompt_logprobs: Vec::new(),
            first_scheduled: None,
            last_token: None,
        }
    }

    /// Returns the generation parameters; None for embeddings.
    pub fn params(&self) -> Option<&GenerationParams> {
        match &self.request.task {
            Task::Generate(params) => Some(params),
            Task::Embed => None,
        }
    }

    /// Returns the number of tokens generated so far.
    pub fn output_tokens(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Returns the number of tokens not yet computed: 1 while decoding, more during prefill or after preemption.
    pub fn uncomputed_tokens(&self) -> usize {
        self.tokens.len() - self.computed_tokens
    }

    /// Returns whether logits or hidden states of every token are needed, so that cached blocks cannot be used.
    fn needs_every_token(&self) -> bool {
        match &self.request.task {
            Task::Embed => true,
            Task::Generate(params) => params.prompt_logprobs.is_some(),
        }
    }

    /// Returns whether full blocks of its prompt, which other sequences could share, are not yet computed.
    fn will_cache_prompt_blocks(&self) -> bool {
        self.computed_tokens < self.request.prompt.len().saturating_sub(1) / BLOCK_SIZE * BLOCK_SIZE
    }

    /// Sends an event. Returns false if the receiver is gone.
    pub fn send(&self, event: Event) -> bool {
        self.request.events.send(event).is_ok()
    }
}

/// Limits of a step.
#[derive(Debug, Clone, Copy)]
pub struct StepLimits {
    /// Maximum number of running sequences.
    pub max_running: usize,
    /// Maximum number of prompt tokens per step.
    pub prompt_tokens: usize,
}

/// The tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledChunk {
    /// Index into [`Scheduler::running`].
    pub index: usize,
    /// Number of tokens, from the first uncomputed one on.
    pub tokens: usize,
}

/// Use of the prefix cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrefixCacheStats {
    /// Prompt tokens looked up so far.
    pub queries: u64,
    /// Prompt tokens found so far.
    pub hits: u64,
}

/// The waiting queue and the running sequences.
#[derive(Debug)]
pub struct Scheduler {
    /// Sequences not started yet or preempted, oldest first.
    pub waiting: VecDeque<Sequence>,
    /// Sequences with KV blocks, oldest first.
    pub running: Vec<Sequence>,
    /// The KV blocks.
    pub cache: KvCacheManager,
    /// Number of preemptions so far.
    pub preemptions: u64,
    /// Use of the prefix cache so far.
    pub prefix_cache: PrefixCacheStats,
    steps: u64,
}

impl Scheduler {
    /// Creates a scheduler without sequences.
    pub fn new(cache: KvCacheManager) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache,
            preemptions: 0,
            prefix_cache: PrefixCacheStats::default(),
            steps: 0,
        }
    }

    /// Returns whether no sequence is waiting or running.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Removes the sequences whose clients have disconnected, and returns them.
    pub fn remove_cancelled(&mut self) -> Vec<Sequence> {
        let mut cancelled = Vec::new();
        let mut i = 0;
        while i < self.waiting.len() {
            if self.waiting[i].request.events.is_closed() {
                cancelled.extend(self.waiting.remove(i));
            } else {
                i += 1;
            }
        }
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].request.events.is_closed() {
                cancelled.push(self.remove_running(i));
            } else {
                i += 1;
            }
        }
        cancelled
    }

    /// Removes a running sequence and frees its blocks.
    pub fn remove_running(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.free_blocks(&mut sequence);
        sequence
    }

    fn free_blocks(&mut self, sequence: &mut Sequence) {
        self.cache.free(&std::mem::take(&mut sequence.block_table));
        sequence.prefixes.clear();
        sequence.computed_tokens = 0;
    }

    /// Plans a step. Returns no chunks if no sequence can run.
    pub fn schedule(&mut self, limits: StepLimits) -> Vec<ScheduledChunk> {
        self.steps += 1;
        self.allocate_decode_blocks();
        self.admit(limits);
        let mut chunks: Vec<ScheduledChunk> = (0..self.running.len())
            .filter(|i| self.running[*i].uncomputed_tokens() == 1)
            .map(|index| ScheduledChunk { index, tokens: 1 })
            .collect();
        let mut prefills: Vec<usize> =
            (0..self.running.len()).filter(|i| self.running[*i].uncomputed_tokens() > 1).collect();
        if !self.steps.is_multiple_of(4) {
            prefills.sort_by_key(|i| (self.running[*i].uncomputed_tokens(), self.running[*i].id));
        }
        // A step that completes a prompt stays short, because a client waits for its first token: prompts that do
        // not complete may use only half of the budget then.
        let full_budget = limits.prompt_tokens.max(1);
        let (mut budget, mut completes_a_prompt) = (full_budget, false);
        for index in prefills {
            let uncomputed = self.running[index].uncomputed_tokens();
            let limit = if completes_a_prompt && uncomputed > budget {
                budget.saturating_sub(full_budget / 2)
            } else {
                budget
            };
            let tokens = uncomputed.min(limit);
            if tokens == 0 {
                continue;
            }
            budget -= tokens;
            completes_a_prompt |= tokens == uncomputed;
            chunks.push(ScheduledChunk { index, tokens });
        }
        chunks
    }

    /// Allocates a block for the next token of each sequence that needs one; preempts the youngest sequences if no
    /// block is available.
    fn allocate_decode_blocks(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &self.running[i];
            if sequence.tokens.len().div_ceil(BLOCK_SIZE) <= sequence.block_table.len() {
                i += 1;
                continue;
            }
            match self.cache.allocate(1) {
                Some(block) => self.running[i].block_table.extend(block),
                // If the youngest is this sequence itself, the loop ends, because it is the last one.
                None => self.preempt_youngest(),
            }
        }
    }

    fn preempt_youngest(&mut self) {
        let youngest = (0..self.running.len()).max_by_key(|i| self.running[*i].id);
        if let Some(index) = youngest {
            let mut sequence = self.remove_running(index);
            // Its tokens are computed again from the first.
            sequence.hidden_sum.clear();
            sequence.prompt_logprobs.clear();
            self.preemptions += 1;
            let at = self.waiting.partition_point(|w| w.id < sequence.id);
            self.waiting.insert(at, sequence);
        }
    }

    /// Starts waiting sequences, oldest first, while blocks are available.
    fn admit(&mut self, limits: StepLimits) {
        let mut i = 0;
        while i < self.waiting.len() && self.running.len() < limits.max_running {
            let candidate = &self.waiting[i];
            let group = candidate.request.group;
            // Another choice of the same request is computing the prompt; its blocks can be shared later.
            if self.running.iter().any(|r| r.request.group == group && r.will_cache_prompt_blocks()) {
                i += 1;
                continue;
            }
            let is_first_start = candidate.computed_tokens == 0 && candidate.output_tokens() == 0;
            let (mut blocks, prefixes) = if candidate.needs_every_token() {
                Default::default()
            } else {
                self.cache.allocate_prefix(&candidate.tokens)
            };
            // One spare block, so that the new sequence does not cause a preemption in the next step.
            let needed = candidate.tokens.len().div_ceil(BLOCK_SIZE) - blocks.len();
            let spare = usize::from(!self.running.is_empty());
            let more =
                if self.cache.available() >= needed + spare { self.cache.allocate(needed) } else { None };
            let Some(more) = more else {
                self.cache.free(&blocks);
                break;
            };
            let Some(mut sequence) = self.waiting.remove(i) else { break };
            let cached_tokens = blocks.len() * BLOCK_SIZE;
            blocks.extend(more);
            sequence.computed_tokens = cached_tokens;
            sequence.block_table = blocks;
            sequence.prefixes = prefixes;
            if is_first_start {
                sequence.cached_tokens = cached_tokens;
                self.prefix_cache.queries += sequence.tokens.len() as u64;
                self.prefix_cache.hits += cached_tokens as u64;
            }
            let at = self.running.partition_point(|r| r.id < sequence.id);
            self.running.insert(at, sequence);
        }
    }

    /// Marks the next `tokens` of a running sequence as computed, and adds blocks that became full to the prefix
    /// cache.
    pub fn mark_computed(&mut self, index: usize, tokens: usize) {
        let sequence = &mut self.running[index];
        sequence.computed_tokens += tokens;
        while (sequence.prefixes.len() + 1) * BLOCK_SIZE <= sequence.computed_tokens {
            let n = sequence.prefixes.len();
            let parent = sequence.prefixes.last().copied().unwrap_or(ROOT_PREFIX);
            let block = &sequence.tokens[n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE];
            let prefix = self.cache.cache_full_block(sequence.block_table[n], parent, block);
            sequence.prefixes.push(prefix);
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
