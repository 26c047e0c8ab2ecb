//! A worker's whole way.
//!
//! Promises: what is passed undelivered is unchanged; what is delivered is the inner packet with one
//! hop less, a right checksum if it had one, and nothing else changed; each packet has exactly one
//! reason.

use super::{l2_len, sum, v4, v6};
use lb_common::{Reason, reason::Fate, settings::DecapSettings};
use lb_ebpf::{
    Verdict,
    decap::process,
    native::{HashTables, VecFrame},
};

/// A worker's tables.
pub fn world() -> HashTables {
    let mut tables = HashTables::default();
    tables.decap_addresses.extend([v4(10, 1, 0, 1), v6(1, 1)]);
    tables.decap_vips.extend([v4(192, 0, 2, 1), v6(0, 1)]);
    tables
}

/// Checks one frame.
pub fn check(data: &[u8]) {
    let tables = world();
    let mut frame = VecFrame::new(data);
    let (verdict, reason) = process(&mut frame, &tables, &DecapSettings::DEFAULT);
    assert_eq!(tables.counts(), [(reason, 1)]);
    let after = frame.bytes();
    match (reason, reason.fate()) {
        (Reason::DecapIpip | Reason::DecapGue, _) => {
            assert_eq!(verdict, Verdict::Pass);
            delivered(data, &after);
        }
        (_, Fate::Pass) => {
            assert_eq!(verdict, Verdict::Pass);
            assert!(after == data && frame.adjusts().is_empty(), "{reason:?}: changed");
        }
        (_, Fate::Drop) => assert_eq!(verdict, Verdict::Drop),
        _ => panic!("{reason:?} is no end of a way"),
    }
}

fn delivered(before: &[u8], after: &[u8]) {
    let cut = before.len() - after.len();
    let l2_len = l2_len(before);
    let tags = l2_len - 14;
    assert_eq!(before[..12 + tags], after[..12 + tags], "MACs and tags stay");
    let (old, new) = (&before[cut + l2_len..], &after[l2_len..]);
    let header_len = if new[0] >> 4 == 6 { 40 } else { 20 };
    assert_eq!(old[header_len..], new[header_len..], "all behind the header stays");
    let mut expected = old[..header_len].to_vec();
    if header_len == 40 {
        assert_eq!(after[12 + tags..l2_len], [0x86, 0xdd]);
        expected[7] -= 1;
        // Only the ECN bits may change.
        expected[1] = expected[1] & !0x30 | new[1] & 0x30;
        assert_eq!(expected, new[..40]);
        assert_eq!(new[24..40], v6(0, 1));
    } else {
        assert_eq!(after[12 + tags..l2_len], [8, 0]);
        expected[8] -= 1;
        expected[1] = expected[1] & !3 | new[1] & 3;
        expected[10..12].copy_from_slice(&new[10..12]);
        assert_eq!(expected, new[..20]);
        assert_eq!(new[16..20], [192, 0, 2, 1]);
        let len = usize::from(old[0] & 15) * 4;
        if old.len() >= len && sum(&old[..len]) == 0xffff {
            assert_eq!(sum(&new[..len]), 0xffff, "inner checksum");
        }
    }
}
