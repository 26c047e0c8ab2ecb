//! Which service a packet belongs to, and tables that have no answer.

use crate::case::{
    ACK, Case,
    Family::{self, V4, V6},
    Loaded, RST, SERVICE, SYN, VIP4, VIP6, backend, cases, tcp, to, udp, v6,
};
use lb_common::{
    Backend, Be16, PortRange, Reason, Service, ServiceKey, ServiceView, Slot, Vip,
    backend::{flags::RESOLVED, mode::IPIP},
    mapped, names,
    service::{NO_SERVICE, TCP, UDP, flags},
};
use test_packet::{ACKNOWLEDGED, Ingress, Packet, Pair, SEQUENCE, Vlan, outer, xdp};

const EXACT: u32 = 2;
const RANGE: u32 = 3;
const ANY: u32 = 4;

/// The VIP serves TCP: port 8080 exactly, 8000 to 8999 as a range, and any other port; UDP 5000 to 5001 only.
fn shared_vip(ingress: &mut Ingress) {
    for (index, vip) in [(EXACT, VIP4), (EXACT + 10, VIP6)] {
        let (range, any) = (index + 1, index + 2);
        for service in [index, range, any] {
            let key = ServiceKey { vip, port: Be16::new(0), protocol: TCP, pad: 0 };
            ingress.service(service, key, &[Pair::Stable(service)], Ingress::stateless_view());
            ingress.backend(service, Backend { service, ..backend(service, IPIP, V4) });
        }
        ingress.set_key(ServiceKey { vip, port: Be16::new(8080), protocol: TCP, pad: 0 }, index);
        let mut rest = Vip { any_tcp: any, any_udp: NO_SERVICE, range_count: 2, ..Vip::EMPTY };
        rest.ranges[0] = PortRange { first: 8_000, last: 8_999, protocol: TCP.into(), service: range };
        rest.ranges[1] = PortRange { first: 5_000, last: 5_001, protocol: UDP.into(), service: range };
        // Not counted, so not looked at.
        rest.ranges[2] = PortRange { first: 0, last: 65_535, protocol: UDP.into(), service: any };
        ingress.vip(vip, rest);
    }
}

/// A packet to the shared VIP that a service takes.
fn matched(packet: Packet, index: u32) -> Case {
    let is_new = packet.protocol == TCP && packet.flags == SYN;
    // The tables of the case's own service are replaced.
    Case::new(packet, Backend::default())
        .setup(|ingress| {
            ingress.reset();
            shared_vip(ingress);
        })
        .backend(index, backend(index, IPIP, V4))
        .goes_to(index, is_new)
}

fn unmatched(packet: Packet, reason: Reason) -> Case {
    Case::new(packet, Backend::default())
        .setup(|ingress| {
            ingress.reset();
            shared_vip(ingress);
        })
        .passes(reason)
}

fn all_ranges(ingress: &mut Ingress) {
    ingress.reset();
    let key = ServiceKey { vip: VIP4, port: Be16::new(0), protocol: TCP, pad: 0 };
    ingress.service(SERVICE, key, &[Pair::Stable(1)], Ingress::view());
    ingress.backend(1, backend(1, IPIP, V4));
    let mut vip = Vip { range_count: 16, ..Vip::EMPTY };
    for (i, range) in vip.ranges.iter_mut().enumerate() {
        let first = 1_000 * (i as u16 + 1);
        *range = PortRange { first, last: first, protocol: TCP.into(), service: SERVICE };
    }
    ingress.vip(VIP4, vip);
}

fn to_backend_1(packet: Packet) -> Case {
    Case::new(packet, backend(1, IPIP, V4))
}

fn live_view(view: ServiceView, active: u32) -> Service {
    let dead = ServiceView { slot_base: u32::MAX, slot_count: 1, ..view };
    let views = if active == 0 { [view, dead] } else { [dead, view] };
    Service { active, used: 1, views, reserved: [0] }
}

