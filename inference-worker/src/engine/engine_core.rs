//! The engine's loop: receive requests, schedule a step, compute it, send its outputs.
//!
//! Runs on the engine's thread only.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed, mpsc::Receiver},
    time::Instant,
};

use super::{
    EngineOptions, EngineStats, Event, Request,
    output::FinishReason,
    sampling::{TokenLogprobs, logprobs},
    scheduler::{PrefixCacheStats, ScheduledChunk, Scheduler, Sequence, StepLimits},
};
use crate::{
    backend::{OutputKind, SequenceChunk, StepOutput},
    metrics::ModelMetrics,
    model::{LoadError, Model},
};

/// Bounds of the adaptive number of prompt tokens per step.
const PROMPT_TOKENS: std::ops::RangeInclusive<usize> = 32..=512;

pub struct EngineCore {
    model: Model,
    scheduler: Scheduler,
    requests: Receiver<Request>,
    options: EngineOptions,
    stats: Arc<EngineStats>,
    metrics: ModelMetrics,
    output: StepOutput,
    last_id: u64,
    /// Running mean of the seconds per prompt token.
    prompt_token_seconds: f64,
    reported: ReportedCounts,
}

/// Counts of the scheduler that are already added to the metrics.
#[derive(Default)]
struct ReportedCounts {
    preemptions: u64,
    prefix_cache: PrefixCacheStats,
}

/// Computes a prompt of two tokens and then one more, so that the first request does not pay for one-time work, and
/// damaged weights are found before the model is in service.
pub fn warm_up(model: &mut Model) -> Result<(), LoadError> {
    let mut out = StepOutput::default();
    for (start, tokens) in [(0, &[0u32, 1][..]), (2, &[1][..])] {
        let chunk = SequenceChunk { tokens, start, block_table: &[0], output: OutputKind::LastLogits };
        let tokens_exist = tokens.iter().all(|t| (*t as usize) < model.config.vocab);
        if !tokens_exist {
            continue;
        }
        model
            .backend
            .step(&[chunk], &mut out)
            .map_err(|e| LoadError::Options(format!("the warm-up step failed: {e}")))?;
        if out.logits.iter().any(|l| !l.is_finite()) {
            return Err(LoadError::Options(
                "the warm-up step returned logits that are NaN or infinite: the weights are damaged; fetch the \
                 model again"
                    .into(),
            ));
        }
    }
    Ok(())
}

impl EngineCore {
    pub fn new(
        model: Model,
        scheduler: Scheduler,
        requests: Receiver<Request>,
        options: EngineOptions,
        stats: Arc<EngineStats>,
        metrics: ModelMetrics,
    ) -> Self {
        Self {
            model,
            scheduler,
            requests,
            options,
            stats,
            metrics,
            output: StepOutput::default(),
            last_id: 0,
            prompt_token_seconds: 1e-3,
            reported: ReportedCounts::default(),
        }
    }

    /// Runs until all handles are dropped and all sequences have finished.
    pub fn run(mut self) {
        let _guard = StoppedGuard(self.stats.clone());
        loop {
            if self.scheduler.is_idle() {
                self.publish_stats();
                match self.requests.recv() {
                    Ok(request) => self.enqueue(request),
                    Err(_) => return,
                }
            }
            while let Ok(request) = self.requests.try_recv() {
                self.enqueue(request);
            }
            for sequence in self.scheduler.remove_cancelled() {
                self.record_finished(&sequence, FinishReason::Abort);
            }
            let chunks = self.scheduler.schedule(self.step_limits());
            self.publish_stats();
            if chunks.is_empty() {
                self.reject_oversized();
                continue;
            }
            self.step(&chunks);
        }
    }

    fn step_limits(&self) -> StepLimits {
        let adaptive = (self.options.target_step_time.as_secs_f64() / self.prompt_token_seconds) as usize;
        let adaptive = adaptive.clamp(*PROMPT_TOKENS.start(), *PROMPT_TOKENS.end());
        StepLimits {
            max_running: self.options.max_running,
            prompt_tokens: self.options.prompt_tokens_per_step.unwrap_or(adaptive),
        }
    }

