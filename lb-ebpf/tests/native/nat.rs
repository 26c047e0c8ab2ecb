//! Mode `nat`: both directions byte by byte, bindings through a flow's life, and what must not happen to them.
//!
//! Expected frames are built anew with the new addresses, checksums the plain way.

use crate::{
    build::{Packet, Vlan, checksum},
    world::{self, CLIENT4, CLIENT6, TCP_SERVICE, UDP_SERVICE, UDP_TIMEOUT_S, VIP4, VIP6},
};
use lb_common::{
    Address, Backend, Be16, Nat, Reason, Reply, Slot,
    backend::{flags as backend_flags, mode},
    is_mapped, mapped,
    nat::{CLOSED_S, ESTABLISHED_S, HALF_CLOSED_S, flags as nat_flags},
    service::{self, TCP, UDP},
    settings::IngressSettings,
};
use lb_ebpf::{
    Verdict,
    nat::NatTables,
    native::{self, HashTables, VecFrame},
    packet::{
        fib::{FibAnswer, FibQuery, Hop},
        verdict::Outcome,
    },
};
use proptest::prelude::*;
use std::collections::BTreeSet;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN: u8 = 0x11;
const RST: u8 = 0x04;

/// Interface towards the workers; the client's is 1.
const INSIDE: u32 = 7;
const SOURCE4: Address = mapped([10, 9, 0, 1]);
const SOURCE6: Address = [0xfd, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const WORKER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn worker(index: u32, is_ipv6: bool) -> Address {
    if is_ipv6 {
        let mut address = SOURCE6;
        address[15] = 100 + index as u8;
        address
    } else {
        mapped([10, 1, 0, index as u8])
    }
}

fn backend(index: u32, is_ipv6: bool, service: u32) -> Backend {
    Backend {
        address: worker(index, is_ipv6),
        source: if is_ipv6 { SOURCE6 } else { SOURCE4 },
        source_bits: 0,
        mode: mode::NAT,
        next_hop: WORKER_MAC,
        egress_mac: OWN_MAC,
        ifindex: INSIDE,
        port: Be16::new(8_080),
        service,
        ..world::backend(index)
    }
}

/// The small world with its services in mode nat; all slots lead to backend 1 (TCP) and 11 (UDP).
pub fn tables(is_ipv6: bool) -> HashTables {
    let mut tables = world::tables(Slot { primary: 1, secondary: 2 }, Slot { primary: 11, secondary: 12 });
    for index in 1..10 {
        tables.backends.insert(index, backend(index, is_ipv6, TCP_SERVICE));
        tables.backends.insert(10 + index, backend(10 + index, is_ipv6, UDP_SERVICE));
    }
    for view in tables.services.values_mut() {
        view.flags |= service::flags::NAT;
    }
    tables
}

pub fn request(is_ipv6: bool, protocol: u8, port: u16, flags: u8) -> Packet {
    let (client, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
    Packet { flags, ..Packet::new(protocol, (client, port), (vip, if protocol == TCP { 80 } else { 53 })) }
}

fn run(tables: &HashTables, bytes: &[u8], ifindex: u32) -> (Verdict, Outcome, Vec<u8>) {
    run_with(tables, bytes, ifindex, &IngressSettings::DEFAULT)
}

fn run_with(
    tables: &HashTables,
    bytes: &[u8],
    ifindex: u32,
    settings: &IngressSettings,
) -> (Verdict, Outcome, Vec<u8>) {
    let mut frame = VecFrame::new(bytes).from_interface(ifindex);
    let (verdict, outcome) = native::run(&mut frame, tables, settings);
    (verdict, outcome, frame.bytes())
}

/// Sends a client's packet, which must reach a worker.
pub fn send(tables: &HashTables, packet: &Packet) -> Nat {
    let (verdict, outcome, _) = run(tables, &packet.bytes(), 1);
    assert_eq!(verdict, Verdict::Redirect(INSIDE), "{outcome:?}");
    binding(tables, packet).0
}

/// A flow's entries.
fn binding(tables: &HashTables, packet: &Packet) -> (Nat, Reply) {
    let nat = tables.nats().into_iter().find(|(key, _)| *key == world::key(packet)).expect("it is bound").1;
    let reply = tables
        .replies()
        .into_iter()
        .find(|(key, _)| key.source_port == nat.source_port && key.worker == nat.worker)
        .expect("with both entries");
    (nat, reply.1)
}

/// The packet as its worker gets it.
pub fn translated(packet: &Packet, nat: &Nat) -> Packet {
    Packet {
        vlan: Vlan::None,
        source: (nat.source, nat.source_port.get()),
        destination: (nat.worker, nat.port.get()),
        ttl: packet.ttl - 1,
        ..packet.clone()
    }
}

/// A worker's packet to the address and port that it was asked from.
pub fn answer(nat: &Nat, protocol: u8, flags: u8) -> Packet {
    let answer = Packet::new(protocol, (nat.worker, nat.port.get()), (nat.source, nat.source_port.get()));
    Packet { flags, payload: b"hello, client: a longer one".to_vec(), ..answer }
}

/// The same as its client gets it.
fn returned(answer: &Packet, request: &Packet) -> Packet {
    Packet {
        vlan: request.vlan,
        source: request.destination,
        destination: request.source,
        ttl: answer.ttl - 1,
        ..answer.clone()
    }
}

/// Sends a worker's packet, which must reach the client.
fn reply(tables: &HashTables, nat: &Nat, protocol: u8, flags: u8) {
    let (verdict, outcome, _) = run(tables, &answer(nat, protocol, flags).bytes(), INSIDE);
    assert_eq!(verdict, Verdict::Redirect(1), "{outcome:?}");
}

fn framed(destination: [u8; 6], source: [u8; 6], packet: &Packet) -> Vec<u8> {
    let mut frame = packet.bytes();
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame
}

#[test]
fn both_ways_byte_by_byte() {
    for is_ipv6 in [false, true] {
        for protocol in [TCP, UDP] {
            for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                let tables = tables(is_ipv6);
                let asked = Packet { vlan, tos: 0xb9, ..request(is_ipv6, protocol, 40_000, SYN) };
                let (verdict, outcome, frame) = run(&tables, &asked.bytes(), 1);
                let (nat, _) = binding(&tables, &asked);
                assert_eq!(verdict, Verdict::Redirect(INSIDE));
                assert!(matches!(outcome, Outcome::Forwarded { backend: 1 | 11, .. }), "{outcome:?}");
                assert_eq!(nat.port.get(), 8_080);
                assert!((10_240..=32_767).contains(&nat.source_port.get()));
                assert_eq!(frame, framed(WORKER_MAC, OWN_MAC, &translated(&asked, &nat)));

                let answer = answer(&nat, protocol, SYN_ACK);
                let (verdict, outcome, frame) = run(&tables, &answer.bytes(), INSIDE);
                let service = if protocol == TCP { TCP_SERVICE } else { UDP_SERVICE };
                assert_eq!((verdict, outcome), (Verdict::Redirect(1), Outcome::Returned { service }));
                let macs = asked.bytes();
                let (own, peer) = (macs[..6].try_into().unwrap(), macs[6..12].try_into().unwrap());
                assert_eq!(frame, framed(peer, own, &returned(&answer, &asked)));
                let index = if protocol == TCP { 1 } else { 11 };
                let stats = tables.stats(index);
                assert_eq!((stats.packets, stats.flows, stats.bytes), (1, 1, asked.ip().len() as u64));
                assert_eq!(tables.counts(), [(Reason::NatReply, 1)]);
            }
        }
    }
}

#[test]
fn the_service_s_port_is_kept_where_none_is_given() {
    let mut tables = tables(false);
    tables.backends.get_mut(&1).unwrap().port = Be16::new(0);
    assert_eq!(send(&tables, &request(false, TCP, 40_000, SYN)).port.get(), 80);
}

#[test]
fn headers_of_other_lengths() {
    let tables4 = tables(false);
    let with_options = Packet { options: vec![1; 12], ..request(false, TCP, 1_234, SYN) };
    let (_, _, frame) = run(&tables4, &with_options.bytes(), 1);
    let (nat, _) = binding(&tables4, &with_options);
    assert_eq!(frame, framed(WORKER_MAC, OWN_MAC, &translated(&with_options, &nat)));

    let tables6 = tables(true);
    let with_headers =
        Packet { extensions: vec![(60, vec![0, 1, 4, 0, 0, 0, 0])], ..request(true, UDP, 1_234, 0) };
    let (_, _, frame) = run(&tables6, &with_headers.bytes(), 1);
    let (nat, _) = binding(&tables6, &with_headers);
    assert_eq!(frame, framed(WORKER_MAC, OWN_MAC, &translated(&with_headers, &nat)));
}

/// Offset of the transport checksum of an untagged packet without options.
fn check_at(packet: &Packet) -> usize {
    14 + if is_mapped(&packet.source.0) { 20 } else { 40 } + if packet.protocol == TCP { 16 } else { 6 }
}

/// What a sender that leaves the checksum to its card writes: the pseudo-header's sum.
fn partial(packet: &Packet) -> Vec<u8> {
    let mut bytes = packet.bytes();
    let at = check_at(packet);
    let l4 = at - if packet.protocol == TCP { 16 } else { 6 };
    let of = |a: &Address| if is_mapped(a) { a[12..].to_vec() } else { a.to_vec() };
    let mut pseudo = [of(&packet.source.0), of(&packet.destination.0)].concat();
    pseudo.extend(((bytes.len() - l4) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, packet.protocol]);
    bytes[at..at + 2].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    bytes
}

#[test]
fn a_checksum_left_to_a_card_is_completed() {
    for is_ipv6 in [false, true] {
        for protocol in [TCP, UDP] {
            // Pieces, their ends and their odd ends.
            for len in [0, 1, 2, 3, 511, 512, 513, 1_024, 1_459, 8_901] {
                let tables = tables(is_ipv6);
                let payload: Vec<u8> = (0..len).map(|i| (i * 7 + 3) as u8).collect();
                let asked = Packet { payload: payload.clone(), ..request(is_ipv6, protocol, 40_000, SYN) };
                let (_, _, frame) = run(&tables, &partial(&asked), 1);
                let (nat, _) = binding(&tables, &asked);
                assert_eq!(frame, framed(WORKER_MAC, OWN_MAC, &translated(&asked, &nat)), "{len} bytes");
                let answer = Packet { payload, ..answer(&nat, protocol, SYN_ACK) };
                let (_, _, frame) = run(&tables, &partial(&answer), INSIDE);
                assert_eq!(frame[14..], returned(&answer, &asked).ip(), "{len} bytes back");
                assert_eq!(tables.counted(Reason::NatCompleted), 2);
            }
        }
    }
}

#[test]
fn no_udp_checksum_stays_none_and_zero_is_never_made() {
    let tables = tables(false);
    let asked = request(false, UDP, 40_000, 0);
    let mut bytes = asked.bytes();
    bytes[40..42].fill(0);
    let (_, _, frame) = run(&tables, &bytes, 1);
    assert_eq!(frame[40..42], [0, 0]);
    // A payload that makes the new sum all ones: its checksum must be written as all ones too.
    let (nat, _) = binding(&tables, &asked);
    let mut asked = Packet { payload: vec![0, 0], ..asked };
    let mut plain = translated(&asked, &nat).bytes();
    asked.payload = vec![plain[40], plain[41]];
    plain = translated(&asked, &nat).bytes();
    assert_eq!(plain[40..42], [0, 0], "the case is what it should be");
    let (_, _, frame) = run(&tables, &asked.bytes(), 1);
    assert_eq!(frame[40..42], [0xff, 0xff]);
}

proptest! {
    #![proptest_config(world::cases(300))]

    #[test]
    fn any_packet_has_right_checksums(
        is_ipv6: bool,
        is_tcp: bool,
        port in 1u16..,
        source in any::<[u8; 3]>(),
        tos: u8,
        payload in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let tables = tables(is_ipv6);
        let mut asked = request(is_ipv6, if is_tcp { TCP } else { UDP }, port, SYN);
        asked.source.0[13..].copy_from_slice(&source);
        asked.tos = tos;
        asked.payload = payload;
        let (_, _, frame) = run(&tables, &asked.bytes(), 1);
        let (nat, _) = binding(&tables, &asked);
        let mut expected = translated(&asked, &nat).bytes();
        let at = check_at(&asked);
        if !is_tcp && expected[at..at + 2] == [0, 0] {
            expected[at..at + 2].fill(0xff);
        }
        prop_assert_eq!(&frame[12..], &expected[12..]);
        let answer = answer(&nat, asked.protocol, ACK);
        let (_, _, frame) = run(&tables, &answer.bytes(), INSIDE);
        let mut expected = returned(&answer, &asked).ip();
        if !is_tcp && expected[at - 14..at - 12] == [0, 0] {
            expected[at - 14..at - 12].fill(0xff);
        }
        prop_assert_eq!(&frame[14..], &expected[..]);
    }
}

#[test]
fn a_flow_keeps_its_worker_whatever_the_tables_say() {
    let mut tables = tables(false);
    let asked = |flags| request(false, TCP, 40_000, flags);
    let nat = send(&tables, &asked(SYN));
    reply(&tables, &nat, TCP, SYN_ACK);
    send(&tables, &asked(ACK));
    for slot in &mut tables.slots {
        *slot = Slot { primary: 3, secondary: 4 };
    }
    tables.backends.get_mut(&1).unwrap().flags |= backend_flags::DRAINING;
    for service in tables.services.values_mut() {
        service.seed = [5, 6];
    }
    for flags in [ACK, SYN, ACK, FIN] {
        let now = send(&tables, &asked(flags));
        assert_eq!((now.worker, now.source_port), (nat.worker, nat.source_port), "{flags:#x}");
    }
    // Down, and the service does not say reset: it may be a wrong verdict.
    tables.backends.get_mut(&1).unwrap().flags |= backend_flags::DOWN;
    assert_eq!(send(&tables, &asked(ACK)).worker, nat.worker);
    let view = tables.services.get_mut(&TCP_SERVICE).unwrap();
    view.flags |= service::flags::RESET_ON_DOWN;
    assert_eq!(send(&tables, &asked(ACK)).worker, worker(3, false), "another's reset tells the client");
    assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1), "nothing is left of the old binding");
}

