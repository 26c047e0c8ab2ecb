//! Why a flow goes to its backend: runs the packet code over the live maps.
//!
//! Input: a [`Reader`], the flow, and the names of services and backends. Output: an [`Explanation`] with
//! each step, for `lbctl explain` and for tests that compare it with where packets really went. Nothing is
//! written: if a lookup would record a flow, the answer only says so.

mod forwarding;
mod live;
mod quic;

pub use forwarding::{Forwarding, from_ip, to_ip};
pub use quic::ConnectionId;

use crate::{
    apply::{dataplane::Reader, reconcile::Published},
    clock,
    desired::model::Protocol,
};
use forwarding::forwarding;
use lb_common::{Backend, Reason, ServiceView, backend, reason::Fate, service::flags};
use lb_ebpf::{
    Tables, forward,
    guard::martian,
    nat,
    packet::parse::{Headers, tcp, words},
    select::{
        choose::{Choice, Why, choose},
        hash::{flow_hash, slot_of},
        others::{others, split},
        scheduler::{is_in_transition, slot_hash},
        service::{Match, lookup_service},
    },
};
use live::MapReader;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// The flow to explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// Client.
    pub source: SocketAddr,
    /// VIP and port.
    pub destination: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// QUIC: connection id that the packet carries as its destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_id: Option<ConnectionId>,
}

/// Names for the dataplane's indices.
pub trait Names {
    /// Name of a service.
    fn service(&self, index: u32) -> Option<String>;
    /// Name of a backend.
    fn backend(&self, index: u32) -> Option<String>;
    /// Entry of the deny and allow lists that matches an address, described in words.
    fn listed(&self, _address: IpAddr) -> Option<String> {
        None
    }
}

impl Names for Published {
    fn service(&self, index: u32) -> Option<String> {
        self.services.values().find(|s| s.index == index).map(|s| s.name.to_string())
    }

    fn backend(&self, index: u32) -> Option<String> {
        let backends = self.services.values().flat_map(|s| &s.backends);
        let found = backends.into_iter().find(|b| b.index == index)?;
        found.name.as_ref().map(ToString::to_string)
    }

    fn listed(&self, address: IpAddr) -> Option<String> {
        let now_s = clock::unix().as_secs();
        let (list, net, _) = self.desired.guard.deciding_entry(address.to_canonical(), now_s)?;
        Some(format!("{} list has {net}", list.label()))
    }
}

/// A backend in an [`Explanation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendView {
    /// Index in the dataplane.
    pub index: u32,
    /// Name, if it still has one.
    pub name: Option<String>,
    /// Address.
    pub address: IpAddr,
    /// `up`, `draining`, `down` or `removed`.
    pub state: String,
}

/// The answer for one kind of packet of the flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// `connection id`, `syn`, `established` or `datagram`.
    pub packet: String,
    /// Chosen backend.
    pub backend: Option<BackendView>,
    /// Why this backend was chosen, or why none was.
    pub why: String,
    /// Whether such a packet would be written to a flow table.
    pub records: bool,
    /// How the packet is forwarded.
    pub forwarding: Option<Forwarding>,
    /// Backends in the packet's second chance header: a worker without the flow sends the packet to the next one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<BackendView>,
}

/// An entry of a flow table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEntry {
    /// Map.
    pub table: String,
    /// Backend of the flow.
    pub backend: String,
    /// Seconds since the flow's last packet.
    pub idle_s: u32,
    /// Whether the client has closed the connection.
    pub closing: bool,
}

/// A NAT binding (mode nat).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Backend.
    pub backend: String,
    /// Translated source address and port of the client's packets.
    pub source: SocketAddr,
    /// Translated destination address and port of the client's packets.
    pub worker: SocketAddr,
    /// Seconds since the last packet in either direction.
    pub idle_s: u32,
}

/// The whole explanation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The flow that was asked about.
    pub query: Query,
    /// Service, if one matches.
    pub service: Option<String>,
    /// `exact`, `range` or `any`.
    pub matched: Option<String>,
    /// Flow hash, in hexadecimal.
    pub hash: Option<String>,
    /// Slot number in the service's table.
    pub slot: Option<u32>,
    /// Slots of the table.
    pub slots: Option<u32>,
    /// Primary of the slot.
    pub primary: Option<BackendView>,
    /// Secondary of the slot.
    pub secondary: Option<BackendView>,
    /// Whether the slot's primary changed within the drain time.
    pub transition: bool,
    /// Whether the slot's flows are looked up in the flow table.
    pub tracked: bool,
    /// The flow's entries in the flow tables.
    pub entries: Vec<FlowEntry>,
    /// Mode nat: the flow's binding, if any; it overrides the slot and the flow tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<Binding>,
    /// What becomes of the packet if no service forwards it, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// One answer per kind of packet: for TCP a SYN and an established packet.
    pub answers: Vec<Answer>,
    /// Human-readable explanation, one line per step.
    pub steps: Vec<String>,
}

