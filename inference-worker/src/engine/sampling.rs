//! Samples the next token from logits.
//!
//! Input: a row of logits, the request's [`SamplingParams`] and its output so far. Output: a token id and, if
//! requested, log-probabilities (of the model's own distribution, before penalties and temperature, as in vLLM).
//! Greedy sampling is exact: the highest logit, and the lowest id among equal ones. Called by the engine.

use std::collections::HashMap;

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::backend::DeviceSampling;

/// Parameters of sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Samples from the smallest set of most likely tokens whose probabilities reach this sum; 1 is off.
    pub top_p: f32,
    /// Samples from this many most likely tokens; 0 is off.
    pub top_k: u32,
    /// Minimum probability of a token, relative to the most likely one; 0 is off.
    pub min_p: f32,
    /// Subtracted from the logit of each token in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token in the output, once per occurrence.
    pub frequency_penalty: f32,
    /// Divides positive logits and multiplies negative logits of the tokens in prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Values to add to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed that makes the output repeatable.
    pub seed: Option<u64>,
    /// Number of alternatives per token to report log-probabilities for; None reports nothing.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

/// Log-probabilities of one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Log-probability of the token at this position.
    pub chosen: f32,
    /// The most likely tokens and their log-probabilities, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Samples the tokens of one request.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: StdRng,
    /// Occurrences of each token in the output.
    counts: HashMap<u32, u32>,
    /// Distinct tokens of the prompt, sorted; empty without a repetition penalty.
    prompt: Vec<u32>,
    modified_logits: Vec<f32>,
}

impl Sampler {
    /// Creates a sampler for a request with this prompt.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = params.seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64);
        let mut tokens = Vec::new();
        if params.repetition_penalty != 1.0 {
            tokens = prompt.to_vec();
            tokens.sort_unstable();
            tokens.dedup();
        }
        Self { params, rng, counts: HashMap::new(), prompt: tokens, modified_logits: Vec::new() }
    }

    /// Returns whether penalties or biases change the logits.
    fn modifies_logits(&self) -> bool {
        let s = &self.params;
        s.presence_penalty != 0.0
            || s.frequency_penalty != 0.0
            || s.repetition_penalty != 1.0
            || !s.logit_bias.is_empty()
    }

    /// Returns the parameters for sampling the next token on the device, or None if it must be sampled on the host.
    pub fn device_sampling(&mut self) -> Option<DeviceSampling> {
        let s = &self.params;
        if self.modifies_logits() || s.logprobs.is_some() {
            return None;
        }
        let (temperature, top_k, top_p, min_p) = (s.temperature, s.top_k, s.top_p, s.min_p);
        let uniform = if temperature == 0.0 { 0.0 } else { self.rng.random() };
        Some(DeviceSampling { temperature, top_k, top_p, min_p, uniform })
    }

    /// Records a token that was sampled on the device.
    pub fn record(&mut self, id: u32) {
        *self.counts.entry(id).or_default() += 1;
    }

    /// Samples a token from `logits`, but none of `banned`.
    pub fn sample(&mut self, logits: &[f32], banned: &[u32]) -> (u32, Option<TokenLogprobs>) {
        let id = if self.modifies_logits() || !banned.is_empty() {
            let mut modified = std::mem::take(&mut self.modified_logits);
            modified.clear();
            modified.extend_from_slice(logits);
            self.apply_penalties(&mut modified);
            for id in banned {
                modified[*id as usize] = f32::NEG_INFINITY;
            }
            let id = self.sample_from(&modified);
            self.modified_logits = modified;
            id
        } else {
            self.sample_from(logits)
        };
        self.record(id);
        (id, self.params.logprobs.map(|n| logprobs(logits, id, n)))
    }

    /// Applies penalties and biases.
    fn apply_penalties(&self, logits: &mut [f32]) {
        let s = &self.params;
        if s.repetition_penalty != 1.0 {
            let generated = self.counts.keys().filter(|id| self.prompt.binary_search(id).is_err());
            for id in self.prompt.iter().chain(generated) {
                let l = &mut logits[*id as usize];
                *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
            }
        }
        for (id, count) in &self.counts {
            logits[*id as usize] -= s.presence_penalty + s.frequency_penalty * *count as f32;
        }
        for (id, bias) in &s.logit_bias {
            logits[*id as usize] += bias;
        }
    }

    fn sample_from(&mut self, logits: &[f32]) -> u32 {
        let best = argmax(logits);
        if self.params.temperature == 0.0 {
            return best;
        }
        let candidates = self.candidates(logits, logits[best as usize]);
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        let mut goal = self.rng.random::<f64>() * total;
        for (id, weight) in &candidates {
            goal -= f64::from(*weight);
            if goal < 0.0 {
                return *id;
            }
        }
        candidates.last().map_or(best, |c| c.0)
    }

    /// Returns the tokens that top-k, top-p and min-p leave, with their probabilities relative to the most likely one.
    fn candidates(&self, logits: &[f32], max: f32) -> Vec<(u32, f32)> {
        let s = &self.params;
        let weight = |l: f32| ((l - max) / s.temperature).exp();
        let mut all: Vec<(u32, f32)> = Vec::new();
        // Probabilities below this logit are zero in f32, so leaving them out changes nothing.
        let floor = (max - 25.0 * s.temperature).max(if s.min_p > 0.0 {
            max + s.min_p.ln() * s.temperature
        } else {
            f32::MIN
        });
        all.extend(
            logits.iter().enumerate().filter(|(_, l)| **l >= floor).map(|(id, l)| (id as u32, weight(*l))),
        );
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = s.top_k as usize;
        if k > 0 && k < all.len() {
            all.select_nth_unstable_by(k - 1, order);
            all.truncate(k);
        }
        if s.top_p < 1.0 {
            let total: f64 = all.iter().map(|c| f64::from(c.1)).sum();
            let goal = total * f64::from(s.top_p);
            // A few tokens usually reach the sum, so more are sorted only when needed.
            let mut sorted = 0;
            let mut sum = 0.0;
            let mut keep = all.len();
            'search: while sorted < all.len() {
                let chunk = (all.len() - sorted).min(256.max(sorted));
                if sorted + chunk < all.len() {
                    all[sorted..].select_nth_unstable_by(chunk - 1, order);
                }
                all[sorted..sorted + chunk].sort_unstable_by(order);
                for (i, candidate) in all[sorted..sorted + chunk].iter().enumerate() {
                    sum += f64::from(candidate.1);
                    if sum >= goal {
                        keep = sorted + i + 1;
                        break 'search;
                    }
                }
                sorted += chunk;
            }
            all.truncate(keep.max(1));
        }
        all
    }
}