#[test]
fn an_established_flow_without_a_binding_is_bound_anew() {
    let tables = tables(false);
    send(&tables, &request(false, TCP, 40_000, ACK));
    assert_eq!(tables.counts(), [(Reason::NatUnknown, 1)]);
    assert_eq!(tables.stats(1).flows, 0);
}

/// Bindings can be lost with their maps. The same ports are tried first again, so the flow goes on at its worker.
#[test]
fn a_flow_whose_binding_is_lost_gets_the_same_again() {
    for is_ipv6 in [false, true] {
        let (before, after) = (tables(is_ipv6), tables(is_ipv6));
        for port in 1_000..1_200 {
            let nat = send(&before, &request(is_ipv6, TCP, port, SYN));
            for flags in [ACK, FIN] {
                let now = send(&after, &request(is_ipv6, TCP, port, flags));
                assert_eq!((now.worker, now.source_port), (nat.worker, nat.source_port));
            }
        }
        assert_eq!(after.counts(), [(Reason::NatUnknown, 200)]);
    }
}

/// What can belong to no flow without a binding makes none, and pushes none out.
#[test]
fn strays_push_nothing_out() {
    let mut tables = tables(false);
    tables.embryonic_room = 8;
    for port in 1_000..1_008 {
        send(&tables, &request(false, TCP, port, SYN));
    }
    let bound = tables.nats();
    for (port, flags) in
        (2_000..2_900).zip([RST, 0x14, SYN_ACK, 0x06, 0x03, 0x01, 0, 0x08, 0x29].iter().cycle())
    {
        let (verdict, outcome, _) = run(&tables, &request(false, TCP, port, *flags).bytes(), 1);
        assert_eq!((verdict, outcome), (Verdict::Drop, Outcome::Not(Reason::NatStray)), "{flags:#x}");
    }
    assert_eq!((tables.nats(), tables.counted(Reason::NatGaveWay)), (bound, 0));
}

