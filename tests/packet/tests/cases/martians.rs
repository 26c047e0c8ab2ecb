//! Packets that nobody can have sent: from addresses that no host has, from VIPs, and from those that mode nat
//! translates to. In every mode and stage they are dropped by name, and nothing is answered, written or counted as
//! traffic.

use crate::{
    case::{
        ACK, CLIENT4, CLIENT6, Case, Family,
        Family::{V4, V6},
        Loaded, PORT, RST, SERVICE, SYN, VIP4, VIP6, backend, sized, tcp, udp, v6, with,
    },
    fragments::part,
    icmp,
};
use lb_common::{
    Address, Backend, BackendStats, Be16, Reason, Vip,
    backend::mode,
    mapped,
    service::{TCP, UDP, flags},
};
use std::net::Ipv6Addr;
use test_packet::{Ingress, Packet, Vlan, xdp};

/// A VIP that has no port of its own.
const OTHER4: Address = mapped([203, 0, 113, 200]);
const OTHER6: Address = v6(0x99, 9);

fn address(text: &str) -> Address {
    text.parse::<Ipv6Addr>().expect("an address").octets()
}

/// A source of each class, with what its packets are dropped as.
fn sources(family: Family) -> Vec<(Address, Reason)> {
    let martians: Vec<Address> = match family {
        V4 => [
            [0, 0, 0, 0],
            [0, 1, 2, 3],
            [127, 0, 0, 1],
            [127, 255, 255, 255],
            [224, 0, 0, 1],
            [239, 1, 2, 3],
            [240, 0, 0, 1],
            [255, 255, 255, 255],
        ]
        .map(mapped)
        .to_vec(),
        V6 => ["::", "::1", "::192.0.2.9", "ff02::1", "ff0e::1:2"].map(address).to_vec(),
    };
    let vips = if family == V4 { [VIP4, OTHER4] } else { [VIP6, OTHER6] };
    let martians = martians.into_iter().map(|source| (source, Reason::MartianSource));
    martians.chain(vips.map(|vip| (vip, Reason::OwnSource))).collect()
}

/// Sources that are unusual and allowed.
fn allowed(family: Family) -> Vec<Address> {
    match family {
        V4 => [[10, 0, 0, 9], [169, 254, 1, 1], [100, 64, 0, 1], [126, 255, 255, 255], [223, 255, 255, 255]]
            .map(mapped)
            .to_vec(),
        V6 => ["fe80::9", "fd00::9", "64:ff9b::c000:209", "::1:0:1"].map(address).to_vec(),
    }
}

fn other_vips(ingress: &mut Ingress) {
    ingress.vip(OTHER4, Vip::EMPTY);
    ingress.vip(OTHER6, Vip::EMPTY);
    ingress.forget_bindings();
}

/// Each frame is dropped for its reason, as it came, and leaves nothing behind.
fn all_dropped(ingress: &mut Ingress, frames: &[(Vec<u8>, Reason)], what: &str) {
    for (i, (frame, reason)) in frames.iter().enumerate() {
        let before = ingress.count(*reason);
        let run = ingress.run(frame).expect("runs");
        assert_eq!(run.verdict, xdp::DROP, "{what}, packet {i}: {:?}", ingress.counts());
        assert_eq!(run.packet, *frame, "{what}, packet {i}");
        assert_eq!(ingress.count(*reason), before + 1, "{what}, packet {i}: {:?}", ingress.counts());
    }
    let counted: u64 = ingress.counts().iter().map(|(_, n)| n).sum();
    assert_eq!(counted, frames.len() as u64, "{what}: {:?}", ingress.counts());
    for index in 0..test_packet::USED {
        assert_eq!(ingress.stats(index), BackendStats::default(), "{what}");
    }
    for table in [lb_common::names::FLOWS, lb_common::names::UDP_FLOWS] {
        assert!(ingress.flows(table).is_empty(), "{what}: {table}");
    }
    assert_eq!(
        (ingress.cached_syns(), ingress.bindings().0.len(), ingress.bindings().1.len()),
        (0, 0, 0),
        "{what}"
    );
}

fn from(packet: &Packet, source: Address) -> Packet {
    Packet { source: (source, packet.source.1), ..packet.clone() }
}

/// Service flags and a backend for a mode.
fn of_mode(mode: u8, family: Family) -> (u32, Backend) {
    match mode {
        mode::NAT => {
            let source = if family == V4 { mapped([10, 9, 0, 1]) } else { v6(2, 1) };
            (flags::NAT, Backend { source, source_bits: 0, ..backend(1, mode, family) })
        }
        mode::GUE_CHAIN => (flags::SECOND_CHANCE, backend(1, mode, family)),
        _ => (0, backend(1, mode, family)),
    }
}

