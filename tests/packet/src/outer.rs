//! What an encapsulated packet must look like, written byte by byte from the RFCs and from what
//! ARCHITECTURE.md says of hashes; none of the code under test is used.

use crate::build::{Packet, checksum};
use lb_common::{Backend, backend::mode, is_mapped};

/// Seed of the tests' services.
pub const SEED: [u64; 2] = [0x1234_5678, 0x9abc_def0];

/// MurmurHash3's 64-bit finalizer.
fn fmix64(mut k: u64) -> u64 {
    k ^= k >> 33;
    k = k.wrapping_mul(0xff51afd7ed558ccd);
    k ^= k >> 33;
    k = k.wrapping_mul(0xc4ceb9fe1a85ec53);
    k ^ (k >> 33)
}

/// Keyed hash of a packet's 5-tuple.
pub fn flow_hash(seed: [u64; 2], packet: &Packet) -> u64 {
    let (s, d) = (&packet.source.0, &packet.destination.0);
    let words = if is_mapped(d) { [&s[12..], &d[12..]].concat() } else { [&s[..], &d[..]].concat() };
    let mut h = seed[0];
    for word in words.chunks(8) {
        h = fmix64(h ^ u64::from_be_bytes(word.try_into().expect("eight bytes")));
    }
    let ports =
        u64::from(packet.protocol) << 32 | u64::from(packet.source.1) << 16 | u64::from(packet.destination.1);
    fmix64(h.wrapping_add(seed[1]) ^ ports)
}