/// State of a TCP flow after a handshake and these packets: true is the client's.
fn after(tables: &HashTables, port: u16, packets: &[(bool, u8)]) -> Nat {
    let asked = |flags| request(false, TCP, port, flags);
    let nat = send(tables, &asked(SYN));
    reply(tables, &nat, TCP, SYN_ACK);
    for &(is_client, flags) in [(true, ACK)].iter().chain(packets) {
        if is_client {
            send(tables, &asked(flags));
        } else {
            reply(tables, &nat, TCP, flags);
        }
    }
    nat
}

#[test]
fn a_syn_starts_anew_when_the_flow_is_over() {
    let cases: &[(&[(bool, u8)], u32, bool)] = &[
        (&[], 0, false),
        (&[], ESTABLISHED_S, false),
        (&[], ESTABLISHED_S + 1, true),
        (&[(true, FIN)], 0, false),
        (&[(true, FIN)], HALF_CLOSED_S + 1, true),
        (&[(true, FIN), (false, FIN)], 0, true),
        (&[(false, RST)], 0, true),
        (&[(true, RST)], 0, true),
        // The worker goes on: it has not taken the reset for one, because it was forged.
        (&[(true, RST), (false, ACK)], 0, false),
    ];
    for (packets, idle_s, is_new) in cases {
        let mut tables = tables(false);
        let nat = after(&tables, 40_000, packets);
        for slot in &mut tables.slots {
            *slot = Slot { primary: 3, secondary: 4 };
        }
        tables.advance_s(*idle_s);
        let now = send(&tables, &request(false, TCP, 40_000, SYN));
        assert_eq!(now.worker != nat.worker, *is_new, "{packets:?} after {idle_s} s");
        assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1));
    }
}

