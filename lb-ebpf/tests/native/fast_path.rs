//! The short way and the long one are the same way: on any packet, any flags and any backend, with and without the
//! tables that spare lookups, the verdict, the frame, the counters and the flow tables come out alike.

use crate::{
    bodies,
    build::{Packet, Vlan},
    hostile::{mutate, mutations, packet},
    world::{CLIENT4, CLIENT6, VIP4, VIP6, backend, cases, tables},
};
use lb_common::{
    Address, Backend, Be16, Slot,
    backend::{flags as state, mode},
    service::{TCP, UDP, flags, scheduler},
    settings::{IngressSettings, features},
    slot::{NO_BACKEND, TRACKED},
};
use lb_ebpf::{
    FlowTable, Verdict,
    ingress::{self, fast_path},
    native::{HashTables, VecFrame},
    packet::verdict::Outcome,
};
use proptest::prelude::*;

/// What can be seen of a packet's way afterwards.
#[derive(Debug, PartialEq)]
struct Seen {
    end: (Verdict, Outcome),
    frame: Vec<u8>,
    counts: Vec<(lb_common::Reason, u64)>,
    stats: Vec<lb_common::BackendStats>,
    flows: Vec<(lb_common::FlowKey, lb_common::Flow)>,
}

fn see(data: &[u8], tables: &HashTables, settings: &IngressSettings) -> Seen {
    let mut frame = VecFrame::new(data).with_fib(bodies::ingress::fib);
    let end = ingress::process(&mut frame, tables, settings);
    Seen {
        end,
        frame: frame.bytes(),
        counts: tables.counts(),
        stats: (0..100).map(|i| tables.stats(i)).collect(),
        flows: [FlowTable::Flows, FlowTable::Syns, FlowTable::UdpFlows]
            .into_iter()
            .flat_map(|table| tables.flows(table))
            .collect(),
    }
}

fn both_ways(data: &[u8], world: impl Fn() -> HashTables, settings: &IngressSettings) -> bool {
    let long = see(data, &world(), settings);
    let mut quick_world = world();
    quick_world.spare_lookups();
    assert_eq!(see(data, &quick_world, settings), long);
    quick_world = world();
    quick_world.spare_lookups();
    fast_path::process(&mut VecFrame::new(data), &quick_world, settings).is_some()
}

fn settings() -> impl Strategy<Value = IngressSettings> {
    let features = prop_oneof![2 => Just(features::ALL), 1 => any::<u32>()];
    (features, 0u8..2, 0u8..2, 1u8..=255, prop_oneof![3 => Just(1u8), 1 => Just(0)]).prop_map(
        |(features, ipv6, vlan, outer_ttl, stats)| IngressSettings {
            features,
            ipv6,
            vlan,
            outer_ttl,
            stats,
            ..IngressSettings::DEFAULT
        },
    )
}

/// Any flags, schedulers and slots of a service, and any backend.
fn service() -> impl Strategy<Value = (u32, u8, Slot, Backend)> {
    let flags = prop_oneof![
        3 => Just(0),
        3 => Just(flags::UDP_STATELESS),
        2 => prop::sample::subsequence((0..9).chain([16]).collect::<Vec<u32>>(), 0..3)
            .prop_map(|bits| bits.iter().fold(0, |flags, bit| flags | 1 << bit)),
    ];
    let mode = prop::sample::select(vec![
        mode::IPIP,
        mode::GUE,
        mode::L2,
        mode::LOCAL,
        mode::GUE_CHAIN,
        mode::NAT,
        77,
    ]);
    let primary = prop_oneof![8 => Just(1), 2 => Just(1 | TRACKED), 1 => Just(NO_BACKEND), 1 => Just(9_999)];
    let resolved = prop_oneof![
        6 => Just(state::USED | state::RESOLVED),
        1 => 0u32..16,
    ];
    let scheduler = prop_oneof![3 => Just(scheduler::MAGLEV), 1 => 0u8..6];
    (
        (flags, scheduler, primary, mode, resolved),
        (
            any::<bool>(),
            0u8..=64,
            prop_oneof![Just(0u16), 0u16..2_000],
            prop_oneof![4 => Just(0u16), 1 => any::<u16>()],
        ),
        (
            prop_oneof![2 => Just(1u32), 1 => Just(10)],
            any::<u16>(),
            prop_oneof![9 => Just(true), 1 => Just(false)],
        ),
    )
        .prop_map(
            |(
                (flags, scheduler, primary, mode, resolved),
                (outer6, source_bits, mtu, vlan),
                (ifindex, port, is_own),
            )| {
                let base = backend(1);
                let (address, source): (Address, Address) =
                    if outer6 { (bodies::v6(1, 1), bodies::v6(0, 0)) } else { (base.address, base.source) };
                // The daemon leaves as many low bits of the source clear.
                let source_bits = if outer6 { source_bits } else { source_bits.min(16) };
                let entry = Backend {
                    address,
                    source: if source_bits > 16 { [0x20; 16].map(|b| b) } else { source },
                    source_bits: if source_bits > 16 { 0 } else { source_bits },
                    mtu,
                    vlan: Be16::new(vlan),
                    ifindex,
                    port: Be16::new(port),
                    mode,
                    flags: resolved,
                    service: if is_own { base.service } else { 77 },
                    ..base
                };
                (flags, scheduler, Slot { primary, secondary: 2 }, entry)
            },
        )
}