/// Returns the id of the highest logit, and the lowest id among equal ones.
pub fn argmax(logits: &[f32]) -> u32 {
    // Two vectorised passes are faster than one that tracks the index.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    for chunk in whole {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|v| *v == max).unwrap_or(0) as u32
}

/// Returns the log-probabilities of `id` and of the `n` most likely tokens of a row of logits.
pub fn logprobs(logits: &[f32], id: u32, n: usize) -> TokenLogprobs {
    let max = logits[argmax(logits) as usize];
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let log_sum = sum.ln() as f32 + max;
    let mut top: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n > 0 && n < top.len() {
        top.select_nth_unstable_by(n - 1, order);
    }
    top.truncate(n);
    top.sort_unstable_by(order);
    let top = top.into_iter().map(|t| (t, logits[t as usize] - log_sum)).collect();
    TokenLogprobs { chosen: logits[id as usize] - log_sum, top }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(params: SamplingParams, logits: &[f32], samples: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(SamplingParams { seed: Some(5), ..params }, &[]);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..samples {
            counts[sampler.sample_from(logits) as usize] += 1.0 / samples as f64;
        }
        counts
    }

    #[test]
    fn samples_follow_the_distribution_after_top_k_top_p_min_p_and_temperature() {
        let p = [0.5f32, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
        let close = |got: Vec<f64>, want: [f64; 4]| {
            for (g, w) in got.iter().zip(want) {
                assert!((g - w).abs() < 0.02, "got {got:?}, expected {want:?}");
            }
        };
        let base = SamplingParams::default();
        close(frequencies(base.clone(), &logits, 20_000), [0.5, 0.25, 0.15, 0.1]);
        close(
            frequencies(SamplingParams { top_k: 2, ..base.clone() }, &logits, 20_000),
            [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            frequencies(SamplingParams { top_p: 0.74, ..base.clone() }, &logits, 20_000),
            [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            frequencies(SamplingParams { min_p: 0.29, ..base.clone() }, &logits, 20_000),
            [0.5555, 0.2777, 0.1666, 0.0],
        );
        close(
            frequencies(SamplingParams { temperature: 0.5, ..base }, &logits, 20_000),
            [0.7246, 0.1812, 0.0652, 0.029],
        );
    }

    #[test]
    fn top_p_keeps_the_right_number_of_tokens_of_a_flat_distribution() {
        let logits: Vec<f32> = (0..5000).map(|i| (i % 7) as f32 * 1e-3).collect();
        let sampler = Sampler::new(SamplingParams { top_p: 0.9, ..SamplingParams::default() }, &[]);
        let kept = sampler.candidates(&logits, 6e-3).len();
        assert!((4400..=4600).contains(&kept), "{kept}");
    }

    #[test]
    fn equal_seeds_sample_equal_tokens_and_greedy_takes_the_highest_logit() {
        let logits = [1.0, 1.1, 0.9, 1.05];
        let sample = |seed| {
            let mut s = Sampler::new(SamplingParams { seed: Some(seed), ..SamplingParams::default() }, &[]);
            (0..50).map(|_| s.sample(&logits, &[]).0).collect::<Vec<_>>()
        };
        assert_eq!(sample(1), sample(1));
        assert_ne!(sample(1), sample(2));
        let mut greedy = Sampler::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() }, &[]);
        assert_eq!(greedy.sample(&[1.0, 3.0, 3.0, 2.0], &[]).0, 1);
        assert_eq!(greedy.sample(&[1.0, 3.0, 3.0, 2.0], &[1, 2]).0, 3);
    }

    #[test]
    fn penalties_and_logit_bias_change_the_sampled_token() {
        let logits = [2.0, 1.9, -1.0, 0.0];
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let mut s = Sampler::new(SamplingParams { presence_penalty: 0.5, ..greedy.clone() }, &[]);
        assert_eq!([s.sample(&logits, &[]).0, s.sample(&logits, &[]).0, s.sample(&logits, &[]).0], [0, 1, 0]);
        let mut s = Sampler::new(SamplingParams { repetition_penalty: 2.0, ..greedy.clone() }, &[0]);
        assert_eq!(s.sample(&logits, &[]).0, 1);
        let mut s = Sampler::new(SamplingParams { logit_bias: vec![(2, 100.0)], ..greedy }, &[]);
        assert_eq!(s.sample(&logits, &[]).0, 2);
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let p = [0.5f32, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() + 3.0).collect();
        let l = logprobs(&logits, 2, 2);
        assert!((l.chosen - 0.15f32.ln()).abs() < 1e-5);
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((l.top[1].1 - 0.25f32.ln()).abs() < 1e-5);
    }
}