/// A client that vanished without a FIN, whose worker is found dead, and that connects from the same port again.
#[test]
fn a_syn_leaves_a_worker_that_is_down() {
    for (packets, is_down) in [(&[][..], true), (&[(true, ACK), (false, ACK)], true), (&[], false)] {
        let mut tables = tables(false);
        let nat = after(&tables, 40_000, packets);
        if is_down {
            tables.backends.get_mut(&1).unwrap().flags |= backend_flags::DOWN;
        }
        for slot in &mut tables.slots {
            slot.primary = 3;
        }
        let sent = |flags| send(&tables, &request(false, TCP, 40_000, flags)).worker;
        assert_eq!(sent(ACK), nat.worker, "the flow stays, in case the check is wrong");
        let now = if is_down { worker(3, false) } else { nat.worker };
        assert_eq!([sent(SYN), sent(SYN), sent(ACK)], [now; 3], "{packets:?}");
        assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1));
    }
}

#[test]
fn the_same_client_port_gets_the_same_port_again() {
    let tables = tables(false);
    let first = after(&tables, 40_000, &[(true, FIN), (false, FIN)]);
    assert_eq!(after(&tables, 40_000, &[]).source_port, first.source_port);
}

/// A client's handshake, if its flow is bound.
fn open(tables: &HashTables, port: u16, settings: &IngressSettings) -> Option<Nat> {
    let asked = |flags| request(false, TCP, port, flags);
    let (verdict, ..) = run_with(tables, &asked(SYN).bytes(), 1, settings);
    if verdict == Verdict::Drop {
        return None;
    }
    let nat = binding(tables, &asked(SYN)).0;
    reply(tables, &nat, TCP, SYN_ACK);
    run_with(tables, &asked(ACK).bytes(), 1, settings);
    Some(nat)
}

#[test]
fn ports_are_unique_and_their_lack_has_a_name() {
    let mut tables = tables(false);
    let settings = IngressSettings { nat_first: 20_000, nat_last: 20_007, ..IngressSettings::DEFAULT };
    let mut refused = 0;
    for port in 1_000..1_064 {
        refused += u64::from(open(&tables, port, &settings).is_none());
    }
    let used: BTreeSet<u16> = tables.replies().iter().map(|(key, _)| key.source_port.get()).collect();
    assert_eq!(used.len(), tables.replies().len());
    assert_eq!(used, (20_000..=20_007).collect(), "32 tries find all eight");
    assert_eq!((refused, tables.counted(Reason::NatNoPort)), (56, 56));
    // Another worker's answers are told apart: its ports are all free.
    for slot in &mut tables.slots {
        slot.primary = 2;
    }
    let (verdict, ..) = run_with(&tables, &request(false, TCP, 1_100, SYN).bytes(), 1, &settings);
    assert_eq!(verdict, Verdict::Redirect(INSIDE));
}

#[test]
fn a_pool_gives_its_addresses_ports_of_their_own() {
    for is_ipv6 in [false, true] {
        let mut tables = tables(is_ipv6);
        let pool = tables.backends.get_mut(&1).unwrap();
        pool.source = if is_ipv6 { SOURCE6 } else { mapped([10, 9, 0, 0]) };
        pool.source[15] = 0;
        pool.source_bits = 2;
        let settings = IngressSettings { nat_first: 20_000, nat_last: 20_007, ..IngressSettings::DEFAULT };
        for port in 1_000..1_064 {
            run_with(&tables, &request(is_ipv6, TCP, port, SYN).bytes(), 1, &settings);
        }
        let used: BTreeSet<_> =
            tables.replies().iter().map(|(k, _)| (k.source, k.source_port.get())).collect();
        assert_eq!(used.iter().map(|(a, _)| a[15]).collect::<BTreeSet<_>>(), (0..4).collect());
        assert!(used.len() >= 28, "{} of 32", used.len());
    }
}

