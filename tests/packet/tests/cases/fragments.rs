//! Fragments follow their first; what is not one, or attacks with them, is dropped and counted.

use crate::case::{
    Case, Family,
    Family::{V4, V6},
    Loaded, PORT, SERVICE, backend, sized, tcp, udp, with,
};
use lb_common::{Be16, Reason, ServiceKey, Vip, VipKey, backend::mode, service::UDP};
use test_packet::{Ingress, Packet, Pair, Vlan, checksum, outer, xdp};

/// Identification of the packets.
const ID: u32 = 0x1357_9bdf;

/// A part of a packet, as an IP packet: its IP payload from `from` to `to`.
pub fn part(packet: &Packet, from: usize, to: usize, more: bool) -> Vec<u8> {
    let ip = packet.ip();
    if packet.destination.0[10] == 0xff {
        let mut header = ip[..20].to_vec();
        let place = (from / 8) as u16 | u16::from(more) << 13;
        header[2..4].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
        header[4..6].copy_from_slice(&(ID as u16).to_be_bytes());
        header[6..8].copy_from_slice(&place.to_be_bytes());
        header[10..12].fill(0);
        let check = (!checksum(&header)).to_be_bytes();
        header[10..12].copy_from_slice(&check);
        [&header, &ip[20 + from..20 + to]].concat()
    } else {
        let mut header = ip[..40].to_vec();
        header[4..6].copy_from_slice(&((8 + to - from) as u16).to_be_bytes());
        let next = std::mem::replace(&mut header[6], 44);
        let [a, b] = (from as u16 | u16::from(more)).to_be_bytes();
        [&header, &[next, 0, a, b][..], &ID.to_be_bytes(), &ip[40 + from..40 + to]].concat()
    }
}

/// What becomes of a part.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It goes to this backend, and starts a flow or not.
    To(u32, bool),
    /// It is handed to the host.
    Passed(Reason),
    /// It is dropped.
    Dropped(Reason),
}

use Fate::{Dropped, Passed, To};

/// Sends parts in order to a service whose slots hold the pair, and checks each.
fn check(packet: &Packet, pair: Pair, mode: u8, parts: &[(Vec<u8>, Fate)]) {
    with(Loaded::Default, |ingress| {
        let case =
            Case::new(packet.clone(), backend(1, mode, V4)).pair(pair).backend(2, backend(2, mode, V6));
        case.fill(ingress);
        check_parts(ingress, &case, parts);
    });
}

fn check_parts(ingress: &mut Ingress, case: &Case, parts: &[(Vec<u8>, Fate)]) {
    for (i, (ip, fate)) in parts.iter().enumerate() {
        let frame = [case.packet.ethernet(), ip.clone()].concat();
        let before = ingress.counts();
        let run = ingress.run(&frame).expect("the kernel runs it");
        let mut counts = before.clone();
        let mut count = |reason| match counts.iter_mut().find(|(r, _)| *r == reason) {
            Some((_, n)) => *n += 1,
            None => {
                counts.push((reason, 1));
                counts.sort();
            }
        };
        let expected = match *fate {
            To(index, _) => {
                let backend = case.backends.iter().find(|(i, _)| *i == index).expect("of the case").1;
                count(Reason::FragmentForwarded);
                let tunnel = outer::tunnel_of(&case.packet, ip.clone(), &backend);
                (xdp::TX, [outer::ethernet(&backend), tunnel].concat())
            }
            Passed(reason) => {
                count(reason);
                (xdp::PASS, frame)
            }
            Dropped(reason) => {
                count(reason);
                (xdp::DROP, frame)
            }
        };
        assert_eq!(ingress.counts(), counts, "part {i}: counters");
        assert_eq!((run.verdict, run.packet), expected, "part {i}");
    }
    for index in [1, 2] {
        let to = parts.iter().filter(|(_, fate)| matches!(fate, To(i, _) if *i == index));
        let new = parts.iter().filter(|(_, fate)| matches!(fate, To(i, true) if *i == index));
        let stats = ingress.stats(index);
        assert_eq!(stats.bytes, to.clone().map(|(ip, _)| ip.len() as u64).sum::<u64>());
        assert_eq!((stats.packets, stats.flows), (to.count() as u64, new.count() as u64));
    }
}

/// A datagram of 4,000 bytes.
fn datagram(family: Family) -> Packet {
    let headers = if family == V4 { 28 } else { 48 };
    sized(Packet { dont_fragment: false, ..udp(family) }, 4_000 + headers)
}