cases! {
    exact_port: matched(to(V4, TCP, 8_080), EXACT);
    exact_port_before_range_syn: matched(Packet { flags: SYN, ..to(V4, TCP, 8_080) }, EXACT);
    range_first_port: matched(to(V4, TCP, 8_000), RANGE);
    range_last_port: matched(to(V4, TCP, 8_999), RANGE);
    range_within: matched(to(V4, TCP, 8_081), RANGE);
    below_range_any: matched(to(V4, TCP, 7_999), ANY);
    above_range_any: matched(to(V4, TCP, 9_000), ANY);
    any_port_0: matched(to(V4, TCP, 0), ANY);
    any_port_65535: matched(to(V4, TCP, 65_535), ANY);
    range_of_the_other_protocol: matched(to(V4, TCP, 5_000), ANY);
    udp_range: matched(to(V4, UDP, 5_001), RANGE);
    udp_without_any: unmatched(to(V4, UDP, 5_002), Reason::NoService);
    udp_of_an_exact_tcp_port: unmatched(to(V4, UDP, 8_080), Reason::NoService);
    ipv6_exact_port: matched(to(V6, TCP, 8_080), EXACT + 10);
    ipv6_range: matched(to(V6, TCP, 8_500), RANGE + 10);
    ipv6_any: matched(to(V6, TCP, 80), ANY + 10);
    sixteen_ranges_first: to_backend_1(to(V4, TCP, 1_000)).setup(all_ranges).goes_to(1, false);
    sixteen_ranges_last: to_backend_1(to(V4, TCP, 16_000)).setup(all_ranges).goes_to(1, false);
    sixteen_ranges_none: to_backend_1(to(V4, TCP, 16_001)).setup(all_ranges).passes(Reason::NoService);
    not_a_vip: to_backend_1(tcp(V4, SYN)).sends(to_other(V4)).passes(Reason::NotVip);
    ipv6_not_a_vip: to_backend_1(tcp(V6, SYN)).sends(to_other(V6)).passes(Reason::NotVip);
    vip_but_other_port: to_backend_1(tcp(V4, SYN)).sends(to(V4, TCP, 81).bytes()).passes(Reason::NoService);
    vip_but_other_protocol: to_backend_1(tcp(V4, SYN)).sends(to(V4, UDP, 80).bytes()).passes(Reason::NoService);
    no_slots: no_backend(vec![], SYN).drops(Reason::NoBackend);
    empty_slot_syn: no_backend(vec![Pair::Empty], SYN).drops(Reason::NoBackend);
    empty_slot_established: no_backend(vec![Pair::Empty], ACK).drops(Reason::NoBackend);
    empty_slot_udp: to_backend_1(udp(V4)).pair(Pair::Empty).drops(Reason::NoBackend);
    service_out_of_range: to_backend_1(tcp(V4, SYN))
        .setup(|i| i.set_key(key(), 10_000))
        .drops(Reason::BrokenTable);
    slots_out_of_range: to_backend_1(tcp(V4, SYN))
        .setup(|i| i.set_service(SERVICE, live_view(ServiceView { slot_base: 1 << 30, slot_count: 251, ..Ingress::view() }, 1)))
        .drops(Reason::BrokenTable);
    backend_out_of_range: to_backend_1(tcp(V4, SYN)).pair(Pair::Stable(100_000)).drops(Reason::BrokenTable);
    backend_not_used: to_backend_1(tcp(V4, SYN)).pair(Pair::Stable(5)).drops(Reason::BrokenTable);
    backend_resolved_but_not_used: Case::new(tcp(V4, SYN), Backend { flags: RESOLVED, ..backend(1, IPIP, V4) })
        .drops(Reason::BrokenTable);
    backend_of_another_service: Case::new(tcp(V4, SYN), Backend { service: 9, ..backend(1, IPIP, V4) })
        .drops(Reason::BrokenTable);
    refused_by_residency: no_backend(vec![], SYN).view(flags::REFUSED_BY_RESIDENCY).drops(Reason::Residency);
    refused_by_residency_empty_slot: no_backend(vec![Pair::Empty], ACK).view(flags::REFUSED_BY_RESIDENCY).drops(Reason::Residency);
    no_slots_reset: reset(V4, vec![], SYN, Vlan::None);
    empty_slot_reset_syn: reset(V4, vec![Pair::Empty], SYN, Vlan::One);
    empty_slot_reset_established: reset(V4, vec![Pair::Empty], ACK, Vlan::None);
    empty_slot_reset_syn_v6: reset(V6, vec![Pair::Empty], SYN, Vlan::Two);
    empty_slot_reset_established_v6: reset(V6, vec![Pair::Empty], ACK, Vlan::None);
    empty_slot_a_reset_is_not_answered: no_backend(vec![Pair::Empty], RST).view(flags::REJECT).drops(Reason::NoBackend);
    empty_slot_unreachable: unreachable(V4, Vlan::None);
    empty_slot_unreachable_v4_tagged: unreachable(V4, Vlan::Two);
    empty_slot_unreachable_v6: unreachable(V6, Vlan::None);
    empty_slot_unreachable_v6_tagged: unreachable(V6, Vlan::One);
    empty_slot_unreachable_with_answers_off: to_backend_1(udp(V4))
        .pair(Pair::Empty)
        .view(flags::REJECT)
        .on(Loaded::Off)
        .drops(Reason::NoBackend);
    forbidden_by_residency: Case::new(tcp(V4, ACK), backend(1, lb_common::backend::mode::FORBIDDEN, V4)).drops(Reason::Residency);
    mode_unknown: Case::new(tcp(V4, SYN), backend(1, 77, V4)).drops(Reason::BadMode);
    mode_not_in_this_program: Case::new(tcp(V4, SYN), backend(1, lb_common::backend::mode::NAT, V4)).drops(Reason::BadMode);
    the_other_view: to_backend_1(tcp(V4, SYN))
        .setup(|i| i.set_service(SERVICE, live_view(ServiceView { slot_base: SERVICE * 1_024, slot_count: 251, ..Ingress::view() }, 0)))
        .goes_to(1, true);
}

