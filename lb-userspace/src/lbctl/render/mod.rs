//! How things look on a terminal: aligned tables, units for people, colour where it is wanted.
//!
//! Input: the types of `api::types`. Output: text on a writer. Pure but for that. Called by `cli`.

pub mod change;
pub mod guard;
pub mod host;
pub mod observe;
pub mod region;
pub mod replica;
pub mod store;
pub mod table;
pub mod units;

use serde::Serialize;
use std::io::{self, IsTerminal, Write};

/// Where output goes, and how.
pub struct Out<'a> {
    writer: &'a mut dyn Write,
    /// Whether to use colour.
    pub colour: bool,
    /// Whether to print JSON instead of text.
    pub json: bool,
}

/// A colour with a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Passing, or worth a look.
    Warn,
    /// Not as it should be.
    Bad,
    /// Less important.
    Dim,
    /// A heading.
    Strong,
}

impl Tone {
    fn code(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
            Self::Dim => "2",
            Self::Strong => "1",
        }
    }
}

/// Whether colour is wanted on standard output: a terminal, and NO_COLOR not set (no-color.org).
pub fn wants_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

impl<'a> Out<'a> {
    /// Output to a writer.
    pub fn new(writer: &'a mut dyn Write, colour: bool, json: bool) -> Self {
        Self { writer, colour, json }
    }

    /// A line.
    ///
    /// # Errors
    /// Writing failed, perhaps since the reader has gone.
    pub fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(self.writer, "{}", text.as_ref())
    }

    /// Text as it is.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)
    }

    /// A value as JSON: indented, or on one line in a stream of values.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub fn json(&mut self, value: &impl Serialize, stream: bool) -> io::Result<()> {
        let text = if stream { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) };
        self.line(text.map_err(io::Error::other)?)
    }

    /// Text in a tone, if colour is wanted.
    pub fn paint(&self, tone: Tone, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", tone.code()) } else { text.to_owned() }
    }

    /// # Errors
    /// As [`Out::line`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}
