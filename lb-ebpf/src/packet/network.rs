//! Reads a frame's headers down to what IP carries, whatever that is; for the stages that look at ICMP, at
//! fragments and at errors' quotes. [`crate::packet::parse`] is the hot path's own, down to the ports.
//!
//! Input: a [`Frame`]. Output: [`Network`], or the [`Reason`] for which the packet is none of ours.
//! Sources: RFC 791, RFC 8200.

use crate::{
    packet::{Frame, MAX_OFFSET, Packet},
    packet::{
        ip::{
            MAX_EXTENSION_BYTES, MAX_EXTENSIONS,
            extension::{DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING},
            ipv4_header, ipv6_header, read_extension,
        },
        parse::{ETH_IPV4, ETH_IPV6, Headers, parse_ethernet},
    },
};
use lb_common::{Reason, settings::IngressSettings};

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// What IP says of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Addresses, protocol and lengths; ports, flags and numbers are left zero.
    pub headers: Headers,
    /// Offset in the frame of what IP carries.
    pub l4: usize,
    /// Its length by the IP header, in bytes.
    pub l4_len: usize,
    /// Where it belongs in the whole, if it is a part of one.
    pub fragment: Option<Part>,
}

impl Network {
    /// [`Network::l4`] with a bound that every verifier sees: kernels before 6.10 do not conclude from a sum's bound to those
    /// of its terms. The parsers let no header begin farther away.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        self.l4 & MAX_OFFSET
    }
}

/// A fragment's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Identification: 16 bits of IPv4 or 32 of IPv6, as loaded.
    pub id: u32,
    /// Offset in bytes.
    pub offset: u32,
    /// Whether more parts follow it.
    pub more: bool,
}

/// Reads a frame's IP headers.
#[inline(always)]
pub fn parse_network<F: Frame>(
    frame: &F,
    settings: &IngressSettings,
    network: &mut Network,
) -> Result<(), Reason> {
    let packet = frame.packet();
    let (l2_len, kind) = parse_ethernet(&packet, settings.vlan != 0)?;
    match kind {
        ETH_IPV4 => read_ipv4(&packet, l2_len, network)?,
        ETH_IPV6 if settings.ipv6 == 0 => return Err(Reason::Ipv6Off),
        ETH_IPV6 => read_ipv6(&packet, l2_len, network)?,
        _ => return Err(Reason::NotIp),
    }
    if frame.total_len() < l2_len + network.headers.ip_len as usize {
        return Err(Reason::Truncated);
    }
    Ok(())
}

/// An IPv4 header at `l3`; it need not be followed by all that it announces.
#[inline(always)]
pub fn parse_ipv4(packet: &Packet, l3: usize) -> Result<Network, Reason> {
    let mut network = Network::default();
    read_ipv4(packet, l3, &mut network)?;
    Ok(network)
}

/// The same into a place.
#[inline(always)]
fn read_ipv4(packet: &Packet, l3: usize, network: &mut Network) -> Result<(), Reason> {
    let ip = ipv4_header(packet, l3)?;
    let part =
        Part { id: ip.id as u32, offset: (ip.fragment as u32 & 0x1fff) * 8, more: ip.fragment & 0x2000 != 0 };
    *network = Network {
        l4: l3 + ip.len,
        l4_len: ip.payload(),
        fragment: (ip.fragment & 0x3fff != 0).then_some(part),
        headers: ip.headers,
    };
    Ok(())
}

/// An IPv6 header at `l3`, and its extension headers; it need not be followed by all that it announces.
#[inline(always)]
pub fn parse_ipv6(packet: &Packet, l3: usize) -> Result<Network, Reason> {
    let mut network = Network::default();
    read_ipv6(packet, l3, &mut network)?;
    Ok(network)
}

/// The same into a place.
#[inline(always)]
fn read_ipv6(packet: &Packet, l3: usize, network: &mut Network) -> Result<(), Reason> {
    let headers = ipv6_header(packet, l3)?;
    let payload = headers.ip_len as usize - 40;
    *network = Network { headers, l4: l3 + 40, l4_len: payload, fragment: None };
    let skipped = skip_extensions(packet, l3 + 40, network)?;
    if skipped > payload {
        return Err(Reason::BadIpv6);
    }
    network.l4 += skipped;
    network.l4_len -= skipped;
    Ok(())
}

/// Length of the extension headers from `start` on; leaves what follows them in `network`. What follows a
/// fragment header is looked at only in the first part.
#[inline(always)]
fn skip_extensions(packet: &Packet, start: usize, network: &mut Network) -> Result<usize, Reason> {
    let mut skipped = 0;
    for _ in 0..MAX_EXTENSIONS {
        let next = network.headers.protocol;
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => {}
            _ => return Ok(skipped),
        }
        if skipped > MAX_EXTENSION_BYTES {
            return Err(Reason::BadExtension);
        }
        let (len, extension) = read_extension(packet, start + skipped, next)?;
        network.headers.protocol = extension.next;
        if next == FRAGMENT {
            let place = u16::from_be(extension.more);
            let id: u32 = packet.read(start + skipped + 4).ok_or(Reason::Truncated)?;
            if place & 0xfff9 != 0 {
                if network.fragment.is_some() {
                    return Err(Reason::BadExtension);
                }
                network.fragment = Some(Part { id, offset: (place & 0xfff8) as u32, more: place & 1 != 0 });
                if place & 0xfff8 != 0 {
                    return Ok(skipped + len);
                }
            }
        }
        skipped += len;
    }
    match network.headers.protocol {
        HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => Err(Reason::BadExtension),
        _ => Ok(skipped),
    }
}