/// The Ethernet header towards a backend, by its own next hop, in front of an IPv4 or IPv6 packet.
pub fn ethernet_of(backend: &Backend, is_v4: bool) -> Vec<u8> {
    let mut frame = [backend.next_hop, backend.egress_mac].concat();
    if backend.vlan.get() != 0 {
        frame.extend([0x81, 0x00]);
        frame.extend(backend.vlan.to_bytes());
    }
    frame.extend(if is_v4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    frame
}

/// The same in front of a tunnel.
pub fn ethernet(backend: &Backend) -> Vec<u8> {
    ethernet_of(backend, is_mapped(&backend.address))
}

/// The packet in its tunnel, from the outer IP header on.
pub fn tunnel(packet: &Packet, backend: &Backend) -> Vec<u8> {
    tunnel_of(packet, packet.ip(), backend)
}

/// The same for another IP packet that belongs to the packet's flow.
pub fn tunnel_of(packet: &Packet, mut inner: Vec<u8>, backend: &Backend) -> Vec<u8> {
    let hash = flow_hash(SEED, packet);
    let mut protocol = if is_mapped(&packet.destination.0) { 4 } else { 41 };
    if backend.mode == mode::GUE {
        let mut udp = (0xc000 | (hash & 0x3fff) as u16).to_be_bytes().to_vec();
        udp.extend(backend.port.to_bytes());
        udp.extend(((inner.len() + 12) as u16).to_be_bytes());
        udp.extend([0, 0]);
        udp.extend([0, protocol, 0, 0]);
        inner.splice(0..0, udp);
        protocol = 17;
    }
    let mut source = backend.source;
    for bit in 0..usize::from(backend.source_bits) {
        source[15 - bit / 8] |= ((hash >> bit & 1) as u8) << (bit % 8);
    }
    let mut outer = if is_mapped(&backend.address) {
        let mut ip = vec![0x45, packet.tos];
        ip.extend(((20 + inner.len()) as u16).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        ip.extend(&source[12..]);
        ip.extend(&backend.address[12..]);
        let check = (!checksum(&ip)).to_be_bytes();
        ip[10..12].copy_from_slice(&check);
        ip
    } else {
        let label = (hash & 0xf_ffff) as u32;
        let mut ip = (6 << 28 | u32::from(packet.tos) << 20 | label).to_be_bytes().to_vec();
        ip.extend((inner.len() as u16).to_be_bytes());
        ip.extend([protocol, 64]);
        ip.extend(source);
        ip.extend(backend.address);
        ip
    };
    outer.extend(inner);
    outer
}

/// The whole frame towards a backend.
pub fn encapsulated(packet: &Packet, backend: &Backend) -> Vec<u8> {
    if backend.mode == mode::L2 {
        return [ethernet_of(backend, is_mapped(&packet.destination.0)), packet.ip()].concat();
    }
    [ethernet(backend), tunnel(packet, backend)].concat()
}

/// The answer to a packet that is too big: the packet's own Ethernet header turned round, and an ICMP
/// error that quotes its first 512 bytes.
pub fn too_big(packet: &Packet, mtu: u16) -> Vec<u8> {
    error(packet, ([3, 4], [2, 0], mtu), &packet.ip()[..512])
}

/// The answer to a datagram that no backend takes: port unreachable, which quotes its headers.
pub fn port_unreachable(packet: &Packet) -> Vec<u8> {
    let headers = packet.ip().len() - packet.payload.len();
    error(packet, ([3, 3], [1, 4], 0), &packet.ip()[..headers])
}

/// The answer to a segment that no backend takes: a reset, with sequence number, acknowledgement number and flags.
pub fn reset(packet: &Packet, sequence: u32, acknowledgement: u32, flags: u8) -> Vec<u8> {
    let mut tcp = [packet.destination.1.to_be_bytes(), packet.source.1.to_be_bytes()].concat();
    tcp.extend([sequence.to_be_bytes(), acknowledgement.to_be_bytes()].concat());
    tcp.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    answer(packet, 6, 0x40, tcp, 16, true)
}

/// An ICMP error with a type and code for either family, and an MTU.
fn error(packet: &Packet, (v4, v6, mtu): ([u8; 2], [u8; 2], u16), quoted: &[u8]) -> Vec<u8> {
    let is_ipv4 = is_mapped(&packet.destination.0);
    let [kind, code] = if is_ipv4 { v4 } else { v6 };
    let mtu = mtu.to_be_bytes();
    let icmp = [&[kind, code, 0, 0, 0, 0, mtu[0], mtu[1]], quoted].concat();
    answer(packet, if is_ipv4 { 1 } else { 58 }, 0, icmp, 2, !is_ipv4)
}

/// The packet's Ethernet header turned round, an IP header from the VIP to the client, and what it carries, whose checksum
/// is at `check_at` and may cover a pseudo-header.
fn answer(
    packet: &Packet,
    protocol: u8,
    fragment: u8,
    mut l4: Vec<u8>,
    check_at: usize,
    has_pseudo_header: bool,
) -> Vec<u8> {
    let (vip, client) = (&packet.destination.0, &packet.source.0);
    let l2 = packet.ethernet();
    let mut frame = [&l2[6..12], &l2[..6], &l2[12..]].concat();
    let len = l4.len() as u16;
    let ends = if is_mapped(vip) { [&vip[12..], &client[12..]] } else { [&vip[..], &client[..]] }.concat();
    let pseudo_header = [&ends[..], &u32::from(len).to_be_bytes(), &[0, 0, 0, protocol]].concat();
    let pseudo_header = if has_pseudo_header { &pseudo_header[..] } else { &[] };
    let check = (!checksum(&[pseudo_header, &l4].concat())).to_be_bytes();
    l4[check_at..check_at + 2].copy_from_slice(&check);
    if is_mapped(vip) {
        let total = (len + 20).to_be_bytes();
        let mut ip = vec![0x45, 0, total[0], total[1], 0, 0, fragment, 0, 64, protocol, 0, 0];
        ip.extend(ends);
        let check = (!checksum(&ip)).to_be_bytes();
        ip[10..12].copy_from_slice(&check);
        frame.extend(ip);
    } else {
        let len = len.to_be_bytes();
        frame.extend([0x60, 0, 0, 0, len[0], len[1], protocol, 64]);
        frame.extend(ends);
    }
    frame.extend(l4);
    frame
}

#[cfg(test)]
mod tests {
    #[test]
    fn murmur3_test_vector() {
        assert_eq!(super::fmix64(1), 0xb456_bcfc_34c2_cb2c);
    }
}
