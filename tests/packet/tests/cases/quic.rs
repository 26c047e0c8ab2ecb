//! QUIC: packets go where their connection id says, and else where their 5-tuple does. Ids are the vectors of
//! draft-ietf-quic-load-balancers-21, appendix B.

use crate::case::{
    Case, Family,
    Family::{V4, V6},
    Loaded, SERVICE, backend, cases, udp, with,
};
use lb_common::{
    Reason,
    backend::{flags::DOWN, mode::IPIP},
    names,
    quic::{QuicConfig, ServerIdKey, config_key},
    service::flags,
};
use test_packet::{Ingress, Packet, Vlan, xdp};

const KEY: &str = "8f95f09245765f80256934e50c66207f";

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

fn config(ingress: &mut Ingress, id: u8, server_id_len: u8, nonce_len: u8, key: Option<&str>) {
    let key: [u8; 16] = key.map_or([0; 16], |key| hex(key).try_into().expect("16 bytes"));
    let config = QuicConfig {
        server_id_len,
        nonce_len,
        keyed: u8::from(key != [0; 16]),
        pad: 0,
        keys: lb_ebpf::quic::aes::expand(key),
    };
    ingress.quic_config(config_key(SERVICE, id), config);
}

fn server(ingress: &mut Ingress, text: &str, backend: u32) {
    let bytes = hex(text);
    let mut key = ServerIdKey { service: SERVICE, id: [0; 15], len: bytes.len() as u8 };
    key.id[..bytes.len()].copy_from_slice(&bytes);
    ingress.quic_server(key, backend);
}

/// Backend 2 has all server ids; by the 5-tuple it would be backend 1.
fn setup(ingress: &mut Ingress) {
    config(ingress, 0, 3, 4, None);
    config(ingress, 1, 10, 5, Some(KEY));
    config(ingress, 2, 8, 8, Some(KEY));
    for id in ["c4605e", "ed793a51d49b8f5fab65", "ed793a51d49b8f5f"] {
        server(ingress, id, 2);
    }
}

/// The same with the two vectors whose config id is 0 too.
fn setup_keyed(ingress: &mut Ingress) {
    config(ingress, 0, 3, 4, Some(KEY));
    server(ingress, "ed793a", 2);
}

fn setup_long(ingress: &mut Ingress) {
    config(ingress, 0, 9, 9, Some(KEY));
    server(ingress, "ed793a51d49b8f5fab", 2);
}

fn datagram(family: Family, payload: Vec<u8>) -> Case {
    let packet = Packet { payload, ..udp(family) };
    Case::new(packet, backend(1, IPIP, V4)).backend(2, backend(2, IPIP, V4)).view(flags::QUIC).setup(setup)
}

/// A packet with a short header.
fn short(family: Family, cid: &str) -> Case {
    datagram(family, [&[0x41], &hex(cid)[..], &[0x55; 24]].concat())
}

/// A packet with a long header, and our own id in it.
fn long(family: Family, kind: u8, cid: &str) -> Case {
    let cid = hex(cid);
    let lengths = [&[0xc0 | kind << 4, 0, 0, 0, 1, cid.len() as u8], &cid[..], &[4, 1, 2, 3, 4]].concat();
    datagram(family, [lengths, vec![0x55; 40]].concat())
}

fn routed(case: Case) -> Case {
    case.goes_to(2, false).counts(Reason::QuicRouted)
}

fn placed(case: Case, reason: Reason) -> Case {
    case.goes_to(1, true).counts(reason).leaves(names::UDP_FLOWS, 1, 0, true)
}

