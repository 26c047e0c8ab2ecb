//! Second chance, the worker's side: deliver a packet here, or send it on to the next backend that may have its flow.
//!
//! SYN → here. A socket for the flow exists here (an established one, or a listener that answers SYN cookies and is
//! being shown a good one) → here. Else on to the next of the chain that the packet carries (`chain` has the format);
//! whoever is last takes it, and its stack resets what nobody knows. A packet without ports (a fragment, ICMP) is taken
//! by the first.
//!
//! The packet keeps its length: outer destination, source (this worker), TTL and the chain are rewritten.
//! Called by `decap`.
//!
//! A header whose next address is this worker, or the worker that sent the packet on, is a loop. Only packets for a
//! VIP that this worker serves are sent on. A listener counts only if it is shown a good SYN cookie: otherwise the
//! service's listener on every worker would take every packet.

use crate::{
    Frame, Packet, Verdict,
    packet::{
        csum,
        fib::{Fib, FibQuery, Hop},
        parse::{ETHERNET, address, mapped, tcp},
        wire::{Chain4, Chain6, Ipv4, Ipv6, Macs, Tcp, Udp},
    },
    second_chance::header::{KIND, MOST, VERSION},
};
use lb_common::{
    Address, Reason, is_mapped,
    service::{TCP, UDP},
};

/// Whether a socket of this host has a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketQuery {
    /// Client, network order, IPv4 as mapped.
    pub source: [u32; 4],
    /// VIP, likewise.
    pub destination: [u32; 4],
    /// Client's port, network order.
    pub source_port: u16,
    /// The VIP's port, network order.
    pub port: u16,
    /// Whether it is IPv6.
    pub is_ipv6: bool,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Offset of the inner IP header in the frame, for a listener that looks at a SYN cookie.
    pub ip: usize,
    /// Offset of the TCP header.
    pub l4: usize,
}

/// This host's sockets.
pub trait Sockets {
    /// Whether one has this flow: for TCP any but a listener, or a listener that is shown a good SYN cookie; for UDP a
    /// connected one.
    fn has_flow(&self, query: &SocketQuery) -> bool;
}

/// The chain that a packet carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Backends still to be visited.
    pub left: u8,
    /// Workers that sent the packet on.
    pub hops: u8,
    /// The next, network order, IPv4 as mapped.
    pub next: [u32; 4],
}

/// Reads and checks the chain at `at` of a packet whose outer header is IPv6 or not.
#[inline(always)]
pub fn parse_chain(packet: &Packet, at: usize, is_ipv6: bool) -> Result<Chain, Reason> {
    let (kind, version_left, hops, next, has_second) = if is_ipv6 {
        let c: Chain6 = packet.read(at).ok_or(Reason::ChanceBad)?;
        let second = c.next[4] | c.next[5] | c.next[6] | c.next[7];
        (c.kind, c.version_left, c.hops, [c.next[0], c.next[1], c.next[2], c.next[3]], second != 0)
    } else {
        let c: Chain4 = packet.read(at).ok_or(Reason::ChanceBad)?;
        (c.kind, c.version_left, c.hops, mapped(c.next[0]), c.next[1] != 0)
    };
    let left = version_left & 0x0f;
    if kind != KIND.to_be() || version_left >> 4 != VERSION || left > MOST || hops > MOST {
        return Err(Reason::ChanceBad);
    }
    if hops + left > MOST {
        return Err(Reason::ChanceLoop);
    }
    let has_first = if is_ipv6 { (next[0] | next[1] | next[2] | next[3]) != 0 } else { next[3] != 0 };
    if has_first != (left > 0) || has_second != (left > 1) || (left > 0 && !is_unicast(&next, is_ipv6)) {
        return Err(Reason::ChanceBad);
    }
    Ok(Chain { left, hops, next })
}

