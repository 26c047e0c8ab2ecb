//! From ids to what the client sees: text without half characters, cut at stop strings.
//!
//! Called by the engine for each new token.

use crate::tokenizer::{Detokenizer, TextTokenizer, TokenizerError};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// An end token or a stop string.
    Stop,
    /// The token limit or the context's end.
    Length,
    /// The client went away.
    Abort,
}

impl Finish {
    /// The API's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// Text of a generation as it grows.
#[derive(Debug)]
pub struct TextOutput {
    detokenizer: Detokenizer,
    stops: Vec<String>,
    include_stop: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl TextOutput {
    /// For a request with these stop strings.
    pub fn new(stops: Vec<String>, include_stop: bool, skip_special: bool) -> Self {
        Self { detokenizer: Detokenizer::new(skip_special), stops, include_stop, held: String::new() }
    }

    /// Takes a token; gives the text that is certain, and whether a stop string was met.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> Result<(String, bool), TokenizerError> {
        let piece = self.detokenizer.push(tokenizer, id)?;
        Ok(self.add(&piece))
    }

    /// The text still held back when the generation ends without a stop string.
    pub fn finish(&mut self, tokenizer: &TextTokenizer) -> Result<String, TokenizerError> {
        let piece = self.detokenizer.finish(tokenizer)?;
        let (mut text, stopped) = self.add(&piece);
        if !stopped {
            text += &std::mem::take(&mut self.held);
        }
        Ok(text)
    }

    fn add(&mut self, piece: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (piece.to_owned(), false);
        }
        self.held += piece;
        let first = self.stops.iter().filter_map(|s| self.held.find(s).map(|at| (at, s.len()))).min();
        if let Some((at, len)) = first {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.include_stop { at + len } else { at });
            return (text, true);
        }
        // Keep back the longest tail that begins a stop string.
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| self.stops.iter().any(|s| s.starts_with(&self.held[*at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, bool, String) {
        let mut out = TextOutput::new(stops.iter().map(|s| (*s).to_owned()).collect(), include, true);
        let mut text = String::new();
        for piece in pieces {
            let (more, stopped) = out.add(piece);
            text += &more;
            if stopped {
                return (text, true, String::new());
            }
        }
        (text, false, out.held)
    }

    #[test]
    fn a_stop_string_across_pieces_is_cut_and_never_shown() {
        assert_eq!(run(&["END"], false, &["ab E", "N", "D x"]), ("ab ".into(), true, String::new()));
        assert_eq!(run(&["END"], true, &["ab E", "N", "D x"]), ("ab END".into(), true, String::new()));
        assert_eq!(run(&["END"], false, &["ab E", "N", "o"]), ("ab ENo".into(), false, String::new()));
        assert_eq!(run(&["END"], false, &["ab E", "N"]), ("ab ".into(), false, "EN".into()));
        assert_eq!(run(&["zz", "東京"], false, &["a東", "京b"]), ("a".into(), true, String::new()));
        assert_eq!(run(&["b", "abc"], false, &["xab"]), ("xa".into(), true, String::new()));
    }
}
