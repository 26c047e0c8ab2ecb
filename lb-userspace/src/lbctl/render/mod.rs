//! Terminal output: aligned tables, readable units, colour where it is wanted.
//!
//! Input: the types of `api::types`. Output: text on a writer. No other side effects. Called by `commands`.

pub mod backend;
pub mod change;
pub mod guard;
pub mod host;
pub mod observe;
pub mod order;
pub mod region;
pub mod replica;
pub mod service;
pub mod store;
pub mod table;
pub mod units;

use crate::{clock, printable::escape};
use order::RowOrder;
use serde::Serialize;
use serde_json_path::JsonPath;
use std::io::{self, IsTerminal, Write};

/// Spaces by which the second line of a wrapped text is further in than its first.
const INDENT: usize = 4;

/// The destination and the format of output.
pub struct Out<'a> {
    writer: &'a mut dyn Write,
    /// Whether to use colour.
    pub colour: bool,
    /// Whether to print JSON instead of text.
    pub json: bool,
    /// Width of the terminal, in columns; None: lines may have any length.
    width: Option<u16>,
    /// Order and choice of the rows of tables.
    pub order: RowOrder,
    /// Part of the JSON to print; all of it if none.
    pub path: Option<JsonPath>,
}

/// The meaning of a text, shown as a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Healthy or expected.
    Good,
    /// Temporary, or worth attention.
    Warn,
    /// Broken or unhealthy.
    Bad,
    /// Less important.
    Dim,
    /// A heading or a name.
    Strong,
}

impl Tone {
    /// The SGR parameter of the tone.
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

/// Whether a stream should have colour: it is a terminal, and NO_COLOR is not set (no-color.org).
pub fn wants_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

impl<'a> Out<'a> {
    /// Creates an output to a writer.
    pub fn new(writer: &'a mut dyn Write, colour: bool, json: bool) -> Self {
        Self { writer, colour, json, width: None, order: RowOrder::default(), path: None }
    }

    /// Fits tables and text to a terminal of this width.
    pub fn with_width(self, width: Option<u16>) -> Self {
        Self { width, ..self }
    }

    /// Writes a line of text. One that is wider than the terminal is wrapped, and indented below its first word.
    ///
    /// # Errors
    /// Writing failed, for example because the reader closed the pipe.
    pub fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        let text = text.as_ref();
        let Some(width) =
            self.width.map(usize::from).filter(|&width| textwrap::core::display_width(text) > width)
        else {
            return writeln!(self.writer, "{text}");
        };
        let indent = " ".repeat(text.len() - text.trim_start().len() + INDENT);
        let options = textwrap::Options::new(width)
            .subsequent_indent(&indent)
            .break_words(false)
            .word_splitter(textwrap::WordSplitter::NoHyphenation)
            .wrap_algorithm(textwrap::WrapAlgorithm::FirstFit);
        textwrap::wrap(text, options).iter().try_for_each(|line| writeln!(self.writer, "{line}"))
    }

    /// Width of the terminal, in columns, if lines are fitted to one.
    pub fn columns(&self) -> Option<u16> {
        self.width
    }

    /// Writes bytes unchanged.
    ///
    /// # Errors
    /// Writing failed.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)
    }

    /// Writes a value as JSON: indented, or on one line if `stream` is set; or what a JSONPath finds in it, one value a
    /// line, texts without quotes.
    ///
    /// # Errors
    /// Writing failed.
    pub fn json(&mut self, value: &impl Serialize, stream: bool) -> io::Result<()> {
        if let Some(path) = &self.path {
            let value = serde_json::to_value(value).map_err(io::Error::other)?;
            for found in path.query(&value).all() {
                let text = found.as_str().map_or_else(|| found.to_string(), |text| escape(text).into_owned());
                writeln!(self.writer, "{text}")?;
            }
            return Ok(());
        }
        let text = if stream { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) };
        writeln!(self.writer, "{}", text.map_err(io::Error::other)?)
    }

    /// Returns the text in the colour of a tone, if colour is on. Control characters are escaped.
    pub fn paint(&self, tone: Tone, text: &str) -> String {
        let text = escape(text);
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", tone.code()) } else { text.into_owned() }
    }

    /// Flushes the writer.
    ///
    /// # Errors
    /// Writing failed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Width of the terminal that standard output is, if it is one.
pub fn terminal_width() -> Option<u16> {
    // A terminal may be 0 wide if nobody told it its size.
    terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0).filter(|&width| width >= 40)
}

/// Time since a moment in milliseconds since 1970; `-` if there is none (0).
fn ago(ms: u64) -> String {
    let now = clock::unix_ms();
    if ms == 0 { "-".to_owned() } else { units::span(now.saturating_sub(ms) / 1_000) }
}

/// Prints aligned `name: value` lines.
fn fields(out: &mut Out<'_>, pairs: &[(&str, String)]) -> io::Result<()> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    for (name, value) in pairs {
        let label = format!("{:<width$}", format!("{name}:"));
        out.line(format!("{} {}", out.paint(Tone::Strong, &label), escape(value)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_wrapped_for_a_terminal_only() {
        let text = "  ! the store is empty, but the maps hold 1 service: \x1b[31mlbd\x1b[0m keeps forwarding";
        let printed = |width| {
            let mut written = Vec::new();
            Out::new(&mut written, false, false).with_width(width).line(text).unwrap();
            String::from_utf8(written).unwrap()
        };
        assert_eq!(printed(None), format!("{text}\n"));
        assert_eq!(printed(Some(73)), format!("{text}\n"), "colours have no width");
        assert_eq!(
            printed(Some(44)),
            "  ! the store is empty, but the maps hold 1\n      service: \x1b[31mlbd\x1b[0m keeps forwarding\n"
        );
    }
}
