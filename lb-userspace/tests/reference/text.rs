//! Builds Markdown from arbitrary text, and checks that the tables of descriptions are complete.

/// Checks that `described` names exactly what `existing` names. `file` is the table under `tests/reference/` to correct.
pub fn check_described(existing: &[&str], described: &[&str], file: &str) {
    let missing: Vec<_> = existing.iter().filter(|name| !described.contains(name)).collect();
    assert!(missing.is_empty(), "describe {missing:?} in tests/reference/{file}");
    let gone: Vec<_> = described.iter().filter(|name| !existing.contains(name)).collect();
    assert!(gone.is_empty(), "{gone:?} no longer exist: remove them from tests/reference/{file}");
}

/// First lines of every page.
pub fn head(title: &str, about: &str) -> String {
    format!(
        "# {title}\n\n<!-- Generated from the code by `cargo xtask docs`. Do not edit: a test compares it. -->\n\n{about}\n"
    )
}

/// Plain text in a cell of a table. Angle brackets outside of code would be read as HTML.
pub fn cell(text: &str) -> String {
    let mut out = String::new();
    let mut is_code = false;
    for c in text.chars() {
        match c {
            '`' => {
                is_code = !is_code;
                out.push(c);
            }
            '|' => out.push_str("\\|"),
            '\n' => out.push(' '),
            '<' if !is_code => out.push_str("&lt;"),
            '>' if !is_code => out.push_str("&gt;"),
            '*' | '[' | ']' if !is_code => {
                out.push('\\');
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

/// A table: heading, and rows of cells in Markdown.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = format!("\n| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
    for row in rows {
        out.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    out
}

/// `text` as code, or nothing.
pub fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) }
}

/// Splits `[default: …]` off the end of a help line; returns the line and the default.
pub fn split_default(help: &str) -> (String, Option<String>) {
    match help.rsplit_once("[default: ") {
        Some((text, rest)) if rest.ends_with(']') => {
            (text.trim_end().to_owned(), Some(rest[..rest.len() - 1].to_owned()))
        }
        _ => (help.to_owned(), None),
    }
}
