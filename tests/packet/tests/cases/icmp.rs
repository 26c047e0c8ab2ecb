//! ICMP and ICMPv6 to a VIP: echo requests are answered, errors about its flows go to their backends.

use crate::case::{
    ACK, Case, Family,
    Family::{V4, V6},
    Loaded::{FewAnswers, Off, Plain},
    backend, cases, tcp, with,
};
use lb_common::{
    Address, Reason,
    backend::mode::{GUE, IPIP},
    mapped,
    names::{self, stage},
    settings::IngressSettings,
};
use test_packet::{HOST_MAC, Ingress, PEER_MAC, Packet, Pair, Vlan, bed, checksum, checksum_is_right, xdp};

/// A VIP's neighbour that is no VIP.
const OTHER4: Address = mapped([192, 0, 2, 99]);

/// Protocol, type of a request, type of a reply.
fn numbers(family: Family) -> (u8, u8, u8) {
    if family == V4 { (1, 8, 0) } else { (58, 128, 129) }
}

/// Checksum of an ICMP message between these addresses.
fn icmp_checksum(packet: &Packet, protocol: u8, message: &[u8]) -> [u8; 2] {
    let mut summed = message.to_vec();
    if protocol == 58 {
        summed.extend(packet.source.0);
        summed.extend(packet.destination.0);
        summed.extend((message.len() as u32).to_be_bytes());
        summed.extend(u32::from(protocol).to_be_bytes());
    }
    (!checksum(&summed)).to_be_bytes()
}

/// A message of the client to the VIP, its checksum filled in.
fn message(family: Family, kind: u8, code: u8, rest: &[u8]) -> Packet {
    let packet = tcp(family, ACK);
    let mut bytes = [&[kind, code, 0, 0], rest].concat();
    let check = icmp_checksum(&packet, numbers(family).0, &bytes);
    bytes[2..4].copy_from_slice(&check);
    Packet { payload: bytes, ..packet }
}

pub fn frame(packet: &Packet, family: Family) -> Vec<u8> {
    packet.around(numbers(family).0)
}

pub fn request(family: Family) -> Packet {
    let rest = [&[0x12, 0x34, 0, 1][..], b"sixteen bytes of ", b"data, and more: odd"].concat();
    message(family, numbers(family).1, 0, &rest)
}

/// What must come back: addresses and MACs swapped, TTL 64, a right checksum, the same data.
fn reply(request: &Packet, family: Family) -> Vec<u8> {
    let (protocol, _, kind) = numbers(family);
    let mut back =
        Packet { source: request.destination, destination: request.source, ttl: 64, ..request.clone() };
    back.payload[0] = kind;
    back.payload[2..4].fill(0);
    let check = icmp_checksum(&back, protocol, &back.payload);
    back.payload[2..4].copy_from_slice(&check);
    let mut bytes = back.around(protocol);
    bytes[..6].copy_from_slice(&PEER_MAC);
    bytes[6..12].copy_from_slice(&HOST_MAC);
    bytes
}

fn sent(packet: Packet, family: Family) -> Case {
    let bytes = frame(&packet, family);
    Case::new(packet, backend(1, IPIP, V4)).sends(bytes)
}

fn answered(packet: Packet, family: Family) -> Case {
    let back = reply(&packet, family);
    sent(packet, family).becomes(xdp::TX, back).counts(Reason::EchoAnswered)
}

fn other(family: Family, kind: u8, code: u8) -> Case {
    sent(message(family, kind, code, &[0; 12]), family)
}

/// A router on the way to the client.
pub fn router(family: Family) -> Address {
    if family == V4 { mapped([203, 0, 113, 9]) } else { crate::case::v6(0xee, 9) }
}

/// The packet that a worker sent in answer to this one.
pub fn reply_of(packet: &Packet) -> Packet {
    Packet { source: packet.destination, destination: packet.source, payload: vec![7; 600], ..packet.clone() }
}

/// An error of a router about an IP packet, of which it quotes so many bytes: as a frame.
fn error(family: Family, kind: u8, code: u8, about: &[u8], len: usize) -> Vec<u8> {
    error_from(router(family), family, [kind, code], about, len)
}

/// The same from this address.
pub fn error_from(source: Address, family: Family, kind: [u8; 2], about: &[u8], len: usize) -> Vec<u8> {
    let rest = [&[0, 0, 5, 0x78], &about[..len.min(about.len())]].concat();
    let to = tcp(family, ACK);
    let mut packet = Packet { source: (source, 0), ..to };
    packet.payload = [&kind[..], &[0, 0], &rest[..]].concat();
    let check = icmp_checksum(&packet, numbers(family).0, &packet.payload);
    packet.payload[2..4].copy_from_slice(&check);
    frame(&packet, family)
}

