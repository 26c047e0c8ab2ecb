//! Turns generated ids into the text that the client receives: complete characters only, cut at stop strings.
//!
//! Called by the engine for each generated token.

use crate::tokenizer::{Detokenizer, TextTokenizer, TokenizerError};

/// Why a request finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string.
    Stop,
    /// The limit of output tokens, or the end of the context.
    Length,
    /// The client disconnected, or the engine failed.
    Abort,
}

impl FinishReason {
    /// Returns the value of `finish_reason` in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// The text of a generation, built token by token.
#[derive(Debug)]
pub struct OutputText {
    detokenizer: Detokenizer,
    stop_strings: Vec<String>,
    include_stop: bool,
    /// Text not yet sent, because it may be the beginning of a stop string.
    pending: String,
}

impl OutputText {
    /// Creates an empty text for a request with these stop strings.
    pub fn new(stop_strings: Vec<String>, include_stop: bool, skip_special: bool) -> Self {
        Self {
            detokenizer: Detokenizer::new(skip_special),
            stop_strings,
            include_stop,
            pending: String::new(),
        }
    }

    /// Adds a token. Returns the text that can be sent, and whether a stop string was found.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> Result<(String, bool), TokenizerError> {
        let text = self.detokenizer.push(tokenizer, id)?;
        Ok(self.append(&text))
    }

    /// Returns the pending text at the end of a generation that no stop string ended.
    pub fn finish(&mut self, tokenizer: &TextTokenizer) -> Result<String, TokenizerError> {
        let rest = self.detokenizer.finish(tokenizer)?;
        let (mut text, stopped) = self.append(&rest);
        if !stopped {
            text += &std::mem::take(&mut self.pending);
        }
        Ok(text)
    }

    fn append(&mut self, text: &str) -> (String, bool) {
        if self.stop_strings.is_empty() {
            return (text.to_owned(), false);
        }
        self.pending += text;
        let first =
            self.stop_strings.iter().filter_map(|s| self.pending.find(s).map(|at| (at, s.len()))).min();
        if let Some((at, len)) = first {
            let mut text = std::mem::take(&mut self.pending);
            text.truncate(if self.include_stop { at + len } else { at });
            return (text, true);
        }
        // The longest suffix that begins a stop string stays pending.
        let keep = self
            .pending
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| self.stop_strings.iter().any(|s| s.starts_with(&self.pending[*at..])))
            .unwrap_or(self.pending.len());
        let rest = self.pending.split_off(keep);
        (std::mem::replace(&mut self.pending, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, bool, String) {
        let mut out = OutputText::new(stops.iter().map(|s| (*s).to_owned()).collect(), include, true);
        let mut text = String::new();
        for piece in pieces {
            let (more, stopped) = out.append(piece);
            text += &more;
            if stopped {
                return (text, true, String::new());
            }
        }
        (text, false, out.pending)
    }

    #[test]
    fn a_stop_string_split_across_tokens_ends_the_text_before_it() {
        assert_eq!(run(&["END"], false, &["ab E", "N", "D x"]), ("ab ".into(), true, String::new()));
        assert_eq!(run(&["END"], true, &["ab E", "N", "D x"]), ("ab END".into(), true, String::new()));
        assert_eq!(run(&["END"], false, &["ab E", "N", "o"]), ("ab ENo".into(), false, String::new()));
        assert_eq!(run(&["END"], false, &["ab E", "N"]), ("ab ".into(), false, "EN".into()));
        assert_eq!(run(&["zz", "東京"], false, &["a東", "京b"]), ("a".into(), true, String::new()));
        assert_eq!(run(&["b", "abc"], false, &["xab"]), ("xa".into(), true, String::new()));
    }
}
