//! One check per fuzzer: bytes in, panic if a promise is broken. Inputs are frames as they arrive.

pub mod chance;
pub mod decap;
pub mod ingress;
pub mod mutate;
pub mod parse;
pub mod stages;

/// Folded one's complement sum (RFC 1071), computed the plain way.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An address written in words, IPv4 as mapped.
pub fn v4(a: u8, b: u8, c: u8, d: u8) -> lb_common::Address {
    lb_common::mapped([a, b, c, d])
}

/// An IPv6 address of the documentation prefix that ends in these two bytes.
pub fn v6(a: u8, b: u8) -> lb_common::Address {
    [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b]
}

/// Length of the Ethernet header with up to two tags, of a frame that holds it.
pub fn l2_len(data: &[u8]) -> usize {
    let is_tag = |at: usize| matches!(data.get(at..at + 2), Some([0x81, 0] | [0x88, 0xa8] | [0x91, 0]));
    match (is_tag(12), is_tag(16)) {
        (true, true) => 22,
        (true, false) => 18,
        _ => 14,
    }
}