const MODES: [u8; 6] = [mode::IPIP, mode::GUE, mode::GUE_CHAIN, mode::L2, mode::NAT, mode::LOCAL];

/// A service in this mode, to which this packet goes.
fn fill(ingress: &mut Ingress, packet: &Packet, mode: u8, family: Family, more: u32) {
    let (view, backend) = of_mode(mode, family);
    Case::new(packet.clone(), backend).view(view | more).fill(ingress);
    other_vips(ingress);
}

/// TCP and UDP, the short way and (by a tag, or because flows are remembered) the long one.
#[test]
fn of_every_mode() {
    for family in [V4, V6] {
        for mode in MODES {
            for (packet, more) in [
                (tcp(family, SYN), 0),
                (tcp(family, ACK), 0),
                (udp(family), 0),
                (udp(family), flags::UDP_STATELESS),
                (udp(family), flags::QUIC),
            ] {
                for vlan in [Vlan::None, Vlan::One] {
                    let packet = Packet { vlan, ..packet.clone() };
                    let what = format!("{family:?} mode {mode} protocol {} {vlan:?}", packet.protocol);
                    with(Loaded::Default, |ingress| {
                        fill(ingress, &packet, mode, family, more);
                        let bad = sources(family);
                        let frames =
                            bad.iter().map(|(source, reason)| (from(&packet, *source).bytes(), *reason));
                        all_dropped(ingress, &frames.collect::<Vec<_>>(), &what);
                        for source in allowed(family) {
                            let run = ingress.run(&from(&packet, source).bytes()).expect("runs");
                            let sent_on = if mode == mode::LOCAL { xdp::PASS } else { xdp::TX };
                            assert_eq!(run.verdict, sent_on, "{what}: {source:?} {:?}", ingress.counts());
                        }
                    });
                }
            }
        }
    }
}

/// A program without any features.
#[test]
fn without_features() {
    for family in [V4, V6] {
        for packet in [tcp(family, SYN), udp(family)] {
            with(Loaded::Plain, |ingress| {
                fill(ingress, &packet, mode::IPIP, family, 0);
                let bad = sources(family);
                let frames = bad.iter().map(|(source, reason)| (from(&packet, *source).bytes(), *reason));
                all_dropped(ingress, &frames.collect::<Vec<_>>(), "plain");
            });
        }
    }
}

/// A VIP's port without a service is the host's, but not for these; what is for the host itself is not looked at.
#[test]
fn what_is_not_ours() {
    for family in [V4, V6] {
        with(Loaded::Default, |ingress| {
            let packet = tcp(family, SYN);
            fill(ingress, &packet, mode::IPIP, family, 0);
            let closed = Packet { destination: (packet.destination.0, 9_999), ..packet.clone() };
            let bad = sources(family);
            let frames = bad.iter().map(|(source, reason)| (from(&closed, *source).bytes(), *reason));
            all_dropped(ingress, &frames.collect::<Vec<_>>(), "a closed port");
            let host = if family == V4 { CLIENT4 } else { CLIENT6 };
            for (source, _) in bad {
                for protocol in [TCP, UDP] {
                    let packet = Packet::new(protocol, (source, PORT), (host, 20_000));
                    let run = ingress.run(&packet.bytes()).expect("runs");
                    assert_eq!((run.verdict, run.packet), (xdp::PASS, packet.bytes()), "{source:?}");
                }
            }
        });
    }
}

#[test]
fn echo_and_errors() {
    for family in [V4, V6] {
        for mode in [mode::IPIP, mode::NAT] {
            with(Loaded::Default, |ingress| {
                let asked = tcp(family, ACK);
                fill(ingress, &asked, mode, family, 0);
                let quote = icmp::reply_of(&asked).ip();
                let kind = if family == V4 { [3, 4] } else { [2, 0] };
                let mut frames = Vec::new();
                for (source, reason) in sources(family) {
                    let echo = from(&icmp::request(family), source);
                    frames.push((icmp::frame(&echo, family), reason));
                    frames.push((icmp::error_from(source, family, kind, &quote, 600), reason));
                }
                all_dropped(ingress, &frames, &format!("{family:?} mode {mode}"));
                let good = icmp::error_from(icmp::router(family), family, kind, &quote, 600);
                let run = ingress.run(&good).expect("runs");
                // Nothing is bound in mode nat, so nobody is to be told.
                assert_eq!(run.verdict, if mode == mode::NAT { xdp::PASS } else { xdp::TX });
            });
        }
    }
}

