//! A million mutated packets through each loaded program, and the same through the same code run
//! natively: verdict, frame, counters and flow tables must agree, packet by packet; and each packet is
//! forwarded or has exactly one reason. Floods fill nothing but what they may.

use lb_common::{
    Address, Backend, Be16, Flow, FlowKey, Reason, ServiceKey, ServiceView,
    backend::mode::IPIP,
    limits, mapped, names,
    reason::Fate,
    service::{TCP, UDP},
    settings::{DecapSettings, IngressSettings},
};
use lb_ebpf::{
    FlowTable,
    native::{HashTables, VecFrame},
};
use std::{collections::HashMap, fs, path::Path};
use test_packet::{Decap, Ingress, Packet, Pair, Vlan, action, bed, hex, outer, xdp};

#[path = "../../../fuzz/src/bodies/mod.rs"]
#[allow(dead_code, reason = "the checks run natively, in lb-ebpf's tests")]
mod bodies;

use bodies::mutate::{Random, mutate};

const PACKETS: u64 = 1_000_000;
/// Packets between two comparisons of counters and flow tables. So few flows that no LRU is full.
const BATCH: u64 = 20_000;

/// The fuzzers' seeds.
fn corpus() -> Vec<Vec<u8>> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/ingress"));
    let mut files: Vec<_> =
        fs::read_dir(path).expect("checked in").map(|f| f.expect("readable").path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("readable")).collect()
}

/// Packets of every kind for the ingress tables.
fn ingress_seeds() -> Vec<Vec<u8>> {
    let mut seeds = corpus();
    let families =
        [(mapped([198, 51, 100, 7]), mapped([192, 0, 2, 1])), (bodies::v6(0xc, 7), bodies::v6(0, 1))];
    let ports = [
        (TCP, 80),
        (TCP, 443),
        (TCP, 8_080),
        (TCP, 1_500),
        (TCP, 9_999),
        (UDP, 53),
        (UDP, 443),
        (UDP, 999),
        (UDP, 1_500),
    ];
    for (i, (client, vip)) in families.into_iter().enumerate() {
        for (protocol, port) in ports {
            for client_port in 0..12u16 {
                for flags in [0x02, 0x10, 0x11] {
                    let mut packet = Packet::new(protocol, (client, 40_000 + client_port), (vip, port));
                    packet.flags = flags;
                    packet.vlan =
                        [Vlan::None, Vlan::None, Vlan::One, Vlan::Two][usize::from(client_port % 4)];
                    packet.payload.resize([0, 13, 300, 700][usize::from(client_port / 3)], 7);
                    if i == 1 && client_port % 5 == 0 {
                        packet.extensions = vec![(0, vec![0; 7]), (44, vec![0; 7])];
                    }
                    seeds.push(packet.bytes());
                }
            }
        }
    }
    // From where nobody sends.
    for (vip, source) in [
        (families[0].1, families[0].1),
        (families[0].1, mapped([127, 0, 0, 1])),
        (families[1].1, families[1].1),
        (families[1].1, [0; 16]),
    ] {
        for (protocol, port) in ports {
            seeds.push(Packet::new(protocol, (source, 40_000), (vip, port)).bytes());
        }
    }
    // A few that take several buffers.
    let mut jumbo = Packet::new(TCP, (families[0].0, 40_000), (families[0].1, 80));
    jumbo.payload.resize(5_000, 1);
    seeds.push(jumbo.bytes());
    seeds
}

