//! keepalived.conf(5).

mod checker;
mod syntax;

use super::{
    ImportOptions, Notes, Unreadable,
    assemble::{MemberDraft, ServiceDraft},
    ipvs,
};
use crate::desired::model::{ForwardingMode, Ports, Protocol, Scheduler};
use std::{collections::HashMap, net::IpAddr};
use syntax::Node;

/// Addresses that one range may have.
const MOST_OF_A_RANGE: u32 = 256;

/// Blocks and statements outside of virtual servers: how their keyword begins, why they are not kept, and what to use.
const ELSEWHERE: [(&str, &str, &str); 10] = [
    (
        "vrrp",
        "several hosts are active at once instead of one master",
        "announce the VIP by BGP (see docs/operate/announce.md), or let keepalived run beside lbd for this block alone",
    ),
    ("global_defs", "these are settings of keepalived itself", "settings of lbd are in [lbd]"),
    ("static_", "addresses and routes of the host are not managed", "the host's network configuration"),
    ("bfd_instance", "BFD is the routing daemon's", "BFD in the routing daemon"),
    ("track_", "nothing is tracked for VRRP", "lbctl status and metrics"),
    (
        "SSL",
        "checks have their TLS settings in the service",
        "ca, client_cert and client_key of [service.health]",
    ),
    (
        "net_namespace",
        "lbd runs in the namespace that starts it",
        "ip netns exec, or a unit's NetworkNamespacePath",
    ),
    ("linkbeat", "interfaces are followed through netlink", "nothing"),
    ("garp_group", "this belongs to VRRP", "nothing"),
    ("interface_up_down_delays", "this belongs to VRRP", "nothing"),
];

/// Settings of virtual and real servers that have no counterpart: keyword, why, and what to use.
const NO_COUNTERPART: [(&str, &str, &str); 25] = [
    (
        "sorry_server",
        "there is no server of last resort",
        "when_all_down = \"reset\" answers clients at once",
    ),
    ("sorry_server_inhibit", "there is no server of last resort", "nothing"),
    ("sorry_server_lvs_method", "there is no server of last resort", "nothing"),
    (
        "hysteresis",
        "there is no quorum",
        "panic_percent has the opposite aim: all backends serve when too few are healthy",
    ),
    ("quorum_up", "no scripts are run", "alert on metrics"),
    ("quorum_down", "no scripts are run", "alert on metrics"),
    ("notify_up", "no scripts are run", "alert on metrics"),
    ("notify_down", "no scripts are run", "alert on metrics"),
    ("smtp_alert", "no mail is sent", "alert on metrics"),
    ("no_smtp_alert", "no mail is sent", "nothing"),
    ("snmp_name", "there is no SNMP", "metrics"),
    (
        "alpha",
        "the state before the first check is not a setting",
        "nothing: new backends are checked at once",
    ),
    ("omega", "no scripts are run when the daemon stops", "announce_on_stop says what happens to VIPs"),
    ("ha_suspend", "checks do not depend on who has the VIP", "nothing: every host checks"),
    (
        "uthreshold",
        "the number of connections of one server is not limited",
        "load_cap with source-hash, or new_flow_rate for the service",
    ),
    (
        "lthreshold",
        "the number of connections of one server is not limited",
        "load_cap with source-hash, or new_flow_rate for the service",
    ),
    (
        "persistence_engine",
        "persistence by the contents of packets has no counterpart",
        "source-hash keeps a client by its address",
    ),
    ("retry", "the number of retries belongs to each check", "fall of [service.health]"),
    ("warmup", "the first checks are spread by jitter", "jitter_percent of [service.health]"),
    ("delay_before_retry", "retries come at the interval of the check", "interval_ms of [service.health]"),
    ("connect_timeout", "the timeout belongs to each check", "timeout_ms of [service.health]"),
    ("smtp_alert_checker", "no mail is sent", "alert on metrics"),
    ("quorum_max", "there is no quorum", "nothing"),
    ("notify", "no scripts are run", "alert on metrics"),
    ("log_all_failures", "each change of health is logged", "nothing"),
];