/// A packet for the service, and sometimes one that is nobody's.
fn plain_packet() -> impl Strategy<Value = Packet> {
    (
        (any::<bool>(), any::<bool>(), any::<u16>(), prop_oneof![12 => Just(true), 1 => Just(false)]),
        (any::<u8>(), any::<u8>(), any::<bool>(), 0usize..1_600),
        prop_oneof![Just(0x02u8), Just(0x10), Just(0x12), Just(0x04), any::<u8>()],
        (prop_oneof![9 => Just(true), 1 => Just(false)], 0u8..20),
    )
        .prop_map(
            |((is_tcp, is_ipv6, source_port, is_vip), (tos, ttl, df, len), flags, (is_port, source))| {
                let client = match (source, is_ipv6) {
                    (0, true) => VIP6,
                    (0, false) => VIP4,
                    (1, true) => [0; 16],
                    (1, false) => lb_common::mapped([0, 0, 0, 0]),
                    (2, true) => [0xff; 16],
                    (2, false) => lb_common::mapped([240, 0, 0, 1]),
                    (_, true) => CLIENT6,
                    (_, false) => CLIENT4,
                };
                let vip = match (is_vip, is_ipv6) {
                    (true, true) => VIP6,
                    (true, false) => VIP4,
                    (false, true) => CLIENT6,
                    (false, false) => CLIENT4,
                };
                let port = match (is_port, is_tcp) {
                    (true, true) => 80,
                    (true, false) => 53,
                    (false, _) => 20_000,
                };
                Packet {
                    vlan: Vlan::None,
                    flags,
                    tos,
                    ttl,
                    dont_fragment: df,
                    payload: vec![0x5a; len],
                    ..Packet::new(if is_tcp { TCP } else { UDP }, (client, source_port), (vip, port))
                }
            },
        )
}

proptest! {
    #![proptest_config(cases(3_000))]

    #[test]
    fn packets_of_any_shape(packet in packet(), mutations in mutations(), settings in settings()) {
        both_ways(&mutate(packet.bytes(), &mutations), bodies::ingress::plain_world, &settings);
    }

    #[test]
    fn services_and_backends_of_any_kind(
        packet in plain_packet(), (flags, scheduler, slot, entry) in service(), settings in settings(),
    ) {
        let world = || {
            let mut world = tables(slot, slot);
            for service in [crate::world::TCP_SERVICE, crate::world::UDP_SERVICE] {
                let view = world.services.get_mut(&service).unwrap();
                (view.flags, view.scheduler) = (flags, scheduler);
            }
            let service = if packet.protocol == TCP { entry.service } else { entry.service + 1 };
            world.backends.insert(1, Backend { service, ..entry });
            world
        };
        both_ways(&packet.bytes(), world, &settings);
    }
}

/// The property above would hold if the short way were never taken.
#[test]
fn common_packets_go_the_short_way() {
    let slot = Slot { primary: 1, secondary: 2 };
    for (packet, expected) in [
        (Packet::new(TCP, (CLIENT4, 1_000), (VIP4, 80)), true),
        (Packet::new(TCP, (CLIENT6, 1_000), (VIP6, 80)), true),
        // Nobody's address.
        (Packet::new(TCP, (CLIENT4, 1_000), (CLIENT4, 80)), true),
        // From nobody, and from a VIP.
        (Packet::new(TCP, (lb_common::mapped([127, 0, 0, 1]), 1_000), (VIP4, 80)), true),
        (Packet::new(TCP, ([0; 16], 1_000), (VIP6, 80)), true),
        (Packet::new(TCP, (VIP4, 1_000), (VIP4, 80)), false),
        // Its flows are remembered.
        (Packet { payload: vec![0; 64], ..Packet::new(UDP, (CLIENT4, 1_000), (VIP4, 53)) }, false),
        // A port that has no service.
        (Packet::new(TCP, (CLIENT4, 1_000), (VIP4, 81)), false),
        (Packet { vlan: Vlan::One, ..Packet::new(TCP, (CLIENT4, 1_000), (VIP4, 80)) }, false),
        (Packet { options: vec![1; 4], ..Packet::new(TCP, (CLIENT4, 1_000), (VIP4, 80)) }, false),
    ] {
        let taken = both_ways(&packet.bytes(), || tables(slot, slot), &IngressSettings::DEFAULT);
        assert_eq!(taken, expected, "{packet:?}");
    }
}
