//! Settings made at load: what is switched off is not looked at, and costs nothing.

use crate::case::{
    ACK, Case,
    Family::{V4, V6},
    Loaded::{LowTtl, Off},
    SYN, backend, cases, tcp, udp,
};
use lb_common::{
    Backend, Reason,
    backend::mode::{GUE, IPIP},
    names,
};
use test_packet::{Packet, Vlan};

/// As forwarded, but with counters off.
fn uncounted(case: Case) -> Case {
    Case { stats: vec![], ..case.on(Off) }
}

/// The same with an outer TTL of 9.
fn low_ttl(case: Case, at: usize) -> Case {
    let mut case = case.on(LowTtl).goes_to(1, false);
    case.frame[at] = 9;
    if case.frame[12] == 8 {
        // 55 less in the upper byte of a word: the checksum grows by as much, with end-around carry.
        let check = u32::from(u16::from_be_bytes([case.frame[24], case.frame[25]])) + (55 << 8);
        let check = (check & 0xffff) + (check >> 16);
        case.frame[24..26].copy_from_slice(&(check as u16).to_be_bytes());
    }
    case
}

cases! {
    ipv6_off: Case::new(tcp(V6, SYN), backend(1, IPIP, V6)).on(Off).passes(Reason::Ipv6Off);
    ipv6_off_udp: Case::new(udp(V6), backend(1, IPIP, V6)).on(Off).passes(Reason::Ipv6Off);
    ipv6_off_v4_in_v6_works: uncounted(Case::new(tcp(V4, SYN), backend(1, IPIP, V6)).goes_to(1, true));
    vlan_off: Case::new(Packet { vlan: Vlan::One, ..tcp(V4, SYN) }, backend(1, IPIP, V4)).on(Off).passes(Reason::VlanOff);
    qinq_off: Case::new(Packet { vlan: Vlan::Two, ..tcp(V4, SYN) }, backend(1, IPIP, V4)).on(Off).passes(Reason::VlanOff);
    vlan_off_egress_tag_works: {
        let tagged = Backend { vlan: lb_common::Be16::new(5), ..backend(1, IPIP, V4) };
        uncounted(Case::new(tcp(V4, ACK), tagged).goes_to(1, false))
    };
    stats_off_tcp: uncounted(Case::new(tcp(V4, SYN), backend(1, IPIP, V4)).goes_to(1, true));
    stats_off_udp: uncounted(Case::new(udp(V4), backend(1, GUE, V4)).goes_to(1, true)).leaves(names::UDP_FLOWS, 1, 0, true);
    stats_off_reasons_stay: Case::new(tcp(V4, SYN), backend(1, 99, V4)).on(Off).drops(Reason::BadMode);
    low_outer_ttl: low_ttl(Case::new(tcp(V4, ACK), backend(1, IPIP, V4)), 22);
    low_outer_ttl_gue: low_ttl(Case::new(tcp(V6, ACK), backend(1, GUE, V4)), 22);
    low_outer_hop_limit: low_ttl(Case::new(tcp(V4, ACK), backend(1, IPIP, V6)), 21);
}
