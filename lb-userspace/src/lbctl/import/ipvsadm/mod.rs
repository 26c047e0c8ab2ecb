//! Commands of ipvsadm(8): the output of `ipvsadm -S -n`, and scripts.

mod command;

use super::{
    ImportOptions, Notes, Unreadable,
    assemble::{MemberDraft, ServiceDraft},
    ipvs::{one_packet, persistence, plain_least_connection, scheduler, split_address},
    script::{self, Program, ShellWord},
};
use crate::desired::model::{ForwardingMode, Ports, Protocol, Scheduler};
use command::{IpvsCommand, parse};
use std::net::IpAddr;

const PROGRAM: Program = Program { names: &["ipvsadm"], bare_options: true };

/// A service of IPVS, and what its real servers say.
struct IpvsService {
    key: String,
    /// None if it could not be kept, which a note has said.
    draft: Option<ServiceDraft>,
    methods: Vec<(usize, ForwardingMode, Option<u16>)>,
    /// Name of the scheduler.
    scheduler: String,
}

struct IpvsReader<'r> {
    options: &'r ImportOptions,
    notes: &'r mut Notes,
    services: Vec<IpvsService>,
    timeouts: Option<(usize, [u32; 3])>,
}

/// Reads a text.
pub(super) fn read(
    text: &str,
    options: &ImportOptions,
    notes: &mut Notes,
) -> Result<Vec<ServiceDraft>, Unreadable> {
    let found = script::commands(text, &PROGRAM, notes)?;
    if found.is_empty() && !text.trim().is_empty() {
        let listing = text.contains("RemoteAddress:Port");
        let what =
            if listing { "this is a listing of `ipvsadm -L`" } else { "the text has no command of ipvsadm" };
        return Err(Unreadable::new(
            (1, 1),
            what,
            "the output of `ipvsadm -S -n`, or a script of ipvsadm commands",
        ));
    }
    let mut reader = IpvsReader { options, notes, services: Vec::new(), timeouts: None };
    for words in found {
        let command = parse(&words)?;
        reader.follow(&command)?;
    }
    Ok(reader.finish())
}

/// Where a service or a server is.
enum AddressOf {
    At(IpAddr, u16),
    /// A name, or a variable whose value only a run gives.
    Unresolved(&'static str, &'static str),
    Wrong,
}

fn address(word: &ShellWord) -> AddressOf {
    if word.is_unknown || word.text.contains('$') {
        return AddressOf::Unresolved(
            "the value of a variable is known only when the script runs",
            "run the script, and import the output of `ipvsadm -S -n`",
        );
    }
    let by_number = "import the output of `ipvsadm -S -n`, which prints numbers";
    match split_address(&word.text) {
        Some((host, port)) => {
            let port = match port.map(str::parse::<u16>) {
                None => 0,
                Some(Ok(port)) => port,
                Some(Err(_)) if port.is_some_and(|p| p.starts_with(|c: char| c.is_ascii_alphabetic())) => {
                    return AddressOf::Unresolved("the names of ports are not looked up", by_number);
                }
                Some(Err(_)) => return AddressOf::Wrong,
            };
            match host.parse() {
                Ok(address) => AddressOf::At(address, port),
                Err(_) if host.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                    AddressOf::Unresolved("host names are not looked up", by_number)
                }
                Err(_) => AddressOf::Wrong,
            }
        }
        None => AddressOf::Wrong,
    }
}

/// Weight of a real server.
fn weight(command: &IpvsCommand) -> Result<u32, Unreadable> {
    let Some(word) = command.value("weight") else { return Ok(1) };
    match word.text.parse() {
        Ok(weight) => Ok(weight),
        Err(_) if word.is_unknown => Ok(1),
        Err(_) => {
            let what = format!("weight {:?}", word.text);
            Err(Unreadable::new(word.at, what, "a number from 0 to 65535"))
        }
    }
}

