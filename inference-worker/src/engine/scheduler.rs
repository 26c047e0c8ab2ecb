//! Which sequences take part in the next step, and with how many tokens.
//!
//! Pure but for the clock that requests carry: owns the waiting and the running sequences and the
//! [`KvCache`]; no tensors. Each step takes one token of every generating sequence first, then prompt tokens
//! up to a budget, shortest remainder first so that a short request is not held up by a long one (every
//! fourth step the oldest goes first, so that none starves). Called by the engine.

use std::collections::VecDeque;

use super::{
    kv_cache::{BlockId, KvCache, ROOT},
    output::TextOutput,
    request::{Event, Generate, Request, Work},
    sampling::{Sampler, TokenLogprobs},
};
use crate::backend::BLOCK;

/// A request inside the engine.
#[derive(Debug)]
pub struct Sequence {
    /// Where it came from.
    pub request: Request,
    /// Order of arrival.
    pub number: u64,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Its blocks.
    pub blocks: Vec<BlockId>,
    /// Chain numbers of its full blocks.
    pub chains: Vec<u64>,
    /// Sampler and text, for generations.
    pub writer: Option<(Sampler, TextOutput)>,
    /// Prompt tokens found in the cache at first.
    pub cached: usize,
    /// Sum of hidden states, for embeddings.
    pub pooled: Vec<f32>,
    /// Log-probabilities of the prompt so far.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// When it first ran, and when its latest token came.
    pub started: Option<std::time::Instant>,
    /// When the previous token came.
    pub last_token: Option<std::time::Instant>,
}

impl Sequence {
    /// A new one.
    pub fn new(request: Request, number: u64) -> Self {
        let writer = match &request.work {
            Work::Generate(g) => Some((
                Sampler::new(g.sampling.clone(), &request.prompt),
                TextOutput::new(g.stop.clone(), g.include_stop, g.skip_special),
            )),
            Work::Embed => None,
        };
        Self {
            tokens: request.prompt.clone(),
            request,
            number,
            computed: 0,
            blocks: Vec::new(),
            chains: Vec::new(),
            writer,
            cached: 0,
            pooled: Vec::new(),
            prompt_logprobs: Vec::new(),
            started: None,
            last_token: None,
        }
    }

    /// Settings, when it generates.
    pub fn generate(&self) -> Option<&Generate> {
        match &self.request.work {
            Work::Generate(g) => Some(g),
            Work::Embed => None,
        }
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Tokens not yet computed: 1 while generating, more while in its prompt (or after preemption).
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether every token's logits or hidden state are needed, so that nothing may come from the cache.
    fn needs_all(&self) -> bool {
        match &self.request.work {
            Work::Embed => true,
            Work::Generate(g) => g.prompt_logprobs.is_some(),
        }
    }

    /// Whether full blocks of its prompt, which others could share, are still to be computed.
    fn will_share(&self) -> bool {
        self.computed < self.request.prompt.len().saturating_sub(1) / BLOCK * BLOCK
    }

    /// Sends an event; false when nobody listens any more.
    pub fn send(&self, event: Event) -> bool {
        self.request.events.send(event).is_ok()
    }
}

/// Limits of a step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_running: usize,
    /// Prompt tokens per step.
    pub prompt_tokens: usize,
}

/// A sequence's share of a step: index into `running`, and how many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Index into [`Scheduler::running`].
    pub index: usize,
    /// Tokens from `computed` on.
    pub tokens: usize,
}

/// Waiting and running sequences.
#[derive(Debug)]
pub struct Scheduler {
    /// Not yet started, or preempted; oldest first.
    pub waiting: VecDeque<Sequence>,
    /// With blocks, oldest first.
    pub running: Vec<Sequence>,
    /// The blocks.
    pub cache: KvCache,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Prompt tokens looked up and found in the prefix cache so far.
    pub prefix: (u64, u64),
    steps: u64,
}

