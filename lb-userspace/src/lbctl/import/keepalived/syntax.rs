//! The grammar of keepalived.conf: statements, blocks, quotes, comments, definitions and conditions.

use super::super::{Notes, Unreadable};
use std::collections::HashMap;

/// Deepest nesting of blocks.
const DEEPEST: usize = 16;
/// Longest text of a definition after replacement.
const LONGEST: usize = 65_536;

/// A statement, and what is in its block.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub line: usize,
    pub column: usize,
    pub words: Vec<String>,
    pub children: Vec<Node>,
}

impl Node {
    pub fn keyword(&self) -> &str {
        self.word(0)
    }

    /// A word of the statement; empty if it has fewer.
    pub fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    /// The last statement of this keyword in the block, which wins.
    pub fn child(&self, keyword: &str) -> Option<&Self> {
        self.children.iter().rev().find(|n| n.keyword() == keyword)
    }
}

struct ConfigWord {
    text: String,
    column: usize,
    is_quoted: bool,
}

/// Reads statements.
pub(super) fn parse(text: &str, notes: &mut Notes) -> Result<Vec<Node>, Unreadable> {
    let mut definitions: HashMap<String, String> = HashMap::new();
    let mut open: Vec<Node> = vec![Node::default()];
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    while let Some((number, line)) = lines.next() {
        if let Some((name, value)) = definition(line) {
            let mut value = value.to_owned();
            // A definition continues after a backslash; the lines are those of the text that it stands for.
            while let Some(kept) = value.strip_suffix('\\') {
                value = kept.to_owned();
                let Some((_, next)) = lines.next() else { break };
                value.push('\n');
                value.push_str(next.trim_end());
            }
            let value = replaced(&value, &definitions);
            definitions.insert(name.to_owned(), value);
            continue;
        }
        let replaced = replaced(line, &definitions);
        for part in replaced.lines() {
            let words = words(part, number)?;
            statement_words(words, number, &mut open, notes)?;
        }
    }
    match open.pop() {
        Some(root) if open.is_empty() => Ok(root.children),
        Some(block) => Err(Unreadable::new(
            (block.line, block.column),
            format!("the block {} does not end", block.words.join(" ")),
            "a } before the end of the text",
        )),
        None => Ok(Vec::new()),
    }
}

/// `$NAME=value`.
fn definition(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.trim().strip_prefix('$')?.split_once('=')?;
    let name = name.trim();
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    is_name.then(|| (name, value.trim()))
}

fn replaced(line: &str, definitions: &HashMap<String, String>) -> String {
    if definitions.is_empty() || !line.contains('$') {
        return line.to_owned();
    }
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, after) = match rest.strip_prefix('{').and_then(|r| r.split_once('}')) {
            Some((name, after)) => (name, after),
            None => {
                let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
                let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                rest.split_at(end)
            }
        };
        match definitions.get(name).filter(|value| out.len() + value.len() < LONGEST) {
            Some(value) => {
                out.push_str(value);
                rest = after;
            }
            None => out.push('$'),
        }
    }
    out.push_str(rest);
    out
}

/// Splits a line into words; `{` and `}` are words of their own.
fn words(line: &str, number: usize) -> Result<Vec<ConfigWord>, Unreadable> {
    let mut found: Vec<ConfigWord> = Vec::new();
    let mut current: Option<ConfigWord> = None;
    let mut chars = line.chars().enumerate().peekable();
    while let Some((at, c)) = chars.next() {
        let column = at + 1;
        match c {
            '#' | '!' if current.is_none() => break,
            c if c.is_whitespace() => found.extend(current.take()),
            '"' => {
                let word = current.get_or_insert(ConfigWord { text: String::new(), column, is_quoted: true });
                word.is_quoted = true;
                let mut is_closed = false;
                while let Some((_, c)) = chars.next() {
                    match c {
                        '"' => {
                            is_closed = true;
                            break;
                        }
                        '\\' => word.text.extend(chars.next().map(|(_, c)| c)),
                        c => word.text.push(c),
                    }
                }
                if !is_closed {
                    return Err(Unreadable::new(
                        (number, column),
                        "a quoted text that does not end",
                        "a closing \" on the same line",
                    ));
                }
            }
            // A } inside a word, as in a regular expression or a range ~SEQ, belongs to the word.
            '{' | '}' if current.is_none() => {
                found.push(ConfigWord { text: c.to_string(), column, is_quoted: false });
            }
            '{' if chars.peek().is_none_or(|(_, next)| next.is_whitespace()) => {
                found.extend(current.take());
                found.push(ConfigWord { text: c.to_string(), column, is_quoted: false });
            }
            c => current
                .get_or_insert(ConfigWord { text: String::new(), column, is_quoted: false })
                .text
                .push(c),
        }
    }
    found.extend(current);
    Ok(found)
}

/// Adds the words of a line to the open blocks.
fn statement_words(
    words: Vec<ConfigWord>,
    line: usize,
    open: &mut Vec<Node>,
    notes: &mut Notes,
) -> Result<(), Unreadable> {
    let mut statement = Node::default();
    let mut skipped = false;
    for word in words {
        let at = (line, word.column);
        match word.text.as_str() {
            "{" if !word.is_quoted => {
                let mut block = std::mem::take(&mut statement);
                if block.words.is_empty() {
                    // The brace is on a line of its own, after its statement.
                    let parent = open.last_mut().map(|parent| &mut parent.children);
                    block = match parent.and_then(Vec::pop) {
                        Some(last) if last.children.is_empty() => last,
                        _ => {
                            return Err(Unreadable::new(
                                at,
                                "a { without a keyword",
                                "a keyword such as virtual_server before it",
                            ));
                        }
                    };
                }
                if open.len() > DEEPEST {
                    return Err(Unreadable::new(
                        at,
                        "blocks are nested too deeply",
                        format!("at most {DEEPEST} levels"),
                    ));
                }
                open.push(block);
            }
            "}" if !word.is_quoted => {
                finish(std::mem::take(&mut statement), open, notes);
                let block = open.pop().unwrap_or_default();
                match open.last_mut() {
                    Some(parent) => parent.children.push(block),
                    None => return Err(Unreadable::new(at, "a } that closes no block", "a { before it")),
                }
            }
            text if text.starts_with('@') && statement.words.is_empty() && !word.is_quoted => {
                // `@host` keeps a line on one host only, `@^host` on all others.
                skipped = !text.starts_with("@^");
                notes.add(
                    line,
                    format!("{text} (a line for some hosts)"),
                    "all hosts have the same state",
                    if skipped {
                        "the line was left out; import a file for this host if it needs it"
                    } else {
                        "the line was kept for all hosts"
                    },
                );
            }
            _ => {
                if statement.words.is_empty() {
                    (statement.line, statement.column) = at;
                }
                statement.words.push(word.text);
            }
        }
    }
    if !skipped {
        finish(statement, open, notes);
    }
    Ok(())
}

fn finish(statement: Node, open: &mut [Node], notes: &mut Notes) {
    if statement.words.is_empty() {
        return;
    }
    if statement.keyword().starts_with("include") {
        notes.add(
            statement.line,
            statement.words.join(" "),
            "other files are not read",
            "import that file too, or put its text in place of the line",
        );
        return;
    }
    if let Some(parent) = open.last_mut() {
        parent.children.push(statement);
    }
}
