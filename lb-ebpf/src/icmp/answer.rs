//! Turns a frame round: Ethernet addresses swapped, new IP header from the VIP to the sender, and where wanted an ICMP
//! error (RFC 792, RFC 4443) that quotes the frame. The answer leaves by the interface that the frame came in by.

use crate::{
    Frame,
    packet::{
        csum,
        network::{ICMP, ICMPV6},
        parse::{ETHERNET, Headers, VLAN_TAG},
        wire::{IcmpError, Ipv4, Ipv6, Macs},
    },
};

/// TTL and hop limit of answers (RFC 1340's recommendation).
pub const TTL: u8 = 64;
/// IPv4's don't-fragment bit.
pub const DONT_FRAGMENT: u16 = 0x4000;
const ICMP_HEADER: usize = 8;

/// An ICMP error.
#[derive(Clone, Copy)]
pub struct Message {
    /// Type and code of ICMP.
    pub v4: [u8; 2],
    /// Type and code of ICMPv6.
    pub v6: [u8; 2],
    /// MTU, or 0.
    pub mtu: u16,
}

/// Calls `$f::<F, L2, TAGS, ..>` with the constants of a frame's Ethernet header: its length, and the 16-bit words of VLAN
/// tags in it. One call per length, so that all offsets are constants.
macro_rules! by_ethernet {
    ($headers:expr, $f:ident::<$frame:ty $(, $more:tt)*>($($argument:expr),*)) => {
        match $headers.l2_len() {
            $crate::packet::parse::ETHERNET => $f::<$frame, { $crate::packet::parse::ETHERNET }, 0 $(, $more)*>($($argument),*),
            $crate::icmp::answer::ONE_TAG => $f::<$frame, { $crate::icmp::answer::ONE_TAG }, 2 $(, $more)*>($($argument),*),
            _ => $f::<$frame, { $crate::icmp::answer::TWO_TAGS }, 4 $(, $more)*>($($argument),*),
        }
    };
}
pub(crate) use by_ethernet;

/// Length of an Ethernet header with one tag.
pub const ONE_TAG: usize = ETHERNET + VLAN_TAG;
/// Length of an Ethernet header with two tags.
pub const TWO_TAGS: usize = ETHERNET + 2 * VLAN_TAG;

/// Turns the frame into an ICMP error to its sender, which quotes the first `QUOTE4` or `QUOTE6` bytes of the packet: at
/// most 512, a multiple of 4. None if the frame is shorter.
#[inline(always)]
pub fn error<F: Frame, const QUOTE4: usize, const QUOTE6: usize>(
    frame: &mut F,
    headers: &Headers,
    message: Message,
) -> Option<()> {
    if headers.is_ipv6 {
        by_ethernet!(headers, error_v6::<F, QUOTE6>(frame, headers, message))
    } else {
        by_ethernet!(headers, error_v4::<F, QUOTE4>(frame, headers, message))
    }
}

/// Makes the IP packet `len` bytes long by its end, and then longer by `room` bytes in front of it; swaps the Ethernet
/// addresses.
#[inline(always)]
pub fn turn<F: Frame, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    len: usize,
    room: usize,
) -> Option<()> {
    let packet = frame.packet().forget_checks();
    let macs: Macs = packet.read(0)?;
    let tags: [u16; TAGS] = packet.read(12)?;
    let kind: u16 = packet.read(L2 - 2)?;
    let cut = (L2 + len) as i32 - frame.total_len() as i32;
    if cut > 0 || !frame.adjust_tail(cut) || (room != 0 && !frame.adjust_head(-(room as i32))) {
        return None;
    }
    let mut packet = frame.packet();
    let [a, b, c, d, e, f] = macs.words;
    let written = packet.write(0, Macs { words: [d, e, f, a, b, c] })
        && packet.write(12, tags)
        && packet.write(L2 - 2, kind);
    written.then_some(())
}

