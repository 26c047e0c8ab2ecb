//! One check per fuzzer: bytes in, panic if a promise is broken. Inputs are frames as they arrive.

pub mod chance;
pub mod decap;
pub mod ingress;
pub mod mutate;
pub mod parse;
pub mod stages;

use lb_common::{Address, VipKey, reason::Fate};
use lb_ebpf::{native::HashTables, packet::verdict::Outcome};
use std::net::Ipv6Addr;

/// Folded one's complement sum (RFC 1071), computed the plain way.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An address written in words, IPv4 as mapped.
pub fn v4(a: u8, b: u8, c: u8, d: u8) -> Address {
    lb_common::mapped([a, b, c, d])
}

/// An IPv6 address of the documentation prefix that ends in these two bytes.
pub fn v6(a: u8, b: u8) -> Address {
    [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b]
}

/// Length of the Ethernet header with up to two tags, of a frame that holds it.
pub fn l2_len(data: &[u8]) -> usize {
    let is_tag = |at: usize| matches!(data.get(at..at + 2), Some([0x81, 0] | [0x88, 0xa8] | [0x91, 0]));
    match (is_tag(12), is_tag(16)) {
        (true, true) => 22,
        (true, false) => 18,
        _ => 14,
    }
}

/// Whether a frame holds an IP packet to a VIP from an address that cannot be its sender's: one that no host has, or a VIP.
/// Read by the standard library's words, not by the code under test.
pub fn cannot_be(tables: &HashTables, data: &[u8]) -> bool {
    let l2_len = l2_len(data);
    let Some(kind) = data.get(l2_len - 2..l2_len) else { return false };
    let addresses = match kind {
        [8, 0] => data.get(l2_len + 12..l2_len + 20).map(|bytes| {
            let at = |i: usize| v4(bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]);
            (at(0), at(4))
        }),
        [0x86, 0xdd] => data.get(l2_len + 8..l2_len + 40).map(|bytes| {
            let at = |i: usize| bytes[i..i + 16].try_into().expect("16 bytes");
            (at(0), at(16))
        }),
        _ => None,
    };
    let Some((source, destination)) = addresses else { return false };
    let is_vip = |address: Address| tables.vips.contains_key(&VipKey { vip: address });
    let v6 = Ipv6Addr::from(source);
    let is_martian = match v6.to_ipv4_mapped() {
        Some(v4) => v4.is_loopback() || v4.is_multicast() || v4.octets()[0] == 0 || v4.octets()[0] >= 240,
        None => v6.is_unspecified() || v6.is_loopback() || v6.is_multicast() || v6.segments()[..6] == [0; 6],
    };
    is_vip(destination) && (is_martian || is_vip(source))
}

/// Such a packet is dropped, or is none that anybody could read and the host's.
pub fn is_taken_for_what_it_is(tables: &HashTables, data: &[u8], outcome: Outcome) {
    if cannot_be(tables, data) {
        let is_refused =
            matches!(outcome, Outcome::Not(reason) if matches!(reason.fate(), Fate::Pass | Fate::Drop));
        assert!(is_refused, "{outcome:?}, though nobody can have sent it");
    }
}
