//! Splits an event stream (WHATWG HTML, "Server-sent events") into the data of its events. Bounded, and pure.

use crate::desired::model::{REPORT_LIMIT, ReportError};

/// Splits incoming bytes into events.
#[derive(Debug, Default)]
pub struct Events {
    /// The current, unfinished line.
    line: Vec<u8>,
    /// Data lines of the current, unfinished event.
    data: Vec<u8>,
    has_data: bool,
    /// Whether the event has another name than ours.
    foreign: bool,
    /// Whether the last byte was a carriage return: a line feed right after it is part of the same line end.
    after_cr: bool,
}

impl Events {
    /// Whether an event has begun and not ended.
    pub fn is_pending(&self) -> bool {
        self.has_data || !self.line.is_empty()
    }

    /// Takes bytes, and calls `each` with the data of each event that they complete.
    ///
    /// # Errors
    /// An event is too large: the rest of the stream must not be used.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) -> Result<(), ReportError> {
        for &byte in bytes {
            if byte == b'\n' && std::mem::take(&mut self.after_cr) {
                continue;
            }
            self.after_cr = byte == b'\r';
            if byte == b'\n' || byte == b'\r' {
                self.end_line(&mut each);
            } else {
                self.line.push(byte);
            }
            if self.line.len() + self.data.len() > REPORT_LIMIT {
                return Err(ReportError::TooLarge { limit: REPORT_LIMIT });
            }
        }
        Ok(())
    }

    fn end_line(&mut self, each: &mut impl FnMut(&[u8])) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            if self.has_data && !self.foreign {
                each(&self.data);
            }
            self.data.clear();
            (self.has_data, self.foreign) = (false, false);
        } else {
            let (name, value) = match line.iter().position(|&b| b == b':') {
                Some(at) => (&line[..at], &line[at + 1..]),
                None => (&line[..], &[][..]),
            };
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match name {
                b"data" => {
                    if self.has_data {
                        self.data.push(b'\n');
                    }
                    self.has_data = true;
                    self.data.extend_from_slice(value);
                }
                b"event" => self.foreign = !matches!(value, b"replica" | b"message" | b""),
                _ => {}
            }
        }
        // Keep the capacity: the next line has about the same length.
        self.line = line;
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(pieces: &[&[u8]]) -> Vec<String> {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for piece in pieces {
            events.feed(piece, |data| found.push(String::from_utf8_lossy(data).into_owned())).unwrap();
        }
        found
    }

    #[test]
    fn events_are_cut_at_blank_lines_however_they_come() {
        let text = b": hello\n\nevent: replica\ndata: {\"a\":1}\n\ndata:2\r\ndata: 3\r\n\r\nevent: other\ndata: x\n\n\
                     id: 7\ndata\n\nretry: 5\n\ndata: unfinished";
        let expected = ["{\"a\":1}", "2\n3", ""];
        assert_eq!(cut(&[text]), expected);
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(cut(&bytes), expected);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut events = Events::default();
        let mut fed = 0;
        let error = loop {
            match events.feed(b"data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n", |_| panic!("no end")) {
                Ok(()) => fed += 46,
                Err(error) => break error,
            }
        };
        assert!(fed <= REPORT_LIMIT + 46 * 2_000, "{fed}");
        assert_eq!(error, ReportError::TooLarge { limit: REPORT_LIMIT });
        let mut events = Events::default();
        assert!(events.feed(&vec![b'x'; REPORT_LIMIT + 1], |_| ()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_bounded_and_pieces_do_not_matter(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), any::<u8>()], 0..400),
            at in 0..400usize,
        ) {
            let at = at.min(bytes.len());
            prop_assert_eq!(cut(&[&bytes]), cut(&[&bytes[..at], &bytes[at..]]));
        }
    }
}
