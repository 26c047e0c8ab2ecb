//! The fuzzers' checks over generated, cut and mutated packets, over their seeds, and over what they
//! have found.

use crate::{
    bodies,
    build::{Packet, Vlan},
    world::{CLIENT4, CLIENT6, VIP4, VIP6, cases},
};
use lb_common::{
    Address,
    service::{TCP, UDP},
};
use proptest::prelude::*;
use std::{fs, path::PathBuf};

/// A packet that the ingress world knows, of any shape.
pub fn packet() -> impl Strategy<Value = Packet> {
    let vlan = prop_oneof![3 => Just(Vlan::None), 1 => Just(Vlan::One), 1 => Just(Vlan::Two)];
    let port =
        prop_oneof![4 => prop::sample::select(vec![80u16, 443, 8080, 53, 999, 1_500]), 1 => any::<u16>()];
    let flags = prop_oneof![Just(0x02u8), Just(0x10), Just(0x11), Just(0x04), any::<u8>()];
    let extension = prop_oneof![
        (Just(0u8), 0u8..3),
        (Just(60u8), prop_oneof![9 => 0u8..12, 1 => 40u8..150]),
        (Just(43u8), 0u8..3),
        (Just(44u8), Just(0u8)),
        (Just(51u8), Just(2u8))
    ]
    .prop_map(|(kind, len)| {
        let bytes = if kind == 51 { 4 * (usize::from(len) + 2) } else { 8 * (usize::from(len) + 1) };
        (kind, [vec![len], vec![0; bytes - 2]].concat())
    });
    (
        (0u8..20, any::<bool>(), vlan, any::<u16>(), port, flags),
        (any::<u8>(), any::<u8>(), any::<bool>()),
        (
            prop::collection::vec(any::<[u8; 4]>(), 0..4),
            prop::collection::vec(extension, 0..8),
            0usize..1_400,
        ),
    )
        .prop_map(
            |(
                (family, is_tcp, vlan, source_port, port, flags),
                (tos, ttl, df),
                (options, extensions, len),
            )| {
                let is_ipv6 = family < 10;
                let (client, vip): (Address, Address) = match family {
                    // An IPv4 source in an IPv6 packet.
                    0 => (CLIENT4, VIP6),
                    // Sources that cannot be.
                    1 => (VIP6, VIP6),
                    2 => ([0; 16], VIP6),
                    3..10 => (CLIENT6, VIP6),
                    10 => (VIP4, VIP4),
                    11 => (bodies::v4(127, 0, 0, 1), VIP4),
                    _ => (CLIENT4, VIP4),
                };
                Packet {
                    vlan,
                    flags,
                    tos,
                    ttl,
                    dont_fragment: df,
                    options: if is_ipv6 { vec![] } else { options.concat() },
                    extensions: if is_ipv6 { extensions } else { vec![] },
                    payload: vec![0x5a; len],
                    ..Packet::new(if is_tcp { TCP } else { UDP }, (client, source_port), (vip, port))
                }
            },
        )
}

/// A packet for the worker: one of the above behind outer headers.
fn encapsulated() -> impl Strategy<Value = Vec<u8>> {
    (packet(), any::<bool>(), any::<bool>(), any::<u8>(), any::<bool>()).prop_map(
        |(inner, gue, outer6, tos, ours)| {
            let inner_protocol = if inner.destination.0 == VIP6 { 41 } else { 4 };
            let mut payload = inner.ip();
            if gue {
                payload = [&[0, inner_protocol, 0, 0], &payload[..]].concat();
            }
            let last = if ours { 1 } else { 2 };
            let (source, destination) = if outer6 {
                (bodies::v6(9, 9), bodies::v6(1, last))
            } else {
                (bodies::v4(10, 9, 9, 9), bodies::v4(10, 1, 0, last))
            };
            let mut outer = Packet::new(UDP, (source, 50_000), (destination, 6080));
            (outer.tos, outer.vlan, outer.payload) = (tos, inner.vlan, payload);
            if gue { outer.bytes() } else { outer.around(inner_protocol) }
        },
    )
}

/// Bytes to overwrite, insert or remove, and where to cut.
pub fn mutations() -> impl Strategy<Value = (Vec<(usize, u8, u8)>, usize)> {
    let offset = prop_oneof![6 => 0usize..120, 1 => 0usize..1_500];
    (
        prop::collection::vec((offset, any::<u8>(), 0u8..8), 0..5),
        prop_oneof![3 => Just(usize::MAX), 1 => 0usize..120],
    )
}

/// Carried out.
pub fn mutate(mut bytes: Vec<u8>, (mutations, cut): &(Vec<(usize, u8, u8)>, usize)) -> Vec<u8> {
    for (offset, value, how) in mutations {
        if bytes.is_empty() {
            break;
        }
        let offset = offset % bytes.len();
        match how {
            0 => bytes.insert(offset, *value),
            1 => drop(bytes.remove(offset)),
            2 => bytes[offset] ^= 1 << (value & 7),
            _ => bytes[offset] = *value,
        }
    }
    bytes.truncate(*cut);
    bytes
}

