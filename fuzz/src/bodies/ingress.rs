//! The ingress host's whole way, over tables that hold every kind of service and backend.
//!
//! Promises: a packet that is passed is unchanged; one that is forwarded is the same packet behind outer
//! headers that another reader understands; an answer is a valid ICMP error; each packet is forwarded
//! or has exactly one reason; flow tables hold at most one entry per packet.

use super::{l2_len, sum, v4, v6};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use lb_common::{
    Backend, Be16, PortRange, Reason, ServiceKey, ServiceView, Slot, Vip, VipKey, backend, is_mapped,
    reason::Fate,
    service::{NO_SERVICE, TCP, UDP},
    settings::IngressSettings,
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    FlowTable, Verdict,
    native::{self, HashTables, VecFrame},
    packet::{
        fib::{FibAnswer, FibQuery, Hop},
        verdict::Outcome,
    },
};

/// MTU of the backends that have a limit.
const MTU: u16 = 600;

/// Checks one frame.
pub fn check(data: &[u8]) {
    let tables = world();
    let mut frame = VecFrame::new(data).with_fib(fib);
    let (verdict, outcome) = native::run(&mut frame, &tables, &IngressSettings::DEFAULT);
    let after = frame.bytes();
    super::is_taken_for_what_it_is(&tables, data, outcome);
    match outcome {
        Outcome::Forwarded { backend, .. } => {
            let backend = tables.backends[&backend];
            let is_there = backend.ifindex == 1 && backend.flags & backend::flags::RESOLVED != 0;
            assert_eq!(verdict == Verdict::Transmit, is_there);
            forwarded(data, &after, &backend);
        }
        Outcome::Returned { .. } => panic!("nobody has answered"),
        Outcome::Not(reason) => {
            assert_eq!(verdict, Verdict::of(reason));
            match reason.fate() {
                Fate::Pass => assert!(after == data && frame.adjusts().is_empty(), "{reason:?}: changed"),
                Fate::Answer if reason == Reason::EchoAnswered => echoed(data, &after),
                Fate::Answer => answered(data, &after),
                Fate::Drop => {}
                Fate::Note => panic!("{reason:?} is no end of a way"),
            }
        }
    }
    let ends: u64 = tables.counts().iter().filter(|(r, _)| r.fate() != Fate::Note).map(|(_, n)| n).sum();
    assert_eq!(ends + tables.packets(), 1, "{:?}", tables.counts());
    let flows = [FlowTable::Flows, FlowTable::Syns, FlowTable::UdpFlows];
    assert!(flows.iter().map(|table| tables.flows(*table).len()).sum::<usize>() <= 1);
}

/// Interface to which some backends are redirected, and all that the FIB finds.
pub const EGRESS: u32 = 10;
/// MAC that the FIB gives for it, and for what is behind it.
pub const FIB_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 10], [2, 0, 0, 0, 0, 99]];

/// Answers as the packet tests' namespace does: one neighbour on a link with an MTU of 1,500.
pub fn fib(query: &FibQuery) -> Result<FibAnswer, (Reason, u32)> {
    let [egress_mac, next_hop] =
        FIB_MACS.map(|m| (u32::from_ne_bytes([m[0], m[1], m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])));
    if query.len > 1_500 {
        return Err((Reason::TooBigAnswered, 1_500));
    }
    Ok(FibAnswer {
        hop: Hop { next_hop, egress_mac, vlan: 0, ifindex: EGRESS, mtu: 0 },
        source: query.source,
    })
}

/// The tables: on each VIP, TCP and UDP services by port, range and any port.
pub fn world() -> HashTables {
    let mut tables = plain_world();
    tables.spare_lookups();
    tables
}

