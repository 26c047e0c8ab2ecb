//! Packets that do not fit once encapsulated, the answers to them, and jumbo frames.

use crate::case::{
    ACK, CLIENT4, Case, Family,
    Family::{V4, V6},
    Loaded::{FewAnswers, Off},
    backend, cases, sized, tcp, udp, with,
};
use lb_common::{
    Backend, Reason,
    backend::mode::{GUE, IPIP},
    mapped, names,
};
use test_packet::{Packet, Vlan, checksum_is_right, outer, xdp};

/// A packet of this IP length, in a tunnel whose path takes 1,500 bytes.
fn sent(inner: Family, outer: Family, mode: u8, vlan: Vlan, len: usize) -> Case {
    let packet = Packet { vlan, ..sized(tcp(inner, ACK), len) };
    Case::new(packet, Backend { mtu: 1_500, ..backend(1, mode, outer) })
}

fn with_source(inner: Family, source: lb_common::Address) -> Case {
    let mut case = sent(inner, V4, IPIP, Vlan::None, 1_500);
    case.packet.source.0 = source;
    // Nothing is checked in it but that it has not become an answer.
    case.drops(Reason::MartianSource)
}

const GROUP: lb_common::Address = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

cases! {
    ipip_4in4_fits: sent(V4, V4, IPIP, Vlan::None, 1_480).goes_to(1, false);
    ipip_4in4_one_too_many: sent(V4, V4, IPIP, Vlan::None, 1_481).answers(1_480);
    ipip_6in4_fits: sent(V6, V4, IPIP, Vlan::None, 1_480).goes_to(1, false);
    ipip_6in4_one_too_many: sent(V6, V4, IPIP, Vlan::None, 1_481).answers(1_480);
    ipip_4in6_fits: sent(V4, V6, IPIP, Vlan::None, 1_460).goes_to(1, false);
    ipip_4in6_one_too_many: sent(V4, V6, IPIP, Vlan::None, 1_461).answers(1_460);
    ipip_6in6_fits: sent(V6, V6, IPIP, Vlan::None, 1_460).goes_to(1, false);
    ipip_6in6_one_too_many: sent(V6, V6, IPIP, Vlan::None, 1_461).answers(1_460);
    gue_4in4_fits: sent(V4, V4, GUE, Vlan::None, 1_468).goes_to(1, false);
    gue_4in4_one_too_many: sent(V4, V4, GUE, Vlan::None, 1_469).answers(1_468);
    gue_6in4_one_too_many: sent(V6, V4, GUE, Vlan::None, 1_469).answers(1_468);
    gue_4in6_one_too_many: sent(V4, V6, GUE, Vlan::None, 1_449).answers(1_448);
    gue_6in6_fits: sent(V6, V6, GUE, Vlan::None, 1_448).goes_to(1, false);
    gue_6in6_one_too_many: sent(V6, V6, GUE, Vlan::None, 1_449).answers(1_448);
    full_size_v4: sent(V4, V4, IPIP, Vlan::None, 1_500).answers(1_480);
    full_size_v6: sent(V6, V6, GUE, Vlan::None, 1_500).answers(1_448);
    vlan_v4: sent(V4, V4, IPIP, Vlan::One, 1_500).answers(1_480);
    vlan_v6: sent(V6, V4, IPIP, Vlan::One, 1_500).answers(1_480);
    qinq_v4: sent(V4, V6, GUE, Vlan::Two, 1_500).answers(1_448);
    qinq_v6: sent(V6, V6, IPIP, Vlan::Two, 1_500).answers(1_460);
    fragmentation_allowed_is_answered_too: {
        let mut case = sent(V4, V4, IPIP, Vlan::None, 1_500);
        case.packet.dont_fragment = false;
        case.answers(1_480)
    };
    udp_too_big_is_a_known_flow: Case::new(sized(udp(V4), 1_500), Backend { mtu: 1_500, ..backend(1, IPIP, V4) })
        .answers(1_480)
        .leaves(names::UDP_FLOWS, 1, 0, true);
    path_of_9000: {
        let mut case = sent(V4, V4, IPIP, Vlan::None, 1_500);
        case.backends[0].1.mtu = 9_000;
        case.goes_to(1, false)
    };
    path_unknown: {
        let mut case = sent(V4, V4, IPIP, Vlan::None, 1_500);
        case.backends[0].1.mtu = 0;
        case.goes_to(1, false)
    };
    source_loopback: with_source(V4, mapped([127, 0, 0, 1]));
    source_zero: with_source(V4, mapped([0, 0, 0, 0]));
    source_multicast: with_source(V4, mapped([239, 1, 2, 3]));
    source_broadcast: with_source(V4, mapped([255, 255, 255, 255]));
    source_v6_zero: with_source(V6, [0; 16]);
    source_v6_multicast: with_source(V6, GROUP);
    answers_off: sent(V4, V4, IPIP, Vlan::None, 1_500).on(Off).drops(Reason::TooBigDropped);
    path_narrower_than_a_quote: {
        let mut case = sent(V4, V4, IPIP, Vlan::None, 400);
        case.backends[0].1.mtu = 300;
        case.drops(Reason::TooBigDropped)
    };
    jumbo_4in4: jumbo(V4, V4, IPIP, 8_980).goes_to(1, false);
    jumbo_6in6: jumbo(V6, V6, IPIP, 8_960).goes_to(1, false);
    jumbo_gue: jumbo(V4, V6, GUE, 8_948).goes_to(1, false);
    jumbo_4in4_too_big: jumbo(V4, V4, IPIP, 8_981).answers(8_980);
    jumbo_6in6_too_big: jumbo(V6, V6, IPIP, 9_000).answers(8_960);
    jumbo_for_a_narrow_path: {
        let mut case = jumbo(V4, V4, IPIP, 8_000);
        case.backends[0].1.mtu = 1_500;
        case.answers(1_480)
    };
    jumbo_passed_on: {
        let case = jumbo(V4, V4, IPIP, 8_000);
        let mut bytes = case.packet.bytes();
        bytes[23] = 1;
        case.sends(bytes).passes(Reason::Icmp)
    };
    jumbo_cut: {
        let case = jumbo(V4, V4, IPIP, 8_000);
        let mut bytes = case.packet.bytes();
        bytes.truncate(7_000);
        case.sends(bytes).passes(Reason::Truncated)
    };
}

