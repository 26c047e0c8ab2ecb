//! The stages of an ingress host that keep state or read ids: translation and QUIC.
//!
//! Promises: a packet that is passed is unchanged; each packet is sent on, answered, or has exactly one reason; an
//! entry of one side of a translated flow belongs to one of the other; nothing that a packet says moves another's flow.

use super::{ingress, v4, v6};
use lb_common::{
    Backend, Reason, ServiceKey, ServiceView, Slot, Vip, VipKey, backend,
    quic::{QuicConfig, ServerIdKey, config_key},
    reason::Fate,
    service::{self, TCP, UDP},
    settings::IngressSettings,
};
use lb_ebpf::{
    Verdict,
    native::{self, HashTables, VecFrame},
    packet::verdict::Outcome,
};

/// Port of the services that are translated, of both protocols.
pub const NAT_PORT: u16 = 8_081;
/// Port of those that are routed by connection id.
pub const QUIC_PORT: u16 = 8_443;
/// Port of those whose packets name other backends.
pub const CHAIN_PORT: u16 = 8_082;
/// Port of those without a backend whose clients are answered, of both protocols.
pub const REJECT_PORT: u16 = 8_083;
const FIRST_SERVICE: u32 = 10;
const FIRST_BACKEND: u32 = 91;

/// The ingress world with one of each more, on both VIPs.
pub fn world() -> HashTables {
    let mut tables = ingress::world();
    let mut next = (FIRST_SERVICE, FIRST_BACKEND);
    for (vip, is_ipv6) in [(v4(192, 0, 2, 1), false), (v6(0, 1), true)] {
        for (port, protocol, flags, mode) in [
            (NAT_PORT, TCP, service::flags::NAT, backend::mode::NAT),
            (NAT_PORT, UDP, service::flags::NAT, backend::mode::NAT),
            (QUIC_PORT, UDP, service::flags::QUIC, backend::mode::GUE),
            (CHAIN_PORT, TCP, service::flags::SECOND_CHANCE, backend::mode::GUE_CHAIN),
            (REJECT_PORT, TCP, service::flags::REJECT, backend::mode::IPIP),
            (REJECT_PORT, UDP, service::flags::REJECT, backend::mode::IPIP),
        ] {
            let (service, first) = next;
            next = (service + 1, first + 2);
            for (i, index) in (first..first + 2).enumerate() {
                let number = 101 + (index - FIRST_BACKEND) as u8;
                let entry = Backend {
                    address: if is_ipv6 { v6(1, number) } else { v4(10, 1, 0, number) },
                    source: if is_ipv6 { v6(9, 1) } else { v4(10, 9, 0, 1) },
                    next_hop: [2, 0, 0, 0, 1, number],
                    mtu: 0,
                    egress_mac: [2, 0, 0, 0, 0, 1],
                    vlan: lb_common::Be16::new(0),
                    ifindex: if i == 0 { 1 } else { ingress::EGRESS },
                    flags: backend::flags::USED | backend::flags::RESOLVED,
                    mode,
                    source_bits: 0,
                    port: lb_common::Be16::new(if mode == backend::mode::NAT { 8_080 } else { 6_080 }),
                    service,
                };
                tables.backends.insert(index, entry);
            }
            let slot_base = tables.slots.len() as u32;
            tables.slots.extend(if flags == service::flags::REJECT {
                [Slot::EMPTY; 2]
            } else {
                [Slot { primary: first, secondary: first + 1 }, Slot { primary: first + 1, secondary: first }]
            });
            let view = ServiceView {
                seed: [7, 8],
                slot_base,
                slot_count: 2,
                flags,
                protocol,
                udp_timeout_s: 60,
                ..Default::default()
            };
            tables.services.insert(service, view);
            let key = ServiceKey { vip, port: lb_common::Be16::new(port), protocol, pad: 0 };
            tables.service_index.insert(key, service);
            tables.vips.entry(VipKey { vip }).or_insert(Vip::EMPTY);
            if flags == service::flags::QUIC {
                ids(&mut tables, service, first + 1);
            }
        }
    }
    tables
}

/// Plain ids, one block, and four passes; all known ones are the second backend's.
fn ids(tables: &mut HashTables, service: u32, backend: u32) {
    for (id, server_id_len, nonce_len, keyed) in
        [(0u8, 3u8, 4u8, 0u8), (1, 10, 5, 1), (2, 8, 8, 1), (3, 15, 4, 1)]
    {
        let keys = lb_ebpf::quic::aes::expand([id; 16]);
        let config = QuicConfig { server_id_len, nonce_len, keyed, pad: 0, keys };
        tables.quic_configs.insert(config_key(service, id), config);
    }
    let mut key = ServerIdKey { service, id: [0; 15], len: 3 };
    key.id[..3].copy_from_slice(&[0xc4, 0x60, 0x5e]);
    tables.quic_servers.insert(key, backend);
}

/// Checks one frame against tables that others have gone through before.
pub fn check_in(tables: &HashTables, data: &[u8]) {
    let before = (ends(tables) + tables.packets() + tables.counted(Reason::NatReply), tables.nats());
    let mut frame = VecFrame::new(data).with_fib(ingress::fib);
    let (verdict, outcome) = native::run(&mut frame, tables, &IngressSettings::DEFAULT);
    let after = frame.bytes();
    super::is_taken_for_what_it_is(tables, data, outcome);
    match outcome {
        Outcome::Not(reason) if reason != Reason::NatError && reason.fate() == Fate::Pass => {
            assert_eq!(verdict, Verdict::Pass);
            assert!(after == data && frame.adjusts().is_empty(), "{reason:?}: changed");
        }
        Outcome::Forwarded { .. } | Outcome::Returned { .. } => {
            assert!(matches!(verdict, Verdict::Transmit | Verdict::Redirect(_)), "{verdict:?}");
        }
        Outcome::Not(_) => {}
    }
    let now = ends(tables) + tables.packets() + tables.counted(Reason::NatReply);
    assert!(now - before.0 <= 1, "more than one end: {:?}", tables.counts());
    pairs(tables);
    moved(&before.1, tables);
}

/// Checks one frame alone.
pub fn check(data: &[u8]) {
    check_in(&world(), data);
}

fn ends(tables: &HashTables) -> u64 {
    tables.counts().iter().filter(|(r, _)| r.fate() != Fate::Note).map(|(_, n)| n).sum()
}

/// Each client's entry has its other half.
fn pairs(tables: &HashTables) {
    let replies = tables.replies();
    for (key, nat) in tables.nats() {
        let has = replies.iter().any(|(reply_key, reply)| {
            reply.flow == key && (reply_key.source_port, reply_key.worker) == (nat.source_port, nat.worker)
        });
        assert!(has, "{key:?} has no way back");
    }
}

/// A packet changes at most the one flow that it belongs to: no more than one goes, comes, or has another worker.
fn moved(before: &[(lb_common::FlowKey, lb_common::Nat)], tables: &HashTables) {
    let now: std::collections::BTreeMap<_, _> = tables.nats().into_iter().collect();
    let place = |nat: &lb_common::Nat| (nat.worker, nat.port, nat.source, nat.source_port);
    let gone = before.iter().filter(|(key, nat)| now.get(key).map(place) != Some(place(nat))).count();
    let come = now.len() as i64 - before.len() as i64;
    assert!(gone <= 1 && come <= 1, "{gone} changed, {come} more");
}
