//! Packets that do not fit once encapsulated: the sender learns the size that does.

use crate::{
    bodies::{sum, v6},
    build::{Packet, Vlan},
    world::{self, CLIENT4, CLIENT6, TCP_SERVICE, VIP4, VIP6},
};
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice, icmpv4, icmpv6};
use lb_common::{
    Backend, Reason, Slot,
    backend::{flags, mode},
    mapped,
    settings::IngressSettings,
};
use lb_ebpf::{
    Verdict,
    icmp::too_big::answer_too_big,
    ingress::process,
    native::{HashTables, VecFrame},
    packet::{
        fib::{FibAnswer, FibQuery, Hop},
        parse::parse,
        verdict::Outcome,
    },
};

fn tables(backend: Backend) -> HashTables {
    let mut tables = world::tables(Slot { primary: 1, secondary: 1 }, Slot::EMPTY);
    tables.backends.insert(1, backend);
    tables
}

fn backend(mode: u8, is_ipv6: bool, mtu: u16) -> Backend {
    let address = if is_ipv6 { v6(1, 1) } else { mapped([10, 1, 0, 1]) };
    let source = if is_ipv6 { v6(2, 2) } else { mapped([10, 9, 0, 1]) };
    Backend { mode, address, source, source_bits: 0, mtu, service: TCP_SERVICE, ..world::backend(1) }
}

/// A packet whose IP length is `len`.
fn packet(is_ipv6: bool, vlan: Vlan, len: usize) -> Packet {
    let (client, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
    let mut packet = Packet::new(6, (client, 40_000), (vip, 80));
    let headers = packet.ip().len() - packet.payload.len();
    packet.payload = (0..len - headers).map(|i| i as u8).collect();
    packet.vlan = vlan;
    packet
}

fn run(packet: &[u8], tables: &HashTables, settings: IngressSettings) -> (Verdict, Outcome, Vec<u8>) {
    let mut frame = VecFrame::new(packet);
    let (verdict, outcome) = process(&mut frame, tables, &settings);
    (verdict, outcome, frame.bytes())
}

/// Before 6.7, the kernel's routes give a next hop and no source.
#[test]
fn where_the_kernel_chooses_no_source_the_outer_one_is_the_vip() {
    fn fib(query: &FibQuery) -> Result<FibAnswer, (Reason, u32)> {
        let hop = Hop { next_hop: (1, 2), egress_mac: (3, 4), vlan: 0, ifindex: 9, mtu: 0 };
        Ok(FibAnswer { hop, source: query.source })
    }
    for (is_ipv6, mode) in [(false, mode::IPIP), (false, mode::GUE), (true, mode::IPIP), (true, mode::GUE)] {
        let mut backend = Backend { source: [0; 16], ..backend(mode, is_ipv6, 0) };
        if !is_ipv6 {
            backend.source = mapped([0; 4]);
        }
        backend.flags &= !flags::RESOLVED;
        let mut frame = VecFrame::new(&packet(is_ipv6, Vlan::None, 200).bytes()).with_fib(fib);
        let (verdict, _) = process(&mut frame, &tables(backend), &IngressSettings::DEFAULT);
        assert_eq!(verdict, Verdict::Redirect(9));
        let bytes = frame.bytes();
        if is_ipv6 {
            assert_eq!(bytes[14 + 8..14 + 24], VIP6);
        } else {
            assert_eq!(bytes[14 + 12..14 + 16], VIP4[12..]);
            assert_eq!(sum(&bytes[14..34]), 0xffff, "the header's checksum is of these addresses");
        }
    }
}

#[test]
fn the_answer_names_the_largest_packet_that_fits() {
    for is_ipv6 in [false, true] {
        for outer6 in [false, true] {
            for mode in [mode::IPIP, mode::GUE] {
                for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                    let overhead = if outer6 { 40 } else { 20 } + if mode == mode::GUE { 12 } else { 0 };
                    let tables = tables(backend(mode, outer6, 1_500));
                    let fits = 1_500 - overhead;
                    let (verdict, outcome, frame) =
                        run(&packet(is_ipv6, vlan, fits).bytes(), &tables, IngressSettings::DEFAULT);
                    assert_eq!(verdict, Verdict::Transmit);
                    assert_eq!(outcome, Outcome::Forwarded { service: TCP_SERVICE, backend: 1 });
                    assert_eq!(frame.len(), 14 + 1_500);
                    let packet = packet(is_ipv6, vlan, fits + 1);
                    let (verdict, outcome, frame) = run(&packet.bytes(), &tables, IngressSettings::DEFAULT);
                    assert_eq!((verdict, outcome), (Verdict::Transmit, Outcome::Not(Reason::TooBigAnswered)));
                    read(&packet, &frame, fits as u16);
                    assert_eq!(tables.packets(), 1, "only the one that fits went to the backend");
                }
            }
        }
    }
}

