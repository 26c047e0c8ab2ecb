//! The engine's loop: take in requests, plan a step, compute it, hand out its results.
//!
//! Runs on the engine's thread and nowhere else.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed, mpsc::Receiver},
    time::Instant,
};

use super::{
    EngineOptions, Event, Request, Stats,
    output::Finish,
    sampling::logprobs,
    scheduler::{Limits, Scheduler, Sequence, Share},
};
use crate::{
    backend::{SeqPart, StepOutput, Want},
    metrics::ModelMetrics,
    model::{LoadError, Model},
};

/// Bounds of the adaptive number of prompt tokens per step.
const PROMPT_TOKENS: std::ops::RangeInclusive<usize> = 32..=512;

pub struct Runner {
    model: Model,
    scheduler: Scheduler,
    inbox: Receiver<Request>,
    options: EngineOptions,
    stats: Arc<Stats>,
    metrics: ModelMetrics,
    output: StepOutput,
    next_number: u64,
    /// Running mean of the seconds that a prompt token costs.
    prompt_cost: f64,
    booked: Booked,
}

/// Counts already passed on to the metrics.
#[derive(Default)]
struct Booked {
    preemptions: u64,
    prefix: (u64, u64),
}

/// Computes one token, so that the first request does not pay for what happens only once, and so that
/// weights which give nonsense are found before anybody is sent here.
pub fn warm_up(model: &mut Model) -> Result<(), LoadError> {
    let mut out = StepOutput::default();
    for (start, tokens) in [(0, &[0u32, 1][..]), (2, &[1][..])] {
        let part = SeqPart { tokens, start, blocks: &[0], want: Want::Last };
        let tokens_ok = tokens.iter().all(|t| (*t as usize) < model.config.vocab);
        if !tokens_ok {
            continue;
        }
        model
            .backend
            .step(&[part], &mut out)
            .map_err(|e| LoadError::Options(format!("the warm-up step failed: {e}")))?;
        if out.logits.iter().any(|l| !l.is_finite()) {
            return Err(LoadError::Options(
                "the warm-up step gave logits that are no numbers: the weights are damaged".into(),
            ));
        }
    }
    Ok(())
}

impl Runner {
    pub fn new(
        model: Model,
        scheduler: Scheduler,
        inbox: Receiver<Request>,
        options: EngineOptions,
        stats: Arc<Stats>,
        metrics: ModelMetrics,
    ) -> Self {
        Self {
            model,
            scheduler,
            inbox,
            options,
            stats,
            metrics,
            output: StepOutput::default(),
            next_number: 0,
            prompt_cost: 1e-3,
            booked: Booked::default(),
        }
    }

    /// Until every handle is gone and every sequence done.
    pub fn run(mut self) {
        let _mark = MarkStopped(self.stats.clone());
        loop {
            if self.scheduler.idle() {
                self.publish();
                match self.inbox.recv() {
                    Ok(request) => self.accept(request),
                    Err(_) => return,
                }
            }
            while let Ok(request) = self.inbox.try_recv() {
                self.accept(request);
            }
            for sequence in self.scheduler.reap() {
                self.leave(&sequence, Finish::Abort);
            }
            let shares = self.scheduler.plan(self.limits());
            self.publish();
            if shares.is_empty() {
                self.refuse_what_never_fits();
                continue;
            }
            self.step(&shares);
        }
    }

    fn limits(&self) -> Limits {
        let adaptive = (self.options.step_goal.as_secs_f64() / self.prompt_cost) as usize;
        let adaptive = adaptive.clamp(*PROMPT_TOKENS.start(), *PROMPT_TOKENS.end());
        Limits {
            max_running: self.options.max_running,
            prompt_tokens: self.options.prompt_tokens.unwrap_or(adaptive),
        }
    }

    fn accept(&mut self, request: Request) {
        self.next_number += 1;
        self.scheduler.waiting.push_back(Sequence::new(request, self.next_number));
    }

    /// Nothing runs and the oldest cannot start: it is larger than the whole cache. The API refuses such
    /// requests, so this is the second line.
    fn refuse_what_never_fits(&mut self) {
        if self.scheduler.running.is_empty()
            && let Some(sequence) = self.scheduler.waiting.pop_front()
        {
            sequence.send(Event::Failed("the request does not fit the KV cache".into()));
            self.leave(&sequence, Finish::Abort);
        }
    }

