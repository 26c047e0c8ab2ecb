//! Answers echo requests for a VIP (RFC 792, RFC 4443), out of the interface they came in by.
//!
//! The frame is turned round in place: addresses swap, the type changes, and the checksum is corrected for
//! that one word (RFC 1624). So a request that was damaged on its way is answered with a checksum that is
//! as wrong as its own, and its sender drops the answer: the data need not be read.

use crate::{
    Frame,
    icmp::answer::TTL,
    packet::{
        csum,
        network::Network,
        wire::{Echo, Ipv4, Ipv6, Macs},
    },
};

/// Type of an ICMP echo request.
pub const REQUEST_V4: u8 = 8;
/// Type of an ICMPv6 echo request.
pub const REQUEST_V6: u8 = 128;
const REPLY_V4: u8 = 0;
const REPLY_V6: u8 = 129;

/// Turns an echo request into its answer; None if there is more to it than an answer can take over: IP
/// options or extension headers.
#[inline(always)]
pub fn answer<F: Frame>(frame: &mut F, network: &Network) -> Option<()> {
    let mut packet = frame.packet();
    let l3 = network.headers.l2_len();
    let macs: Macs = packet.read(0)?;
    let [a, b, c, d, e, f] = macs.words;
    // The request was to us: the answer goes back to the hop that it came from.
    if !packet.write(0, Macs { words: [d, e, f, a, b, c] }) {
        return None;
    }
    let (reply, l4) = if network.headers.is_ipv6 {
        let ip: Ipv6 = packet.read(l3)?;
        let ip = Ipv6 { hop_limit: TTL, source: ip.destination, destination: ip.source, ..ip };
        packet.write(l3, ip).then_some((REPLY_V6, l3 + 40))?
    } else {
        let old: Ipv4 = packet.read(l3)?;
        let mut ip = Ipv4 { ttl: TTL, source: old.destination, destination: old.source, ..old };
        let word = |ttl| u16::from_ne_bytes([ttl, old.protocol]);
        ip.check = csum::update(old.check, word(old.ttl), word(TTL));
        packet.write(l3, ip).then_some((REPLY_V4, l3 + 20))?
    };
    let old: Echo = packet.read(l4)?;
    let word = |kind| u16::from_ne_bytes([kind, old.code]);
    // Zero would be wrong for a message that is nothing but zeros; its other form is right for all.
    let check = match csum::update(old.check, word(old.kind), word(reply)) {
        0 => 0xffff,
        check => check,
    };
    packet.write(l4, Echo { kind: reply, check, ..old }).then_some(())
}
