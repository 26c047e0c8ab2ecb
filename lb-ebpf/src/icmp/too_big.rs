//! Tells a sender that its packet does not fit once encapsulated: fragmentation needed (RFC 792,
//! RFC 1191) or packet too big (RFC 4443), from the VIP, out of the interface it came in by.

use crate::{
    Frame, Tables, Verdict,
    packet::{
        csum,
        network::{ICMP, ICMPV6, Network},
        parse::{ETHERNET, Headers, VLAN_TAG},
        verdict::{Outcome, Refusal, refuse},
        wire::{IcmpError, Ipv4, Ipv6, Macs},
    },
};
use lb_common::{Reason, settings::IngressSettings};

/// Bytes of the packet that are quoted. A packet that is too big is longer; RFC 1812 asks for as much
/// as keeps the message within 576 bytes, RFC 4443 within 1,280; 512 is one call of the checksum helper.
pub const QUOTE: usize = 512;
const IPV4_HEADERS: usize = 28;
const IPV6_HEADERS: usize = 48;

/// Turns the frame into the answer to its sender.
#[inline(always)]
pub fn answer_too_big<F: Frame>(frame: &mut F, headers: &Headers, mtu: u32) -> Result<(), Reason> {
    // A later part of an IPv4 packet, which has no ports, is not answered (RFC 1122 3.2.2).
    if !headers.is_answerable() || (!headers.is_ipv6 && headers.port == 0) {
        return Err(Reason::TooBigDropped);
    }
    // One call per length of the Ethernet header, so that all offsets are constants.
    match headers.l2_len() {
        ETHERNET => turn::<F, ETHERNET, 0>(frame, headers, mtu),
        18 => turn::<F, 18, 2>(frame, headers, mtu),
        _ => turn::<F, { ETHERNET + 2 * VLAN_TAG }, 4>(frame, headers, mtu),
    }
    .ok_or(Reason::TooBigDropped)
}

/// L2 is the Ethernet header's length, TAGS the 16-bit words of VLAN tags in it.
#[inline(always)]
fn turn<F: Frame, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    headers: &Headers,
    mtu: u32,
) -> Option<()> {
    let icmp_headers = if headers.is_ipv6 { IPV6_HEADERS } else { IPV4_HEADERS };
    let packet = frame.packet();
    let macs: Macs = packet.read(0)?;
    let tags: [u16; TAGS] = packet.read(12)?;
    let kind: u16 = packet.read(L2 - 2)?;
    let cut = (L2 + QUOTE) as i32 - frame.total_len() as i32;
    if cut > 0 || !frame.adjust_tail(cut) || !frame.adjust_head(-(icmp_headers as i32)) {
        return None;
    }
    let mut packet = frame.packet();
    let [a, b, c, d, e, f] = macs.words;
    let written = packet.write(0, Macs { words: [d, e, f, a, b, c] })
        && packet.write(12, tags)
        && packet.write(L2 - 2, kind);
    if !written {
        return None;
    }
    if headers.is_ipv6 {
        write_v6::<F, L2>(frame, headers, mtu)
    } else {
        write_v4::<F, L2>(frame, headers, mtu)
    }
}

#[inline(always)]
fn write_v4<F: Frame, const L2: usize>(frame: &F, headers: &Headers, mtu: u32) -> Option<()> {
    let quoted = frame.sum::<QUOTE>(L2 + IPV4_HEADERS)? as u64;
    let (source, destination) = (headers.destination[3], headers.source[3]);
    let total_len = (IPV4_HEADERS + QUOTE) as u16;
    let sum = 0x4500
        + total_len as u64
        + (64 << 8 | ICMP as u64)
        + u32::from_be(source) as u64
        + u32::from_be(destination) as u64;
    let ip = Ipv4 {
        version_len: 0x45,
        tos: 0,
        total_len: total_len.to_be(),
        id: 0,
        fragment: 0,
        ttl: 64,
        protocol: ICMP,
        check: csum::finish(sum).to_be(),
        source,
        destination,
    };
    let mut icmp = IcmpError { kind: 3, code: 4, check: 0, mtu: [0, (mtu as u16).to_be()] };
    // In memory order throughout: `quoted` is a sum of words as loaded.
    icmp.check = csum::finish(quoted + u16::from_ne_bytes([3, 4]) as u64 + icmp.mtu[1] as u64);
    let mut packet = frame.packet();
    (packet.write(L2, ip) && packet.write(L2 + 20, icmp)).then_some(())
}

#[inline(always)]
fn write_v6<F: Frame, const L2: usize>(frame: &F, headers: &Headers, mtu: u32) -> Option<()> {
    let quoted = frame.sum::<QUOTE>(L2 + IPV6_HEADERS)? as u64;
    let (source, destination) = (headers.destination, headers.source);
    let payload_len = (QUOTE + 8) as u16;
    let ip = Ipv6 {
        version_class_label: (6_u32 << 28).to_be(),
        payload_len: payload_len.to_be(),
        next: ICMPV6,
        hop_limit: 64,
        source,
        destination,
    };
    let mut icmp = IcmpError { kind: 2, code: 0, check: 0, mtu: [0, (mtu as u16).to_be()] };
    // Pseudo-header (RFC 8200 8.1), in memory order throughout.
    let mut sum = quoted + u16::from_ne_bytes([2, 0]) as u64 + icmp.mtu[1] as u64;
    sum += payload_len.to_be() as u64 + (ICMPV6 as u16).to_be() as u64;
    // Indexed: the verifier does not follow an iterator over two arrays.
    for i in 0..4 {
        sum += source[i] as u64 + destination[i] as u64;
    }
    icmp.check = csum::finish(sum);
    let mut packet = frame.packet();
    (packet.write(L2, ip) && packet.write(L2 + 40, icmp)).then_some(())
}

/// Answers a packet that is too big, within the budget.
#[inline(always)]
pub fn too_big<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    mtu: u32,
) -> Reason {
    if settings.icmp_per_s == 0 || !tables.take_icmp(settings.icmp_per_s, settings.icmp_burst) {
        return Reason::TooBigDropped;
    }
    match answer_too_big(frame, headers, mtu) {
        Ok(()) => Reason::TooBigAnswered,
        Err(reason) => reason,
    }
}

/// A stage: parses the frame's network header, has `decide` work on it, and ends the packet's way as that says.
#[inline(always)]
pub fn run_stage<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    decide: impl FnOnce(&mut F, &mut Network) -> Result<(Verdict, Outcome), Refusal>,
) -> (Verdict, Outcome) {
    let mut place = Network::default();
    let network = match tables.parse_network(frame, settings, &mut place) {
        Ok(network) => network,
        Err(reason) => return refuse(tables, reason),
    };
    let result = decide(frame, network);
    conclude(frame, tables, settings, &network.headers, result)
}

/// Ends a packet's way: as decided, counted with a reason, answered as too big, or in the stage that takes it over.
#[inline(always)]
pub fn conclude<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    result: Result<(Verdict, Outcome), Refusal>,
) -> (Verdict, Outcome) {
    match result {
        Ok(done) => done,
        Err(Refusal::Reason(reason)) => refuse(tables, reason),
        Err(Refusal::TooBig(mtu)) => refuse(tables, too_big(frame, tables, settings, headers, mtu)),
        Err(Refusal::Stage(index)) => (Verdict::Stage(index), Outcome::Not(Reason::StageMissing)),
    }
}
