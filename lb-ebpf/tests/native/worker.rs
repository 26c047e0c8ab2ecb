//! From the ingress host to the worker: what went in at one comes out at the other, one hop older.

use crate::{
    bodies::{sum, v4, v6},
    build::{Packet, Vlan},
    hostile::packet,
    world::{self, CLIENT4, CLIENT6, VIP4, VIP6, cases},
};
use lb_common::{
    Backend, Be16, Reason, Slot,
    backend::mode,
    is_mapped,
    service::{NO_SERVICE, TCP},
    settings::{DecapSettings, IngressSettings},
};
use lb_ebpf::{
    Verdict, ingress,
    native::{HashTables, VecFrame},
    worker::decap,
};
use proptest::prelude::*;

/// Outer addresses of a backend, by family and mode.
fn backend(mode: u8, is_ipv6: bool, vlan: u16) -> Backend {
    let base = world::backend(1);
    let (address, source, bits) =
        if is_ipv6 { (v6(1, 1), v6(0, 0), 48) } else { (v4(10, 1, 0, 1), v4(10, 9, 0, 0), 16) };
    let source_bits = if mode == mode::GUE { 0 } else { bits };
    Backend { mode, address, source, source_bits, vlan: Be16::new(vlan), service: NO_SERVICE, ..base }
}

/// Ingress tables with one backend for everything.
fn tables(backend: Backend) -> HashTables {
    let mut tables = crate::bodies::ingress::world();
    for slot in &mut tables.slots {
        *slot = Slot { primary: 1, secondary: 1 };
    }
    // A backend belongs to one service, so all ports lead to that one.
    let service = *tables.services.keys().next().unwrap();
    tables.service_index.values_mut().for_each(|index| *index = service);
    for vip in tables.vips.values_mut() {
        (vip.any_tcp, vip.any_udp) = (service, service);
        vip.ranges.iter_mut().for_each(|range| range.service = service);
    }
    tables.backends.clear();
    tables.backends.insert(1, Backend { service, ..backend });
    tables.spare_lookups();
    tables
}

/// The packet through both programs: the verdicts, and the frame that the worker's stack gets.
fn through(bytes: &[u8], backend: Backend, linear: usize) -> (Verdict, Reason, Vec<u8>) {
    let mut frame = VecFrame::new(bytes).linear(linear);
    let (verdict, _) = ingress::process(&mut frame, &tables(backend), &IngressSettings::DEFAULT);
    assert_eq!(verdict, Verdict::Transmit);
    let bytes = frame.bytes();
    let mut frame = VecFrame::new(&bytes).linear(linear + 80);
    let (verdict, reason) =
        decap::process(&mut frame, &crate::bodies::decap::world(), &DecapSettings::DEFAULT);
    (verdict, reason, frame.bytes())
}

/// The packet as a router would have forwarded it, in the frame of `backend`'s link.
fn expected(packet: &Packet, backend: &Backend) -> Vec<u8> {
    let mut older = packet.clone();
    older.ttl -= 1;
    let mut frame = [&backend.next_hop[..], &backend.egress_mac[..]].concat();
    if backend.vlan.get() != 0 {
        frame.extend([0x81, 0]);
        frame.extend(backend.vlan.to_bytes());
    }
    frame.extend(if is_mapped(&packet.destination.0) { [8, 0] } else { [0x86, 0xdd] });
    frame.extend(older.ip());
    frame
}

proptest! {
    #![proptest_config(cases(2_000))]
    #[test]
    fn comes_out_as_it_went_in(mut packet in packet(), gue: bool, outer6: bool, vlan in prop_oneof![Just(0u16), Just(300)]) {
        prop_assume!(is_mapped(&packet.source.0) == is_mapped(&packet.destination.0));
        // Others are dropped on the ingress host.
        packet.source.0 = if packet.destination.0 == VIP6 { CLIENT6 } else { CLIENT4 };
        packet.extensions.retain(|(kind, _)| *kind != 51);
        packet.extensions.truncate(3);
        prop_assume!(packet.extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() < 400);
        packet.ttl = packet.ttl.max(2);
        packet.destination.1 = if packet.protocol == TCP { 80 } else { 53 };
        let backend = backend(if gue { mode::GUE } else { mode::IPIP }, outer6, vlan);
        let (verdict, reason, frame) = through(&packet.bytes(), backend, 10_000);
        prop_assert_eq!(verdict, Verdict::Pass);
        prop_assert_eq!(reason, if gue { Reason::DecapGue } else { Reason::DecapIpip });
        prop_assert_eq!(frame, expected(&packet, &backend));
    }
}

