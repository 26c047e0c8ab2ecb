//! The worker's program: what is taken out of its tunnel, and what is refused.

use crate::case::{
    ACK, CLIENT4, Family,
    Family::{V4, V6},
    VIP4, VIP6, cases, sized, tcp, udp, v6,
};
use lb_common::{Address, Reason, mapped, service::UDP, settings::DecapSettings};
use std::{
    net::IpAddr,
    sync::{Mutex, PoisonError},
};
use test_packet::{Decap, HOST_MAC, PEER_MAC, Packet, Vlan, bed, checksum, xdp};

const OURS4: Address = mapped([10, 1, 0, 1]);
const OURS6: Address = v6(1, 1);
/// A second VIP that is served here.
const OTHER4: Address = mapped([203, 0, 113, 200]);
const OTHER6: Address = v6(0x99, 9);
const GUE_PORT: u16 = 6080;

/// A case: what arrives, and what must come of it.
struct Case {
    settings: DecapSettings,
    /// The frame that arrives.
    bytes: Vec<u8>,
    verdict: u32,
    frame: Vec<u8>,
    reason: Reason,
}

/// A packet and the outer headers around it.
#[derive(Clone)]
struct Tunnel {
    inner: Packet,
    /// The outer packet; its payload is filled in.
    outer: Packet,
    gue: bool,
    /// The GUE header.
    gue_header: [u8; 4],
    /// ECN bits that the delivered packet must have.
    mark: Option<u8>,
}

fn tunnel(gue: bool, inner: Packet, outer: Family) -> Tunnel {
    let protocol = protocol_of(&inner);
    let (source, destination) = if outer == V4 { (mapped([10, 9, 9, 9]), OURS4) } else { (v6(2, 9), OURS6) };
    Tunnel {
        inner,
        outer: Packet::new(UDP, (source, 0xc123), (destination, GUE_PORT)),
        gue,
        gue_header: [0, protocol, 0, 0],
        mark: None,
    }
}

fn protocol_of(inner: &Packet) -> u8 {
    if inner.destination.0 == VIP6 || inner.destination.0[0] == 0x20 { 41 } else { 4 }
}

fn ipip(inner: Packet, outer: Family) -> Tunnel {
    tunnel(false, inner, outer)
}

fn gue(inner: Packet, outer: Family) -> Tunnel {
    tunnel(true, inner, outer)
}

impl Tunnel {
    fn vlan(mut self, vlan: Vlan) -> Self {
        self.outer.vlan = vlan;
        self
    }
    fn to(mut self, address: Address) -> Self {
        self.outer.destination.0 = address;
        self
    }
    /// With this inner source.
    fn from(mut self, source: &str) -> Self {
        self.inner.source.0 = match source.parse().expect("an address") {
            IpAddr::V4(v4) => mapped(v4.octets()),
            IpAddr::V6(v6) => v6.octets(),
        };
        self
    }
    fn drops_martian(self) -> Case {
        self.drops(Reason::MartianSource)
    }
    fn marked(mut self, inside: u8, outside: u8, delivered: u8) -> Self {
        self.inner.tos = 0xb8 | inside;
        self.outer.tos = 0x48 | outside;
        self.mark = Some(delivered);
        self
    }
    fn header(mut self, header: [u8; 4]) -> Self {
        self.gue_header = header;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut outer = self.outer.clone();
        if self.gue {
            outer.payload = [&self.gue_header, &self.inner.ip()[..]].concat();
            outer.bytes()
        } else {
            outer.payload = self.inner.ip();
            outer.around(protocol_of(&self.inner))
        }
    }

    fn case(&self) -> Case {
        let bytes = self.bytes();
        Case {
            settings: DecapSettings::DEFAULT,
            bytes,
            verdict: u32::MAX,
            frame: vec![],
            reason: Reason::NotIp,
        }
    }

