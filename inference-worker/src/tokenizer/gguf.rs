//! Converts the tokenizer metadata of a GGUF file to the format of `tokenizer.json`.
//!
//! Supports byte-level BPE (`gpt2`) with the pre-tokenizers of the Llama family, and SentencePiece (`llama`). The
//! `smollm` pre-tokenizer splits off each digit before it applies the GPT-2 pattern, which changes ids where white
//! space precedes a digit.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use crate::weights::gguf::Gguf;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF token types: 3 is control (special), 4 is user-defined.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Returns the tokenizer in the format of `tokenizer.json`.
pub fn definition(file: &Gguf) -> Result<Json, String> {
    let tokens = file.strings("tokenizer.ggml.tokens").ok_or("tokenizer.ggml.tokens is missing")?;
    let types = file.ints("tokenizer.ggml.token_type").unwrap_or_default();
    let added: Vec<Json> = tokens
        .iter()
        .enumerate()
        .filter_map(|(id, text)| {
            let kind = types.get(id).copied().unwrap_or(1);
            matches!(kind, CONTROL | USER_DEFINED).then(|| {
                json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": kind == CONTROL})
            })
        })
        .collect();
    let vocab: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let mut json = match file.str("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(file, &vocab)?,
        Some("llama") => sentence_piece(file, tokens, &vocab)?,
        other => {
            return Err(format!(
                "tokenizer.ggml.model is {}, expected `gpt2` (byte-level BPE) or `llama` (SentencePiece)",
                other.unwrap_or("missing")
            ));
        }
    };
    json["version"] = "1.0".into();
    json["added_tokens"] = added.into();
    let default_bos = file.str("tokenizer.ggml.model") == Some("llama");
    if file.bool("tokenizer.ggml.add_bos_token").unwrap_or(default_bos) {
        add_bos(file, tokens, &mut json)?;
    }
    Ok(json)
}

/// Returns a byte-level BPE model.
fn byte_level(file: &Gguf, vocab: &HashMap<&str, usize>) -> Result<Json, String> {
    let merges = file.strings("tokenizer.ggml.merges").ok_or("tokenizer.ggml.merges is missing")?;
    let pre = file.str("tokenizer.ggml.pre").unwrap_or("default");
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let steps = match pre {
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]
        }
        "gpt-2" | "gpt2" | "default" | "phi-2" | "mpt" | "olmo" | "jais" => vec![bytes(true)],
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" | "dbrx" | "falcon3" => {
            vec![split(LLAMA3), bytes(false)]
        }
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" => vec![split(QWEN2), bytes(false)],
        other => return Err(format!("pre-tokenizer `{other}` (tokenizer.ggml.pre) is not supported")),
    };
    Ok(json!({
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": bytes(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": pre.starts_with("llama"), "vocab": vocab, "merges": merges}
    }))
}

/// Returns a SentencePiece BPE model. Its merges are derived from the scores: the priority of a merge is the score of
/// the resulting token.
fn sentence_piece(file: &Gguf, tokens: &[String], vocab: &HashMap<&str, usize>) -> Result<Json, String> {
    let scores = file.floats("tokenizer.ggml.scores").ok_or("tokenizer.ggml.scores is missing")?;
    if scores.len() != tokens.len() {
        return Err(format!("tokenizer.ggml.scores has {} scores for {} tokens", scores.len(), tokens.len()));
    }
    let mut merges: Vec<(f32, usize, usize, String)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push((scores[id], *l, *r, format!("{left} {right}")));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let merges: Vec<String> = merges.into_iter().map(|m| m.3).collect();
    let unk = file.int("tokenizer.ggml.unknown_token_id").and_then(|i| tokens.get(i as usize));
    let prefix = file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers =
        if prefix { vec![json!({"type": "Prepend", "prepend": "▁"}), replace] } else { vec![replace] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                  "ignore_merges": false, "vocab": vocab, "merges": merges}
    }))
}

/// Adds a post-processor that puts the begin token before the text.
fn add_bos(file: &Gguf, tokens: &[String], json: &mut Json) -> Result<(), String> {
    let id = file
        .int("tokenizer.ggml.bos_token_id")
        .ok_or("tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")?;
    let text = usize::try_from(id).ok().and_then(|i| tokens.get(i));
    let text = text.ok_or_else(|| format!("tokenizer.ggml.bos_token_id {id} is outside the vocabulary"))?;
    let bos = json!({"SpecialToken": {"id": text, "type_id": 0}});
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}}
    });
    Ok(())
}
