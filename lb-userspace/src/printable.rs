//! Control characters in texts of users: refused in requests, and escaped where a text is printed.
//!
//! A line break or an escape sequence in a message could otherwise forge lines of the log, or write anything to the
//! terminal of whoever lists the history. Texts that were stored earlier, or by another host, are escaped too.

use serde::{Deserialize, Deserializer, de::Error};
use std::{
    borrow::Cow,
    io::{self, Write},
};

/// Replaces control characters by their escapes: `\n`, `\u{1b}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    escape_except(text, false)
}

/// Escapes control characters, except in the sequences that set a colour, if those are to be kept.
fn escape_except(text: &str, keep_colours: bool) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for (at, c) in text.char_indices() {
        if c.is_control() && !(keep_colours && is_colour(&text[at..])) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// Whether a text begins with a sequence that sets a colour, and can do nothing else: `ESC [ NUMBERS m`.
fn is_colour(text: &str) -> bool {
    let rest =
        text.strip_prefix("\x1b[").map(|r| r.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';'));
    rest.is_some_and(|r| r.starts_with('m'))
}

/// Returns an error that names the first control character of a text, and where it is.
fn check(what: &str, text: &str) -> Result<(), String> {
    match text.chars().enumerate().find(|(_, c)| c.is_control()) {
        None => Ok(()),
        Some((before, c)) => Err(format!(
            "character {} of the {what} is the control character U+{:04X}; a {what} is one line of text",
            before + 1,
            u32::from(c)
        )),
    }
}

/// Reads the message of a change.
pub fn message<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    optional("message", from)
}

/// Reads a reason.
pub fn reason<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    check("reason", &text).map_err(D::Error::custom)?;
    Ok(text)
}

/// Reads a reason that may be absent.
pub fn optional_reason<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    optional("reason", from)
}

fn optional<'de, D: Deserializer<'de>>(what: &str, from: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    if let Some(text) = &text {
        check(what, text).map_err(D::Error::custom)?;
    }
    Ok(text)
}

/// A writer of log lines that escapes control characters within a line. It must be given a whole line at a time.
pub struct Lines<W> {
    writer: W,
    /// Whether the lines are coloured.
    colour: bool,
}

impl<W: Write> Lines<W> {
    /// Creates a writer of lines to another writer.
    pub fn new(writer: W, colour: bool) -> Self {
        Self { writer, colour }
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let (line, end) = match text.strip_suffix('\n') {
            Some(line) => (line, "\n"),
            None => (&*text, ""),
        };
        let mut escaped = escape_except(line, self.colour).into_owned();
        escaped.push_str(end);
        self.writer.write_all(escaped.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape("drain für w1"), "drain für w1");
        assert_eq!(escape("a\nb\x1b[31m\u{9b}"), "a\\nb\\u{1b}[31m\\u{9b}");
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_line_stays_one_line() {
        for colour in [false, true] {
            let written = Shared::default();
            let writer = written.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(colour)
                .with_writer(move || Lines::new(writer.clone(), colour))
                .finish();
            let evil = "x\nforged\x1b[2J";
            tracing::subscriber::with_default(subscriber, || {
                tracing::warn!(error = %evil, text = evil, "lost {evil}");
            });
            let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
            assert!(text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
            assert!(!text.contains("\x1b[2J") && text.matches("forged").count() == 3, "{text:?}");
            assert_eq!(text.contains('\x1b'), colour, "{text:?}");
        }
    }
}
