//! Services without a backend whose clients are answered: every answer is read with etherparse.

use crate::{
    bodies::sum,
    build::{ACKNOWLEDGED, Packet, SEQUENCE, Vlan},
    world::{self, CLIENT4, CLIENT6, TCP_SERVICE, UDP_SERVICE, VIP4, VIP6},
};
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice, icmpv4, icmpv6};
use lb_common::{
    Reason, Slot, mapped,
    service::{TCP, UDP, flags::REJECT},
    settings::IngressSettings,
};
use lb_ebpf::{
    Verdict,
    native::{HashTables, VecFrame, run},
    packet::verdict::Outcome,
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 0x10;

fn tables() -> HashTables {
    let mut tables = world::tables(Slot::EMPTY, Slot::EMPTY);
    for service in [TCP_SERVICE, UDP_SERVICE] {
        tables.services.get_mut(&service).expect("a service of the world").flags |= REJECT;
    }
    tables
}

fn packet(protocol: u8, is_ipv6: bool, vlan: Vlan) -> Packet {
    let (client, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
    let port = if protocol == TCP { 80 } else { 53 };
    Packet { vlan, ..Packet::new(protocol, (client, 40_000), (vip, port)) }
}

fn send(tables: &HashTables, settings: IngressSettings, bytes: &[u8]) -> (Verdict, Outcome, Vec<u8>) {
    let mut frame = VecFrame::new(bytes);
    let (verdict, outcome) = run(&mut frame, tables, &settings);
    (verdict, outcome, frame.bytes())
}

fn answered(tables: &HashTables, packet: &Packet) -> Vec<u8> {
    let (verdict, outcome, frame) = send(tables, IngressSettings::DEFAULT, &packet.bytes());
    assert_eq!((verdict, outcome), (Verdict::Transmit, Outcome::Not(Reason::NoBackendAnswered)));
    frame
}

fn dropped(tables: &HashTables, bytes: &[u8]) {
    let (verdict, outcome, frame) = send(tables, IngressSettings::DEFAULT, bytes);
    assert_eq!((verdict, outcome), (Verdict::Drop, Outcome::Not(Reason::NoBackend)));
    assert_eq!(frame, bytes, "what is dropped is left as it was");
}

/// Checks Ethernet and IP header of the answer; its length without them.
fn check_network(packet: &Packet, frame: &[u8]) -> usize {
    let l2_len = packet.vlan.l2_len();
    let asked = packet.bytes();
    assert_eq!(frame[..6], asked[6..12], "to the hop that sent it");
    assert_eq!(frame[6..12], asked[..6]);
    assert_eq!(frame[12..l2_len], asked[12..l2_len], "with the same tags");
    match SlicedPacket::from_ethernet(frame).unwrap().net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            assert_eq!(sum(ip.slice()), 0xffff, "header checksum");
            assert_eq!(mapped(ip.source()), packet.destination.0);
            assert_eq!(mapped(ip.destination()), packet.source.0);
            assert_eq!((ip.ttl(), usize::from(ip.total_len())), (64, frame.len() - l2_len));
            frame.len() - l2_len - 20
        }
        NetSlice::Ipv6(ip) => {
            let ip = ip.header();
            assert_eq!((ip.source(), ip.destination()), (packet.destination.0, packet.source.0));
            assert_eq!((ip.hop_limit(), usize::from(ip.payload_length())), (64, frame.len() - l2_len - 40));
            frame.len() - l2_len - 40
        }
        other => panic!("{other:?}"),
    }
}

/// RFC 9293 3.10.7.1: a segment with ACK is answered with its acknowledgement number as sequence number, one without
/// with sequence number 0 and an acknowledgement of all that it holds.
#[test]
fn tcp_is_answered_with_a_reset() {
    let cases: [(u8, &[u8], u32, Option<u32>); 6] = [
        (SYN, b"", 0, Some(SEQUENCE + 1)),
        (SYN, b"fast open", 0, Some(SEQUENCE + 10)),
        (FIN, b"abc", 0, Some(SEQUENCE + 4)),
        (ACK, b"hello", ACKNOWLEDGED, None),
        (ACK | FIN, b"", ACKNOWLEDGED, None),
        (ACK | SYN, b"", ACKNOWLEDGED, None),
    ];
    let tables = tables();
    for is_ipv6 in [false, true] {
        for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
            for (flags, payload, sequence, acknowledged) in cases {
                let packet = Packet { flags, payload: payload.to_vec(), ..packet(TCP, is_ipv6, vlan) };
                let frame = answered(&tables, &packet);
                assert_eq!(check_network(&packet, &frame), 20, "{flags:#x}: a header and nothing else");
                let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
                assert_eq!((tcp.source_port(), tcp.destination_port()), (80, 40_000));
                assert!(tcp.rst() && !tcp.syn() && !tcp.fin() && !tcp.psh(), "{flags:#x}");
                assert_eq!((tcp.sequence_number(), tcp.window_size()), (sequence, 0), "{flags:#x}");
                assert_eq!(tcp.ack(), acknowledged.is_some(), "{flags:#x}");
                assert_eq!(tcp.acknowledgment_number(), acknowledged.unwrap_or(0), "{flags:#x}");
                let check = match sliced.net.unwrap() {
                    NetSlice::Ipv4(ip) => {
                        tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())
                    }
                    NetSlice::Ipv6(ip) => {
                        tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination())
                    }
                    other => panic!("{other:?}"),
                };
                assert_eq!(Ok(tcp.checksum()), check, "{flags:#x}");
            }
        }
    }
}

