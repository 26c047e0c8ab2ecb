//! Splits a shell script into commands of words.

use super::{super::Unreadable, Program};

/// A word of a command, after variables were replaced.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct ShellWord {
    /// The text; a variable without a known value is left as it is written.
    pub text: String,
    /// Line and column.
    pub at: (usize, usize),
    /// Whether a part has a value that only a run would give.
    pub is_unknown: bool,
}

/// A command.
#[derive(Clone, Debug, Default)]
pub(super) struct ShellCommand {
    pub words: Vec<ShellWord>,
    /// What ended it: newline, `;`, `|`, `(`, `)`, or `;;` as `D`.
    pub end: char,
}

impl ShellCommand {
    pub fn first(&self) -> &str {
        self.words.first().map_or("", |w| w.text.as_str())
    }
}

/// Splits a script into commands.
pub(super) fn split(text: &str, program: &Program) -> Result<Vec<ShellCommand>, Unreadable> {
    let mut all = Vec::new();
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    while let Some((number, line)) = lines.next() {
        // Characters with their places, of this line and those that continue it.
        let mut chars: Vec<(char, usize, usize)> = Vec::new();
        let (mut number_now, mut part) = (number, line);
        loop {
            let is_open_list = is_open_list(&chars, part);
            let body = part.strip_suffix('\\');
            let kept = body.unwrap_or(part);
            chars.extend(kept.chars().enumerate().map(|(i, c)| (c, number_now, i + 1)));
            if body.is_none() && !is_open_list {
                break;
            }
            chars.push((' ', number_now, kept.chars().count() + 1));
            match lines.next() {
                Some((n, next)) => (number_now, part) = (n, next),
                None => break,
            }
        }
        let whole: String = chars.iter().map(|c| c.0).collect();
        split_line(&chars, program.is_in(&whole), &mut all)?;
        if let Some(word) = here_document(&whole) {
            for (_, line) in lines.by_ref() {
                if line.trim() == word {
                    break;
                }
            }
        }
    }
    Ok(all)
}

/// Whether `NAME=(` is open at the end of a line.
fn is_open_list(before: &[(char, usize, usize)], part: &str) -> bool {
    let whole: String = before.iter().map(|c| c.0).chain(part.chars()).collect();
    let Some((name, rest)) = whole.split_once("=(") else { return false };
    let is_name = name.trim().chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    is_name && !name.trim().is_empty() && !rest.contains(')')
}

fn here_document(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("<<")?;
    let word: String = rest
        .trim_start_matches(['-', ' ', '\'', '"', '\\'])
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    Some(word).filter(|word| !word.is_empty())
}

/// Splits one line into commands.
fn split_line(
    chars: &[(char, usize, usize)],
    is_strict: bool,
    all: &mut Vec<ShellCommand>,
) -> Result<(), Unreadable> {
    let mut command = ShellCommand::default();
    let mut word: Option<ShellWord> = None;
    let mut i = 0;
    let char_at = |i: usize| chars.get(i).map(|c| c.0);
    while let Some(&(c, line, column)) = chars.get(i) {
        i += 1;
        let at = (line, column);
        let is_start = word.is_none();
        match c {
            '#' if is_start => break,
            c if c.is_whitespace() => command.words.extend(word.take()),
            '\'' | '"' => {
                let close =
                    (i..chars.len()).find(|&j| chars[j].0 == c && (c == '\'' || chars[j - 1].0 != '\\'));
                let Some(close) = close else {
                    if is_strict {
                        return Err(Unreadable::new(
                            at,
                            format!("a quoted text that does not end: {c}"),
                            format!("a closing {c} on the same line"),
                        ));
                    }
                    continue;
                };
                let word = word.get_or_insert(ShellWord { at, ..ShellWord::default() });
                let quoted: String = chars[i..close].iter().map(|c| c.0).collect();
                // A dollar sign in single quotes is no variable; ipvsadm has no use for one.
                word.text.push_str(&quoted);
                i = close + 1;
            }
            '\\' => {
                let word = word.get_or_insert(ShellWord { at, ..ShellWord::default() });
                word.text.extend(char_at(i));
                i += 1;
            }
            '$' if char_at(i) == Some('(') => {
                let word = word.get_or_insert(ShellWord { at, ..ShellWord::default() });
                i += substitution(&chars[i..], &mut word.text);
            }
            '(' if word.as_ref().is_some_and(|w| w.text.ends_with('=')) => {
                let word = word.get_or_insert_default();
                let list: Vec<char> = chars[i..].iter().map(|c| c.0).take_while(|c| *c != ')').collect();
                word.text.extend(&list);
                i += list.len() + 1;
            }
            ';' | '|' | '&' | '(' | ')' => {
                let is_redirect = c == '&' && (i >= 2 && chars[i - 2].0 == '>' || char_at(i) == Some('>'));
                if is_redirect {
                    continue;
                }
                command.words.extend(word.take());
                command.end = if c == ';' && char_at(i) == Some(';') { 'D' } else { c };
                if command.end == 'D' || char_at(i) == Some(c) && c != '(' && c != ')' {
                    i += 1;
                }
                push(all, std::mem::take(&mut command));
            }
            '>' | '<' => {
                // A redirection: the number before it and the file after it are no arguments.
                if word.as_ref().is_some_and(|w| !w.text.chars().all(|c| c.is_ascii_digit())) {
                    command.words.extend(word.take());
                }
                word = None;
                while char_at(i).is_some_and(|c| c == '>' || c == '<' || c == '&' || c == ' ') {
                    i += 1;
                }
                while char_at(i).is_some_and(|c| !c.is_whitespace() && !";|".contains(c)) {
                    i += 1;
                }
            }
            c => word.get_or_insert(ShellWord { at, ..ShellWord::default() }).text.push(c),
        }
    }
    command.words.extend(word.take());
    command.end = '\n';
    push(all, command);
    Ok(())
}

/// Appends `$(...)` as it is, whose opening bracket is first; returns the characters used.
fn substitution(chars: &[(char, usize, usize)], text: &mut String) -> usize {
    let mut depth = 0;
    text.push('$');
    for (used, (c, ..)) in chars.iter().enumerate() {
        text.push(*c);
        depth += i32::from(*c == '(') - i32::from(*c == ')');
        if depth == 0 {
            return used + 1;
        }
    }
    chars.len()
}

/// Appends a command; words of the language that begin it become commands of their own.
fn push(all: &mut Vec<ShellCommand>, mut command: ShellCommand) {
    while ["do", "then", "else", "{", "!", "sudo", "exec", "time", "if", "elif"].contains(&command.first())
        && command.words.len() > 1
    {
        let word = command.words.remove(0);
        all.push(ShellCommand { words: vec![word], end: ';' });
    }
    if command.first() == "case" && command.words.len() > 3 {
        // The first label is on the line of the case.
        let label = command.words.split_off(3);
        all.push(ShellCommand { words: std::mem::replace(&mut command.words, label), end: '\n' });
    }
    if !command.words.is_empty() || command.end == ')' || command.end == '(' || command.end == 'D' {
        all.push(command);
    }
}