/// Reads a text.
pub(super) fn read(
    text: &str,
    options: &ImportOptions,
    notes: &mut Notes,
) -> Result<Vec<ServiceDraft>, Unreadable> {
    let nodes = syntax::parse(text, notes)?;
    let mut groups: HashMap<&str, &Node> = HashMap::new();
    for node in nodes.iter().filter(|n| n.keyword() == "virtual_server_group") {
        groups.insert(node.word(1), node);
    }
    let mut drafts = Vec::new();
    for node in &nodes {
        match node.keyword() {
            "virtual_server" => {
                let mut reader = VirtualServerReader { options, notes, groups: &groups };
                drafts.extend(reader.server(node)?);
            }
            "virtual_server_group" => {}
            keyword => elsewhere(node, keyword, notes)?,
        }
    }
    Ok(drafts)
}

fn elsewhere(node: &Node, keyword: &str, notes: &mut Notes) -> Result<(), Unreadable> {
    let known = ELSEWHERE.iter().find(|(start, ..)| keyword.starts_with(start));
    match known {
        Some((_, why, instead)) => notes.add(node.line, keyword, *why, *instead),
        None if keyword == "real_server" => {
            return Err(Unreadable::new(
                (node.line, node.column),
                "real_server outside of a virtual_server",
                "a virtual_server block around it; perhaps a } is too many",
            ));
        }
        None => notes.add(node.line, keyword, "the keyword is not known", "check what it does"),
    }
    Ok(())
}

struct VirtualServerReader<'r> {
    options: &'r ImportOptions,
    notes: &'r mut Notes,
    groups: &'r HashMap<&'r str, &'r Node>,
}

/// A place that a virtual server takes: its VIP and ports, and its name if it is not that of the address.
type Taken = (IpAddr, Ports, Option<String>);