impl Explanation {
    /// An explanation without any step.
    pub fn new(query: Query) -> Self {
        Self {
            query,
            service: None,
            matched: None,
            hash: None,
            slot: None,
            slots: None,
            primary: None,
            secondary: None,
            transition: false,
            tracked: false,
            entries: Vec::new(),
            binding: None,
            outcome: None,
            answers: Vec::new(),
            steps: Vec::new(),
        }
    }
}

/// Explains a flow.
pub fn explain(reader: &Reader, names: &impl Names, query: Query) -> Explanation {
    let live = MapReader::new(reader);
    let headers = headers(&query, 0);
    let mut explanation = Explanation::new(query);
    let checked =
        martian::check(&live, &headers).and_then(|()| martian::check_worker(&live, &headers, headers.port));
    if let Err(reason) = checked {
        explanation.steps.push(format!("dropped if the destination is a VIP: {}", reason.describe()));
        explanation.outcome = Some(format!("dropped if the destination is a VIP ({})", reason.label()));
        return explanation;
    }
    let source = names.listed(explanation.query.source.ip());
    if live.is_denied(headers.source) {
        let entry = source.unwrap_or_else(|| "an entry that is being removed from the list".to_owned());
        explanation.steps.push(format!(
            "dropped if the destination is a VIP: {}: {entry}",
            Reason::GuardDenied.describe()
        ));
        explanation.outcome = Some("dropped if the destination is a VIP (deny list)".to_owned());
        return explanation;
    }
    if let Some(entry) = source {
        explanation.steps.push(format!("allowed: {entry}"));
    }
    let (index, matched) = match lookup_service(&live, &headers) {
        Ok(found) => found,
        Err(reason) => {
            explanation.steps.push(format!("not balanced: {}", reason.describe()));
            let Query { destination, protocol, .. } = explanation.query;
            let to = match reason.fate() {
                Fate::Drop => "dropped",
                _ => "passed to the host's network stack",
            };
            explanation.outcome =
                Some(format!("{to} (no service at {destination}/{protocol}: {})", reason.label()));
            return explanation;
        }
    };
    let Some(view) = live.service(index) else {
        explanation
            .steps
            .push(format!("service entry {index} is missing: {}", Reason::BrokenTable.describe()));
        return explanation;
    };
    explanation.add_service(names, index, matched);
    explanation.add_slot(&live, names, view, &headers);
    explanation.add_flow_entries(reader, &live, names, index, &headers);
    if view.flags & flags::NAT != 0 {
        explanation.add_nat_binding(reader, &live, names, index, &headers);
    }
    if view.flags & flags::QUIC != 0 {
        explanation.add_connection_id(&live, names, index, view, query.connection_id.as_ref());
    } else if query.connection_id.is_some() {
        explanation
            .steps
            .push("the connection id is ignored: the service has no QUIC-LB configuration".to_owned());
    }
    let kinds: &[(&str, u8)] = match query.protocol {
        Protocol::Tcp => &[("syn", tcp::SYN), ("established", tcp::ACK)],
        Protocol::Udp => &[("datagram", 0)],
    };
    for (packet, tcp_flags) in kinds {
        explanation.add_answer(&live, names, index, view, packet, &self::headers(&query, *tcp_flags));
    }
    explanation
}

impl Explanation {
    fn add_service(&mut self, names: &impl Names, index: u32, matched: Match) {
        let name = names.service(index).unwrap_or_else(|| format!("#{index}"));
        let how = match matched {
            Match::Exact => "exact",
            Match::Range => "range",
            Match::Any => "any",
        };
        self.steps.push(format!("service {name}, matched by {how} port"));
        self.service = Some(name);
        self.matched = Some(how.to_owned());
    }

