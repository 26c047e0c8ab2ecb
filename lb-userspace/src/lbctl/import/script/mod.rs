//! Reads the commands of one program out of a shell script, for ipvsadm and Katran.
//!
//! It follows assignments, `for` loops over words, functions and the `start` branch of a `case`, which is what scripts that
//! set up a load balancer consist of. Nothing is executed; a value that only a run would give is marked as unknown.

mod lexer;

use super::{MOST_OF_ONE_LINE, Notes, Unreadable};
pub(super) use lexer::ShellWord;
use lexer::{ShellCommand, split};
use std::collections::HashMap;

/// Most commands that a script may come to, loops counted.
const MOST_COMMANDS: usize = 100_000;
/// Functions and branches of a service script that do not set it up.
const NOT_START: [&str; 9] =
    ["stop", "clean", "clear", "flush", "status", "usage", "help", "remove", "delete"];

/// A program whose commands are wanted.
pub(super) struct Program {
    /// Ends of the paths that it is called by.
    pub names: &'static [&'static str],
    /// Whether a line that begins with an option is a command, as in the output of `ipvsadm -S`.
    pub bare_options: bool,
}

impl Program {
    fn is_named(&self, word: &str) -> bool {
        let name = word.rsplit('/').next().unwrap_or(word);
        self.names.contains(&name)
    }

    fn is_in(&self, line: &str) -> bool {
        self.names.iter().any(|name| line.contains(name)) || self.bare_options && is_option(line.trim_start())
    }
}

/// Returns the arguments of each command of the program, in the order in which the script runs them.
pub(super) fn commands(
    text: &str,
    program: &Program,
    notes: &mut Notes,
) -> Result<Vec<Vec<ShellWord>>, Unreadable> {
    let all = split(text, program)?;
    let mut run =
        ScriptRun { program, notes, lists: HashMap::new(), found: Vec::new(), left: MOST_COMMANDS, depth: 0 };
    run.block(&all);
    Ok(run.found)
}

struct ScriptRun<'r> {
    program: &'r Program,
    notes: &'r mut Notes,
    lists: HashMap<String, (String, bool)>,
    found: Vec<Vec<ShellWord>>,
    left: usize,
    depth: usize,
}

