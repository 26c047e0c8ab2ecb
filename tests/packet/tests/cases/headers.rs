//! What the parser makes of headers: looked through, or passed to the host with a reason.

use crate::case::{
    ACK, CLIENT4, Case,
    Family::{V4, V6},
    Loaded::Plain,
    SYN, VIP6, backend, cases, tcp, to, udp,
};
use lb_common::{Reason, backend::mode::IPIP, names, service::TCP};
use test_packet::{HOST_MAC, PEER_MAC, Packet, Vlan};

/// A packet that is forwarded like any other.
fn forwarded(packet: Packet) -> Case {
    Case::new(packet, backend(1, IPIP, V4)).goes_to(1, false)
}

/// The same for the first packet of a UDP flow.
fn forwarded_udp(packet: Packet) -> Case {
    Case::new(packet, backend(1, IPIP, V4)).goes_to(1, true).leaves(names::UDP_FLOWS, 1, 0, true)
}

/// A packet whose bytes are changed, and that is passed on for a reason.
fn passed(packet: Packet, change: impl FnOnce(&mut Vec<u8>), reason: Reason) -> Case {
    let mut bytes = packet.bytes();
    change(&mut bytes);
    Case::new(packet, backend(1, IPIP, V4)).sends(bytes).passes(reason)
}

fn unchanged(_: &mut Vec<u8>) {}

fn set(at: usize, value: u8) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at] = value
}

fn cut(len: usize) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes.truncate(len)
}

fn options(words: usize) -> Packet {
    Packet { options: [vec![0x94, 4, 0, 0], vec![1; 4 * (words - 1)]].concat(), ..tcp(V4, ACK) }
}

/// An extension header of so many bytes.
fn extension(kind: u8, len: usize) -> (u8, Vec<u8>) {
    (kind, [vec![(len / 8 - 1) as u8], vec![0; len - 2]].concat())
}

fn extensions(list: Vec<(u8, Vec<u8>)>) -> Packet {
    Packet { extensions: list, ..tcp(V6, ACK) }
}

/// A fragment header: offset in 8 bytes, more to come.
fn fragment(offset: u16, more: bool) -> (u8, Vec<u8>) {
    let [a, b] = (offset << 3 | u16::from(more)).to_be_bytes();
    (44, vec![0, a, b, 0, 0, 0, 7])
}

/// A routing header with segments left.
fn routing(left: u8) -> (u8, Vec<u8>) {
    (43, vec![0, 4, left, 0, 0, 0, 0])
}

/// A frame of another protocol.
fn other(kind: [u8; 2]) -> Case {
    let bytes = [&HOST_MAC[..], &PEER_MAC, &kind, &[0; 46]].concat();
    Case::new(tcp(V4, ACK), backend(1, IPIP, V4)).sends(bytes).passes(Reason::NotIp)
}

fn with_tags(tags: &[u8]) -> Case {
    let packet = tcp(V4, ACK);
    let bytes = packet.bytes();
    Case::new(packet, backend(1, IPIP, V4)).sends([&bytes[..12], tags, &bytes[12..]].concat())
}

