//! Mode nat: both ways byte by byte, and what is not translated, on the programs as the kernel runs them.
//!
//! Expected frames are built anew with the new addresses, checksums the plain way.

use crate::{
    case::{
        ACK, FIN, Family,
        Family::{V4, V6},
        Loaded, RST, SERVICE, SYN, backend, sized, tcp, udp, with,
    },
    fragments::part,
};
use lb_common::{
    Backend, Be16, Nat, Reason, Reply, ReplyKey, ServiceKey, ServiceView,
    backend::mode::NAT,
    mapped,
    nat::flags::{ANSWERED, CLIENT_FIN, CLIENT_RST, ESTABLISHED, WORKER_FIN},
    service::{TCP, UDP, flags},
};
use test_packet::{HOST_MAC, Ingress, PEER_MAC, Packet, Pair, Vlan, xdp};

const WORKER_PORT: u16 = 8_080;

fn worker(family: Family) -> Backend {
    let mut entry = backend(1, NAT, family);
    if family == V4 {
        entry.source = mapped([10, 9, 0, 1]);
    }
    Backend { source_bits: 0, port: Be16::new(WORKER_PORT), ..entry }
}

/// A service in mode nat with one worker, for the packet's protocol and family.
fn translated_service(ingress: &mut Ingress, packet: &Packet, family: Family) {
    ingress.forget_bindings();
    let (vip, port) = packet.destination;
    let key = ServiceKey { vip, port: Be16::new(port), protocol: packet.protocol, pad: 0 };
    let view = ServiceView { flags: flags::NAT, ..Ingress::view() };
    ingress.service(SERVICE, key, &[Pair::Stable(1)], view);
    ingress.backend(1, worker(family));
}

/// The one binding that there is.
fn binding(ingress: &mut Ingress) -> (Nat, ReplyKey, Reply) {
    let (nats, replies) = ingress.bindings();
    assert_eq!((nats.len(), replies.len()), (1, 1));
    (nats[0].1, replies[0].0, replies[0].1)
}

fn framed(destination: [u8; 6], source: [u8; 6], packet: &Packet) -> Vec<u8> {
    let mut frame = packet.bytes();
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame
}

/// The packet as its worker gets it.
fn to_worker(packet: &Packet, nat: &Nat) -> Packet {
    Packet {
        vlan: Vlan::None,
        source: (nat.source, nat.source_port.get()),
        destination: (nat.worker, nat.port.get()),
        ttl: packet.ttl - 1,
        ..packet.clone()
    }
}

/// What the worker answers.
fn answer(nat: &Nat, protocol: u8, tcp_flags: u8) -> Packet {
    let packet = Packet::new(protocol, (nat.worker, nat.port.get()), (nat.source, nat.source_port.get()));
    Packet { flags: tcp_flags, payload: b"hello, client: a longer one".to_vec(), ..packet }
}

fn request(family: Family, protocol: u8) -> Packet {
    if protocol == TCP { tcp(family, SYN) } else { udp(family) }
}

#[test]
fn both_ways_byte_by_byte() {
    with(Loaded::Default, |ingress| {
        for (family, protocol) in [(V4, TCP), (V4, UDP), (V6, TCP), (V6, UDP)] {
            for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                let asked = Packet { vlan, tos: 0xb9, ..request(family, protocol) };
                ingress.reset();
                translated_service(ingress, &asked, family);
                let run = ingress.run(&asked.bytes()).expect("runs");
                let (nat, _, _) = binding(ingress);
                assert_eq!((run.verdict, nat.port.get()), (xdp::TX, WORKER_PORT));
                assert!((10_240..=32_767).contains(&nat.source_port.get()));
                let entry = worker(family);
                assert_eq!(run.packet, framed(entry.next_hop, entry.egress_mac, &to_worker(&asked, &nat)));

                let answer = answer(&nat, protocol, SYN | ACK);
                let run = ingress.run(&answer.bytes()).expect("runs");
                let back = Packet {
                    vlan,
                    source: asked.destination,
                    destination: asked.source,
                    ttl: answer.ttl - 1,
                    ..answer.clone()
                };
                assert_eq!(run.verdict, xdp::TX, "{family:?} {protocol} {vlan:?}");
                assert_eq!(run.packet, framed(PEER_MAC, HOST_MAC, &back));
                assert_eq!(ingress.counts(), [(Reason::NatReply, 1)]);
                let stats = ingress.stats(1);
                assert_eq!((stats.packets, stats.flows, stats.bytes), (1, 1, asked.ip().len() as u64));
            }
        }
    });
}

