//! Converts text to token ids and back.
//!
//! Input: a `tokenizer.json`, or the tokenizer metadata of a GGUF file ([`gguf`]). Output: [`TextTokenizer`], which
//! the API uses to encode, and the engine to decode incrementally ([`Detokenizer`]).

mod gguf;
#[cfg(test)]
mod tests;

use std::path::Path;

use tokenizers::Tokenizer;

use crate::weights::gguf::Gguf;

/// Why a tokenizer cannot be loaded, or a text cannot be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The tokenizer is not valid.
    #[error("tokenizer {from}: {what}")]
    Invalid {
        /// Its file.
        from: String,
        /// What is wrong.
        what: String,
    },
    /// The tokenizer belongs to another model.
    #[error(
        "the tokenizer has token id {highest}, but the model has only {model} tokens: \
         the tokenizer belongs to another model"
    )]
    WrongModel {
        /// Highest id of the tokenizer.
        highest: u32,
        /// Vocabulary size of the model.
        model: usize,
    },
    /// A text could not be encoded or decoded.
    #[error("cannot tokenize: {0}")]
    Failed(String),
}

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Text of the begin token, for chat templates.
    pub bos: String,
    /// Text of the end token, for chat templates.
    pub eos: String,
}

impl TextTokenizer {
    /// Reads `tokenizer.json` of a model directory, and begin and end token from `tokenizer_config.json`.
    pub fn from_directory(directory: &Path) -> Result<Self, TokenizerError> {
        let path = directory.join("tokenizer.json");
        let invalid = |what: String| TokenizerError::Invalid { from: path.display().to_string(), what };
        let bytes = std::fs::read(&path).map_err(|e| invalid(e.to_string()))?;
        let inner = Tokenizer::from_bytes(&bytes).map_err(|e| invalid(e.to_string()))?;
        let config: serde_json::Value = std::fs::read(directory.join("tokenizer_config.json"))
            .ok()
            .and_then(|b| serde_json::from_slice(&b).ok())
            .unwrap_or_default();
        let text = |key: &str| {
            let v = &config[key];
            v.as_str().or(v["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Self { inner, bos: text("bos_token"), eos: text("eos_token") })
    }

    /// Reads the `tokenizer.ggml.*` metadata of a GGUF file.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TokenizerError> {
        let invalid = |what: String| TokenizerError::Invalid { from: "of the GGUF file".into(), what };
        let json = gguf::definition(file).map_err(invalid)?;
        let bytes = serde_json::to_vec(&json).map_err(|e| invalid(e.to_string()))?;
        let inner = Tokenizer::from_bytes(&bytes).map_err(|e| invalid(e.to_string()))?;
        let text = |key: &str| {
            let id = file.int(key).and_then(|id| u32::try_from(id).ok());
            id.and_then(|id| inner.id_to_token(id)).unwrap_or_default()
        };
        let (bos, eos) = (text("tokenizer.ggml.bos_token_id"), text("tokenizer.ggml.eos_token_id"));
        Ok(Self { inner, bos, eos })
    }

    /// Checks that the model has an embedding for each token.
    pub fn check_against(&self, vocab: usize) -> Result<(), TokenizerError> {
        let highest = self.inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= vocab {
            return Err(TokenizerError::WrongModel { highest, model: vocab });
        }
        Ok(())
    }

    /// Returns the ids of `text`. `special` adds the special tokens that the model expects around a prompt, such as
    /// BOS.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, special).map_err(|e| TokenizerError::Failed(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(|e| TokenizerError::Failed(e.to_string()))
    }

    /// Returns the text of one token, including special tokens.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }

    /// Returns the id of the token with this text.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }
}

/// Decodes ids one by one to text, without splitting a character.
///
/// A byte-level token may have only a part of a UTF-8 character, and some decoders add spaces that depend on the
/// tokens before. Therefore each step decodes a short window with and without the new token, and returns the
/// difference, unless it ends in an incomplete character.
#[derive(Debug, Default, Clone)]
pub struct Detokenizer {
    ids: Vec<u32>,
    window: usize,
    emitted: usize,
    skip_special: bool,
}

impl Detokenizer {
    /// Creates a detokenizer for the output of one generation.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, ..Self::default() }
    }

    /// Adds an id. Returns the text that is complete with it.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.window..self.emitted], self.skip_special)?;
        let after = tokenizer.decode(&self.ids[self.window..], self.skip_special)?;
        if after.len() <= before.len() || after.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let text = after.get(before.len()..).unwrap_or_default().to_owned();
        self.window = self.emitted;
        self.emitted = self.ids.len();
        Ok(text)
    }

    /// Returns the remaining text at the end of the generation, with U+FFFD for an incomplete character.
    pub fn finish(&mut self, tokenizer: &TextTokenizer) -> Result<String, TokenizerError> {
        let before = tokenizer.decode(&self.ids[self.window..self.emitted], self.skip_special)?;
        let after = tokenizer.decode(&self.ids[self.window..], self.skip_special)?;
        self.emitted = self.ids.len();
        self.window = self.emitted;
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}
