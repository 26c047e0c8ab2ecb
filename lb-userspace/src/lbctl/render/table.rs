//! Tables: columns aligned by spaces, without lines, as kubectl prints them.

use super::{Out, Tone};
use crate::printable::escape;
use comfy_table::{
    Attribute, Cell, CellAlignment, Color, ContentArrangement, Table as Inner, presets::NOTHING,
};
use std::io;

/// A table under construction.
pub struct TextTable {
    inner: Inner,
    columns: usize,
}

impl TextTable {
    /// Creates a table with these headings; columns whose heading starts with `>` are aligned to the right.
    pub fn new(headings: &[&str], colour: bool) -> Self {
        let mut inner = Inner::new();
        inner.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if colour {
            inner.enforce_styling();
        } else {
            inner.force_no_tty();
        }
        let cell = |h: &&str| Cell::new(h.trim_start_matches('>')).add_attribute(Attribute::Bold);
        inner.set_header(headings.iter().map(cell));
        for (i, heading) in headings.iter().enumerate() {
            if let Some(column) = inner.column_mut(i) {
                column.set_padding((0, 2));
                if heading.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        Self { inner, columns: headings.len() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = (String, Option<Tone>)>) {
        let cells = cells.into_iter().map(|(text, tone)| {
            let cell = Cell::new(escape(&text));
            match tone {
                Some(Tone::Good) => cell.fg(Color::Green),
                Some(Tone::Warn) => cell.fg(Color::Yellow),
                Some(Tone::Bad) => cell.fg(Color::Red),
                Some(Tone::Dim) => cell.add_attribute(Attribute::Dim),
                Some(Tone::Strong) => cell.add_attribute(Attribute::Bold),
                None => cell,
            }
        });
        self.inner.add_row(cells.take(self.columns));
    }

    /// Writes the table.
    ///
    /// # Errors
    /// Writing failed.
    pub fn print(&self, out: &mut Out<'_>) -> io::Result<()> {
        for line in self.inner.lines() {
            out.line(line.trim_end())?;
        }
        Ok(())
    }
}

/// Creates a cell without a tone.
pub fn plain(text: impl ToString) -> (String, Option<Tone>) {
    (text.to_string(), None)
}

/// Creates a cell with a tone.
pub fn toned(text: impl ToString, tone: Tone) -> (String, Option<Tone>) {
    (text.to_string(), Some(tone))
}