#[test]
fn ports_of_flows_that_are_over_are_taken_when_none_is_free() {
    let settings = IngressSettings { nat_first: 20_000, nat_last: 20_000, ..IngressSettings::DEFAULT };
    let ask = |tables: &HashTables, protocol, port| {
        run_with(tables, &request(false, protocol, port, SYN).bytes(), 1, &settings).0 != Verdict::Drop
    };
    // (Packets after the first, idle seconds for which the port is kept.)
    let answered = |tables: &HashTables, flags: &[(bool, u8)]| {
        let nat = tables.nats()[0].1;
        for &(is_client, bits) in flags {
            if is_client {
                run_with(tables, &request(false, TCP, 1_000, bits).bytes(), 1, &settings);
            } else {
                reply(tables, &nat, TCP, bits);
            }
        }
    };
    let cases: &[(&[(bool, u8)], u32)] = &[
        (&[(false, SYN_ACK), (true, ACK)], ESTABLISHED_S),
        (&[(false, SYN_ACK), (true, ACK), (true, RST)], HALF_CLOSED_S),
        (&[(false, SYN_ACK), (true, ACK), (true, FIN)], HALF_CLOSED_S),
        (&[(false, SYN_ACK), (true, ACK), (true, FIN), (false, FIN)], CLOSED_S),
    ];
    for (packets, kept_s) in cases {
        let tables = tables(false);
        assert!(ask(&tables, TCP, 1_000));
        answered(&tables, packets);
        tables.advance_s(*kept_s);
        assert!(!ask(&tables, TCP, 1_001), "{packets:?}: kept for {kept_s} s");
        tables.advance_s(1);
        assert!(ask(&tables, TCP, 1_001), "{packets:?}: not longer");
        assert_eq!(tables.counted(Reason::NatReused), 1);
        assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1));
    }
    // Whose client has not shown itself gives way at once, so that whoever forges addresses takes no ports away.
    let unproven: [&[(bool, u8)]; 4] = [
        &[],
        &[(false, SYN_ACK)],
        &[(false, RST)],
        // An acknowledgement of what was never seen: the worker says so.
        &[(false, SYN_ACK), (true, ACK), (false, RST)],
    ];
    for packets in unproven {
        let tables = tables(false);
        assert!(ask(&tables, TCP, 1_000));
        answered(&tables, packets);
        assert!(ask(&tables, TCP, 1_001), "{packets:?}");
        assert_eq!((tables.counted(Reason::NatReused), tables.counted(Reason::NatGaveWay)), (0, 1));
        assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1));
    }
    let tables = tables(false);
    assert!(ask(&tables, UDP, 1_000));
    reply(&tables, &tables.nats()[0].1, UDP, 0);
    assert!(ask(&tables, UDP, 1_000), "it goes on after an answer");
    tables.advance_s(UDP_TIMEOUT_S);
    assert!(!ask(&tables, UDP, 1_001));
    tables.advance_s(1);
    assert!(ask(&tables, UDP, 1_001));
    assert!(ask(&tables, UDP, 1_002), "that one has not");
}

#[test]
fn floods_of_forged_packets_have_few_bindings_and_take_none() {
    const YOUNG: u32 = 8;
    let settings = IngressSettings::DEFAULT;
    let mut tables = tables(false);
    tables.embryonic_room = YOUNG;
    let live: Vec<Nat> =
        (0..20).map(|i| open(&tables, 1_000 + i, &settings).expect("there is room")).collect();
    let talkers = (0..20).map(|i| request(false, UDP, 1_000 + i, 0));
    for asked in talkers.clone() {
        run_with(&tables, &asked.bytes(), 1, &settings);
        reply(&tables, &binding(&tables, &asked).0, UDP, 0);
        run_with(&tables, &asked.bytes(), 1, &settings);
    }
    let bound = tables.nats().len();
    // SYNs; their ACKs too; packets of no flow; datagrams, answered or not.
    for round in 0..5 {
        for port in 2_000..2_100 {
            let protocol = if round > 2 { UDP } else { TCP };
            let flags = if round == 2 { ACK } else { SYN };
            let asked = request(false, protocol, port, flags);
            run_with(&tables, &asked.bytes(), 1, &settings);
            if round % 3 > 0 {
                let nat = binding(&tables, &asked).0;
                reply(&tables, &nat, protocol, SYN_ACK);
                if round == 1 {
                    run_with(&tables, &request(false, TCP, port, ACK).bytes(), 1, &settings);
                    reply(&tables, &nat, TCP, RST);
                }
            }
            let young = (tables.nats().len() - bound) as u32;
            assert!(young <= YOUNG, "round {round}: {young} bindings of the flood");
            assert_eq!(tables.nats().len(), tables.replies().len());
        }
    }
    assert_eq!(tables.counted(Reason::NatGaveWay), 500 - u64::from(YOUNG));
    for (i, nat) in live.iter().enumerate() {
        let now = send(&tables, &request(false, TCP, 1_000 + i as u16, ACK));
        assert_eq!((now.source_port, now.created_s), (nat.source_port, nat.created_s));
    }
    for asked in talkers {
        assert_eq!(binding(&tables, &asked).0.flags & nat_flags::ESTABLISHED, nat_flags::ESTABLISHED);
    }
    // A handshake among the flood comes about if it takes less time than the ring.
    for (others, comes) in [(YOUNG - 1, true), (YOUNG, false)] {
        let asked = |flags| request(false, TCP, 3_000 + others as u16, flags);
        run_with(&tables, &asked(SYN).bytes(), 1, &settings);
        let nat = binding(&tables, &asked(SYN)).0;
        for i in 0..others as u16 {
            let port = 4_000 + 100 * others as u16 + i;
            run_with(&tables, &request(false, TCP, port, SYN).bytes(), 1, &settings);
        }
        let (verdict, ..) = run(&tables, &answer(&nat, TCP, SYN_ACK).bytes(), INSIDE);
        assert_eq!(verdict == Verdict::Redirect(1), comes, "{others} others");
    }
}