#[test]
fn a_handshake_and_a_reset_are_followed() {
    with(Loaded::Default, |ingress| {
        let syn = tcp(V4, SYN);
        translated_service(ingress, &syn, V4);
        ingress.run(&syn.bytes()).expect("runs");
        let (nat, _, reply) = binding(ingress);
        assert_eq!(reply.flags, 0);
        ingress.run(&answer(&nat, TCP, SYN | ACK).bytes()).expect("runs");
        ingress.run(&tcp(V4, ACK).bytes()).expect("runs");
        let (after, _, reply) = binding(ingress);
        assert_eq!(reply.flags, ANSWERED | ESTABLISHED);
        assert_eq!((after.source_port, after.worker), (nat.source_port, nat.worker));
        ingress.run(&tcp(V4, RST).bytes()).expect("runs");
        assert_eq!(binding(ingress).2.flags, ANSWERED | ESTABLISHED | CLIENT_RST);
        // Who answers has not taken it for one (RFC 5961).
        ingress.run(&answer(&nat, TCP, ACK).bytes()).expect("runs");
        assert_eq!(binding(ingress).2.flags, ANSWERED | ESTABLISHED);
    });
}

#[test]
fn a_flow_that_both_close_is_over() {
    with(Loaded::Default, |ingress| {
        let syn = tcp(V6, SYN);
        translated_service(ingress, &syn, V6);
        ingress.run(&syn.bytes()).expect("runs");
        let (nat, ..) = binding(ingress);
        for frame in [answer(&nat, TCP, SYN | ACK), tcp(V6, ACK), tcp(V6, FIN)] {
            assert_eq!(ingress.run(&frame.bytes()).expect("runs").verdict, xdp::TX);
        }
        assert_eq!(binding(ingress).2.flags, ANSWERED | ESTABLISHED | CLIENT_FIN);
        // The worker goes on talking, and then closes too. After a FIN there is no data.
        for flags in [ACK, FIN] {
            ingress.run(&answer(&nat, TCP, flags).bytes()).expect("runs");
        }
        assert_eq!(binding(ingress).2.flags, ANSWERED | ESTABLISHED | CLIENT_FIN | WORKER_FIN);
        // The last acknowledgement goes by the binding, and a SYN begins a new flow.
        let bare = Packet { payload: vec![], ..tcp(V6, ACK) };
        ingress.run(&bare.bytes()).expect("runs");
        assert_eq!(binding(ingress).2.flags, ANSWERED | ESTABLISHED | CLIENT_FIN | WORKER_FIN);
        ingress.run(&syn.bytes()).expect("runs");
        assert_eq!(binding(ingress).2.flags, 0);
        assert_eq!(ingress.stats(1).flows, 2);
    });
}

#[test]
fn the_service_s_port_is_kept_where_none_is_given() {
    with(Loaded::Default, |ingress| {
        let asked = udp(V4);
        translated_service(ingress, &asked, V4);
        ingress.backend(1, Backend { port: Be16::ZERO, ..worker(V4) });
        let run = ingress.run(&asked.bytes()).expect("runs");
        let (nat, ..) = binding(ingress);
        assert_eq!(nat.port.get(), asked.destination.1);
        let entry = worker(V4);
        assert_eq!(run.packet, framed(entry.next_hop, entry.egress_mac, &to_worker(&asked, &nat)));
    });
}

