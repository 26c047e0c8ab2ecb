//! Internet checksum arithmetic (RFC 1071, RFC 1624) on words in network byte order as loaded.

use crate::packet::wire::Tcp;

/// Folds a sum to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum field's value for a sum.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// Adjusts `check` for one 16-bit word that changes from `old` to `new` (RFC 1624, equation 3).
#[inline(always)]
pub const fn update(check: u16, old: u16, new: u16) -> u16 {
    finish((!check) as u64 + (!old) as u64 + new as u64)
}

/// Sum of a TCP header without its checksum, in memory order.
#[inline(always)]
pub fn of_tcp(header: &Tcp) -> u64 {
    let word = |n: u32| (n & 0xffff) as u64 + (n >> 16) as u64;
    header.source_port as u64
        + header.port as u64
        + word(header.sequence)
        + word(header.acknowledgement)
        + u16::from_ne_bytes([header.offset, header.flags]) as u64
        + header.window as u64
        + header.urgent as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(words: &[u16]) -> u64 {
        words.iter().map(|w| u64::from(*w)).sum()
    }

    proptest! {
        #[test]
        fn update_equals_recomputed(mut words in proptest::collection::vec(any::<u16>(), 4..40), new: u16, at in 0usize..4) {
            // A header whose sum is zero does not occur (its version field is not zero).
            words.push(0x4500);
            let before = finish(sum(&words));
            let old = words[at];
            words[at] = new;
            prop_assert_eq!(update(before, old, new), finish(sum(&words)));
        }
    }

    #[test]
    fn rfc1071_example() {
        assert_eq!(fold(0x0001 + 0xf203 + 0xf4f5 + 0xf6f7), 0xddf2);
    }
}
