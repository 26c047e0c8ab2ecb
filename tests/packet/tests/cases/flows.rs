//! Flow tables on the loaded program: what is looked up, written, promoted, forgotten. All branches are
//! covered natively (lb-ebpf, tests/native/choose.rs); these rows show that the kernel's maps do the same.

use crate::case::{
    ACK, Case, FIN,
    Family::{V4, V6},
    RST, SYN, backend, cases, tcp, udp,
};
use lb_common::{
    Backend, Reason,
    backend::{
        flags::{DOWN, DRAINING, RESOLVED, USED},
        mode::IPIP,
    },
    flow::{
        Flow, SYN_TIMEOUT_S,
        flags::{CLOSING, DISPUTED, HANDSHAKE},
    },
    names::{FLOWS, SYN_CACHE, UDP_FLOWS},
    service::flags::{RESET_ON_DOWN, TRACK_ALL},
};
use test_packet::{Packet, Pair, SEQUENCE};

/// Flags of an entry that a handshake wrote, with the upper half of its latest sequence number.
const fn begun(half: u32) -> u32 {
    HANDSHAKE | half << 16
}

/// Slots hold 1, formerly 2; tables name 3.
fn case(packet: Packet, pair: Pair) -> Case {
    Case::new(packet, backend(1, IPIP, V4))
        .backend(2, backend(2, IPIP, V4))
        .backend(3, backend(3, IPIP, V4))
        .pair(pair)
}

fn moving(flags: u8) -> Case {
    case(tcp(V4, flags), Pair::Transition(1, 2))
}

fn marked(flags: u8) -> Case {
    case(tcp(V4, flags), Pair::Tracked(1))
}

/// Without data.
fn bare(flags: u8) -> Case {
    case(Packet { payload: vec![], ..tcp(V4, flags) }, Pair::Tracked(1))
}

/// Backend 3 with these flags.
fn three(mut case: Case, flags: u32) -> Case {
    case.backends[2].1 = Backend { flags, ..case.backends[2].1 };
    case
}