/// A packet that takes several buffers, for a path of 9,000 bytes.
fn jumbo(inner: Family, outer: Family, mode: u8, len: usize) -> Case {
    Case::new(sized(tcp(inner, ACK), len), Backend { mtu: 9_000, ..backend(1, mode, outer) })
}

/// Two at once and one a second: of ten too-big packets, the others are dropped and counted so.
#[test]
fn answers_are_limited() {
    with(FewAnswers, |ingress| {
        let case = sent(V4, V4, IPIP, Vlan::None, 1_500);
        case.fill(ingress);
        let bytes = case.packet.bytes();
        let verdicts: Vec<u32> = (0..10).map(|_| ingress.run(&bytes).expect("runs").verdict).collect();
        let answered = verdicts.iter().filter(|v| **v == xdp::TX).count() as u64;
        // A budget per processor: a test that moves between two gets both.
        assert!((2..=5).contains(&answered), "{verdicts:?}");
        assert!(verdicts.iter().all(|v| [xdp::TX, xdp::DROP].contains(v)));
        let counts = ingress.counts();
        assert_eq!(counts, [(Reason::TooBigAnswered, answered), (Reason::TooBigDropped, 10 - answered)]);
        assert_eq!(ingress.stats(1).packets, 0);
    });
}

/// The answer, read again: both checksums are right, and it is for the sender.
#[test]
fn an_answer_reads_well() {
    let case = sent(V4, V4, IPIP, Vlan::None, 1_500);
    let frame = outer::too_big(&case.packet, 1_480);
    assert!(checksum_is_right(&frame[14..34]) && checksum_is_right(&frame[34..]));
    assert_eq!(frame[30..34], CLIENT4[12..]);
    assert_eq!(frame.len(), 14 + 20 + 8 + 512);
}