/// Reads the answer with etherparse.
fn read(packet: &Packet, frame: &[u8], mtu: u16) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let l2_len = packet.vlan.l2_len();
    assert_eq!(frame[..6], packet.bytes()[6..12]);
    assert_eq!(frame[6..12], packet.bytes()[..6]);
    assert_eq!(frame[12..l2_len], packet.bytes()[12..l2_len]);
    let quoted = match (sliced.net.unwrap(), sliced.transport.unwrap()) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            assert_eq!(sum(ip.header().slice()), 0xffff);
            assert_eq!(sum(icmp.slice()), 0xffff);
            assert_eq!(mapped(ip.header().source()), packet.destination.0);
            assert_eq!(mapped(ip.header().destination()), packet.source.0);
            let needed = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
            assert_eq!(icmp.icmp_type(), Icmpv4Type::DestinationUnreachable(needed));
            assert!(frame.len() - l2_len <= 576, "RFC 1812 4.3.2.3");
            icmp.payload().to_vec()
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            assert_eq!(
                (ip.header().source(), ip.header().destination()),
                (packet.destination.0, packet.source.0)
            );
            assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
            assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: mtu.into() });
            assert_eq!(icmpv6::TYPE_PACKET_TOO_BIG, 2);
            assert!(frame.len() - l2_len <= 1_280, "RFC 4443 2.4");
            icmp.payload().to_vec()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(quoted, packet.ip()[..512], "quotes the packet's first 512 bytes");
}

#[test]
fn padding_behind_the_packet_is_not_quoted_and_does_not_count() {
    let tables = tables(backend(mode::IPIP, false, 1_500));
    let fitting = packet(false, Vlan::None, 1_480);
    let padded = [fitting.bytes(), vec![0; 40]].concat();
    assert_eq!(
        run(&padded, &tables, IngressSettings::DEFAULT).1,
        Outcome::Forwarded { service: 1, backend: 1 }
    );
    let big = packet(false, Vlan::None, 1_481);
    let (_, _, frame) = run(&[big.bytes(), vec![0; 40]].concat(), &tables, IngressSettings::DEFAULT);
    read(&big, &frame, 1_480);
}

#[test]
fn nobody_is_answered_who_may_not_be() {
    let v4 = |a, b, c, d| (false, mapped([a, b, c, d]));
    let mut group = [0; 16];
    group[0] = 0xff;
    let senders = [
        v4(0, 0, 0, 0),
        v4(127, 0, 0, 1),
        v4(224, 0, 0, 1),
        v4(255, 255, 255, 255),
        (true, [0; 16]),
        (true, group),
    ];
    for (is_ipv6, sender) in senders {
        let tables = tables(backend(mode::IPIP, false, 1_500));
        let mut packet = packet(is_ipv6, Vlan::None, 1_490);
        packet.source.0 = sender;
        let (verdict, outcome, _) = run(&packet.bytes(), &tables, IngressSettings::DEFAULT);
        assert_eq!((verdict, outcome), (Verdict::Drop, Outcome::Not(Reason::MartianSource)), "{sender:?}");
        // Nor by itself, for whoever else asks.
        let mut frame = VecFrame::new(&packet.bytes());
        let headers = parse(&frame, &IngressSettings::DEFAULT).unwrap();
        assert_eq!(answer_too_big(&mut frame, &headers, 1_400), Err(Reason::TooBigDropped), "{sender:?}");
    }
}

#[test]
fn answers_are_limited() {
    let settings = IngressSettings { icmp_per_s: 10, icmp_burst: 3, ..IngressSettings::DEFAULT };
    let tables = tables(backend(mode::IPIP, false, 1_500));
    let packet = packet(false, Vlan::None, 1_500).bytes();
    let answered = |n: u32| {
        (0..n).filter(|_| run(&packet, &tables, settings).1 == Outcome::Not(Reason::TooBigAnswered)).count()
    };
    assert_eq!(answered(20), 3, "a burst");
    tables.advance_ns(99_000_000);
    assert_eq!(answered(20), 0, "a tenth of a second earns one");
    tables.advance_ns(1_000_000);
    assert_eq!(answered(20), 1);
    tables.advance_s(3_600);
    assert_eq!(answered(20), 3, "never more than a burst");
    let off = IngressSettings { icmp_per_s: 0, ..settings };
    assert_eq!(run(&packet, &tables, off).1, Outcome::Not(Reason::TooBigDropped));
}

