//! A worker's side: takes `ipip` and `gue` off and hands the inner packet to the stack, which has the
//! VIP on `lo` and answers the client directly (DSR).
//!
//! Strict: the outer destination must be one of this worker's addresses, the inner one a VIP served
//! here, and the inner source an address from which a host can have sent: whoever can reach a worker past the ingress hosts
//! can write any inner header, and the stack answers a VIP of its own on its loopback, without end. What carries the backends that may have its flow instead goes on to those if it has no socket here (`chance`).
//! As a router would, it decrements the inner TTL and carries a congestion mark over (RFC 6040).
//! Called by `bin/decap.rs` in the kernel and by tests and fuzzers natively.

use crate::{
    Frame, Packet, Verdict,
    forward::GUE_OVERHEAD,
    guard::martian,
    packet::{
        csum,
        fib::Fib,
        parse::{self, ETH_IPV4, ETH_IPV6, ETHERNET, VLAN_TAG, address, mapped, pair, parse_ethernet},
        wire::{Gue, Ipv4, Ipv6, Macs, Udp},
    },
    second_chance::{
        header,
        worker::{self, Chain, Decision, Sockets},
    },
};
use lb_common::{Address, Reason, is_mapped, service::UDP, settings::DecapSettings};

const PROTOCOL_IPV4: u8 = 4;
const PROTOCOL_IPV6: u8 = 41;
/// Congestion experienced; also the mask of both bits.
const ECN_CE: u8 = 3;
/// Can carry a mark: the usual code point, and the one of RFC 8311 experiments (L4S).
const ECN_ECT0: u8 = 2;
const ECN_ECT1: u8 = 1;

/// The maps of the decap program.
pub trait DecapTables {
    /// Whether encapsulated packets to this address are ours.
    fn is_ours(&self, address: &Address) -> bool;
    /// Whether this VIP is served here.
    fn is_served(&self, vip: &Address) -> bool;
    /// Adds one to a reason's counter.
    fn count(&self, reason: Reason);
}

/// IPv6's fragment header (RFC 8200). What it says of the rest does not matter: only whole packets are unpacked.
const EXTENSION_FRAGMENT: u8 = 44;

/// An outer header: where its payload begins, and what it is.
struct Outer {
    destination: [u32; 4],
    protocol: u8,
    tos: u8,
    is_fragment: bool,
    /// Offset of the payload in the frame.
    payload: usize,
    /// Its length by the outer header, in bytes.
    len: usize,
}

/// Decides a packet's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib + Sockets, T: DecapTables>(
    frame: &mut F,
    tables: &T,
    settings: &DecapSettings,
) -> (Verdict, Reason) {
    let (verdict, reason) = match decapsulate(frame, tables, settings) {
        Ok(end) => end,
        Err(reason) => (Verdict::of(reason), reason),
    };
    tables.count(reason);
    (verdict, reason)
}

#[inline(always)]
fn decapsulate<F: Frame + Fib + Sockets, T: DecapTables>(
    frame: &mut F,
    tables: &T,
    settings: &DecapSettings,
) -> Result<(Verdict, Reason), Reason> {
    let packet = frame.packet();
    let (l2_len, kind) = parse_ethernet(&packet, settings.vlan != 0)?;
    // One call per length, so that the offsets of the common case are constants.
    match l2_len {
        ETHERNET => at::<F, T, ETHERNET, 0>(frame, tables, settings, kind),
        18 => at::<F, T, 18, 2>(frame, tables, settings, kind),
        _ => at::<F, T, { ETHERNET + 2 * VLAN_TAG }, 4>(frame, tables, settings, kind),
    }
}

