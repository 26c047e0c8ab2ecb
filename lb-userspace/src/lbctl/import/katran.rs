//! Commands of Katran's example clients (katran_goclient), and the output of their `-l`.

use super::{
    Notes, Unreadable,
    assemble::{MemberDraft, ServiceDraft},
    ipvs::split_address,
    script::{self, Program, ShellWord},
};
use crate::desired::model::{Ports, Protocol, Scheduler};
use std::net::IpAddr;

const PROGRAM: Program = Program {
    names: &["katran_goclient", "katran_client", "katran_simple_client", "katranc", "goclient", "main"],
    bare_options: false,
};

/// Options and whether a value follows.
const OPTIONS: [(&str, bool); 33] = [
    ("A", false),
    ("E", false),
    ("D", false),
    ("a", false),
    ("e", false),
    ("d", false),
    ("C", false),
    ("l", false),
    ("s", false),
    ("sum", false),
    ("lru", false),
    ("icmp", false),
    ("unset", false),
    ("del_hc", false),
    ("list_hc", false),
    ("list_mac", false),
    ("list_qm", false),
    ("del_qm", false),
    ("q", false),
    ("t", true),
    ("u", true),
    ("r", true),
    ("w", true),
    ("f", true),
    ("rf", true),
    ("new_hc", true),
    ("somark", true),
    ("change_mac", true),
    ("quic_mapping", true),
    ("rpc_port", true),
    ("katran_server", true),
    ("server", true),
    ("help", false),
];

/// One command.
#[derive(Default)]
struct KatranCommand {
    line: usize,
    flags: Vec<&'static str>,
    values: Vec<(&'static str, ShellWord)>,
}

impl KatranCommand {
    fn has(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }

    fn value(&self, option: &str) -> Option<&ShellWord> {
        self.values.iter().rev().find(|(name, _)| *name == option).map(|(_, word)| word)
    }
}

/// Reads a text.
pub(super) fn read(text: &str, notes: &mut Notes) -> Result<Vec<ServiceDraft>, Unreadable> {
    if text.lines().any(|line| listed_vip(line).is_some()) {
        return listing(text, notes);
    }
    let found = script::commands(text, &PROGRAM, notes)?;
    if found.is_empty() && !text.trim().is_empty() {
        return Err(Unreadable::new(
            (1, 1),
            "the text has no command of katran_goclient, and no line that begins with VIP:",
            "a script of katran_goclient commands, or the output of its -l",
        ));
    }
    let mut services = Vec::new();
    for words in found {
        follow(&parse(&words)?, &mut services, notes)?;
    }
    Ok(services.into_iter().map(|(_, draft)| draft).collect())
}

fn parse(words: &[ShellWord]) -> Result<KatranCommand, Unreadable> {
    let mut command = KatranCommand { line: words.first().map_or(1, |w| w.at.0), ..KatranCommand::default() };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let name = word.text.trim_start_matches('-');
        let (name, attached) = name.split_once('=').map_or((name, None), |(n, v)| (n, Some(v)));
        let known = OPTIONS.iter().find(|(known, _)| *known == name && word.text.starts_with('-'));
        match known {
            Some((known, true)) => {
                let value = match attached {
                    Some(text) => Some(ShellWord { text: text.to_owned(), ..word.clone() }),
                    None => words.next().cloned(),
                };
                let Some(value) = value else {
                    return Err(Unreadable::new(
                        word.at,
                        format!("option {} ends the command", word.text),
                        "a value",
                    ));
                };
                command.values.push((known, value));
            }
            Some((known, false)) => command.flags.push(known),
            None if word.is_unknown => {}
            None => {
                return Err(Unreadable::new(
                    word.at,
                    format!("{:?} is not an option of katran_goclient", word.text),
                    "an option such as -A, -a, -t, -r (see katran_goclient --help)",
                ));
            }
        }
    }
    Ok(command)
}

type KatranServices = Vec<(String, ServiceDraft)>;

