//! ICMP errors about translated packets (RFC 5508, section 4): the quoted packet is given back the addresses and ports
//! under which its sender knows it, so that path MTU discovery and refusals work on both sides.
//!
//! An error from the workers' side quotes a client's packet as it was sent on, and goes to that client; one from the
//! clients' side quotes an answer, and goes to the worker. Either way its source becomes the address that its new
//! destination speaks with: who on the other side has sent it is nothing that could be answered.

use super::{
    NatTables, as_last_hop, raw,
    rewrite::{Rewrite, adjusted, change, change_of_addresses},
    transmit,
};
use crate::{
    Frame, Verdict,
    forward::known_hop,
    guard::martian,
    packet::{
        network::{self, ICMP, ICMPV6, Network},
        parse::{Headers, words},
        verdict::{Outcome, Refusal, refuse},
        wire::{Echo, Ipv4, Ipv6},
    },
    select::service::lookup_service,
};
use lb_common::{
    Be16, FlowKey, LastHop, Reason, ReplyKey,
    service::{self, TCP, UDP},
    settings::IngressSettings,
};

/// Length of an ICMP error's own header.
const ICMP_HEADER: usize = 8;

/// Whether a message quotes a packet that caused it: destination unreachable, packet too big, time exceeded,
/// parameter problem.
#[inline(always)]
const fn is_error(is_ipv6: bool, kind: u8) -> bool {
    if is_ipv6 { kind >= 1 && kind <= 4 } else { kind == 3 || kind == 11 || kind == 12 }
}

/// The packet that an error quotes, with its ports; None if the message is no error, or quotes too little.
#[inline(always)]
fn quoted<F: Frame>(frame: &F, outer: &Network) -> Option<Network> {
    let packet = frame.packet();
    let is_ipv6 = outer.headers.is_ipv6;
    let protocol = if is_ipv6 { ICMPV6 } else { ICMP };
    let message: Echo = packet.read(outer.l4())?;
    if outer.headers.protocol != protocol || outer.fragment.is_some() || !is_error(is_ipv6, message.kind) {
        return None;
    }
    let at = outer.l4() + ICMP_HEADER;
    let mut inner = if is_ipv6 {
        network::parse_ipv6(&packet, at).ok()?
    } else {
        network::parse_ipv4(&packet, at).ok()?
    };
    if inner.fragment.is_some_and(|part| part.offset != 0)
        || (inner.headers.protocol != TCP && inner.headers.protocol != UDP)
        // Whoever caused the error is told of it: anything else is made up.
        || inner.headers.source != outer.headers.destination
    {
        return None;
    }
    let [source_port, port]: [u16; 2] = packet.read(inner.l4())?;
    inner.headers.source_port = source_port;
    inner.headers.port = port;
    Some(inner)
}

/// The translated service that a quoted answer comes from.
#[inline(always)]
fn service_of<T: crate::Tables>(tables: &T, inner: &Headers) -> Option<u32> {
    let asked = Headers { destination: inner.source, port: inner.source_port, ..inner.clone() };
    let (service, _) = lookup_service(tables, &asked).ok()?;
    let view = tables.service(service)?;
    (view.flags & service::flags::NAT != 0).then_some(service)
}

/// Translates an error and sends it to whom it concerns.
#[inline(always)]
pub fn process<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    let mut place = Network::default();
    let result = match tables.parse_network(frame, settings, &mut place) {
        Ok(outer) => translate(frame, tables, settings, outer),
        Err(reason) => Err(reason.into()),
    };
    match result {
        Ok(done) => done,
        Err(Refusal::Reason(reason)) => refuse(tables, reason),
        // Nobody is told of an error about an error (RFC 1122 3.2.2).
        Err(Refusal::TooBig(_) | Refusal::Stage(_)) => refuse(tables, Reason::TooBigDropped),
    }
}

#[inline(always)]
fn translate<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    outer: &Network,
) -> Result<(Verdict, Outcome), Refusal> {
    let inner = quoted(frame, outer).ok_or(Reason::NotVip)?;
    match service_of(tables, &inner.headers) {
        Some(service) => to_worker(frame, tables, outer, &inner, service),
        None if super::is_reply(settings, inner.headers.source_port) => {
            to_client(frame, tables, outer, &inner)
        }
        None => Err(Reason::NotVip.into()),
    }
}

/// An error about an answer, from the clients' side.
#[inline(always)]
fn to_worker<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    outer: &Network,
    inner: &Network,
    service: u32,
) -> Result<(Verdict, Outcome), Refusal> {
    let key = FlowKey {
        source: inner.headers.destination_address(),
        source_port: be(inner.headers.port),
        port: be(inner.headers.source_port),
        service,
    };
    let binding = tables.nat(&key, |nat| *nat).ok_or(Reason::Icmp)?;
    let to = Rewrite {
        source: words(binding.worker),
        destination: words(binding.source),
        source_port: raw(binding.port),
        port: raw(binding.source_port),
    };
    let backend = super::worker(tables, binding.backend, service, outer.headers.is_ipv6)?;
    // Rare, and TCP and UDP expect errors to get lost: the kernel's FIB is not asked, for which the stack has no room.
    let (hop, _) = known_hop(tables, binding.backend, backend).ok_or(Reason::NoNeighbour)?;
    rewrite(frame, outer, inner, &to)?;
    let verdict = transmit(frame, outer.headers.l2_len(), outer.headers.is_ipv6, &as_last_hop(&hop))?;
    tables.count(Reason::NatError);
    Ok((verdict, Outcome::Returned { service }))
}