/// An error about the flow of a client's packet.
fn about(packet: Packet, family: Family, kind: u8, code: u8, len: usize) -> Case {
    let bytes = error(family, kind, code, &reply_of(&packet).ip(), len);
    Case::new(packet, backend(1, IPIP, V4)).sends(bytes)
}

/// It goes to this backend, as it is.
fn delivered(case: Case, index: u32) -> Case {
    let inner = case.bytes.as_ref().expect("set by sends")[14..].to_vec();
    case.carried_to(index, inner).counts(Reason::IcmpErrorForwarded)
}

fn udp_flow(family: Family) -> Case {
    about(crate::case::udp(family), family, 3, if family == V4 { 3 } else { 0 }, 200)
}

fn quoting(family: Family, change: impl FnOnce(&mut Vec<u8>)) -> Case {
    let packet = tcp(family, ACK);
    let mut quote = reply_of(&packet).ip();
    change(&mut quote);
    let kind = if family == V4 { 3 } else { 2 };
    Case::new(packet, backend(1, IPIP, V4)).sends(error(family, kind, 4, &quote, 600))
}

cases! {
    too_big_v4: delivered(about(tcp(V4, ACK), V4, 3, 4, 28), 1);
    too_big_v6: delivered(about(tcp(V6, ACK), V6, 2, 0, 1_200), 1);
    too_big_quotes_much: delivered(about(tcp(V4, ACK), V4, 3, 4, 548), 1);
    unreachable_v4: delivered(about(tcp(V4, ACK), V4, 3, 1, 28), 1);
    unreachable_v6: delivered(about(tcp(V6, ACK), V6, 1, 0, 100), 1);
    time_exceeded_v4: delivered(about(tcp(V4, ACK), V4, 11, 0, 28), 1);
    time_exceeded_v6: delivered(about(tcp(V6, ACK), V6, 3, 0, 48), 1);
    parameter_problem_v6: delivered(about(tcp(V6, ACK), V6, 4, 0, 100), 1);
    of_a_udp_flow_v4: delivered(udp_flow(V4), 1);
    of_a_known_udp_flow: delivered(udp_flow(V4).backend(2, backend(2, IPIP, V4)).knows(names::UDP_FLOWS, 2, 30, 0), 2)
        .leaves(names::UDP_FLOWS, 2, 0, false);
    through_ipv6: delivered(Case { backends: vec![(1, backend(1, IPIP, V6))], ..about(tcp(V4, ACK), V4, 3, 4, 28) }, 1);
    through_gue: delivered(Case { backends: vec![(1, backend(1, GUE, V6))], ..about(tcp(V6, ACK), V6, 2, 0, 99) }, 1);
    of_a_tracked_flow: delivered(
        about(tcp(V4, ACK), V4, 3, 4, 60).pair(Pair::Tracked(1)).backend(2, backend(2, IPIP, V4)).knows(names::FLOWS, 2, 50, 0), 2)
        .leaves(names::FLOWS, 2, 0, false);
    in_a_transition_nothing_is_written: delivered(
        about(tcp(V4, ACK), V4, 3, 4, 60).pair(Pair::Transition(1, 2)).backend(2, backend(2, IPIP, V4)), 2);
    quote_of_another_source: quoting(V4, |q| q[15] ^= 1).drops(Reason::IcmpForeignQuote);
    quote_of_another_source_v6: quoting(V6, |q| q[23] ^= 1).drops(Reason::IcmpForeignQuote);
    quote_of_another_port: quoting(V4, |q| q[21] ^= 1).passes(Reason::NoService);
    quote_of_nothing_ip: quoting(V4, |q| q[0] = 0x65).drops(Reason::IcmpBadQuote);
    quote_of_a_later_part: quoting(V4, |q| q[6..8].copy_from_slice(&[0, 10])).drops(Reason::IcmpBadQuote);
    quote_of_another_protocol: quoting(V4, |q| q[9] = 132).passes(Reason::Icmp);
    quote_of_a_ping: quoting(V6, |q| q[6] = 58).passes(Reason::Icmp);
    quote_without_ports: about(tcp(V4, ACK), V4, 3, 4, 27).drops(Reason::IcmpBadQuote);
    quote_without_ports_v6: about(tcp(V6, ACK), V6, 2, 0, 47).drops(Reason::IcmpBadQuote);
    quote_of_nothing: about(tcp(V4, ACK), V4, 3, 4, 0).drops(Reason::IcmpBadQuote);
    source_quench: about(tcp(V4, ACK), V4, 4, 0, 28).passes(Reason::Icmp);
    redirect: about(tcp(V4, ACK), V4, 5, 1, 28).passes(Reason::Icmp);
    error_for_no_backend: Case { pairs: vec![], ..about(tcp(V4, ACK), V4, 3, 4, 28) }.drops(Reason::NoBackend);
    echo_v4: answered(request(V4), V4);
    echo_v6: answered(request(V6), V6);
    echo_v4_tagged: answered(Packet { vlan: Vlan::One, ..request(V4) }, V4);
    echo_v6_tagged_twice: answered(Packet { vlan: Vlan::Two, ..request(V6) }, V6);
    echo_without_data: answered(message(V4, 8, 0, &[0, 0, 0, 0]), V4);
    echo_v4_jumbo: answered(message(V4, 8, 0, &vec![7; 8_001]), V4);
    echo_v6_jumbo: answered(message(V6, 128, 0, &vec![7; 8_000]), V6);
    echo_keeps_dscp: answered(Packet { tos: 0xb9, ..request(V6) }, V6);
    echo_that_was_damaged_stays_so: {
        let mut case = answered(request(V4), V4);
        for bytes in [case.bytes.as_mut().expect("set by sends"), &mut case.frame] {
            *bytes.last_mut().expect("not empty") ^= 0x40;
        }
        case
    };
    echo_with_options_is_the_hosts: {
        let options = vec![0x94, 4, 0, 0];
        sent(Packet { options, ..request(V4) }, V4).passes(Reason::Icmp)
    };
    echo_with_extensions_is_the_hosts: {
        let extensions = vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
        sent(Packet { extensions, ..request(V6) }, V6).passes(Reason::Icmp)
    };
    echo_to_a_group_is_not_answered: {
        let mut packet = request(V4);
        packet.source.0 = mapped([255, 255, 255, 255]);
        sent(packet, V4).drops(Reason::MartianSource)
    };
    echo_of_an_unknown_code: other(V4, 8, 1).passes(Reason::Icmp);
    echo_cut_short: sent(Packet { payload: vec![8, 0, 0xf7, 0xff, 0, 0, 0], ..request(V4) }, V4).passes(Reason::Icmp);
    echo_with_the_feature_off: sent(request(V4), V4).on(Plain).passes(Reason::Icmp);
    error_with_the_feature_off: about(tcp(V6, ACK), V6, 2, 0, 1_200).on(Plain).passes(Reason::Icmp);
    echo_with_answers_off: sent(request(V4), V4).on(Off).passes(Reason::Icmp);
    reply_v4: other(V4, 0, 0).passes(Reason::Icmp);
    timestamp: other(V4, 13, 0).passes(Reason::Icmp);
    neighbour_solicitation: other(V6, 135, 0).passes(Reason::Icmp);
    icmpv6_in_ipv4: sent(request(V4), V4).sends(request(V4).around(58)).passes(Reason::OtherProtocol);
    icmp_in_ipv6: sent(request(V6), V6).sends(request(V6).around(1)).passes(Reason::OtherProtocol);
}

