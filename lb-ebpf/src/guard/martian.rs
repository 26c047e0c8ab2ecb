//! Sources that a packet to a VIP cannot have: addresses from which no host sends, and this balancer's own.
//!
//! * **Martians** (RFC 1812 5.3.7, RFC 6890, RFC 4291 2.5 to 2.7): 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/3 (multicast,
//!   reserved, broadcast); `::/96` (unspecified, loopback, and the IPv4-compatible addresses that RFC 4291 2.5.5.1
//!   withdrew) and `ff00::/8`. IPv4-mapped sources are no valid IPv6 packet here ([`Reason::BadIpv6`]).
//! * **VIPs.** Workers answer from them, and to clients: an answer that comes back as a request is answered in its turn,
//!   without end, because each answer has a fresh TTL.
//! * **Addresses that mode `nat` translates to**: checked where a flow would be bound ([`crate::nat`]).
//! * **A worker's address with the port that it serves**, of datagrams ([`check_worker`]): the answer to such a datagram
//!   is a request to that worker. With other ports a worker is a client like any other.
//!
//! Not among them is what a host may send: private and shared addresses, documentation's, and link-local ones. A client
//! on the ingress host's own link may use one of these (RFC 3927, RFC 4291 2.5.6), and nothing can go in a circle by it.
//!
//! Input: [`Tables`], a source address. Output: the [`Reason`] to drop its packets, if there is one. Called for packets
//! to a VIP by `quick`, `ingress` and its stages; by the daemon's `explain`, and by tests.
//!
//! VIPs as sources are dropped in every mode. With `nat` a datagram between two VIPs goes back and forth between
//! ingress host and worker. With `ipip`, `gue` and `l2` it does so too if the worker lacks the second VIP, and inside
//! the worker if the worker has it (an IPv6 stack accepts a packet from an address of its own; Linux drops such a
//! packet in IPv4 only). The fast path compares a word that it loads anyway, and one bit of `VIP_FILTER`: only a
//! source whose bit is set, a VIP or one address in 65,536 per VIP, takes the full path. Modes other than `nat` do
//! not check translated addresses: an answer to such an address ends in this host's stack, and the host's own
//! connections to a VIP work.

use crate::{
    Tables,
    packet::parse::{Headers, pair},
};
use lb_common::{Reason, exact, service::UDP};

/// Whether no host sends from this IPv4 address (as loaded).
#[inline(always)]
pub const fn is_martian_v4(source: u32) -> bool {
    let first = u32::from_be(source) >> 24;
    first == 0 || first == 127 || first >= 224
}

/// Whether no host sends from this IPv6 address, as two words in memory's order. None that is IPv4-mapped is.
#[inline(always)]
pub const fn is_martian_v6(source: [u64; 2]) -> bool {
    let (high, low) = (u64::from_be(source[0]), u64::from_be(source[1]));
    high >> 56 == 0xff || high == 0 && low >> 32 == 0
}

/// Why packets of this source (network order, IPv4 mapped) are not for a VIP.
#[inline(always)]
pub fn fault<T: Tables>(tables: &T, [a, b, c, d]: [u32; 4]) -> Option<Reason> {
    const MAPPED: u64 = 0xffff;
    let source = [pair(a, b), pair(c, d)];
    let low = u64::from_be(source[1]);
    let is_martian = if source[0] == 0 && low >> 32 == MAPPED {
        is_martian_v4((low as u32).to_be())
    } else {
        is_martian_v6(source)
    };
    if is_martian {
        return Some(Reason::MartianSource);
    }
    if !tables.is_no_vip(exact::filter_bit(source)) && tables.is_vip(source) {
        return Some(Reason::OwnSource);
    }
    None
}

/// [`fault`] as one number, for functions that can return no more.
#[inline(always)]
pub fn encode(fault: Option<Reason>) -> u32 {
    match fault {
        None => 0,
        Some(Reason::MartianSource) => 1,
        Some(_) => 2,
    }
}