/// An error about a client's packet, from the workers' side.
#[inline(always)]
fn to_client<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    outer: &Network,
    inner: &Network,
) -> Result<(Verdict, Outcome), Refusal> {
    let key = ReplyKey {
        worker: inner.headers.destination_address(),
        source: inner.headers.source_address(),
        port: be(inner.headers.port),
        source_port: be(inner.headers.source_port),
        protocol: inner.headers.protocol as u32,
    };
    let found = tables.reply(&key, |reply| (reply.flow, reply.vip, reply.hop));
    let (flow, vip, hop): (FlowKey, _, LastHop) = found.ok_or(Reason::NotVip)?;
    // Errors for a VIP have been looked at on their way here; this one is for an address of the host's.
    martian::check(tables, &outer.headers)?;
    let to = Rewrite {
        source: words(flow.source),
        destination: words(vip),
        source_port: raw(flow.source_port),
        port: raw(flow.port),
    };
    rewrite(frame, outer, inner, &to)?;
    let verdict = transmit(frame, outer.headers.l2_len(), outer.headers.is_ipv6, &hop)?;
    tables.count(Reason::NatError);
    Ok((verdict, Outcome::Returned { service: flow.service }))
}

/// Rewrites the quoted packet to `to`, and the message's own addresses to match: it goes to the quoted packet's
/// sender, from its receiver.
#[inline(always)]
fn rewrite<F: Frame>(frame: &mut F, outer: &Network, inner: &Network, to: &Rewrite) -> Result<(), Reason> {
    let is_ipv6 = outer.headers.is_ipv6;
    let mut packet = frame.packet();
    let quoted = (&inner.headers.source, &inner.headers.destination);
    let addresses = change_of_addresses(is_ipv6, quoted, (&to.source, &to.destination));
    // All that the message's checksum has to follow.
    let mut total = addresses;
    let at = outer.l4() + ICMP_HEADER;
    if is_ipv6 {
        let ip: Ipv6 = packet.read(at).ok_or(Reason::Truncated)?;
        if !packet.write(at, Ipv6 { source: to.source, destination: to.destination, ..ip }) {
            return Err(Reason::Truncated);
        }
    } else {
        let ip: Ipv4 = packet.read(at).ok_or(Reason::Truncated)?;
        let check = adjusted(ip.check, addresses);
        total += change(ip.check, check);
        let (source, destination) = (to.source[3], to.destination[3]);
        if !packet.write(at, Ipv4 { check, source, destination, ..ip }) {
            return Err(Reason::Truncated);
        }
    }
    let ports = change(inner.headers.source_port, to.source_port) + change(inner.headers.port, to.port);
    total += ports;
    if !packet.write(inner.l4(), [to.source_port, to.port]) {
        return Err(Reason::Truncated);
    }
    // The quoted checksum, if the quotation reaches that far and there is one.
    let place = inner.l4() + if inner.headers.protocol == TCP { 16 } else { 6 };
    let is_there = place + 2 <= outer.l4() + outer.l4_len;
    if let Some(check) =
        packet.read::<u16>(place).filter(|check| is_there && (*check != 0 || inner.headers.protocol == TCP))
    {
        let new = adjusted(check, addresses + ports);
        total += change(check, new);
        if !packet.write(place, new) {
            return Err(Reason::Truncated);
        }
    }
    own_headers(frame, outer, to, total)
}

/// The message's own addresses, TTL and checksums.
#[inline(always)]
fn own_headers<F: Frame>(frame: &mut F, outer: &Network, to: &Rewrite, quoted: u64) -> Result<(), Reason> {
    let (source, destination) = (to.destination, to.source);
    let is_ipv6 = outer.headers.is_ipv6;
    let old = (&outer.headers.source, &outer.headers.destination);
    let addresses = change_of_addresses(is_ipv6, old, (&source, &destination));
    super::rewrite::network_header(frame, outer, source, destination, addresses)?;
    let mut packet = frame.packet();
    let message: Echo = packet.read(outer.l4()).ok_or(Reason::Truncated)?;
    // ICMPv6 covers the addresses (RFC 4443 2.3).
    let change = if is_ipv6 { quoted + addresses } else { quoted };
    if packet.write(outer.l4(), Echo { check: adjusted(message.check, change), ..message }) {
        Ok(())
    } else {
        Err(Reason::Truncated)
    }
}

#[inline(always)]
fn be(port: u16) -> Be16 {
    Be16::from_bytes(port.to_ne_bytes())
}
