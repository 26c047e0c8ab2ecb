//! Builds packets by hand, and reads them back with etherparse as an independent judge.

use lb_common::{Address, is_mapped, service::TCP};

/// VLAN tags of a packet: none, one (802.1Q), two (802.1ad + 802.1Q).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vlan {
    /// Untagged.
    None,
    /// Tag 100.
    One,
    /// Service tag 200, tag 100.
    Two,
}

impl Vlan {
    /// Length of the Ethernet header with them.
    pub fn l2_len(self) -> usize {
        match self {
            Self::None => 14,
            Self::One => 18,
            Self::Two => 22,
        }
    }
}

/// A TCP or UDP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Tags.
    pub vlan: Vlan,
    /// Client.
    pub source: (Address, u16),
    /// VIP.
    pub destination: (Address, u16),
    /// Protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub flags: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4's don't-fragment bit.
    pub dont_fragment: bool,
    /// IPv4 options (a multiple of 4 bytes), or IPv6 extension headers as (type, bytes).
    pub options: Vec<u8>,
    /// IPv6 extension headers: type, and its bytes from the length byte on; in order.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Payload.
    pub payload: Vec<u8>,
}

/// Sequence number of every TCP packet.
pub const SEQUENCE: u32 = 0x0102_0304;
/// Acknowledgement number of every TCP packet.
pub const ACKNOWLEDGED: u32 = 0x0506_0708;
/// MAC of the host under test.
pub const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC of whoever sent the packet.
pub const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Packet {
    /// A packet of this protocol between these.
    pub fn new(protocol: u8, source: (Address, u16), destination: (Address, u16)) -> Self {
        Self {
            vlan: Vlan::None,
            source,
            destination,
            protocol,
            flags: 0x10,
            tos: 0,
            ttl: 61,
            dont_fragment: true,
            options: Vec::new(),
            extensions: Vec::new(),
            payload: b"hello, worker".to_vec(),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = self.ethernet();
        frame.extend(self.ip());
        frame
    }

    /// Its Ethernet header.
    pub fn ethernet(&self) -> Vec<u8> {
        let mut frame = [HOST_MAC, PEER_MAC].concat();
        match self.vlan {
            Vlan::None => {}
            Vlan::One => frame.extend([0x81, 0x00, 0x00, 100]),
            Vlan::Two => frame.extend([0x88, 0xa8, 0x00, 200, 0x81, 0x00, 0x00, 100]),
        }
        frame.extend(if is_mapped(&self.destination.0) { [0x08, 0x00] } else { [0x86, 0xdd] });
        frame
    }

    /// Its IP packet.
    pub fn ip(&self) -> Vec<u8> {
        if is_mapped(&self.destination.0) { self.ipv4() } else { self.ipv6() }
    }

    /// A frame with this packet's addresses whose IP payload is its payload, of another protocol: an
    /// outer header around something.
    pub fn around(&self, protocol: u8) -> Vec<u8> {
        let payload = &self.payload;
        let ip = if is_mapped(&self.destination.0) {
            self.ipv4_of(protocol, payload)
        } else {
            self.ipv6_of(protocol, payload)
        };
        [self.ethernet(), ip].concat()
    }

    fn ipv4(&self) -> Vec<u8> {
        self.ipv4_of(self.protocol, &self.transport())
    }

    fn ipv4_of(&self, protocol: u8, l4: &[u8]) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let mut ip = vec![0x40 | (header_len / 4) as u8, self.tos];
        ip.extend(((header_len + l4.len()) as u16).to_be_bytes());
        ip.extend([0x12, 0x34, if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
        ip.extend(&self.source.0[12..]);
        ip.extend(&self.destination.0[12..]);
        ip.extend(&self.options);
        let check = (!checksum(&ip)).to_be_bytes();
        ip[10..12].copy_from_slice(&check);
        ip.extend(l4);
        ip
    }

    fn ipv6(&self) -> Vec<u8> {
        self.ipv6_of(self.protocol, &self.transport())
    }

    fn ipv6_of(&self, protocol: u8, l4: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        for (i, (_, bytes)) in self.extensions.iter().enumerate() {
            payload.push(self.extensions.get(i + 1).map_or(protocol, |next| next.0));
            payload.extend(bytes);
        }
        payload.extend(l4);
        let mut ip = vec![0x60 | self.tos >> 4, self.tos << 4, 0xab, 0xcd];
        ip.extend((payload.len() as u16).to_be_bytes());
        ip.extend([self.extensions.first().map_or(protocol, |first| first.0), self.ttl]);
        ip.extend(self.source.0);
        ip.extend(self.destination.0);
        ip.extend(payload);
        ip
    }

    fn transport(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.source.1.to_be_bytes());
        l4.extend(self.destination.1.to_be_bytes());
        let check_at = if self.protocol == TCP {
            l4.extend(SEQUENCE.to_be_bytes());
            l4.extend(ACKNOWLEDGED.to_be_bytes());
            l4.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            l4.extend(((self.payload.len() + 8) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        };
        l4.extend(&self.payload);
        let (s, d) = (&self.source.0, &self.destination.0);
        let mut pseudo = if is_mapped(d) { [&s[12..], &d[12..]].concat() } else { [&s[..], &d[..]].concat() };
        pseudo.extend((l4.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, self.protocol]);
        pseudo.extend(&l4);
        l4[check_at..check_at + 2].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
        l4
    }
}

/// Folded one's complement sum (RFC 1071), computed the plain way.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the bytes, their checksum field included, sum up to all ones.
pub fn checksum_is_right(bytes: &[u8]) -> bool {
    checksum(bytes) == 0xffff
}