/// Not an answer for addresses that are no VIP: they are the host's.
#[test]
fn echo_to_another_address() {
    with(crate::case::Loaded::Default, |ingress| {
        Case::new(tcp(V4, ACK), backend(1, IPIP, V4)).fill(ingress);
        let packet = Packet { destination: (OTHER4, 0), ..request(V4) };
        let run = ingress.run(&frame(&packet, V4)).expect("runs");
        assert_eq!((run.verdict, ingress.counts()), (xdp::PASS, vec![(Reason::NotVip, 1)]));
    });
}

/// Two at once and one a second.
#[test]
fn echo_is_limited() {
    with(FewAnswers, |ingress| {
        let case = sent(request(V4), V4);
        case.fill(ingress);
        let bytes = frame(&request(V4), V4);
        let verdicts: Vec<u32> = (0..10).map(|_| ingress.run(&bytes).expect("runs").verdict).collect();
        let answered = verdicts.iter().filter(|v| **v == xdp::TX).count() as u64;
        // A budget per processor: a test that moves between two gets both.
        assert!((2..=5).contains(&answered), "{verdicts:?}");
        let counts = ingress.counts();
        assert_eq!(counts, [(Reason::EchoAnswered, answered), (Reason::EchoDropped, 10 - answered)]);
    });
}

/// The answer, read again.
#[test]
fn an_answer_reads_well() {
    let frame = reply(&request(V4), V4);
    assert!(checksum_is_right(&frame[14..34]) && checksum_is_right(&frame[34..]));
}

/// A place of `STAGES` without a program: the packet is the host's, and counted.
#[test]
fn stage_not_loaded() {
    bed::enter();
    let mut ingress = Ingress::load(IngressSettings::DEFAULT).expect("loads");
    ingress.clear_stage(stage::ICMP);
    let case = sent(request(V4), V4);
    case.fill(&mut ingress);
    let run = ingress.run(&frame(&request(V4), V4)).expect("runs");
    assert_eq!((run.verdict, ingress.counts()), (xdp::PASS, vec![(Reason::StageMissing, 1)]));
}