/// Tunnelled packets of every kind, and some that are not.
fn decap_seeds() -> Vec<Vec<u8>> {
    let mut seeds = corpus();
    for inner in ingress_seeds().iter().step_by(3) {
        let l2_len = bodies::l2_len(inner);
        let protocol = if inner[l2_len] >> 4 == 4 { 4 } else { 41 };
        for (source, ours) in
            [(bodies::v4(10, 9, 9, 9), bodies::v4(10, 1, 0, 1)), (bodies::v6(9, 9), bodies::v6(1, 1))]
        {
            let mut tunnel = Packet::new(UDP, (source, 50_000), (ours, 6_080));
            tunnel.tos = inner[l2_len + 1];
            tunnel.payload = inner[l2_len..].to_vec();
            seeds.push(tunnel.around(protocol));
            tunnel.payload.splice(0..0, [0, protocol, 0, 0]);
            seeds.push(tunnel.bytes());
            // The same with others that may have its flow, to which there is no route.
            let is_ipv6 = ours[0] != 0;
            let mut chain = vec![if is_ipv6 { 9 } else { 3 }, protocol, 0, 0, 0x6c, 0x62, 0x11, 0];
            chain.extend(if is_ipv6 { bodies::v6(9, 8).to_vec() } else { vec![10, 9, 9, 8] });
            chain.resize(if is_ipv6 { 40 } else { 16 }, 0);
            let end = chain.len();
            tunnel.payload.splice(0..4, chain);
            // Tunnels have no UDP checksum.
            let plain = |mut bytes: Vec<u8>| {
                let check = 14 + if is_ipv6 { 40 } else { 20 } + 6;
                bytes[check..check + 2].fill(0);
                bytes
            };
            seeds.push(plain(tunnel.bytes()));
            // And at the end of its chain.
            tunnel.payload[6..8].copy_from_slice(&[0x10, 2]);
            tunnel.payload[8..end].fill(0);
            seeds.push(plain(tunnel.bytes()));
        }
    }
    seeds
}

/// Packets with a reason that says what became of them.
fn ends(counts: &[(Reason, u64)]) -> u64 {
    let is_delivered = |r| matches!(r, Reason::DecapIpip | Reason::DecapGue | Reason::ChanceSentOn);
    counts.iter().filter(|(r, _)| r.fate() != Fate::Note || is_delivered(*r)).map(|(_, n)| n).sum()
}

#[test]
fn ingress_does_in_the_kernel_what_it_does_natively() {
    bed::enter();
    // ICMP without a limit in effect, so that no clock decides.
    let settings =
        IngressSettings { icmp_per_s: 1_000_000_000, icmp_burst: u32::MAX, ..IngressSettings::DEFAULT };
    let mut ingress = Ingress::load(settings).expect("loads");
    ingress.egress(bed::EGRESS);
    let tables = bodies::ingress::world();
    ingress.hold(&tables);
    let (seeds, mut random, mut frame) = (ingress_seeds(), Random(1), Vec::new());
    let mut verdicts = [0u64; 5];
    for batch in 0..PACKETS / BATCH {
        for i in 0..BATCH {
            mutate(&mut random, &seeds, &mut frame);
            let mut native = VecFrame::new(&frame).with_fib(bodies::ingress::fib);
            tables.advance_ns(1_000);
            let (verdict, _) = lb_ebpf::native::run(&mut native, &tables, &settings);
            let run = ingress.run(&frame).expect("the kernel runs it");
            let packet = batch * BATCH + i;
            assert_eq!(run.verdict, action(verdict), "packet {packet}: {}", hex(&frame));
            assert!(
                run.packet == native.bytes(),
                "packet {packet}: {} gave {}",
                hex(&frame),
                hex(&run.packet)
            );
            verdicts[run.verdict as usize] += 1;
        }
        compare(&mut ingress, &tables, (batch + 1) * BATCH);
        ingress.forget_flows();
        tables.forget_flows();
    }
    println!(
        "pass {}, drop {}, transmit {}, redirect {}",
        verdicts[2], verdicts[1], verdicts[3], verdicts[4]
    );
    println!("{:?}", ingress.counts());
    // The mutations leave enough packets alone to get everywhere.
    assert!(verdicts[1..].iter().all(|n| *n > PACKETS / 100), "{verdicts:?}");
    let rare = [
        Reason::NoEgress,
        Reason::NoRoute,
        Reason::NoNeighbour,
        Reason::NoHeadroom,
        Reason::Ipv6Off,
        Reason::VlanOff,
        Reason::TooBigDropped,
        Reason::FlowNotRecorded,
        Reason::BadFamily,
        Reason::StageMissing,
        Reason::EchoDropped,
        // Modes that this world has no service of: see `nat` and `l2` among the cases.
        Reason::NotOnLink,
        Reason::NatNoPort,
        Reason::NatNoRoom,
        Reason::NatUnknown,
        Reason::NatReply,
        Reason::NatReused,
        Reason::NatGaveWay,
        Reason::NatCompleted,
        Reason::NatFragment,
        Reason::NatTtl,
        Reason::NatError,
        // Nor one that is routed by connection id: see `quic` there.
        Reason::QuicRouted,
        Reason::QuicUnroutable,
        Reason::QuicUnknownId,
        Reason::QuicShortId,
        Reason::QuicTruncated,
        // Nor another ABI version to take over from.
        Reason::TakenOver,
    ];
    for reason in Reason::ALL.iter().take_while(|r| **r != Reason::DecapIpip).filter(|r| !rare.contains(r)) {
        assert_ne!(ingress.count(*reason), 0, "no packet was {reason:?}");
    }
    for reason in [Reason::MartianSource, Reason::OwnSource] {
        assert_ne!(ingress.count(reason), 0, "no packet was {reason:?}");
    }
}