    fn step(&mut self, shares: &[Share]) {
        let began = Instant::now();
        let on_device = self.model.backend.samples();
        let running = &mut self.scheduler.running;
        let wants: Vec<Want> =
            shares.iter().map(|s| want(&mut running[s.index], s.tokens, on_device)).collect();
        for share in shares {
            running[share.index].started.get_or_insert(began);
        }
        let parts: Vec<SeqPart<'_>> = shares
            .iter()
            .zip(&wants)
            .map(|(share, want)| {
                let s = &running[share.index];
                let tokens = &s.tokens[s.computed..s.computed + share.tokens];
                SeqPart { tokens, start: s.computed, blocks: &s.blocks, want: *want }
            })
            .collect();
        let (backend, output) = (&mut self.model.backend, &mut self.output);
        let outcome = catch_unwind(AssertUnwindSafe(|| backend.step(&parts, output)));
        drop(parts);
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("a bug in the backend (see the log)".into()),
        };
        if let Some(failure) = failure {
            self.fail(shares, &failure);
            return;
        }
        let prompt: usize = shares.iter().filter(|s| s.tokens > 1).map(|s| s.tokens).sum();
        if prompt >= 16 {
            let cost = began.elapsed().as_secs_f64() / prompt as f64;
            self.prompt_cost += 0.2 * (cost - self.prompt_cost);
        }
        self.stats.prompt.fetch_add(prompt as u64, Relaxed);
        self.hand_out(shares, &wants);
    }

    /// Goes through the results; sequences that are done leave, from the highest index down.
    fn hand_out(&mut self, shares: &[Share], wants: &[Want]) {
        let output = std::mem::take(&mut self.output);
        let mut row = 0;
        let mut hidden = output.hidden.iter();
        let mut sampled = output.sampled.iter();
        let mut done: Vec<(usize, Finish)> = Vec::new();
        for (share, want) in shares.iter().zip(wants) {
            self.scheduler.computed(share.index, share.tokens);
            let finish = match want {
                Want::Nothing => None,
                Want::Hidden => hidden.next().and_then(|sum| self.pool(share.index, sum)),
                Want::Sample(_) => sampled.next().and_then(|id| {
                    let s = &mut self.scheduler.running[share.index];
                    if let Some((sampler, _)) = &mut s.writer {
                        sampler.note(*id);
                    }
                    self.token(share.index, *id, None)
                }),
                Want::Last => {
                    row += 1;
                    self.choose(share.index, &output.logits[(row - 1) * output.vocab..row * output.vocab])
                }
                Want::All => {
                    let rows = &output.logits[row * output.vocab..(row + share.tokens) * output.vocab];
                    row += share.tokens;
                    self.prompt_rows(share, rows, output.vocab)
                }
            };
            done.extend(finish.map(|f| (share.index, f)));
        }
        done.sort_by_key(|d| std::cmp::Reverse(d.0));
        for (index, finish) in done {
            let sequence = self.scheduler.finish(index);
            sequence.send(Event::Done { finish, cached: sequence.cached });
            self.leave(&sequence, finish);
        }
        self.output = output;
    }

    /// An embedding's part; done with its last.
    fn pool(&mut self, index: usize, sum: &[f32]) -> Option<Finish> {
        let s = &mut self.scheduler.running[index];
        s.pooled.resize(sum.len(), 0.0);
        s.pooled.iter_mut().zip(sum).for_each(|(p, v)| *p += v);
        if s.remaining() > 0 {
            return None;
        }
        self.metrics.prompt_tokens.inc_by(s.request.prompt.len() as u64);
        // The mean's direction is the sum's; OpenAI's embeddings have unit length.
        let length = s.pooled.iter().map(|v| v * v).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        let embedding = s.pooled.iter().map(|v| v / length).collect();
        s.send(Event::Embedding(embedding));
        Some(Finish::Stop)
    }

    /// Log-probabilities of prompt tokens; after the last of them, the first choice.
    fn prompt_rows(&mut self, share: &Share, rows: &[f32], vocab: usize) -> Option<Finish> {
        let s = &mut self.scheduler.running[share.index];
        let n = s.generate().and_then(|g| g.prompt_logprobs).unwrap_or(0);
        let start = s.computed - share.tokens;
        for (i, row) in rows.chunks_exact(vocab).enumerate() {
            if let Some(next) = s.request.prompt.get(start + i + 1) {
                let entry = logprobs(row, *next, n);
                s.prompt_logprobs.push(entry);
            }
        }
        if s.remaining() > 0 {
            return None;
        }
        if s.generated() == 0 {
            let all = std::mem::take(&mut s.prompt_logprobs);
            s.send(Event::Prompt(all));
        }
        self.choose(share.index, &rows[rows.len() - vocab..])
    }

    fn choose(&mut self, index: usize, logits: &[f32]) -> Option<Finish> {
        let s = &mut self.scheduler.running[index];
        let generated = s.generated();
        let banned: Vec<u32> = match s.generate() {
            Some(g) if generated < g.min_tokens => {
                self.model.eos.iter().chain(&g.stop_ids).copied().collect()
            }
            _ => Vec::new(),
        };
        let (sampler, _) = s.writer.as_mut()?;
        let (id, logprobs) = sampler.choose(logits, &banned);
        self.token(index, id, logprobs)
    }

    /// Books a new token and tells the client.
    fn token(
        &mut self,
        index: usize,
        id: u32,
        logprobs: Option<super::sampling::TokenLogprobs>,
    ) -> Option<Finish> {
        let now = Instant::now();
        let s = &mut self.scheduler.running[index];
        match s.last_token.replace(now) {
            None => {
                self.metrics.prompt_tokens.inc_by(s.request.prompt.len() as u64);
                let waited = now - s.request.arrived;
                self.metrics.time_to_first_token.observe(waited.as_secs_f64());
                self.stats.first_token_us.fetch_add(waited.as_micros() as u64, Relaxed);
                self.stats.first_tokens.fetch_add(1, Relaxed);
                let started = s.started.unwrap_or(now);
                self.metrics.queue_time.observe((started - s.request.arrived).as_secs_f64());
            }
            Some(before) => self.metrics.time_per_output_token.observe((now - before).as_secs_f64()),
        }
        self.stats.generated.fetch_add(1, Relaxed);
        self.metrics.generation_tokens.inc();
        s.tokens.push(id);
        let generated = s.generated();
        let (full, g) = (s.tokens.len() >= self.model.max_context, s.generate()?);
        let ends = g.stop_ids.contains(&id) || (!g.ignore_eos && self.model.eos.contains(&id));
        let (include_stop, max_tokens) = (g.include_stop, g.max_tokens);
        let (_, text) = s.writer.as_mut()?;
        let tokenizer = &self.model.tokenizer;
        let (mut piece, stopped) = if ends && !include_stop {
            (String::new(), false)
        } else {
            text.push(tokenizer, id).unwrap_or_default()
        };
        let finish = match () {
            () if ends || stopped => Some(Finish::Stop),
            () if generated >= max_tokens || full => Some(Finish::Length),
            () => None,
        };
        if finish.is_some() && !stopped {
            piece += &text.finish(tokenizer).unwrap_or_default();
        }
        s.send(Event::Token { id, text: piece, logprobs });
        finish
    }

    /// A step failed: its sequences end with an error, the others go on.
    fn fail(&mut self, shares: &[Share], failure: &str) {
        tracing::error!(failure, sequences = shares.len(), "a step failed");
        self.stats.failures.fetch_add(1, Relaxed);
        let mut indices: Vec<usize> = shares.iter().map(|s| s.index).collect();
        indices.sort_unstable_by(|a, b| b.cmp(a));
        for index in indices {
            let sequence = self.scheduler.finish(index);
            sequence.send(Event::Failed(failure.to_owned()));
            // After it counts as finished: nobody may see more failed than that.
            self.leave(&sequence, Finish::Abort);
            self.stats.failed.fetch_add(1, Relaxed);
        }
    }

    /// Books a sequence's end.
    fn leave(&self, sequence: &Sequence, finish: Finish) {
        self.stats.in_flight.fetch_sub(1, Relaxed);
        self.stats.in_flight_tokens.fetch_sub(sequence.request.prompt.len(), Relaxed);
        self.stats.finished.fetch_add(1, Relaxed);
        self.metrics.finished(finish);
        if finish != Finish::Abort {
            self.metrics.e2e_latency.observe(sequence.request.arrived.elapsed().as_secs_f64());
        }
    }

    fn publish(&mut self) {
        let s = &self.scheduler;
        self.stats.running.store(s.running.len(), Relaxed);
        self.stats.waiting.store(s.waiting.len(), Relaxed);
        self.stats.kv_held.store(s.cache.held(), Relaxed);
        let b = &mut self.booked;
        self.metrics.preemptions.inc_by(s.preemptions - b.preemptions);
        self.metrics.prefix_queries.inc_by(s.prefix.0 - b.prefix.0);
        self.metrics.prefix_hits.inc_by(s.prefix.1 - b.prefix.1);
        (b.preemptions, b.prefix) = (s.preemptions, s.prefix);
    }
}

/// Says that the engine's thread has ended, also when it ended by a bug.
struct MarkStopped(Arc<Stats>);

impl Drop for MarkStopped {
    fn drop(&mut self) {
        self.0.stopped.store(true, Relaxed);
    }
}

/// What a sequence needs of its share of a step.
fn want(s: &mut Sequence, tokens: usize, on_device: bool) -> Want {
    let last = s.computed + tokens == s.tokens.len();
    let banned = s.generate().is_some_and(|g| s.generated() < g.min_tokens);
    match s.generate() {
        None => Want::Hidden,
        Some(g)
            if g.prompt_logprobs.is_some() && s.computed < s.request.prompt.len() && s.generated() == 0 =>
        {
            Want::All
        }
        Some(_) if !last => Want::Nothing,
        Some(_) => {
            let sampler = s.writer.as_mut().filter(|_| on_device && !banned);
            sampler.and_then(|(sampler, _)| sampler.on_device()).map_or(Want::Last, Want::Sample)
        }
    }
}