impl IpvsReader<'_> {
    fn follow(&mut self, command: &IpvsCommand) -> Result<(), Unreadable> {
        if command.has("clear") {
            self.services.clear();
        } else if command.has("add-service") || command.has("edit-service") {
            self.service(command)?;
        } else if command.has("delete-service") {
            let key = command.key().map(|(o, w)| format!("{o} {}", w.text));
            self.services.retain(|s| Some(&s.key) != key.as_ref());
        } else if command.has("add-server") || command.has("edit-server") || command.has("delete-server") {
            self.server(command)?;
        } else if let Some(values) = command.options.get("set") {
            let numbers = values.iter().map(|v| v.text.parse().unwrap_or(0)).collect::<Vec<u32>>();
            self.timeouts = Some((command.line, [numbers[0], numbers[1], numbers[2]]));
        } else if command.has("start-daemon") {
            self.notes.add(
                command.line,
                "--start-daemon (synchronization of connections)",
                "hosts do not synchronize connections: all of them build equal tables",
                "nothing; with mode gue, second chance also finds flows of other hosts",
            );
        }
        Ok(())
    }

    /// Says why an address cannot be used; an error if it cannot be one.
    fn unusable(
        &mut self,
        line: usize,
        option: &str,
        word: &ShellWord,
        found: &AddressOf,
    ) -> Result<(), Unreadable> {
        match found {
            AddressOf::Unresolved(why, instead) => {
                self.notes.add(line, format!("--{option} {}", word.text), *why, *instead);
                Ok(())
            }
            _ => Err(Unreadable::new(
                word.at,
                format!("{:?} is not an address", word.text),
                "ADDRESS:PORT, or [ADDRESS]:PORT for IPv6",
            )),
        }
    }

    fn service(&mut self, command: &IpvsCommand) -> Result<(), Unreadable> {
        let Some((option, word)) = command.key() else {
            return Err(Unreadable::new((command.line, 1), "the command names no service", "-t, -u or -f"));
        };
        let key = format!("{option} {}", word.text);
        let existing = self.services.iter().position(|s| s.key == key);
        if command.has("add-service") && existing.is_some() {
            self.notes.add(
                command.line,
                format!("a second -A for {}", word.text),
                "ipvsadm refuses it, too",
                "the first one is used; -E changes a service",
            );
            return Ok(());
        }
        let mut draft = self.place(command, option, word)?;
        if let Some(draft) = &mut draft {
            self.settings(draft, command)?;
        }
        let scheduler = command.text("scheduler").unwrap_or("wlc").to_owned();
        match existing {
            Some(at) => {
                self.services[at].scheduler = scheduler;
                if let (Some(old), Some(new)) = (&mut self.services[at].draft, draft) {
                    old.service = new.service;
                }
            }
            None => self.services.push(IpvsService { key, draft, methods: Vec::new(), scheduler }),
        }
        Ok(())
    }

    /// A service by its address; none if it cannot be kept.
    fn place(
        &mut self,
        command: &IpvsCommand,
        option: &str,
        word: &ShellWord,
    ) -> Result<Option<ServiceDraft>, Unreadable> {
        let line = command.line;
        let protocol = match option {
            "tcp-service" => Protocol::Tcp,
            "udp-service" => Protocol::Udp,
            "sctp-service" => {
                self.notes.add(
                    line,
                    format!("--sctp-service {}", word.text),
                    "SCTP is not balanced",
                    "keep IPVS for it",
                );
                return Ok(None);
            }
            _ => return Ok(self.marked(line, &word.text)),
        };
        let found = address(word);
        let AddressOf::At(vip, port) = found else {
            self.unusable(line, option, word, &found)?;
            return Ok(None);
        };
        let ports = if port == 0 { Ports::Any } else { Ports::One(port) };
        Ok(Some(ServiceDraft::new(line, None, vip, ports, protocol)))
    }

    fn marked(&mut self, line: usize, mark: &str) -> Option<ServiceDraft> {
        let says = format!("--fwmark-service {mark}");
        let why =
            "the firewall rules that set the mark say which addresses, ports and protocols the service has";
        match self.options.vip {
            Some(vip) => {
                self.notes.add(
                    line,
                    says,
                    why,
                    format!(
                        "all TCP ports of {vip} are used; change port and protocol to those of the rules"
                    ),
                );
                Some(ServiceDraft::new(line, Some(format!("fwmark-{mark}")), vip, Ports::Any, Protocol::Tcp))
            }
            None => {
                self.notes.add(line, says, why, "import with --vip ADDRESS, or write a service for each address; a port range or any covers several ports");
                None
            }
        }
    }

    fn settings(&mut self, draft: &mut ServiceDraft, command: &IpvsCommand) -> Result<(), Unreadable> {
        let line = command.line;
        draft.service.mode = ForwardingMode::L2;
        let name = command.text("scheduler").unwrap_or("wlc");
        let flags = command.text("sched-flags").unwrap_or("");
        draft.service.scheduler = match scheduler(name, flags) {
            Some((scheduler, None)) => scheduler,
            Some((scheduler, Some((why, instead)))) => {
                self.notes.add(line, format!("scheduler {name}"), why, instead);
                scheduler
            }
            None => {
                self.notes.add(
                    line,
                    format!("scheduler {name}"),
                    "it is not a scheduler of IPVS that is known",
                    "maglev is used",
                );
                Scheduler::Maglev
            }
        };
        if let Some(values) = command.options.get("persistent") {
            let time = values.first().map_or("300", |w| w.text.as_str());
            persistence(self.notes, draft, line, time, command.text("netmask"));
        }
        if command.has("ops") {
            one_packet(self.notes, draft, line);
        }
        if let Some(engine) = command.text("pe") {
            self.notes.add(
                line,
                format!("--pe {engine}"),
                "persistence by the contents of packets has no counterpart",
                "source-hash keeps a client by its address",
            );
        }
        Ok(())
    }

    fn server(&mut self, command: &IpvsCommand) -> Result<(), Unreadable> {
        let line = command.line;
        let Some((option, word)) = command.key() else {
            return Err(Unreadable::new((line, 1), "the command names no service", "-t, -u or -f"));
        };
        let Some(real) = command.value("real-server") else {
            return Err(Unreadable::new((line, 1), "the command names no real server", "-r ADDRESS[:PORT]"));
        };
        let key = format!("{option} {}", word.text);
        let Some(at) = self.services.iter().position(|s| s.key == key) else {
            let says = format!("a real server of {}, which is not added before it", word.text);
            self.notes.add(line, says, "ipvsadm refuses it, too", "add the service with -A first");
            return Ok(());
        };
        if self.services[at].draft.is_none() {
            return Ok(());
        }
        let found = address(real);
        let AddressOf::At(address, port) = found else {
            return self.unusable(line, "real-server", real, &found);
        };
        let port = Some(port).filter(|port| *port != 0);
        let weight = weight(command)?;
        let method = self.method(command);
        for threshold in ["u-threshold", "l-threshold"] {
            if command.text(threshold).is_some_and(|t| t != "0") {
                self.notes.add(
                    line,
                    format!("--{threshold}"),
                    "the number of connections of one server is not limited",
                    "load_cap with source-hash, or new_flow_rate for the service",
                );
            }
        }
        let service = &mut self.services[at];
        let Some(draft) = &mut service.draft else { return Ok(()) };
        let own = match draft.service.port {
            Ports::One(port) => Some(port),
            _ => None,
        };
        let same = |m: &MemberDraft| m.address == address && m.port.or(own) == port.or(own);
        let existing = draft.members.iter().position(same);
        let member = MemberDraft { weight, ..MemberDraft::new(line, address, port) };
        match existing {
            Some(i) if command.has("delete-server") => {
                draft.members.remove(i);
                service.methods.remove(i);
            }
            Some(i) if command.has("edit-server") => {
                draft.members[i] = member;
                service.methods[i] = method;
            }
            Some(_) => {
                let says = format!("a second -a for {}", real.text);
                self.notes.add(
                    line,
                    says,
                    "ipvsadm refuses it, too",
                    "the first one is used; -e changes a server",
                );
            }
            None if command.has("add-server") => {
                draft.members.push(member);
                service.methods.push(method);
            }
            None => {}
        }
        Ok(())
    }

    /// How packets are sent to a real server: mode, and port of GUE.
    fn method(&mut self, command: &IpvsCommand) -> (usize, ForwardingMode, Option<u16>) {
        let line = command.line;
        if command.has("masquerading") {
            return (line, ForwardingMode::Nat, None);
        }
        if !command.has("ipip") {
            return (line, ForwardingMode::L2, None);
        }
        match command.text("tun-type") {
            Some("gue") => {
                for flag in ["tun-csum", "tun-remcsum"].into_iter().filter(|flag| command.has(flag)) {
                    self.notes.add(
                        line,
                        format!("--{flag}"),
                        "GUE packets have no checksum option",
                        "nothing: inner packets have their own checksums",
                    );
                }
                (line, ForwardingMode::Gue, command.text("tun-port").and_then(|p| p.parse().ok()))
            }
            Some("gre") => {
                self.notes.add(
                    line,
                    "--tun-type gre",
                    "GRE is not a forwarding mode",
                    "ipip is used; change the tunnel on the workers, or run lbd worker there",
                );
                (line, ForwardingMode::Ipip, None)
            }
            _ => (line, ForwardingMode::Ipip, None),
        }
    }

    fn finish(self) -> Vec<ServiceDraft> {
        let Self { options, notes, services, timeouts } = self;
        let mut drafts = Vec::new();
        for service in services {
            let Some(mut draft) = service.draft else { continue };
            if let Some(&(_, mode, port)) = service.methods.first() {
                draft.service.mode = mode;
                draft.service.gue_port = port.unwrap_or(draft.service.gue_port);
                for (line, ..) in service.methods.iter().filter(|m| (m.1, m.2) != (mode, port)) {
                    if options.mode.is_none() {
                        notes.add(
                            *line,
                            "a real server with another forwarding method",
                            "a service has one mode for all its backends",
                            "the mode of the first server is used; give the others a service of their own",
                        );
                    }
                }
            }
            plain_least_connection(&mut draft, &service.scheduler);
            drafts.push(draft);
        }
        if let Some((line, [tcp, fin, udp])) = timeouts {
            for draft in &mut drafts {
                match draft.service.protocol {
                    Protocol::Tcp if tcp > 0 => draft.service.tcp_timeout_s = tcp.clamp(10, 604_800),
                    Protocol::Udp if udp > 0 => draft.service.udp_timeout_s = udp,
                    _ => {}
                }
            }
            if fin > 0 {
                notes.add(
                    line,
                    format!("--set: {fin} s for closed TCP connections"),
                    "closed connections need no time of their own",
                    "nothing: their entries are removed",
                );
            }
        }
        drafts
    }
}