/// The same without what spares lookups.
pub fn plain_world() -> HashTables {
    let mut tables = HashTables::default();
    let used = backend::flags::USED;
    let resolved = used | backend::flags::RESOLVED;
    let base = Backend {
        address: v4(10, 1, 0, 1),
        source: v4(10, 9, 0, 0),
        next_hop: [2, 0, 0, 0, 1, 1],
        mtu: 0,
        egress_mac: [2, 0, 0, 0, 0, 1],
        vlan: Be16::new(0),
        ifindex: 1,
        flags: resolved,
        mode: backend::mode::IPIP,
        source_bits: 16,
        port: Be16::new(6080),
        service: 0,
    };
    let outer6 = Backend { address: v6(1, 1), source: v6(0, 0), source_bits: 48, ..base };
    let gue = backend::mode::GUE;
    let kinds = [
        base,
        outer6,
        Backend { mode: gue, source_bits: 0, ..base },
        Backend { mode: gue, source_bits: 0, ..outer6 },
        Backend { mtu: MTU, vlan: Be16::new(7), ..base },
        Backend { mtu: MTU, ifindex: EGRESS, ..outer6 },
        Backend { flags: used, ..base },
        Backend { mode: 9, ..base },
        Backend { flags: 0, ..base },
    ];
    // Each service has a backend of each kind, and uses two.
    let index = |service: u32, kind: u32| service * 9 + kind % 9 + 1;
    let slots = |service: u32| {
        let (one, two) = (index(service, service), index(service, service + 1));
        [
            Slot { primary: one, secondary: two },
            Slot { primary: one | TRACKED, secondary: two },
            Slot { primary: one | TRACKED, secondary: two | TRANSITION },
            Slot { primary: NO_BACKEND | TRACKED, secondary: two | TRANSITION },
            Slot::EMPTY,
        ]
    };
    for service in 0..10 {
        let (slot_base, slot_count) = (tables.slots.len() as u32, 5);
        tables.slots.extend(slots(service));
        let protocol = if service < 5 { TCP } else { UDP };
        let seed = [7, 8];
        let view =
            ServiceView { seed, slot_base, slot_count, protocol, udp_timeout_s: 60, ..Default::default() };
        tables.services.insert(service, view);
    }
    for service in 0..10 {
        for (kind, backend) in (0..).zip(kinds) {
            tables.backends.insert(index(service, kind), Backend { service, ..backend });
        }
    }
    for vip in [v4(192, 0, 2, 1), v6(0, 1)] {
        for (port, protocol, service) in
            [(80, TCP, 0), (443, TCP, 1), (8080, TCP, 2), (53, UDP, 5), (443, UDP, 6), (999, UDP, 8)]
        {
            tables.service_index.insert(ServiceKey { vip, port: Be16::new(port), protocol, pad: 0 }, service);
        }
        let mut rest = Vip { any_tcp: 3, any_udp: NO_SERVICE, range_count: 2, ..Vip::EMPTY };
        rest.ranges[0] = PortRange { first: 1_000, last: 1_999, protocol: UDP.into(), service: 7 };
        rest.ranges[1] = PortRange { first: 1_000, last: 1_999, protocol: TCP.into(), service: 4 };
        tables.vips.insert(VipKey { vip }, rest);
    }
    tables
}

/// The IP packet in a frame that was accepted, and what follows it.
fn ip(data: &[u8]) -> &[u8] {
    &data[l2_len(data)..]
}

fn forwarded(before: &[u8], after: &[u8], backend: &Backend) {
    let inner = ip(before);
    let is_ipv6 = inner[0] >> 4 == 6;
    let inner_len =
        usize::from(u16::from_be_bytes(if is_ipv6 { [inner[4], inner[5]] } else { [inner[2], inner[3]] }))
            + if is_ipv6 { 40 } else { 0 };
    let resolved = backend.flags & backend::flags::RESOLVED != 0;
    let sliced = SlicedPacket::from_ethernet(after).expect("another reader takes it");
    assert!(after.ends_with(inner), "the inner packet is untouched");
    let [egress, next_hop] = if resolved { [backend.egress_mac, backend.next_hop] } else { FIB_MACS };
    assert_eq!((&after[..6], &after[6..12]), (&next_hop[..], &egress[..]));
    let tag = backend.vlan.get();
    assert_eq!(sliced.link_exts.len(), usize::from(tag != 0));
    if tag != 0 {
        assert_eq!(after[12..16], [0x81, 0, (tag >> 8) as u8, tag as u8]);
    }
    let tos = if is_ipv6 { inner[0] << 4 | inner[1] >> 4 } else { inner[1] };
    let (outer_payload, protocol) = match sliced.net.expect("IP outside") {
        NetSlice::Ipv4(outer) => {
            let header = outer.header();
            assert!(is_mapped(&backend.address) && header.destination()[..] == backend.address[12..]);
            assert_eq!(sum(header.slice()), 0xffff, "outer checksum");
            assert_eq!((header.slice()[1], header.ttl(), header.dont_fragment()), (tos, 64, true));
            (outer.payload().payload.to_vec(), header.protocol().0)
        }
        NetSlice::Ipv6(outer) => {
            let header = outer.header();
            assert_eq!(header.destination(), backend.address);
            assert_eq!((header.traffic_class(), header.hop_limit()), (tos, 64));
            // As raw bytes: with another protocol inside, etherparse goes on into its headers.
            let start = after.len() - inner.len() - if backend.mode == backend::mode::GUE { 12 } else { 0 };
            assert_eq!(usize::from(header.payload_length()), after.len() - start - (inner.len() - inner_len));
            (after[start..start + usize::from(header.payload_length())].to_vec(), header.next_header().0)
        }
        NetSlice::Arp(_) => panic!("ARP outside"),
    };
    let inner_protocol = if is_ipv6 { 41 } else { 4 };
    if backend.mode == backend::mode::GUE {
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("UDP outside") };
        assert_eq!((udp.destination_port(), udp.checksum(), protocol), (6080, 0, 17));
        assert!(udp.source_port() >= 0xc000);
        assert_eq!(udp.payload()[..4], [0, inner_protocol, 0, 0]);
        assert_eq!(&udp.payload()[4..], &inner[..inner_len]);
    } else {
        assert_eq!(protocol, inner_protocol);
        assert_eq!(outer_payload, &inner[..inner_len]);
    }
}