/// L2 is the Ethernet header's length, TAGS the 16-bit words of VLAN tags in it.
#[inline(always)]
fn at<F: Frame + Fib + Sockets, T: DecapTables, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    tables: &T,
    settings: &DecapSettings,
    kind: u16,
) -> Result<(Verdict, Reason), Reason> {
    let packet = frame.packet();
    let outer = match kind {
        ETH_IPV4 => outer_ipv4(&packet, L2)?,
        ETH_IPV6 if settings.ipv6 == 0 => return Err(Reason::Ipv6Off),
        ETH_IPV6 => outer_ipv6(&packet, L2)?,
        _ => return Err(Reason::NotIp),
    };
    let is_gue = match outer.protocol {
        PROTOCOL_IPV4 | PROTOCOL_IPV6 => false,
        UDP if outer.is_fragment => return Err(Reason::Fragment),
        UDP => {
            let udp: Udp = packet.read(outer.payload).ok_or(Reason::Truncated)?;
            if udp.port != settings.gue_port.to_be() {
                return Err(Reason::OtherProtocol);
            }
            true
        }
        _ => return Err(Reason::OtherProtocol),
    };
    if !tables.is_ours(&address(outer.destination)) {
        return Err(Reason::DecapNotOurs);
    }
    if outer.is_fragment {
        return Err(Reason::DecapFragment);
    }
    if is_gue {
        let (protocol, has_chain) = parse_gue(&packet, &outer)?;
        if has_chain {
            return with_chain::<F, T, L2, TAGS>(frame, tables, &outer, protocol);
        }
        deliver::<F, T, L2, TAGS>(frame, tables, &outer, protocol, outer.payload + GUE_OVERHEAD)?;
        Ok((Verdict::Pass, Reason::DecapGue))
    } else {
        deliver::<F, T, L2, TAGS>(frame, tables, &outer, outer.protocol, outer.payload)?;
        Ok((Verdict::Pass, Reason::DecapIpip))
    }
}

/// A packet that names other backends: delivered, or sent on.
#[inline(always)]
fn with_chain<F: Frame + Fib + Sockets, T: DecapTables, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    tables: &T,
    outer: &Outer,
    protocol: u8,
) -> Result<(Verdict, Reason), Reason> {
    let is_ipv6 = !is_mapped(&address(outer.destination));
    let chain = worker::parse_chain(&frame.packet(), outer.payload + GUE_OVERHEAD, is_ipv6)?;
    // One call per length, so that the offsets that follow differ by constants only.
    let inner = outer.payload + GUE_OVERHEAD + if is_ipv6 { header::len(true) } else { header::len(false) };
    let decision = if chain == (Chain { left: 0, hops: 0, ..chain }) {
        // Nobody else may have it.
        Decision::Here(Reason::DecapGue)
    } else {
        check_inner(&frame.packet(), tables, outer, protocol, inner)?;
        worker::decide(frame, &chain, inner, protocol == PROTOCOL_IPV6)
    };
    match decision {
        Decision::Here(reason) => {
            deliver::<F, T, L2, TAGS>(frame, tables, outer, protocol, inner)?;
            if reason != Reason::DecapGue {
                tables.count(reason);
            }
            Ok((Verdict::Pass, Reason::DecapGue))
        }
        Decision::On => {
            let ours = address(outer.destination);
            let verdict = worker::send_on::<F, L2>(frame, &chain, &ours, outer.payload, is_ipv6)?;
            Ok((verdict, Reason::ChanceSentOn))
        }
    }
}

/// The checks of an inner packet that need no change of it: what is not for a VIP served here goes nowhere.
#[inline(always)]
fn check_inner<T: DecapTables>(
    packet: &Packet,
    tables: &T,
    outer: &Outer,
    protocol: u8,
    inner: usize,
) -> Result<(), Reason> {
    let (is_whole, vip, source) = if protocol == PROTOCOL_IPV4 {
        let ip: Ipv4 = packet.read(inner).ok_or(Reason::DecapBadInner)?;
        let header_len = ((ip.version_len & 0x0f) as usize) * 4;
        let len = u16::from_be(ip.total_len) as usize;
        let is_whole = ip.version_len >> 4 == 4
            && header_len >= 20
            && len >= header_len
            && len <= inner_room(outer, inner);
        (is_whole, mapped(ip.destination), mapped(ip.source))
    } else {
        let ip: Ipv6 = packet.read(inner).ok_or(Reason::DecapBadInner)?;
        let len = u16::from_be(ip.payload_len) as usize + 40;
        let is_whole = u32::from_be(ip.version_class_label) >> 28 == 6 && len <= inner_room(outer, inner);
        (is_whole, ip.destination, ip.source)
    };
    if !is_whole {
        return Err(Reason::DecapBadInner);
    }
    if !tables.is_served(&address(vip)) {
        return Err(Reason::DecapNotVip);
    }
    check_source(tables, source, protocol == PROTOCOL_IPV6)
}