fn key() -> ServiceKey {
    ServiceKey { vip: VIP4, port: Be16::new(80), protocol: TCP, pad: 0 }
}

fn to_other(family: crate::case::Family) -> Vec<u8> {
    let mut packet = tcp(family, SYN);
    packet.destination.0 = if family == V4 { mapped([192, 0, 2, 2]) } else { v6(0, 2) };
    packet.bytes()
}

fn no_backend(pairs: Vec<Pair>, flags: u8) -> Case {
    Case { pairs, ..to_backend_1(tcp(V4, flags)) }
}

/// A segment that no backend takes is answered with a reset (RFC 9293 3.10.7.1).
fn reset(family: Family, pairs: Vec<Pair>, tcp_flags: u8, vlan: Vlan) -> Case {
    let packet = Packet { vlan, ..tcp(family, tcp_flags) };
    let numbers = if tcp_flags & ACK == 0 {
        (0, SEQUENCE + 1 + packet.payload.len() as u32, RST | ACK)
    } else {
        (ACKNOWLEDGED, 0, RST)
    };
    let frame = outer::reset(&packet, numbers.0, numbers.1, numbers.2);
    Case { pairs, ..to_backend_1(packet).view(flags::REJECT) }
        .becomes(xdp::TX, frame)
        .counts(Reason::NoBackendAnswered)
}

/// A datagram that no backend takes is answered with port unreachable.
fn unreachable(family: Family, vlan: Vlan) -> Case {
    let packet = Packet { vlan, ..udp(family) };
    let frame = outer::port_unreachable(&packet);
    to_backend_1(packet)
        .pair(Pair::Empty)
        .view(flags::REJECT)
        .becomes(xdp::TX, frame)
        .counts(Reason::NoBackendAnswered)
}

/// A swap is one store: before it the old view answers, after it the new one.
#[test]
fn a_swap_of_views() {
    crate::case::with(crate::case::Loaded::Default, |ingress| {
        let case = to_backend_1(tcp(V4, SYN)).backend(2, backend(2, IPIP, V4));
        case.fill(ingress);
        let view = ServiceView { slot_base: SERVICE * 1_024, slot_count: 251, ..Ingress::view() };
        let next = ServiceView { slot_base: 40_000, slot_count: 1, ..view };
        ingress.set_slot(40_000, Slot { primary: 2, secondary: 1 });
        let mut service = Service { active: 0, used: 1, views: [view, next], reserved: [0] };
        for (active, backend) in [(0, 1), (1, 2), (0, 1)] {
            service.active = active;
            ingress.set_service(SERVICE, service);
            let before = ingress.stats(backend).packets;
            ingress.run(&case.packet.bytes()).expect("runs");
            assert_eq!(ingress.stats(backend).packets, before + 1, "view {active}");
        }
        assert_eq!(ingress.flows(names::FLOWS), []);
    });
}
