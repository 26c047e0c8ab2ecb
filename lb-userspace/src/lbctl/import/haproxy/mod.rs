//! haproxy.cfg, as in the configuration manual of HAProxy.

mod bind;
mod check;
mod directives;
mod server;
mod syntax;

use super::{ImportOptions, Notes, Unreadable, assemble::ServiceDraft};
use crate::desired::model::{ForwardingMode, Ports, Scheduler};
use check::CheckSettings;
use std::collections::BTreeSet;
use syntax::{ProxySection, Statement};

/// Reads a text.
pub(super) fn read(
    text: &str,
    options: &ImportOptions,
    notes: &mut Notes,
) -> Result<Vec<ServiceDraft>, Unreadable> {
    let sections = syntax::parse(text, notes)?;
    let mut reader = ProxyReader { options, notes, sections: &sections, used: BTreeSet::new() };
    let mut drafts = Vec::new();
    for section in &sections {
        match section.kind.as_str() {
            "listen" | "frontend" => drafts.extend(reader.front(section)?),
            "backend" | "defaults" => {}
            kind => directives::section(section.line, kind, reader.notes),
        }
    }
    let unused = |s: &&ProxySection| s.kind == "backend" && !reader.used.contains(s.name.as_str());
    for section in sections.iter().filter(unused) {
        reader.notes.add(
            section.line,
            format!("backend {}", section.name),
            "no frontend that could be kept sends all its connections to it",
            "add a [[service]] for it if it needs one",
        );
    }
    Ok(drafts)
}

struct ProxyReader<'r> {
    options: &'r ImportOptions,
    notes: &'r mut Notes,
    sections: &'r [ProxySection],
    used: BTreeSet<&'r str>,
}