impl ScriptRun<'_> {
    fn block(&mut self, all: &[ShellCommand]) {
        // Nesting is bounded, so that no text can exhaust the stack.
        if self.depth >= 20 {
            return;
        }
        self.depth += 1;
        let mut i = 0;
        while i < all.len() && self.left > 0 {
            self.left -= 1;
            i = self.one(all, i).max(i + 1);
        }
        self.depth -= 1;
    }

    /// Follows the command at an index, and returns the index after it.
    fn one(&mut self, all: &[ShellCommand], i: usize) -> usize {
        let command = &all[i];
        match command.first() {
            "for" if command.words.len() > 3 && command.words[2].text == "in" => {
                let end = matching(all, i, &["for", "while", "until", "select"], "done");
                let name = command.words[1].text.clone();
                let values: Vec<ShellWord> =
                    command.words[3..].iter().flat_map(|word| self.values(word)).collect();
                for value in values.into_iter().take(MOST_OF_ONE_LINE) {
                    self.lists.insert(name.clone(), (value.text, value.is_unknown));
                    self.block(&all[(i + 1).min(end)..end]);
                }
                end + 1
            }
            "case" => {
                let end = matching(all, i, &["case"], "esac");
                self.case(&all[(i + 1).min(end)..end]);
                end + 1
            }
            name if command.end == '('
                && all.get(i + 1).is_some_and(|c| c.words.is_empty() && c.end == ')') =>
            {
                let name = name.to_owned();
                self.function(&name, all, i + 2)
            }
            "function" if command.words.len() > 1 => {
                let name = command.words[1].text.clone();
                let skip = if command.end == '(' { i + 2 } else { i + 1 };
                if command.words.len() > 2 { i + 1 } else { self.function(&name, all, skip) }
            }
            _ => {
                self.plain(command);
                i + 1
            }
        }
    }

    /// Follows the body of a function where it is defined, if it sets something up.
    fn function(&mut self, name: &str, all: &[ShellCommand], open: usize) -> usize {
        if all.get(open).is_none_or(|c| c.first() != "{") {
            return open;
        }
        let end = matching(all, open, &["{"], "}");
        self.branch(name, &all[(open + 1).min(end)..end]);
        end + 1
    }

    /// Follows a named part of a script, unless its name says that it does not set anything up.
    fn branch(&mut self, name: &str, body: &[ShellCommand]) {
        let lower = name.to_lowercase();
        if NOT_START.iter().any(|word| lower.contains(word))
            || ["restart", "reload"].contains(&lower.as_str())
        {
            self.skip(name, body);
        } else {
            self.block(body);
        }
    }

    /// Notes a part that is not followed, if it adds something.
    fn skip(&mut self, name: &str, body: &[ShellCommand]) {
        let adds = |w: &ShellWord| {
            ["-A", "-a", "-E", "-e"].contains(&w.text.as_str())
                || w.text.starts_with("--add")
                || w.text.starts_with("--edit")
        };
        let is_ours = |c: &&ShellCommand| {
            c.words.iter().any(|w| self.program.is_named(&w.text)) && c.words.iter().any(adds)
        };
        if let Some(word) = body.iter().find(is_ours).and_then(|c| c.words.first()) {
            self.notes.add(
                word.at.0,
                format!("the part {name} of the script"),
                "only the parts that set services up are followed",
                "check that nothing in it belongs to the services",
            );
        }
    }

    fn case(&mut self, body: &[ShellCommand]) {
        let mut branches: Vec<(Vec<&str>, usize, usize)> = Vec::new();
        let mut i = 0;
        while i < body.len() {
            let mut labels = Vec::new();
            while let Some(command) = body.get(i) {
                labels.extend(command.words.last().map(|w| w.text.as_str()));
                i += 1;
                if command.end == ')' || command.end != '|' {
                    break;
                }
            }
            let start = i;
            let mut depth = 0_u32;
            while let Some(command) = body.get(i) {
                i += 1;
                depth += u32::from(command.first() == "case");
                depth = depth.saturating_sub(u32::from(command.first() == "esac"));
                if command.end == 'D' && depth == 0 {
                    break;
                }
            }
            branches.push((labels, start, i));
        }
        let has_start = branches.iter().any(|(labels, ..)| labels.contains(&"start"));
        for (labels, start, end) in branches {
            let is_start = labels.contains(&"start");
            let (name, body) = (labels.join("|"), &body[start..end]);
            match (is_start, has_start) {
                (true, _) => self.block(body),
                (false, true) => self.skip(&name, body),
                (false, false) => self.branch(&name, body),
            }
        }
    }

    /// Follows an assignment, or keeps a command of the program.
    fn plain(&mut self, command: &ShellCommand) {
        let mut words = &command.words[..];
        while let Some(word) = words.first() {
            let assignment = word.text.split_once('=').filter(|(name, _)| is_name(name));
            match assignment {
                Some((name, value)) => {
                    let (value, is_unknown) = self.replace(value);
                    self.lists.insert(name.to_owned(), (value, is_unknown));
                }
                None if ["export", "local", "readonly", "declare"].contains(&word.text.as_str()) => {}
                None => break,
            }
            words = &words[1..];
        }
        let Some(first) = words.first() else { return };
        // A program may be called through a variable: IPVSADM=/sbin/ipvsadm; $IPVSADM -A ...
        let (name, _) = self.replace(&first.text);
        let arguments = if self.program.is_named(&name)
            || name.trim_matches(['$', '{', '}']).to_lowercase().ends_with("ipvsadm")
        {
            &words[1..]
        } else if self.program.bare_options && is_option(&name) {
            words
        } else if let Some(at) = self.inner(words) {
            &words[at..]
        } else {
            return;
        };
        let arguments = arguments.iter().flat_map(|word| self.values(word)).collect();
        self.found.push(arguments);
    }

    /// Where the arguments begin of a command that another one runs, as in `ip netns exec NAME ipvsadm -A`, or that follows a
    /// prompt that was copied with it.
    fn inner(&self, words: &[ShellWord]) -> Option<usize> {
        let at = words.iter().position(|w| self.program.is_named(&w.text))? + 1;
        let first = words.get(at)?.text.strip_prefix('-')?;
        (first.starts_with('-') || first.starts_with(|c| "AEDCaed".contains(c))).then_some(at)
    }

    /// Replaces variables; a word that is only a list becomes several.
    fn values(&self, word: &ShellWord) -> Vec<ShellWord> {
        let (text, is_unknown) = self.replace(&word.text);
        if let Some((first, last)) = counted(&text) {
            let numbers = (first..=last).take(MOST_OF_ONE_LINE);
            return numbers
                .map(|n| ShellWord { text: n.to_string(), at: word.at, is_unknown: false })
                .collect();
        }
        if text == word.text || is_unknown {
            return vec![ShellWord { text, at: word.at, is_unknown }];
        }
        text.split_whitespace()
            .map(|part| ShellWord { text: part.to_owned(), at: word.at, is_unknown: false })
            .collect()
    }

    fn replace(&self, text: &str) -> (String, bool) {
        let mut out = String::new();
        let mut is_unknown = text.contains('`') || text.contains("$(") && counted(text).is_none();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            rest = &rest[at..];
            let after = &rest[1..];
            let (name, length) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
                Some((name, _)) => (name, name.len() + 3),
                None => {
                    let length =
                        after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                    (&after[..length], length + 1)
                }
            };
            let plain = name.trim_end_matches("[@]").trim_end_matches("[*]");
            match self.lists.get(plain) {
                Some((value, unknown)) if out.len() + value.len() < 65_536 => {
                    out.push_str(value);
                    is_unknown |= unknown;
                }
                _ if after.starts_with('(') => out.push('$'),
                _ => {
                    out.push_str(&rest[..length]);
                    is_unknown |= !name.is_empty();
                }
            }
            rest = &rest[if after.starts_with('(') { 1 } else { length }..];
        }
        out.push_str(rest);
        (out, is_unknown)
    }
}

fn is_option(text: &str) -> bool {
    text.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '-'))
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Numbers of `$(seq 1 5)` and `{1..5}`.
fn counted(text: &str) -> Option<(u32, u32)> {
    let (first, last) = match text.strip_prefix("$(seq ").and_then(|t| t.strip_suffix(')')) {
        Some(inner) => inner.trim().split_once(' ')?,
        None => text.strip_prefix('{')?.strip_suffix('}')?.split_once("..")?,
    };
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
}

/// Index of the command that closes what opens at `open`, or the end.
fn matching(all: &[ShellCommand], open: usize, opens: &[&str], close: &str) -> usize {
    let mut depth = 0_usize;
    for (i, command) in all.iter().enumerate().skip(open) {
        if opens.contains(&command.first()) {
            depth += 1;
        } else if command.first() == close {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                return i;
            }
        }
    }
    all.len()
}
