//! Reads a frame's headers down to the ports.
//!
//! Input: a [`Frame`]. Output: [`Headers`], or the [`Reason`] for which the packet is none of ours.
//! Sources: RFC 791, RFC 8200, RFC 9293, RFC 768, IEEE 802.1Q.
//!
//! Understood are Ethernet, 802.1Q and QinQ; IPv4 with options; IPv6 with hop-by-hop, routing, destination and
//! fragment headers; TCP and UDP. Any other packet goes to the host's stack and is counted.

use crate::{
    packet::{Frame, Packet},
    packet::{
        ip::{
            MAX_EXTENSION_BYTES, MAX_EXTENSIONS,
            extension::{DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING},
            ipv4_header, ipv6_header, read_extension,
        },
        network::{ICMP, ICMPV6},
        wire::{Tcp, Udp},
    },
};
use lb_common::{
    Address, Reason,
    service::{TCP, UDP},
    settings::IngressSettings,
};

/// Ethernet header without tags.
pub const ETHERNET: usize = 14;
/// One VLAN tag.
pub const VLAN_TAG: usize = 4;
/// Ethernet type of IPv4.
pub const ETH_IPV4: u16 = 0x0800;
/// Ethernet type of IPv6.
pub const ETH_IPV6: u16 = 0x86dd;
/// Ethernet type of an IEEE 802.1Q tag.
pub const ETH_VLAN: u16 = 0x8100;
/// Ethernet type of an IEEE 802.1ad service tag.
pub const ETH_QINQ: u16 = 0x88a8;
/// Ethernet type with which some older switches mark the outer of two tags.
pub const ETH_QINQ_OLD: u16 = 0x9100;

/// TCP flag bits.
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

/// What later stages need of a packet's headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    /// Source address in network order, IPv4 as mapped.
    pub source: [u32; 4],
    /// Destination address, likewise.
    pub destination: [u32; 4],
    /// Source port, network order.
    pub source_port: u16,
    /// Destination port, network order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// TCP sequence number, host byte order; 0 for UDP.
    pub sequence: u32,
    /// TCP flags, 0 for UDP.
    pub tcp_flags: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Whether it is IPv6.
    pub is_ipv6: bool,
    /// IPv4's don't-fragment bit; true for IPv6.
    pub dont_fragment: bool,
    /// Ethernet header with tags, in bytes: 14, 18 or 22.
    pub l2_len: usize,
    /// Length of the IP packet, its header included, in bytes.
    pub ip_len: u32,
    /// Bytes behind the TCP header; of a first fragment what there may be. A number and no flag, as each value of a flag
    /// is walked by the verifier for itself. 0 for UDP.
    pub data_len: u32,
}

impl Headers {
    /// [`Headers::l2_len`] with a bound that every verifier sees.
    #[inline(always)]
    pub fn l2_len(&self) -> usize {
        self.l2_len & 0x1f
    }

    /// Whether the packet opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN
    }

    /// Whether the packet ends a TCP connection.
    #[inline(always)]
    pub fn is_closing(&self) -> bool {
        self.tcp_flags & (tcp::FIN | tcp::RST) != 0
    }

    /// Whether ICMP may be sent to the packet's source at all (RFC 1122 3.2.2, RFC 4443 2.4).
    #[inline(always)]
    pub fn is_answerable(&self) -> bool {
        if self.is_ipv6 {
            let first = u32::from_be(self.source[0]);
            first >> 24 != 0xff && (self.source[0] | self.source[1] | self.source[2] | self.source[3]) != 0
        } else {
            let first = u32::from_be(self.source[3]) >> 24;
            first != 0 && first != 127 && first < 224
        }
    }

    /// Source as the maps keep it.
    #[inline(always)]
    pub fn source_address(&self) -> Address {
        address(self.source)
    }

    /// Destination as the maps keep it.
    #[inline(always)]
    pub fn destination_address(&self) -> Address {
        address(self.destination)
    }
}