fn follow(
    command: &KatranCommand,
    services: &mut KatranServices,
    notes: &mut Notes,
) -> Result<(), Unreadable> {
    let line = command.line;
    if command.has("C") {
        services.clear();
        return Ok(());
    }
    for (option, says) in [
        ("new_hc", "-new_hc (health check)"),
        ("quic_mapping", "-quic_mapping"),
        ("change_mac", "-change_mac"),
    ] {
        if command.value(option).is_none() {
            continue;
        }
        let (why, instead) = match option {
            "new_hc" => ("health checks are settings of a service", "set [service.health] of the service"),
            "change_mac" => ("next hops come from the host's routes and neighbours", "nothing"),
            _ => (
                "connection ids follow QUIC-LB",
                "give each backend its server_id, and the service a quic config",
            ),
        };
        notes.add(line, says, why, instead);
        return Ok(());
    }
    let Some((protocol, word)) = [("t", Protocol::Tcp), ("u", Protocol::Udp)]
        .into_iter()
        .find_map(|(option, protocol)| Some((protocol, command.value(option)?)))
    else {
        return Ok(());
    };
    let key = format!("{protocol} {}", word.text);
    let at = services.iter().position(|(other, _)| *other == key);
    if command.has("D") {
        services.retain(|(other, _)| *other != key);
        return Ok(());
    }
    if let (Some(at), true) = (at, command.has("E")) {
        let names = command.value("f").map_or("", |w| w.text.as_str());
        flags(names, command.has("unset"), &mut services[at].1, line, notes);
        return Ok(());
    }
    if command.has("A") && at.is_none() {
        let Some((vip, port)) = place(word, notes)? else { return Ok(()) };
        let ports = if port == 0 { Ports::Any } else { Ports::One(port) };
        let mut draft = ServiceDraft::new(line, None, vip, ports, protocol);
        flags(command.value("f").map_or("", |w| w.text.as_str()), false, &mut draft, line, notes);
        if command.value("r").is_some() {
            notes.add(
                line,
                "-r beside -A",
                "katran_goclient ignores it: -A adds a service only",
                "add the real with -a",
            );
        }
        services.push((key, draft));
        return Ok(());
    }
    let Some(real) = command.value("r") else { return Ok(()) };
    let Some(at) = at else {
        let says = format!("a real of {}, which is not added before it", word.text);
        notes.add(line, says, "Katran refuses it, too", "add the service with -A first");
        return Ok(());
    };
    let Some((address, port)) = place(real, notes)? else { return Ok(()) };
    let draft = &mut services[at].1;
    draft.members.retain(|m| m.address != address);
    if command.has("d") {
        return Ok(());
    }
    let weight = match command.value("w").map(|w| (w, w.text.parse())) {
        None => 1,
        Some((_, Ok(weight))) => weight,
        Some((w, Err(_))) if w.is_unknown => 1,
        Some((w, Err(_))) => return Err(Unreadable::new(w.at, format!("weight {:?}", w.text), "a number")),
    };
    let port = Some(port).filter(|port| *port != 0);
    draft.members.push(MemberDraft { weight, ..MemberDraft::new(line, address, port) });
    Ok(())
}

/// Address and port of a word; none if only a run gives them.
fn place(word: &ShellWord, notes: &mut Notes) -> Result<Option<(IpAddr, u16)>, Unreadable> {
    if word.is_unknown {
        notes.add(
            word.at.0,
            word.text.clone(),
            "the value of a variable is known only when the script runs",
            "run the script, and import the output of `katran_goclient -l`",
        );
        return Ok(None);
    }
    let found = split_address(&word.text)
        .and_then(|(host, port)| Some((host.parse().ok()?, port.map_or(Some(0), |p| p.parse().ok())?)));
    match found {
        Some(found) => Ok(Some(found)),
        None => Err(Unreadable::new(
            word.at,
            format!("{:?} is not an address", word.text),
            "ADDRESS:PORT, or [ADDRESS]:PORT for IPv6",
        )),
    }
}

