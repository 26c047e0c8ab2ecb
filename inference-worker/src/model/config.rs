//! Configuration of a Llama model, read from GGUF metadata or `config.json`, and its rotary frequencies.
//!
//! Without I/O. Rotary scaling follows Hugging Face's `modeling_rope_utils` (linear, yarn and llama3; dynamic is not
//! supported) and, for GGUF, the `rope_freqs.weight` tensor that llama.cpp's converter writes for llama3.

use serde_json::Value as Json;

use crate::weights::{WeightError, gguf::Gguf};

/// Configuration of a Llama model.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads (grouped-query attention when fewer than `heads`).
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Vocabulary size (rows of the embedding).
    pub vocab: usize,
    /// Longest sequence the model was trained for.
    pub context: usize,
    /// RMSNorm's epsilon.
    pub eps: f32,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Scaling of the rotary frequencies.
    pub rope: RopeScaling,
    /// Whether the output head shares the weights of the embedding.
    pub tied: bool,
    /// Ids of the end tokens.
    pub eos: Vec<u32>,
}

/// Variants of rotary position scaling.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1's: divides low frequencies by a factor, keeps high ones, and interpolates in a band between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Lower edge of the band.
        low: f64,
        /// Upper edge of the band.
        high: f64,
        /// Context length of the original training.
        original: f64,
    },
    /// YaRN.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context length of the original training.
        original: f64,
        /// Number of rotations at the high-frequency end of the ramp.
        beta_fast: f64,
        /// Number of rotations at the low-frequency end of the ramp.
        beta_slow: f64,
        /// Factor of cos and sin, if the file states one.
        attention: Option<f64>,
    },
    /// Divisors of each frequency, from the file.
    Divisors(Vec<f32>),
}

fn bad(what: impl Into<String>) -> WeightError {
    WeightError::Metadata(what.into())
}