/// Counters and flow tables of the kernel, against the native ones and against the number of packets.
fn compare(ingress: &mut Ingress, tables: &HashTables, packets: u64) {
    let counts = ingress.counts();
    assert_eq!(counts, tables.counts(), "after {packets} packets");
    let forwarded: u64 = (0..test_packet::USED)
        .map(|index| {
            let stats = ingress.stats(index);
            assert_eq!(stats, tables.stats(index), "backend {index} after {packets} packets");
            stats.packets
        })
        .sum();
    assert_eq!(forwarded + ends(&counts), packets, "each is forwarded or has one reason: {counts:?}");
    for (name, table) in [(names::FLOWS, FlowTable::Flows), (names::UDP_FLOWS, FlowTable::UdpFlows)] {
        let kernel: HashMap<FlowKey, (u32, u32)> =
            ingress.flows(name).into_iter().map(|(key, flow)| (key, (flow.backend, flow.flags))).collect();
        let native: HashMap<FlowKey, (u32, u32)> =
            tables.flows(table).into_iter().map(|(key, flow)| (key, (flow.backend, flow.flags))).collect();
        assert!(kernel == native, "{name} after {packets} packets: {} and {}", kernel.len(), native.len());
    }
    let native = tables.flows(FlowTable::Syns);
    assert_eq!(ingress.cached_syns(), native.len(), "cached SYNs after {packets} packets");
    for (key, flow) in native {
        // The kernel's entries keep the upper half of the sequence number.
        let cached = ingress.flow(names::SYN_CACHE, &key).map(|syn| (syn.backend, syn.created_s >> 16));
        let expected = Some((flow.backend, flow.created_s >> 16));
        assert_eq!(cached, expected, "cached SYN of {key:?} after {packets} packets");
    }
}

#[test]
fn decap_does_in_the_kernel_what_it_does_natively() {
    bed::enter();
    let settings = DecapSettings::DEFAULT;
    let tables = bodies::decap::world();
    let list = |set: &std::collections::HashSet<Address>| set.iter().copied().collect::<Vec<_>>();
    let decap =
        Decap::load(settings, &list(&tables.decap_addresses), &list(&tables.decap_vips)).expect("loads");
    let (seeds, mut random, mut frame) = (decap_seeds(), Random(2), Vec::new());
    for packet in 1..=PACKETS {
        mutate(&mut random, &seeds, &mut frame);
        let mut native = VecFrame::new(&frame);
        let (verdict, reason) = lb_ebpf::worker::decap::process(&mut native, &tables, &settings);
        let run = decap.run(&frame).expect("the kernel runs it");
        assert_eq!(run.verdict, action(verdict), "{reason:?}: {}", hex(&frame));
        assert!(run.packet == native.bytes(), "{reason:?}: {} gave {}", hex(&frame), hex(&run.packet));
        if packet % BATCH == 0 {
            let counts: Vec<_> =
                Reason::ALL.iter().map(|r| (*r, decap.count(*r))).filter(|(_, n)| *n != 0).collect();
            assert_eq!(counts, tables.counts(), "after {packet} packets");
            assert_eq!(ends(&counts), packet, "each has one reason");
        }
    }
    println!("{:?}", tables.counts());
    for reason in [Reason::MartianSource, Reason::OwnSource] {
        assert_ne!(decap.count(reason), 0, "no packet was {reason:?}");
    }
    let of_decap = Reason::ALL.iter().skip_while(|r| **r != Reason::DecapIpip);
    for reason in of_decap.take_while(|r| **r != Reason::GuardDenied) {
        // No socket is here, and no listener to give a cookie: see `chance` among the native tests, and `cookie`.
        let rare = [
            Reason::DecapAdjust,
            Reason::DecapCookie,
            Reason::ChanceFirst,
            Reason::ChanceSecond,
            Reason::ChanceThird,
            Reason::ChanceNone,
            Reason::ChanceSentOn,
            Reason::ChanceLoop,
        ];
        assert!(decap.count(*reason) != 0 || rare.contains(reason), "no packet was {reason:?}");
    }
}