/// Its three parts: 1,480, 1,480 and 1,048 bytes.
fn three(packet: &Packet) -> [Vec<u8>; 3] {
    [part(packet, 0, 1_480, true), part(packet, 1_480, 2_960, true), part(packet, 2_960, 4_008, false)]
}

#[test]
fn parts_follow_the_first() {
    for family in [V4, V6] {
        for mode in [mode::IPIP, mode::GUE] {
            for vlan in [Vlan::None, Vlan::One, Vlan::Two] {
                let packet = Packet { vlan, tos: 0x28, ..datagram(family) };
                let [a, b, c] = three(&packet);
                check(
                    &packet,
                    Pair::Stable(1),
                    mode,
                    &[(a, To(1, true)), (b, To(1, false)), (c, To(1, false))],
                );
            }
        }
    }
}

#[test]
fn later_parts_may_come_in_any_order_and_again() {
    let packet = datagram(V6);
    let [a, b, c] = three(&packet);
    let again = [(c.clone(), To(1, false)), (a.clone(), To(1, false)), (b.clone(), To(1, false))];
    let parts = [vec![(a, To(1, true)), (c, To(1, false)), (b, To(1, false))], again.to_vec()].concat();
    check(&packet, Pair::Stable(1), mode::IPIP, &parts);
}

#[test]
fn a_part_before_the_first_is_dropped() {
    for family in [V4, V6] {
        let packet = datagram(family);
        let [a, b, c] = three(&packet);
        let unknown = Dropped(Reason::FragmentUnknown);
        check(
            &packet,
            Pair::Stable(1),
            mode::IPIP,
            &[(b.clone(), unknown), (c, unknown), (a, To(1, true)), (b, To(1, false))],
        );
    }
}

#[test]
fn tcp_too() {
    let packet = sized(tcp(V4, 0x10), 3_000);
    let parts =
        [(part(&packet, 0, 1_480, true), To(1, false)), (part(&packet, 1_480, 2_980, false), To(1, false))];
    check(&packet, Pair::Stable(1), mode::IPIP, &parts);
}

#[test]
fn all_parts_stay_where_the_first_went_when_the_slot_changes() {
    with(Loaded::Default, |ingress| {
        let packet = sized(tcp(V4, 0x10), 3_000);
        let case = Case::new(packet.clone(), backend(1, mode::GUE, V4)).backend(2, backend(2, mode::GUE, V4));
        case.fill(ingress);
        check_parts(ingress, &case, &[(part(&packet, 0, 1_480, true), To(1, false))]);
        let case = case.pair(Pair::Stable(2));
        case.fill(ingress);
        let parts = [
            (part(&packet, 1_480, 2_960, true), To(1, false)),
            (part(&packet, 2_960, 2_980, false), To(1, false)),
        ];
        for (ip, _) in parts {
            let run = ingress.run(&[packet.ethernet(), ip].concat()).expect("runs");
            assert_eq!(run.verdict, xdp::TX);
        }
        assert_eq!((ingress.stats(1).packets, ingress.stats(2).packets), (3, 0));
    });
}

#[test]
fn overlaps_end_a_packet() {
    let overlap = Dropped(Reason::FragmentOverlap);
    for family in [V4, V6] {
        let packet = datagram(family);
        let [a, b, c] = three(&packet);
        // Into the first part, and over two parts by one unit.
        for bad in [part(&packet, 8, 1_480, true), part(&packet, 1_472, 2_000, true)] {
            let parts =
                [(a.clone(), To(1, true)), (bad, overlap), (b.clone(), overlap), (c.clone(), overlap)];
            check(&packet, Pair::Stable(1), mode::IPIP, &parts);
        }
    }
}

#[test]
fn more_parts_than_are_told_apart() {
    let packet = sized(Packet { dont_fragment: false, ..udp(V4) }, 4_028);
    let parts: Vec<_> = (0..10)
        .map(|i| (part(&packet, i * 400, (i + 1) * 400, true), To(1, i == 0)))
        .chain([(part(&packet, 4_000, 4_008, false), To(1, false))])
        .chain([(part(&packet, 2_400, 2_416, true), Dropped(Reason::FragmentOverlap))])
        .collect();
    check(&packet, Pair::Stable(1), mode::IPIP, &parts);
}

#[test]
fn headers_must_not_be_split() {
    let tiny = Dropped(Reason::FragmentTiny);
    for family in [V4, V6] {
        let packet = sized(tcp(family, 0x10), 2_000);
        let parts = [(part(&packet, 0, 16, true), tiny), (part(&packet, 8, 400, true), tiny)];
        check(&packet, Pair::Stable(1), mode::IPIP, &parts);
    }
    let packet = datagram(V4);
    let mut short = part(&packet, 0, 1_480, true);
    short[2..4].copy_from_slice(&24_u16.to_be_bytes());
    // Four bytes are not whole units either.
    check(&packet, Pair::Stable(1), mode::IPIP, &[(short, Dropped(Reason::FragmentBad))]);
}