/// Whether a worker can have this address: neither multicast, broadcast nor loopback, and of the outer header's family.
#[inline(always)]
fn is_unicast(next: &[u32; 4], is_ipv6: bool) -> bool {
    let first = u32::from_be(if is_ipv6 { next[0] } else { next[3] }) >> 24;
    if is_ipv6 {
        let is_loopback = (next[0] | next[1] | next[2]) == 0 && next[3] == 1_u32.to_be();
        first != 0xff && !is_loopback && !is_mapped(&address(*next))
    } else {
        first != 0 && first != 127 && first < 224
    }
}

/// The inner packet's flow, as sockets know it; None for what has no ports, or no place in a flow yet.
#[inline(always)]
pub fn flow_of(packet: &Packet, ip: usize, is_ipv6: bool) -> Option<SocketQuery> {
    let (source, destination, protocol, l4) = if is_ipv6 {
        let header: Ipv6 = packet.read(ip)?;
        (header.source, header.destination, header.next, ip + 40)
    } else {
        let header: Ipv4 = packet.read(ip)?;
        if header.fragment & 0x3fff_u16.to_be() != 0 {
            return None;
        }
        let len = ((header.version_len & 0x0f) as usize) * 4;
        (mapped(header.source), mapped(header.destination), header.protocol, ip + len)
    };
    let (source_port, port) = match protocol {
        TCP => {
            let header: Tcp = packet.read(l4)?;
            if header.flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN {
                return None;
            }
            (header.source_port, header.port)
        }
        UDP => {
            let header: Udp = packet.read(l4)?;
            (header.source_port, header.port)
        }
        _ => return None,
    };
    Some(SocketQuery { source, destination, source_port, port, is_ipv6, protocol, ip, l4 })
}

/// What becomes of a packet with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Delivered here, counted under this reason.
    Here(Reason),
    /// Sent on.
    On,
}

/// Decides.
#[inline(always)]
pub fn decide<F: Frame + Sockets>(frame: &F, chain: &Chain, ip: usize, is_ipv6: bool) -> Decision {
    let here = match chain.hops {
        0 => Reason::ChanceFirst,
        1 => Reason::ChanceSecond,
        _ => Reason::ChanceThird,
    };
    match flow_of(&frame.packet(), ip, is_ipv6) {
        None => Decision::Here(here),
        Some(query) if frame.has_flow(&query) => Decision::Here(here),
        Some(_) if chain.left > 0 => Decision::On,
        // The end of a chain, or there was none.
        Some(_) => Decision::Here(Reason::ChanceNone),
    }
}

/// Sends a packet on to the next of its chain.
#[inline(always)]
pub fn send_on<F: Frame + Fib, const L2: usize>(
    frame: &mut F,
    chain: &Chain,
    ours: &Address,
    payload: usize,
    is_ipv6: bool,
) -> Result<Verdict, Reason> {
    // The next is this worker: whoever made the chain wants the packet to go round.
    if address(chain.next) == *ours {
        return Err(Reason::ChanceLoop);
    }
    let mut packet = frame.packet();
    let udp: Udp = packet.read(payload).ok_or(Reason::Truncated)?;
    if udp.check != 0 {
        // It covers addresses that change here; ours have none.
        return Err(Reason::ChanceBad);
    }
    let len =
        if is_ipv6 { rewrite_ipv6(&mut packet, L2, chain)? } else { rewrite_ipv4(&mut packet, L2, chain)? };
    if !shift(&mut packet, payload + 12, chain, is_ipv6) {
        return Err(Reason::Truncated);
    }
    // Tagged frames go back to the router that they came from: the FIB speaks of interfaces above this one.
    let hop = if L2 == ETHERNET {
        let query = FibQuery {
            source: crate::packet::parse::words(*ours),
            destination: chain.next,
            is_ipv6,
            tos: 0,
            protocol: UDP,
            len,
            on_link: false,
        };
        frame.lookup(&query).ok().map(|answer| answer.hop)
    } else {
        None
    };
    let mut packet = frame.packet();
    let macs: Macs = packet.read(0).ok_or(Reason::Truncated)?;
    let (macs, verdict) = match hop {
        Some(hop) => (macs_of(&hop), leave(frame, &hop)),
        // No way of our own, or a neighbour that nobody has asked for yet: whoever brought it can route it.
        None => {
            let w = macs.words;
            (Macs { words: [w[3], w[4], w[5], w[0], w[1], w[2]] }, Verdict::Transmit)
        }
    };
    if packet.write(0, macs) { Ok(verdict) } else { Err(Reason::Truncated) }
}

