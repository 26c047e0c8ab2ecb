//! ICMP errors about encapsulated packets that are too large. Pure.
//!
//! Sources: RFC 792, RFC 1191, RFC 4443.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Type of ICMP "destination unreachable"; code 4 is "fragmentation needed".
pub const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
/// Type of ICMPv6 "packet too big".
pub const PACKET_TOO_BIG: u8 = 2;
/// Protocols of outer packets: IPv4, IPv6 and UDP (GUE).
const CARRIERS: [u8; 3] = [4, 41, 17];
/// MTUs of links to try where a router names none (RFC 1191 section 7.1), descending.
const PLATEAUS: [u32; 10] = [32_000, 17_914, 8_166, 4_352, 2_002, 1_492, 1_006, 508, 296, 68];

/// A router has no room for a packet to this destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// Destination of the packet.
    pub destination: IpAddr,
    /// Largest IP packet that the router passes on.
    pub mtu: u32,
    /// Length of the packet.
    pub len: u32,
}

/// An IPv4 packet with an ICMP error.
pub fn parse_v4(packet: &[u8]) -> Option<TooBig> {
    let icmp = packet.get(ipv4_header_len(packet)?..)?;
    if (*icmp.first()?, *icmp.get(1)?) != (UNREACHABLE, FRAGMENTATION_NEEDED) {
        return None;
    }
    let quoted = icmp.get(8..)?;
    ipv4_header_len(quoted)?;
    let (len, protocol) = (u32::from(be16(quoted, 2)?), *quoted.get(9)?);
    let destination: [u8; 4] = quoted.get(16..20)?.try_into().ok()?;
    let mtu = match u32::from(be16(icmp, 6)?) {
        0 => PLATEAUS.into_iter().find(|&mtu| mtu < len)?,
        mtu => mtu,
    };
    CARRIERS.contains(&protocol).then(|| TooBig { destination: Ipv4Addr::from(destination).into(), mtu, len })
}

/// An ICMPv6 message.
pub fn parse_v6(icmp: &[u8]) -> Option<TooBig> {
    if *icmp.first()? != PACKET_TOO_BIG {
        return None;
    }
    let mtu = u32::from_be_bytes(icmp.get(4..8)?.try_into().ok()?);
    let quoted = icmp.get(8..)?;
    let destination: [u8; 16] = quoted.get(24..40)?.try_into().ok()?;
    let is_ours = quoted[0] >> 4 == 6 && CARRIERS.contains(&quoted[6]);
    let len = u32::from(be16(quoted, 4)?) + 40;
    is_ours.then(|| TooBig { destination: Ipv6Addr::from(destination).into(), mtu, len })
}

fn ipv4_header_len(packet: &[u8]) -> Option<usize> {
    let first = *packet.first()?;
    let len = usize::from(first & 0x0f) * 4;
    (first >> 4 == 4 && len >= 20 && packet.len() >= len).then_some(len)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An IPv4 header of a packet of 1,600 bytes to 10.1.1.2.
    fn ipv4(protocol: u8) -> Vec<u8> {
        let mut header =
            vec![0x45, 0, 0x06, 0x40, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 1, 1, 2];
        header.extend([0; 8]);
        header
    }

    fn v4(mtu: u16, protocol: u8) -> Vec<u8> {
        let mut packet = ipv4(1)[..20].to_vec();
        packet.extend([UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0]);
        packet.extend(mtu.to_be_bytes());
        packet.extend(ipv4(protocol));
        packet
    }

    fn v6(mtu: u32, next: u8) -> Vec<u8> {
        let mut packet = vec![PACKET_TOO_BIG, 0, 0, 0];
        packet.extend(mtu.to_be_bytes());
        packet.extend([0x60, 0, 0, 0, 0x05, 0xf0, next, 64]);
        packet.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("fd00:1::2".parse::<Ipv6Addr>().unwrap().octets());
        packet
    }

    #[test]
    fn outer_packets_of_tunnels_are_found() {
        for protocol in CARRIERS {
            let expected = TooBig { destination: "10.1.1.2".parse().unwrap(), mtu: 1_500, len: 1_600 };
            assert_eq!(parse_v4(&v4(1_500, protocol)), Some(expected));
            let expected = TooBig { destination: "fd00:1::2".parse().unwrap(), mtu: 1_500, len: 1_560 };
            assert_eq!(parse_v6(&v6(1_500, protocol)), Some(expected));
        }
        assert_eq!(parse_v4(&v4(1_500, 6)), None);
        assert_eq!(parse_v6(&v6(1_500, 6)), None);
    }

    #[test]
    fn a_router_without_a_number_makes_it_the_next_plateau() {
        assert_eq!(parse_v4(&v4(0, 4)).unwrap().mtu, 1_492);
    }

    #[test]
    fn other_messages_and_short_ones_say_nothing() {
        let mut other = v4(1_500, 4);
        other[21] = 1;
        assert_eq!(parse_v4(&other), None);
        for len in 0..v4(1_500, 4).len() - 8 {
            assert_eq!(parse_v4(&v4(1_500, 4)[..len]), None, "{len}");
        }
        for len in 0..v6(1_500, 4).len() {
            assert_eq!(parse_v6(&v6(1_500, 4)[..len]), None, "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (parse_v4(&bytes), parse_v6(&bytes));
        }
    }
}