    fn enqueue(&mut self, request: Request) {
        self.last_id += 1;
        self.scheduler.waiting.push_back(Sequence::new(request, self.last_id));
    }

    /// Ends the oldest waiting sequence with an error if no sequence runs: it is larger than the whole KV cache. The
    /// API rejects such requests, so this is only a safeguard.
    fn reject_oversized(&mut self) {
        if self.scheduler.running.is_empty()
            && let Some(sequence) = self.scheduler.waiting.pop_front()
        {
            sequence.send(Event::Failed("the request does not fit into the KV cache".into()));
            self.record_finished(&sequence, FinishReason::Abort);
        }
    }

    fn step(&mut self, chunks: &[ScheduledChunk]) {
        let began = Instant::now();
        let samples_on_device = self.model.backend.samples_on_device();
        let running = &mut self.scheduler.running;
        let outputs: Vec<OutputKind> = chunks
            .iter()
            .map(|c| required_output(&mut running[c.index], c.tokens, samples_on_device))
            .collect();
        for chunk in chunks {
            running[chunk.index].first_scheduled.get_or_insert(began);
        }
        let batch: Vec<SequenceChunk<'_>> = chunks
            .iter()
            .zip(&outputs)
            .map(|(chunk, output)| {
                let s = &running[chunk.index];
                let start = s.computed_tokens;
                let tokens = &s.tokens[start..start + chunk.tokens];
                SequenceChunk { tokens, start, block_table: &s.block_table, output: *output }
            })
            .collect();
        let (backend, output) = (&mut self.model.backend, &mut self.output);
        let result = catch_unwind(AssertUnwindSafe(|| backend.step(&batch, output)));
        drop(batch);
        let failure = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("internal error in the backend; see the log of the worker".into()),
        };
        if let Some(failure) = failure {
            self.fail(chunks, &failure);
            return;
        }
        let prompt: usize = chunks.iter().filter(|c| c.tokens > 1).map(|c| c.tokens).sum();
        if prompt >= 16 {
            let seconds = began.elapsed().as_secs_f64() / prompt as f64;
            self.prompt_token_seconds += 0.2 * (seconds - self.prompt_token_seconds);
        }
        self.stats.prompt_tokens.fetch_add(prompt as u64, Relaxed);
        self.process_outputs(chunks, &outputs);
    }

    /// Processes the outputs of a step. Finished sequences are removed from the highest index down, so that the other
    /// indices stay valid.
    fn process_outputs(&mut self, chunks: &[ScheduledChunk], outputs: &[OutputKind]) {
        let output = std::mem::take(&mut self.output);
        let mut row = 0;
        let mut hidden_sums = output.hidden_sums.iter();
        let mut sampled_ids = output.sampled_ids.iter();
        let mut finished: Vec<(usize, FinishReason)> = Vec::new();
        for (chunk, kind) in chunks.iter().zip(outputs) {
            self.scheduler.mark_computed(chunk.index, chunk.tokens);
            let reason = match kind {
                OutputKind::None => None,
                OutputKind::HiddenSum => {
                    hidden_sums.next().and_then(|sum| self.add_hidden_states(chunk.index, sum))
                }
                OutputKind::SampledId(_) => sampled_ids.next().and_then(|id| {
                    let s = &mut self.scheduler.running[chunk.index];
                    if let Some(generation) = &mut s.generation {
                        generation.sampler.record(*id);
                    }
                    self.append_token(chunk.index, *id, None)
                }),
                OutputKind::LastLogits => {
                    row += 1;
                    let logits = &output.logits[(row - 1) * output.vocab..row * output.vocab];
                    self.sample_token(chunk.index, logits)
                }
                OutputKind::AllLogits => {
                    let rows = &output.logits[row * output.vocab..(row + chunk.tokens) * output.vocab];
                    row += chunk.tokens;
                    self.add_prompt_logprobs(chunk, rows, output.vocab)
                }
            };
            finished.extend(reason.map(|r| (chunk.index, r)));
        }
        finished.sort_by_key(|f| std::cmp::Reverse(f.0));
        for (index, reason) in finished {
            let sequence = self.scheduler.remove_running(index);
            sequence.send(Event::Finished { reason, cached_tokens: sequence.cached_tokens });
            self.record_finished(&sequence, reason);
        }
        self.output = output;
    }

    /// Adds the hidden states of a chunk; after the last chunk, sends the embedding.
    fn add_hidden_states(&mut self, index: usize, sum: &[f32]) -> Option<FinishReason> {
        let s = &mut self.scheduler.running[index];
        s.hidden_sum.resize(sum.len(), 0.0);
        s.hidden_sum.iter_mut().zip(sum).for_each(|(total, v)| *total += v);
        if s.uncomputed_tokens() > 0 {
            return None;
        }
        self.metrics.prompt_tokens.inc_by(s.request.prompt.len() as u64);
        // OpenAI's embeddings have unit length, so the sum can stand for the mean.
        let length = s.hidden_sum.iter().map(|v| v * v).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        let embedding = s.hidden_sum.iter().map(|v| v / length).collect();
        s.send(Event::Embedding(embedding));
        Some(FinishReason::Stop)
    }

    /// Adds the log-probabilities of a chunk of the prompt; after the last chunk, sends them and samples the first
    /// token.
    fn add_prompt_logprobs(
        &mut self,
        chunk: &ScheduledChunk,
        rows: &[f32],
        vocab: usize,
    ) -> Option<FinishReason> {
        let s = &mut self.scheduler.running[chunk.index];
        let alternatives = s.params().and_then(|p| p.prompt_logprobs).unwrap_or(0);
        let start = s.computed_tokens - chunk.tokens;
        for (i, row) in rows.chunks_exact(vocab).enumerate() {
            if let Some(next) = s.request.prompt.get(start + i + 1) {
                let entry = logprobs(row, *next, alternatives);
                s.prompt_logprobs.push(entry);
            }
        }
        if s.uncomputed_tokens() > 0 {
            return None;
        }
        if s.output_tokens() == 0 {
            let all = std::mem::take(&mut s.prompt_logprobs);
            s.send(Event::PromptLogprobs(all));
        }
        self.sample_token(chunk.index, &rows[rows.len() - vocab..])
    }

    fn sample_token(&mut self, index: usize, logits: &[f32]) -> Option<FinishReason> {
        let s = &mut self.scheduler.running[index];
        let output_tokens = s.output_tokens();
        let banned: Vec<u32> = match s.params() {
            Some(p) if output_tokens < p.min_tokens => {
                self.model.eos.iter().chain(&p.stop_token_ids).copied().collect()
            }
            _ => Vec::new(),
        };
        let (id, logprobs) = s.generation.as_mut()?.sampler.sample(logits, &banned);
        self.append_token(index, id, logprobs)
    }

    /// Appends a token to its sequence and sends it to the client.
    fn append_token(
        &mut self,
        index: usize,
        id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Option<FinishReason> {
        self.record_token(index);
        let s = &mut self.scheduler.running[index];
        s.tokens.push(id);
        let output_tokens = s.output_tokens();
        let (context_full, p) = (s.tokens.len() >= self.model.max_context, s.params()?);
        let is_end = p.stop_token_ids.contains(&id) || (!p.ignore_eos && self.model.eos.contains(&id));
        let (include_stop, max_tokens) = (p.include_stop, p.max_tokens);
        let output = &mut s.generation.as_mut()?.text;
        let tokenizer = &self.model.tokenizer;
        let (mut text, stop_string_found) = if is_end && !include_stop {
            (String::new(), false)
        } else {
            output.push(tokenizer, id).unwrap_or_default()
        };
        let reason = match () {
            () if is_end || stop_string_found => Some(FinishReason::Stop),
            () if output_tokens >= max_tokens || context_full => Some(FinishReason::Length),
            () => None,
        };
        if reason.is_some() && !stop_string_found {
            text += &output.finish(tokenizer).unwrap_or_default();
        }
        s.send(Event::Token { id, text, logprobs });
        reason
    }

    /// Records the time of a new token.
    fn record_token(&mut self, index: usize) {
        let now = Instant::now();
        let s = &mut self.scheduler.running[index];
        match s.last_token.replace(now) {
            None => {
                self.metrics.prompt_tokens.inc_by(s.request.prompt.len() as u64);
                let latency = now - s.request.arrived;
                self.metrics.time_to_first_token.observe(latency.as_secs_f64());
                self.stats.first_token_us.fetch_add(latency.as_micros() as u64, Relaxed);
                self.stats.first_tokens.fetch_add(1, Relaxed);
                let scheduled = s.first_scheduled.unwrap_or(now);
                self.metrics.queue_time.observe((scheduled - s.request.arrived).as_secs_f64());
            }
            Some(before) => self.metrics.time_per_output_token.observe((now - before).as_secs_f64()),
        }
        self.stats.generated_tokens.fetch_add(1, Relaxed);
        self.metrics.generation_tokens.inc();
    }

    /// Ends the sequences of a failed step with an error. The other sequences continue.
    fn fail(&mut self, chunks: &[ScheduledChunk], failure: &str) {
        tracing::error!(failure, sequences = chunks.len(), "step failed; its requests end with an error");
        self.stats.failed_steps.fetch_add(1, Relaxed);
        let mut indices: Vec<usize> = chunks.iter().map(|c| c.index).collect();
        indices.sort_unstable_by(|a, b| b.cmp(a));
        for index in indices {
            let sequence = self.scheduler.remove_running(index);
            sequence.send(Event::Failed(failure.to_owned()));
            // `failed` is counted after `finished`, so that a reader never sees more failed than finished requests.
            self.record_finished(&sequence, FinishReason::Abort);
            self.stats.failed.fetch_add(1, Relaxed);
        }
    }

    /// Updates stats and metrics for a finished sequence.
    fn record_finished(&self, sequence: &Sequence, reason: FinishReason) {
        self.stats.in_flight.fetch_sub(1, Relaxed);
        self.stats.in_flight_tokens.fetch_sub(sequence.request.prompt.len(), Relaxed);
        self.stats.finished.fetch_add(1, Relaxed);
        self.metrics.count_finished(reason);
        if reason != FinishReason::Abort {
            self.metrics.e2e_latency.observe(sequence.request.arrived.elapsed().as_secs_f64());
        }
    }

    fn publish_stats(&mut self) {
        let s = &self.scheduler;
        self.stats.running.store(s.running.len(), Relaxed);
        self.stats.waiting.store(s.waiting.len(), Relaxed);
        self.stats.kv_used.store(s.cache.used(), Relaxed);
        let reported = &mut self.reported;
        self.metrics.preemptions.inc_by(s.preemptions - reported.preemptions);
        self.metrics.prefix_queries.inc_by(s.prefix_cache.queries - reported.prefix_cache.queries);
        self.metrics.prefix_hits.inc_by(s.prefix_cache.hits - reported.prefix_cache.hits);
        *reported = ReportedCounts { preemptions: s.preemptions, prefix_cache: s.prefix_cache };
    }
}

/// Records on drop that the engine's thread has ended, even if it panicked.
struct StoppedGuard(Arc<EngineStats>);

impl Drop for StoppedGuard {
    fn drop(&mut self) {
        self.0.stopped.store(true, Relaxed);
    }
}

/// Returns the output that a sequence needs for its next `tokens` tokens.
fn required_output(s: &mut Sequence, tokens: usize, samples_on_device: bool) -> OutputKind {
    let is_last_chunk = s.computed_tokens + tokens == s.tokens.len();
    let bans_end_tokens = s.params().is_some_and(|p| s.output_tokens() < p.min_tokens);
    match s.params() {
        None => OutputKind::HiddenSum,
        Some(p)
            if p.prompt_logprobs.is_some()
                && s.computed_tokens < s.request.prompt.len()
                && s.output_tokens() == 0 =>
        {
            OutputKind::AllLogits
        }
        Some(_) if !is_last_chunk => OutputKind::None,
        Some(_) => {
            let generation = s.generation.as_mut().filter(|_| samples_on_device && !bans_end_tokens);
            let sampling = generation.and_then(|g| g.sampler.device_sampling());
            sampling.map_or(OutputKind::LastLogits, OutputKind::SampledId)
        }
    }
}