#[inline(always)]
fn leave<F: Frame>(frame: &F, hop: &Hop) -> Verdict {
    if hop.ifindex == frame.ifindex() { Verdict::Transmit } else { Verdict::Redirect(hop.ifindex) }
}

#[inline(always)]
fn macs_of(hop: &Hop) -> Macs {
    let words = |mac: (u32, u16)| [mac.0 as u16, (mac.0 >> 16) as u16, mac.1];
    let (to, from) = (words(hop.next_hop), words(hop.egress_mac));
    Macs { words: [to[0], to[1], to[2], from[0], from[1], from[2]] }
}

/// From this worker to the next, one hop older. Returns the packet's length.
#[inline(always)]
fn rewrite_ipv4(packet: &mut Packet, l3: usize, chain: &Chain) -> Result<u32, Reason> {
    let mut ip: Ipv4 = packet.read(l3).ok_or(Reason::Truncated)?;
    if ip.ttl <= 1 {
        return Err(Reason::DecapTtl);
    }
    let age = [u16::from_ne_bytes([ip.ttl, ip.protocol]), u16::from_ne_bytes([ip.ttl - 1, ip.protocol])];
    let (old, next) = (ip.source, chain.next[3]);
    if comes_from(chain, &mapped(old)) {
        return Err(Reason::ChanceLoop);
    }
    ip.ttl -= 1;
    // The old destination becomes the source, so only the old source and the new destination change the sum.
    ip.source = ip.destination;
    ip.destination = next;
    ip.check = csum::update(ip.check, age[0], age[1]);
    ip.check = csum::update(ip.check, old as u16, next as u16);
    ip.check = csum::update(ip.check, (old >> 16) as u16, (next >> 16) as u16);
    let len = u16::from_be(ip.total_len) as u32;
    if packet.write(l3, ip) { Ok(len) } else { Err(Reason::Truncated) }
}

#[inline(always)]
fn rewrite_ipv6(packet: &mut Packet, l3: usize, chain: &Chain) -> Result<u32, Reason> {
    let mut ip: Ipv6 = packet.read(l3).ok_or(Reason::Truncated)?;
    if ip.hop_limit <= 1 {
        return Err(Reason::DecapTtl);
    }
    if comes_from(chain, &ip.source) {
        return Err(Reason::ChanceLoop);
    }
    ip.hop_limit -= 1;
    ip.source = ip.destination;
    ip.destination = chain.next;
    let len = u16::from_be(ip.payload_len) as u32 + 40;
    if packet.write(l3, ip) { Ok(len) } else { Err(Reason::Truncated) }
}

/// Whether the next is the worker that has just sent the packet on: it would go back.
#[inline(always)]
fn comes_from(chain: &Chain, source: &[u32; 4]) -> bool {
    chain.hops > 0 && *source == chain.next
}

/// The chain without its next.
#[inline(always)]
fn shift(packet: &mut Packet, at: usize, chain: &Chain, is_ipv6: bool) -> bool {
    let version_left = VERSION << 4 | (chain.left - 1);
    if !packet.write(at + 2, [version_left, chain.hops + 1]) {
        return false;
    }
    if is_ipv6 {
        let Some(second) = packet.read::<[u32; 4]>(at + 20) else { return false };
        packet.write(at + 4, second) && packet.write(at + 20, [0u32; 4])
    } else {
        let Some(second) = packet.read::<u32>(at + 8) else { return false };
        packet.write(at + 4, second) && packet.write(at + 8, 0u32)
    }
}