impl LlamaConfig {
    /// Reads the `llama.*` metadata of a GGUF file.
    pub fn from_gguf(g: &Gguf) -> Result<Self, WeightError> {
        let arch = g.str("general.architecture").ok_or_else(|| bad("general.architecture is missing"))?;
        if arch != "llama" {
            return Err(WeightError::UnsupportedArchitecture(arch.into()));
        }
        let int = |key: &str| {
            let value =
                g.int(&format!("llama.{key}")).ok_or_else(|| bad(format!("llama.{key} is missing")))?;
            usize::try_from(value).map_err(|_| bad(format!("llama.{key} is {value}")))
        };
        if g.int("llama.expert_count").unwrap_or(0) > 0 {
            return Err(WeightError::UnsupportedArchitecture(
                "llama with experts (mixture of experts)".into(),
            ));
        }
        let (hidden, heads) = (int("embedding_length")?, int("attention.head_count")?);
        let vocab = match g.strings("tokenizer.ggml.tokens") {
            Some(tokens) => tokens.len(),
            None => int("vocab_size")?,
        };
        let head_dim = int("attention.key_length").unwrap_or(hidden / heads.max(1));
        let config = Self {
            hidden,
            ffn: int("feed_forward_length")?,
            layers: int("block_count")?,
            heads,
            kv_heads: int("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            vocab,
            context: int("context_length")?,
            eps: g.float("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-5) as f32,
            rope_base: g.float("llama.rope.freq_base").unwrap_or(10_000.0),
            rope: gguf_rope(g)?,
            tied: !g.has_tensor("output.weight"),
            eos: ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"]
                .iter()
                .filter_map(|k| u32::try_from(g.int(k)?).ok())
                .collect(),
        };
        if int("rope.dimension_count").is_ok_and(|d| d != head_dim) {
            return Err(bad(format!(
                "llama.rope.dimension_count differs from the head size {head_dim}: partial rotary embeddings are not supported"
            )));
        }
        config.check()
    }

    /// Reads a Hugging Face `config.json`.
    pub fn from_hf(c: &Json) -> Result<Self, WeightError> {
        let arch = c["architectures"][0].as_str().or(c["model_type"].as_str()).unwrap_or("(none named)");
        if !matches!(arch, "LlamaForCausalLM" | "MistralForCausalLM" | "llama" | "mistral") {
            return Err(WeightError::UnsupportedArchitecture(arch.into()));
        }
        let int = |key: &str| {
            let value = &c[key];
            value.as_u64().and_then(|v| usize::try_from(v).ok()).ok_or_else(|| {
                bad(if value.is_null() {
                    format!("config.json: `{key}` is missing")
                } else {
                    format!("config.json: `{key}` is {value}, expected a whole number")
                })
            })
        };
        if c["attention_bias"] == true || c["mlp_bias"] == true {
            return Err(bad("config.json: biases in attention or feed-forward are not supported"));
        }
        if c["sliding_window"]
            .as_u64()
            .is_some_and(|w| int("max_position_embeddings").is_ok_and(|m| (w as usize) < m))
        {
            return Err(bad("config.json: sliding-window attention is not supported"));
        }
        let act = c["hidden_act"].as_str().unwrap_or("silu");
        if act != "silu" {
            return Err(bad(format!("config.json: activation `{act}` is not supported, only silu")));
        }
        let (hidden, heads) = (int("hidden_size")?, int("num_attention_heads")?);
        Self {
            hidden,
            ffn: int("intermediate_size")?,
            layers: int("num_hidden_layers")?,
            heads,
            kv_heads: int("num_key_value_heads").unwrap_or(heads),
            head_dim: int("head_dim").unwrap_or(hidden / heads.max(1)),
            vocab: int("vocab_size")?,
            context: int("max_position_embeddings").unwrap_or(2048),
            eps: c["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            rope_base: c["rope_theta"]
                .as_f64()
                .or(c["rope_parameters"]["rope_theta"].as_f64())
                .unwrap_or(10_000.0),
            rope: hf_rope(c)?,
            tied: c["tie_word_embeddings"] == true,
            eos: eos_ids(&c["eos_token_id"]),
        }
        .check()
    }

    /// Returns the configuration if all values are within their limits.
    fn check(self) -> Result<Self, WeightError> {
        let in_range = |name: &str, v: usize, max: usize| {
            if v == 0 || v > max { Err(bad(format!("{name} is {v}, expected 1 to {max}"))) } else { Ok(()) }
        };
        in_range("the hidden size", self.hidden, 1 << 17)?;
        in_range("the feed-forward size", self.ffn, 1 << 20)?;
        in_range("the layer count", self.layers, 1024)?;
        in_range("the head count", self.heads, 1024)?;
        in_range("the head size", self.head_dim, 256)?;
        in_range("the key/value head count", self.kv_heads, self.heads)?;
        in_range("the vocabulary size", self.vocab, 1 << 24)?;
        in_range("the context length", self.context, 1 << 24)?;
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return Err(bad(format!(
                "{} query heads of {} values and {} key/value heads: the head count must be a multiple of the key/value head count, and the head size must be even",
                self.heads, self.head_dim, self.kv_heads
            )));
        }
        Ok(self)
    }

    /// Returns the width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of all key heads together, which is also that of the value heads.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the rotary frequencies (`head_dim / 2` of them, in radians per position) and the factor of cos and sin.
    pub fn rope_frequencies(&self) -> (Vec<f32>, f32) {
        let half = self.head_dim / 2;
        // In f32, as in transformers, so that angles at high positions are rounded equally.
        let plain: Vec<f32> = (0..half)
            .map(|i| 1.0 / (self.rope_base as f32).powf((2 * i) as f32 / self.head_dim as f32))
            .collect();
        match &self.rope {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / *factor as f32).collect(), 1.0),
            RopeScaling::Divisors(d) => (plain.iter().zip(d).map(|(f, d)| f / d).collect(), 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scale = |f: &f32| {
                    let f = f64::from(*f);
                    let wavelength = std::f64::consts::TAU / f;
                    let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - smooth) * f / factor + smooth * f) as f32
                };
                (plain.iter().map(scale).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention } => {
                let dim = self.head_dim as f64;
                let edge = |rotations: f64| {
                    dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.rope_base.ln())
                };
                let low = edge(*beta_fast).floor().max(0.0);
                let high = edge(*beta_slow).ceil().min(dim - 1.0);
                let span = if high == low { 0.001 } else { high - low };
                let freqs = plain
                    .iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let ramp = ((i as f64 - low) / span).clamp(0.0, 1.0);
                        let f = f64::from(*f);
                        (f / factor * ramp + f * (1.0 - ramp)) as f32
                    })
                    .collect();
                let scale = attention.unwrap_or(if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 });
                (freqs, scale as f32)
            }
        }
    }
}

