//! The frames that are fed to the programs.

use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader, ip_number};
use lb_common::{Address, is_mapped};

/// IP version of a client's packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As in a row's name.
    pub fn label(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// An address of this family that ends in these two bytes.
    pub fn address(self, high: u8, low: u8) -> Address {
        match self {
            Self::V4 => lb_common::mapped([192, 168, high, low]),
            Self::V6 => [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low],
        }
    }

    fn ip_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// What a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A segment of an established TCP flow.
    Established,
    /// A TCP SYN.
    Syn,
    /// A datagram.
    Udp,
    /// An echo request to the VIP.
    Echo,
}

impl Kind {
    /// As in a row's name.
    pub fn label(self) -> &'static str {
        match self {
            Self::Established => "tcp-established",
            Self::Syn => "tcp-syn",
            Self::Udp => "udp",
            Self::Echo => "icmp-echo",
        }
    }
}

/// A frame, and where the client stands in it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The frame without FCS.
    pub bytes: Vec<u8>,
    /// Length of its headers.
    pub headers: usize,
    /// Offset of the low 32 bits of the client's address.
    pub source_at: usize,
    /// Offset of the client's port.
    pub port_at: usize,
}

/// The host under test.
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Whoever sends.
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Length of all frames that are not encapsulated: the shortest that Ethernet carries on v4 (with its
/// FCS that is one of 68), and what the v6 headers need.
const V4_LEN: usize = 64;
const V6_LEN: usize = 80;

impl Frame {
    /// A client's packet to this service.
    pub fn new(family: Family, kind: Kind, vip: Address, port: u16) -> Self {
        Self::of_flow(family, kind, (family.address(99, 1), 0x8000), (vip, port))
    }

    /// A packet of the flow from a client to a VIP.
    pub fn of_flow(family: Family, kind: Kind, client: (Address, u16), vip: (Address, u16)) -> Self {
        let ethernet = PacketBuilder::ethernet2(PEER_MAC, HOST_MAC);
        let step = match family {
            Family::V4 => ethernet.ipv4(tail(client.0), tail(vip.0), 61),
            Family::V6 => ethernet.ipv6(client.0, vip.0, 61),
        };
        let l4_len = if matches!(kind, Kind::Udp | Kind::Echo) { 8 } else { 20 };
        let headers = 14 + family.ip_len() + l4_len;
        let total = if family == Family::V4 { V4_LEN } else { V6_LEN };
        Self {
            bytes: transport(step, family, kind, (client.1, vip.1), total - headers),
            headers,
            source_at: 14 + family.ip_len() - if family == Family::V4 { 8 } else { 20 },
            port_at: 14 + family.ip_len(),
        }
    }

    /// The same packet as a worker receives it in an outer header from `source` to `destination`;
    /// with a UDP port, in GUE.
    pub fn encapsulated(&self, source: Address, destination: Address, gue: Option<u16>) -> Self {
        let inner = &self.bytes[14..];
        let inner_protocol = if inner[0] >> 4 == 4 { 4 } else { 41 };
        let ethernet = PacketBuilder::ethernet2(PEER_MAC, HOST_MAC);
        let step = if is_mapped(&destination) {
            ethernet.ipv4(tail(source), tail(destination), 64)
        } else {
            ethernet.ipv6(source, destination, 64)
        };
        let mut bytes = Vec::new();
        match gue {
            Some(port) => {
                let payload = [&[0, inner_protocol, 0, 0], inner].concat();
                step.udp(0xc001, port).write(&mut bytes, &payload).expect("a Vec takes all");
            }
            None => {
                let protocol = if inner_protocol == 4 { ip_number::IPV4 } else { ip_number::IPV6 };
                step.write(&mut bytes, protocol, inner).expect("a Vec takes all");
            }
        }
        let outer = bytes.len() - self.bytes.len();
        Self {
            bytes,
            headers: self.headers + outer,
            source_at: self.source_at + outer,
            port_at: self.port_at + outer,
        }
    }

    /// The same packet in GUE with the backend that may have it instead, or, where there is none, as its second worker
    /// receives it, who is the last.
    pub fn chained(&self, source: Address, destination: Address, next: Option<Address>, port: u16) -> Self {
        let outer = if is_mapped(&destination) { 20 } else { 40 };
        let left_hops = if next.is_some() { [0x11, 0] } else { [0x10, 1] };
        let mut chain = [&[0x6c, 0x62], &left_hops[..]].concat();
        match next {
            Some(next) if outer == 20 => chain.extend_from_slice(&tail(next)),
            Some(next) => chain.extend_from_slice(&next),
            None => {}
        }
        chain.resize(if outer == 20 { 12 } else { 36 }, 0);
        let mut frame = self.encapsulated(source, destination, Some(port));
        let gue = 14 + outer + 8;
        frame.bytes.splice(gue + 4..gue + 4, chain.iter().copied());
        frame.bytes[gue] = (chain.len() / 4) as u8;
        // No checksum, as ours have none, and lengths to match.
        frame.bytes[gue - 2..gue].fill(0);
        for at in [gue - 4, 14 + if outer == 20 { 2 } else { 4 }] {
            let len = u16::from_be_bytes([frame.bytes[at], frame.bytes[at + 1]]) + chain.len() as u16;
            frame.bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
        }
        // What a worker changes: all that is outside, and of the inner packet its age, with the checksum over it.
        let inner = gue + 4 + chain.len();
        let changed = if next.is_some() { 0 } else { 12 };
        Self {
            headers: inner + changed,
            source_at: frame.source_at + chain.len(),
            port_at: frame.port_at + chain.len(),
            ..frame
        }
    }
}

fn transport(
    step: PacketBuilderStep<etherparse::IpHeaders>,
    family: Family,
    kind: Kind,
    (client_port, port): (u16, u16),
    payload: usize,
) -> Vec<u8> {
    let payload = vec![0x5a; payload];
    let mut bytes = Vec::new();
    let written = match kind {
        Kind::Udp => step.udp(client_port, port).write(&mut bytes, &payload),
        Kind::Echo if family == Family::V4 => step.icmpv4_echo_request(1, 2).write(&mut bytes, &payload),
        Kind::Echo => step.icmpv6_echo_request(1, 2).write(&mut bytes, &payload),
        Kind::Established | Kind::Syn => {
            let mut tcp = TcpHeader::new(client_port, port, 7, 65_535);
            tcp.syn = kind == Kind::Syn;
            tcp.ack = kind == Kind::Established;
            tcp.acknowledgment_number = if tcp.ack { 9 } else { 0 };
            step.tcp_header(tcp).write(&mut bytes, &payload)
        }
    };
    written.expect("a Vec takes all");
    bytes
}

/// The IPv4 address of a mapped one.
fn tail(address: Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