#[test]
fn options_and_extension_headers_do_not_hinder_a_reset() {
    let options = Packet { flags: SYN, options: vec![1, 1, 1, 0], ..packet(TCP, false, Vlan::None) };
    check_network(&options, &answered(&tables(), &options));
    let hop_by_hop = (0, vec![0, 1, 4, 0, 0, 0, 0]);
    let extended = Packet { flags: SYN, extensions: vec![hop_by_hop], ..packet(TCP, true, Vlan::One) };
    check_network(&extended, &answered(&tables(), &extended));
}

#[test]
fn udp_is_answered_with_port_unreachable() {
    let tables = tables();
    for is_ipv6 in [false, true] {
        for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
            for payload in [&b""[..], b"a question"] {
                let packet = Packet { payload: payload.to_vec(), ..packet(UDP, is_ipv6, vlan) };
                let frame = answered(&tables, &packet);
                check_network(&packet, &frame);
                let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
                let quoted = match (sliced.net.unwrap(), sliced.transport.unwrap()) {
                    (NetSlice::Ipv4(_), TransportSlice::Icmpv4(icmp)) => {
                        assert_eq!(sum(icmp.slice()), 0xffff);
                        let port = icmpv4::DestUnreachableHeader::Port;
                        assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(port));
                        icmp.payload().to_vec()
                    }
                    (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                        assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
                        let port = icmpv6::DestUnreachableCode::Port;
                        assert_eq!(icmp.icmp_type(), Icmpv6Type::DestinationUnreachable(port));
                        icmp.payload().to_vec()
                    }
                    other => panic!("{other:?}"),
                };
                let headers = packet.ip().len() - payload.len();
                assert_eq!(quoted, packet.ip()[..headers], "IP and UDP header");
            }
        }
    }
}

#[test]
fn what_must_not_be_answered_is_dropped() {
    let tables = tables();
    for is_ipv6 in [false, true] {
        for flags in [RST, RST | ACK] {
            dropped(&tables, &Packet { flags, ..packet(TCP, is_ipv6, Vlan::None) }.bytes());
        }
        let quiet = IngressSettings { icmp_per_s: 0, ..IngressSettings::DEFAULT };
        let (verdict, outcome, _) = send(&tables, quiet, &packet(UDP, is_ipv6, Vlan::None).bytes());
        assert_eq!((verdict, outcome), (Verdict::Drop, Outcome::Not(Reason::NoBackend)), "no ICMP at all");
        let (verdict, ..) = send(&tables, quiet, &packet(TCP, is_ipv6, Vlan::None).bytes());
        assert_eq!(verdict, Verdict::Transmit, "a reset is not ICMP");
    }
    // The first part of a packet.
    let mut part = Packet { payload: vec![7; 12], ..packet(TCP, false, Vlan::None) }.bytes();
    part[20] |= 0x20;
    let check = !sum(&[&part[14..24], &[0, 0], &part[26..34]].concat());
    part[24..26].copy_from_slice(&check.to_be_bytes());
    dropped(&tables, &part);
    // Options leave no room for the ports in a quote of 28 bytes.
    dropped(&tables, &Packet { options: vec![1, 1, 1, 0], ..packet(UDP, false, Vlan::None) }.bytes());
}

#[test]
fn without_the_flag_nothing_is_answered() {
    let tables = world::tables(Slot::EMPTY, Slot::EMPTY);
    dropped(&tables, &packet(TCP, false, Vlan::None).bytes());
    dropped(&tables, &packet(UDP, true, Vlan::None).bytes());
}