#[test]
fn data_takes_a_forged_end_back() {
    for is_ipv6 in [false, true] {
        let asked = |flags| request(is_ipv6, TCP, 40_000, flags);
        let bare = |flags| Packet { payload: vec![], ..asked(flags) };
        let tables = tables(is_ipv6);
        let nat = send(&tables, &asked(SYN));
        reply(&tables, &nat, TCP, SYN_ACK);
        send(&tables, &bare(ACK));
        let proven = nat_flags::ANSWERED | nat_flags::ESTABLISHED;
        for (end, flag) in [(FIN, nat_flags::CLIENT_FIN), (RST, nat_flags::CLIENT_RST)] {
            send(&tables, &asked(end));
            assert_eq!(binding(&tables, &asked(SYN)).1.flags, proven | flag);
            // As after a true one.
            send(&tables, &bare(ACK));
            assert_eq!(binding(&tables, &asked(SYN)).1.flags, proven | flag);
            send(&tables, &asked(ACK));
            let (nat, reply) = binding(&tables, &asked(SYN));
            assert_eq!((reply.flags, nat.flags), (proven, nat_flags::ESTABLISHED));
        }
        for (end, flag) in [(FIN, nat_flags::WORKER_FIN), (RST, nat_flags::WORKER_RST)] {
            reply(&tables, &nat, TCP, end);
            assert_eq!(binding(&tables, &asked(SYN)).1.flags, proven | flag);
            let bare = Packet { payload: vec![], ..answer(&nat, TCP, ACK) };
            run(&tables, &bare.bytes(), INSIDE);
            assert_eq!(binding(&tables, &asked(SYN)).1.flags, proven | flag);
            reply(&tables, &nat, TCP, ACK);
            assert_eq!(binding(&tables, &asked(SYN)).1.flags, proven);
        }
    }
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_the_old() {
    let mut tables = tables(false);
    tables.capacity = 10;
    let live: Vec<_> = (0..10).map(|i| after(&tables, 1_000 + i, &[])).collect();
    for port in 2_000..2_500 {
        assert_eq!(run(&tables, &request(false, TCP, port, SYN).bytes(), 1).0, Verdict::Drop);
    }
    assert_eq!(tables.counted(Reason::NatNoRoom), 500);
    for (i, nat) in live.iter().enumerate() {
        assert_eq!(send(&tables, &request(false, TCP, 1_000 + i as u16, ACK)).source_port, nat.source_port);
        reply(&tables, nat, TCP, ACK);
    }
}

/// A binding of UDP is assured by two datagrams and an answer, all of which a forger can cause.
#[test]
fn assured_udp_bindings_give_way_in_a_full_table_and_those_of_tcp_never() {
    let settings = IngressSettings { nat_first: 20_000, nat_last: 20_007, ..IngressSettings::DEFAULT };
    for protocol in [UDP, TCP] {
        let mut tables = tables(false);
        let ask = |tables: &HashTables, port, flags| {
            run_with(tables, &request(false, protocol, port, flags).bytes(), 1, &settings).0 != Verdict::Drop
        };
        for port in 1_000..1_007 {
            assert!(ask(&tables, port, SYN));
            reply(&tables, &binding(&tables, &request(false, protocol, port, SYN)).0, protocol, SYN_ACK);
            tables.advance_s(1);
            assert!(ask(&tables, port, ACK));
        }
        // Since then, the oldest has been used again.
        tables.advance_s(1);
        assert!(ask(&tables, 1_000, ACK));
        let ports = |tables: &HashTables| -> Vec<u16> {
            tables.nats().iter().map(|(key, _)| key.source_port.get()).collect()
        };
        assert!(ask(&tables, 2_000, SYN), "a port is free, and there is room");
        reply(&tables, &binding(&tables, &request(false, protocol, 2_000, SYN)).0, protocol, SYN_ACK);
        assert!(ask(&tables, 2_000, ACK));
        assert!(!ask(&tables, 2_001, SYN), "all ports are taken, but there is room");
        assert_eq!(tables.counted(Reason::NatNoPort), 1);
        let (nat, _) = binding(&tables, &request(false, protocol, 1_006, SYN));
        assert!(tables.remove_reply(&lb_ebpf::nat::reply_key(&nat, protocol)));
        assert!(tables.remove_nat(&tables.nats()[6].0));
        tables.capacity = 7;
        assert_eq!(ask(&tables, 2_001, SYN), protocol == UDP);
        let expected: &[u16] = if protocol == UDP {
            &[1_000, 1_002, 1_003, 1_004, 1_005, 2_000, 2_001]
        } else {
            &[1_000, 1_001, 1_002, 1_003, 1_004, 1_005, 2_000]
        };
        assert_eq!(ports(&tables), expected, "{protocol}");
        assert_eq!(tables.counted(Reason::NatGaveWay), u64::from(protocol == UDP));
        assert_eq!(tables.counted(Reason::NatNoRoom), u64::from(protocol == TCP));
    }
}

#[test]
fn udp_flows_move_when_idle_or_when_their_worker_is_down() {
    let mut tables = tables(true);
    let asked = request(true, UDP, 5_353, 0);
    let nat = send(&tables, &asked);
    for slot in &mut tables.slots {
        slot.primary = 13;
    }
    tables.advance_s(UDP_TIMEOUT_S);
    reply(&tables, &nat, UDP, 0);
    tables.advance_s(UDP_TIMEOUT_S);
    assert_eq!(send(&tables, &asked).worker, nat.worker, "the worker's packets count too");
    tables.advance_s(UDP_TIMEOUT_S + 1);
    assert_eq!(send(&tables, &asked).worker, worker(13, true));
    tables.backends.get_mut(&13).unwrap().flags |= backend_flags::DOWN;
    for slot in &mut tables.slots {
        slot.primary = 14;
    }
    assert_eq!(send(&tables, &asked).worker, worker(14, true));
    assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1));
}

