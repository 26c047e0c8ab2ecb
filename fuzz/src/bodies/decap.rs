//! A worker's whole way.
//!
//! Promises: what is passed undelivered is unchanged; what is delivered is the inner packet with one
//! hop less, a right checksum if it had one, and nothing else changed; what is delivered or sent on can have been sent;
//! each packet has exactly one reason.

use super::{l2_len, sum, v4, v6};
use lb_common::{Reason, Vip, VipKey, reason::Fate, settings::DecapSettings};
use lb_ebpf::{
    Verdict,
    native::{HashTables, VecFrame},
    worker::decap::process,
};

/// A worker's tables.
pub fn world() -> HashTables {
    let mut tables = HashTables::default();
    tables.decap_addresses.extend([v4(10, 1, 0, 1), v6(1, 1)]);
    for vip in [v4(192, 0, 2, 1), v6(0, 1)] {
        tables.decap_vips.insert(vip);
        // For `cannot_be`; a worker does not look there.
        tables.vips.insert(VipKey { vip }, Vip::EMPTY);
    }
    tables
}

/// Checks one frame.
pub fn check(data: &[u8]) {
    let tables = world();
    // Half of all flows have a socket here.
    let mut frame = VecFrame::new(data).with_sockets(|query| query.source_port & 1 == 0);
    let (verdict, reason) = process(&mut frame, &tables, &DecapSettings::DEFAULT);
    let which = [Reason::ChanceFirst, Reason::ChanceSecond, Reason::ChanceThird, Reason::ChanceNone];
    let counts: Vec<_> = tables.counts().into_iter().filter(|(r, _)| !which.contains(r)).collect();
    assert_eq!(counts, [(reason, 1)]);
    assert!(tables.counts().len() == 1 || (reason == Reason::DecapGue && tables.counts().len() == 2));
    let after = frame.bytes();
    match (reason, reason.fate()) {
        (Reason::DecapIpip | Reason::DecapGue, _) => {
            assert_eq!(verdict, Verdict::Pass);
            delivered(data, &after);
            assert!(!super::cannot_be(&tables, &after), "delivered, though nobody can have sent it");
        }
        (Reason::ChanceSentOn, _) => {
            assert_eq!(verdict, Verdict::Transmit, "without a FIB it goes back to the router");
            let inner = sent_on(data, &after);
            assert!(!super::cannot_be(&tables, &inner), "sent on, though nobody can have sent it");
        }
        (_, Fate::Pass) => {
            assert_eq!(verdict, Verdict::Pass);
            assert!(after == data && frame.adjusts().is_empty(), "{reason:?}: changed");
        }
        (_, Fate::Drop) => assert_eq!(verdict, Verdict::Drop),
        _ => panic!("{reason:?} is no end of a way"),
    }
}

/// Sent on: as long as before, one hop older, from this worker, and with one address less to visit. Only then may
/// it go round no more than the format allows. Returns what is inside, as a frame.
fn sent_on(before: &[u8], after: &[u8]) -> Vec<u8> {
    assert_eq!(before.len(), after.len());
    let l2_len = l2_len(before);
    assert_eq!((&before[..6], &before[6..12]), (&after[6..12], &after[..6]), "back to whoever brought it");
    let (old, new) = (&before[l2_len..], &after[l2_len..]);
    let (header_len, size) = if old[0] >> 4 == 6 { (40, 16) } else { (usize::from(old[0] & 15) * 4, 4) };
    let chain = header_len + 12;
    let (left, hops) = (old[chain + 2] & 15, old[chain + 3]);
    assert!(left > 0 && left + hops <= 2);
    assert_eq!((new[chain + 2] & 15, new[chain + 3]), (left - 1, hops + 1));
    assert_eq!(new[chain + 4..chain + 4 + size], old[chain + 4 + size..chain + 4 + 2 * size]);
    assert!(new[chain + 4 + size..chain + 4 + 2 * size].iter().all(|b| *b == 0));
    let end = chain + 4 + 2 * size;
    assert_eq!(old[end..], new[end..], "the inner packet stays as it was");
    let (source, destination, ttl) = if size == 16 { (8, 24, 7) } else { (12, 16, 8) };
    assert_eq!(new[source..source + size], old[destination..destination + size]);
    assert_eq!(new[destination..destination + size], old[chain + 4..chain + 4 + size]);
    assert_eq!(new[ttl], old[ttl] - 1);
    if size == 4 && sum(&old[..header_len]) == 0xffff {
        assert_eq!(sum(&new[..header_len]), 0xffff, "outer checksum");
    }
    let kind = if new[end] >> 4 == 6 { [0x86, 0xdd] } else { [8, 0] };
    [&[0; 12][..], &kind, &new[end..]].concat()
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