/// A packet in three parts.
fn three(packet: &Packet) -> [Vec<u8>; 3] {
    let len = packet.ip().len() - if packet.source.0[10] == 0xff { 20 } else { 40 };
    [part(packet, 0, 1_480, true), part(packet, 1_480, 2_960, true), part(packet, 2_960, len, false)]
}

/// The packet's parts as frames, first to last.
fn frames(destination: [u8; 6], source: [u8; 6], packet: &Packet) -> [Vec<u8>; 3] {
    let ethernet = packet.ethernet();
    three(packet).map(|ip| [&destination[..], &source[..], &ethernet[12..], &ip].concat())
}

/// 4,000 bytes of payload.
fn long(packet: Packet) -> Packet {
    let packet = Packet { dont_fragment: false, ..packet };
    let headers = packet.ip().len() - packet.payload.len();
    sized(packet, 4_000 + headers)
}

#[test]
fn parts_both_ways_byte_by_byte() {
    with(Loaded::Default, |ingress| {
        for (family, protocol) in [(V4, TCP), (V4, UDP), (V6, TCP), (V6, UDP)] {
            for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                ingress.reset();
                let asked = long(Packet { vlan, tos: 0xb9, ..request(family, protocol) });
                translated_service(ingress, &asked, family);
                let sent = frames(HOST_MAC, PEER_MAC, &asked);
                let got = sent.each_ref().map(|frame| ingress.run(frame).expect("runs"));
                let (nat, ..) = binding(ingress);
                let entry = worker(family);
                let expected = frames(entry.next_hop, entry.egress_mac, &to_worker(&asked, &nat));
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert_eq!(got.verdict, xdp::TX, "{family:?} {protocol} {vlan:?} part {i}");
                    assert_eq!(got.packet, *expected, "{family:?} {protocol} {vlan:?} part {i}");
                }

                let answer = long(answer(&nat, protocol, SYN | ACK));
                let back = Packet {
                    vlan,
                    source: asked.destination,
                    destination: asked.source,
                    ttl: answer.ttl - 1,
                    ..answer.clone()
                };
                // The others in any order, and again.
                let (sent, expected) =
                    (frames(HOST_MAC, PEER_MAC, &answer), frames(PEER_MAC, HOST_MAC, &back));
                for i in [0, 2, 1, 2] {
                    let run = ingress.run(&sent[i]).expect("runs");
                    assert_eq!((run.verdict, &run.packet), (xdp::TX, &expected[i]), "back, part {i}");
                }
                let counts = ingress.counts();
                assert_eq!(counts, [(Reason::NatReply, 4), (Reason::FragmentForwarded, 7)]);
                let stats = ingress.stats(1);
                let bytes: usize = three(&asked).iter().map(Vec::len).sum();
                assert_eq!((stats.packets, stats.flows, stats.bytes), (3, 1, bytes as u64));
            }
        }
    });
}

#[test]
fn a_part_without_a_checksum_keeps_none() {
    with(Loaded::Default, |ingress| {
        let asked = long(udp(V4));
        translated_service(ingress, &asked, V4);
        let mut first = frames(HOST_MAC, PEER_MAC, &asked)[0].clone();
        first[40..42].fill(0);
        let run = ingress.run(&first).expect("runs");
        assert_eq!((run.verdict, &run.packet[40..42]), (xdp::TX, &[0, 0][..]));
    });
}