/// All pairs of families and both modes, also with a jumbo packet most of which is outside the linear part.
#[test]
fn all_pairs_of_families() {
    for (client, vip) in [(CLIENT4, VIP4), (CLIENT6, VIP6)] {
        for outer6 in [false, true] {
            for mode in [mode::IPIP, mode::GUE] {
                for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                    for len in [0, 1, 1_400, 8_900] {
                        let mut packet = Packet::new(TCP, (client, 40_000), (vip, 80));
                        (packet.payload, packet.vlan) = (vec![0x77; len], vlan);
                        let backend = backend(mode, outer6, 0);
                        let (verdict, _, frame) = through(&packet.bytes(), backend, 3_000);
                        assert_eq!(verdict, Verdict::Pass);
                        assert_eq!(frame, expected(&packet, &backend), "{vip:?} in {:?}", backend.address);
                    }
                }
            }
        }
    }
}

/// Flows differ in what the worker's NIC spreads by: outer source (ipip), source port (gue), flow label.
#[test]
fn flows_are_spread_by_their_outer_headers() {
    let outer = |mode, outer6, port| {
        let packet = Packet::new(TCP, (CLIENT4, port), (VIP4, 80));
        let mut frame = VecFrame::new(&packet.bytes());
        let backend = backend(mode, outer6, 0);
        ingress::process(&mut frame, &tables(backend), &IngressSettings::DEFAULT);
        let bytes = frame.bytes();
        match (mode, outer6) {
            (mode::GUE, false) => bytes[34..36].to_vec(),
            (mode::GUE, true) => bytes[54..56].to_vec(),
            (_, false) => bytes[26..30].to_vec(),
            (_, true) => bytes[22..38].to_vec(),
        }
    };
    for (mode, outer6) in [(mode::GUE, false), (mode::GUE, true), (mode::IPIP, false), (mode::IPIP, true)] {
        let all: std::collections::BTreeSet<_> =
            (0..256).map(|port| outer(mode, outer6, 40_000 + port)).collect();
        assert!(all.len() > 240, "{} of 256 differ", all.len());
        assert_eq!(outer(mode, outer6, 7), outer(mode, outer6, 7), "a flow keeps its own");
        if mode == mode::IPIP && !outer6 {
            assert!(all.iter().all(|source| source[..2] == [10, 9]), "only the low bits vary");
        }
        if mode == mode::IPIP && outer6 {
            assert!(all.iter().all(|source| source[..10] == v6(0, 0)[..10]), "only the low bits vary");
        }
    }
}

/// RFC 6040, figure 4: ECN of what is delivered, by the marks inside and outside.
#[test]
fn congestion_marks() {
    const NOT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    let cases: [(u8, [Option<u8>; 4]); 4] = [
        // Inside; outside: not, ECT(0), ECT(1), CE.
        (NOT, [Some(NOT), Some(NOT), Some(NOT), None]),
        (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
        (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ];
    for is_ipv6 in [false, true] {
        for (inside, row) in cases {
            for (outside, expected) in [NOT, ECT0, ECT1, CE].into_iter().zip(row) {
                let (client, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
                let mut inner = Packet::new(TCP, (client, 1), (vip, 80));
                inner.tos = 0xb8 | inside;
                let mut outer = Packet::new(TCP, (v4(10, 9, 9, 9), 0), (v4(10, 1, 0, 1), 0));
                (outer.tos, outer.payload) = (0x48 | outside, inner.ip());
                let mut frame = VecFrame::new(&outer.around(if is_ipv6 { 41 } else { 4 }));
                let tables = crate::bodies::decap::world();
                let (_, reason) = decap::process(&mut frame, &tables, &DecapSettings::DEFAULT);
                let ip = &frame.bytes()[14..];
                let tos = if is_ipv6 { ip[0] << 4 | ip[1] >> 4 } else { ip[1] };
                match expected {
                    None => assert_eq!(reason, Reason::DecapEcn, "{inside} in {outside}"),
                    Some(mark) => {
                        assert_eq!((reason, tos), (Reason::DecapIpip, 0xb8 | mark), "{inside} in {outside}");
                        assert!(is_ipv6 || sum(&ip[..20]) == 0xffff, "checksum, {inside} in {outside}");
                    }
                }
            }
        }
    }
}