/// The inverse of [`encode`].
#[inline(always)]
pub fn decode(number: u32) -> Option<Reason> {
    match number {
        0 => None,
        1 => Some(Reason::MartianSource),
        _ => Some(Reason::OwnSource),
    }
}

/// Drops what cannot have been sent to a VIP.
#[inline(always)]
pub fn check<T: Tables>(tables: &T, headers: &Headers) -> Result<(), Reason> {
    match tables.source_fault(headers.source) {
        Some(reason) => Err(reason),
        None => Ok(()),
    }
}

/// Drops a datagram from the port on which a worker serves ([`Reason::OwnSource`]): the worker that gets it answers, and
/// the other takes the answer for a request. `served` is the port of the worker that gets it, as loaded. Workers' own
/// connections to a VIP have other ports, and TCP answers a SYN and ACK that nobody asked for with a reset.
#[inline(always)]
pub fn check_worker<T: Tables>(tables: &T, headers: &Headers, served: u16) -> Result<(), Reason> {
    let is_served = headers.protocol == UDP && headers.source_port == served;
    if is_served && tables.is_worker(headers.source) { Err(Reason::OwnSource) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{native::HashTables, packet::parse::words};
    use lb_common::{Address, Vip, VipKey};
    use std::net::{IpAddr, Ipv6Addr};

    fn address(text: &str) -> Address {
        match text.parse().unwrap() {
            IpAddr::V4(v4) => lb_common::mapped(v4.octets()),
            IpAddr::V6(v6) => Ipv6Addr::octets(&v6),
        }
    }

    fn fault_of(tables: &HashTables, text: &str) -> Option<Reason> {
        let headers = Headers { source: words(address(text)), ..Headers::default() };
        let fault = fault(tables, headers.source);
        assert_eq!(decode(encode(fault)), fault);
        fault
    }

    #[test]
    fn borders_of_each_class() {
        let tables = HashTables::default();
        for (first, last, before, after) in [
            ("0.0.0.0", "0.255.255.255", None, Some("1.0.0.0")),
            ("127.0.0.0", "127.255.255.255", Some("126.255.255.255"), Some("128.0.0.0")),
            ("224.0.0.0", "255.255.255.255", Some("223.255.255.255"), None),
            ("::", "::ffff:ffff", None, Some("::1:0:0")),
            ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some("feff::ffff"), None),
        ] {
            for inside in [first, last] {
                assert_eq!(fault_of(&tables, inside), Some(Reason::MartianSource), "{inside}");
            }
            for outside in [before, after].into_iter().flatten() {
                assert_eq!(fault_of(&tables, outside), None, "{outside}");
            }
        }
    }

    #[test]
    fn what_a_host_may_send_from_is_none() {
        let tables = HashTables::default();
        for text in [
            "10.0.0.1",
            "100.64.0.1",
            "169.254.7.7",
            "192.0.2.1",
            "198.18.0.1",
            "fe80::1",
            "fd00::1",
            "2001:db8::1",
            "64:ff9b::7f00:1",
            "::ffff:1:0:0",
        ] {
            assert_eq!(fault_of(&tables, text), None, "{text}");
        }
    }

    #[test]
    fn a_vip_is_no_source_with_and_without_a_filter() {
        let mut tables = HashTables::default();
        for text in ["192.0.2.1", "2001:db8::1"] {
            tables.vips.insert(VipKey { vip: address(text) }, Vip::EMPTY);
        }
        for _ in 0..2 {
            for (text, is_own) in
                [("192.0.2.1", true), ("192.0.2.2", false), ("2001:db8::1", true), ("2001:db8::2", false)]
            {
                assert_eq!(fault_of(&tables, text), is_own.then_some(Reason::OwnSource), "{text}");
            }
            tables.spare_lookups();
        }
    }
}