cases! {
    ipv4_one_word_of_options: forwarded(options(1));
    ipv4_two_words_of_options: forwarded(options(2));
    ipv4_options_up_to_the_limit: forwarded(options(10));
    ipv4_options_udp: forwarded_udp(Packet { options: vec![1; 8], ..udp(V4) });
    ipv4_options_vlan: forwarded(Packet { vlan: Vlan::One, ..options(3) });
    ipv4_fragmentation_allowed: forwarded(Packet { dont_fragment: false, ..tcp(V4, ACK) });
    ipv4_ttl_1_is_no_hop_of_ours: forwarded(Packet { ttl: 1, ..tcp(V4, ACK) });
    ipv4_no_payload: forwarded(Packet { payload: vec![], ..tcp(V4, ACK) });
    ipv4_first_fragment: passed(tcp(V4, ACK), set(20, 0x20), Reason::Fragment).on(Plain);
    ipv4_last_fragment: passed(tcp(V4, ACK), set(21, 1), Reason::Fragment).on(Plain);
    ipv4_icmp: passed(tcp(V4, ACK), set(23, 1), Reason::Icmp);
    ipv4_sctp: passed(tcp(V4, ACK), set(23, 132), Reason::OtherProtocol);
    ipv4_ipip: passed(tcp(V4, ACK), set(23, 4), Reason::OtherProtocol);
    ipv4_version_5: passed(tcp(V4, ACK), set(14, 0x55), Reason::BadIpv4);
    ipv4_header_of_16_bytes: passed(tcp(V4, ACK), set(14, 0x44), Reason::BadIpv4);
    ipv4_shorter_than_its_header: passed(tcp(V4, ACK), set(17, 19), Reason::BadIpv4);
    ipv4_longer_than_the_frame: passed(tcp(V4, ACK), set(16, 2), Reason::Truncated);
    ipv4_header_cut: passed(tcp(V4, ACK), cut(33), Reason::Truncated);
    ipv4_only_ethernet: passed(tcp(V4, ACK), cut(14), Reason::Truncated);
    ipv4_tcp_header_does_not_fit: passed(tcp(V4, ACK), set(17, 39), Reason::BadTransport);
    ipv4_options_push_tcp_out: passed(Packet { payload: vec![], ..tcp(V4, ACK) }, set(14, 0x46), Reason::BadTransport);
    tcp_data_offset_too_small: passed(tcp(V4, ACK), set(46, 0x40), Reason::BadTransport);
    tcp_data_offset_beyond_the_packet: passed(tcp(V4, ACK), set(46, 0xf0), Reason::BadTransport);
    udp_no_payload: forwarded_udp(Packet { payload: vec![], ..udp(V4) });
    udp_length_too_small: passed(udp(V4), set(39, 7), Reason::BadTransport);
    udp_length_beyond_the_packet: passed(udp(V4), set(39, 22), Reason::BadTransport);
    udp_header_does_not_fit: passed(udp(V4), set(17, 27), Reason::BadTransport);
    ipv6_hop_by_hop: forwarded(extensions(vec![extension(0, 8)]));
    ipv6_destination_options: forwarded(extensions(vec![extension(60, 24)]));
    ipv6_routing_at_its_end: forwarded(extensions(vec![routing(0)]));
    ipv6_atomic_fragment: forwarded(extensions(vec![fragment(0, false)]));
    ipv6_all_kinds: forwarded(extensions(vec![extension(0, 8), extension(60, 8), routing(0), fragment(0, false), extension(60, 16)]));
    ipv6_six_headers: forwarded(extensions(vec![extension(60, 8); 6]));
    ipv6_400_bytes_of_headers: forwarded(extensions(vec![extension(60, 200); 2]));
    ipv6_extensions_udp: forwarded_udp(Packet { extensions: vec![extension(0, 16)], ..udp(V6) });
    ipv6_extensions_qinq: forwarded(Packet { vlan: Vlan::Two, ..extensions(vec![extension(0, 16)]) });
    ipv6_seven_headers: passed(extensions(vec![extension(60, 8); 7]), unchanged, Reason::BadExtension);
    ipv6_408_bytes_of_headers: passed(extensions(vec![extension(60, 200), extension(60, 208)]), unchanged, Reason::BadExtension);
    ipv6_2_kb_header: passed(extensions(vec![extension(60, 2_048)]), unchanged, Reason::BadExtension);
    ipv6_routing_on_its_way: passed(extensions(vec![routing(1)]), unchanged, Reason::BadExtension);
    ipv6_first_fragment: passed(extensions(vec![fragment(0, true)]), unchanged, Reason::Fragment).on(Plain);
    ipv6_last_fragment: passed(extensions(vec![fragment(9, false)]), unchanged, Reason::Fragment).on(Plain);
    ipv6_authentication_header: passed(extensions(vec![(51, vec![2; 15])]), unchanged, Reason::OtherProtocol);
    ipv6_icmp: passed(tcp(V6, ACK), set(20, 58), Reason::Icmp);
    ipv6_no_next_header: passed(tcp(V6, ACK), set(20, 59), Reason::OtherProtocol);
    ipv6_no_next_header_behind_options: passed(extensions(vec![extension(0, 8)]), set(54, 59), Reason::OtherProtocol);
    ipv6_version_5: passed(tcp(V6, ACK), set(14, 0x50), Reason::BadIpv6);
    ipv6_longer_than_the_frame: passed(tcp(V6, ACK), set(18, 1), Reason::Truncated);
    ipv6_shorter_than_its_extensions: passed(extensions(vec![extension(0, 24)]), set(19, 16), Reason::BadIpv6);
    ipv6_header_cut: passed(tcp(V6, ACK), cut(53), Reason::Truncated);
    ipv6_jumbogram: passed(tcp(V6, ACK), |bytes| bytes[18..20].fill(0), Reason::BadTransport);
    ipv6_from_an_ipv4_address: passed(Packet { source: (CLIENT4, 9), ..Packet::new(TCP, (VIP6, 9), (VIP6, 80)) }, unchanged, Reason::BadIpv6);
    ipv6_to_an_ipv4_address: passed(tcp(V6, ACK), |bytes| bytes[38..54].copy_from_slice(&crate::case::VIP4), Reason::BadIpv6);
    ethernet_arp: other([0x08, 0x06]);
    ethernet_lldp: other([0x88, 0xcc]);
    ethernet_mpls: other([0x88, 0x47]);
    ethernet_length_field: other([0x00, 0x2e]);
    ethernet_old_qinq: {
        let packet = tcp(V4, ACK);
        let mut tagged = Packet { vlan: Vlan::Two, ..packet.clone() }.bytes();
        tagged[12..14].copy_from_slice(&[0x91, 0]);
        forwarded(packet).sends(tagged)
    };
    ethernet_priority_tag: forwarded(tcp(V4, ACK)).sends(with_tags(&[0x81, 0, 0xe0, 0]).bytes.expect("set"));
    ethernet_three_tags: with_tags(&[0x88, 0xa8, 0, 1, 0x81, 0, 0, 2, 0x81, 0, 0, 3]).passes(Reason::TooManyVlans);
    ethernet_tag_cut: passed(Packet { vlan: Vlan::One, ..tcp(V4, ACK) }, cut(16), Reason::Truncated);
    ethernet_second_tag_cut: passed(Packet { vlan: Vlan::Two, ..tcp(V4, ACK) }, cut(20), Reason::Truncated);
    ethernet_tagged_arp: passed(Packet { vlan: Vlan::One, ..tcp(V4, ACK) }, |bytes| bytes[16..18].copy_from_slice(&[8, 6]), Reason::NotIp);
    syn_with_ack_is_no_new_flow: forwarded(tcp(V4, SYN | ACK));
    syn_with_fin_is_a_new_flow: Case::new(tcp(V4, SYN | 1), backend(1, IPIP, V4)).goes_to(1, true);
    no_flags_at_all: forwarded(tcp(V4, 0));
    port_0_of_the_client: forwarded(Packet { source: (CLIENT4, 0), ..to(V4, TCP, 80) });
    dscp_and_ecn_are_copied_to_ipv4: forwarded(Packet { tos: 0xba, ..tcp(V4, ACK) });
    dscp_and_ecn_are_copied_to_ipv6: Case::new(Packet { tos: 0x2f, ..tcp(V6, ACK) }, backend(1, IPIP, V6)).goes_to(1, false);
}

/// A short frame is padded to 60 bytes on the wire; the padding stays behind the packet.
#[test]
fn padding_is_carried_along() {
    let packet = Packet { payload: vec![], ..tcp(V4, ACK) };
    let mut case = forwarded(packet.clone());
    case.frame.extend([0; 6]);
    case.sends([packet.bytes(), vec![0; 6]].concat()).check();
}

/// Options in the TCP header: twelve bytes of what the builder takes for payload.
#[test]
fn tcp_options_are_looked_over() {
    let packet = Packet { payload: vec![1; 20], ..tcp(V4, ACK) };
    let (mut bytes, mut case) = (packet.bytes(), forwarded(packet));
    bytes[14 + 20 + 12] = 0x80;
    case.frame[14 + 20 + 20 + 12] = 0x80;
    case.sends(bytes).check();
}
