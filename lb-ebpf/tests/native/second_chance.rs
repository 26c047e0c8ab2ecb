//! Second chance: what an ingress host says about others, and what workers make of it.
//!
//! Backends: 1 is the slot's primary, 2 its second choice, 5 its previous primary.

use crate::{
    bodies::{sum, v4, v6},
    build::Packet,
    world::{CLIENT4, CLIENT6, TCP_SERVICE, UDP_SERVICE, VIP4, VIP6, backend, tables},
};
use lb_common::{
    Backend, Be16, Reason, Slot,
    backend::{
        flags::{DOWN, RESOLVED, USED},
        mode,
    },
    service::{
        TCP, UDP,
        flags::{SECOND_CHANCE, SECONDS, TRACK_ALL},
        scheduler,
    },
    settings::{DecapSettings, IngressSettings, features},
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    Verdict, ingress,
    native::{HashTables, VecFrame},
    packet::fib::{FibAnswer, Hop},
    second_chance::worker::SocketQuery,
    select::{
        hash::flow_hash,
        others::{others, split},
    },
    worker::decap,
};
use proptest::prelude::*;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Address of a worker.
fn worker(i: u8, is_ipv6: bool) -> [u8; 16] {
    if is_ipv6 { v6(1, i) } else { v4(10, 1, 0, i) }
}

fn chained(i: u32, is_ipv6: bool, vlan: u16) -> Backend {
    let source = if is_ipv6 { v6(0, 0) } else { v4(10, 9, 0, 0) };
    let address = worker(i as u8, is_ipv6);
    Backend { mode: mode::GUE_CHAIN, address, source, source_bits: 0, vlan: Be16::new(vlan), ..backend(i) }
}

/// An ingress host whose slots all hold this pair.
fn host(slot: Slot, is_ipv6: bool, vlan: u16) -> HashTables {
    let mut tables = tables(slot, Slot { primary: slot.primary + 10, secondary: slot.secondary + 10 });
    tables.slots.truncate(251);
    tables.slots.extend(vec![Slot { primary: 2, secondary: NO_BACKEND }; 251]);
    tables.slots.extend(vec![Slot { primary: 11, secondary: 12 }; 502]);
    for (service, base) in [(TCP_SERVICE, 0), (UDP_SERVICE, 502)] {
        let view = tables.services.get_mut(&service).unwrap();
        view.slot_base = base;
        view.scheduler = scheduler::P2C;
        view.flags = TRACK_ALL | SECONDS | SECOND_CHANCE;
    }
    for i in 1..10 {
        tables.backends.insert(i, chained(i, is_ipv6, vlan));
        let udp = Backend { service: UDP_SERVICE, ..chained(i, is_ipv6, vlan) };
        tables.backends.insert(10 + i, udp);
    }
    tables
}

const STABLE: Slot = Slot { primary: 1, secondary: 2 };
const MOVING: Slot = Slot { primary: 1 | TRACKED, secondary: 5 | TRANSITION };