/// Until the daemon has found the way, the kernel's routes say by which address of this host.
#[test]
fn the_kernel_s_routes_give_a_source_where_the_daemon_has_none() {
    fn fib(query: &FibQuery) -> Result<FibAnswer, (Reason, u32)> {
        let hop = Hop { next_hop: (1, 2), egress_mac: (3, 4), vlan: 0, ifindex: INSIDE, mtu: 0 };
        let is_asked = query.source[3] == 0 && query.source[0] == 0;
        let own = if query.is_ipv6 { SOURCE6 } else { SOURCE4 };
        Ok(FibAnswer {
            hop,
            source: if is_asked { lb_ebpf::packet::parse::words(own) } else { query.source },
        })
    }
    for is_ipv6 in [false, true] {
        let mut tables = tables(is_ipv6);
        let backend = tables.backends.get_mut(&1).unwrap();
        backend.flags &= !backend_flags::RESOLVED;
        backend.source = [0; 16];
        let asked = request(is_ipv6, TCP, 40_000, SYN);
        let mut frame = VecFrame::new(&asked.bytes()).with_fib(fib);
        let (verdict, outcome) = native::run(&mut frame, &tables, &IngressSettings::DEFAULT);
        assert_eq!(verdict, Verdict::Redirect(INSIDE), "{outcome:?}");
        let (nat, _) = binding(&tables, &asked);
        assert_eq!(nat.source, if is_ipv6 { SOURCE6 } else { SOURCE4 });
        assert_eq!(frame.bytes()[14..], translated(&asked, &nat).ip());
        // No route, no binding.
        let other = request(is_ipv6, TCP, 40_001, SYN);
        assert_eq!(run(&tables, &other.bytes(), 1).1, Outcome::Not(Reason::NoRoute));
        assert_eq!(tables.nats().len(), 1);
    }
}

#[test]
pub fn answers_follow_the_client_s_last_hop() {
    let tables = tables(false);
    let nat = after(&tables, 40_000, &[]);
    let mut moved = request(false, TCP, 40_000, ACK).bytes();
    moved[6..12].copy_from_slice(&[2, 9, 9, 9, 9, 9]);
    assert_eq!(run(&tables, &moved, 5).0, Verdict::Redirect(INSIDE));
    let (verdict, _, frame) = run(&tables, &answer(&nat, TCP, ACK).bytes(), INSIDE);
    assert_eq!(verdict, Verdict::Redirect(5));
    assert_eq!(frame[..6], [2, 9, 9, 9, 9, 9]);
}

#[test]
fn strangers_packets_are_the_host_s() {
    let tables = tables(false);
    let nat = after(&tables, 40_000, &[]);
    let good = answer(&nat, TCP, ACK);
    let mut others = vec![good.clone(); 5];
    others[0].source.1 = 8_081;
    others[1].source.0 = worker(2, false);
    others[2].destination.1 = if nat.source_port.get() == 20_000 { 20_001 } else { 20_000 };
    others[3].destination.0 = mapped([10, 9, 0, 2]);
    others[4].protocol = UDP;
    for other in others {
        let before = other.bytes();
        let (verdict, outcome, frame) = run(&tables, &before, INSIDE);
        assert_eq!((verdict, outcome), (Verdict::Pass, Outcome::Not(Reason::NotVip)), "{other:?}");
        assert_eq!(frame, before);
    }
}

#[test]
fn what_cannot_go_on_is_told_or_counted() {
    let mut tables = tables(false);
    tables.backends.get_mut(&1).unwrap().mtu = 1_400;
    let sized = |packet: Packet, len: usize| {
        let headers = packet.ip().len() - packet.payload.len();
        Packet { payload: vec![1; len - headers], ..packet }
    };
    let nat = after(&tables, 40_000, &[]);
    let asked = request(false, TCP, 40_000, ACK);
    assert_eq!(run(&tables, &sized(asked.clone(), 1_400).bytes(), 1).0, Verdict::Redirect(INSIDE));
    let (verdict, outcome, frame) = run(&tables, &sized(asked.clone(), 1_401).bytes(), 1);
    assert_eq!((verdict, outcome), (Verdict::Transmit, Outcome::Not(Reason::TooBigAnswered)));
    assert_eq!(frame[40..42], 1_400u16.to_be_bytes());
    assert_eq!(frame[26..34], [&VIP4[12..], &CLIENT4[12..]].concat());

    // The other way: the worker is told by the address that it spoke to.
    let long = sized(answer(&nat, TCP, ACK), 1_401).bytes();
    let mut narrow = VecFrame::new(&long).from_interface(INSIDE).with_mtu(1_400);
    let (verdict, outcome) = native::run(&mut narrow, &tables, &IngressSettings::DEFAULT);
    assert_eq!((verdict, outcome), (Verdict::Transmit, Outcome::Not(Reason::TooBigAnswered)));
    assert_eq!(narrow.bytes()[26..34], [&nat.source[12..], &nat.worker[12..]].concat());
    assert_eq!(narrow.bytes()[40..42], 1_400u16.to_be_bytes());

    let spent = Packet { ttl: 1, ..asked.clone() };
    assert_eq!(run(&tables, &spent.bytes(), 1).1, Outcome::Not(Reason::NatTtl));
    // An IPv6 service's packets cannot become IPv4's.
    let other = request(true, TCP, 40_000, SYN);
    assert_eq!(run(&tables, &other.bytes(), 1).1, Outcome::Not(Reason::BadFamily));
    assert_eq!(tables.nats().len(), 1);
}

/// Every backend is down: the packet goes somewhere all the same, and once.
#[test]
fn stages_do_not_jump_in_a_circle() {
    for protocol in [TCP, UDP] {
        let mut tables = tables(false);
        for backend in tables.backends.values_mut() {
            backend.flags |= backend_flags::DOWN;
        }
        for view in tables.services.values_mut() {
            view.flags |= service::flags::RESET_ON_DOWN;
        }
        for flags in [SYN, ACK, ACK] {
            send(&tables, &request(false, protocol, 40_000, flags));
        }
    }
}