cases! {
    stable_slot_looks_nothing_up: case(tcp(V4, ACK), Pair::Stable(1)).knows(FLOWS, 3, 60, 0).goes_to(1, false).leaves(FLOWS, 3, 0, false);
    transition_syn_is_noted: moving(SYN).goes_to(1, true).leaves(SYN_CACHE, 1, 0, true);
    transition_syn_repeated: moving(SYN).knows(SYN_CACHE, 3, 60, 0).goes_to(3, false).leaves(SYN_CACHE, 3, 0, false);
    transition_syn_repeated_too_late: moving(SYN).knows(SYN_CACHE, 3, SYN_TIMEOUT_S + 5, 0).goes_to(1, true).leaves(SYN_CACHE, 1, 0, true);
    transition_syn_of_a_live_flow: moving(SYN).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, false);
    transition_handshake_is_promoted: moving(ACK).knows(SYN_CACHE, 3, 60, 0).goes_to(3, false).counts(Reason::FlowPromoted).leaves(FLOWS, 3, Flow::begun_at(SEQUENCE), true);
    transition_established_goes_to_the_previous: moving(ACK).goes_to(2, false).counts(Reason::FlowPromoted).leaves(FLOWS, 2, 0, true);
    transition_fin_is_written_as_closing: moving(FIN).goes_to(2, false).counts(Reason::FlowPromoted).leaves(FLOWS, 2, CLOSING, true);
    transition_known_is_followed: moving(ACK).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, true);
    transition_ipv6: case(tcp(V6, ACK), Pair::Transition(1, 2)).goes_to(2, false).counts(Reason::FlowPromoted).leaves(FLOWS, 2, 0, true);
    transition_ipv6_syn: case(tcp(V6, SYN), Pair::Transition(1, 2)).goes_to(1, true).leaves(SYN_CACHE, 1, 0, true);
    tracked_syn_is_not_noted: marked(SYN).goes_to(1, true);
    tracked_unknown_takes_the_primary: marked(ACK).goes_to(1, false);
    tracked_known_is_touched: marked(ACK).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, true);
    tracked_rst_closes: marked(RST).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, CLOSING, true);
    tracked_closing_is_followed: bare(ACK).knows(FLOWS, 3, 60, CLOSING).goes_to(3, false).leaves(FLOWS, 3, CLOSING, true);
    tracked_closing_lives_again_with_data: marked(ACK).knows(FLOWS, 3, 60, CLOSING).goes_to(3, false).leaves(FLOWS, 3, 0, true);
    tracked_syn_after_closing_is_noted: marked(SYN).knows(FLOWS, 3, 60, CLOSING).goes_to(1, true).leaves(FLOWS, 3, CLOSING, false).leaves(SYN_CACHE, 1, 0, true);
    tracked_draining_is_followed: three(marked(ACK), USED | RESOLVED | DRAINING).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, true);
    tracked_down_is_followed: three(marked(ACK), USED | RESOLVED | DOWN).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, false);
    tracked_down_reset_on_down: three(marked(ACK), USED | RESOLVED | DOWN).view(RESET_ON_DOWN).knows(FLOWS, 3, 60, 0).goes_to(1, false).counts(Reason::FlowStale).leaves(FLOWS, 3, 0, false);
    tracked_removed_goes_to_the_primary: three(marked(ACK), 0).knows(FLOWS, 3, 60, 0).goes_to(1, false).counts(Reason::FlowStale).leaves(FLOWS, 3, 0, false);
    tracked_index_of_another_service: {
        let mut case = marked(ACK);
        case.backends[2].1.service = 9;
        case.knows(FLOWS, 3, 60, 0).goes_to(1, false).counts(Reason::FlowStale).leaves(FLOWS, 3, 0, false)
    };
    handshake_is_followed: marked(ACK).knows(FLOWS, 3, 60, begun(0x0100)).goes_to(3, false).leaves(FLOWS, 3, begun(0x0102), true);
    handshake_of_another_flow_is_not_followed: marked(ACK).knows(FLOWS, 3, 60, begun(0x9000)).goes_to(1, false).leaves(FLOWS, 3, begun(0x9000) | DISPUTED, false);
    handshake_of_another_flow_in_transition: moving(ACK).knows(FLOWS, 3, 60, begun(0x9000)).goes_to(2, false).leaves(FLOWS, 3, begun(0x9000) | DISPUTED, false);
    syn_on_the_handshake_of_another_flow: marked(SYN).knows(FLOWS, 3, 60, begun(0x9000)).goes_to(3, false).leaves(FLOWS, 3, begun(0x9000), false).leaves(SYN_CACHE, 3, 0, true);
    track_all_looks_up_in_a_stable_slot: case(tcp(V4, ACK), Pair::Stable(1)).view(TRACK_ALL).knows(FLOWS, 3, 60, 0).goes_to(3, false).leaves(FLOWS, 3, 0, true);
    udp_expired_is_placed_anew: case(udp(V4), Pair::Stable(1)).knows(UDP_FLOWS, 3, 65, 0).goes_to(1, true).leaves(UDP_FLOWS, 1, 0, true);
    udp_down_moves: three(case(udp(V4), Pair::Stable(1)), USED | RESOLVED | DOWN).knows(UDP_FLOWS, 3, 5, 0).goes_to(1, true).counts(Reason::FlowStale).leaves(UDP_FLOWS, 1, 0, true);
    udp_draining_stays: three(case(udp(V4), Pair::Stable(1)), USED | RESOLVED | DRAINING).knows(UDP_FLOWS, 3, 5, 0).goes_to(3, false).leaves(UDP_FLOWS, 3, 0, true);
    udp_ipv6_known: case(udp(V6), Pair::Stable(1)).knows(UDP_FLOWS, 3, 5, 0).goes_to(3, false).leaves(UDP_FLOWS, 3, 0, true);
}

/// A flow's life over a change: SYN, handshake, data, close, and the next flow of the same port.
#[test]
fn a_flow_from_syn_to_syn() {
    crate::case::with(crate::case::Loaded::Default, |ingress| {
        let case = moving(SYN);
        case.fill(ingress);
        let mut send = |flags: u8| {
            let before: Vec<u64> = (1..4).map(|i| ingress.stats(i).packets).collect();
            let packet = Packet { payload: vec![], ..tcp(V4, flags) };
            ingress.run(&packet.bytes()).expect("runs");
            (1..4).find(|i| ingress.stats(*i).packets > before[*i as usize - 1]).expect("forwarded")
        };
        assert_eq!([send(SYN), send(SYN), send(ACK), send(ACK), send(FIN), send(ACK)], [1; 6]);
        assert_eq!(send(SYN), 1, "the next flow of the port");
        let table = |ingress: &mut test_packet::Ingress, name| {
            ingress.flows(name).iter().map(|(_, flow)| (flow.backend, flow.flags)).collect::<Vec<_>>()
        };
        assert_eq!(table(ingress, FLOWS), [(1, CLOSING | Flow::begun_at(SEQUENCE))]);
        assert_eq!(ingress.cached_syns(), 1);
        assert_eq!(ingress.flow(SYN_CACHE, &case.key()).map(|flow| flow.backend), Some(1));
        assert_eq!(ingress.counts(), [(Reason::FlowPromoted, 1)]);
    });
}