    fn add_slot(&mut self, live: &MapReader<'_>, names: &impl Names, view: &ServiceView, headers: &Headers) {
        let hash = slot_hash(view, headers, flow_hash(view.seed, headers));
        self.hash = Some(format!("{hash:016x}"));
        self.slots = Some(view.slot_count);
        if view.slot_count == 0 {
            self.steps.push("the service has no backends".to_owned());
            return;
        }
        let number = slot_of(hash, view.slot_count);
        self.slot = Some(number);
        self.steps.push(format!("hash {hash:016x} → slot {number} of {}", view.slot_count));
        let Some(slot) = live.reader.slot(view.slot_base + number) else { return };
        self.primary = live.backend_view(names, slot.primary_index());
        self.secondary = live.backend_view(names, slot.secondary_index());
        self.transition = is_in_transition(view, slot);
        self.tracked = slot.is_tracked() || view.flags & flags::TRACK_ALL != 0;
        let label = |b: &Option<BackendView>| b.as_ref().map_or("none".to_owned(), BackendView::label);
        self.steps.push(format!(
            "pair: primary {}, {} {}{}",
            label(&self.primary),
            if slot.is_transition() { "previous primary" } else { "secondary" },
            label(&self.secondary),
            match (self.transition, self.tracked) {
                (true, _) if view.old_count != 0 =>
                    "; in transition from a table of another size, seed or hash",
                (true, _) => "; in transition",
                (false, true) => "; tracked",
                (false, false) => "; stable",
            }
        ));
    }

    fn add_flow_entries(
        &mut self,
        reader: &Reader,
        live: &MapReader<'_>,
        names: &impl Names,
        index: u32,
        headers: &Headers,
    ) {
        let key = lb_ebpf::select::choose::flow_key(index, headers);
        for table in crate::apply::dataplane::FLOW_TABLES {
            let Some(flow) = reader.flow(table, &key) else { continue };
            let entry = FlowEntry {
                table: crate::apply::dataplane::flow_map(table).to_owned(),
                backend: live.backend_view(names, flow.backend).map_or("gone".to_owned(), |b| b.label()),
                idle_s: live.now_s().saturating_sub(flow.last_seen_s),
                closing: flow.flags & lb_common::flow::flags::CLOSING != 0,
            };
            self.steps.push(format!(
                "map {} has an entry: {}, idle for {} s{}",
                entry.table,
                entry.backend,
                entry.idle_s,
                if entry.closing { ", closing" } else { "" }
            ));
            self.entries.push(entry);
        }
    }

    /// Mode nat: looks up the addresses and ports of the flow on the workers' side.
    fn add_nat_binding(
        &mut self,
        reader: &Reader,
        live: &MapReader<'_>,
        names: &impl Names,
        index: u32,
        headers: &Headers,
    ) {
        let Some(nat) = reader.nat(&lb_ebpf::select::choose::flow_key(index, headers)) else {
            self.steps.push("no NAT binding: a new flow gets one on the backend below".to_owned());
            return;
        };
        let reply = reader.reply(&lb_ebpf::nat::reply_key(&nat, headers.protocol));
        let seen_s = reply.map_or(0, |r| r.last_seen_s).max(nat.last_seen_s);
        let binding = Binding {
            backend: live.backend_view(names, nat.backend).map_or("gone".to_owned(), |b| b.label()),
            source: SocketAddr::new(to_ip(nat.source), nat.source_port.get()),
            worker: SocketAddr::new(to_ip(nat.worker), nat.port.get()),
            idle_s: live.now_s().saturating_sub(seen_s),
        };
        let fate = match lb_ebpf::nat::worker(live, nat.backend, index, headers.is_ipv6) {
            Ok(_) => "sent there".to_owned(),
            Err(reason) => format!("dropped: {}", reason.describe()),
        };
        self.steps.push(format!(
            "NAT binding {} → {} on {}, idle for {} s: its packets are {fate}",
            binding.source, binding.worker, binding.backend, binding.idle_s
        ));
        self.binding = Some(binding);
    }