impl Scheduler {
    /// Over a cache.
    pub fn new(cache: KvCache) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache,
            preemptions: 0,
            prefix: (0, 0),
            steps: 0,
        }
    }

    /// Nothing to do.
    pub fn idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Drops sequences whose client has gone; gives them back for the books.
    pub fn reap(&mut self) -> Vec<Sequence> {
        let mut gone = Vec::new();
        let mut i = 0;
        while i < self.waiting.len() {
            if self.waiting[i].request.events.is_closed() {
                gone.extend(self.waiting.remove(i));
            } else {
                i += 1;
            }
        }
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].request.events.is_closed() {
                gone.push(self.finish(i));
            } else {
                i += 1;
            }
        }
        gone
    }

    /// Takes a running sequence out and frees its blocks.
    pub fn finish(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.free(&mut sequence);
        sequence
    }

    fn free(&mut self, sequence: &mut Sequence) {
        self.cache.release(&std::mem::take(&mut sequence.blocks));
        sequence.chains.clear();
        sequence.computed = 0;
    }

    /// Plans a step. Empty when nothing can run.
    pub fn plan(&mut self, limits: Limits) -> Vec<Share> {
        self.steps += 1;
        self.grow_generating();
        self.admit(limits);
        let mut shares: Vec<Share> = (0..self.running.len())
            .filter(|i| self.running[*i].remaining() == 1)
            .map(|index| Share { index, tokens: 1 })
            .collect();
        let mut prompts: Vec<usize> =
            (0..self.running.len()).filter(|i| self.running[*i].remaining() > 1).collect();
        if !self.steps.is_multiple_of(4) {
            prompts.sort_by_key(|i| (self.running[*i].remaining(), self.running[*i].number));
        }
        // A step that ends with somebody's first token is kept short: a long prompt fills it up to half only.
        let whole = limits.prompt_tokens.max(1);
        let (mut budget, mut ends_one) = (whole, false);
        for index in prompts {
            let remaining = self.running[index].remaining();
            let room = if ends_one && remaining > budget { budget.saturating_sub(whole / 2) } else { budget };
            let tokens = remaining.min(room);
            if tokens == 0 {
                continue;
            }
            budget -= tokens;
            ends_one |= tokens == remaining;
            shares.push(Share { index, tokens });
        }
        shares
    }

    /// Gives each generating sequence room for its next token; preempts the youngest when there is none.
    fn grow_generating(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &self.running[i];
            if sequence.tokens.len().div_ceil(BLOCK) <= sequence.blocks.len() {
                i += 1;
                continue;
            }
            match self.cache.take(1) {
                Some(block) => self.running[i].blocks.extend(block),
                // The youngest gives way; when that is this one, it waits, and the loop ends with it.
                None => self.preempt_youngest(),
            }
        }
    }

    fn preempt_youngest(&mut self) {
        let youngest = (0..self.running.len()).max_by_key(|i| self.running[*i].number);
        if let Some(index) = youngest {
            let mut sequence = self.running.remove(index);
            self.free(&mut sequence);
            // What was summed up so far is computed again from the start.
            sequence.pooled.clear();
            sequence.prompt_logprobs.clear();
            self.preemptions += 1;
            let place = self.waiting.partition_point(|w| w.number < sequence.number);
            self.waiting.insert(place, sequence);
        }
    }

    /// Starts waiting sequences, oldest first, while there is room.
    fn admit(&mut self, limits: Limits) {
        let mut i = 0;
        while i < self.waiting.len() && self.running.len() < limits.max_running {
            let candidate = &self.waiting[i];
            let group = candidate.request.group;
            // A sibling whose prompt is being computed will leave blocks to share.
            if self.running.iter().any(|r| r.request.group == group && r.will_share()) {
                i += 1;
                continue;
            }
            let fresh = candidate.computed == 0 && candidate.generated() == 0;
            let (mut blocks, chains) = if candidate.needs_all() {
                Default::default()
            } else {
                self.cache.take_prefix(&candidate.tokens)
            };
            // One block beyond the next token's keeps a new prompt from preempting at once.
            let need = candidate.tokens.len().div_ceil(BLOCK) - blocks.len();
            let spare = usize::from(!self.running.is_empty());
            let more = if self.cache.available() >= need + spare { self.cache.take(need) } else { None };
            let Some(more) = more else {
                self.cache.release(&blocks);
                break;
            };
            let Some(mut sequence) = self.waiting.remove(i) else { break };
            let found = blocks.len() * BLOCK;
            blocks.extend(more);
            sequence.computed = found;
            sequence.blocks = blocks;
            sequence.chains = chains;
            if fresh {
                sequence.cached = found;
                self.prefix.0 += sequence.tokens.len() as u64;
                self.prefix.1 += found as u64;
            }
            let place = self.running.partition_point(|r| r.number < sequence.number);
            self.running.insert(place, sequence);
        }
    }

    /// Books a step's tokens: registers blocks that became full.
    pub fn computed(&mut self, index: usize, tokens: usize) {
        let sequence = &mut self.running[index];
        sequence.computed += tokens;
        while (sequence.chains.len() + 1) * BLOCK <= sequence.computed {
            let n = sequence.chains.len();
            let parent = sequence.chains.last().copied().unwrap_or(ROOT);
            let chain =
                self.cache.filled(sequence.blocks[n], parent, &sequence.tokens[n * BLOCK..(n + 1) * BLOCK]);
            sequence.chains.push(chain);
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
