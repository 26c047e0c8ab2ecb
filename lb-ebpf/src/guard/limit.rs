//! Limits of new flows, per service and per source; the arithmetic is [`lb_common::rate_limit`]'s.
//!
//! Only packets that begin a flow are counted: SYNs, and datagrams of flows that are not known. So nothing that is
//! established is ever refused. Called by `choose`, and by mode `nat` for what needs a binding without being a SYN.

use crate::{guard::is_v4, packet::parse::address};
use lb_common::{
    Reason, ServiceView,
    guard::mask64,
    rate_limit::{SourceKey, take},
    service::flags,
};

/// The maps of buckets, and their clock.
pub trait LimitTables {
    /// A service's bucket.
    fn service_bucket(&self, service: u32) -> u64;
    /// Sets it.
    fn set_service_bucket(&self, service: u32, word: u64);
    /// A source's bucket; 0 if it is not known.
    fn source_bucket(&self, key: &SourceKey) -> u64;
    /// Sets it. One for which there is no room counts as full.
    fn set_source_bucket(&self, key: &SourceKey, word: u64);
    /// Nanoseconds of the boot clock.
    fn now_ns(&self) -> u64;
}

/// Whether a service's new flows are counted.
#[inline(always)]
pub const fn is_limited(view: &ServiceView) -> bool {
    view.flags & (flags::LIMIT_FLOWS | flags::LIMIT_SOURCES) != 0
}

/// Takes a new flow from the buckets of its source and its service; the reason if one of them is empty. The source's
/// comes first: what it has too much of costs the others nothing.
#[inline(always)]
pub fn admit<T: LimitTables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    source: [u32; 4],
) -> Option<Reason> {
    let now_ns = tables.now_ns();
    if view.flags & flags::LIMIT_SOURCES != 0 {
        let key = SourceKey { source: address(masked(source, view.source_bits)), service };
        let word = tables.source_bucket(&key);
        match take(word, now_ns, view.source_interval_ns, view.source_tolerance_ns) {
            Some(word) => tables.set_source_bucket(&key, word),
            None => return Some(Reason::RateSource),
        }
    }
    if view.flags & flags::LIMIT_FLOWS != 0 {
        let word = tables.service_bucket(service);
        match take(word, now_ns, view.flow_interval_ns, view.flow_tolerance_ns) {
            Some(word) => tables.set_service_bucket(service, word),
            None => return Some(Reason::RateService),
        }
    }
    None
}

/// The prefix that counts as one source: so many bits of an IPv4, and of an IPv6 address.
#[inline(always)]
pub const fn masked(source: [u32; 4], bits: [u32; 2]) -> [u32; 4] {
    if is_v4(source) {
        let mask = (mask64(bits[0] & 0x3f) >> 32) as u32;
        return [source[0], source[1], source[2], source[3] & mask.to_be()];
    }
    let rest = bits[1].saturating_sub(64);
    let (high, low) = (mask64(if bits[1] > 64 { 64 } else { bits[1] }), mask64(rest & 0x7f));
    [
        source[0] & ((high >> 32) as u32).to_be(),
        source[1] & (high as u32).to_be(),
        source[2] & ((low >> 32) as u32).to_be(),
        source[3] & (low as u32).to_be(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_prefixes() {
        let v4 = [0, 0, 0xffff_u32.to_be(), 0xc633_6407_u32.to_be()];
        let v4_of = |bits| u32::from_be(masked(v4, [bits, 64])[3]);
        assert_eq!([v4_of(32), v4_of(24), v4_of(1)], [0xc633_6407, 0xc633_6400, 0x8000_0000]);
        let v6 = [0x2001_0db8_u32, 0x0001_0002, 0x0003_0004, 0x0005_0006].map(u32::to_be);
        let v6_of = |bits| masked(v6, [32, bits]).map(u32::from_be);
        assert_eq!(v6_of(64), [0x2001_0db8, 0x0001_0002, 0, 0]);
        assert_eq!(v6_of(128), [0x2001_0db8, 0x0001_0002, 0x0003_0004, 0x0005_0006]);
        assert_eq!(v6_of(48), [0x2001_0db8, 0x0001_0000, 0, 0]);
        assert_eq!(v6_of(72), [0x2001_0db8, 0x0001_0002, 0, 0]);
    }
}
