//! `l2`: the worker's MAC address on an unchanged packet. And `local`: nothing changed at all.

use crate::case::{
    ACK, Case, Family,
    Family::{V4, V6},
    Phase::{Established, First, Known, Stateless, Syn, Transition},
    SYN, backend, cases, sized, tcp, tunnelled, udp,
};
use lb_common::{
    Backend, BackendStats, Be16, Reason,
    backend::{
        flags::USED,
        mode::{L2, LOCAL},
    },
    mapped, names,
};
use test_packet::{
    Packet, Vlan,
    bed::{EGRESS, EGRESS_MAC, EGRESS_MTU, NEIGHBOUR_MAC},
    xdp,
};

/// Not resolved by the daemon; the fields of the expected frame hold what the bed's routes answer.
fn by_fib(address: [u8; 4]) -> Backend {
    Backend {
        address: mapped(address),
        flags: USED,
        next_hop: NEIGHBOUR_MAC,
        egress_mac: EGRESS_MAC,
        ..backend(1, L2, V4)
    }
}

/// A packet of this IP length to a segment of 1,500 bytes.
fn long(family: Family, vlan: Vlan, len: usize) -> Case {
    let packet = Packet { vlan, ..sized(tcp(family, ACK), len) };
    Case::new(packet, Backend { mtu: 1_500, ..backend(1, L2, family) })
}

/// Handed to the host as it came, and counted for the backend.
fn local(packet: Packet, is_new: bool) -> Case {
    let mut case = Case::new(packet, backend(1, LOCAL, V4));
    case.verdict = xdp::PASS;
    case.frame = case.packet.bytes();
    let bytes = case.packet.ip().len() as u64;
    case.stats.push((1, BackendStats { packets: 1, bytes, flows: is_new.into() }));
    case
}

cases! {
    v4_tcp_untagged_syn: tunnelled(L2, V4, V4, Vlan::None, Syn);
    v4_tcp_untagged_established: tunnelled(L2, V4, V4, Vlan::None, Established);
    v4_tcp_untagged_transition: tunnelled(L2, V4, V4, Vlan::None, Transition);
    v4_tcp_vlan_syn: tunnelled(L2, V4, V4, Vlan::One, Syn);
    v4_tcp_qinq_established: tunnelled(L2, V4, V4, Vlan::Two, Established);
    v4_udp_untagged_first: tunnelled(L2, V4, V4, Vlan::None, First);
    v4_udp_vlan_known: tunnelled(L2, V4, V4, Vlan::One, Known);
    v4_udp_qinq_stateless: tunnelled(L2, V4, V4, Vlan::Two, Stateless);
    v6_tcp_untagged_syn: tunnelled(L2, V6, V6, Vlan::None, Syn);
    v6_tcp_vlan_established: tunnelled(L2, V6, V6, Vlan::One, Established);
    v6_tcp_qinq_transition: tunnelled(L2, V6, V6, Vlan::Two, Transition);
    v6_udp_untagged_first: tunnelled(L2, V6, V6, Vlan::None, First);
    v6_udp_vlan_stateless: tunnelled(L2, V6, V6, Vlan::One, Stateless);
    v4_packet_to_a_worker_known_by_its_v6_address: tunnelled(L2, V4, V6, Vlan::None, Established);
    v6_packet_to_a_worker_known_by_its_v4_address: tunnelled(L2, V6, V4, Vlan::One, Established);
    options_stay: Case::new(Packet { options: vec![7, 7, 4, 0, 1, 1, 1, 0], ..tcp(V4, ACK) }, backend(1, L2, V4))
        .goes_to(1, false);
    last_hop_may_be_used_up: Case::new(Packet { ttl: 1, ..tcp(V4, ACK) }, backend(1, L2, V4)).goes_to(1, false);
    tag_pushed: Case::new(tcp(V4, ACK), Backend { vlan: Be16::new(300), ..backend(1, L2, V4) }).goes_to(1, false);
    tag_replaced: Case::new(Packet { vlan: Vlan::Two, ..tcp(V6, ACK) }, Backend { vlan: Be16::new(9), ..backend(1, L2, V6) })
        .goes_to(1, false);
    redirected: Case::new(tcp(V4, SYN), Backend { ifindex: EGRESS, ..backend(1, L2, V4) }).redirected_to(1, true);
    full_size_fits_v4: long(V4, Vlan::None, 1_500).goes_to(1, false);
    full_size_fits_v6: long(V6, Vlan::One, 1_500).goes_to(1, false);
    too_big_v4: long(V4, Vlan::None, 1_501).answers(1_500);
    too_big_v6: long(V6, Vlan::Two, 1_501).answers(1_500);
    fib_on_the_segment: Case::new(tcp(V4, ACK), by_fib([10, 1, 0, 1])).redirected_to(1, false).counts(Reason::FibLookup);
    fib_behind_a_router: Case::new(tcp(V4, ACK), by_fib([10, 3, 0, 77])).drops(Reason::NotOnLink).counts(Reason::FibLookup);
    fib_no_neighbour: Case::new(tcp(V4, ACK), by_fib([10, 1, 0, 200])).drops(Reason::NoNeighbour).counts(Reason::FibLookup);
    fib_full_size: Case::new(sized(tcp(V4, ACK), usize::from(EGRESS_MTU)), by_fib([10, 1, 0, 1]))
        .redirected_to(1, false)
        .counts(Reason::FibLookup);
    fib_too_big: Case::new(sized(tcp(V4, ACK), usize::from(EGRESS_MTU) + 1), by_fib([10, 1, 0, 1]))
        .answers(EGRESS_MTU)
        .counts(Reason::FibLookup);
    local_v4_syn: local(tcp(V4, SYN), true);
    local_v6_established: local(tcp(V6, ACK), false);
    local_udp_tagged: local(Packet { vlan: Vlan::One, ..udp(V4) }, true).leaves(names::UDP_FLOWS, 1, 0, true);
}