#[test]
fn a_packet_longer_than_an_outer_header_can_say_is_too_big() {
    for (mode, outer6) in [(mode::IPIP, false), (mode::GUE, false), (mode::IPIP, true), (mode::GUE, true)] {
        let tables = tables(backend(mode, outer6, 0));
        for is_ipv6 in [false, true] {
            let longest = packet(is_ipv6, Vlan::None, 65_535);
            let (_, outcome, frame) = run(&longest.bytes(), &tables, IngressSettings::DEFAULT);
            assert_eq!(outcome, Outcome::Not(Reason::TooBigAnswered));
            let overhead = if outer6 { 40 } else { 20 } + if mode == mode::GUE { 12 } else { 0 };
            read(&longest, &frame, 65_535 - overhead);
        }
    }
}

#[test]
fn a_path_too_narrow_for_any_quote_is_only_counted() {
    let tables = tables(backend(mode::IPIP, false, 300));
    let packet = packet(false, Vlan::None, 400).bytes();
    assert_eq!(run(&packet, &tables, IngressSettings::DEFAULT).1, Outcome::Not(Reason::TooBigDropped));
}

/// While an entry is being changed, packets take the whole of the hop before, in any mode, and no FIB is asked: natively,
/// it would have no answer.
#[test]
fn a_change_of_the_next_hop_needs_no_fib() {
    let modes = [mode::IPIP, mode::GUE, mode::GUE_CHAIN, mode::L2, mode::IPIP];
    for (outer6, mode, vlan) in [false, true]
        .into_iter()
        .flat_map(|six| modes.into_iter().flat_map(move |mode| [0, 5].map(|vlan| (six, mode, vlan))))
    {
        let mut old = backend(mode, outer6, 1_500);
        old.vlan = lb_common::Be16::new(vlan);
        let request = packet(outer6, Vlan::None, 200).bytes();
        let before = run(&request, &tables(old), IngressSettings::DEFAULT);
        assert!(matches!(before.0, Verdict::Transmit), "mode {mode}: {:?}", before.1);
        let torn = Backend {
            next_hop: [0xee; 6],
            source: [0xee; 16],
            ifindex: 99,
            mtu: 77,
            flags: flags::USED | flags::CHANGING,
            ..old
        };
        let mut changing = tables(torn);
        changing.changing_backends.insert(1, old);
        let now = run(&request, &changing, IngressSettings::DEFAULT);
        assert!(now == before, "mode {mode}, tag {vlan}: {:?} instead of {:?}", now.1, before.1);
        assert_eq!(changing.counted(Reason::FibLookup), 0);
        // A program that was loaded in the middle of a change has no copy, or that of another entry.
        for copy in [None, Some(Backend::default()), Some(Backend { service: 9, ..old })] {
            changing.changing_backends = copy.map(|copy| (1, copy)).into_iter().collect();
            let outcome = run(&request, &changing, IngressSettings::DEFAULT).1;
            assert!(!matches!(outcome, Outcome::Forwarded { .. }), "mode {mode}: {outcome:?}");
        }
    }
}

/// An error about a packet is sent once, about its first part: the others have no ports (RFC 1122 3.2.2).
#[test]
fn only_the_first_part_of_a_packet_is_answered() {
    /// A part of `len` bytes of IPv4 that begins at this multiple of 8 bytes.
    fn part(len: usize, offset: u16, has_more: bool) -> Vec<u8> {
        let mut frame = packet(false, Vlan::None, len).bytes();
        let fragment = offset | if has_more { 0x2000 } else { 0 };
        frame[18..20].copy_from_slice(&[0, 7]);
        frame[20..22].copy_from_slice(&fragment.to_be_bytes());
        frame[24..26].fill(0);
        let check = !sum(&frame[14..34]);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
        frame
    }
    let outcome = |tables: &HashTables, frame: &[u8]| {
        lb_ebpf::native::run(&mut VecFrame::new(frame), tables, &IngressSettings::DEFAULT).1
    };
    let tables = tables(backend(mode::IPIP, false, 1_000));
    assert!(matches!(outcome(&tables, &part(20 + 800, 0, true)), Outcome::Forwarded { .. }));
    assert!(matches!(outcome(&tables, &part(20 + 800, 100, true)), Outcome::Forwarded { .. }));
    assert_eq!(outcome(&tables, &part(20 + 1_000, 200, false)), Outcome::Not(Reason::TooBigDropped));
    assert_eq!(outcome(&tables, &part(20 + 1_000, 0, true)), Outcome::Not(Reason::TooBigAnswered));
}