impl VirtualServerReader<'_> {
    fn server(&mut self, node: &Node) -> Result<Vec<ServiceDraft>, Unreadable> {
        let places = self.places(node)?;
        let protocol = match node.child("protocol").map(|n| (n, n.word(1).to_uppercase())) {
            None => Protocol::Tcp,
            Some((_, word)) if word == "TCP" => Protocol::Tcp,
            Some((_, word)) if word == "UDP" => Protocol::Udp,
            Some((child, word)) => {
                self.notes.add(
                    child.line,
                    format!("protocol {word}"),
                    "only TCP and UDP are balanced",
                    "the virtual server was left out; keep IPVS for it",
                );
                return Ok(Vec::new());
            }
        };
        let mut drafts = Vec::new();
        for (vip, ports, name) in places {
            let mut draft = ServiceDraft::new(node.line, name, vip, ports, protocol);
            self.settings(&mut draft, node);
            self.members(&mut draft, node)?;
            let algorithm = algorithm(node).map_or("", |n| n.word(1));
            ipvs::plain_least_connection(&mut draft, algorithm);
            drafts.push(draft);
        }
        Ok(drafts)
    }

    /// What a virtual server listens on.
    fn places(&mut self, node: &Node) -> Result<Vec<Taken>, Unreadable> {
        match node.word(1) {
            "group" => {
                let Some(group) = self.groups.get(node.word(2)).copied() else {
                    self.notes.add(
                        node.line,
                        format!("virtual_server group {}", node.word(2)),
                        "the text has no virtual_server_group of this name",
                        "import a file that contains both",
                    );
                    return Ok(Vec::new());
                };
                let mut places = Vec::new();
                for child in &group.children {
                    let found = if child.keyword() == "fwmark" {
                        self.marked(child.line, child.word(1))
                    } else {
                        self.addresses(child, 0)?
                    };
                    places.extend(found.into_iter().map(|(vip, ports, name)| {
                        let name = name.unwrap_or_else(|| format!("{}-{vip}-{ports}", node.word(2)));
                        (vip, ports, Some(name))
                    }));
                }
                Ok(places)
            }
            "fwmark" => Ok(self.marked(node.line, node.word(2))),
            _ => self.addresses(node, 1),
        }
    }

    fn marked(&mut self, line: usize, mark: &str) -> Vec<Taken> {
        let why =
            "the firewall rules that set the mark say which addresses, ports and protocols the service has";
        let says = format!("fwmark {mark}");
        match self.options.vip {
            Some(vip) => {
                self.notes.add(
                    line,
                    says,
                    why,
                    format!("all ports of {vip} are used; change them to those of the rules"),
                );
                vec![(vip, Ports::Any, Some(format!("fwmark-{mark}")))]
            }
            None => {
                self.notes.add(
                    line,
                    says,
                    why,
                    "import with --vip ADDRESS, or write a service for each address",
                );
                Vec::new()
            }
        }
    }

    /// Addresses and ports from the word at `first` on: `ADDRESS[-LAST] [PORT[-LAST]]`.
    fn addresses(&mut self, node: &Node, first: usize) -> Result<Vec<Taken>, Unreadable> {
        let (text, port) = (node.word(first), node.word(first + 1));
        let wrong = |what: &str, expected: &str| {
            Err(Unreadable::new((node.line, node.column), format!("{what:?} cannot be read"), expected))
        };
        if text.contains('$') || port.contains('$') {
            self.notes.add(
                node.line,
                node.words.join(" "),
                "the definition of the variable is not in the text",
                "import the file that defines it together with this one",
            );
            return Ok(Vec::new());
        }
        let ports = match port {
            "" | "0" => Ports::Any,
            port => match port.parse() {
                Ok(ports) => ports,
                Err(_) if port.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                    self.notes.add(
                        node.line,
                        format!("port {port}"),
                        "the names of ports are not looked up",
                        "write the number of the port",
                    );
                    return Ok(Vec::new());
                }
                Err(_) => return wrong(port, "a port, or FIRST-LAST"),
            },
        };
        let addresses = match text.split_once('-') {
            None => text.parse().ok().map(|address| vec![address]),
            Some((low, high)) => range(low, high),
        };
        match addresses {
            Some(addresses) => Ok(addresses.into_iter().map(|vip| (vip, ports, None)).collect()),
            None if text.starts_with(|c: char| c.is_ascii_alphabetic()) && !text.contains(':') => {
                self.notes.add(node.line, text, "host names are not looked up", "write the address");
                Ok(Vec::new())
            }
            None => wrong(text, "an IP address and a port, group NAME, or fwmark NUMBER"),
        }
    }

    fn settings(&mut self, draft: &mut ServiceDraft, node: &Node) {
        draft.service.mode = ForwardingMode::Nat;
        if let Some(child) = algorithm(node) {
            let name = child.word(1);
            let mut flags = child.words[1..].join(",");
            for extra in ["sh-port", "mh-port"] {
                if node.child(extra).is_some() {
                    flags.push_str(&format!(",{extra}"));
                }
            }
            draft.service.scheduler = match ipvs::scheduler(name, &flags) {
                Some((scheduler, None)) => scheduler,
                Some((scheduler, Some((why, instead)))) => {
                    self.notes.add(child.line, format!("lb_algo {name}"), why, instead);
                    scheduler
                }
                None => {
                    self.notes.add(
                        child.line,
                        format!("lb_algo {name}"),
                        "it is not a scheduler that is known",
                        "maglev is used",
                    );
                    Scheduler::Maglev
                }
            };
        } else {
            draft.service.scheduler = Scheduler::Lc;
        }
        if let Some(child) = node.child("lb_kind").or_else(|| node.child("lvs_method")) {
            draft.service.mode = self.kind(child, draft);
        }
        if let Some(child) = node.child("persistence_timeout").filter(|n| n.word(1) != "0") {
            let mask = node.child("persistence_granularity").map(|n| n.word(1));
            let time = Some(child.word(1)).filter(|w| !w.is_empty()).unwrap_or("360");
            ipvs::persistence(self.notes, draft, child.line, time, mask);
        }
        if let Some(child) =
            node.child("ops").or_else(|| algorithm(node).filter(|n| n.words.iter().any(|w| w == "ops")))
        {
            ipvs::one_packet(self.notes, draft, child.line);
        }
        if let Some(child) = node.child("quorum").filter(|n| n.word(1) != "1") {
            self.notes.add(
                child.line,
                format!("quorum {}", child.word(1)),
                "there is no quorum",
                "panic_percent has the opposite aim: all backends serve when too few are healthy",
            );
        }
        self.without_counterpart(node, checker::of_server);
    }

    fn kind(&mut self, node: &Node, draft: &mut ServiceDraft) -> ForwardingMode {
        let tunnel = node.words.iter().position(|w| w == "type").map_or("", |at| node.word(at + 1));
        match (node.word(1).to_uppercase().as_str(), tunnel) {
            ("NAT", _) => ForwardingMode::Nat,
            ("DR", _) => ForwardingMode::L2,
            ("TUN", "gue") => {
                let port =
                    node.words.iter().position(|w| w == "port").and_then(|at| node.word(at + 1).parse().ok());
                draft.service.gue_port = port.unwrap_or(draft.service.gue_port);
                ForwardingMode::Gue
            }
            ("TUN", "gre") => {
                self.notes.add(
                    node.line,
                    "lb_kind TUN type gre",
                    "GRE is not a forwarding mode",
                    "ipip is used; change the tunnel on the workers, or run lbd worker there",
                );
                ForwardingMode::Ipip
            }
            ("TUN", _) => ForwardingMode::Ipip,
            (other, _) => {
                self.notes.add(
                    node.line,
                    format!("lb_kind {other}"),
                    "it is not a forwarding method of keepalived",
                    "mode nat is used",
                );
                ForwardingMode::Nat
            }
        }
    }

    /// Notes settings that have no counterpart, and those that are not known.
    fn without_counterpart(&mut self, node: &Node, is_known: fn(&str) -> bool) {
        for child in &node.children {
            let keyword = child.keyword();
            if is_known(keyword) {
                continue;
            }
            match NO_COUNTERPART.iter().find(|(known, ..)| *known == keyword) {
                Some((_, why, instead)) => self.notes.add(child.line, keyword, *why, *instead),
                None => self.notes.add(child.line, keyword, "the keyword is not known", "check what it does"),
            }
        }
    }

    fn members(&mut self, draft: &mut ServiceDraft, node: &Node) -> Result<(), Unreadable> {
        for real in node.children.iter().filter(|n| n.keyword() == "real_server") {
            let (text, port) = (real.word(1), real.word(2));
            let Ok(address) = text.parse::<IpAddr>() else {
                let is_name = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '$');
                if is_name {
                    self.notes.add(
                        real.line,
                        format!("real_server {text}"),
                        "names and variables are not looked up",
                        "write the address",
                    );
                    continue;
                }
                let what = format!("{text:?} is not an address");
                return Err(Unreadable::new((real.line, real.column), what, "real_server ADDRESS PORT {"));
            };
            let port = match port {
                "" | "0" => None,
                port => match port.parse::<u16>() {
                    Ok(port) => Some(port),
                    Err(_) => {
                        self.notes.add(
                            real.line,
                            format!("port {port}"),
                            "the names of ports are not looked up",
                            "write the number of the port",
                        );
                        continue;
                    }
                },
            };
            let mut member = MemberDraft::new(real.line, address, port);
            if let Some(child) = real.child("weight") {
                match child.word(1).parse() {
                    Ok(weight) => member.weight = weight,
                    Err(_) => self.notes.add(
                        child.line,
                        format!("weight {}", child.word(1)),
                        "it is not a number",
                        "weight 1 is used",
                    ),
                }
            }
            if let Some(child) = real.child("lvs_method").or_else(|| real.child("lb_kind")) {
                let mode = self.kind(child, draft);
                if mode != draft.service.mode {
                    self.notes.add(
                        child.line,
                        format!("lvs_method {}", child.word(1)),
                        "a service has one mode for all its backends",
                        "the mode of the virtual server is used",
                    );
                }
            }
            member.health = checker::health(node, real, port, draft, self.notes);
            self.without_counterpart(real, checker::of_real);
            draft.members.push(member);
        }
        Ok(())
    }
}