#[test]
fn fragments() {
    for family in [V4, V6] {
        for mode in [mode::IPIP, mode::L2, mode::NAT] {
            with(Loaded::Default, |ingress| {
                let asked = sized(Packet { dont_fragment: false, ..udp(family) }, 4_000);
                fill(ingress, &asked, mode, family, 0);
                let mut frames = Vec::new();
                for (source, reason) in sources(family) {
                    let packet = from(&asked, source);
                    for (at, to, more) in [(0, 1_480, true), (1_480, 2_960, true), (0, 1_480, true)] {
                        frames.push(([packet.ethernet(), part(&packet, at, to, more)].concat(), reason));
                    }
                }
                all_dropped(ingress, &frames, &format!("{family:?} mode {mode}"));
                let good = [asked.ethernet(), part(&asked, 0, 1_480, true)].concat();
                assert_eq!(ingress.run(&good).expect("runs").verdict, xdp::TX);
            });
        }
    }
}

/// What is too big is not answered either.
#[test]
fn too_big() {
    for family in [V4, V6] {
        for mode in [mode::IPIP, mode::NAT] {
            with(Loaded::Default, |ingress| {
                let big = sized(tcp(family, ACK), 1_400);
                let (view, entry) = of_mode(mode, family);
                Case::new(big.clone(), Backend { mtu: 1_300, ..entry }).view(view).fill(ingress);
                other_vips(ingress);
                let bad = sources(family);
                let frames = bad.iter().map(|(source, reason)| (from(&big, *source).bytes(), *reason));
                all_dropped(ingress, &frames.collect::<Vec<_>>(), &format!("{family:?} mode {mode}"));
                assert_eq!(ingress.run(&big.bytes()).expect("runs").verdict, xdp::TX);
                assert_eq!(ingress.count(Reason::TooBigAnswered), 1);
            });
        }
    }
}

/// From an address that its worker would be asked from, alone and out of a pool; a neighbour of the pool is a client.
#[test]
fn nat_from_its_own_address() {
    for family in [V4, V6] {
        for (packet, bits) in
            [(tcp(family, SYN), 0), (udp(family), 0), (tcp(family, SYN), 2), (udp(family), 2)]
        {
            with(Loaded::Default, |ingress| {
                let (view, entry) = of_mode(mode::NAT, family);
                let mut pool = entry.source;
                pool[15] &= 0xf8;
                let source = if bits == 0 { entry.source } else { pool };
                let entry = Backend { source, source_bits: bits, ..entry };
                Case::new(packet.clone(), entry).view(view).fill(ingress);
                other_vips(ingress);
                let own = (0..1u8 << bits).map(|i| {
                    let mut source = source;
                    source[15] |= i;
                    (from(&packet, source).bytes(), Reason::OwnSource)
                });
                all_dropped(ingress, &own.collect::<Vec<_>>(), &format!("{family:?} {bits} bits"));
                let mut neighbour = source;
                neighbour[15] = source[15] + (1 << bits);
                let run = ingress.run(&from(&packet, neighbour).bytes()).expect("runs");
                assert_eq!(run.verdict, xdp::TX, "{family:?} {bits} bits: {:?}", ingress.counts());
            });
        }
    }
}

/// One service's worker is another service's VIP, by another source address: what was translated for the first has come
/// round, and would go round again if the second's worker were the first's VIP.
#[test]
fn nat_that_has_come_round() {
    for family in [V4, V6] {
        with(Loaded::Default, |ingress| {
            let (view, entry) = of_mode(mode::NAT, family);
            let (vip, own) = if family == V4 { (VIP4, mapped([10, 9, 0, 77])) } else { (VIP6, v6(2, 77)) };
            let other = if family == V4 { OTHER4 } else { OTHER6 };
            // The other VIP's service leads to this VIP.
            let first = Packet { destination: (other, 80), ..tcp(family, SYN) };
            Case::new(first.clone(), Backend { address: vip, source: own, port: Be16::new(80), ..entry })
                .view(view)
                .fill(ingress);
            other_vips(ingress);
            let sent = ingress.run(&first.bytes()).expect("runs");
            assert_eq!(sent.verdict, xdp::TX);
            let second = lb_common::ServiceKey { vip, port: Be16::new(80), protocol: TCP, pad: 0 };
            let view = lb_common::ServiceView { flags: flags::NAT, ..Ingress::view() };
            ingress.service(SERVICE + 1, second, &[test_packet::Pair::Stable(2)], view);
            ingress.backend(2, Backend { service: SERVICE + 1, ..entry });
            let run = ingress.run(&sent.packet).expect("runs");
            assert_eq!(
                (run.verdict, ingress.count(Reason::OwnSource)),
                (xdp::DROP, 1),
                "{:?}",
                ingress.counts()
            );
            assert_eq!(ingress.bindings().0.len(), 1);
        });
    }
}

