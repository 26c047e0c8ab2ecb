//! Outer headers of `ipip` and `gue`.

use super::GUE_OVERHEAD;
use crate::{
    Packet,
    packet::{
        csum,
        parse::{Headers, words},
        wire::{Gue, Ipv4, Ipv6, Udp},
    },
    second_chance::header,
};
use lb_common::{Backend, backend::mode, is_mapped, service::UDP, settings::IngressSettings};

/// IP protocol number of IPv4 in IP.
pub const PROTOCOL_IPV4: u8 = 4;
/// IP protocol number of IPv6 in IP.
pub const PROTOCOL_IPV6: u8 = 41;

/// Protocol of the inner packet.
#[inline(always)]
fn inner_protocol(headers: &Headers) -> u8 {
    if headers.is_ipv6 { PROTOCOL_IPV6 } else { PROTOCOL_IPV4 }
}

/// Protocol that the outer header names.
#[inline(always)]
pub fn protocol(backend: &Backend, headers: &Headers) -> u8 {
    if mode::is_gue(backend.mode) { UDP } else { inner_protocol(headers) }
}

/// Outer source: the backend's, with its low bits taken from the flow's hash, so that the worker's
/// NIC spreads ipip over its queues.
#[inline(always)]
pub fn source(backend: &Backend, hash: u64) -> [u32; 4] {
    varied(words(backend.source), backend.source_bits as u32, hash)
}

/// An address whose low `bits` (up to 64) are taken from the hash.
#[inline(always)]
pub fn varied(mut source: [u32; 4], bits: u32, hash: u64) -> [u32; 4] {
    if bits != 0 {
        let mask = u64::MAX >> ((64 - bits) & 63);
        let bits = hash & mask;
        source[3] |= (bits as u32).to_be();
        source[2] |= ((bits >> 32) as u32).to_be();
    }
    source
}

/// Writes the outer headers from `at` on; false if they do not fit.
#[inline(always)]
pub fn write(
    packet: &mut Packet,
    at: usize,
    settings: &IngressSettings,
    headers: &Headers,
    backend: &Backend,
    source: [u32; 4],
    hash: u64,
) -> bool {
    let inner_len = headers.ip_len as u16;
    let gue = mode::is_gue(backend.mode);
    let chain = if backend.mode == mode::GUE_CHAIN { header::len(!is_mapped(&backend.address)) } else { 0 };
    let payload = if gue { inner_len + (GUE_OVERHEAD + chain) as u16 } else { inner_len };
    let destination = words(backend.address);
    let ip_len = if is_mapped(&backend.address) {
        let ip = ipv4(settings, headers.tos, payload, protocol(backend, headers), source[3], destination[3]);
        if !packet.write(at, ip) {
            return false;
        }
        20
    } else {
        let ip = Ipv6 {
            version_class_label: (6 << 28 | (headers.tos as u32) << 20 | (hash as u32 & 0xf_ffff)).to_be(),
            payload_len: payload.to_be(),
            next: protocol(backend, headers),
            hop_limit: settings.outer_ttl,
            source,
            destination,
        };
        if !packet.write(at, ip) {
            return false;
        }
        40
    };
    // Constants again: the offset of what follows depends on a branch only.
    match (gue, ip_len) {
        (false, _) => true,
        (true, 20) => write_gue(packet, at + 20, headers, backend, payload, hash),
        (true, _) => write_gue(packet, at + 40, headers, backend, payload, hash),
    }
}

/// Outer IPv4 header. It is atomic (RFC 6864: don't fragment, so its id means nothing).
#[inline(always)]
fn ipv4(
    settings: &IngressSettings,
    tos: u8,
    payload: u16,
    protocol: u8,
    source: u32,
    destination: u32,
) -> Ipv4 {
    let total_len = payload + 20;
    let ttl = settings.outer_ttl;
    // Sum in host order of the 16-bit words; one's complement does not mind the order (RFC 1071).
    let sum = 0x4500
        + tos as u64
        + total_len as u64
        + 0x4000
        + ((ttl as u64) << 8 | protocol as u64)
        + u32::from_be(source) as u64
        + u32::from_be(destination) as u64;
    Ipv4 {
        version_len: 0x45,
        tos,
        total_len: total_len.to_be(),
        id: 0,
        fragment: 0x4000_u16.to_be(),
        ttl,
        protocol,
        check: csum::finish(sum).to_be(),
        source,
        destination,
    }
}

/// UDP and GUE. The source port varies by flow within the dynamic range (RFC 6335). No UDP checksum:
/// the inner packet has its own (RFC 6935 allows that for tunnels over IPv6 too).
#[inline(always)]
fn write_gue(
    packet: &mut Packet,
    at: usize,
    headers: &Headers,
    backend: &Backend,
    len: u16,
    hash: u64,
) -> bool {
    let udp = Udp {
        source_port: (0xc000 | (hash as u16 & 0x3fff)).to_be(),
        port: u16::from_ne_bytes(backend.port.to_bytes()),
        len: len.to_be(),
        check: 0,
    };
    let chain = if backend.mode == mode::GUE_CHAIN { header::len(!is_mapped(&backend.address)) } else { 0 };
    let gue = Gue { variant_control_len: (chain / 4) as u8, protocol: inner_protocol(headers), flags: 0 };
    if !packet.write(at, udp) || !packet.write(at + 8, gue) {
        return false;
    }
    // A chain without anybody in it, for callers that know of nobody.
    let head = [header::KIND.to_be(), u16::from_ne_bytes([header::VERSION << 4, 0])];
    match chain {
        12 => packet.write(at + 12, head) && packet.write(at + 16, [0u32; 2]),
        36 => packet.write(at + 12, head) && packet.write(at + 16, [0u32; 8]),
        _ => true,
    }
}
