//! The parameters that completions and chat completions share, and their conversion to the engine's parameters.
//!
//! Unknown fields are ignored, because routers add fields.

use std::collections::HashMap;

use serde::Deserialize;

use super::error::ApiError;
use crate::engine::{Engine, GenerationParams, sampling::SamplingParams};

/// One or more strings.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Options of a stream.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct StreamOptions {
    /// Whether the last chunk has the token counts.
    #[serde(default)]
    pub include_usage: bool,
}

/// Parameters of a generation: those of OpenAI's API, and vLLM's extensions.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct CommonParams {
    pub model: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub max_tokens: Option<i64>,
    pub max_completion_tokens: Option<i64>,
    pub min_tokens: Option<i64>,
    pub n: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub seed: Option<i64>,
    pub stop: Option<OneOrMany>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub include_stop_str_in_output: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub logit_bias: Option<HashMap<String, f64>>,
    pub response_format: Option<serde_json::Value>,
}

/// Maximum number of choices per prompt.
const MAX_CHOICES: i64 = 128;
/// Maximum number of stop strings (OpenAI allows 4).
const MAX_STOP_STRINGS: usize = 16;

/// Returns the value of a field, or `default`, if it is in `range`.
fn in_range(
    name: &str,
    value: Option<f64>,
    range: std::ops::RangeInclusive<f64>,
    default: f64,
) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if !range.contains(&value) {
        return Err(ApiError::param(
            name,
            format!("`{name}` is {value}, expected {} to {}.", range.start(), range.end()),
        ));
    }
    Ok(value as f32)
}

