//! Text to token ids and back.
//!
//! Input: a `tokenizer.json` or a GGUF's tokenizer metadata ([`gguf`]). Output: [`TextTokenizer`], used by
//! the API (encode) and the engine (incremental decode through [`Detokenizer`]).

mod gguf;
#[cfg(test)]
mod tests;

use std::path::Path;

use tokenizers::Tokenizer;

use crate::weights::gguf::Gguf;

/// Why a tokenizer cannot be built or a text not encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The definition is broken.
    #[error("tokenizer {from}: {what}")]
    Broken {
        /// File or metadata it came from.
        from: String,
        /// What is wrong.
        what: String,
    },
    /// The tokenizer belongs to another model.
    #[error(
        "the tokenizer has token id {highest}, but the model knows only ids below {model}: \
         this tokenizer belongs to another model"
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
    /// Text of the begin-of-text token, for chat templates.
    pub bos: String,
    /// Text of the end-of-text token, for chat templates.
    pub eos: String,
}

impl TextTokenizer {
    /// From a `tokenizer.json`, beside it `tokenizer_config.json` for the names of BOS and EOS.
    pub fn from_folder(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let broken = |what: String| TokenizerError::Broken { from: path.display().to_string(), what };
        let bytes = std::fs::read(&path).map_err(|e| broken(e.to_string()))?;
        let inner = Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
        let config: serde_json::Value = std::fs::read(folder.join("tokenizer_config.json"))
            .ok()
            .and_then(|b| serde_json::from_slice(&b).ok())
            .unwrap_or_default();
        let text = |key: &str| {
            let v = &config[key];
            v.as_str().or(v["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Self { inner, bos: text("bos_token"), eos: text("eos_token") })
    }

    /// From a GGUF's `tokenizer.ggml.*` metadata.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TokenizerError> {
        let broken = |what: String| TokenizerError::Broken { from: "of the GGUF file".into(), what };
        let json = gguf::definition(file).map_err(broken)?;
        let bytes = serde_json::to_vec(&json).map_err(|e| broken(e.to_string()))?;
        let inner = Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
        let text = |key: &str| {
            let id = file.int(key).and_then(|id| u32::try_from(id).ok());
            id.and_then(|id| inner.id_to_token(id)).unwrap_or_default()
        };
        let (bos, eos) = (text("tokenizer.ggml.bos_token_id"), text("tokenizer.ggml.eos_token_id"));
        Ok(Self { inner, bos, eos })
    }

    /// Refuses a tokenizer that could produce ids the model has no embedding for.
    pub fn check_against(&self, vocab: usize) -> Result<(), TokenizerError> {
        let highest = self.inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= vocab {
            return Err(TokenizerError::WrongModel { highest, model: vocab });
        }
        Ok(())
    }

    /// Ids of `text`; `special` adds what the model wants around a plain prompt (BOS).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, special).map_err(|e| TokenizerError::Failed(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(|e| TokenizerError::Failed(e.to_string()))
    }

    /// Text of one token, special or not, for log-probabilities.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }

    /// Id of a special token's text.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }
}

/// Turns a growing list of ids into text without ever splitting a character.
///
/// A byte-level token may hold part of a UTF-8 character, and some decoders glue words depending on what
/// came before: so each step decodes a short window twice and emits the difference, unless it ends in an
/// unfinished character.
#[derive(Debug, Default, Clone)]
pub struct Detokenizer {
    ids: Vec<u32>,
    window: usize,
    emitted: usize,
    skip_special: bool,
}

impl Detokenizer {
    /// A fresh one, for a generation's output.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, ..Self::default() }
    }

    /// Takes one more id; gives the text that became certain.
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

    /// What is still held back when the generation ends (an unfinished character shows as U+FFFD).
    pub fn finish(&mut self, tokenizer: &TextTokenizer) -> Result<String, TokenizerError> {
        let before = tokenizer.decode(&self.ids[self.window..self.emitted], self.skip_special)?;
        let after = tokenizer.decode(&self.ids[self.window..], self.skip_special)?;
        self.emitted = self.ids.len();
        self.window = self.emitted;
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}