#[test]
fn parts_that_cannot_be_placed_are_named() {
    with(Loaded::Default, |ingress| {
        for family in [V4, V6] {
            ingress.reset();
            let asked = long(udp(family));
            translated_service(ingress, &asked, family);
            let sent = frames(HOST_MAC, PEER_MAC, &asked);
            // Before the first.
            assert_eq!(ingress.run(&sent[1]).expect("runs").verdict, xdp::DROP);
            assert_eq!(ingress.counts(), [(Reason::FragmentUnknown, 1)]);
            for frame in &sent {
                assert_eq!(ingress.run(frame).expect("runs").verdict, xdp::TX);
            }
            let (nat, ..) = binding(ingress);
            // An answer's part that comes first could be the host's own as well.
            let answer = long(answer(&nat, UDP, 0));
            let back = frames(HOST_MAC, PEER_MAC, &answer);
            let run = ingress.run(&back[2]).expect("runs");
            assert_eq!((run.verdict, &run.packet), (xdp::PASS, &back[2]));
            assert_eq!(ingress.count(Reason::NatFragment), 1);
            // Of a flow that nobody has: the host's, in all parts.
            let stranger = Packet { destination: (nat.source, nat.source_port.get() ^ 1), ..answer.clone() };
            for (frame, reason) in frames(HOST_MAC, PEER_MAC, &stranger).iter().zip([1, 2, 3]) {
                let run = ingress.run(frame).expect("runs");
                assert_eq!((run.verdict, &run.packet), (xdp::PASS, frame));
                assert_eq!(ingress.count(Reason::NatFragment), reason);
            }
            // One that overlaps ends its packet, either way.
            for (packet, first) in [(&asked, &sent[0]), (&answer, &back[0])] {
                assert_eq!(ingress.run(first).expect("runs").verdict, xdp::TX);
                let over = [packet.ethernet(), part(packet, 1_472, 2_000, true)].concat();
                let later = [packet.ethernet(), part(packet, 2_960, 4_008, false)].concat();
                for frame in [over, later] {
                    assert_eq!(ingress.run(&frame).expect("runs").verdict, xdp::DROP);
                }
            }
            assert_eq!(ingress.count(Reason::FragmentOverlap), 4);
            // A first part begins anew; but without a binding the others have nobody to follow.
            assert_eq!(ingress.run(&sent[0]).expect("runs").verdict, xdp::TX);
            ingress.forget_bindings();
            assert_eq!(ingress.run(&sent[1]).expect("runs").verdict, xdp::DROP);
            assert_eq!(ingress.count(Reason::FragmentUnknown), 2);
        }
    });
}

#[test]
fn what_is_not_translated_is_named() {
    with(Loaded::Default, |ingress| {
        let old = Packet { ttl: 1, ..tcp(V4, SYN) };
        let stranger = Packet::new(TCP, (mapped([10, 1, 0, 1]), 80), (mapped([10, 9, 0, 1]), 20_000));
        for (packet, bytes, verdict, reason) in [
            (&old, old.bytes(), xdp::DROP, Reason::NatTtl),
            // A port of the range that no flow has: the host's own.
            (&udp(V4), stranger.bytes(), xdp::PASS, Reason::NotVip),
        ] {
            ingress.reset();
            translated_service(ingress, packet, V4);
            let run = ingress.run(&bytes).expect("runs");
            assert_eq!((run.verdict, ingress.counts()), (verdict, vec![(reason, 1)]));
            let flows = ingress.stats(1).packets;
            assert_eq!(flows, 0, "{reason:?}");
        }
    });
}

#[test]
fn a_client_s_port_that_comes_back_gets_the_same_again() {
    with(Loaded::Default, |ingress| {
        let syn = tcp(V6, SYN);
        translated_service(ingress, &syn, V6);
        ingress.run(&syn.bytes()).expect("runs");
        let (first, _, _) = binding(ingress);
        ingress.run(&answer(&first, TCP, 0x14).bytes()).expect("runs");
        ingress.run(&syn.bytes()).expect("runs");
        let (second, _, reply) = binding(ingress);
        assert_eq!((first.source_port, first.worker), (second.source_port, second.worker));
        assert_eq!(reply.flags, 0, "a new flow");
    });
}
