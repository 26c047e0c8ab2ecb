//! ICMP and ICMPv6 errors about a flow go to that flow's backend: without "fragmentation needed" and "packet
//! too big" a worker would go on sending what cannot arrive.
//!
//! The error quotes the packet that it is about, which a worker sent with the VIP as its source. Read the other
//! way round, the quote gives the client's side of the flow, and the same choice as for the client's own
//! packets gives the backend. Nothing is written down: anybody can forge an error.
//! Sources: RFC 792, RFC 1191, RFC 4443, RFC 5927.

use crate::{
    Frame, ReadOnly, Tables, Verdict,
    forward::forward,
    packet::{
        Packet,
        fib::Fib,
        network::{Network, parse_ipv4, parse_ipv6},
        parse::{Headers, tcp},
        verdict::{Outcome, Refusal},
        wire::{IcmpError, Tcp},
    },
    select::{
        choose::{backend_of, choose},
        hash::flow_hash,
        service::lookup_service,
    },
};
use lb_common::{
    Reason,
    service::{self, TCP, UDP},
    settings::{IngressSettings, features},
};

/// Whether a message of this type is an error that a flow's worker must hear of.
#[inline(always)]
pub fn is_error(network: &Network, kind: u8) -> bool {
    const UNREACHABLE: u8 = 3;
    const TIME_EXCEEDED: u8 = 11;
    const PARAMETER_PROBLEM: u8 = 12;
    if network.headers.is_ipv6 {
        // Unreachable, too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    } else {
        matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
    }
}

/// Sends an error to the backend of the flow that it quotes.
#[inline(always)]
pub fn deliver<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &Network,
) -> Result<(Verdict, Outcome), Reason> {
    let flow = quoted(&frame.packet(), network)?;
    let (service, _) = lookup_service(tables, &flow)?;
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    if view.flags & service::flags::NAT != 0 {
        // The quote must be translated, as its flow is: another program's work.
        return Err(Reason::NatError);
    }
    if settings.features & features::ICMP == 0 {
        return Err(Reason::Icmp);
    }
    let hash = flow_hash(view.seed, &flow);
    let choice = choose(&ReadOnly(tables), service, view, &flow, hash)?;
    let backend = backend_of(tables, choice.backend, service)?;
    let verdict = match forward(frame, tables, settings, &network.headers, (choice.backend, backend), hash) {
        Ok(verdict) => verdict,
        Err(Refusal::Reason(reason)) => return Err(reason),
        // Never an error about an error (RFC 1122 3.2.2).
        Err(Refusal::TooBig(_)) => return Err(Reason::TooBigDropped),
        Err(Refusal::Stage(_)) => return Err(Reason::StageMissing),
    };
    if settings.stats != 0 {
        tables.account(choice.backend, network.headers.ip_len, false);
    }
    tables.count(Reason::IcmpErrorForwarded);
    Ok((verdict, Outcome::Forwarded { service, backend: choice.backend }))
}

/// The client's side of the flow whose packet a message quotes.
#[inline(always)]
fn quoted(packet: &Packet, network: &Network) -> Result<Headers, Reason> {
    let at = network.l4() + size_of::<IcmpError>();
    let inner = if network.headers.is_ipv6 { parse_ipv6(packet, at) } else { parse_ipv4(packet, at) };
    let inner = inner.map_err(|_| Reason::IcmpBadQuote)?;
    // Its own header says how long the packet was; the quote may end earlier, but not before the ports.
    if at + 8 > network.l4() + network.l4_len || inner.l4() + 8 > network.l4() + network.l4_len {
        return Err(Reason::IcmpBadQuote);
    }
    // The worker sent it from the VIP that the error is for. Everything else is made up.
    if inner.headers.source != network.headers.destination {
        return Err(Reason::IcmpForeignQuote);
    }
    let protocol = inner.headers.protocol;
    if protocol != TCP && protocol != UDP {
        return Err(Reason::Icmp);
    }
    // A later part has no ports. Routers quote the first.
    if inner.fragment.is_some_and(|part| part.offset != 0) {
        return Err(Reason::IcmpBadQuote);
    }
    let ports: [u16; 2] = packet.read(inner.l4()).ok_or(Reason::IcmpBadQuote)?;
    let mut flow = Headers {
        source: inner.headers.destination,
        destination: inner.headers.source,
        source_port: ports[1],
        port: ports[0],
        ..inner.headers
    };
    if protocol == TCP {
        flow.tcp_flags = tcp::ACK;
        // Where the quote is long enough, it says which of its numbers the client had got to.
        if inner.l4() + 20 <= network.l4() + network.l4_len
            && let Some(header) = packet.read::<Tcp>(inner.l4())
        {
            flow.sequence = u32::from_be(header.acknowledgement);
        }
    }
    Ok(flow)
}
