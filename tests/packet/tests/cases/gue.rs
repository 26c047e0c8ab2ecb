//! `gue`: every pair of families, protocol, tagging and phase of a flow.

use crate::case::{
    Family::{V4, V6},
    Phase::{Established, First, Known, Stateless, Syn, Transition},
    cases, tunnelled,
};
use lb_common::backend::mode::GUE;
use test_packet::Vlan;

cases! {
    v4_in_v4_tcp_untagged_syn: tunnelled(GUE, V4, V4, Vlan::None, Syn);
    v4_in_v4_tcp_untagged_established: tunnelled(GUE, V4, V4, Vlan::None, Established);
    v4_in_v4_tcp_untagged_transition: tunnelled(GUE, V4, V4, Vlan::None, Transition);
    v4_in_v4_tcp_vlan_syn: tunnelled(GUE, V4, V4, Vlan::One, Syn);
    v4_in_v4_tcp_vlan_established: tunnelled(GUE, V4, V4, Vlan::One, Established);
    v4_in_v4_tcp_vlan_transition: tunnelled(GUE, V4, V4, Vlan::One, Transition);
    v4_in_v4_tcp_qinq_syn: tunnelled(GUE, V4, V4, Vlan::Two, Syn);
    v4_in_v4_tcp_qinq_established: tunnelled(GUE, V4, V4, Vlan::Two, Established);
    v4_in_v4_tcp_qinq_transition: tunnelled(GUE, V4, V4, Vlan::Two, Transition);
    v4_in_v4_udp_untagged_first: tunnelled(GUE, V4, V4, Vlan::None, First);
    v4_in_v4_udp_untagged_known: tunnelled(GUE, V4, V4, Vlan::None, Known);
    v4_in_v4_udp_untagged_stateless: tunnelled(GUE, V4, V4, Vlan::None, Stateless);
    v4_in_v4_udp_vlan_first: tunnelled(GUE, V4, V4, Vlan::One, First);
    v4_in_v4_udp_vlan_known: tunnelled(GUE, V4, V4, Vlan::One, Known);
    v4_in_v4_udp_vlan_stateless: tunnelled(GUE, V4, V4, Vlan::One, Stateless);
    v4_in_v4_udp_qinq_first: tunnelled(GUE, V4, V4, Vlan::Two, First);
    v4_in_v4_udp_qinq_known: tunnelled(GUE, V4, V4, Vlan::Two, Known);
    v4_in_v4_udp_qinq_stateless: tunnelled(GUE, V4, V4, Vlan::Two, Stateless);
    v4_in_v6_tcp_untagged_syn: tunnelled(GUE, V4, V6, Vlan::None, Syn);
    v4_in_v6_tcp_untagged_established: tunnelled(GUE, V4, V6, Vlan::None, Established);
    v4_in_v6_tcp_untagged_transition: tunnelled(GUE, V4, V6, Vlan::None, Transition);
    v4_in_v6_tcp_vlan_syn: tunnelled(GUE, V4, V6, Vlan::One, Syn);
    v4_in_v6_tcp_vlan_established: tunnelled(GUE, V4, V6, Vlan::One, Established);
    v4_in_v6_tcp_vlan_transition: tunnelled(GUE, V4, V6, Vlan::One, Transition);
    v4_in_v6_tcp_qinq_syn: tunnelled(GUE, V4, V6, Vlan::Two, Syn);
    v4_in_v6_tcp_qinq_established: tunnelled(GUE, V4, V6, Vlan::Two, Established);
    v4_in_v6_tcp_qinq_transition: tunnelled(GUE, V4, V6, Vlan::Two, Transition);
    v4_in_v6_udp_untagged_first: tunnelled(GUE, V4, V6, Vlan::None, First);
    v4_in_v6_udp_untagged_known: tunnelled(GUE, V4, V6, Vlan::None, Known);
    v4_in_v6_udp_untagged_stateless: tunnelled(GUE, V4, V6, Vlan::None, Stateless);
    v4_in_v6_udp_vlan_first: tunnelled(GUE, V4, V6, Vlan::One, First);
    v4_in_v6_udp_vlan_known: tunnelled(GUE, V4, V6, Vlan::One, Known);
    v4_in_v6_udp_vlan_stateless: tunnelled(GUE, V4, V6, Vlan::One, Stateless);
    v4_in_v6_udp_qinq_first: tunnelled(GUE, V4, V6, Vlan::Two, First);
    v4_in_v6_udp_qinq_known: tunnelled(GUE, V4, V6, Vlan::Two, Known);
    v4_in_v6_udp_qinq_stateless: tunnelled(GUE, V4, V6, Vlan::Two, Stateless);
    v6_in_v4_tcp_untagged_syn: tunnelled(GUE, V6, V4, Vlan::None, Syn);
    v6_in_v4_tcp_untagged_established: tunnelled(GUE, V6, V4, Vlan::None, Established);
    v6_in_v4_tcp_untagged_transition: tunnelled(GUE, V6, V4, Vlan::None, Transition);
    v6_in_v4_tcp_vlan_syn: tunnelled(GUE, V6, V4, Vlan::One, Syn);
    v6_in_v4_tcp_vlan_established: tunnelled(GUE, V6, V4, Vlan::One, Established);
    v6_in_v4_tcp_vlan_transition: tunnelled(GUE, V6, V4, Vlan::One, Transition);
    v6_in_v4_tcp_qinq_syn: tunnelled(GUE, V6, V4, Vlan::Two, Syn);
    v6_in_v4_tcp_qinq_established: tunnelled(GUE, V6, V4, Vlan::Two, Established);
    v6_in_v4_tcp_qinq_transition: tunnelled(GUE, V6, V4, Vlan::Two, Transition);
    v6_in_v4_udp_untagged_first: tunnelled(GUE, V6, V4, Vlan::None, First);
    v6_in_v4_udp_untagged_known: tunnelled(GUE, V6, V4, Vlan::None, Known);
    v6_in_v4_udp_untagged_stateless: tunnelled(GUE, V6, V4, Vlan::None, Stateless);
    v6_in_v4_udp_vlan_first: tunnelled(GUE, V6, V4, Vlan::One, First);
    v6_in_v4_udp_vlan_known: tunnelled(GUE, V6, V4, Vlan::One, Known);
    v6_in_v4_udp_vlan_stateless: tunnelled(GUE, V6, V4, Vlan::One, Stateless);
    v6_in_v4_udp_qinq_first: tunnelled(GUE, V6, V4, Vlan::Two, First);
    v6_in_v4_udp_qinq_known: tunnelled(GUE, V6, V4, Vlan::Two, Known);
    v6_in_v4_udp_qinq_stateless: tunnelled(GUE, V6, V4, Vlan::Two, Stateless);
    v6_in_v6_tcp_untagged_syn: tunnelled(GUE, V6, V6, Vlan::None, Syn);
    v6_in_v6_tcp_untagged_established: tunnelled(GUE, V6, V6, Vlan::None, Established);
    v6_in_v6_tcp_untagged_transition: tunnelled(GUE, V6, V6, Vlan::None, Transition);
    v6_in_v6_tcp_vlan_syn: tunnelled(GUE, V6, V6, Vlan::One, Syn);
    v6_in_v6_tcp_vlan_established: tunnelled(GUE, V6, V6, Vlan::One, Established);
    v6_in_v6_tcp_vlan_transition: tunnelled(GUE, V6, V6, Vlan::One, Transition);
    v6_in_v6_tcp_qinq_syn: tunnelled(GUE, V6, V6, Vlan::Two, Syn);
    v6_in_v6_tcp_qinq_established: tunnelled(GUE, V6, V6, Vlan::Two, Established);
    v6_in_v6_tcp_qinq_transition: tunnelled(GUE, V6, V6, Vlan::Two, Transition);
    v6_in_v6_udp_untagged_first: tunnelled(GUE, V6, V6, Vlan::None, First);
    v6_in_v6_udp_untagged_known: tunnelled(GUE, V6, V6, Vlan::None, Known);
    v6_in_v6_udp_untagged_stateless: tunnelled(GUE, V6, V6, Vlan::None, Stateless);
    v6_in_v6_udp_vlan_first: tunnelled(GUE, V6, V6, Vlan::One, First);
    v6_in_v6_udp_vlan_known: tunnelled(GUE, V6, V6, Vlan::One, Known);
    v6_in_v6_udp_vlan_stateless: tunnelled(GUE, V6, V6, Vlan::One, Stateless);
    v6_in_v6_udp_qinq_first: tunnelled(GUE, V6, V6, Vlan::Two, First);
    v6_in_v6_udp_qinq_known: tunnelled(GUE, V6, V6, Vlan::Two, Known);
    v6_in_v6_udp_qinq_stateless: tunnelled(GUE, V6, V6, Vlan::Two, Stateless);
}
