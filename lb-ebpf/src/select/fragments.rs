//! The map of fragmented packets: which flow the later fragments of a packet belong to, and which bytes have come.

use crate::{
    Frame,
    packet::{
        network::{Network, Part},
        parse::{address, parse_transport},
    },
};
use lb_common::{
    Reason,
    fragment::{FRAGMENT_TIMEOUT_S, Fragment, FragmentKey, PARTS, flags},
    service::TCP,
};

/// The map of fragmented packets.
pub trait FragmentTable {
    /// Calls `f` with what is known of a packet, in its place.
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R>;
    /// Remembers a packet. False if there is no room.
    fn record_fragment(&self, key: &FragmentKey, fragment: &Fragment) -> bool;
}

/// What the parts of a packet have in common.
#[inline(always)]
pub fn key_of(network: &Network, part: Part) -> FragmentKey {
    let headers = &network.headers;
    FragmentKey {
        source: address(headers.source),
        destination: address(headers.destination),
        id: part.id,
        protocol: if headers.is_ipv6 { 0 } else { headers.protocol as u32 },
    }
}

/// Whether further parts of a packet are still expected.
#[inline(always)]
pub fn is_awaited(known: &Fragment, now_s: u32) -> bool {
    now_s.saturating_sub(known.seen_s) <= FRAGMENT_TIMEOUT_S
}

/// First and last unit of 8 bytes that a part covers.
#[inline(always)]
pub fn units(network: &Network, part: Part) -> Result<[u16; 2], Reason> {
    // In IPv6 what is between the fragment header and the transport header is the fragmented part's too;
    // only the first can have it, and it is whole units.
    let len = network.l4_len as u32;
    let end = part.offset + len;
    if len == 0 || end > 0xffff || (part.more && !len.is_multiple_of(8)) {
        return Err(Reason::FragmentBad);
    }
    // TCP's flags lie in the second unit and after (RFC 1858).
    if part.offset == 8 && network.headers.protocol == TCP {
        return Err(Reason::FragmentTiny);
    }
    Ok([(part.offset / 8) as u16, ((end - 1) / 8) as u16])
}

/// Notes a part; an error if it overlaps another, or one has before.
#[inline(always)]
pub fn mark(known: &mut Fragment, units: [u16; 2]) -> Result<(), Reason> {
    if known.flags & flags::OVERLAP != 0 {
        return Err(Reason::FragmentOverlap);
    }
    for i in 0..PARTS {
        if i as u32 >= known.count {
            known.parts[i] = units;
            known.count = i as u32 + 1;
            return Ok(());
        }
        let part = known.parts[i];
        // The same part again is harmless.
        if part == units {
            return Ok(());
        }
        if part[0] <= units[1] && units[0] <= part[1] {
            known.flags |= flags::OVERLAP;
            return Err(Reason::FragmentOverlap);
        }
    }
    Ok(())
}

/// The ports of a first part, all of whose transport header must be there.
#[inline(always)]
pub fn parse_first<F: Frame>(frame: &F, network: &mut Network) -> Result<(), Reason> {
    let least = if network.headers.protocol == TCP { 20 } else { 8 };
    if network.l4_len < least {
        return Err(Reason::FragmentTiny);
    }
    // The lengths in it are those of the whole: only what must be here is looked at.
    parse_transport(&frame.packet(), network.l4(), 0xffff, &mut network.headers)
}