fn answered(before: &[u8], after: &[u8]) {
    let original = ip(before);
    let sliced = SlicedPacket::from_ethernet(after).expect("another reader takes it");
    assert_eq!((&after[..6], &after[6..12]), (&before[6..12], &before[..6]), "back to its sender");
    let tags = before.len() - 12 - original.len();
    assert_eq!(after[12..12 + tags], before[12..12 + tags], "same tags, same type");
    let error = match sliced.net.expect("IP") {
        NetSlice::Ipv4(outer) => {
            let header = outer.header();
            assert_eq!(sum(header.slice()), 0xffff);
            assert_eq!(
                (&header.source()[..], &header.destination()[..]),
                (&original[16..20], &original[12..16])
            );
            let error = outer.payload().payload;
            assert_eq!((sum(error), &error[..6]), (0xffff, &[3, 4, error[2], error[3], 0, 0][..]));
            error
        }
        NetSlice::Ipv6(outer) => {
            let header = outer.header();
            assert_eq!(
                (&header.source()[..], &header.destination()[..]),
                (&original[24..40], &original[8..24])
            );
            let error = outer.payload().payload;
            let len = (error.len() as u32).to_be_bytes();
            let pseudo =
                [&header.source()[..], &header.destination()[..], &len, &[0, 0, 0, 58], error].concat();
            assert_eq!((sum(&pseudo), &error[..2]), (0xffff, &[2, 0][..]));
            error
        }
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let mtu = u16::from_be_bytes([error[6], error[7]]);
    assert!((original.len() as u16) > mtu && mtu < 1_500, "an MTU that helps");
    assert!(original.starts_with(&error[8..]) && error.len() > 8 + 28, "quotes the packet");
}

/// The same message back: addresses swapped, TTL 64, another type, and a checksum that is as right as the
/// request's was.
fn echoed(before: &[u8], after: &[u8]) {
    let l2_len = l2_len(before);
    let is_ipv6 = before[l2_len] >> 4 == 6;
    let (source, len, ttl, l4) = if is_ipv6 {
        (l2_len + 8, 16, l2_len + 7, l2_len + 40)
    } else {
        (l2_len + 12, 4, l2_len + 8, l2_len + 20)
    };
    let sum_of_header = |frame: &[u8]| if is_ipv6 { 0 } else { sum(&frame[l2_len..l4]) };
    if sum_of_header(before) == 0xffff {
        assert_eq!(sum_of_header(after), 0xffff);
    }
    let mut back = before.to_vec();
    back[..6].copy_from_slice(&before[6..12]);
    back[6..12].copy_from_slice(&before[..6]);
    back[source..source + len].copy_from_slice(&before[source + len..source + 2 * len]);
    back[source + len..source + 2 * len].copy_from_slice(&before[source..source + len]);
    back[ttl] = 64;
    back[l4] = if is_ipv6 { 129 } else { 0 };
    // Each sum covers a whole number of words, and only one word changed.
    let words = |frame: &[u8]| frame[l4..l4 + 4].to_vec();
    assert_eq!(
        sum(&words(before)) % 0xffff,
        sum(&words(after)) % 0xffff,
        "the checksum makes up for the type"
    );
    back[l4 + 2..l4 + 4].copy_from_slice(&after[l4 + 2..l4 + 4]);
    if !is_ipv6 {
        back[l2_len + 10..l2_len + 12].copy_from_slice(&after[l2_len + 10..l2_len + 12]);
    }
    assert!(back == after, "nothing else changed");
}