/// Drops what no client can have sent ([`martian`]), and what a VIP served here cannot have sent to itself or another.
/// Clients on this worker's own network, other workers, and private addresses are like any other.
#[inline(always)]
fn check_source<T: DecapTables>(tables: &T, source: [u32; 4], is_ipv6: bool) -> Result<(), Reason> {
    let is_martian = if is_ipv6 {
        let words = [pair(source[0], source[1]), pair(source[2], source[3])];
        martian::is_martian_v6(words) | parse::is_mapped(&source)
    } else {
        martian::is_martian_v4(source[3])
    };
    if is_martian {
        return Err(Reason::MartianSource);
    }
    if tables.is_served(&address(source)) { Err(Reason::OwnSource) } else { Ok(()) }
}

#[inline(always)]
fn outer_ipv4(packet: &Packet, l3: usize) -> Result<Outer, Reason> {
    let ip: Ipv4 = packet.read(l3).ok_or(Reason::Truncated)?;
    let header_len = ((ip.version_len & 0x0f) as usize) * 4;
    let len = u16::from_be(ip.total_len) as usize;
    if ip.version_len >> 4 != 4 || header_len < 20 || len < header_len {
        return Err(Reason::BadIpv4);
    }
    Ok(Outer {
        destination: mapped(ip.destination),
        protocol: ip.protocol,
        tos: ip.tos,
        is_fragment: ip.fragment & 0x3fff_u16.to_be() != 0,
        payload: l3 + header_len,
        len: len - header_len,
    })
}

#[inline(always)]
fn outer_ipv6(packet: &Packet, l3: usize) -> Result<Outer, Reason> {
    let ip: Ipv6 = packet.read(l3).ok_or(Reason::Truncated)?;
    let version_class = u32::from_be(ip.version_class_label) >> 20;
    if version_class >> 8 != 6 {
        return Err(Reason::BadIpv6);
    }
    let is_fragment = ip.next == EXTENSION_FRAGMENT;
    let protocol = if is_fragment {
        // Its first byte says what the parts are of.
        packet.read::<[u8; 8]>(l3 + 40).ok_or(Reason::Truncated)?[0]
    } else {
        ip.next
    };
    Ok(Outer {
        destination: ip.destination,
        protocol,
        tos: version_class as u8,
        is_fragment,
        payload: l3 + 40,
        len: u16::from_be(ip.payload_len) as usize,
    })
}

/// Protocol of what a GUE header carries, and whether it names other backends. Only variant 0 without flags is
/// understood, and private data of just the length that a chain has.
#[inline(always)]
fn parse_gue(packet: &Packet, outer: &Outer) -> Result<(u8, bool), Reason> {
    let udp: Udp = packet.read(outer.payload).ok_or(Reason::Truncated)?;
    let gue: Gue = packet.read(outer.payload + 8).ok_or(Reason::DecapBadGue)?;
    let len = u16::from_be(udp.len) as usize;
    let chain = header::len(!is_mapped(&address(outer.destination)));
    let has_chain = gue.variant_control_len as usize == chain / 4;
    let is_plain = (gue.variant_control_len == 0 || has_chain) && gue.flags == 0;
    let is_ip = gue.protocol == PROTOCOL_IPV4 || gue.protocol == PROTOCOL_IPV6;
    let least = if has_chain { GUE_OVERHEAD + chain } else { GUE_OVERHEAD };
    if len != outer.len || len < least || !is_plain || !is_ip {
        return Err(Reason::DecapBadGue);
    }
    Ok((gue.protocol, has_chain))
}