/// An ICMP error from `sender` about `quoted`, whole.
pub fn error(sender: Address, quoted: &Packet, quote: usize, kind: u8, code: u8, mtu: u16) -> Vec<u8> {
    let is_v4 = is_mapped(&sender);
    let ip = quoted.ip();
    let mut icmp = [kind, code, 0, 0, 0, 0].to_vec();
    icmp.extend(mtu.to_be_bytes());
    icmp.extend(&ip[..quote.min(ip.len())]);
    let to = quoted.source.0;
    let sum = if is_v4 {
        checksum(&icmp)
    } else {
        let pseudo =
            [&sender[..], &to[..], &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58], &icmp].concat();
        checksum(&pseudo)
    };
    icmp[2..4].copy_from_slice(&(!sum).to_be_bytes());
    let carrier =
        Packet { payload: icmp, ttl: 60, ..Packet::new(if is_v4 { 1 } else { 58 }, (sender, 0), (to, 0)) };
    carrier.around(if is_v4 { 1 } else { 58 })
}

#[test]
fn errors_are_translated_both_ways() {
    for is_ipv6 in [false, true] {
        for protocol in [TCP, UDP] {
            // Whole headers, and the least that is quoted (RFC 792), which holds no TCP checksum.
            for quote in [600, if is_ipv6 { 48 } else { 28 }] {
                let tables = tables(is_ipv6);
                let asked = request(is_ipv6, protocol, 40_000, SYN);
                let (_, _, sent) = run(&tables, &asked.bytes(), 1);
                let (nat, _) = binding(&tables, &asked);
                assert_eq!(sent.len(), asked.bytes().len());
                let seen = translated(&asked, &nat);
                let router = if is_ipv6 { worker(77, true) } else { mapped([10, 8, 8, 8]) };
                let (kind, code) = if is_ipv6 { (2, 0) } else { (3, 4) };

                let (verdict, outcome, frame) =
                    run(&tables, &error(router, &seen, quote, kind, code, 1_300), INSIDE);
                assert_eq!(verdict, Verdict::Redirect(1), "{outcome:?}");
                // TTL of the carrier goes down by one, and that of the quoted packet is as the router saw it.
                let quoted = Packet { ttl: seen.ttl, vlan: Vlan::None, ..asked.clone() };
                let mut expected = error(asked.destination.0, &quoted, quote, kind, code, 1_300);
                spend(&mut expected);
                assert_eq!(frame[14..], expected[14..], "to the client, {quote} bytes quoted");

                // From the client's side, about the answer.
                let answer = answer(&nat, protocol, SYN_ACK);
                run(&tables, &answer.bytes(), INSIDE);
                let seen = returned(&answer, &asked);
                let router = if is_ipv6 { CLIENT6 } else { mapped([198, 51, 100, 1]) };
                let (verdict, outcome, frame) =
                    run(&tables, &error(router, &seen, quote, kind, code, 1_250), 1);
                assert_eq!(verdict, Verdict::Redirect(INSIDE), "{outcome:?}");
                let quoted = Packet { ttl: seen.ttl, ..answer.clone() };
                let mut expected = error(nat.worker, &quoted, quote, kind, code, 1_250);
                // Its source is the address that the worker spoke to.
                expected = error_from(nat.source, expected, is_ipv6, &answer.source.0);
                spend(&mut expected);
                assert_eq!(frame[14..], expected[14..], "to the worker, {quote} bytes quoted");
                assert_eq!(tables.counted(Reason::NatError), 2);
            }
        }
    }
}

/// Takes one from the TTL of an untagged frame.
fn spend(frame: &mut [u8]) {
    if frame[12] == 0x08 {
        frame[22] -= 1;
        frame[24..26].fill(0);
        let check = !checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
    } else {
        frame[21] -= 1;
    }
}

/// The same error with another source.
fn error_from(source: Address, mut frame: Vec<u8>, is_ipv6: bool, to: &Address) -> Vec<u8> {
    if is_ipv6 {
        frame[22..38].copy_from_slice(&source);
        frame[56..58].fill(0);
        let icmp = frame[54..].to_vec();
        let pseudo =
            [&source[..], &to[..], &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58], &icmp].concat();
        frame[56..58].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
    } else {
        frame[26..30].copy_from_slice(&source[12..]);
        frame[24..26].fill(0);
        let check = !checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
    }
    frame
}

#[test]
fn errors_that_are_made_up_change_nothing() {
    let tables = tables(false);
    let nat = after(&tables, 40_000, &[]);
    let asked = request(false, TCP, 40_000, ACK);
    let seen = translated(&asked, &nat);
    let router = mapped([10, 8, 8, 8]);
    let good = error(router, &seen, 600, 3, 4, 1_300);
    let mut bad: Vec<Vec<u8>> = Vec::new();
    // To another than the quoted packet's sender; about another port; a fragment's tail; no error at all; cut short.
    let mut frame = good.clone();
    frame[33] ^= 1;
    bad.push(frame);
    let mut stranger = seen.clone();
    stranger.destination.1 = 9;
    bad.push(error(router, &stranger, 600, 3, 4, 1_300));
    let mut frame = good.clone();
    frame[14 + 28 + 7] = 1;
    bad.push(frame);
    bad.push(error(router, &seen, 600, 0, 0, 0));
    bad.push(error(router, &seen, 600, 5, 1, 0));
    bad.push(error(router, &seen, 22, 3, 4, 1_300));
    for frame in bad {
        let (verdict, outcome, after) = run(&tables, &frame, INSIDE);
        assert_eq!(verdict, Verdict::Pass, "{outcome:?}");
        assert_eq!(after, frame, "{outcome:?}");
    }
    assert_eq!(tables.counted(Reason::NatError), 0);
    assert_eq!(run(&tables, &good, INSIDE).0, Verdict::Redirect(1));
}