fn tcp(flags: u8, port: u16, is_ipv6: bool) -> Packet {
    let (client, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
    Packet { flags, ..Packet::new(TCP, (client, port), (vip, 80)) }
}

/// The encapsulated packet.
fn send(tables: &HashTables, packet: &Packet) -> Vec<u8> {
    let mut frame = VecFrame::new(&packet.bytes());
    let (verdict, outcome) = ingress::process(&mut frame, tables, &IngressSettings::DEFAULT);
    assert_eq!(verdict, Verdict::Transmit, "{outcome:?}");
    frame.bytes()
}

/// What worker `i` makes of a frame.
fn receive(i: u8, bytes: &[u8], has: bool) -> (Verdict, Reason, Vec<(Reason, u64)>, Vec<u8>) {
    let mut tables = HashTables::default();
    tables.decap_addresses.extend([worker(i, false), worker(i, true)]);
    tables.decap_vips.extend([VIP4, VIP6]);
    let mut frame = VecFrame::new(bytes).with_sockets(if has { |_| true } else { |_| false });
    let (verdict, reason) = decap::process(&mut frame, &tables, &DecapSettings::DEFAULT);
    (verdict, reason, tables.counts(), frame.bytes())
}

/// The way of a packet from worker to worker until one delivers it: who, and under which counter.
fn way(mut bytes: Vec<u8>, has: impl Fn(u8) -> bool) -> (Vec<u8>, Reason, Vec<u8>) {
    let mut visited = Vec::new();
    loop {
        let l3 = if bytes[12..14] == [0x81, 0] { 18 } else { 14 };
        let i = if bytes[l3] >> 4 == 6 { bytes[l3 + 39] } else { bytes[l3 + 19] };
        visited.push(i);
        assert!(visited.len() <= 3, "{visited:?}");
        let (verdict, reason, counts, after) = receive(i, &bytes, has(i));
        match (verdict, reason) {
            (Verdict::Transmit, Reason::ChanceSentOn) => bytes = after,
            (Verdict::Pass, Reason::DecapGue) => {
                let which = counts.iter().find(|(r, _)| *r != Reason::DecapGue).map_or(reason, |(r, _)| *r);
                return (visited, which, after);
            }
            other => panic!("{other:?} at {visited:?}"),
        }
    }
}

#[test]
fn a_flow_is_found_at_the_half_that_has_it() {
    for (is_ipv6, inner6, vlan) in
        [(false, false, 0), (true, false, 0), (true, true, 0), (false, false, 300), (true, true, 300)]
    {
        let tables = host(STABLE, is_ipv6, vlan);
        let packet = tcp(ACK, 7, inner6);
        for (has, expect) in [
            (1u8, (vec![1], Reason::ChanceFirst)),
            (2, (vec![1, 2], Reason::ChanceSecond)),
            (9, (vec![1, 2], Reason::ChanceNone)),
        ] {
            let (visited, reason, delivered) = way(send(&tables, &packet), |i| i == has);
            assert_eq!((visited, reason), expect);
            let l2_len = if vlan == 0 { 14 } else { 18 };
            let mut older = packet.clone();
            older.ttl -= 1;
            assert_eq!(delivered[l2_len..], older.ip(), "one hop older, whoever it visited");
        }
        let (visited, reason, _) = way(send(&tables, &tcp(SYN, 8, inner6)), |_| false);
        assert_eq!((visited, reason), (vec![1], Reason::ChanceFirst), "a SYN stays where it was placed");
    }
}

#[test]
fn in_transition_there_are_three() {
    let tables = host(MOVING, false, 0);
    // Unknown here: the rule says the previous primary; the pair of now comes after.
    for (has, visited, reason) in [
        (5, vec![5], Reason::ChanceFirst),
        (1, vec![5, 1], Reason::ChanceSecond),
        (2, vec![5, 1, 2], Reason::ChanceThird),
        (9, vec![5, 1, 2], Reason::ChanceNone),
    ] {
        tables.forget_flows();
        let way = way(send(&tables, &tcp(ACK, 7, false)), |i| i == has);
        assert_eq!((way.0, way.1), (visited, reason));
    }
}

#[test]
fn who_can_not_have_it_is_not_asked() {
    let ask = |change: &dyn Fn(&mut HashTables), chosen| {
        let mut tables = host(STABLE, false, 0);
        change(&mut tables);
        let view = tables.services[&TCP_SERVICE];
        let headers = crate::world::headers(&tcp(ACK, 7, false));
        split(others(&tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers), chosen))
    };
    const NO: u32 = NO_BACKEND;
    assert_eq!(ask(&|_| {}, 1), [2, NO]);
    assert_eq!(ask(&|_| {}, 2), [1, NO]);
    assert_eq!(ask(&|_| {}, 7), [1, 2], "a tracked one that is neither");
    let set = |tables: &mut HashTables, i, entry| {
        tables.backends.insert(i, entry);
    };
    assert_eq!(ask(&|t| set(t, 2, Backend { flags: USED | DOWN, ..chained(2, false, 0) }), 1), [NO, NO]);
    assert_eq!(ask(&|t| set(t, 2, Backend { flags: 0, ..chained(2, false, 0) }), 1), [NO, NO]);
    assert_eq!(ask(&|t| set(t, 2, Backend { service: 9, ..chained(2, false, 0) }), 1), [NO, NO]);
    assert_eq!(ask(&|t| set(t, 2, chained(2, true, 0)), 1), [NO, NO], "another family has no room");
    let forbidden = Backend { mode: mode::FORBIDDEN, ..chained(2, false, 0) };
    assert_eq!(ask(&|t| set(t, 2, forbidden), 1), [NO, NO], "residency forbids it");
    assert_eq!(ask(&|t| t.slots.truncate(0), 1), [NO, NO]);
}

