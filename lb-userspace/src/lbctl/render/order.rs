//! Order and choice of a table's rows, by what its cells say.

use std::cmp::Ordering;

/// Which rows of a table are printed, and in which order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowOrder {
    /// Heading of the column to sort by; with `-` before it, in reverse.
    pub sort: Option<String>,
    /// Text that a row must contain, in any case.
    pub filter: Option<String>,
}

/// There is no such column.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no column {wanted:?} to sort by; columns: {}", columns.join(", "))]
pub struct NoColumn {
    /// Heading that was given.
    pub wanted: String,
    /// Headings of the table.
    pub columns: Vec<String>,
}

impl RowOrder {
    /// Leaves out rows and sorts the rest. Numbers are sorted by size, the largest first; texts by the alphabet.
    ///
    /// # Errors
    /// The table has no such column.
    pub fn apply<T>(
        &self,
        headings: &[&str],
        rows: &mut Vec<T>,
        cells: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), NoColumn> {
        if let Some(filter) = &self.filter {
            let filter = filter.to_lowercase();
            rows.retain(|row| cells(row).iter().any(|cell| cell.to_lowercase().contains(&filter)));
        }
        let Some(wanted) = &self.sort else { return Ok(()) };
        let (column, is_reversed) = match wanted.strip_prefix('-') {
            Some(column) => (column, true),
            None => (wanted.as_str(), false),
        };
        // `new-flows` is easier to type than a heading with a space.
        let plain = |text: &str| text.to_lowercase().replace(['-', '_', '/'], " ");
        let Some(at) = headings.iter().position(|heading| plain(heading) == plain(column)) else {
            let columns = headings.iter().map(|heading| heading.to_lowercase().replace(' ', "-")).collect();
            return Err(NoColumn { wanted: column.to_owned(), columns });
        };
        rows.sort_by_cached_key(|row| CellValue::of(cells(row).get(at).map_or("", String::as_str)));
        if is_reversed {
            rows.reverse();
        }
        Ok(())
    }
}

/// A cell as it is sorted: numbers before texts, and nothing last.
#[derive(Clone, Debug, PartialEq)]
enum CellValue {
    Number(f64),
    Text(String),
    Nothing,
}

impl Eq for CellValue {}

impl Ord for CellValue {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => b.total_cmp(a),
            (Self::Text(a), Self::Text(b)) => a.cmp(b),
            (a, b) => a.rank().cmp(&b.rank()),
        }
    }
}

impl PartialOrd for CellValue {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl CellValue {
    fn rank(&self) -> u8 {
        match self {
            Self::Number(_) => 0,
            Self::Text(_) => 1,
            Self::Nothing => 2,
        }
    }

    fn of(cell: &str) -> Self {
        match cell {
            "" | "-" => Self::Nothing,
            _ => quantity(cell).map_or_else(|| Self::Text(cell.to_lowercase()), Self::Number),
        }
    }
}

/// The size of a number with a unit, as this program prints them: `14.6 KiB`, `12.3k`, `1m15s`, `33.3%`, `2/3`.
fn quantity(text: &str) -> Option<f64> {
    let (mut sum, mut rest) = (0.0, text);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..end].parse().ok()?;
        rest = rest[end..].trim_start();
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let scale = match &rest[..end] {
            "" | "%" | "B" | "s" | "bit/s" | "/" => 1.0,
            "µs" => 1e-6,
            "ms" => 1e-3,
            "m" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            "k" | "kbit/s" => 1e3,
            "M" | "Mbit/s" => 1e6,
            "G" | "Gbit/s" => 1e9,
            "Tbit/s" => 1e12,
            "KiB" => 1024.0,
            "MiB" => 1024.0 * 1024.0,
            "GiB" => 1024.0 * 1024.0 * 1024.0,
            "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => return None,
        };
        sum += number * scale;
        // Of a part and its whole, the part counts.
        if &rest[..end] == "/" {
            break;
        }
        rest = &rest[end..];
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(sort: Option<&str>, filter: Option<&str>) -> Result<Vec<&'static str>, NoColumn> {
        let mut rows =
            vec![["web", "9", "1.0 KiB", "45s"], ["API", "100", "-", "1m0s"], ["chat", "20", "2 B", "2d4h"]];
        let order = RowOrder { sort: sort.map(str::to_owned), filter: filter.map(str::to_owned) };
        let cells = |row: &[&'static str; 4]| row.map(str::to_owned).to_vec();
        order.apply(&["NAME", "NEW FLOWS", "BYTES", "SINCE"], &mut rows, cells)?;
        Ok(rows.into_iter().map(|row| row[0]).collect())
    }

    #[test]
    fn numbers_are_sorted_by_size_and_texts_by_the_alphabet() {
        assert_eq!(ordered(Some("name"), None).unwrap(), ["API", "chat", "web"]);
        assert_eq!(ordered(Some("-NAME"), None).unwrap(), ["web", "chat", "API"]);
        for column in ["new flows", "new-flows", "NEW_FLOWS"] {
            assert_eq!(ordered(Some(column), None).unwrap(), ["API", "chat", "web"]);
        }
        assert_eq!(ordered(Some("bytes"), None).unwrap(), ["web", "chat", "API"], "nothing is last");
        assert_eq!(ordered(Some("since"), None).unwrap(), ["chat", "API", "web"]);
        let error = ordered(Some("flows"), None).unwrap_err().to_string();
        assert_eq!(error, "no column \"flows\" to sort by; columns: name, new-flows, bytes, since");
    }

    #[test]
    fn rows_are_chosen_by_any_cell() {
        assert_eq!(ordered(None, Some("api")).unwrap(), ["API"]);
        assert_eq!(ordered(None, Some("kib")).unwrap(), ["web"]);
        assert!(ordered(None, Some("none")).unwrap().is_empty());
    }

    #[test]
    fn quantities_are_read_as_they_are_printed() {
        for (text, size) in [
            ("14.6 KiB", 14.6 * 1024.0),
            ("12.3k", 12_300.0),
            ("10.0 Mbit/s", 1e7),
            ("1m15s", 75.0),
            ("2d4h", 187_200.0),
            ("33.3%", 33.3),
            ("850 µs", 8.5e-4),
            ("2/3", 2.0),
        ] {
            assert!((quantity(text).unwrap() - size).abs() < 1e-9, "{text}");
        }
        assert_eq!([quantity("10.1.0.1"), quantity("gpu-1"), quantity("3 flows")], [None; 3]);
    }
}