    /// The inner packet arrives, one hop older, in the frame's own Ethernet header.
    fn arrives(self) -> Case {
        let mut inner = self.inner.clone();
        inner.ttl -= 1;
        if let Some(mark) = self.mark {
            inner.tos = inner.tos & !3 | mark;
        }
        let mut frame = self.outer.ethernet();
        let kind = if protocol_of(&inner) == 4 { [8, 0] } else { [0x86, 0xdd] };
        let at = frame.len() - 2;
        frame[at..].copy_from_slice(&kind);
        frame.extend(inner.ip());
        let reason = if self.gue { Reason::DecapGue } else { Reason::DecapIpip };
        Case { verdict: xdp::PASS, frame, reason, ..self.case() }
    }
    fn passes(self, reason: Reason) -> Case {
        self.case().passes(reason)
    }
    fn drops(self, reason: Reason) -> Case {
        self.case().drops(reason)
    }
    /// With these bytes of the frame changed.
    fn with(self, change: impl FnOnce(&mut Vec<u8>)) -> Case {
        let mut case = self.case();
        change(&mut case.bytes);
        case
    }
}

impl Case {
    fn passes(self, reason: Reason) -> Self {
        Self { verdict: xdp::PASS, frame: self.bytes.clone(), reason, ..self }
    }
    fn drops(self, reason: Reason) -> Self {
        Self { verdict: xdp::DROP, frame: self.bytes.clone(), reason, ..self }
    }
    fn on(self, settings: DecapSettings) -> Self {
        Self { settings, ..self }
    }

    fn check(self) {
        static PROGRAMS: Mutex<Vec<(DecapSettings, &'static Mutex<Decap>)>> = Mutex::new(Vec::new());
        bed::enter();
        assert_ne!(self.verdict, u32::MAX, "the case says what is expected");
        let program = {
            let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
            match programs.iter().find(|(settings, _)| *settings == self.settings) {
                Some((_, program)) => *program,
                None => {
                    let decap = Decap::load(self.settings, &[OURS4, OURS6], &[VIP4, VIP6, OTHER4, OTHER6])
                        .expect("loads");
                    let program: &'static Mutex<Decap> = Box::leak(Box::new(Mutex::new(decap)));
                    programs.push((self.settings, program));
                    program
                }
            }
        };
        let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
        program.take_counts();
        let run = program.run(&self.bytes).expect("the kernel runs it");
        assert_eq!(program.take_counts(), [(self.reason, 1)], "reasons (verdict {})", run.verdict);
        assert_eq!(run.verdict, self.verdict, "verdict");
        if self.verdict != xdp::DROP {
            assert_eq!(run.packet, self.frame, "the frame afterwards");
        }
    }
}

/// From a VIP of this worker.
fn own(mut tunnel: Tunnel, vip: Address) -> Tunnel {
    tunnel.inner.source.0 = vip;
    tunnel
}

fn extension() -> Packet {
    Packet { extensions: vec![(0, vec![0, 1, 4, 0, 0, 0, 0])], ..tcp(V6, ACK) }
}

/// The outer IPv4 header gets a word of options.
fn outer_options(tunnel: Tunnel) -> Case {
    let mut tunnel = tunnel;
    tunnel.outer.options = vec![1, 1, 1, 0];
    tunnel.arrives()
}

fn set(at: usize, value: u8) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at] = value
}

/// A checksum that was wrong before stays wrong by as much: nothing is mended silently.
fn wrong_checksum() -> Case {
    let mut case = ipip(tcp(V4, ACK), V4).arrives();
    for frame in [(&mut case.bytes, 34), (&mut case.frame, 14)] {
        let at = frame.1 + 10;
        let check = u16::from_be_bytes([frame.0[at], frame.0[at + 1]]);
        frame.0[at..at + 2].copy_from_slice(&check.wrapping_sub(0x100).to_be_bytes());
    }
    assert_ne!(checksum(&case.frame[14..34]), 0xffff);
    case
}

/// Bytes behind the inner packet, within and without the outer one, are left for the stack to cut.
fn trailing() -> Case {
    let mut case = ipip(tcp(V4, ACK), V4).arrives();
    case.bytes.extend([0; 6]);
    case.frame.extend([0; 6]);
    case
}

fn no_ipv6() -> DecapSettings {
    DecapSettings { ipv6: 0, ..DecapSettings::DEFAULT }
}

fn no_vlan() -> DecapSettings {
    DecapSettings { vlan: 0, ..DecapSettings::DEFAULT }
}