#[test]
fn impossible_parts() {
    let bad = Dropped(Reason::FragmentBad);
    let packet = datagram(V4);
    let whole_units = part(&packet, 0, 1_477, true);
    let mut empty = part(&packet, 1_480, 1_480, false);
    empty[6..8].copy_from_slice(&(185_u16).to_be_bytes());
    let mut beyond = part(&packet, 2_960, 4_008, false);
    beyond[6..8].copy_from_slice(&0x1fff_u16.to_be_bytes());
    check(&packet, Pair::Stable(1), mode::IPIP, &[(whole_units, bad), (empty, bad), (beyond, bad)]);
}

#[test]
fn what_is_for_the_host_stays_so() {
    with(Loaded::Default, |ingress| {
        let packet = datagram(V4);
        let case = Case::new(packet.clone(), backend(1, mode::IPIP, V4));
        case.fill(ingress);
        // A port without a service: all parts.
        let other = Packet { destination: (packet.destination.0, 9_999), ..packet.clone() };
        let [a, b, c] = three(&other);
        let fragment = Passed(Reason::Fragment);
        let host = Case::new(other, backend(1, mode::IPIP, V4));
        check_parts(ingress, &host, &[(a, Passed(Reason::NoService)), (b, fragment), (c, fragment)]);
        // Another address.
        let other = Packet { destination: (lb_common::mapped([192, 0, 2, 99]), 53), ..packet };
        let [a, b, _] = three(&other);
        let host = Case::new(other, backend(1, mode::IPIP, V4));
        // What is no first part may belong to a translated packet whose first was not seen.
        check_parts(ingress, &host, &[(a, Passed(Reason::NotVip)), (b, Passed(Reason::NatFragment))]);
    });
}

#[test]
fn other_protocols_are_the_hosts() {
    let packet = datagram(V4);
    let other = |from, to, more| {
        let mut ip = part(&packet, from, to, more);
        ip[9] = 1;
        (ip, Passed(Reason::Fragment))
    };
    check(&packet, Pair::Stable(1), mode::IPIP, &[other(0, 1_480, true), other(1_480, 4_008, false)]);
}

#[test]
fn no_backend_no_parts() {
    let packet = datagram(V4);
    let [a, b, _] = three(&packet);
    let parts = [(a, Dropped(Reason::NoBackend)), (b, Dropped(Reason::FragmentUnknown))];
    check(&packet, Pair::Empty, mode::IPIP, &parts);
}

/// Ports that only some other service of the VIP has: by any port.
#[test]
fn any_port() {
    with(Loaded::Default, |ingress| {
        let packet = datagram(V4);
        let key = ServiceKey { vip: packet.destination.0, port: Be16::new(0), protocol: UDP, pad: 0 };
        ingress.service(SERVICE, key, &[Pair::Stable(1)], Ingress::stateless_view());
        ingress.backend(1, backend(1, mode::IPIP, V4));
        ingress.vip(VipKey { vip: packet.destination.0 }.vip, Vip { any_udp: SERVICE, ..Vip::EMPTY });
        let [a, b, c] = three(&packet);
        assert_eq!(packet.source.1, PORT);
        let case = Case::new(packet, backend(1, mode::IPIP, V4));
        check_parts(ingress, &case, &[(a, To(1, false)), (b, To(1, false)), (c, To(1, false))]);
    });
}

/// Sockets of one client count ids each for itself: a first part is no part of the packet before.
#[test]
fn an_id_that_is_used_again() {
    with(Loaded::Default, |ingress| {
        let packet = datagram(V4);
        let case = Case::new(packet.clone(), backend(1, mode::IPIP, V4));
        case.fill(ingress);
        let other = Packet { source: (packet.source.0, PORT + 1), ..packet.clone() };
        for packet in [&packet, &other, &packet] {
            let case = Case::new(packet.clone(), backend(1, mode::IPIP, V4));
            for ip in [part(packet, 0, 1_000, true), part(packet, 1_000, 2_000, false)] {
                let run = ingress.run(&[packet.ethernet(), ip.clone()].concat()).expect("runs");
                let tunnel = outer::tunnel_of(packet, ip, &case.backends[0].1);
                assert_eq!(run.packet, [outer::ethernet(&case.backends[0].1), tunnel].concat());
            }
        }
        assert_eq!(ingress.counts(), [(Reason::FragmentForwarded, 6)]);
    });
}