/// Returns the ids in `eos_token_id`, which is a number or a list.
pub fn eos_ids(value: &Json) -> Vec<u32> {
    let one = |v: &Json| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match value {
        Json::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

fn gguf_rope(g: &Gguf) -> Result<RopeScaling, WeightError> {
    if let Some(divisors) = g.raw("rope_freqs.weight")? {
        return Ok(RopeScaling::Divisors(divisors.to_f32()));
    }
    let factor = g.float("llama.rope.scaling.factor").or(g.float("llama.rope.scale_linear")).unwrap_or(1.0);
    match g.str("llama.rope.scaling.type").unwrap_or(if factor == 1.0 { "none" } else { "linear" }) {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor,
            original: g
                .float("llama.rope.scaling.original_context_length")
                .ok_or_else(|| bad("llama.rope.scaling.original_context_length is missing"))?,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention: None,
        }),
        other => Err(bad(format!("rope scaling `{other}` is not supported (none, linear, yarn, llama3)"))),
    }
}

fn hf_rope(c: &Json) -> Result<RopeScaling, WeightError> {
    let s = if c["rope_scaling"].is_object() { &c["rope_scaling"] } else { &c["rope_parameters"] };
    let kind = s["rope_type"].as_str().or(s["type"].as_str()).unwrap_or("default");
    let need = |key: &str| {
        s[key]
            .as_f64()
            .ok_or_else(|| bad(format!("config.json: `{key}` of rope_scaling is missing or is not a number")))
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: need("original_max_position_embeddings")?,
        },
        "yarn" => RopeScaling::Yarn {
            factor: need("factor")?,
            original: s["original_max_position_embeddings"]
                .as_f64()
                .or(c["max_position_embeddings"].as_f64())
                .ok_or_else(|| {
                    bad("config.json: rope scaling `yarn` needs original_max_position_embeddings")
                })?,
            beta_fast: s["beta_fast"].as_f64().unwrap_or(32.0),
            beta_slow: s["beta_slow"].as_f64().unwrap_or(1.0),
            attention: s["attention_factor"].as_f64(),
        },
        other => {
            return Err(bad(format!(
                "config.json: rope scaling `{other}` is not supported (default, linear, llama3, yarn)"
            )));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(rope: Json) -> Result<LlamaConfig, WeightError> {
        LlamaConfig::from_hf(&json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "head_dim": 16, "vocab_size": 10, "max_position_embeddings": 16384,
            "rope_theta": rope["rope_theta"], "rope_scaling": rope,
        }))
    }

    /// The expected values are those of transformers 5.23 (`ROPE_INIT_FUNCTIONS`).
    #[test]
    #[allow(clippy::excessive_precision, reason = "copied from transformers")]
    fn rotary_frequencies_equal_those_of_transformers() {
        for (rope, frequencies, scale) in [
            (
                json!({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
                [
                    0.25,
                    0.079_056_94,
                    0.025,
                    0.007_905_695,
                    0.002_5,
                    0.000_790_569_5,
                    0.000_25,
                    7.905_694_6e-5,
                ],
                1.0,
            ),
            (
                json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
                [
                    1.0,
                    0.193_922_76,
                    0.037_606_03,
                    0.007_292_665,
                    0.000_524_846,
                    3.428_102_4e-5,
                    6.647_87e-6,
                    1.289_173_2e-6,
                ],
                1.0,
            ),
            (
                json!({"type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}),
                [1.0, 0.316_227_76, 0.1, 0.025_693_506, 0.006_25, 0.001_383_496_6, 0.000_25, 7.905_694_6e-5],
                1.138_629_4,
            ),
        ] {
            let (got, got_scale) = config(rope.clone()).unwrap().rope_frequencies();
            assert!((got_scale - scale).abs() < 1e-6, "{rope}");
            for (g, w) in got.iter().zip(frequencies) {
                assert!((g - w).abs() <= 2e-6 * w, "{rope}: got {got:?}, expected {frequencies:?}");
            }
        }
        assert!(config(json!({"rope_type": "longrope"})).unwrap_err().to_string().contains("longrope"));
    }

    #[test]
    fn unsupported_and_invalid_configurations_are_rejected_with_the_name_of_the_field() {
        let base = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10});
        for (key, value, says) in [
            ("architectures", json!(["MambaForCausalLM"]), "MambaForCausalLM"),
            ("hidden_size", json!("many"), "hidden_size"),
            ("hidden_size", json!(0), "hidden size"),
            ("num_hidden_layers", json!(4_000_000_000u64), "layer count"),
            ("num_key_value_heads", json!(3), "must be a multiple"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("attention_bias", json!(true), "biases"),
        ] {
            let mut c = base.clone();
            c[key] = value;
            let error = LlamaConfig::from_hf(&c).unwrap_err().to_string();
            assert!(error.contains(says), "{key}: {error}");
        }
    }
}