fn other_port() -> DecapSettings {
    DecapSettings { gue_port: 7_000, ..DecapSettings::DEFAULT }
}

/// A frame that is no tunnel.
fn plain(packet: Packet) -> Case {
    let bytes = packet.bytes();
    Case { bytes, ..ipip(tcp(V4, ACK), V4).case() }
}

/// Makes an outer IPv6 packet the first part of one.
fn fragment_header(bytes: &mut Vec<u8>) {
    let next = std::mem::replace(&mut bytes[20], 44);
    bytes[19] += 8;
    bytes.splice(54..54, [next, 0, 0, 1, 0, 0, 0, 9]);
}

fn arp() -> Case {
    Case { bytes: [&HOST_MAC[..], &PEER_MAC, &[8, 6], &[0; 46]].concat(), ..ipip(tcp(V4, ACK), V4).case() }
}

cases! {
    ipip_4in4_tcp: ipip(tcp(V4, ACK), V4).arrives();
    ipip_4in4_udp: ipip(udp(V4), V4).arrives();
    ipip_6in4_tcp: ipip(tcp(V6, ACK), V4).arrives();
    ipip_4in6_tcp: ipip(tcp(V4, ACK), V6).arrives();
    ipip_4in6_udp: ipip(udp(V4), V6).arrives();
    ipip_6in6_tcp: ipip(tcp(V6, ACK), V6).arrives();
    ipip_6in6_udp: ipip(udp(V6), V6).arrives();
    gue_4in4_tcp: gue(tcp(V4, ACK), V4).arrives();
    gue_4in4_udp: gue(udp(V4), V4).arrives();
    gue_6in4_tcp: gue(tcp(V6, ACK), V4).arrives();
    gue_4in6_tcp: gue(tcp(V4, ACK), V6).arrives();
    gue_6in6_tcp: gue(tcp(V6, ACK), V6).arrives();
    gue_6in6_udp: gue(udp(V6), V6).arrives();
    ipip_4in4_vlan: ipip(tcp(V4, ACK), V4).vlan(Vlan::One).arrives();
    ipip_6in6_vlan: ipip(tcp(V6, ACK), V6).vlan(Vlan::One).arrives();
    gue_4in6_vlan: gue(tcp(V4, ACK), V6).vlan(Vlan::One).arrives();
    ipip_4in4_qinq: ipip(tcp(V4, ACK), V4).vlan(Vlan::Two).arrives();
    gue_6in4_qinq: gue(tcp(V6, ACK), V4).vlan(Vlan::Two).arrives();
    inner_options: ipip(Packet { options: vec![0x94, 4, 0, 0], ..tcp(V4, ACK) }, V4).arrives();
    inner_extensions: gue(extension(), V4).arrives();
    inner_icmp: {
        // Any protocol inside is delivered: an error about a flow, say.
        let mut case = ipip(tcp(V4, ACK), V4).arrives();
        case.bytes[34 + 9] = 1;
        case.frame[14 + 9] = 1;
        // Both checksums are off by as much now.
        case
    };
    outer_options_ipip: outer_options(ipip(tcp(V4, ACK), V4));
    outer_options_gue: outer_options(gue(tcp(V4, ACK), V4));
    jumbo_ipip: ipip(sized(tcp(V4, ACK), 8_900), V4).arrives();
    jumbo_gue: gue(sized(tcp(V6, ACK), 8_900), V6).arrives();
    padding_is_left: trailing();
    checksum_wrong_before: wrong_checksum();
    hops_2: ipip(Packet { ttl: 2, ..tcp(V4, ACK) }, V4).arrives();
    hops_1: ipip(Packet { ttl: 1, ..tcp(V4, ACK) }, V4).drops(Reason::DecapTtl);
    hops_0: ipip(Packet { ttl: 0, ..tcp(V4, ACK) }, V4).drops(Reason::DecapTtl);
    hops_255: ipip(Packet { ttl: 255, ..tcp(V4, ACK) }, V4).arrives();
    ipv6_hops_1: gue(Packet { ttl: 1, ..tcp(V6, ACK) }, V4).drops(Reason::DecapTtl);
    ipv6_hops_2: gue(Packet { ttl: 2, ..tcp(V6, ACK) }, V6).arrives();
    outer_hops_do_not_matter: {
        let mut tunnel = ipip(tcp(V4, ACK), V4);
        tunnel.outer.ttl = 1;
        tunnel.arrives()
    };
    mark_on_not_capable: ipip(tcp(V4, ACK), V4).marked(0, 3, 0).drops(Reason::DecapEcn);
    mark_on_not_capable_v6: gue(tcp(V6, ACK), V6).marked(0, 3, 0).drops(Reason::DecapEcn);
    mark_on_ect0: ipip(tcp(V4, ACK), V4).marked(2, 3, 3).arrives();
    mark_on_ect1: ipip(tcp(V4, ACK), V6).marked(1, 3, 3).arrives();
    mark_on_ect0_v6: gue(tcp(V6, ACK), V4).marked(2, 3, 3).arrives();
    mark_on_mark: gue(tcp(V4, ACK), V4).marked(3, 3, 3).arrives();
    mark_inside_only: ipip(tcp(V6, ACK), V6).marked(3, 0, 3).arrives();
    ect1_on_ect0: ipip(tcp(V4, ACK), V4).marked(2, 1, 1).arrives();
    ect0_on_ect1: ipip(tcp(V4, ACK), V4).marked(1, 2, 1).arrives();
    ect0_on_not_capable: ipip(tcp(V4, ACK), V4).marked(0, 2, 0).arrives();
    not_ours_v4: ipip(tcp(V4, ACK), V4).to(mapped([10, 1, 0, 2])).passes(Reason::DecapNotOurs);
    not_ours_v6: ipip(tcp(V6, ACK), V6).to(v6(1, 2)).passes(Reason::DecapNotOurs);
    not_ours_gue: gue(tcp(V4, ACK), V4).to(mapped([10, 1, 0, 2])).passes(Reason::DecapNotOurs);
    not_ours_but_a_vip: ipip(tcp(V4, ACK), V4).to(VIP4).passes(Reason::DecapNotOurs);
    not_a_vip: ipip(Packet { destination: (mapped([192, 0, 2, 9]), 80), ..tcp(V4, ACK) }, V4).drops(Reason::DecapNotVip);
    not_a_vip_v6: gue(Packet { destination: (v6(0, 9), 80), ..tcp(V6, ACK) }, V6).drops(Reason::DecapNotVip);
    not_a_vip_but_ours: ipip(Packet { destination: (OURS4, 22), ..tcp(V4, ACK) }, V4).drops(Reason::DecapNotVip);
    gue_variant_1: gue(tcp(V4, ACK), V4).header([0x40, 4, 0, 0]).drops(Reason::DecapBadGue);
    gue_control: gue(tcp(V4, ACK), V4).header([0x20, 4, 0, 0]).drops(Reason::DecapBadGue);
    gue_fields: gue(tcp(V4, ACK), V4).header([0x01, 4, 0, 0]).drops(Reason::DecapBadGue);
    gue_flags: gue(tcp(V4, ACK), V6).header([0, 4, 0x80, 0]).drops(Reason::DecapBadGue);
    gue_of_tcp: gue(tcp(V4, ACK), V4).header([0, 6, 0, 0]).drops(Reason::DecapBadGue);
    gue_says_ipv6_but_is_ipv4: gue(tcp(V4, ACK), V4).header([0, 41, 0, 0]).drops(Reason::DecapBadInner);
    gue_udp_too_short: gue(tcp(V4, ACK), V4).with(|b| b[38..40].copy_from_slice(&[0, 11])).drops(Reason::DecapBadGue);
    gue_udp_shorter_than_ip: gue(tcp(V4, ACK), V4).with(set(39, 20)).drops(Reason::DecapBadGue);
    gue_cut: gue(tcp(V4, ACK), V4).with(|b| b.truncate(44)).drops(Reason::DecapBadGue);
    gue_udp_cut: gue(tcp(V4, ACK), V4).with(|b| b.truncate(40)).passes(Reason::Truncated);
    gue_other_port: gue(tcp(V4, ACK), V4).with(set(37, 0)).passes(Reason::OtherProtocol);
    gue_set_port: {
        let mut tunnel = gue(tcp(V4, ACK), V4);
        tunnel.outer.destination.1 = 7_000;
        tunnel.arrives().on(other_port())
    };
    gue_registered_port_when_another_is_set: gue(tcp(V4, ACK), V4).case().on(other_port()).passes(Reason::OtherProtocol);
    outer_first_fragment: ipip(tcp(V4, ACK), V4).with(set(20, 0x20)).drops(Reason::DecapFragment);
    outer_last_fragment: ipip(tcp(V4, ACK), V4).with(set(21, 9)).drops(Reason::DecapFragment);
    outer_ipv6_fragment: ipip(tcp(V4, ACK), V6).with(fragment_header).drops(Reason::DecapFragment);
    outer_ipv6_fragment_not_ours: ipip(tcp(V6, ACK), V6).to(v6(1, 2)).with(fragment_header).passes(Reason::DecapNotOurs);
    outer_ipv6_fragment_of_udp: gue(tcp(V6, ACK), V6).with(fragment_header).passes(Reason::Fragment);
    outer_fragment_not_ours: ipip(tcp(V4, ACK), V4).to(mapped([10, 1, 0, 2])).with(set(20, 0x20)).passes(Reason::DecapNotOurs);
    udp_fragment_is_the_hosts: gue(tcp(V4, ACK), V4).with(set(20, 0x20)).passes(Reason::Fragment);
    outer_bad_version: ipip(tcp(V4, ACK), V4).with(set(14, 0x65)).passes(Reason::BadIpv4);
    outer_bad_length: ipip(tcp(V4, ACK), V4).with(|b| b[16..18].fill(0)).passes(Reason::BadIpv4);
    outer_v6_bad_version: ipip(tcp(V4, ACK), V6).with(set(14, 0x40)).passes(Reason::BadIpv6);
    outer_cut: ipip(tcp(V4, ACK), V4).with(|b| b.truncate(30)).passes(Reason::Truncated);
    inner_cut: ipip(tcp(V4, ACK), V4).with(|b| b.truncate(50)).drops(Reason::DecapBadInner);
    inner_v6_cut: ipip(tcp(V6, ACK), V4).with(|b| b.truncate(70)).drops(Reason::DecapBadInner);
    inner_bad_version: ipip(tcp(V4, ACK), V4).with(set(34, 0x55)).drops(Reason::DecapBadInner);
    inner_bad_header_length: ipip(tcp(V4, ACK), V4).with(set(34, 0x44)).drops(Reason::DecapBadInner);
    inner_longer_than_outer: ipip(tcp(V4, ACK), V4).with(set(36, 1)).drops(Reason::DecapBadInner);
    inner_v6_longer_than_outer: ipip(tcp(V6, ACK), V6).with(set(58, 1)).drops(Reason::DecapBadInner);
    inner_v6_bad_version: ipip(tcp(V6, ACK), V6).with(set(54, 0x40)).drops(Reason::DecapBadInner);
    inner_shorter_than_its_header: ipip(tcp(V4, ACK), V4).with(|b| b[36..38].copy_from_slice(&[0, 19])).drops(Reason::DecapBadInner);
    plain_tcp: plain(tcp(V4, ACK)).passes(Reason::OtherProtocol);
    plain_tcp_to_ours: plain(Packet { destination: (OURS4, 22), ..tcp(V4, ACK) }).passes(Reason::OtherProtocol);
    plain_udp: plain(udp(V4)).passes(Reason::OtherProtocol);
    plain_v6: plain(tcp(V6, ACK)).passes(Reason::OtherProtocol);
    plain_arp: arp().passes(Reason::NotIp);
    three_tags: ipip(tcp(V4, ACK), V4)
        .vlan(Vlan::Two)
        .with(|b| drop(b.splice(12..12, [0x88, 0xa8, 0, 1])))
        .passes(Reason::TooManyVlans);
    ipv6_off_outer: ipip(tcp(V4, ACK), V6).case().on(no_ipv6()).passes(Reason::Ipv6Off);
    ipv6_off_inner_works: ipip(tcp(V6, ACK), V4).arrives().on(no_ipv6());
    vlan_off: ipip(tcp(V4, ACK), V4).vlan(Vlan::One).case().on(no_vlan()).passes(Reason::VlanOff);
    vlan_off_untagged_works: ipip(tcp(V4, ACK), V4).arrives().on(no_vlan());
    source_of_a_client: ipip(Packet { source: (CLIENT4, 1), ..tcp(V4, ACK) }, V6).arrives();
    source_loopback_ipip_v4: ipip(tcp(V4, ACK), V6).from("127.0.0.1").drops_martian();
    source_loopback_gue_v4: gue(tcp(V4, ACK), V4).from("127.0.0.1").drops_martian();
    source_loopback_last_ipip_v4: ipip(tcp(V4, ACK), V4).from("127.255.255.255").drops_martian();
    source_loopback_last_gue_v4: gue(tcp(V4, ACK), V6).from("127.255.255.255").drops_martian();
    source_unspecified_ipip_v4: ipip(tcp(V4, ACK), V6).from("0.0.0.0").drops_martian();
    source_unspecified_gue_v4: gue(tcp(V4, ACK), V4).from("0.0.0.0").drops_martian();
    source_this_network_ipip_v4: ipip(tcp(V4, ACK), V4).from("0.1.2.3").drops_martian();
    source_this_network_gue_v4: gue(tcp(V4, ACK), V6).from("0.1.2.3").drops_martian();
    source_multicast_ipip_v4: ipip(tcp(V4, ACK), V6).from("224.0.0.1").drops_martian();
    source_multicast_gue_v4: gue(tcp(V4, ACK), V4).from("224.0.0.1").drops_martian();
    source_multicast_last_ipip_v4: ipip(tcp(V4, ACK), V4).from("239.255.255.255").drops_martian();
    source_multicast_last_gue_v4: gue(tcp(V4, ACK), V6).from("239.255.255.255").drops_martian();
    source_reserved_ipip_v4: ipip(tcp(V4, ACK), V6).from("240.0.0.1").drops_martian();
    source_reserved_gue_v4: gue(tcp(V4, ACK), V4).from("240.0.0.1").drops_martian();
    source_broadcast_ipip_v4: ipip(tcp(V4, ACK), V4).from("255.255.255.255").drops_martian();
    source_broadcast_gue_v4: gue(tcp(V4, ACK), V6).from("255.255.255.255").drops_martian();
    source_loopback_ipip_v6: ipip(tcp(V6, ACK), V6).from("::1").drops_martian();
    source_loopback_gue_v6: gue(tcp(V6, ACK), V4).from("::1").drops_martian();
    source_unspecified_ipip_v6: ipip(tcp(V6, ACK), V4).from("::").drops_martian();
    source_unspecified_gue_v6: gue(tcp(V6, ACK), V6).from("::").drops_martian();
    source_compatible_ipip_v6: ipip(tcp(V6, ACK), V6).from("::192.0.2.9").drops_martian();
    source_compatible_gue_v6: gue(tcp(V6, ACK), V4).from("::192.0.2.9").drops_martian();
    source_multicast_ipip_v6: ipip(tcp(V6, ACK), V4).from("ff02::1").drops_martian();
    source_multicast_gue_v6: gue(tcp(V6, ACK), V6).from("ff02::1").drops_martian();
    source_multicast_global_ipip_v6: ipip(tcp(V6, ACK), V6).from("ff0e::1:2").drops_martian();
    source_multicast_global_gue_v6: gue(tcp(V6, ACK), V4).from("ff0e::1:2").drops_martian();
    source_mapped_loopback_ipip_v6: ipip(tcp(V6, ACK), V4).from("::ffff:127.0.0.1").drops_martian();
    source_mapped_loopback_gue_v6: gue(tcp(V6, ACK), V6).from("::ffff:127.0.0.1").drops_martian();
    source_mapped_ipip_v6: ipip(tcp(V6, ACK), V6).from("::ffff:192.0.2.9").drops_martian();
    source_mapped_gue_v6: gue(tcp(V6, ACK), V4).from("::ffff:192.0.2.9").drops_martian();
    source_its_own_vip_ipip_v4: own(ipip(tcp(V4, ACK), V4), VIP4).drops(Reason::OwnSource);
    source_another_vip_ipip_v4: own(ipip(udp(V4), V6), OTHER4).drops(Reason::OwnSource);
    source_its_own_vip_ipip_v6: own(ipip(tcp(V6, ACK), V6), VIP6).drops(Reason::OwnSource);
    source_another_vip_ipip_v6: own(ipip(udp(V6), V4), OTHER6).drops(Reason::OwnSource);
    source_its_own_vip_gue_v4: own(gue(tcp(V4, ACK), V4), VIP4).drops(Reason::OwnSource);
    source_another_vip_gue_v4: own(gue(udp(V4), V6), OTHER4).drops(Reason::OwnSource);
    source_its_own_vip_gue_v6: own(gue(tcp(V6, ACK), V6), VIP6).drops(Reason::OwnSource);
    source_another_vip_gue_v6: own(gue(udp(V6), V4), OTHER6).drops(Reason::OwnSource);
    source_below_loopback_ipip_v4: ipip(tcp(V4, ACK), V4).from("126.255.255.255").arrives();
    source_below_loopback_gue_v4: gue(tcp(V4, ACK), V4).from("126.255.255.255").arrives();
    source_above_loopback_ipip_v4: ipip(tcp(V4, ACK), V4).from("128.0.0.0").arrives();
    source_above_loopback_gue_v4: gue(tcp(V4, ACK), V4).from("128.0.0.0").arrives();
    source_below_multicast_ipip_v4: ipip(tcp(V4, ACK), V4).from("223.255.255.255").arrives();
    source_below_multicast_gue_v4: gue(tcp(V4, ACK), V4).from("223.255.255.255").arrives();
    source_private_ipip_v4: ipip(tcp(V4, ACK), V4).from("10.1.0.77").arrives();
    source_private_gue_v4: gue(tcp(V4, ACK), V4).from("10.1.0.77").arrives();
    source_of_this_worker_ipip_v4: ipip(tcp(V4, ACK), V4).from("10.1.0.1").arrives();
    source_of_this_worker_gue_v4: gue(tcp(V4, ACK), V4).from("10.1.0.1").arrives();
    source_link_local_ipip_v4: ipip(tcp(V4, ACK), V4).from("169.254.1.1").arrives();
    source_link_local_gue_v4: gue(tcp(V4, ACK), V4).from("169.254.1.1").arrives();
    source_shared_ipip_v4: ipip(tcp(V4, ACK), V4).from("100.64.0.1").arrives();
    source_shared_gue_v4: gue(tcp(V4, ACK), V4).from("100.64.0.1").arrives();
    source_link_local_ipip_v6: ipip(tcp(V6, ACK), V6).from("fe80::9").arrives();
    source_link_local_gue_v6: gue(tcp(V6, ACK), V6).from("fe80::9").arrives();
    source_unique_local_ipip_v6: ipip(tcp(V6, ACK), V6).from("fd00::9").arrives();
    source_unique_local_gue_v6: gue(tcp(V6, ACK), V6).from("fd00::9").arrives();
    source_translated_ipip_v6: ipip(tcp(V6, ACK), V6).from("64:ff9b::c000:209").arrives();
    source_translated_gue_v6: gue(tcp(V6, ACK), V6).from("64:ff9b::c000:209").arrives();
    source_above_compatible_ipip_v6: ipip(tcp(V6, ACK), V6).from("::1:0:1").arrives();
    source_above_compatible_gue_v6: gue(tcp(V6, ACK), V6).from("::1:0:1").arrives();
    source_below_multicast_ipip_v6: ipip(tcp(V6, ACK), V6).from("feff::1").arrives();
    source_below_multicast_gue_v6: gue(tcp(V6, ACK), V6).from("feff::1").arrives();
    source_martian_to_no_vip: ipip(Packet { destination: (mapped([192, 0, 2, 9]), 80), ..tcp(V4, ACK) }, V4).from("127.0.0.1").drops(Reason::DecapNotVip);
    source_martian_not_ours: ipip(tcp(V4, ACK), V4).to(mapped([10, 1, 0, 2])).from("127.0.0.1").passes(Reason::DecapNotOurs);
    source_martian_outside_does_not_matter: { let mut tunnel = ipip(tcp(V4, ACK), V4); tunnel.outer.source.0 = mapped([127, 0, 0, 1]); tunnel.arrives() };
}
