//! The grammar of haproxy.cfg: sections, words, quotes, escapes, environment variables.

use super::super::{Notes, Unreadable};
use std::collections::HashMap;

/// Keywords that open a section.
const SECTIONS: [&str; 21] = [
    "global",
    "defaults",
    "listen",
    "frontend",
    "backend",
    "peers",
    "resolvers",
    "userlist",
    "mailers",
    "program",
    "cache",
    "ring",
    "http-errors",
    "fcgi-app",
    "log-forward",
    "log-profile",
    "crt-store",
    "traces",
    "dynamic-update",
    "acme",
    "namespace_list",
];

/// A line of words.
#[derive(Clone, Debug, Default)]
pub(super) struct Statement {
    pub line: usize,
    pub column: usize,
    pub words: Vec<String>,
}

impl Statement {
    /// A word; empty if the line has fewer.
    pub fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    /// The words after the first `count`, as text.
    pub fn rest(&self, count: usize) -> String {
        self.words.iter().skip(count).cloned().collect::<Vec<_>>().join(" ")
    }

    /// The keyword, with the second word where only both say what is meant.
    pub fn keyword(&self) -> String {
        match self.word(0) {
            first @ ("option" | "timeout" | "no" | "http-check" | "tcp-check" | "stats") => {
                format!("{first} {}", self.word(1))
            }
            first => first.to_owned(),
        }
    }
}

/// A section.
#[derive(Clone, Debug, Default)]
pub(super) struct ProxySection {
    pub line: usize,
    pub kind: String,
    pub name: String,
    pub statements: Vec<Statement>,
    /// Section `defaults` that it takes its settings from.
    pub defaults: Option<usize>,
}

/// Reads sections.
pub(super) fn parse(text: &str, notes: &mut Notes) -> Result<Vec<ProxySection>, Unreadable> {
    let mut sections: Vec<ProxySection> = Vec::new();
    let mut environment = HashMap::new();
    let mut defaults = None;
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    while let Some((number, line)) = lines.next() {
        let mut whole = line.to_owned();
        // A backslash at the end of the line continues it.
        while whole.ends_with('\\') && !whole.ends_with("\\\\") {
            whole.pop();
            let Some((_, next)) = lines.next() else { break };
            whole.push(' ');
            whole.push_str(next);
        }
        let Some(statement) = words(&whole, number, &environment)? else { continue };
        let first = statement.word(0);
        if first.starts_with('.') {
            notes.add(
                number,
                first,
                "conditions of the file are not evaluated",
                "all lines were read; remove those that do not apply",
            );
        } else if SECTIONS.contains(&first) {
            let from = statement.words.iter().position(|w| w == "from").map(|at| statement.word(at + 1));
            let name = if statement.word(1) == "from" { "" } else { statement.word(1) };
            let named = |name: &str| {
                sections.iter().rposition(|s: &ProxySection| s.kind == "defaults" && s.name == name)
            };
            let of = from.map_or(defaults, named);
            if first == "defaults" {
                defaults = Some(sections.len());
            }
            let mut section = ProxySection {
                line: number,
                kind: first.to_owned(),
                name: name.to_owned(),
                statements: Vec::new(),
                defaults: if first == "defaults" && from.is_none() { None } else { of },
            };
            // The old form: the address follows the name.
            if ["listen", "frontend"].contains(&first) && from.is_none() && statement.words.len() > 2 {
                let words = std::iter::once("bind".to_owned()).chain(statement.words[2..].iter().cloned());
                section.statements.push(Statement { words: words.collect(), ..statement.clone() });
            }
            sections.push(section);
        } else if let Some(section) = sections.last_mut() {
            if section.kind == "global" && ["setenv", "presetenv"].contains(&first) {
                environment.insert(statement.word(1).to_owned(), statement.rest(2));
            }
            section.statements.push(statement);
        } else {
            return Err(Unreadable::new(
                (number, statement.column),
                format!("{first:?} before the first section"),
                "a section such as global, defaults, listen, frontend or backend",
            ));
        }
    }
    Ok(sections)
}

/// Splits a line into words; none if it is empty.
fn words(
    line: &str,
    number: usize,
    environment: &HashMap<String, String>,
) -> Result<Option<Statement>, Unreadable> {
    let chars: Vec<char> = line.chars().collect();
    let mut statement = Statement { line: number, ..Statement::default() };
    let mut current: Option<String> = None;
    let mut i = 0;
    while let Some(&c) = chars.get(i) {
        let column = i + 1;
        i += 1;
        if !c.is_whitespace() && statement.column == 0 {
            statement.column = column;
        }
        match c {
            '#' => break,
            c if c.is_whitespace() => statement.words.extend(current.take()),
            '\\' => {
                let escaped = chars.get(i).copied();
                i += 1;
                let word = current.get_or_insert_default();
                match escaped {
                    Some('n') => word.push('\n'),
                    Some('r') => word.push('\r'),
                    Some('t') => word.push('\t'),
                    Some(c) => word.push(c),
                    None => {}
                }
            }
            '\'' | '"' => {
                let word = current.get_or_insert_default();
                let unclosed = || {
                    Unreadable::new(
                        (number, column),
                        "a quoted text that does not end",
                        format!("a closing {c} on the same line"),
                    )
                };
                loop {
                    let inside = *chars.get(i).ok_or_else(unclosed)?;
                    i += 1;
                    match inside {
                        inside if inside == c => break,
                        '\\' if c == '"' => {
                            word.extend(chars.get(i));
                            i += 1;
                        }
                        '$' if c == '"' => i += variable(&chars[i..], environment, word),
                        inside => word.push(inside),
                    }
                }
            }
            // Outside of quotes too, because files are often templates of a container's environment.
            '$' => i += variable(&chars[i..], environment, current.get_or_insert_default()),
            c => current.get_or_insert_default().push(c),
        }
    }
    statement.words.extend(current);
    Ok(Some(statement).filter(|s| !s.words.is_empty()))
}

/// Appends the value of the variable after a dollar sign, or the text as it is; returns the characters used.
fn variable(chars: &[char], environment: &HashMap<String, String>, word: &mut String) -> usize {
    let is_part = |c: &&char| c.is_ascii_alphanumeric() || **c == '_';
    let (inner, used): (String, usize) = if chars.first() == Some(&'{') {
        let Some(end) = chars.iter().position(|c| *c == '}') else {
            word.push('$');
            return 0;
        };
        (chars[1..end].iter().collect(), end + 1)
    } else {
        let name: String = chars.iter().take_while(is_part).collect();
        let used = name.len();
        (name, used)
    };
    let (name, default) = inner.split_once('-').map_or((inner.as_str(), None), |(n, d)| (n, Some(d)));
    match environment.get(name.trim_end_matches(':')).map(String::as_str).or(default) {
        Some(value) if word.len() < 65_536 => word.push_str(value),
        _ => {
            word.push('$');
            word.extend(&chars[..used]);
        }
    }
    used
}
