//! Reads configurations of other load balancers: ipvsadm, keepalived, HAProxy and Katran.
//!
//! Input: text. Output: an [`Imported`]: a valid [`Desired`], and a [`Note`] for each thing that it could not keep; or an
//! [`Unreadable`]. Pure. Called by `lbctl config import`.

mod assemble;
mod haproxy;
mod ipvs;
mod ipvsadm;
mod katran;
mod keepalived;
mod script;
#[cfg(test)]
mod tests;

use crate::{
    desired::{
        config::export,
        model::{Desired, ForwardingMode},
    },
    printable::escape,
};
use serde::Serialize;
use std::{fmt::Write, net::IpAddr};

/// Largest number of services or backends that one line may stand for: a range of addresses, a template, a loop.
const MOST_OF_ONE_LINE: usize = 1_024;

/// Load balancer whose configuration is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Output of `ipvsadm -S -n`, or a script of ipvsadm commands.
    Ipvsadm,
    /// keepalived.conf.
    Keepalived,
    /// haproxy.cfg.
    Haproxy,
    /// A script of katran_goclient commands, or the output of its `-l`.
    Katran,
}

impl Origin {
    /// Name of the product.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipvsadm => "ipvsadm",
            Self::Keepalived => "keepalived",
            Self::Haproxy => "HAProxy",
            Self::Katran => "Katran",
        }
    }
}

/// What the operator adds to the text.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// VIP of services whose text names none: `bind *:443`, firewall marks.
    pub vip: Option<IpAddr>,
    /// Forwarding mode of all services, instead of that of the text.
    pub mode: Option<ForwardingMode>,
    /// Start of all names of services.
    pub name_prefix: String,
}

/// Something that could not be kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Line of the text, from 1.
    pub line: usize,
    /// Further lines that say the same.
    pub more_lines: Vec<usize>,
    /// What the text says.
    pub says: String,
    /// Why it could not be kept.
    pub why: String,
    /// What to use instead.
    pub instead: String,
}

/// The result of an import.
#[derive(Clone, Debug, Default)]
pub struct Imported {
    /// Services, which break no rule.
    pub desired: Desired,
    /// What could not be kept, in the order of the text.
    pub notes: Vec<Note>,
}

/// Why a text cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {what}; expected {expected}")]
pub struct Unreadable {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong.
    pub what: String,
    /// What would be right.
    pub expected: String,
}

impl Unreadable {
    fn new(at: (usize, usize), what: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { line: at.0, column: at.1, what: what.into(), expected: expected.into() }
    }
}

/// Notes as they are collected. Those that say the same are one note.
#[derive(Debug, Default)]
struct Notes(Vec<Note>);

impl Notes {
    fn add(
        &mut self,
        line: usize,
        says: impl Into<String>,
        why: impl Into<String>,
        instead: impl Into<String>,
    ) {
        let (says, why, instead) = (says.into(), why.into(), instead.into());
        match self.0.iter_mut().find(|n| n.says == says && n.why == why && n.instead == instead) {
            Some(note) if note.line == line || note.more_lines.last() == Some(&line) => {}
            Some(note) => note.more_lines.push(line),
            None => self.0.push(Note { line, more_lines: Vec::new(), says, why, instead }),
        }
    }
}

/// Reads a text.
///
/// # Errors
/// The first place that does not follow the grammar of the product.
pub fn import(origin: Origin, text: &str, options: &ImportOptions) -> Result<Imported, Unreadable> {
    let mut notes = Notes::default();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let drafts = match origin {
        Origin::Ipvsadm => ipvsadm::read(text, options, &mut notes),
        Origin::Keepalived => keepalived::read(text, options, &mut notes),
        Origin::Haproxy => haproxy::read(text, options, &mut notes),
        Origin::Katran => katran::read(text, &mut notes),
    }?;
    let desired = assemble::assemble(drafts, options, &mut notes);
    let mut notes = notes.0;
    notes.sort_by_key(|note| note.line);
    Ok(Imported { desired, notes })
}

impl Note {
    /// The note as one line of text.
    pub fn line_of(&self, file: &str) -> String {
        let mut lines = String::new();
        match &self.more_lines[..] {
            [] => {}
            more if more.len() <= 5 => {
                let list: Vec<_> = more.iter().map(ToString::to_string).collect();
                let _ =
                    write!(lines, " (also in {} {})", plural(more.len(), "line", "lines"), list.join(", "));
            }
            more => {
                let _ = write!(lines, " (also in {} more lines)", more.len());
            }
        }
        let Self { line, says, why, instead, .. } = self;
        escape(&format!("{file}:{line}: {says}{lines}: {why}; {instead}")).into_owned()
    }
}

fn plural<'t>(count: usize, one: &'t str, many: &'t str) -> &'t str {
    if count == 1 { one } else { many }
}

impl Imported {
    /// Number of notes, as text.
    pub fn summary(&self) -> String {
        let (services, notes) = (self.desired.services.len(), self.notes.len());
        let backends: usize = self.desired.services.values().map(|s| s.backends.len()).sum();
        let lost = match notes {
            0 => "everything was kept".to_owned(),
            n => format!("{n} {} of what could not be kept", plural(n, "note", "notes")),
        };
        format!(
            "{services} {}, {backends} {}; {lost}",
            plural(services, "service", "services"),
            plural(backends, "backend", "backends")
        )
    }

    /// The configuration file: the notes as comments, then the services.
    pub fn to_toml(&self, origin: Origin, file: &str) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "# Imported from {} ({}): {}", origin.name(), escape(file), self.summary());
        for note in &self.notes {
            let _ = writeln!(out, "#   {}", note.line_of(file));
        }
        let services = export(&self.desired);
        if !services.is_empty() {
            let _ = write!(out, "\n{services}");
        }
        out
    }
}
