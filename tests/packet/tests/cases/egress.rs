//! Where a packet leaves: interface, next hop, tag; from the backend's entry, or from the kernel's FIB.

use crate::case::{
    ACK, Case, Family,
    Family::{V4, V6},
    backend, cases, sized, tcp,
};
use lb_common::{
    Backend, Be16, Reason,
    backend::{
        flags::{CHANGING, USED},
        mode::{GUE, IPIP},
    },
    mapped,
};
use test_packet::{
    Packet, Vlan,
    bed::{EGRESS, EGRESS_MAC, EGRESS_MTU, NEIGHBOUR_MAC, UNLISTED},
};

fn case(backend: Backend) -> Case {
    Case::new(tcp(V4, ACK), backend)
}

fn tagged(mode: u8, outer: Family, vlan: u16) -> Backend {
    Backend { vlan: Be16::new(vlan), ..backend(1, mode, outer) }
}

fn elsewhere(mode: u8, outer: Family) -> Backend {
    Backend { ifindex: EGRESS, ..backend(1, mode, outer) }
}

/// A backend whose next hop is not filled in, with the answer that the bed's routes give in the fields
/// that the expected frame is made of.
fn by_fib(last: [u8; 4]) -> Backend {
    Backend {
        address: mapped(last),
        flags: USED,
        next_hop: NEIGHBOUR_MAC,
        egress_mac: EGRESS_MAC,
        ..backend(1, IPIP, V4)
    }
}

fn by_fib_v6(last: u8) -> Backend {
    let mut address = [0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // fd00:1::/64 in words: fd00, 0001.
    address[2..4].copy_from_slice(&[0, 1]);
    address[15] = last;
    Backend { address, ..Backend { source: backend(1, IPIP, V6).source, ..by_fib([0; 4]) } }
}

fn too_long(len: usize, backend: Backend) -> Case {
    Case::new(sized(tcp(V4, ACK), len), backend).counts(Reason::FibLookup)
}

cases! {
    tag_pushed_4in4: case(tagged(IPIP, V4, 300)).goes_to(1, false);
    tag_pushed_4in6: case(tagged(IPIP, V6, 300)).goes_to(1, false);
    tag_pushed_gue: case(tagged(GUE, V4, 4_094)).goes_to(1, false);
    tag_with_priority: case(tagged(IPIP, V4, 0xa001)).goes_to(1, false);
    tag_replaces_tag: Case::new(Packet { vlan: Vlan::One, ..tcp(V4, ACK) }, tagged(IPIP, V4, 300)).goes_to(1, false);
    tag_replaces_two: Case::new(Packet { vlan: Vlan::Two, ..tcp(V4, ACK) }, tagged(GUE, V6, 300)).goes_to(1, false);
    tag_removed: Case::new(Packet { vlan: Vlan::One, ..tcp(V6, ACK) }, backend(1, IPIP, V6)).goes_to(1, false);
    redirected: case(elsewhere(IPIP, V4)).redirected_to(1, false);
    redirected_v6: Case::new(tcp(V6, ACK), elsewhere(IPIP, V6)).redirected_to(1, false);
    redirected_gue: case(elsewhere(GUE, V4)).redirected_to(1, false);
    redirected_with_a_tag: case(Backend { vlan: Be16::new(9), ..elsewhere(GUE, V6) }).redirected_to(1, false);
    fib_v4: case(by_fib([10, 1, 0, 1])).redirected_to(1, false).counts(Reason::FibLookup);
    fib_v4_through_a_gateway: case(by_fib([10, 3, 0, 77])).redirected_to(1, false).counts(Reason::FibLookup);
    fib_v4_gue: case(Backend { mode: GUE, source_bits: 0, ..by_fib([10, 1, 0, 1]) })
        .redirected_to(1, false)
        .counts(Reason::FibLookup);
    fib_v6: case(by_fib_v6(1)).redirected_to(1, false).counts(Reason::FibLookup);
    fib_v6_in_v6: Case::new(tcp(V6, ACK), by_fib_v6(1)).redirected_to(1, false).counts(Reason::FibLookup);
    fib_chooses_the_source: {
        let sourceless = Backend { source: mapped([0; 4]), source_bits: 0, ..by_fib([10, 1, 0, 1]) };
        let mut case = case(sourceless);
        // What is expected is made with the address of the egress interface.
        case.backends[0].1.source = mapped([10, 1, 0, 254]);
        let mut case = case.redirected_to(1, false).counts(Reason::FibLookup);
        case.backends[0].1 = sourceless;
        case
    };
    fib_no_route: case(by_fib([172, 16, 0, 1])).drops(Reason::NoRoute).counts(Reason::FibLookup);
    fib_unreachable: case(by_fib([10, 5, 0, 1])).drops(Reason::NoRoute).counts(Reason::FibLookup);
    fib_no_neighbour: case(by_fib([10, 1, 0, 200])).drops(Reason::NoNeighbour).counts(Reason::FibLookup);
    fib_v6_no_neighbour: case(by_fib_v6(200)).drops(Reason::NoNeighbour).counts(Reason::FibLookup);
    fib_fits: too_long(usize::from(EGRESS_MTU) - 20, by_fib([10, 1, 0, 1])).redirected_to(1, false);
    fib_too_big: too_long(usize::from(EGRESS_MTU) - 19, by_fib([10, 1, 0, 1])).answers(EGRESS_MTU - 20);
    fib_too_big_for_the_route: too_long(1_381, by_fib([10, 4, 0, 1])).answers(1_380);
    fib_fits_the_route: too_long(1_380, by_fib([10, 4, 0, 1])).redirected_to(1, false);
}

/// An interface that is not in the device map: dropped, for this reason only.
#[test]
fn not_in_the_device_map() {
    let case = case(Backend { ifindex: UNLISTED, ..backend(1, IPIP, V4) });
    crate::case::with(crate::case::Loaded::Default, |ingress| {
        case.fill(ingress);
        let run = ingress.run(&case.packet.bytes()).expect("runs");
        assert_eq!(run.verdict, test_packet::xdp::DROP);
        assert_eq!(ingress.counts(), [(Reason::NoEgress, 1)]);
    });
}

/// While an entry is being changed, packets take the next hop from the entry before; the FIB is not asked.
#[test]
fn a_hop_that_is_being_changed() {
    for backend in [tagged(IPIP, V4, 300), elsewhere(IPIP, V4), tagged(GUE, V6, 9), elsewhere(GUE, V6)] {
        let case = case(backend);
        crate::case::with(crate::case::Loaded::Default, |ingress| {
            case.fill(ingress);
            let send = |ingress: &test_packet::Ingress| {
                let run = ingress.run(&case.packet.bytes()).expect("runs");
                (run.verdict, run.packet)
            };
            let before = send(ingress);
            let torn = Backend {
                next_hop: [0xee; 6],
                source: [0xee; 16],
                vlan: Be16::new(77),
                ifindex: UNLISTED,
                flags: USED | CHANGING,
                ..backend
            };
            ingress.backend(1, torn);
            ingress.changing_backend(1, backend);
            assert!(send(ingress) == before, "{backend:?}");
            assert_eq!(ingress.counts(), []);
            ingress.changing_backend(1, Backend::default());
            assert!(send(ingress) != before, "without a copy, by the FIB");
        });
    }
}
