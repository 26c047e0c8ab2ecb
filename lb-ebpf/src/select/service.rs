//! Which service a packet belongs to: exact port, then port range, then any port.

use crate::{
    Tables,
    packet::parse::{Headers, pair},
};
use lb_common::{
    Address, Be16, Reason, ServiceKey, Vip, VipKey, exact,
    limits::RANGES_PER_VIP,
    service::{NO_SERVICE, TCP},
};

/// How a service was found, for `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// By exact port.
    Exact,
    /// By port range.
    Range,
    /// By any port.
    Any,
}

/// Index of an exact port's service, if the lines of exact ports have it ([`lb_common::exact`]); address as two words in
/// memory's order, port as loaded.
#[inline(always)]
pub fn lookup_exact<T: Tables>(tables: &T, vip: [u64; 2], port: u16, protocol: u8) -> Option<u32> {
    let port = exact::port_word(port, protocol);
    let line = tables.exact(exact::line_of(vip, port))?;
    let mut i = 0;
    while i < exact::ENTRIES {
        let entry = &line.entries[i];
        // SAFETY: a reference to an aligned word that lbd stores in one piece.
        let found = unsafe { core::ptr::read_volatile(&entry.port_and_service) };
        if found as u32 == port && entry.vip[1] == vip[1] && entry.vip[0] == vip[0] {
            return Some((found >> 32) as u32);
        }
        i += 1;
    }
    None
}

/// Index of the packet's service.
#[inline(always)]
pub fn lookup_service<T: Tables>(tables: &T, headers: &Headers) -> Result<(u32, Match), Reason> {
    tables.find_service(vip_of(headers), headers.port, headers.protocol)
}

/// A packet's destination as two words in memory's order.
#[inline(always)]
pub const fn vip_of(headers: &Headers) -> [u64; 2] {
    let [a, b, c, d] = headers.destination;
    [pair(a, b), pair(c, d)]
}

/// The same of an address as two words in memory's order, and a port as loaded: by the tables that spare a lookup, then by
/// those that have them all.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, vip: [u64; 2], port: u16, protocol: u8) -> Result<(u32, Match), Reason> {
    if let Some(index) = lookup_exact(tables, vip, port, protocol) {
        return Ok((index, Match::Exact));
    }
    if tables.is_no_vip(exact::filter_bit(vip)) {
        return Err(Reason::NotVip);
    }
    let vip: Address = zerocopy::transmute!(vip);
    let key = ServiceKey { vip, port: Be16::from_bytes(port.to_ne_bytes()), protocol, pad: 0 };
    if let Some(index) = tables.service_index(&key) {
        return Ok((index, Match::Exact));
    }
    let vip = tables.vip(&VipKey { vip }).ok_or(Reason::NotVip)?;
    lookup_port(vip, protocol, u16::from_be(port)).ok_or(Reason::NoService)
}

/// [`find`]'s result as one number, for functions that can return no more.
#[inline(always)]
pub fn encode(found: Result<(u32, Match), Reason>) -> u64 {
    match found {
        Ok((index, how)) => (how as u64) << 32 | index as u64,
        Err(Reason::NoService) => u64::MAX - 1,
        Err(_) => u64::MAX,
    }
}

/// The inverse of [`encode`].
#[inline(always)]
pub fn decode(word: u64) -> Result<(u32, Match), Reason> {
    let how = match word >> 32 {
        0 => Match::Exact,
        1 => Match::Range,
        2 => Match::Any,
        _ if word == u64::MAX - 1 => return Err(Reason::NoService),
        _ => return Err(Reason::NotVip),
    };
    Ok((word as u32, how))
}

/// The same within a VIP, for ports that have no service of their own.
#[inline(always)]
fn lookup_port(vip: &Vip, protocol: u8, port: u16) -> Option<(u32, Match)> {
    for i in 0..RANGES_PER_VIP {
        if i as u32 >= vip.range_count {
            break;
        }
        let range = &vip.ranges[i];
        if range.protocol == protocol as u32 && range.first <= port && port <= range.last {
            return Some((range.service, Match::Range));
        }
    }
    let any = if protocol == TCP { vip.any_tcp } else { vip.any_udp };
    if any == NO_SERVICE { None } else { Some((any, Match::Any)) }
}