/// Applies flags of a VIP.
fn flags(names: &str, is_unset: bool, draft: &mut ServiceDraft, line: usize, notes: &mut Notes) {
    for name in names.split([' ', ',', '|']).filter(|name| !name.is_empty()) {
        match name {
            "NO_SPORT" if is_unset => draft.service.scheduler = Scheduler::Maglev,
            "NO_SPORT" => draft.service.scheduler = Scheduler::SourceHash,
            "NO_LRU" if draft.service.protocol == Protocol::Udp => draft.service.udp_stateless = !is_unset,
            // TCP flows need entries only while a change is in progress.
            "NO_LRU" => {}
            "QUIC_VIP" => notes.add(
                line,
                "flag QUIC_VIP",
                "Katran's connection ids have a form of their own; here they follow QUIC-LB",
                "let the workers issue QUIC-LB ids, then set quic of the service and server_id of each backend",
            ),
            "DPORT_HASH" => notes.add(line, "flag DPORT_HASH", "flows are not placed by the destination port alone", "maglev hashes addresses and ports"),
            "SRC_ROUTING" => notes.add(line, "flag SRC_ROUTING", "the client's address does not select a worker", "regions"),
            "LOCAL_VIP" => notes.add(line, "flag LOCAL_VIP", "a VIP is not bound to backends on this host", "mode local hands packets to this host's stack"),
            other => notes.add(line, format!("flag {other}"), "it has no counterpart", "nothing"),
        }
    }
}

/// A line `VIP: ADDRESS Port: PORT Protocol: PROTOCOL` of a listing; C++ clients put a comma after the port.
fn listed_vip(line: &str) -> Option<(&str, &str, &str)> {
    let (_, rest) = line.split_once("VIP:")?;
    let (vip, rest) = rest.split_once("Port:")?;
    let (port, protocol) = rest.split_once("Protocol:")?;
    Some((vip.trim(), port.trim().trim_end_matches(','), protocol.trim()))
}

fn listing(text: &str, notes: &mut Notes) -> Result<Vec<ServiceDraft>, Unreadable> {
    let mut drafts: Vec<ServiceDraft> = Vec::new();
    for (line, content) in text.lines().enumerate().map(|(i, l)| (i + 1, l)) {
        let wrong = |what: &str, expected: &str| {
            let column = content.find(what).map_or(1, |at| content[..at].chars().count() + 1);
            Unreadable::new((line, column), format!("{what:?} cannot be read"), expected)
        };
        if let Some((vip, port, protocol)) = listed_vip(content) {
            let vip = vip.parse().map_err(|_| wrong(vip, "the address of a VIP"))?;
            let port: u16 = port.parse().map_err(|_| wrong(port, "a port"))?;
            let protocol = protocol.parse().map_err(|_| wrong(protocol, "tcp or udp"))?;
            let ports = if port == 0 { Ports::Any } else { Ports::One(port) };
            drafts.push(ServiceDraft::new(line, None, vip, ports, protocol));
        } else if let Some((_, names)) = content.split_once("Vip's flags:")
            && let Some(draft) = drafts.last_mut()
        {
            flags(names, false, draft, line, notes);
        } else if let Some((_, real)) = content.split_once("->")
            && let Some(draft) = drafts.last_mut()
        {
            let mut words = real.split_whitespace();
            let address = words.next().unwrap_or("");
            let parsed = address.parse().map_err(|_| wrong(address, "the address of a real"))?;
            let mut member = MemberDraft::new(line, parsed, None);
            let rest: Vec<&str> = words.collect();
            if let Some(at) = rest.iter().position(|word| word.starts_with("weight")) {
                let weight = rest.get(at + 1).copied().unwrap_or("");
                member.weight = weight.parse().map_err(|_| wrong(weight, "a weight"))?;
            }
            if rest.contains(&"LOCAL_REAL") {
                notes.add(line, "flag LOCAL_REAL", "it has no counterpart", "nothing");
            }
            draft.members.push(member);
        }
    }
    Ok(drafts)
}
