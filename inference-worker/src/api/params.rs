//! The sampling and length parameters that completions and chat share, checked and turned into engine terms.
//!
//! Unknown fields are ignored: routers add their own.

use std::collections::HashMap;

use serde::Deserialize;

use super::error::ApiError;
use crate::engine::{Engine, Generate, sampling::Sampling};

/// One text or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// What a streaming client wants besides text.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct StreamOptions {
    /// A last chunk with the token counts.
    #[serde(default)]
    pub include_usage: bool,
}

/// Parameters of a generation: OpenAI's, and vLLM's additions.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Params {
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

/// Most choices of one request.
const MAX_CHOICES: i64 = 128;
/// Most stop strings (OpenAI allows 4).
const MAX_STOPS: usize = 16;

fn within(
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

impl Params {
    /// Number of choices.
    pub fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_CHOICES => Ok(n as usize),
            n => Err(ApiError::param("n", format!("`n` is {n}, expected 1 to {MAX_CHOICES}."))),
        }
    }

    fn sampling(&self, vocab: usize, logprobs: Option<usize>) -> Result<Sampling, ApiError> {
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
        let temperature = within("temperature", self.temperature, 0.0..=2.0, 1.0)?;
        let top_p = within("top_p", self.top_p, 0.0..=1.0, 1.0)?;
        if top_p == 0.0 {
            return Err(ApiError::param("top_p", "`top_p` is 0, expected more than 0 and at most 1."));
        }
        let repetition_penalty = within("repetition_penalty", self.repetition_penalty, 0.01..=100.0, 1.0)?;
        Ok(Sampling {
            // So near to zero the division overflows, and the choice is the greedy one anyway.
            temperature: if temperature < 1e-4 { 0.0 } else { temperature },
            top_p,
            top_k,
            min_p: within("min_p", self.min_p, 0.0..=1.0, 0.0)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0..=2.0, 0.0)?,
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, -2.0..=2.0, 0.0)?,
            repetition_penalty,
            logit_bias: self.bias(vocab)?,
            seed: self.seed.map(|s| s as u64),
            logprobs,
        })
    }

    fn bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let entry = |(id, bias): (&String, &f64)| {
            let known = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
            let id = known.ok_or_else(|| {
                ApiError::param(
                    "logit_bias",
                    format!("`logit_bias` names token `{id}`; token ids are 0 to {}.", vocab - 1),
                )
            })?;
            Ok((id, within("logit_bias", Some(*bias), -100.0..=100.0, 0.0)?))
        };
        self.logit_bias.iter().flatten().map(entry).collect()
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(s)) => vec![s.clone()],
            Some(OneOrMany::Many(list)) => list.clone(),
        };
        if stops.len() > MAX_STOPS || stops.iter().any(|s| s.is_empty() || s.len() > 1024) {
            return Err(ApiError::param(
                "stop",
                format!("`stop` takes at most {MAX_STOPS} texts of 1 to 1024 bytes."),
            ));
        }
        Ok(stops)
    }

    /// Everything the engine needs, for a prompt of `prompt` tokens. `default_max` is used when the request
    /// states no length; None is whatever the context leaves.
    pub fn generate(
        &self,
        engine: &Engine,
        prompt: usize,
        default_max: Option<usize>,
        logprobs: Option<usize>,
    ) -> Result<Generate, ApiError> {
        if let Some(format) = &self.response_format
            && format["type"].as_str().is_some_and(|t| t != "text")
        {
            return Err(ApiError::param(
                "response_format",
                format!("`response_format` {} is not supported, only text.", format["type"]),
            ));
        }
        let context = engine.max_context;
        if prompt == 0 {
            return Err(ApiError::bad_request("The prompt is empty."));
        }
        if prompt >= context {
            return Err(ApiError::context(
                format!(
                    "This model's maximum context length is {context} tokens, but the prompt has {prompt}; shorten it."
                ),
                "messages",
            ));
        }
        let left = context - prompt;
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => default_max.unwrap_or(left).min(left),
            Some(m @ 1..) if m as usize <= left => m as usize,
            Some(m @ 1..) => {
                return Err(ApiError::context(
                    format!(
                        "This model's maximum context length is {context} tokens, but {} were requested \
                         ({prompt} in the prompt, {m} to generate); reduce one of them.",
                        m as u128 + prompt as u128
                    ),
                    "max_tokens",
                ));
            }
            Some(m) => {
                return Err(ApiError::param(
                    "max_tokens",
                    format!("`max_tokens` is {m}, expected at least 1."),
                ));
            }
        };
        let min_tokens = self.min_tokens.unwrap_or(0);
        let min_tokens = usize::try_from(min_tokens).ok().filter(|m| *m <= max_tokens).ok_or_else(|| {
            ApiError::param(
                "min_tokens",
                format!("`min_tokens` is {min_tokens}, expected 0 to {max_tokens} (max_tokens)."),
            )
        })?;
        let stop_ids = self.stop_token_ids.clone().unwrap_or_default();
        if let Some(id) = stop_ids.iter().find(|id| **id as usize >= engine.vocab) {
            return Err(ApiError::param(
                "stop_token_ids",
                format!("Token id {id} is outside the vocabulary."),
            ));
        }
        Ok(Generate {
            max_tokens,
            min_tokens,
            sampling: self.sampling(engine.vocab, logprobs)?,
            stop: self.stops()?,
            stop_ids,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special: self.skip_special_tokens.unwrap_or(true),
            prompt_logprobs: None,
        })
    }
}
