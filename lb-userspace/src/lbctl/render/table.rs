//! Tables: columns aligned by spaces, without lines, as kubectl prints them.

use super::{Out, Tone};
use crate::printable::escape;
use comfy_table::{
    Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table as Inner,
    presets::NOTHING,
};
use std::io;

/// Spaces between columns.
const GAP: u16 = 2;

/// A table under construction.
pub struct TextTable {
    inner: Inner,
    headings: Vec<String>,
    rows: Vec<Vec<(String, Option<Tone>)>>,
    /// Columns that a narrow terminal does without, in the order of the headings.
    optional: Vec<usize>,
}

impl TextTable {
    /// Creates a table with these headings. Columns whose heading starts with `>` are aligned to the right; those whose
    /// heading starts with `~` are left out from the end while the table is wider than the terminal.
    pub fn new(headings: &[&str], colour: bool) -> Self {
        let mut inner = Inner::new();
        inner.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if colour {
            inner.enforce_styling();
        } else {
            inner.force_no_tty();
        }
        let cell = |h: &&str| Cell::new(h.trim_start_matches(['~', '>'])).add_attribute(Attribute::Bold);
        inner.set_header(headings.iter().map(cell));
        let mut optional = Vec::new();
        for (i, heading) in headings.iter().enumerate() {
            let aligned = heading.strip_prefix('~');
            optional.extend(aligned.map(|_| i));
            if let Some(column) = inner.column_mut(i) {
                column.set_padding((0, GAP));
                if aligned.unwrap_or(heading).starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        let headings = headings.iter().map(|h| h.trim_start_matches(['~', '>']).to_owned()).collect();
        Self { inner, headings, rows: Vec::new(), optional }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = (String, Option<Tone>)>) {
        self.rows.push(cells.into_iter().take(self.headings.len()).collect());
    }

    fn lay_out(&mut self, row: Vec<(String, Option<Tone>)>) {
        let cells = row.into_iter().map(|(text, tone)| {
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
        self.inner.add_row(cells);
    }

    /// Makes the table fit a terminal: leaves out optional columns, then wraps the cells.
    fn fit(&mut self, width: u16) {
        let natural = |inner: &Inner| -> u32 {
            let widths = inner.column_max_content_widths();
            let shown = widths.iter().zip(inner.column_iter()).filter(|(_, column)| !column.is_hidden());
            shown.map(|(width, _)| u32::from(width + GAP)).sum::<u32>().saturating_sub(GAP.into())
        };
        while natural(&self.inner) > width.into() {
            let Some(column) = self.optional.pop().and_then(|i| self.inner.column_mut(i)) else { break };
            column.set_constraint(ColumnConstraint::Hidden);
        }
        if natural(&self.inner) > width.into() {
            self.inner.set_content_arrangement(ContentArrangement::Dynamic).set_width(width + GAP);
        }
    }

    /// Writes the table, in the order that was asked for.
    ///
    /// # Errors
    /// Writing failed, or there is no such column to sort by.
    pub fn print(&mut self, out: &mut Out<'_>) -> io::Result<()> {
        let headings: Vec<&str> = self.headings.iter().map(String::as_str).collect();
        let mut rows = std::mem::take(&mut self.rows);
        let texts = |row: &Vec<(String, Option<Tone>)>| row.iter().map(|(text, _)| text.clone()).collect();
        out.order.apply(&headings, &mut rows, texts).map_err(io::Error::other)?;
        for row in rows {
            self.lay_out(row);
        }
        if let Some(width) = out.width {
            self.fit(width);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(width: Option<u16>, note: &str) -> Vec<String> {
        let mut written = Vec::new();
        let mut out = Out::new(&mut written, false, false).with_width(width);
        let mut table = TextTable::new(&["NAME", "~>SLOTS", "FLOWS", "~BYTES", "NOTE"], false);
        table.row(["chat", "1021", "7", "5.2 GB", note].map(plain));
        table.print(&mut out).unwrap();
        String::from_utf8(written).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_narrow_terminal_does_without_optional_columns_from_the_end() {
        let whole = ["NAME  SLOTS  FLOWS  BYTES   NOTE", "chat   1021  7      5.2 GB  slow"];
        assert_eq!(printed(None, "slow"), whole);
        assert_eq!(printed(Some(32), "slow"), whole);
        assert_eq!(printed(Some(31), "slow"), ["NAME  SLOTS  FLOWS  NOTE", "chat   1021  7      slow"]);
        assert_eq!(printed(Some(20), "slow"), ["NAME  FLOWS  NOTE", "chat  7      slow"]);
    }

    #[test]
    fn what_is_still_too_wide_is_wrapped_and_nothing_is_lost() {
        let note = "connection refused by the worker, twice";
        let lines = printed(Some(34), note);
        assert!(lines.iter().all(|line| line.len() <= 34), "{lines:#?}");
        let words: Vec<&str> =
            lines[1..].iter().flat_map(|line| line[13.min(line.len())..].split(' ')).collect();
        assert_eq!(words.into_iter().filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" "), note);
    }
}