cases! {
    short_header: routed(short(V4, "07c4605e4504cc4f"));
    short_header_v6: routed(short(V6, "07c4605e4504cc4f"));
    short_header_tagged: routed({
        let mut case = short(V4, "07c4605e4504cc4f");
        case.packet.vlan = Vlan::One;
        case
    });
    a_longer_id_than_is_read: routed(short(V4, "07c4605e4504cc4f00112233"));
    initial: routed(long(V4, 0, "07c4605e4504cc4f"));
    handshake: routed(long(V6, 2, "07c4605e4504cc4f"));
    encrypted_in_one_block: routed(short(V4, "504dd2d05a7b0de9b2b9907afb5ecf8cc3"));
    encrypted_in_four_passes: routed(short(V6, "2fcc381bc74cb4fbad2823a3d1f8fed2"));
    encrypted_of_odd_length: routed(short(V4, "0720b1d07b359d3c").setup(setup_keyed));
    encrypted_of_eighteen_bytes: routed(short(V4, "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc").setup(setup_long));
    another_codepoint_after_a_rotation: placed(short(V4, "67c4605e4504cc4f"), Reason::QuicUnroutable);
    unroutable_codepoint: placed(short(V4, "e7c4605e4504cc4f"), Reason::QuicUnroutable);
    a_clients_own_id: placed(long(V4, 0, "ffeeddccbbaa9988"), Reason::QuicUnroutable);
    unknown_server_id: placed(short(V4, "07c4605f4504cc4f"), Reason::QuicUnknownId);
    wrong_key: placed(short(V4, "504dd2d05a7b0de9b2b9907afb5ecf8cc4"), Reason::QuicUnknownId);
    backend_down: {
        let mut case = short(V4, "07c4605e4504cc4f");
        case.backends[1].1.flags |= DOWN;
        placed(case, Reason::QuicUnknownId)
    };
    backend_of_another_service: {
        let mut case = short(V4, "07c4605e4504cc4f");
        case.backends[1].1.service = 9;
        placed(case, Reason::QuicUnknownId)
    };
    long_header_with_too_short_an_id: placed(long(V4, 0, "07c4605e4504cc"), Reason::QuicShortId);
    long_header_without_id: placed(long(V4, 0, ""), Reason::QuicShortId);
    empty_datagram: placed(datagram(V4, vec![]), Reason::QuicTruncated);
    one_byte: placed(datagram(V4, vec![0x40]), Reason::QuicShortId);
    known_flow_without_routable_id: {
        let case = short(V4, "e7c4605e4504cc4f").knows(names::UDP_FLOWS, 2, 30, 0);
        case.goes_to(2, false).counts(Reason::QuicUnroutable).leaves(names::UDP_FLOWS, 2, 0, true)
    };
    routed_flows_are_not_tracked: routed(short(V4, "07c4605e4504cc4f").knows(names::UDP_FLOWS, 1, 30, 0))
        .leaves(names::UDP_FLOWS, 1, 0, false);
    no_quic_service: {
        let case = short(V4, "07c4605e4504cc4f").view(0);
        case.goes_to(1, true).leaves(names::UDP_FLOWS, 1, 0, true)
    };
    feature_off: {
        let case = short(V4, "07c4605e4504cc4f").on(Loaded::Plain);
        case.goes_to(1, true).leaves(names::UDP_FLOWS, 1, 0, true)
    };
}

/// Cut to every length, a packet goes somewhere and has exactly one reason.
#[test]
fn packets_of_every_length() {
    with(Loaded::Default, |ingress| {
        for whole in [short(V4, "504dd2d05a7b0de9b2b9907afb5ecf8cc3"), long(V6, 2, "07c4605e4504cc4f")] {
            let payload = whole.packet.payload.clone();
            let mut routed = 0;
            for len in 0..=payload.len() {
                ingress.reset();
                let mut case = Case { setup: Some(setup), ..datagram(V4, vec![]) };
                case.packet = Packet { payload: payload[..len].to_vec(), ..whole.packet.clone() };
                case.fill(ingress);
                let run = ingress.run(&case.packet.bytes()).expect("runs");
                assert_eq!(run.verdict, xdp::TX, "{len}");
                let counts = ingress.counts();
                assert_eq!(counts.len(), 1, "{len}: {counts:?}");
                routed += u32::from(counts[0].0 == Reason::QuicRouted);
                assert_eq!(ingress.stats(1).packets + ingress.stats(2).packets, 1);
            }
            assert!(routed > 3, "{routed}");
        }
    });
}