/// An error about a translated packet that comes from where nothing does, from the workers' side.
#[test]
fn nat_errors_from_the_workers_side() {
    for family in [V4, V6] {
        with(Loaded::Default, |ingress| {
            let asked = tcp(family, SYN);
            fill(ingress, &asked, mode::NAT, family, 0);
            ingress.run(&asked.bytes()).expect("runs");
            let (nats, _) = ingress.bindings();
            let nat = nats[0].1;
            let sent = Packet {
                source: (nat.source, nat.source_port.get()),
                destination: (nat.worker, nat.port.get()),
                ..asked.clone()
            };
            let kind = if family == V4 { [3, 4] } else { [2, 0] };
            let error = |source| {
                let mut frame = icmp::error_from(source, family, kind, &sent.ip(), 600);
                let at = if family == V4 { 30..34 } else { 38..54 };
                frame[at].copy_from_slice(if family == V4 { &nat.source[12..] } else { &nat.source });
                frame
            };
            for (i, (source, reason)) in sources(family).into_iter().enumerate() {
                let run = ingress.run(&error(source)).expect("runs");
                assert_eq!(run.verdict, xdp::DROP, "{source:?}: {:?}", ingress.counts());
                assert!(ingress.count(reason) > 0, "source {i}");
            }
            assert_eq!(ingress.run(&error(icmp::router(family))).expect("runs").verdict, xdp::TX);
        });
    }
}

/// What can neither begin a flow nor belong to an established one makes no binding.
#[test]
fn nat_strays_make_no_state() {
    const FIN: u8 = 0x01;
    for family in [V4, V6] {
        with(Loaded::Default, |ingress| {
            let asked = tcp(family, SYN);
            fill(ingress, &asked, mode::NAT, family, 0);
            let mut frames = Vec::new();
            for (port, flags) in
                (1_000u16..).zip([RST, RST | ACK, SYN | ACK, SYN | RST, SYN | FIN, FIN, 0, 0x08, 0x20])
            {
                let stray = Packet { source: (asked.source.0, port), flags, ..asked.clone() };
                frames.push((stray.bytes(), Reason::NatStray));
            }
            all_dropped(ingress, &frames, &format!("{family:?}"));
            // Those of a flow that is known go where it goes.
            for flags in [SYN, RST] {
                let packet = Packet { flags, ..asked.clone() };
                assert_eq!(ingress.run(&packet.bytes()).expect("runs").verdict, xdp::TX);
            }
            assert_eq!(ingress.stats(1).packets, 2);
        });
    }
}

/// A datagram from a worker's own service, which would answer what another worker answers, without end. From another port
/// the worker is a client, and TCP goes nowhere by itself.
#[test]
fn datagrams_from_a_workers_service() {
    for family in [V4, V6] {
        for mode in MODES {
            for more in [0, flags::UDP_STATELESS, flags::QUIC] {
                for vlan in [Vlan::None, Vlan::One] {
                    let packet = Packet { vlan, ..udp(family) };
                    let what = format!("{family:?} mode {mode} {more:x} {vlan:?}");
                    with(Loaded::Default, |ingress| {
                        fill(ingress, &packet, mode, family, more);
                        let worker = of_mode(mode, family).1;
                        let from = |port| Packet { source: (worker.address, port), ..packet.clone() };
                        let served = packet.destination.1;
                        let mut bad = vec![(from(served).bytes(), Reason::OwnSource)];
                        if mode == mode::NAT {
                            bad.push((from(worker.port.get()).bytes(), Reason::OwnSource));
                        }
                        all_dropped(ingress, &bad, &what);
                        let stranger = Packet { source: (packet.source.0, served), ..packet.clone() };
                        let sent_on = if mode == mode::LOCAL { xdp::PASS } else { xdp::TX };
                        for good in [from(20_001), stranger] {
                            let run = ingress.run(&good.bytes()).expect("runs");
                            assert_eq!(run.verdict, sent_on, "{what}: {:?}", ingress.counts());
                        }
                    });
                }
            }
        }
        with(Loaded::Default, |ingress| {
            let asked = sized(Packet { dont_fragment: false, ..udp(family) }, 4_000);
            fill(ingress, &asked, mode::IPIP, family, 0);
            let looping =
                Packet { source: (backend(1, mode::IPIP, family).address, asked.destination.1), ..asked };
            let first = [looping.ethernet(), part(&looping, 0, 1_480, true)].concat();
            all_dropped(ingress, &[(first, Reason::OwnSource)], "the first part");
            let later = [looping.ethernet(), part(&looping, 1_480, 2_960, true)].concat();
            assert_eq!(ingress.run(&later).expect("runs").verdict, xdp::DROP);
        });
        with(Loaded::Default, |ingress| {
            let packet = tcp(family, SYN);
            fill(ingress, &packet, mode::IPIP, family, 0);
            let source = (backend(1, mode::IPIP, family).address, packet.destination.1);
            let run = ingress.run(&Packet { source, ..packet }.bytes()).expect("runs");
            assert_eq!(run.verdict, xdp::TX, "TCP");
        });
    }
}