#[test]
fn without_the_feature_or_others_nobody_is_named() {
    let tables = host(Slot { secondary: NO_BACKEND, ..STABLE }, false, 0);
    let (visited, reason, _) = way(send(&tables, &tcp(ACK, 7, false)), |_| false);
    assert_eq!((visited, reason), (vec![1], Reason::DecapGue));
    let off =
        IngressSettings { features: features::ALL & !features::SECOND_CHANCE, ..IngressSettings::DEFAULT };
    let mut frame = VecFrame::new(&tcp(ACK, 7, false).bytes());
    ingress::process(&mut frame, &host(STABLE, false, 0), &off);
    assert_eq!(frame.bytes()[14 + 20 + 8..][..16], [3, 4, 0, 0, 0x6c, 0x62, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_bytes_are_as_written_down() {
    let bytes = send(&host(STABLE, false, 0), &tcp(ACK, 7, false));
    assert_eq!(bytes[14 + 20 + 8..][..16], [3, 4, 0, 0, 0x6c, 0x62, 0x11, 0, 10, 1, 0, 2, 0, 0, 0, 0]);
    let inner = tcp(ACK, 7, false).ip().len();
    assert_eq!(usize::from(u16::from_be_bytes([bytes[16], bytes[17]])), 20 + 8 + 16 + inner);
    assert_eq!(usize::from(u16::from_be_bytes([bytes[38], bytes[39]])), 8 + 16 + inner);
    assert_eq!(sum(&bytes[14..34]), 0xffff);
    let bytes = send(&host(STABLE, true, 0), &tcp(ACK, 7, false));
    assert_eq!(bytes[14 + 40 + 8..][..8], [9, 4, 0, 0, 0x6c, 0x62, 0x11, 0]);
    assert_eq!(bytes[14 + 40 + 16..][..16], worker(2, true));
    assert_eq!(bytes[14 + 40 + 32..][..16], [0; 16]);
}

/// A chain made by hand in place of the real one.
fn forged(left: u8, hops: u8, version: u8, next: [u8; 4], then: [u8; 4]) -> Vec<u8> {
    let mut bytes = send(&host(STABLE, false, 0), &tcp(ACK, 7, false));
    let chain = &mut bytes[14 + 20 + 12..][..12];
    (chain[2], chain[3]) = (version << 4 | left, hops);
    chain[4..8].copy_from_slice(&next);
    chain[8..].copy_from_slice(&then);
    bytes
}

#[test]
fn what_is_forged_is_named_and_goes_nowhere() {
    let (a, b, zero) = ([10, 1, 0, 2], [10, 1, 0, 3], [0; 4]);
    for (bytes, expect) in [
        (forged(1, 2, 1, a, zero), Reason::ChanceLoop),
        (forged(2, 1, 1, a, b), Reason::ChanceLoop),
        (forged(1, 0, 1, [10, 1, 0, 1], zero), Reason::ChanceLoop),
        (forged(3, 0, 1, a, b), Reason::ChanceBad),
        (forged(15, 0, 1, a, b), Reason::ChanceBad),
        (forged(0, 200, 1, zero, zero), Reason::ChanceBad),
        (forged(1, 0, 2, a, zero), Reason::ChanceBad),
        (forged(1, 0, 0, a, zero), Reason::ChanceBad),
        (forged(1, 0, 1, zero, zero), Reason::ChanceBad),
        (forged(0, 0, 1, a, zero), Reason::ChanceBad),
        (forged(1, 0, 1, a, b), Reason::ChanceBad),
        (forged(2, 0, 1, a, zero), Reason::ChanceBad),
        (forged(1, 0, 1, [255, 255, 255, 255], zero), Reason::ChanceBad),
        (forged(1, 0, 1, [224, 0, 0, 1], zero), Reason::ChanceBad),
        (forged(1, 0, 1, [127, 0, 0, 1], zero), Reason::ChanceBad),
    ] {
        let (verdict, reason, counts, after) = receive(1, &bytes, false);
        assert_eq!((verdict, reason, counts), (Verdict::Drop, expect, vec![(expect, 1)]));
        assert_eq!(after, bytes, "unchanged");
    }
    // Not for a VIP of this worker: it is no relay for others' packets.
    let mut bytes = forged(1, 0, 1, a, zero);
    let vip = 14 + 20 + 24 + 16;
    bytes[vip] = 9;
    assert_eq!(receive(1, &bytes, false).1, Reason::DecapNotVip);
    // Nor for what nobody can have sent: it is not sent on either.
    for (source, expect) in [
        ([127, 0, 0, 1], Reason::MartianSource),
        ([0, 0, 0, 0], Reason::MartianSource),
        ([224, 0, 0, 1], Reason::MartianSource),
        ([255, 255, 255, 255], Reason::MartianSource),
    ] {
        let mut bytes = forged(1, 0, 1, a, zero);
        bytes[vip - 4..vip].copy_from_slice(&source);
        let (verdict, reason, counts, after) = receive(1, &bytes, false);
        assert_eq!((verdict, reason, counts), (Verdict::Drop, expect, vec![(expect, 1)]));
        assert_eq!(after, bytes, "unchanged");
    }
    let mut bytes = forged(1, 0, 1, a, zero);
    bytes.copy_within(vip..vip + 4, vip - 4);
    assert_eq!(receive(1, &bytes, false).1, Reason::OwnSource);
    // A length that fits no chain, and one cut short.
    let mut bytes = forged(1, 0, 1, a, zero);
    bytes[14 + 28] = 4;
    assert_eq!(receive(1, &bytes, false).1, Reason::DecapBadGue);
    let mut bytes = forged(1, 0, 1, a, zero);
    bytes[14 + 8] = 1;
    assert_eq!(receive(1, &bytes, false).1, Reason::DecapTtl);
}

#[test]
fn a_worker_with_a_way_of_its_own_takes_it() {
    for (ifindex, expect) in [(1, Verdict::Transmit), (7, Verdict::Redirect(7))] {
        let fib = if ifindex == 1 { |_: &_| answer(1) } else { |_: &_| answer(7) };
        let bytes = send(&host(STABLE, false, 0), &tcp(ACK, 7, false));
        let mut frame = VecFrame::new(&bytes).with_fib(fib);
        let mut tables = HashTables::default();
        tables.decap_addresses.insert(worker(1, false));
        tables.decap_vips.insert(VIP4);
        let (verdict, _) = decap::process(&mut frame, &tables, &DecapSettings::DEFAULT);
        assert_eq!(verdict, expect);
        assert_eq!(frame.bytes()[..12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let query = frame.queries()[0];
        assert_eq!(query.destination, lb_ebpf::packet::parse::words(worker(2, false)));
        assert_eq!(query.source, lb_ebpf::packet::parse::words(worker(1, false)));
    }
}

fn answer(ifindex: u32) -> Result<FibAnswer, (Reason, u32)> {
    let mac = |b: [u8; 6]| (u32::from_ne_bytes([b[0], b[1], b[2], b[3]]), u16::from_ne_bytes([b[4], b[5]]));
    let (next_hop, egress_mac) = (mac([1, 2, 3, 4, 5, 6]), mac([7, 8, 9, 10, 11, 12]));
    Ok(FibAnswer { hop: Hop { next_hop, egress_mac, ifindex, ..Hop::default() }, source: [0; 4] })
}

#[test]
fn the_socket_is_asked_for_the_clients_flow() {
    let bytes = send(&host(STABLE, false, 0), &tcp(ACK, 4_711, false));
    let mut tables = HashTables::default();
    tables.decap_addresses.insert(worker(1, false));
    tables.decap_vips.insert(VIP4);
    let is_it = |query: &SocketQuery| {
        query.source == lb_ebpf::packet::parse::words(CLIENT4)
            && query.destination == lb_ebpf::packet::parse::words(VIP4)
            && (query.source_port, query.port) == (4_711_u16.to_be(), 80_u16.to_be())
            && (query.protocol, query.is_ipv6) == (TCP, false)
    };
    let mut frame = VecFrame::new(&bytes).with_sockets(is_it);
    assert_eq!(decap::process(&mut frame, &tables, &DecapSettings::DEFAULT).1, Reason::DecapGue);
}

/// A new UDP flow visits the other half first, which keeps it if it has a connected socket; and so it does while the
/// chosen backend may not have made its own yet.
#[test]
fn a_datagram_visits_the_other_half_first_while_its_flow_is_young() {
    let mut tables = host(STABLE, false, 0);
    tables.services.get_mut(&UDP_SERVICE).unwrap().flags |= SECOND_CHANCE;
    let packet = Packet::new(UDP, (CLIENT4, 9), (VIP4, 53));
    let go = |has: u8| {
        let (visited, reason, _) = way(send(&tables, &packet), |i| i == has);
        (visited, reason)
    };
    assert_eq!(go(9), (vec![2, 1], Reason::ChanceNone), "new: the chosen one takes it");
    assert_eq!(go(9), (vec![2, 1], Reason::ChanceNone), "young");
    assert_eq!(go(2), (vec![2], Reason::ChanceFirst), "another host's flow");
    tables.advance_s(10);
    assert_eq!(go(1), (vec![1], Reason::ChanceFirst), "settled");
    assert_eq!(go(2), (vec![1, 2], Reason::ChanceSecond));
}

proptest! {
    #![proptest_config(crate::world::cases(1_000))]

    /// Whatever a chain says and whoever has sockets: at most three workers, and an end.
    #[test]
    fn no_chain_goes_round(head: [u8; 4], next in 1u8..6, then in 1u8..6, keep_head: bool, has in 0u8..9) {
        let mut bytes = send(&host(STABLE, false, 0), &tcp(ACK, 7, false));
        let chain = &mut bytes[14 + 20 + 12..][..12];
        if !keep_head {
            (chain[2], chain[3]) = (0x10 | (head[2] % 4), head[3] % 4);
        }
        chain[4..8].copy_from_slice(&[10, 1, 0, next]);
        let second = if chain[2] & 15 > 1 { [10, 1, 0, then] } else { [0; 4] };
        chain[8..].copy_from_slice(&second);
        let mut hops = 0;
        loop {
            let at = bytes[14 + 19];
            let (verdict, _, _, after) = receive(at, &bytes, at == has);
            if verdict != Verdict::Transmit {
                break;
            }
            bytes = after;
            hops += 1;
            prop_assert!(hops <= 2);
        }
    }
}

#[test]
fn the_flags_of_the_world_are_those_of_a_live_backend() {
    assert_eq!(chained(1, false, 0).flags, USED | RESOLVED);
}