proptest! {
    #![proptest_config(cases(3_000))]

    #[test]
    fn whole_packets(packet in packet()) {
        bodies::parse::check(&packet.bytes());
        bodies::ingress::check(&packet.bytes());
    }

    #[test]
    fn mutated_packets(packet in packet(), mutations in mutations()) {
        let bytes = mutate(packet.bytes(), &mutations);
        bodies::parse::check(&bytes);
        bodies::ingress::check(&bytes);
        bodies::decap::check(&bytes);
    }

    #[test]
    fn encapsulated_packets(bytes in encapsulated()) {
        bodies::decap::check(&bytes);
    }

    #[test]
    fn mutated_encapsulated_packets(bytes in encapsulated(), mutations in mutations()) {
        let bytes = mutate(bytes, &mutations);
        bodies::parse::check(&bytes);
        bodies::ingress::check(&bytes);
        bodies::decap::check(&bytes);
    }

    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in prop::sample::select(vec![[8u8, 0], [0x86, 0xdd], [0x81, 0]])) {
        let mut bytes = bytes;
        bodies::parse::check(&bytes);
        if bytes.len() > 14 {
            bytes[12..14].copy_from_slice(&kind);
            bodies::parse::check(&bytes);
            bodies::ingress::check(&bytes);
            bodies::decap::check(&bytes);
        }
    }
}

/// Cuts a few packets at each byte.
#[test]
fn truncated_at_each_byte() {
    for (name, bytes) in seeds() {
        for len in 0..=bytes.len() {
            let result = std::panic::catch_unwind(|| {
                bodies::parse::check(&bytes[..len]);
                bodies::ingress::check(&bytes[..len]);
                bodies::decap::check(&bytes[..len]);
            });
            assert!(result.is_ok(), "{name}, cut at {len}");
        }
    }
}

/// Where the fuzzers' seeds lie.
fn corpus(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz")).join(target)
}

/// The seeds: one packet of each shape.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let v4 = |protocol, port| Packet::new(protocol, (CLIENT4, 40_001), (VIP4, port));
    let v6 = |protocol, port| Packet::new(protocol, (CLIENT6, 40_001), (VIP6, port));
    let outer4 = |payload: Vec<u8>| Packet {
        payload,
        ..Packet::new(UDP, (bodies::v4(10, 9, 9, 9), 50_000), (bodies::v4(10, 1, 0, 1), 6080))
    };
    let outer6 = |payload: Vec<u8>| Packet {
        payload,
        ..Packet::new(UDP, (bodies::v6(9, 9), 50_000), (bodies::v6(1, 1), 6080))
    };
    let gue = |protocol: u8, inner: Packet| [&[0, protocol, 0, 0], &inner.ip()[..]].concat();
    vec![
        ("v4_tcp_syn", Packet { flags: 2, ..v4(TCP, 80) }.bytes()),
        ("v4_tcp_ack_vlan", Packet { vlan: Vlan::One, ..v4(TCP, 443) }.bytes()),
        ("v4_udp_qinq", Packet { vlan: Vlan::Two, ..v4(UDP, 53) }.bytes()),
        ("v4_tcp_options", Packet { options: vec![0x94, 4, 0, 0, 1, 1, 1, 0], ..v4(TCP, 80) }.bytes()),
        ("v4_tcp_big", Packet { payload: vec![1; 700], ..v4(TCP, 8080) }.bytes()),
        ("v6_tcp_syn", Packet { flags: 2, ..v6(TCP, 80) }.bytes()),
        ("v6_udp_range", v6(UDP, 1_500).bytes()),
        (
            "v6_tcp_extensions",
            Packet {
                extensions: vec![
                    (0, vec![0, 1, 4, 0, 0, 0, 0]),
                    (60, vec![0, 1, 4, 0, 0, 0, 0]),
                    (43, vec![0, 4, 0, 0, 0, 0, 0]),
                    (44, vec![0, 0, 0, 0, 0, 0, 9]),
                ],
                ..v6(TCP, 443)
            }
            .bytes(),
        ),
        ("v6_tcp_big", Packet { payload: vec![1; 700], ..v6(TCP, 8080) }.bytes()),
        ("ipip_4in4", outer4(v4(TCP, 80).ip()).around(4)),
        ("ipip_6in4", outer4(v6(TCP, 80).ip()).around(41)),
        ("ipip_4in6", outer6(v4(UDP, 53).ip()).around(4)),
        ("ipip_6in6", outer6(v6(UDP, 53).ip()).around(41)),
        ("gue_4in4", outer4(gue(4, v4(TCP, 80))).bytes()),
        ("gue_6in6", outer6(gue(41, v6(TCP, 80))).bytes()),
    ]
}

/// The checked-in seeds are these. `LB_WRITE_SEEDS=1` writes them.
#[test]
fn seeds_are_current() {
    for target in ["parse", "ingress", "decap"] {
        for (name, bytes) in seeds() {
            let path = corpus("corpus").join(target).join(name);
            if std::env::var_os("LB_WRITE_SEEDS").is_some() {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, &bytes).unwrap();
            }
            let kept = fs::read(&path).unwrap_or_default();
            assert!(kept == bytes, "{}: LB_WRITE_SEEDS=1 cargo test -p lb-ebpf writes it", path.display());
        }
    }
}

/// Everything in the corpora, and all that once crashed (`fuzz/crashes/TARGET/`).
#[test]
fn corpora_and_crashers() {
    type Check = fn(&[u8]);
    let targets: [(&str, Check); 5] = [
        ("parse", bodies::parse::check),
        ("ingress", bodies::ingress::check),
        ("decap", bodies::decap::check),
        ("stages", bodies::stages::check),
        ("chance", bodies::chance::check),
    ];
    let mut replayed = 0;
    for (target, check) in targets {
        for kind in ["corpus", "crashes"] {
            let Ok(files) = fs::read_dir(corpus(kind).join(target)) else { continue };
            // A corpus that a fuzzer has grown is replayed in part.
            for file in files.take(2_000) {
                let path = file.unwrap().path();
                let bytes = fs::read(&path).unwrap();
                assert!(std::panic::catch_unwind(|| check(&bytes)).is_ok(), "{}", path.display());
                replayed += 1;
            }
        }
    }
    assert!(replayed >= 3 * seeds().len());
}
