//! Schedulers and second chance on the loaded programs. All branches are covered natively (lb-ebpf,
//! tests/native/{place,chance}.rs); these show that the kernel's maps and helpers do the same.

use crate::case::{ACK, CLIENT4, Family::V4, SYN, VIP4, backend, tcp};
use lb_common::{
    Backend, Be16, FlowKey, Load, Reason, ServiceKey, ServiceView, Slot,
    backend::mode::{GUE_CHAIN, IPIP},
    load, mapped,
    names::FLOWS,
    service::{
        TCP, UDP,
        flags::{COUNT_FLOWS, SECOND_CHANCE, TRACK_ALL},
        scheduler,
    },
    settings::{DecapSettings, IngressSettings},
    slot::NO_BACKEND,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use test_packet::{Decap, Ingress, Packet, Pair, bed, xdp};

const SERVICE: u32 = 3;
const BASE: u32 = SERVICE * 1_024;

/// A service whose slots hold 1 and 2, with a list of 1, 2 and 3 behind them.
fn world(scheduler: u8, flags: u32, mode: u8) -> Ingress {
    bed::enter();
    let mut ingress = Ingress::load(IngressSettings::DEFAULT).expect("loads");
    ingress.reset();
    let key = ServiceKey { vip: VIP4, port: Be16::new(80), protocol: TCP, pad: 0 };
    let view = ServiceView { scheduler, flags: flags | TRACK_ALL, list_count: 3, ..Ingress::view() };
    ingress.service(SERVICE, key, &[Pair::Stable(1)], view);
    for place in 0..251 {
        ingress.set_slot(BASE + place, Slot { primary: 1, secondary: 2 });
    }
    for i in 0..3 {
        ingress.set_slot(BASE + 251 + i, Slot { primary: i + 1, secondary: NO_BACKEND });
        ingress.backend(i + 1, Backend { service: SERVICE, ..backend(i + 1, mode, V4) });
        ingress.set_load(i + 1, Load { cost: load::FLOW, ..Load::default() });
    }
    ingress
}

fn report(ingress: &mut Ingress, backend: u32, flows: u32, number: u32) {
    let report = load::report(flows * load::FLOW, number);
    let before = ingress.get_load(backend);
    ingress.set_load(backend, Load { report, ..before });
}

/// Backend that the packet of this client port went to.
fn goes(ingress: &mut Ingress, flags: u8, port: u16) -> u32 {
    let before: Vec<u64> = (1..4).map(|i| ingress.stats(i).packets).collect();
    let packet = Packet { source: (CLIENT4, port), ..tcp(V4, flags) };
    assert_eq!(ingress.run(&packet.bytes()).expect("runs").verdict, xdp::TX);
    (1..4).find(|i| ingress.stats(*i).packets != before[*i as usize - 1]).expect("it went somewhere")
}

#[test]
fn p2c_goes_by_load_and_tracks_the_second_choice() {
    let mut ingress = world(scheduler::P2C, 0, IPIP);
    report(&mut ingress, 1, 3, 1);
    let went: Vec<u32> = (0..7).map(|port| goes(&mut ingress, SYN, 1_000 + port)).collect();
    assert_eq!(went, [2, 2, 2, 1, 2, 1, 2], "what was placed counts");
    report(&mut ingress, 1, 0, 2);
    assert_eq!(goes(&mut ingress, SYN, 2_000), 1, "until the next report");
    for (port, backend) in went.iter().enumerate() {
        assert_eq!(goes(&mut ingress, SYN, 1_000 + port as u16), *backend, "repeated");
        assert_eq!(goes(&mut ingress, ACK, 1_000 + port as u16), *backend);
    }
    assert_eq!(ingress.flows(FLOWS).len(), 5);
    assert!(ingress.flows(FLOWS).iter().all(|(_, flow)| flow.backend == 2));
    assert_eq!(ingress.cached_syns(), 1, "only that of the handshake that is not complete");
}

/// Settles the filter of flows, as lbd's sweep does.
fn settle(ingress: &mut Ingress) {
    let mut scan = ingress.syn_cache().begin();
    let flows = ingress.flows(FLOWS);
    flows.iter().for_each(|(key, _)| scan.add(key));
    ingress.syn_cache().settle(&scan);
}

#[test]
fn the_filter_lets_every_flow_through_and_spares_the_rest() {
    let mut ingress = world(scheduler::P2C, 0, IPIP);
    // Everybody's second choice: each flow needs an entry.
    report(&mut ingress, 1, 1_000, 1);
    let begin = |ingress: &mut Ingress, ports: std::ops::Range<u16>| {
        for port in ports {
            assert_eq!((goes(ingress, SYN, port), goes(ingress, ACK, port)), (2, 2));
        }
    };
    begin(&mut ingress, 1_000..1_200);
    settle(&mut ingress);
    begin(&mut ingress, 1_200..1_400);
    assert_eq!((ingress.cached_syns(), ingress.flows(FLOWS).len()), (0, 400));
    for round in 0..4 {
        for port in 1_000..1_400 {
            assert_eq!(goes(&mut ingress, ACK, port), 2, "flow {port} after {round} rounds");
        }
        settle(&mut ingress);
    }
    // An entry that the filter was never told of is not asked for: so it is the filter that spares the question.
    let known = ingress.flows(FLOWS)[0];
    let unknown = |port| FlowKey { source_port: Be16::new(port), ..known.0 };
    (2_000..2_100).for_each(|port| ingress.set_flow(FLOWS, unknown(port), known.1));
    let asked = (2_000..2_100).filter(|port| goes(&mut ingress, ACK, *port) == 2).count();
    assert!(asked < 10, "{asked} of 100");
    settle(&mut ingress);
    assert!((2_000..2_100).all(|port| goes(&mut ingress, ACK, port) == 2));
    // And without its word all are asked for.
    (3_000..3_100).for_each(|port| ingress.set_flow(FLOWS, unknown(port), known.1));
    ingress.syn_cache().disarm();
    assert!((3_000..3_100).all(|port| goes(&mut ingress, ACK, port) == 2));
}

#[test]
fn turns_lots_and_the_least_are_taken() {
    let mut ingress = world(scheduler::ROUND_ROBIN, 0, IPIP);
    // Turns are counted by each processor, and begin where its number says.
    let mut one = CpuSet::new();
    one.set(0).expect("there is a first processor");
    sched_setaffinity(Pid::from_raw(0), &one).expect("this thread may run there");
    let went: Vec<u32> = (0..6).map(|port| goes(&mut ingress, SYN, port)).collect();
    assert!(went.windows(2).all(|pair| pair[1] == pair[0] % 3 + 1), "{went:?}");

    let mut ingress = world(scheduler::LEAST_CONN, COUNT_FLOWS, IPIP);
    for (backend, flows) in [(1, 2), (2, 5), (3, 0)] {
        report(&mut ingress, backend, flows, 1);
    }
    let went: Vec<u32> = (0..4).map(|port| goes(&mut ingress, SYN, port)).collect();
    assert_eq!(went.iter().filter(|b| **b == 3).count(), 3, "{went:?}");
    (0..4).for_each(|port| assert_eq!(goes(&mut ingress, ACK, port), went[port as usize]));
    assert_eq!(ingress.flows(FLOWS).len(), 4, "counted flows are all tracked");

    let mut ingress = world(scheduler::RANDOM, 0, IPIP);
    assert_eq!(goes(&mut ingress, SYN, 1), 1, "every slot's primary");
}

#[test]
fn gue_names_the_other_half() {
    let ingress = world(scheduler::P2C, SECOND_CHANCE, GUE_CHAIN);
    let sent = ingress.run(&tcp(V4, ACK).bytes()).expect("runs");
    assert_eq!(sent.verdict, xdp::TX);
    let other = backend(2, GUE_CHAIN, V4).address;
    let chain = &sent.packet[14 + 20 + 8..][..16];
    assert_eq!(chain[..8], [3, 4, 0, 0, 0x6c, 0x62, 0x11, 0]);
    assert_eq!((&chain[8..12], &chain[12..]), (&other[12..], &[0; 4][..]));
}

/// A packet in GUE whose private data names one more worker.
fn named(inner: &Packet, next: [u8; 4], hops: u8) -> Vec<u8> {
    let mut outer = Packet::new(UDP, (mapped([10, 9, 9, 9]), 0xc123), (mapped([10, 1, 0, 1]), 6_080));
    outer.payload = vec![3, 4, 0, 0, 0x6c, 0x62, 0x11, hops];
    outer.payload.extend(next);
    outer.payload.extend([0; 4]);
    outer.payload.extend(inner.ip());
    let mut bytes = outer.bytes();
    // Tunnels have no UDP checksum.
    bytes[14 + 26..14 + 28].fill(0);
    bytes
}

#[test]
fn a_worker_asks_its_own_sockets() {
    bed::enter();
    let ours = mapped([10, 1, 0, 1]);
    let mut decap = Decap::load(DecapSettings::DEFAULT, &[ours], &[VIP4]).expect("loads");
    // No socket here: on, by the router that brought it (10.9 has no route of its own) or by this host's own way.
    for (next, verdict) in [([10, 9, 0, 2], xdp::TX), ([10, 1, 0, 2], xdp::REDIRECT)] {
        let bytes = named(&tcp(V4, ACK), next, 0);
        let run = decap.run(&bytes).expect("runs");
        assert_eq!((run.verdict, decap.take_counts()), (verdict, vec![(Reason::ChanceSentOn, 1)]));
        assert_eq!(run.packet.len(), bytes.len());
        assert_eq!(run.packet[14 + 12..14 + 20], [[10, 1, 0, 1], next].concat());
        assert_eq!(run.packet[14 + 20 + 12..][..12], [0x6c, 0x62, 0x10, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        if verdict == xdp::TX {
            assert_eq!((&run.packet[..6], &run.packet[6..12]), (&bytes[6..12], &bytes[..6]));
        } else {
            assert_eq!(
                (&run.packet[..6], &run.packet[6..12]),
                (&bed::NEIGHBOUR_MAC[..], &bed::EGRESS_MAC[..])
            );
        }
    }
    // A SYN stays.
    assert_eq!(decap.run(&named(&tcp(V4, SYN), [10, 9, 0, 2], 0)).expect("runs").verdict, xdp::PASS);
    assert_eq!(decap.take_counts(), [(Reason::DecapGue, 1), (Reason::ChanceFirst, 1)]);
    // Made by hand.
    for (bytes, reason) in [
        (named(&tcp(V4, ACK), [10, 1, 0, 1], 0), Reason::ChanceLoop),
        (named(&tcp(V4, ACK), [10, 1, 0, 2], 2), Reason::ChanceLoop),
        (named(&tcp(V4, ACK), [10, 1, 0, 2], 9), Reason::ChanceBad),
        (named(&tcp(V4, ACK), [0; 4], 0), Reason::ChanceBad),
    ] {
        assert_eq!(decap.run(&bytes).expect("runs").verdict, xdp::DROP);
        assert_eq!(decap.take_counts(), [(reason, 1)]);
    }
}
