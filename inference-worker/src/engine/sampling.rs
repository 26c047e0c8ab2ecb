//! Choosing the next token from logits.
//!
//! Input: a row of logits, the request's [`Sampling`] and what was generated so far. Output: an id and, where
//! asked for, log-probabilities (of the model's own distribution, before penalties and temperature, as vLLM
//! reports them). Greedy is exact: the highest logit, the lowest id of equals. Called by the engine.

use std::collections::HashMap;

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::backend::DeviceSample;

/// How a request wants its tokens chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 is off.
    pub top_p: f32,
    /// So many best tokens; 0 is off.
    pub top_k: u32,
    /// Tokens at least this likely relative to the best; 0 is off.
    pub min_p: f32,
    /// Subtracted from the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to logits by id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Makes the choice repeatable.
    pub seed: Option<u64>,
    /// Number of alternatives to report per token; None reports nothing.
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
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
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// A request's sampler: its settings, random numbers and counts.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    rng: StdRng,
    /// Occurrences in the output.
    counts: HashMap<u32, u32>,
    /// Tokens of the prompt, kept only for the repetition penalty.
    prompt: Vec<u32>,
    scratch: Vec<f32>,
}

impl Sampler {
    /// For a request with this prompt.
    pub fn new(settings: Sampling, prompt: &[u32]) -> Self {
        let rng = settings.seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64);
        let mut tokens = Vec::new();
        if settings.repetition_penalty != 1.0 {
            tokens = prompt.to_vec();
            tokens.sort_unstable();
            tokens.dedup();
        }
        Self { settings, rng, counts: HashMap::new(), prompt: tokens, scratch: Vec::new() }
    }

    /// Whether logits are changed before the choice.
    fn edits(&self) -> bool {
        let s = &self.settings;
        s.presence_penalty != 0.0
            || s.frequency_penalty != 0.0
            || s.repetition_penalty != 1.0
            || !s.logit_bias.is_empty()
    }

    /// The same choice for a device, unless it needs what only the host has.
    pub fn on_device(&mut self) -> Option<DeviceSample> {
        let s = &self.settings;
        if self.edits() || s.logprobs.is_some() {
            return None;
        }
        let (temperature, top_k, top_p, min_p) = (s.temperature, s.top_k, s.top_p, s.min_p);
        let uniform = if temperature == 0.0 { 0.0 } else { self.rng.random() };
        Some(DeviceSample { temperature, top_k, top_p, min_p, uniform })
    }

    /// Notes a token that a device chose.
    pub fn note(&mut self, id: u32) {
        *self.counts.entry(id).or_default() += 1;
    }

    /// Chooses from `logits`; ids in `banned` are not chosen.
    pub fn choose(&mut self, logits: &[f32], banned: &[u32]) -> (u32, Option<TokenLogprobs>) {
        let id = if self.edits() || !banned.is_empty() {
            let mut edited = std::mem::take(&mut self.scratch);
            edited.clear();
            edited.extend_from_slice(logits);
            self.edit(&mut edited);
            for id in banned {
                edited[*id as usize] = f32::NEG_INFINITY;
            }
            let id = self.pick(&edited);
            self.scratch = edited;
            id
        } else {
            self.pick(logits)
        };
        self.note(id);
        (id, self.settings.logprobs.map(|n| logprobs(logits, id, n)))
    }

    fn edit(&self, logits: &mut [f32]) {
        let s = &self.settings;
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

    fn pick(&mut self, logits: &[f32]) -> u32 {
        let best = argmax(logits);
        if self.settings.temperature == 0.0 {
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

    /// Tokens that may be chosen, with weights relative to the best token's 1.
    fn candidates(&self, logits: &[f32], max: f32) -> Vec<(u32, f32)> {
        let s = &self.settings;
        let weight = |l: f32| ((l - max) / s.temperature).exp();
        let mut all: Vec<(u32, f32)> = Vec::new();
        // Everything below this floor weighs nothing in f32, so leaving it out changes no choice.
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
            // Most of the mass lies in few tokens: sort those first, the rest only if they do not suffice.
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

/// Id of the highest logit, the lowest of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    // Two passes that vectorise beat one that carries an index.
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

/// Log-probabilities of a row: of `id`, and of the `n` likeliest.
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

    fn frequencies(settings: Sampling, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(Sampling { seed: Some(5), ..settings }, &[]);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..draws {
            counts[sampler.pick(logits) as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn draws_follow_the_distribution_and_its_cuts() {
        let p = [0.5f32, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
        let close = |got: Vec<f64>, want: [f64; 4]| {
            for (g, w) in got.iter().zip(want) {
                assert!((g - w).abs() < 0.02, "{got:?} is not {want:?}");
            }
        };
        let base = Sampling::default();
        close(frequencies(base.clone(), &logits, 20_000), [0.5, 0.25, 0.15, 0.1]);
        close(
            frequencies(Sampling { top_k: 2, ..base.clone() }, &logits, 20_000),
            [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            frequencies(Sampling { top_p: 0.74, ..base.clone() }, &logits, 20_000),
            [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            frequencies(Sampling { min_p: 0.29, ..base.clone() }, &logits, 20_000),
            [0.5555, 0.2777, 0.1666, 0.0],
        );
        close(
            frequencies(Sampling { temperature: 0.5, ..base }, &logits, 20_000),
            [0.7246, 0.1812, 0.0652, 0.029],
        );
    }

    #[test]
    fn top_p_over_a_flat_large_vocabulary_sorts_as_far_as_needed() {
        let logits: Vec<f32> = (0..5000).map(|i| (i % 7) as f32 * 1e-3).collect();
        let sampler = Sampler::new(Sampling { top_p: 0.9, ..Sampling::default() }, &[]);
        let kept = sampler.candidates(&logits, 6e-3).len();
        assert!((4400..=4600).contains(&kept), "{kept}");
    }

    #[test]
    fn a_seed_makes_it_repeatable_and_greedy_ignores_it() {
        let logits = [1.0, 1.1, 0.9, 1.05];
        let draw = |seed| {
            let mut s = Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() }, &[]);
            (0..50).map(|_| s.choose(&logits, &[]).0).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let mut greedy = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, &[]);
        assert_eq!(greedy.choose(&[1.0, 3.0, 3.0, 2.0], &[]).0, 1);
        assert_eq!(greedy.choose(&[1.0, 3.0, 3.0, 2.0], &[1, 2]).0, 3);
    }

    #[test]
    fn penalties_and_bias_change_the_choice() {
        let logits = [2.0, 1.9, -1.0, 0.0];
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut s = Sampler::new(Sampling { presence_penalty: 0.5, ..greedy.clone() }, &[]);
        assert_eq!([s.choose(&logits, &[]).0, s.choose(&logits, &[]).0, s.choose(&logits, &[]).0], [0, 1, 0]);
        let mut s = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy.clone() }, &[0]);
        assert_eq!(s.choose(&logits, &[]).0, 1);
        let mut s = Sampler::new(Sampling { logit_bias: vec![(2, 100.0)], ..greedy }, &[]);
        assert_eq!(s.choose(&logits, &[]).0, 2);
    }

    #[test]
    fn logprobs_are_the_models_own() {
        let p = [0.5f32, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() + 3.0).collect();
        let l = logprobs(&logits, 2, 2);
        assert!((l.chosen - 0.15f32.ln()).abs() < 1e-5);
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((l.top[1].1 - 0.25f32.ln()).abs() < 1e-5);
    }
}
