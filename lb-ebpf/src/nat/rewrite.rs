//! Writes new addresses and ports into a packet and mends its checksums for just these words (RFC 1624).
//!
//! A sender that leaves the checksum to its network card writes the sum of the pseudo-header in its place; a real
//! card then completes it, a virtual interface does not. Such a packet would be right for this host's stack, which
//! knows, and wrong for whoever it is redirected to, who does not. So where the field holds just that sum, the
//! checksum is completed here: the one case in which the payload is read.
//!
//! `XDP_REDIRECT` loses the information that a checksum is incomplete, hence the completion. If the field held a
//! whole checksum that equals the pseudo-header's sum by chance, the result would be the same.

use super::NatTables;
use crate::{
    Frame,
    packet::{
        csum,
        network::Network,
        parse::Headers,
        wire::{Ipv4, Ipv6},
    },
};
use lb_common::{
    Reason,
    service::{TCP, UDP},
};

/// New addresses and ports, network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Source address, IPv4 as mapped.
    pub source: [u32; 4],
    /// Destination address, likewise.
    pub destination: [u32; 4],
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub port: u16,
}

/// What addresses contribute to a sum.
#[inline(always)]
pub fn sum_addresses(is_ipv6: bool, source: &[u32; 4], destination: &[u32; 4]) -> u64 {
    let mut sum = source[3] as u64 + destination[3] as u64;
    if is_ipv6 {
        // Indexed: the verifier does not follow an iterator over two arrays.
        for i in 0..3 {
            sum += source[i] as u64 + destination[i] as u64;
        }
    }
    sum
}

/// What a change of addresses adds to a sum: the complements of the old words, and the new ones.
#[inline(always)]
pub fn change_of_addresses(is_ipv6: bool, old: (&[u32; 4], &[u32; 4]), new: (&[u32; 4], &[u32; 4])) -> u64 {
    let (source, destination) = (old.0.map(|w| !w), old.1.map(|w| !w));
    sum_addresses(is_ipv6, &source, &destination) + sum_addresses(is_ipv6, new.0, new.1)
}

/// What a change of one word adds to a sum.
#[inline(always)]
pub const fn change(old: u16, new: u16) -> u64 {
    (!old) as u64 + new as u64
}

/// A checksum to whose sum `change` is added.
#[inline(always)]
pub const fn adjusted(check: u16, change: u64) -> u16 {
    csum::finish((!check) as u64 + change)
}

/// Rewrites a packet whose ports are known, and takes one from its TTL, as a router does.
#[inline(always)]
pub fn rewrite<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    network: &Network,
    to: &Rewrite,
) -> Result<(), Reason> {
    let headers = &network.headers;
    let addresses = change_of_addresses(
        headers.is_ipv6,
        (&headers.source, &headers.destination),
        (&to.source, &to.destination),
    );
    network_header(frame, network, to.source, to.destination, addresses)?;
    let place = check_place(network);
    let Some(check) = ports(frame, network, place, to)? else { return Ok(()) };
    let pseudo = (headers.protocol as u16).to_be() as u64 + (network.l4_len as u16).to_be() as u64;
    let old = sum_addresses(headers.is_ipv6, &headers.source, &headers.destination);
    let new = if csum::fold(pseudo + old) == check {
        let addresses = sum_addresses(headers.is_ipv6, &to.source, &to.destination);
        complete(frame, tables, network, place, pseudo + addresses)?
    } else {
        adjusted(check, addresses + change_of_ports(headers, to))
    };
    write_check(frame, headers, place, new)
}

/// The same for a part of a packet. The checksum is the whole packet's and lies in the first part, which alone has
/// ports; its sender has completed it, as cards do not fragment.
#[inline(always)]
pub fn rewrite_part<F: Frame>(
    frame: &mut F,
    network: &Network,
    to: &Rewrite,
    is_first: bool,
) -> Result<(), Reason> {
    let headers = &network.headers;
    let addresses = change_of_addresses(
        headers.is_ipv6,
        (&headers.source, &headers.destination),
        (&to.source, &to.destination),
    );
    network_header(frame, network, to.source, to.destination, addresses)?;
    if !is_first {
        return Ok(());
    }
    let place = check_place(network);
    let Some(check) = ports(frame, network, place, to)? else { return Ok(()) };
    write_check(frame, headers, place, adjusted(check, addresses + change_of_ports(headers, to)))
}

/// Where the transport checksum lies.
#[inline(always)]
fn check_place(network: &Network) -> usize {
    match network.headers.protocol {
        TCP => network.l4() + 16,
        _ => network.l4() + 6,
    }
}

/// Writes new ports; the checksum as it was, if there is one (RFC 768), and so one to mend.
#[inline(always)]
fn ports<F: Frame>(
    frame: &mut F,
    network: &Network,
    place: usize,
    to: &Rewrite,
) -> Result<Option<u16>, Reason> {
    let mut packet = frame.packet();
    let check: u16 = packet.read(place).ok_or(Reason::Truncated)?;
    if !packet.write(network.l4(), [to.source_port, to.port]) {
        return Err(Reason::Truncated);
    }
    Ok((check != 0 || network.headers.protocol != UDP).then_some(check))
}

#[inline(always)]
fn change_of_ports(headers: &Headers, to: &Rewrite) -> u64 {
    change(headers.source_port, to.source_port) + change(headers.port, to.port)
}

#[inline(always)]
fn write_check<F: Frame>(frame: &mut F, headers: &Headers, place: usize, new: u16) -> Result<(), Reason> {
    let new = if new == 0 && headers.protocol == UDP { 0xffff } else { new };
    if frame.packet().write(place, new) { Ok(()) } else { Err(Reason::Truncated) }
}

/// New addresses, TTL and header checksum of a packet; `addresses` is their change.
#[inline(always)]
pub fn network_header<F: Frame>(
    frame: &mut F,
    network: &Network,
    source: [u32; 4],
    destination: [u32; 4],
    addresses: u64,
) -> Result<(), Reason> {
    let mut packet = frame.packet();
    let l3 = network.headers.l2_len();
    let written = if network.headers.is_ipv6 {
        let ip: Ipv6 = packet.read(l3).ok_or(Reason::Truncated)?;
        if ip.hop_limit <= 1 {
            return Err(Reason::NatTtl);
        }
        let hop_limit = ip.hop_limit - 1;
        packet.write(l3, Ipv6 { hop_limit, source, destination, ..ip })
    } else {
        let ip: Ipv4 = packet.read(l3).ok_or(Reason::Truncated)?;
        if ip.ttl <= 1 {
            return Err(Reason::NatTtl);
        }
        let ttl = ip.ttl - 1;
        let word = |ttl| u16::from_ne_bytes([ttl, ip.protocol]);
        let check = adjusted(ip.check, addresses + change(word(ip.ttl), word(ttl)));
        packet.write(l3, Ipv4 { ttl, check, source: source[3], destination: destination[3], ..ip })
    };
    if written { Ok(()) } else { Err(Reason::Truncated) }
}

/// The whole checksum of a packet with new ports, over the sum of its new pseudo-header.
#[inline(always)]
fn complete<F: Frame, T: NatTables>(
    frame: &mut F,
    tables: &T,
    network: &Network,
    place: usize,
    pseudo: u64,
) -> Result<u16, Reason> {
    if !frame.packet().write(place, 0u16) {
        return Err(Reason::Truncated);
    }
    let sum = tables.sum(frame, network.l4(), network.l4_len).ok_or(Reason::Truncated)?;
    tables.count(Reason::NatCompleted);
    Ok(csum::finish(pseudo + sum as u64))
}