/// Checks the inner packet at `inner`, updates it, and makes it the frame's.
#[inline(always)]
fn deliver<F: Frame, T: DecapTables, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    tables: &T,
    outer: &Outer,
    protocol: u8,
    inner: usize,
) -> Result<(), Reason> {
    let mut packet = frame.packet();
    let kind = if protocol == PROTOCOL_IPV4 {
        receive_ipv4(&mut packet, tables, outer, inner)?;
        ETH_IPV4
    } else {
        receive_ipv6(&mut packet, tables, outer, inner)?;
        ETH_IPV6
    };
    let macs: Macs = packet.read(0).ok_or(Reason::Truncated)?;
    let tags: [u16; TAGS] = packet.read(12).ok_or(Reason::Truncated)?;
    // The barrier keeps LLVM from deriving these checks from those of the inner header, at a
    // larger offset: the verifier does not follow that.
    let start = core::hint::black_box(inner - L2);
    let written = packet.write(start, macs)
        && packet.write(start + 12, tags)
        && packet.write(start + L2 - 2, kind.to_be());
    if !written || !frame.adjust_head(start as i32) {
        return Err(Reason::DecapAdjust);
    }
    Ok(())
}

/// Bytes of the outer payload before `inner`.
#[inline(always)]
fn inner_room(outer: &Outer, inner: usize) -> usize {
    outer.len - (inner - outer.payload)
}

#[inline(always)]
fn receive_ipv4<T: DecapTables>(
    packet: &mut Packet,
    tables: &T,
    outer: &Outer,
    inner: usize,
) -> Result<(), Reason> {
    let mut ip: Ipv4 = packet.read(inner).ok_or(Reason::DecapBadInner)?;
    let header_len = ((ip.version_len & 0x0f) as usize) * 4;
    let len = u16::from_be(ip.total_len) as usize;
    if ip.version_len >> 4 != 4 || header_len < 20 || len < header_len || len > inner_room(outer, inner) {
        return Err(Reason::DecapBadInner);
    }
    if !tables.is_served(&address(mapped(ip.destination))) {
        return Err(Reason::DecapNotVip);
    }
    check_source(tables, mapped(ip.source), false)?;
    if ip.ttl <= 1 {
        return Err(Reason::DecapTtl);
    }
    let old = [u16::from_ne_bytes([ip.ttl, ip.protocol]), u16::from_ne_bytes([ip.version_len, ip.tos])];
    ip.ttl -= 1;
    ip.tos = carry_mark(outer.tos, ip.tos)?;
    ip.check = csum::update(ip.check, old[0], u16::from_ne_bytes([ip.ttl, ip.protocol]));
    ip.check = csum::update(ip.check, old[1], u16::from_ne_bytes([ip.version_len, ip.tos]));
    if packet.write(inner, ip) { Ok(()) } else { Err(Reason::DecapBadInner) }
}

#[inline(always)]
fn receive_ipv6<T: DecapTables>(
    packet: &mut Packet,
    tables: &T,
    outer: &Outer,
    inner: usize,
) -> Result<(), Reason> {
    let mut ip: Ipv6 = packet.read(inner).ok_or(Reason::DecapBadInner)?;
    let word = u32::from_be(ip.version_class_label);
    let len = u16::from_be(ip.payload_len) as usize + 40;
    if word >> 28 != 6 || len > inner_room(outer, inner) {
        return Err(Reason::DecapBadInner);
    }
    if !tables.is_served(&address(ip.destination)) {
        return Err(Reason::DecapNotVip);
    }
    check_source(tables, ip.source, true)?;
    if ip.hop_limit <= 1 {
        return Err(Reason::DecapTtl);
    }
    ip.hop_limit -= 1;
    let tos = carry_mark(outer.tos, (word >> 20) as u8)?;
    ip.version_class_label = (word & 0xf00f_ffff | (tos as u32) << 20).to_be();
    if packet.write(inner, ip) { Ok(()) } else { Err(Reason::DecapBadInner) }
}

/// The inner DSCP and ECN after decapsulation (RFC 6040, figure 4): a mark set on the way is
/// carried over, and a packet that cannot carry it is dropped, as its router would have.
#[inline(always)]
fn carry_mark(outer: u8, inner: u8) -> Result<u8, Reason> {
    match (outer & ECN_CE, inner & ECN_CE) {
        (ECN_CE, 0) => Err(Reason::DecapEcn),
        (ECN_CE, _) => Ok(inner | ECN_CE),
        (ECN_ECT1, ECN_ECT0) => Ok(inner ^ ECN_CE),
        _ => Ok(inner),
    }
}