impl<'r> ProxyReader<'r> {
    /// All statements of a section, those of its defaults first.
    fn statements(&self, section: &'r ProxySection) -> Vec<&'r Statement> {
        let mut found: Vec<&Statement> = Vec::new();
        let mut chain = vec![section];
        while let Some(defaults) = chain.last().and_then(|s| s.defaults).map(|at| &self.sections[at]) {
            // A section of defaults comes from an earlier one, so the chain ends.
            if chain.len() > self.sections.len() {
                break;
            }
            chain.push(defaults);
        }
        for section in chain.into_iter().rev() {
            found.extend(&section.statements);
        }
        found
    }

    fn front(&mut self, section: &'r ProxySection) -> Result<Vec<ServiceDraft>, Unreadable> {
        let of_front = self.statements(section);
        if section.statements.iter().any(|s| s.word(0) == "disabled") {
            self.notes.add(
                section.line,
                format!("{} {}: disabled", section.kind, section.name),
                "it takes no connections",
                "nothing: it was left out",
            );
            return Ok(Vec::new());
        }
        let Some(behind) = self.behind(section, &of_front) else { return Ok(Vec::new()) };
        let of_back = if section.kind == "listen" { of_front.clone() } else { self.statements(behind) };
        if !of_back.iter().any(|s| s.word(0).starts_with("server")) {
            let why = if of_back.iter().any(|s| s.word(0) == "stats") {
                "there is no statistics page"
            } else {
                "it has no servers"
            };
            self.notes.add(
                section.line,
                format!("{} {}", section.kind, section.name),
                why,
                "lbctl status, lbctl stats, and metrics",
            );
            return Ok(Vec::new());
        }
        let mut own: Vec<&Statement> = section.statements.iter().collect();
        if behind.line != section.line {
            own.extend(&behind.statements);
        }
        let mode = |all: &[&Statement]| {
            all.iter()
                .rev()
                .find(|s| s.word(0) == "mode")
                .map_or("tcp", |s| if s.word(1) == "http" { "http" } else { "tcp" })
        };
        let is_http = mode(&of_front) == "http" || mode(&of_back) == "http";
        let mut all = of_front.clone();
        if section.kind != "listen" {
            all.extend(&of_back);
        }
        if directives::layer_7(section, is_http, &own, &all, self.notes) {
            return Ok(Vec::new());
        }
        directives::others(&all, self.notes);
        self.services(section, &of_front, &of_back)
    }

    /// The section that has the servers: the one that gets all connections.
    fn behind(&mut self, section: &'r ProxySection, all: &[&'r Statement]) -> Option<&'r ProxySection> {
        let conditional = |s: &&&Statement| s.word(0) == "use_backend" && s.words.len() > 2;
        for statement in all.iter().filter(conditional) {
            self.notes.add(
                statement.line,
                format!("use_backend {} {}", statement.word(1), statement.rest(2)),
                "a packet is placed by its address and port; conditions are not evaluated",
                "a VIP or port for each backend, or HAProxy behind this balancer, as workers",
            );
        }
        if section.kind == "listen" {
            return Some(section);
        }
        let always = |s: &&&Statement| s.word(0) == "use_backend" && s.words.len() == 2;
        let chosen =
            all.iter().find(always).or_else(|| all.iter().rev().find(|s| s.word(0) == "default_backend"));
        let Some(chosen) = chosen else {
            let has = |word: &str| section.statements.iter().any(|s| s.word(0) == word);
            let (why, instead) = if has("stats") || has("monitor-uri") {
                ("there is no statistics page", "lbctl status, lbctl stats, and metrics")
            } else {
                ("it has no default_backend", "give it one; it was left out")
            };
            self.notes.add(section.line, format!("frontend {}", section.name), why, instead);
            return None;
        };
        let name = chosen.word(1);
        let found =
            self.sections.iter().find(|s| ["backend", "listen"].contains(&s.kind.as_str()) && s.name == name);
        match found {
            Some(found) => {
                self.used.insert(&found.name);
                Some(found)
            }
            None => {
                self.notes.add(
                    chosen.line,
                    format!("{} {name}", chosen.word(0)),
                    "the text has no backend of this name",
                    "import a file that contains both",
                );
                None
            }
        }
    }

    fn services(
        &mut self,
        section: &ProxySection,
        of_front: &[&Statement],
        of_back: &[&Statement],
    ) -> Result<Vec<ServiceDraft>, Unreadable> {
        let mut places = Vec::new();
        for statement in section.statements.iter().filter(|s| s.word(0) == "bind") {
            places.extend(bind::places(statement, self.options, self.notes)?);
        }
        if places.is_empty() {
            if !of_front.iter().any(|s| s.word(0) == "bind") {
                self.notes.add(
                    section.line,
                    format!("{} {}", section.kind, section.name),
                    "it has no bind line",
                    "add one; it was left out",
                );
            }
            return Ok(Vec::new());
        }
        let mut defaults = Vec::new();
        for statement in of_back.iter().filter(|s| s.word(0) == "default-server") {
            defaults.extend(server::options(&statement.words[1..]));
        }
        let mut drafts = Vec::new();
        let is_one = places.len() == 1;
        for place in places {
            let suffix = if is_one { String::new() } else { format!("-{}-{}", place.vip, place.ports) };
            let name = Some(format!("{}{suffix}", section.name));
            let mut draft = ServiceDraft::new(section.line, name, place.vip, place.ports, place.protocol);
            draft.service.scheduler = self.scheduler(of_back);
            let checks = CheckSettings::read(of_back, place.is_tls, self.notes);
            for statement in of_back {
                match statement.word(0) {
                    "server" => server::add(statement, &defaults, &checks, &mut draft, self.notes)?,
                    "server-template" => self.notes.add(
                        statement.line,
                        format!("server-template {}", statement.word(1)),
                        "host names are not looked up",
                        "write a backend for each address, or let a program call the API",
                    ),
                    _ => {}
                }
            }
            // HAProxy changes ports, which only one mode can.
            let has_other_port =
                draft.members.iter().any(|m| m.port.is_some_and(|p| place.ports != Ports::One(p)));
            if has_other_port && matches!(place.ports, Ports::One(_)) {
                draft.service.mode = ForwardingMode::Nat;
            }
            drafts.push(draft);
        }
        Ok(drafts)
    }

    fn scheduler(&mut self, all: &[&Statement]) -> Scheduler {
        let last = |keyword: &str| all.iter().rev().find(|s| s.word(0) == keyword);
        let stick = all.iter().rev().find(|s| s.word(0) == "stick" && ["on", "match"].contains(&s.word(1)));
        if let Some(statement) = stick {
            let is_source = statement.word(2) == "src";
            let why = if is_source {
                "clients are not remembered for a time"
            } else {
                "what a packet contains is not remembered"
            };
            self.notes.add(
                statement.line,
                format!("stick on {}", statement.word(2)),
                why,
                "source-hash is used: a client stays with its backend while the backends stay the same",
            );
            return Scheduler::SourceHash;
        }
        if let Some(statement) = last("hash-balance-factor").filter(|s| s.word(1) != "0") {
            self.notes.add(
                statement.line,
                "hash-balance-factor",
                "the bound is in flows, not in percent",
                "load_cap with scheduler source-hash",
            );
        }
        let Some(statement) = last("balance") else { return Scheduler::Wrr };
        let (name, arguments) = statement.word(1).split_once('(').unwrap_or((statement.word(1), ""));
        let is_source_hash = name == "hash" && statement.word(2) == "src";
        match name {
            "roundrobin" | "static-rr" => Scheduler::Wrr,
            "leastconn" => Scheduler::Lc,
            "source" => Scheduler::SourceHash,
            "hash" if is_source_hash => Scheduler::SourceHash,
            "random" if arguments.trim_end_matches(')') == "1" => Scheduler::Random,
            "random" => Scheduler::P2c,
            "first" => {
                self.notes.add(
                    statement.line,
                    "balance first",
                    "filling one server before the next has no counterpart",
                    "maglev is used",
                );
                Scheduler::Maglev
            }
            _ => {
                self.notes.add(
                    statement.line,
                    format!("balance {}", statement.word(1)),
                    "requests are not read",
                    "maglev is used; source-hash keeps a client by its address",
                );
                Scheduler::Maglev
            }
        }
    }
}