/// A packet of one of many clients.
fn of(client: u32, protocol: u8, flags: u8) -> Packet {
    let [a, b, c, d] = (0x0a80_0000 + client / 8).to_be_bytes();
    let port = 1_024 + (client % 8) as u16;
    Packet {
        flags,
        payload: vec![],
        ..Packet::new(protocol, (mapped([a, b, c, d]), port), (mapped([192, 0, 2, 1]), 80))
    }
}

/// Floods from a hundred times more clients than the tables have room for.
#[test]
fn floods_fill_no_more_than_their_table() {
    const ROOM: u32 = 1_024;
    const LIVE: u32 = 400;
    const FLOOD: u32 = 100 * ROOM;
    bed::enter();
    let mut ingress = Ingress::load_sized(IngressSettings::DEFAULT, 0, ROOM).expect("loads");
    let backend = |service| Backend {
        address: mapped([10, 1, 0, 1]),
        source: mapped([10, 9, 0, 1]),
        ifindex: bed::INGRESS,
        flags: lb_common::backend::flags::USED | lb_common::backend::flags::RESOLVED,
        mode: IPIP,
        service,
        ..Backend::default()
    };
    for (service, protocol) in [(1, TCP), (2, UDP)] {
        let key = ServiceKey { vip: mapped([192, 0, 2, 1]), port: Be16::new(80), protocol, pad: 0 };
        let view = ServiceView { seed: outer::SEED, ..Ingress::view() };
        ingress.service(service, key, &[Pair::Transition(2 * service, 2 * service + 1)], view);
        ingress.backend(2 * service, backend(service));
        ingress.backend(2 * service + 1, backend(service));
    }
    let send = |ingress: &mut Ingress, packet: Packet| {
        assert_eq!(ingress.run(&packet.bytes()).expect("runs").verdict, xdp::TX);
    };
    for client in 0..LIVE {
        send(&mut ingress, of(client, TCP, 0x10));
    }
    let live = sorted(ingress.flows(names::FLOWS));
    assert_eq!(live.len(), LIVE as usize);
    assert!(live.iter().all(|(_, flow)| flow.backend == 3), "from before the transition");
    for client in 0..FLOOD {
        send(&mut ingress, of(1_000_000 + client, TCP, 0x02));
        send(&mut ingress, of(1_000_000 + client, UDP, 0));
    }
    assert_eq!(sorted(ingress.flows(names::FLOWS)), live, "live flows are untouched by a flood of SYNs");
    let entries = ingress.flows(names::UDP_FLOWS).len();
    assert!((ROOM as usize / 2..=ROOM as usize).contains(&entries), "{entries}");
    let noted = ingress.cached_syns();
    assert!((FLOOD as usize / 2..=limits::SYNS as usize).contains(&noted), "{noted} notes");
    assert_eq!(ingress.stats(2).flows, u64::from(FLOOD));
    // Established packets out of nowhere do reach FLOWS, as far as there is room; nobody makes room for them.
    let forged = 2 * ROOM;
    for client in 0..forged {
        send(&mut ingress, of(2_000_000 + client, TCP, 0x10));
    }
    let after: HashMap<FlowKey, Flow> = ingress.flows(names::FLOWS).into_iter().collect();
    assert!(after.len() <= ROOM as usize, "{} entries", after.len());
    for (key, flow) in &live {
        assert_eq!(after.get(key).map(|f| f.backend), Some(flow.backend), "a live flow is where it was");
    }
    let left_out = ingress.count(Reason::FlowNotRecorded) + ingress.count(Reason::FlowFlood);
    assert!(left_out + after.len() as u64 >= u64::from(LIVE + forged), "each is in, or counted: {left_out}");
}

fn sorted(mut flows: Vec<(FlowKey, Flow)>) -> Vec<(FlowKey, Flow)> {
    flows.sort_by_key(|(key, _)| *key);
    flows
}