/// Four words in network order, as bytes.
#[inline(always)]
pub fn address(words: [u32; 4]) -> Address {
    // SAFETY: both are 16 plain bytes.
    unsafe { core::mem::transmute::<[u32; 4], Address>(words) }
}

/// Bytes as four words in network order.
#[inline(always)]
pub fn words(address: Address) -> [u32; 4] {
    // SAFETY: both are 16 plain bytes.
    unsafe { core::mem::transmute::<Address, [u32; 4]>(address) }
}

/// Two words as one, in memory's order.
#[inline(always)]
pub const fn pair(first: u32, second: u32) -> u64 {
    let (low, high) = if cfg!(target_endian = "big") { (second, first) } else { (first, second) };
    (high as u64) << 32 | low as u64
}

/// An IPv4 address (network order) as mapped words.
#[inline(always)]
pub const fn mapped(v4: u32) -> [u32; 4] {
    [0, 0, 0xffff_u32.to_be(), v4]
}

/// Whether these words are a mapped IPv4 address.
#[inline(always)]
pub const fn is_mapped(words: &[u32; 4]) -> bool {
    (words[0] | words[1] | words[2] ^ 0xffff_u32.to_be()) == 0
}

/// Ethernet header and tags: their length and the type of what follows.
#[inline(always)]
pub fn parse_ethernet(packet: &Packet, look_through_tags: bool) -> Result<(usize, u16), Reason> {
    let kind: u16 = packet.read(12).ok_or(Reason::Truncated)?;
    let kind = u16::from_be(kind);
    if !is_tag(kind) {
        return Ok((ETHERNET, kind));
    }
    if !look_through_tags {
        return Err(Reason::VlanOff);
    }
    let kind: u16 = packet.read(ETHERNET + 2).ok_or(Reason::Truncated)?;
    let kind = u16::from_be(kind);
    if !is_tag(kind) {
        return Ok((ETHERNET + VLAN_TAG, kind));
    }
    let kind: u16 = packet.read(ETHERNET + VLAN_TAG + 2).ok_or(Reason::Truncated)?;
    let kind = u16::from_be(kind);
    if is_tag(kind) {
        return Err(Reason::TooManyVlans);
    }
    Ok((ETHERNET + 2 * VLAN_TAG, kind))
}

#[inline(always)]
fn is_tag(kind: u16) -> bool {
    kind == ETH_VLAN || kind == ETH_QINQ || kind == ETH_QINQ_OLD
}

/// Reads a frame's headers.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, settings: &IngressSettings) -> Result<Headers, Reason> {
    let packet = frame.packet();
    let (l2_len, kind) = parse_ethernet(&packet, settings.vlan != 0)?;
    // One call per length, so that the offsets of the common case are constants.
    match (kind, l2_len) {
        (ETH_IPV4, ETHERNET) => parse_ipv4(frame, &packet, ETHERNET),
        (ETH_IPV4, _) => parse_ipv4(frame, &packet, l2_len),
        (ETH_IPV6, _) if settings.ipv6 == 0 => Err(Reason::Ipv6Off),
        (ETH_IPV6, ETHERNET) => parse_ipv6(frame, &packet, ETHERNET),
        (ETH_IPV6, _) => parse_ipv6(frame, &packet, l2_len),
        _ => Err(Reason::NotIp),
    }
}

/// Whether the frame holds `len` bytes, parts outside the linear one included.
#[inline(always)]
fn holds<F: Frame>(frame: &F, packet: &Packet, len: usize) -> bool {
    packet.len() >= len || frame.total_len() >= len
}