fn algorithm(node: &Node) -> Option<&Node> {
    node.child("lb_algo").or_else(|| node.child("lvs_sched"))
}

/// Addresses of `10.0.0.1-5`: the last part of the address counts, decimal in IPv4 and hexadecimal in IPv6.
fn range(low: &str, high: &str) -> Option<Vec<IpAddr>> {
    let first: IpAddr = low.parse().ok()?;
    match first {
        IpAddr::V4(v4) => {
            let from = v4.octets();
            let last = match high.parse::<std::net::Ipv4Addr>() {
                Ok(whole) if whole.octets()[..3] == from[..3] => whole.octets()[3],
                Ok(_) => return None,
                Err(_) => high.parse().ok()?,
            };
            (from[3] <= last)
                .then(|| (from[3]..=last).map(|d| IpAddr::from([from[0], from[1], from[2], d])).collect())
        }
        IpAddr::V6(v6) => {
            let from = v6.segments();
            let last = u16::from_str_radix(high, 16).ok()?;
            let count = u32::from(last).checked_sub(u32::from(from[7]))?;
            (count < MOST_OF_A_RANGE).then(|| {
                (from[7]..=last)
                    .map(|d| {
                        let mut segments = from;
                        segments[7] = d;
                        IpAddr::from(segments)
                    })
                    .collect()
            })
        }
    }
}
