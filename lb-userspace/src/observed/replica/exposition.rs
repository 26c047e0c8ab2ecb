//! Reads a few metrics from the text format of Prometheus and OpenMetrics.
//!
//! A server's page may have thousands of samples, and is read every second for each replica; so lines with other
//! names are only checked to be metrics, and not kept. (The crates that parse whole pages build a map of all metrics.) Input: a page. Output: samples. Pure.

use crate::desired::model::{ReportError, Selector};

/// Largest page, in bytes.
pub const PAGE_LIMIT: usize = 4 * 1024 * 1024;

/// A sample: name, labels as written, and value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample<'p> {
    /// Name of the metric.
    pub name: &'p str,
    /// Text between the braces.
    labels: &'p str,
    /// Value; may be infinite or NaN.
    pub value: f64,
}

/// Parses the next label of a list; returns name, value and the rest. None at the end, or if the list is malformed.
fn parse_label(list: &str) -> Option<(&str, String, &str)> {
    let list = list.trim_start_matches([',', ' ', '\t']);
    let (name, rest) = list.split_once('=')?;
    let inside = rest.trim_start().strip_prefix('"')?;
    let mut value = String::new();
    let mut chars = inside.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((name.trim(), value, &inside[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

impl Sample<'_> {
    /// Value of a label; None if the sample has no such label.
    pub fn label(&self, name: &str) -> Option<String> {
        let mut list = self.labels;
        while let Some((found, value, rest)) = parse_label(list) {
            if found == name {
                return Some(value);
            }
            list = rest;
        }
        None
    }

    /// Whether the sample matches a selector. As in PromQL, a missing label is empty.
    pub fn matches(&self, selector: &Selector) -> bool {
        self.name == selector.name
            && selector.labels.iter().all(|(name, value)| self.label(name).unwrap_or_default() == *value)
    }
}

/// Finds the closing brace of labels; `text` begins after the opening brace.
fn labels_end(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

fn is_name(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b':';
    text.bytes().next().is_some_and(|b| !b.is_ascii_digit()) && text.bytes().all(ok)
}

/// Parses a line; None if it is blank or a comment.
fn parse_sample(line: &str) -> Result<Option<Sample<'_>>, &'static str> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, rest) = line.split_at(line.find(['{', ' ', '\t']).unwrap_or(line.len()));
    if !is_name(name) {
        return Err("the line does not begin with a metric name");
    }
    let rest = rest.trim_start();
    let (labels, rest) = match rest.strip_prefix('{') {
        None => ("", rest),
        Some(inside) => {
            let end = labels_end(inside).ok_or("the labels have no closing brace")?;
            (&inside[..end], &inside[end + 1..])
        }
    };
    // A timestamp or an exemplar may follow the value.
    let value = rest.split_ascii_whitespace().next().ok_or("the metric has no value")?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        "NaN" => f64::NAN,
        text => text.parse().map_err(|_| "the value is not a number")?,
    };
    Ok(Some(Sample { name, labels, value }))
}

/// Calls `each` for each sample whose name `wanted` accepts.
///
/// # Errors
/// A line is not a metric: the page is something else, and none of it may be used.
pub fn read<'p>(
    page: &'p str,
    wanted: impl Fn(&str) -> bool,
    mut each: impl FnMut(Sample<'p>),
) -> Result<(), ReportError> {
    for (line, text) in page.lines().enumerate() {
        let found = parse_sample(text)
            .map_err(|what| ReportError::NotMetrics { line: line + 1, what: what.to_owned() })?;
        if let Some(sample) = found.filter(|s| wanted(s.name)) {
            each(sample);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(page: &str) -> Result<Vec<(String, f64)>, String> {
        let mut found = Vec::new();
        read(page, |_| true, |s| found.push((s.name.to_owned(), s.value))).map_err(|e| e.to_string())?;
        Ok(found)
    }

    #[test]
    fn samples_are_read_in_both_formats() {
        let page = "# HELP a b\n# TYPE a gauge\na 1\na:b{x=\"1\",y=\"a\\\"}b\"} 2.5e3 1700000000000\n\n\
                    c_total{x=\"}\"} 3 # {trace=\"1\"} 0.5\n inf +Inf\nnan NaN\nneg{} -Inf\n# EOF\n";
        let found = all(page).unwrap();
        let names: Vec<_> = found.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["a", "a:b", "c_total", "inf", "nan", "neg"]);
        assert_eq!((found[0].1, found[1].1, found[2].1, found[5].1), (1.0, 2_500.0, 3.0, f64::NEG_INFINITY));
        assert!(found[4].1.is_nan());
    }

    #[test]
    fn other_pages_are_refused_with_the_line() {
        for (page, expected) in [
            ("<!DOCTYPE html>", "line 1 is not a valid metric: the line does not begin with a metric name"),
            ("{\"running\":1}", "line 1 is not a valid metric: the line does not begin with a metric name"),
            ("a 1\nb{x=\"1\" 2\n", "line 2 is not a valid metric: the labels have no closing brace"),
            ("a\n", "line 1 is not a valid metric: the metric has no value"),
            ("a{} \n", "line 1 is not a valid metric: the metric has no value"),
            ("a x\n", "line 1 is not a valid metric: the value is not a number"),
            ("Not Found", "line 1 is not a valid metric: the value is not a number"),
        ] {
            assert_eq!(all(page).unwrap_err(), expected, "{page}");
        }
    }

    #[test]
    fn selectors_look_at_labels() {
        let line = "q{model_name=\"a, b\",priority=\"\",path=\"c:\\\\x\"} 1";
        let found = parse_sample(line).unwrap().unwrap();
        assert_eq!(found.label("model_name").as_deref(), Some("a, b"));
        assert_eq!(found.label("path").as_deref(), Some("c:\\x"));
        for (selector, expected) in [
            ("q", true),
            ("q{model_name=\"a\"}", false),
            ("q{priority=\"\"}", true),
            ("q{missing=\"\"}", true),
            ("q{missing=\"1\"}", false),
            ("r", false),
        ] {
            assert_eq!(found.matches(&selector.parse().unwrap()), expected, "{selector}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(page in "(?s).{0,300}") {
            let _ = all(&page);
        }

        #[test]
        fn what_is_written_is_read(
            value in "[a-z\"\\\\},{= ]{0,12}", number in -1e9..1e9f64, other in "[a-z]{1,5}",
        ) {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let line = format!("m{{{other}=\"x\",label_1=\"{escaped}\"}} {number}");
            let found = parse_sample(&line).unwrap().unwrap();
            prop_assert_eq!(found.label("label_1"), Some(value));
            prop_assert_eq!(found.value, number);
        }
    }
}