/// IPv4 header of an answer with so many bytes behind it; `fragment` are its flags.
#[inline(always)]
pub fn ipv4(headers: &Headers, protocol: u8, len: usize, fragment: u16) -> Ipv4 {
    let (source, destination) = (headers.destination[3], headers.source[3]);
    let total_len = (20 + len) as u16;
    let sum = 0x4500
        + total_len as u64
        + fragment as u64
        + ((TTL as u64) << 8 | protocol as u64)
        + u32::from_be(source) as u64
        + u32::from_be(destination) as u64;
    Ipv4 {
        version_len: 0x45,
        tos: 0,
        total_len: total_len.to_be(),
        id: 0,
        fragment: fragment.to_be(),
        ttl: TTL,
        protocol,
        check: csum::finish(sum).to_be(),
        source,
        destination,
    }
}

/// IPv6 header of an answer with so many bytes behind it.
#[inline(always)]
pub fn ipv6(headers: &Headers, next: u8, len: usize) -> Ipv6 {
    Ipv6 {
        version_class_label: (6_u32 << 28).to_be(),
        payload_len: (len as u16).to_be(),
        next,
        hop_limit: TTL,
        source: headers.destination,
        destination: headers.source,
    }
}

/// Sum of the pseudo-header (RFC 8200 8.1, RFC 9293 3.1) of an answer, in memory order.
#[inline(always)]
pub fn pseudo_header(headers: &Headers, protocol: u8, len: usize) -> u64 {
    let mut sum = (len as u16).to_be() as u64 + (protocol as u16).to_be() as u64;
    if headers.is_ipv6 {
        // Indexed: the verifier does not follow an iterator over two arrays.
        for i in 0..4 {
            sum += headers.source[i] as u64 + headers.destination[i] as u64;
        }
    } else {
        sum += headers.source[3] as u64 + headers.destination[3] as u64;
    }
    sum
}

#[inline(always)]
fn error_v4<F: Frame, const L2: usize, const TAGS: usize, const QUOTE: usize>(
    frame: &mut F,
    headers: &Headers,
    message: Message,
) -> Option<()> {
    turn::<F, L2, TAGS>(frame, QUOTE, 20 + ICMP_HEADER)?;
    let quoted = frame.sum::<QUOTE>(L2 + 20 + ICMP_HEADER)? as u64;
    let ip = ipv4(headers, ICMP, ICMP_HEADER + QUOTE, 0);
    write_error::<F>(frame, L2 + 20, message.v4, message.mtu, quoted)?;
    frame.packet().write(L2, ip).then_some(())
}

#[inline(always)]
fn error_v6<F: Frame, const L2: usize, const TAGS: usize, const QUOTE: usize>(
    frame: &mut F,
    headers: &Headers,
    message: Message,
) -> Option<()> {
    turn::<F, L2, TAGS>(frame, QUOTE, 40 + ICMP_HEADER)?;
    let quoted = frame.sum::<QUOTE>(L2 + 40 + ICMP_HEADER)? as u64;
    let sum = quoted + pseudo_header(headers, ICMPV6, ICMP_HEADER + QUOTE);
    let ip = ipv6(headers, ICMPV6, ICMP_HEADER + QUOTE);
    write_error::<F>(frame, L2 + 40, message.v6, message.mtu, sum)?;
    frame.packet().write(L2, ip).then_some(())
}

/// Writes an error's header; `sum` is that of all else that its checksum covers, in memory order.
#[inline(always)]
fn write_error<F: Frame>(frame: &F, at: usize, kind: [u8; 2], mtu: u16, sum: u64) -> Option<()> {
    let mut icmp = IcmpError { kind: kind[0], code: kind[1], check: 0, mtu: [0, mtu.to_be()] };
    icmp.check = csum::finish(sum + u16::from_ne_bytes(kind) as u64 + icmp.mtu[1] as u64);
    frame.packet().write(at, icmp).then_some(())
}
