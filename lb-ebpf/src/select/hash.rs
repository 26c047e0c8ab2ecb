//! The keyed flow hash, the same on every ingress host that knows the service's seed.
//!
//! A chain of 64-bit finalizers (Appleby's fmix64 of MurmurHash3, public domain) over the words of
//! the 5-tuple, keyed before the first and before the last. BPF has no 128-bit product, which rules
//! the wyhash family out, and SipHash's rounds cost three times as much here. The key keeps
//! clients from choosing ports that all fall on one slot without having seen the answers.

use crate::packet::parse::Headers;

/// One finalizer step: a bijection in which every input bit reaches every output bit.
#[inline(always)]
pub const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// Protocol and ports (network order, as loaded) as the hash takes them.
#[inline(always)]
pub const fn ports_word(protocol: u8, source_port: u16, port: u16) -> u64 {
    (protocol as u64) << 32 | (u16::from_be(source_port) as u64) << 16 | u16::from_be(port) as u64
}

/// Hash of an IPv4 packet's 5-tuple under a service's seed; addresses in network order, as loaded.
#[inline(always)]
pub const fn flow_hash_v4(seed: [u64; 2], source: u32, destination: u32, ports: u64) -> u64 {
    let h = mix(seed[0] ^ ((u32::from_be(source) as u64) << 32 | u32::from_be(destination) as u64));
    mix(h.wrapping_add(seed[1]) ^ ports)
}

/// The same of an IPv6 packet; addresses as two words in network order, as loaded.
#[inline(always)]
pub const fn flow_hash_v6(seed: [u64; 2], source: [u64; 2], destination: [u64; 2], ports: u64) -> u64 {
    let mut h = mix(seed[0] ^ u64::from_be(source[0]));
    h = mix(h ^ u64::from_be(source[1]));
    h = mix(h ^ u64::from_be(destination[0]));
    h = mix(h ^ u64::from_be(destination[1]));
    mix(h.wrapping_add(seed[1]) ^ ports)
}

/// Hash of a packet's 5-tuple under a service's seed.
#[inline(always)]
pub fn flow_hash(seed: [u64; 2], headers: &Headers) -> u64 {
    // Words in network order, whatever this machine's is.
    let word = |high: u32, low: u32| ((u32::from_be(high) as u64) << 32 | u32::from_be(low) as u64).to_be();
    let (s, d) = (&headers.source, &headers.destination);
    let ports = ports_word(headers.protocol, headers.source_port, headers.port);
    if headers.is_ipv6 {
        let (s, d) = ([word(s[0], s[1]), word(s[2], s[3])], [word(d[0], d[1]), word(d[2], d[3])]);
        flow_hash_v6(seed, s, d, ports)
    } else {
        flow_hash_v4(seed, s[3], d[3], ports)
    }
}

/// Hash of a packet's source address under a service's seed, for services that keep a client on one backend.
#[inline(always)]
pub fn source_hash(seed: [u64; 2], headers: &Headers) -> u64 {
    let s = &headers.source;
    let word = |high: u32, low: u32| (u32::from_be(high) as u64) << 32 | u32::from_be(low) as u64;
    // IPv4 addresses are mapped ones here: their first words are all alike.
    mix(mix(seed[0] ^ word(s[0], s[1])).wrapping_add(seed[1]) ^ word(s[2], s[3]))
}

/// Slot of a hash in a table of `count` slots: multiply and shift instead of a division (Lemire 2016).
#[inline(always)]
pub const fn slot_of(hash: u64, count: u32) -> u32 {
    (((hash >> 32) * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::parse::{Headers, mapped};

    fn headers(i: u32, is_ipv6: bool) -> Headers {
        let mut h = Headers { protocol: 6, is_ipv6, ..Headers::default() };
        h.source[3] = (0x0a00_0000 + i / 16).to_be();
        h.source_port = ((i % 16) as u16 + 40_000).to_be();
        h.destination[3] = 0xc0a8_0001_u32.to_be();
        h.port = 80_u16.to_be();
        h
    }

    #[test]
    fn neighbouring_flows_spread_over_slots() {
        for is_ipv6 in [false, true] {
            let mut counts = [0u32; 251];
            for i in 0..251 * 400 {
                counts[slot_of(flow_hash([1, 2], &headers(i, is_ipv6)), 251) as usize] += 1;
            }
            // 400 expected, standard deviation 20: six of them.
            assert!(counts.iter().all(|c| (280..520).contains(c)), "{counts:?}");
        }
    }

    #[test]
    fn the_seed_matters() {
        let h = headers(7, false);
        assert_ne!(flow_hash([1, 2], &h), flow_hash([1, 3], &h));
        assert_ne!(flow_hash([1, 2], &h), flow_hash([2, 2], &h));
    }

    /// Ingress hosts of different builds must agree: a change here breaks flows. The numbers are of another program, written
    /// by the description above.
    #[test]
    fn the_hash_is_fixed() {
        const SEED: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
        let (source_port, port) = (40_001_u16.to_be(), 443_u16.to_be());
        let v4 = Headers {
            source: mapped(0xc633_6407_u32.to_be()),
            destination: mapped(0xc000_0201_u32.to_be()),
            protocol: 6,
            source_port,
            port,
            ..Headers::default()
        };
        let v6 = Headers {
            source: [0x2001_0db8, 0x000c_0000, 0, 7].map(u32::to_be),
            destination: [0x2001_0db8, 0, 0, 1].map(u32::to_be),
            protocol: 17,
            source_port,
            port,
            is_ipv6: true,
            ..Headers::default()
        };
        assert_eq!(
            [flow_hash(SEED, &v4), flow_hash(SEED, &v6)],
            [0xffce_641b_1c11_44ac, 0x0521_1800_7ba8_006b]
        );
        assert_eq!(
            [source_hash(SEED, &v4), source_hash(SEED, &v6)],
            [0xb89d_1351_6e5a_601f, 0x08d5_c9e0_f4d4_e378]
        );
        assert_eq!(slot_of(flow_hash(SEED, &v4), 65_537), 65487);
    }

    #[test]
    fn a_client_keeps_its_source_hash() {
        let (a, mut b) = (headers(7, true), headers(7, true));
        (b.source_port, b.port, b.protocol) = (1, 2, 17);
        assert_eq!(source_hash([1, 2], &a), source_hash([1, 2], &b));
        assert_ne!(source_hash([1, 2], &a), source_hash([1, 3], &a));
        let mut counts = [0u32; 251];
        for i in 0..251 * 400 {
            counts[slot_of(source_hash([1, 2], &headers(i * 16, false)), 251) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (280..520).contains(c)), "{counts:?}");
    }

    #[test]
    fn slots_stay_in_range() {
        assert_eq!(slot_of(u64::MAX, 65_537), 65_536);
        assert_eq!(slot_of(0, 65_537), 0);
    }
}
