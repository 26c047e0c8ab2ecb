//! The fixed IP headers and one step over an IPv6 extension header, for both parsers: [`super::parse`], down to the
//! ports, and [`super::network`], down to whatever IP carries.
//!
//! Sources: RFC 791, RFC 8200, RFC 6946.

use super::{
    Packet,
    parse::{Headers, is_mapped, mapped},
    wire::{Extension, Ipv4, Ipv6},
};
use lb_common::Reason;

/// IPv6 extension headers that are looked through before giving up.
pub const MAX_EXTENSIONS: usize = 6;
/// Bytes from the IPv6 header on within which the transport header must begin.
pub const MAX_EXTENSION_BYTES: usize = 400;

/// An IPv4 header.
pub struct Ipv4Header {
    /// Addresses, protocol and length.
    pub headers: Headers,
    /// Length with options, in bytes.
    pub len: usize,
    /// Identification, as loaded.
    pub id: u16,
    /// Flags and fragment offset (in units of 8 bytes), in host order.
    pub fragment: u16,
}

impl Ipv4Header {
    /// Length of what follows the header, in bytes.
    #[inline(always)]
    pub fn payload(&self) -> usize {
        self.headers.ip_len as usize - self.len
    }
}

/// Reads an IPv4 header; it need not be followed by all that it announces.
#[inline(always)]
pub fn ipv4_header(packet: &Packet, l3: usize) -> Result<Ipv4Header, Reason> {
    let ip: Ipv4 = packet.read(l3).ok_or(Reason::Truncated)?;
    let len = ((ip.version_len & 0x0f) as usize) * 4;
    let ip_len = u16::from_be(ip.total_len) as usize;
    if ip.version_len >> 4 != 4 || len < 20 || ip_len < len {
        return Err(Reason::BadIpv4);
    }
    let fragment = u16::from_be(ip.fragment);
    let headers = Headers {
        source: mapped(ip.source),
        destination: mapped(ip.destination),
        protocol: ip.protocol,
        tos: ip.tos,
        dont_fragment: fragment & 0x4000 != 0,
        l2_len: l3,
        ip_len: ip_len as u32,
        ..Headers::default()
    };
    Ok(Ipv4Header { headers, len, id: ip.id, fragment })
}

/// Reads an IPv6 header; it need not be followed by all that it announces. The protocol is that of its next header.
#[inline(always)]
pub fn ipv6_header(packet: &Packet, l3: usize) -> Result<Headers, Reason> {
    let ip: Ipv6 = packet.read(l3).ok_or(Reason::Truncated)?;
    let version_class = u32::from_be(ip.version_class_label) >> 20;
    // Mapped addresses are never on the wire (RFC 4291 2.5.5.2), and to the maps they would be those of IPv4.
    if version_class >> 8 != 6 || is_mapped(&ip.source) || is_mapped(&ip.destination) {
        return Err(Reason::BadIpv6);
    }
    Ok(Headers {
        source: ip.source,
        destination: ip.destination,
        protocol: ip.next,
        tos: version_class as u8,
        is_ipv6: true,
        dont_fragment: true,
        l2_len: l3,
        ip_len: (u16::from_be(ip.payload_len) as usize + 40) as u32,
        ..Headers::default()
    })
}

/// Extension headers that are looked through, by their protocol numbers.
pub mod extension {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
}

/// Length of the extension header `kind` at `at`, and its first four bytes.
#[inline(always)]
pub fn read_extension(packet: &Packet, at: usize, kind: u8) -> Result<(usize, Extension), Reason> {
    let read: Extension = packet.read(at).ok_or(Reason::Truncated)?;
    if kind == extension::FRAGMENT {
        return Ok((8, read));
    }
    // Segments left: the VIP is only a stop on the packet's way.
    if kind == extension::ROUTING && read.more & 0x00ff_u16.to_be() != 0 {
        return Err(Reason::BadExtension);
    }
    let len = (read.len as usize + 1) * 8;
    Ok((len, read))
}