impl CommonParams {
    /// Returns whether a stream ends with the token counts.
    pub fn includes_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|o| o.include_usage)
    }

    /// Returns the number of choices per prompt.
    pub fn choice_count(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_CHOICES => Ok(n as usize),
            n => Err(ApiError::param("n", format!("`n` is {n}, expected 1 to {MAX_CHOICES}."))),
        }
    }

    fn sampling_params(&self, vocab: usize, logprobs: Option<usize>) -> Result<SamplingParams, ApiError> {
        let top_k = match self.top_k.unwrap_or(0) {
            -1 | 0 => 0,
            k @ 1.. => u32::try_from(k).unwrap_or(u32::MAX),
            k => {
                return Err(ApiError::param(
                    "top_k",
                    format!("`top_k` is {k}, expected -1 (off) or at least 1."),
                ));
            }
        };
        let temperature = in_range("temperature", self.temperature, 0.0..=2.0, 1.0)?;
        let top_p = in_range("top_p", self.top_p, 0.0..=1.0, 1.0)?;
        if top_p == 0.0 {
            return Err(ApiError::param("top_p", "`top_p` is 0, expected more than 0 and at most 1."));
        }
        let repetition_penalty = in_range("repetition_penalty", self.repetition_penalty, 0.01..=100.0, 1.0)?;
        Ok(SamplingParams {
            // Logits divided by a value close to zero overflow; greedy sampling gives the same tokens.
            temperature: if temperature < 1e-4 { 0.0 } else { temperature },
            top_p,
            top_k,
            min_p: in_range("min_p", self.min_p, 0.0..=1.0, 0.0)?,
            presence_penalty: in_range("presence_penalty", self.presence_penalty, -2.0..=2.0, 0.0)?,
            frequency_penalty: in_range("frequency_penalty", self.frequency_penalty, -2.0..=2.0, 0.0)?,
            repetition_penalty,
            logit_bias: self.parse_logit_bias(vocab)?,
            seed: self.seed.map(|s| s as u64),
            logprobs,
        })
    }

    fn parse_logit_bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let entry = |(id, bias): (&String, &f64)| {
            let valid = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
            let id = valid.ok_or_else(|| {
                ApiError::param(
                    "logit_bias",
                    format!("`logit_bias` has the token id `{id}`, expected 0 to {}.", vocab - 1),
                )
            })?;
            Ok((id, in_range("logit_bias", Some(*bias), -100.0..=100.0, 0.0)?))
        };
        self.logit_bias.iter().flatten().map(entry).collect()
    }

    fn stop_strings(&self) -> Result<Vec<String>, ApiError> {
        let strings = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(s)) => vec![s.clone()],
            Some(OneOrMany::Many(list)) => list.clone(),
        };
        if strings.len() > MAX_STOP_STRINGS || strings.iter().any(|s| s.is_empty() || s.len() > 1024) {
            return Err(ApiError::param(
                "stop",
                format!("`stop` must be at most {MAX_STOP_STRINGS} strings of 1 to 1024 bytes."),
            ));
        }
        Ok(strings)
    }

    /// Returns the engine's parameters for a prompt of `prompt_tokens` tokens. `default_max_tokens` is used if the
    /// request has no `max_tokens`; None stands for the rest of the context.
    pub fn generation_params(
        &self,
        engine: &Engine,
        prompt_tokens: usize,
        default_max_tokens: Option<usize>,
        logprobs: Option<usize>,
    ) -> Result<GenerationParams, ApiError> {
        if let Some(format) = &self.response_format
            && format["type"].as_str().is_some_and(|t| t != "text")
        {
            return Err(ApiError::param(
                "response_format",
                format!("`response_format` {} is not supported, only text.", format["type"]),
            ));
        }
        let max_tokens = self.max_output_tokens(engine, prompt_tokens, default_max_tokens)?;
        let min_tokens = self.min_tokens.unwrap_or(0);
        let min_tokens = usize::try_from(min_tokens).ok().filter(|m| *m <= max_tokens).ok_or_else(|| {
            ApiError::param(
                "min_tokens",
                format!("`min_tokens` is {min_tokens}, expected 0 to {max_tokens} (max_tokens)."),
            )
        })?;
        let vocab = engine.info.vocab;
        let stop_token_ids = self.stop_token_ids.clone().unwrap_or_default();
        if let Some(id) = stop_token_ids.iter().find(|id| **id as usize >= vocab) {
            return Err(ApiError::param(
                "stop_token_ids",
                format!("`stop_token_ids` has the token id {id}, expected 0 to {}.", vocab - 1),
            ));
        }
        Ok(GenerationParams {
            max_tokens,
            min_tokens,
            sampling: self.sampling_params(vocab, logprobs)?,
            stop: self.stop_strings()?,
            stop_token_ids,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special: self.skip_special_tokens.unwrap_or(true),
            prompt_logprobs: None,
        })
    }

    /// Returns the maximum number of generated tokens, if prompt and output fit into the context.
    fn max_output_tokens(
        &self,
        engine: &Engine,
        prompt_tokens: usize,
        default: Option<usize>,
    ) -> Result<usize, ApiError> {
        let context = engine.info.max_context;
        if prompt_tokens == 0 {
            return Err(ApiError::bad_request("The prompt is empty."));
        }
        if prompt_tokens >= context {
            return Err(ApiError::context_length(
                format!(
                    "This model's maximum context length is {context} tokens, but the prompt has {prompt_tokens}; \
                     shorten it."
                ),
                "messages",
            ));
        }
        let left = context - prompt_tokens;
        match self.max_completion_tokens.or(self.max_tokens) {
            None => Ok(default.unwrap_or(left).min(left)),
            Some(m @ 1..) if m as usize <= left => Ok(m as usize),
            Some(m @ 1..) => Err(ApiError::context_length(
                format!(
                    "This model's maximum context length is {context} tokens, but {} were requested \
                     ({prompt_tokens} in the prompt, {m} to generate); reduce one of them.",
                    m as u128 + prompt_tokens as u128
                ),
                "max_tokens",
            )),
            Some(m) => {
                Err(ApiError::param("max_tokens", format!("`max_tokens` is {m}, expected at least 1.")))
            }
        }
    }
}