#[inline(always)]
fn parse_ipv4<F: Frame>(frame: &F, packet: &Packet, l3: usize) -> Result<Headers, Reason> {
    let ip = ipv4_header(packet, l3)?;
    if !holds(frame, packet, l3 + ip.headers.ip_len as usize) {
        return Err(Reason::Truncated);
    }
    // More fragments, or an offset.
    if ip.fragment & 0x3fff != 0 {
        return Err(Reason::Fragment);
    }
    let (len, payload) = (ip.len, ip.payload());
    let mut headers = ip.headers;
    if len == 20 {
        parse_transport(packet, l3 + 20, payload, &mut headers)?;
    } else {
        parse_transport(packet, l3 + len, payload, &mut headers)?;
    }
    Ok(headers)
}

#[inline(always)]
fn parse_ipv6<F: Frame>(frame: &F, packet: &Packet, l3: usize) -> Result<Headers, Reason> {
    let mut headers = ipv6_header(packet, l3)?;
    let payload = headers.ip_len as usize - 40;
    if !holds(frame, packet, l3 + 40 + payload) {
        return Err(Reason::Truncated);
    }
    if headers.protocol == TCP || headers.protocol == UDP {
        parse_transport(packet, l3 + 40, payload, &mut headers)?;
    } else {
        let skipped = skip_extensions(packet, l3 + 40, &mut headers.protocol)?;
        if skipped > payload {
            return Err(Reason::BadIpv6);
        }
        parse_transport(packet, l3 + 40 + skipped, payload - skipped, &mut headers)?;
    }
    Ok(headers)
}

/// Length of the extension headers from `start` on; leaves what follows them in `next`.
#[inline(always)]
fn skip_extensions(packet: &Packet, start: usize, next: &mut u8) -> Result<usize, Reason> {
    let mut skipped = 0;
    for _ in 0..MAX_EXTENSIONS {
        if skipped > MAX_EXTENSION_BYTES {
            return Err(Reason::BadExtension);
        }
        match *next {
            TCP | UDP => return Ok(skipped),
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => {}
            ICMPV6 => return Err(Reason::Icmp),
            _ => return Err(Reason::OtherProtocol),
        }
        let (len, extension) = read_extension(packet, start + skipped, *next)?;
        // A fragment header with neither offset nor more to come holds a whole packet (RFC 6946).
        if *next == FRAGMENT && extension.more & 0xfff9_u16.to_be() != 0 {
            return Err(Reason::Fragment);
        }
        skipped += len;
        *next = extension.next;
    }
    match *next {
        TCP | UDP if skipped <= MAX_EXTENSION_BYTES => Ok(skipped),
        ICMPV6 => Err(Reason::Icmp),
        _ => Err(Reason::BadExtension),
    }
}

/// Ports and flags at `l4`, of which `len` bytes belong to the packet.
#[inline(always)]
pub fn parse_transport(packet: &Packet, l4: usize, len: usize, headers: &mut Headers) -> Result<(), Reason> {
    if headers.protocol == TCP {
        if len < 20 {
            return Err(Reason::BadTransport);
        }
        let tcp: Tcp = packet.read(l4).ok_or(Reason::Truncated)?;
        let data = ((tcp.offset >> 4) as usize) * 4;
        if data < 20 || data > len {
            return Err(Reason::BadTransport);
        }
        headers.source_port = tcp.source_port;
        headers.port = tcp.port;
        headers.sequence = u32::from_be(tcp.sequence);
        headers.tcp_flags = tcp.flags;
        headers.data_len = (len - data) as u32;
        Ok(())
    } else if headers.protocol == UDP {
        if len < 8 {
            return Err(Reason::BadTransport);
        }
        let udp: Udp = packet.read(l4).ok_or(Reason::Truncated)?;
        let udp_len = u16::from_be(udp.len) as usize;
        if udp_len < 8 || udp_len > len {
            return Err(Reason::BadTransport);
        }
        headers.source_port = udp.source_port;
        headers.port = udp.port;
        Ok(())
    } else if headers.protocol == ICMP && !headers.is_ipv6 {
        Err(Reason::Icmp)
    } else {
        Err(Reason::OtherProtocol)
    }
}
