//! Deny and allow lists, limits of new flows, and floods against the flow tables, on the loaded program.

use ipnet::IpNet;
use lb_common::{
    Address, Backend, Be16, Flow, FlowKey, Reason, Service, ServiceKey, ServiceView,
    backend::{flags as backend_flags, mode},
    guard::verdict,
    mapped, names,
    service::{TCP, UDP, flags, scheduler},
    settings::{IngressSettings, features},
};
use lb_userspace::{desired::model::guard::parse, plan::compile::guard::GuardTable};
use std::net::{IpAddr, Ipv6Addr};
use test_packet::{Ingress, Packet, Pair, bed, now_s, xdp};

const VIP4: Address = mapped([192, 0, 2, 1]);
const VIP6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Indices of the TCP and the UDP service.
const WEB: u32 = 1;
const DNS: u32 = 2;

fn address(text: &str) -> Address {
    match text.parse().expect("an address") {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn is_v4(address: &Address) -> bool {
    Ipv6Addr::from(*address).to_ipv4_mapped().is_some()
}

fn backend(index: u32, service: u32) -> Backend {
    Backend {
        address: mapped([10, 1, 0, index as u8]),
        source: mapped([10, 9, 0, 0]),
        next_hop: [2, 0, 0, 0, 1, index as u8],
        mtu: 0,
        egress_mac: [2, 0, 0, 0, 0, 1],
        vlan: Be16::new(0),
        ifindex: bed::INGRESS,
        flags: backend_flags::USED | backend_flags::RESOLVED,
        mode: mode::IPIP,
        source_bits: 16,
        port: Be16::new(6080),
        service,
    }
}

fn backend_v6(index: u32, service: u32) -> Backend {
    let mut address = VIP6;
    (address[5], address[15]) = (1, index as u8);
    Backend { address, source: VIP6, source_bits: 0, ..backend(index, service) }
}

/// A program with a TCP service on port 80 and a UDP service on port 53, of both VIPs, and all slots like `pair`.
fn load(settings: IngressSettings, flows: u32, view: ServiceView, pair: Pair) -> Ingress {
    bed::enter();
    let mut ingress = Ingress::load_sized(settings, 0, flows).expect("the program loads");
    for (vip, base) in [(VIP4, 0), (VIP6, 10)] {
        for (index, port, protocol) in [(WEB, 80, TCP), (DNS, 53, UDP)] {
            let key = ServiceKey { vip, port: Be16::new(port), protocol, pad: 0 };
            ingress.service(index + base, key, &[pair], view);
        }
    }
    // Backends belong to one service each; the pair's are those of the TCP service.
    for index in 1..=3 {
        ingress.backend(index, backend(index, WEB));
        ingress.backend(index + 10, backend_v6(index, WEB + 10));
    }
    ingress
}

/// Gives a service's slots another pair.
fn serve(
    ingress: &mut Ingress,
    index: u32,
    port: u16,
    protocol: u8,
    vip: Address,
    pair: Pair,
    view: ServiceView,
) {
    let key = ServiceKey { vip, port: Be16::new(port), protocol, pad: 0 };
    ingress.service(index, key, &[pair], view);
}

fn tcp(source: Address, port: u16, tcp_flags: u8) -> Packet {
    let vip = if is_v4(&source) { VIP4 } else { VIP6 };
    Packet { flags: tcp_flags, ..Packet::new(TCP, (source, port), (vip, 80)) }
}

fn udp(source: Address, port: u16) -> Packet {
    Packet::new(UDP, (source, port), (VIP4, 53))
}

fn verdict_of(ingress: &Ingress, packet: &Packet) -> u32 {
    ingress.run(&packet.bytes()).expect("runs").verdict
}

fn net(text: &str) -> IpNet {
    parse(text).expect("a prefix")
}

fn default() -> (IngressSettings, ServiceView) {
    (IngressSettings::DEFAULT, Ingress::view())
}

#[test]
fn lists_decide_by_the_longest_prefix() {
    let (settings, view) = default();
    let mut ingress = load(settings, 64, view, Pair::Stable(1));
    serve(&mut ingress, WEB + 10, 80, TCP, VIP6, Pair::Stable(11), view);
    let lists = [
        ("10.0.0.0/8", "deny"),
        ("10.1.0.0/16", "allow"),
        ("10.1.2.0/24", "deny"),
        ("10.1.2.128/25", "allow"),
        ("10.1.2.200", "deny"),
        ("198.51.100.7", "deny"),
        ("203.0.113.0/30", "deny"),
        ("2001:db8:a::/48", "deny"),
        ("2001:db8:a:1::/64", "allow"),
        ("2001:db8:a:1::9", "deny"),
        ("3000::/5", "deny"),
        ("3fff::/20", "allow"),
        ("2002::/16", "deny"),
        ("2001:db8:b:8000::/49", "deny"),
    ];
    ingress.guard(lists.map(|(text, list)| (net(text), list)));
    for (source, dropped) in [
        ("9.255.255.255", false),
        ("10.0.0.0", true),
        ("10.255.255.255", true),
        ("11.0.0.0", false),
        ("10.1.0.1", false),
        ("10.1.2.1", true),
        ("10.1.2.127", true),
        ("10.1.2.128", false),
        ("10.1.2.199", false),
        ("10.1.2.200", true),
        ("10.1.2.201", false),
        ("198.51.100.6", false),
        ("198.51.100.7", true),
        ("198.51.100.8", false),
        ("203.0.113.3", true),
        ("203.0.113.4", false),
        ("2001:db8:a::1", true),
        ("2001:db8:a:1::1", false),
        ("2001:db8:a:1::9", true),
        ("2001:db8:a:2::9", true),
        ("2001:db8:b::9", false),
        ("2001:db8:b:7fff::9", false),
        ("2001:db8:b:8000::9", true),
        ("2002:1::1", true),
        ("2003:1::1", false),
        ("3000::1", true),
        ("37ff::1", true),
        ("3800::1", false),
        ("3fff:1::1", false),
    ] {
        for (what, tcp_flags) in [("SYN", SYN), ("established", ACK)] {
            let verdict = verdict_of(&ingress, &tcp(address(source), 40_000, tcp_flags));
            assert_eq!(verdict, if dropped { xdp::DROP } else { xdp::TX }, "{what} of {source}");
        }
    }
    let denied = ingress.count(Reason::GuardDenied);
    assert_eq!(denied, 2 * 14);
    // What is for the host is not looked at; what is for a port of the VIP that nobody serves is.
    let mut packet = tcp(address("10.0.0.1"), 40_000, SYN);
    packet.destination.0 = mapped([192, 0, 2, 9]);
    assert_eq!(verdict_of(&ingress, &packet), xdp::PASS);
    packet.destination = (VIP4, 22);
    assert_eq!(verdict_of(&ingress, &packet), xdp::DROP);
    assert_eq!(ingress.count(Reason::GuardDenied), denied + 1);
}

#[test]
fn every_way_to_a_service_is_guarded() {
    let (settings, view) = default();
    let mut ingress = load(settings, 64, view, Pair::Stable(1));
    ingress.backend(4, backend(4, DNS));
    serve(&mut ingress, DNS, 53, UDP, VIP4, Pair::Stable(4), view);
    ingress.guard([(net("198.51.100.0/24"), "deny")]);
    let (denied, other) = (address("198.51.100.7"), address("198.51.101.7"));
    let echo = |source: Address| {
        let mut packet = Packet::new(1, (source, 0), (VIP4, 0));
        // An ICMP echo request: type, code, checksum, id, number.
        packet.payload = vec![8, 0, 0xf7, 0xfe, 0, 1, 0, 0];
        packet.around(1)
    };
    let dropped = |ingress: &mut Ingress, bytes: &[u8]| {
        let before = ingress.count(Reason::GuardDenied);
        let verdict = ingress.run(bytes).expect("runs").verdict;
        let counted = ingress.count(Reason::GuardDenied) - before;
        assert_eq!(
            verdict == xdp::DROP,
            counted == 1,
            "verdict {verdict}, counted {counted}: {:?}",
            ingress.counts()
        );
        counted == 1
    };
    for (source, expected) in [(denied, true), (other, false)] {
        assert_eq!(dropped(&mut ingress, &echo(source)), expected);
        // A first fragment: more fragments follow.
        let mut bytes = Packet { payload: vec![0; 16], ..udp(source, 40_000) }.bytes();
        bytes[20] = 0x20;
        bytes[24..26].fill(0);
        let check = test_packet::checksum(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&check.to_be_bytes());
        assert_eq!(dropped(&mut ingress, &bytes), expected);
    }
}

#[test]
fn without_the_feature_nothing_is_asked() {
    let (settings, view) = default();
    let settings =
        IngressSettings { features: features::ALL & !(features::GUARD | features::RATE), ..settings };
    let limited = ServiceView { flags: flags::LIMIT_FLOWS, flow_interval_ns: u64::MAX / 4, ..view };
    let mut ingress = load(settings, 64, limited, Pair::Stable(1));
    ingress.guard([(net("0.0.0.0/0"), "deny")]);
    for _ in 0..5 {
        assert_eq!(verdict_of(&ingress, &tcp(address("198.51.100.7"), 40_000, SYN)), xdp::TX);
    }
    assert_eq!(ingress.counts(), []);
    let all = load(IngressSettings::DEFAULT, 64, view, Pair::Stable(1));
    let size = |ingress: &Ingress| ingress.program().info().expect("loaded").size_jitted();
    assert!(size(&ingress) < size(&all), "what is switched off is not there");
}

/// Prefixes of all lengths, dense enough that they lie within each other, against a plain search.
#[test]
fn random_lists_say_what_a_plain_search_does() {
    let (settings, view) = default();
    let mut ingress = load(settings, 64, view, Pair::Stable(1));
    serve(&mut ingress, WEB + 10, 80, TCP, VIP6, Pair::Stable(11), view);
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32
    };
    let mut list: Vec<(IpNet, u32)> = Vec::new();
    let mut table = GuardTable::default();
    let mut source = move || -> IpAddr {
        let (a, b) = (random(), random());
        if a % 2 == 0 {
            IpAddr::from([10 + (a >> 8 & 1) as u8, (b & 3) as u8, (b >> 2 & 3) as u8, (b >> 4) as u8])
        } else {
            let group = |shift: u32| (b >> shift & 3) as u16 * 0x5555;
            let low = (a >> 8 & 3) as u16;
            IpAddr::from([0x2001 + (a >> 16 & 1) as u16, group(0), group(2), group(4), group(6), 0, 0, low])
        }
    };
    for i in 0..1_500u32 {
        let address = source();
        let width = if address.is_ipv4() { 33 } else { 129 };
        let bits = (i.wrapping_mul(2_654_435_761) >> 8) % (width - 6) + 6;
        let net = IpNet::new(address, bits as u8).expect("in range").trunc();
        let verdict = if i % 3 == 0 { verdict::ALLOW } else { verdict::DENY };
        list.retain(|(other, _)| *other != net);
        list.push((net, verdict));
        table.set(net, Some(verdict));
        // And some go again.
        if i % 5 == 4 {
            let (gone, _) = list.swap_remove(i as usize * 7 % list.len());
            table.set(gone, None);
        }
    }
    ingress.guard_table(&table);
    let (mut dropped, mut passed) = (0, 0);
    for _ in 0..20_000 {
        let source = source();
        let longest =
            list.iter().filter(|(net, _)| net.contains(&source)).max_by_key(|(net, _)| net.prefix_len());
        let denied = longest.is_some_and(|(_, verdict)| *verdict == verdict::DENY);
        let verdict = verdict_of(&ingress, &tcp(address(&source.to_string()), 40_000, ACK));
        assert_eq!(verdict == xdp::DROP, denied, "{source}: {longest:?}");
        if denied { dropped += 1 } else { passed += 1 }
    }
    assert!(dropped > 2_000 && passed > 2_000, "{dropped} dropped, {passed} passed");
}

/// A limit that earns nothing during a test.
fn limited(kind: u32, burst: u64) -> ServiceView {
    let hour_ns = 3_600_000_000_000;
    ServiceView {
        flags: kind,
        flow_interval_ns: hour_ns,
        flow_tolerance_ns: hour_ns * (burst - 1),
        source_interval_ns: hour_ns,
        source_tolerance_ns: hour_ns * (burst - 1),
        source_bits: [24, 64],
        ..Ingress::view()
    }
}

#[test]
fn a_source_gets_its_share_of_new_flows() {
    let view = limited(flags::LIMIT_SOURCES, 3);
    let mut ingress = load(IngressSettings::DEFAULT, 64, view, Pair::Stable(1));
    serve(&mut ingress, WEB + 10, 80, TCP, VIP6, Pair::Stable(11), view);
    let syns = |ingress: &Ingress, source: &str| {
        (0..10).filter(|i| verdict_of(ingress, &tcp(address(source), 40_000 + i, SYN)) == xdp::TX).count()
    };
    assert_eq!(syns(&ingress, "198.51.100.7"), 3);
    // Of the same prefix; another; and one of IPv6.
    assert_eq!(syns(&ingress, "198.51.100.9"), 0);
    assert_eq!(syns(&ingress, "198.51.101.9"), 3);
    assert_eq!(syns(&ingress, "2001:db8:1:2::1"), 3);
    assert_eq!(syns(&ingress, "2001:db8:1:2:ffff::1"), 0);
    assert_eq!(syns(&ingress, "2001:db8:1:3::1"), 3);
    assert_eq!(ingress.count(Reason::RateSource), 7 + 10 + 7 + 7 + 10 + 7);
    assert_eq!(ingress.sources().len(), 4);
    // What is established is not counted.
    for _ in 0..50 {
        assert_eq!(verdict_of(&ingress, &tcp(address("198.51.100.7"), 40_000, ACK)), xdp::TX);
    }
}

#[test]
fn a_service_gets_its_share_of_new_flows() {
    let view = limited(flags::LIMIT_FLOWS, 5);
    let mut ingress = load(IngressSettings::DEFAULT, 64, view, Pair::Stable(1));
    ingress.backend(4, backend(4, DNS));
    serve(&mut ingress, DNS, 53, UDP, VIP4, Pair::Stable(4), view);
    let source = |i: u16| mapped([198, 51, (i >> 8) as u8, i as u8]);
    let syns = (0..20).filter(|i| verdict_of(&ingress, &tcp(source(*i), 40_000, SYN)) == xdp::TX).count();
    assert_eq!((syns, ingress.count(Reason::RateService)), (5, 15));
    let datagrams = (0..20).filter(|i| verdict_of(&ingress, &udp(source(*i), 40_000)) == xdp::TX).count();
    assert_eq!((datagrams, ingress.count(Reason::RateService)), (5, 30));
    // Those that came through go on.
    for _ in 0..10 {
        assert!((0..5).all(|i| verdict_of(&ingress, &udp(source(i), 40_000)) == xdp::TX));
    }
    assert_eq!(ingress.count(Reason::RateService), 30);
}

/// A change that leaves the table alone leaves both views with the same one: the live one's limits hold.
#[test]
fn the_live_views_limits_hold() {
    let view = limited(flags::LIMIT_FLOWS, 2);
    for (active, expected) in [(0, 10), (1, 2)] {
        let mut ingress = load(IngressSettings::DEFAULT, 64, view, Pair::Stable(1));
        let views = [
            ServiceView { slot_base: WEB * 1_024, slot_count: 251, protocol: TCP, ..Ingress::view() },
            ServiceView { slot_base: WEB * 1_024, slot_count: 251, protocol: TCP, ..view },
        ];
        ingress.set_service(WEB, Service { active, used: 1, views, reserved: [0] });
        let syns = (0..10)
            .filter(|i| verdict_of(&ingress, &tcp(mapped([198, 51, 100, 7]), 40_000 + i, SYN)) == xdp::TX);
        assert_eq!(syns.count(), expected, "view {active}");
    }
}

#[test]
fn sources_share_the_service_only_for_what_they_may() {
    let view = limited(flags::LIMIT_FLOWS | flags::LIMIT_SOURCES, 4);
    let view = ServiceView { flow_tolerance_ns: view.flow_interval_ns * 5, ..view };
    let ingress = load(IngressSettings::DEFAULT, 64, view, Pair::Stable(1));
    let syns = |source: Address| {
        (0..50).filter(|i| verdict_of(&ingress, &tcp(source, 40_000 + i, SYN)) == xdp::TX).count()
    };
    // One takes all it may; of the service's six, two are left for the other.
    assert_eq!((syns(mapped([198, 51, 100, 7])), syns(mapped([198, 51, 101, 7]))), (4, 2));
}

const LIVE: u16 = 1_000;

fn key(service: u32, source: Address, source_port: u16, port: u16) -> FlowKey {
    FlowKey { source, source_port: Be16::new(source_port), port: Be16::new(port), service }
}

/// Sources that nobody live has.
fn forged(i: u32) -> Address {
    mapped((0x5000_0000 + i).to_be_bytes())
}

fn metered(flows: u32) -> IngressSettings {
    let budgets = lb_common::rate_limit::Budgets::of(flows, flows, flows, 1);
    IngressSettings {
        syns_per_s: budgets.syns,
        flows_per_s: budgets.flows,
        udp_per_s: budgets.udp,
        ..IngressSettings::DEFAULT
    }
}

/// A thousand flows on backend 3, where no stateless lookup would send them.
fn live_flows(ingress: &mut Ingress, table: &str, service: u32, port: u16) {
    let now_s = now_s();
    for i in 0..LIVE {
        let flow = Flow { backend: 3, last_seen_s: now_s, created_s: now_s - 60, flags: 0 };
        ingress.set_flow(table, key(service, mapped([198, 51, 100, 7]), 10_000 + i, port), flow);
    }
}

fn are_all_there(ingress: &mut Ingress, table: &str, service: u32, port: u16) {
    for i in 0..LIVE {
        let found = ingress.flow(table, &key(service, mapped([198, 51, 100, 7]), 10_000 + i, port));
        assert_eq!(found.map(|flow| flow.backend), Some(3), "live flow {i}");
    }
}

/// With and without budgets; without, the flood fills the table.
#[test]
fn forged_packets_evict_no_live_tcp_flow() {
    const ROOM: u32 = 4_096;
    for settings in [IngressSettings::DEFAULT, metered(ROOM)] {
        let mut ingress = load(settings, ROOM, Ingress::view(), Pair::Transition(1, 2));
        live_flows(&mut ingress, names::FLOWS, WEB, 80);
        for i in 0..20_000 {
            // An established flow's packet in a transition, and a handshake that nobody answers.
            assert_eq!(verdict_of(&ingress, &tcp(forged(i), 7, ACK)), xdp::TX);
            assert_eq!(verdict_of(&ingress, &tcp(forged(i), 8, SYN)), xdp::TX);
            assert_eq!(verdict_of(&ingress, &tcp(forged(i), 8, ACK)), xdp::TX);
        }
        are_all_there(&mut ingress, names::FLOWS, WEB, 80);
        let before = ingress.stats(3).packets;
        for i in 0..LIVE {
            verdict_of(&ingress, &tcp(mapped([198, 51, 100, 7]), 10_000 + i, ACK));
        }
        assert_eq!(ingress.stats(3).packets - before, u64::from(LIVE));
        assert!(ingress.count(Reason::FlowFlood) > 10_000);
        if settings.flows_per_s != u32::MAX {
            let entries = ingress.flows(names::FLOWS).len();
            assert!(entries < 3_000, "{entries} entries: the budget keeps room");
        }
    }
}

#[test]
fn spoofed_datagrams_evict_no_live_udp_flow() {
    const ROOM: u32 = 4_096;
    for settings in [IngressSettings::DEFAULT, metered(ROOM)] {
        let mut ingress = load(settings, ROOM, Ingress::view(), Pair::Stable(1));
        for index in 1..=3 {
            ingress.backend(index, backend(index, DNS));
        }
        live_flows(&mut ingress, names::UDP_FLOWS, DNS, 53);
        for i in 0..40_000 {
            assert_eq!(verdict_of(&ingress, &udp(forged(i), 7)), xdp::TX);
        }
        are_all_there(&mut ingress, names::UDP_FLOWS, DNS, 53);
        let before = ingress.stats(3).packets;
        for i in 0..LIVE {
            verdict_of(&ingress, &udp(mapped([198, 51, 100, 7]), 10_000 + i));
        }
        assert_eq!(ingress.stats(3).packets - before, u64::from(LIVE));
        if settings.udp_per_s != u32::MAX {
            let entries = ingress.flows(names::UDP_FLOWS).len();
            assert!(entries < 3_000, "{entries} entries: the budget keeps room");
        }
    }
}

/// Under flood, and in a full table, a new flow's first packet goes where its later ones will.
#[test]
fn new_flows_stay_together_under_flood() {
    let by_lot = ServiceView {
        flags: flags::TRACK_ALL,
        scheduler: scheduler::RANDOM,
        list_count: 3,
        ..Ingress::view()
    };
    // No budget at all: each new flow is one too many.
    let settings =
        IngressSettings { syns_per_s: 0, flows_per_s: 0, udp_per_s: 0, ..IngressSettings::DEFAULT };
    // In a transition each later packet is one that may not be recorded.
    for (pair, home, withheld) in [(Pair::Tracked(1), 1, 200), (Pair::Transition(1, 2), 2, 800)] {
        let mut ingress = load(settings, 64, by_lot, pair);
        for i in 0..200 {
            verdict_of(&ingress, &tcp(forged(i), 8, SYN));
            for _ in 0..3 {
                verdict_of(&ingress, &tcp(forged(i), 8, ACK));
            }
        }
        let stats = ingress.stats(home);
        assert_eq!((stats.packets, stats.flows), (800, 200), "backend {home}");
        assert_eq!((ingress.cached_syns(), ingress.flows(names::FLOWS).len()), (0, 0));
        assert_eq!(ingress.count(Reason::FlowFlood), withheld);
    }
}

/// A service whose drain time is short records its flows as much faster; what is not recorded is counted.
#[test]
fn flows_of_a_short_transition_are_recorded_in_time() {
    const PER_S: u32 = 100;
    let settings = IngressSettings { flows_per_s: PER_S, ..IngressSettings::DEFAULT };
    for factor in [0, 1, 16] {
        let view = ServiceView { record_factor: factor, ..Ingress::view() };
        let mut ingress = load(settings, 4_096, view, Pair::Transition(1, 2));
        let began = now_s();
        for i in 0..1_000 {
            assert_eq!(verdict_of(&ingress, &tcp(forged(i), 7, ACK)), xdp::TX);
        }
        // Each second admits as many again.
        let seconds = now_s() - began + 1;
        let most = (PER_S * factor.max(1) * seconds).min(1_000) as usize;
        let recorded = ingress.flows(names::FLOWS).len();
        assert!(recorded <= most && recorded >= most.min(100), "factor {factor}: {recorded} of {most}");
        assert!(factor < 16 || recorded == 1_000, "factor {factor}: {recorded}");
        assert_eq!(ingress.count(Reason::FlowFlood), 1_000 - recorded as u64, "factor {factor}");
    }
}

/// A flood of one service leaves another's new flows alone.
#[test]
fn budgets_are_each_services_own() {
    let settings = metered(65_536);
    let mut ingress = load(settings, 65_536, Ingress::view(), Pair::Stable(1));
    for (index, service) in [(4, DNS), (5, DNS + 1)] {
        ingress.backend(index, backend(index, service));
    }
    serve(&mut ingress, DNS, 53, UDP, VIP4, Pair::Stable(4), Ingress::view());
    serve(&mut ingress, DNS + 1, 54, UDP, VIP4, Pair::Stable(5), Ingress::view());
    for i in 0..5_000 {
        verdict_of(&ingress, &udp(forged(i), 7));
    }
    assert!(ingress.count(Reason::FlowFlood) > 0, "the flood is one");
    let before = ingress.count(Reason::FlowFlood);
    for i in 0..50 {
        let mut packet = udp(mapped([198, 51, 100, 7]), 1_000 + i);
        packet.destination.1 = 54;
        verdict_of(&ingress, &packet);
    }
    let of_other = ingress.flows(names::UDP_FLOWS).iter().filter(|(key, _)| key.service == DNS + 1).count();
    assert_eq!((of_other, ingress.count(Reason::FlowFlood)), (50, before));
}

/// A million entries, most of them single addresses all over IPv4: they fit, each decides, and what a denied packet costs
/// is printed beside the cost with a few.
#[test]
fn a_million_entries() {
    const MOST: u32 = 1_000_000;
    let (settings, view) = default();
    let mut ingress = load(settings, 64, view, Pair::Stable(1));
    let entry = |i: u32| std::net::Ipv4Addr::from(i.wrapping_mul(2_654_435_761));
    for count in [10, MOST] {
        let mut table = GuardTable::default();
        for i in 0..count {
            table.set(IpNet::from(IpAddr::from(entry(i))), Some(verdict::DENY));
        }
        ingress.guard_table(&table);
        let step = (count / 1_000).max(1);
        let mut spent = Vec::new();
        for i in (0..count).step_by(step as usize) {
            let bytes = tcp(mapped(entry(i).octets()), 40_000, ACK).bytes();
            let run = ingress.run_repeatedly(&bytes, 1_000).expect("runs");
            assert_eq!(run.0, xdp::DROP, "{}", entry(i));
            spent.push(run.1.as_nanos() as u64);
        }
        spent.sort_unstable();
        println!("{count} entries: a denied packet takes {} ns (median)", spent[spent.len() / 2]);
        let next = entry(MOST + 7);
        assert_eq!(verdict_of(&ingress, &tcp(mapped(next.octets()), 40_000, ACK)), xdp::TX, "{next}");
        let kib = ingress.memory_of(names::GUARD_ENTRIES).expect("the kernel says") / 1_024;
        println!("{count} entries: {kib} KiB in the hash map");
        assert!(kib < 200 * 1_024, "{kib} KiB");
    }
}