    fn add_answer(
        &mut self,
        live: &MapReader<'_>,
        names: &impl Names,
        index: u32,
        view: &ServiceView,
        packet: &str,
        headers: &Headers,
    ) {
        live.recorded.set(false);
        let hash = flow_hash(view.seed, headers);
        let choice = choose(live, index, view, headers, hash).and_then(|choice| {
            let own = |b: &Backend| nat::is_in_pool(headers.source, b.source, b.source_bits.into());
            match live.backend(choice.backend).filter(|b| b.mode == backend::mode::NAT) {
                Some(backend) if own(backend) => Err(Reason::OwnSource),
                _ => Ok(choice),
            }
        });
        let sent = choice.map(|c| sent(live, index, view, headers.is_ipv6, c.backend));
        let (backend, why) = match (choice, sent) {
            (Ok(Choice { backend, why, .. }), Ok(Ok(()))) => {
                (live.backend_view(names, backend), describe_choice(why).to_owned())
            }
            (Ok(Choice { backend, why, .. }), Ok(Err(reason))) => {
                let to = live.backend_view(names, backend).map_or("none".to_owned(), |b| b.label());
                (None, format!("{}; backend {to}: {}", reason.describe(), describe_choice(why)))
            }
            (Err(reason), _) | (_, Err(reason)) => (None, reason.describe().to_owned()),
        };
        // What is not sent has neither a next hop nor further choices.
        let choice = choice.and_then(|c| sent.and_then(|sent| sent).map(|()| c));
        let forwarding = choice.ok().and_then(|c| live.backend(c.backend)).map(|b| forwarding(b, hash));
        let to = backend.as_ref().map_or("nowhere".to_owned(), BackendView::label);
        self.steps.push(format!("{packet} → {to}: {why}"));
        if let Some(f) = &forwarding
            && self.answers.last().and_then(|a| a.forwarding.as_ref()) != Some(f)
        {
            self.steps.push(f.describe());
        }
        let chain: Vec<BackendView> = match choice.ok().map(|c| (c, live.backend(c.backend))) {
            Some((choice, Some(entry))) if lb_ebpf::second_chance::header::is_carried_to(entry) => {
                let others = split(others(live, index, view, headers, hash, choice.backend));
                others.iter().filter_map(|&i| live.backend_view(names, i)).collect()
            }
            _ => Vec::new(),
        };
        if !chain.is_empty() {
            let next: Vec<String> = chain.iter().map(BackendView::label).collect();
            let rule = if packet == "syn" {
                "a SYN stays on the backend where it is placed"
            } else {
                "a worker without a socket for the flow sends the packet on"
            };
            self.steps.push(format!("second chance: then {} ({rule})", next.join(", then ")));
        }
        let records = live.recorded.get();
        self.answers.push(Answer { packet: packet.to_owned(), backend, why, records, forwarding, chain });
    }
}

/// What becomes of a packet to the chosen backend, by the code of the stage that sends it.
fn sent(
    live: &MapReader<'_>,
    service: u32,
    view: &ServiceView,
    is_ipv6: bool,
    backend: u32,
) -> Result<(), Reason> {
    if view.flags & flags::NAT != 0 {
        return nat::worker(live, backend, service, is_ipv6).map(drop);
    }
    let entry = live.backend(backend).ok_or(Reason::BrokenTable)?;
    match forward::overhead(entry) {
        Some(_) => Ok(()),
        None => forward::without_header(entry).map(drop),
    }
}

impl BackendView {
    fn label(&self) -> String {
        format!("{} ({}, {})", self.name.as_deref().unwrap_or("removed backend"), self.address, self.state)
    }
}

fn describe_choice(why: Why) -> &'static str {
    match why {
        Why::Primary => "the slot's primary",
        Why::NewFlow => "a new flow goes to the slot's primary",
        Why::NotTracked => "not in a flow table, so the slot's primary",
        Why::Tracked | Why::TrackedYoung => "an entry of the flow table names this backend",
        Why::RecentSyn => "its SYN was recently placed on this backend",
        Why::LessLoaded => "a new flow goes to the slot's secondary, which has less load than the primary",
        Why::RoundRobin => {
            "round robin: a new flow goes to this backend or another of the service's backends"
        }
        Why::Random => "random: a new flow goes to this backend or another of the service's backends",
        Why::LeastConn => "a new flow goes to the backend with the fewest flows",
        Why::Previous => {
            "without a flow-table entry it is older than the change: the slot's backend before the drain window"
        }
    }
}

fn headers(query: &Query, tcp_flags: u8) -> Headers {
    Headers {
        source: words(from_ip(query.source.ip())),
        destination: words(from_ip(query.destination.ip())),
        source_port: query.source.port().to_be(),
        port: query.destination.port().to_be(),
        protocol: query.protocol.number(),
        tcp_flags,
        is_ipv6: query.destination.is_ipv6(),
        dont_fragment: true,
        l2_len: 14,
        ip_len: 60,
        ..Headers::default()
    }
}
