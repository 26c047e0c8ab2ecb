//! Compile-time proof that both targets lay out the map types alike.

use crate::{
    backend::Backend,
    exact,
    flow::*,
    fragment::{Fragment, FragmentKey},
    guard::{GuardKey, GuardState, Lengths},
    load::Load,
    nat::*,
    passive::PassiveFailures,
    probe::*,
    quic::{QuicConfig, ServerIdKey},
    rate_limit::{RateLimiter, SourceKey, WriteBudget},
    reply::ReplyHop,
    service::*,
    settings::*,
    slot::{Line, Slot},
    stats::*,
};
use core::mem::{align_of, offset_of, size_of};

macro_rules! layout {
    ($($ty:ty: $size:literal / $align:literal { $($field:ident @ $offset:literal),* };)+) => { $(
        const _: () = assert!(size_of::<$ty>() == $size && align_of::<$ty>() == $align);
        $(const _: () = assert!(offset_of!($ty, $field) == $offset);)*
    )+ };
}

layout! {
    ServiceKey: 20 / 1 { vip @ 0, port @ 16, protocol @ 18 };
    VipKey: 16 / 1 { vip @ 0 };
    PortRange: 12 / 4 { first @ 0, last @ 2, protocol @ 4, service @ 8 };
    Vip: 208 / 4 { any_tcp @ 0, any_udp @ 4, range_count @ 8, ranges @ 16 };
    ServiceView: 120 / 8 { seed @ 0, slot_base @ 16, slot_count @ 20, flags @ 24, scheduler @ 28, udp_timeout_s @ 32,
        old_seed @ 40, old_count @ 56, list_count @ 60, load_cap @ 64, record_factor @ 68,
        flow_interval_ns @ 72, source_bits @ 104, tcp_timeout_s @ 112 };
    Service: 256 / 8 { active @ 0, used @ 4, views @ 8 };
    exact::Entry: 32 / 8 { vip @ 0, port_and_service @ 16 };
    exact::ExactLine: 64 / 8 { entries @ 0 };
    Slot: 8 / 8 { primary @ 0, secondary @ 4 };
    Line: 64 / 8 { words @ 0 };
    Backend: 64 / 8 { address @ 0, source @ 16, next_hop @ 32, mtu @ 38, egress_mac @ 40, vlan @ 46,
        ifindex @ 48, flags @ 52, mode @ 56, source_bits @ 57, port @ 58, service @ 60 };
    FragmentKey: 40 / 4 { source @ 0, destination @ 16, id @ 32, protocol @ 36 };
    Fragment: 64 / 8 { hash @ 0, backend @ 8, service @ 12, seen_s @ 16, flags @ 20, count @ 24, parts @ 32 };
    QuicConfig: 180 / 4 { server_id_len @ 0, nonce_len @ 1, keyed @ 2, keys @ 4 };
    ServerIdKey: 20 / 4 { service @ 0, id @ 4, len @ 19 };
    ReplyHop: 24 / 8 { next_hop @ 0, egress_mac @ 8, ifindex @ 16 };
    ProbeTunnel: 20 / 1 { vip @ 0, gue_port @ 16, mode @ 18 };
    ProbeKey: 36 / 1 { vip @ 0, local @ 16, port @ 32, local_port @ 34 };
    BackendStats: 24 / 8 { packets @ 0, bytes @ 8, flows @ 16 };
    PassiveFailures: 8 / 8 { unreachable @ 0, refused @ 4 };
    IcmpBudget: 16 / 8 { refilled_ns @ 0, tokens @ 8 };
    GuardKey: 20 / 4 { address @ 0, bits @ 16 };
    Lengths: 272 / 4 { count @ 0, bits @ 8 };
    GuardState: 552 / 8 { active @ 0, v4 @ 4, v6 @ 8 };
    SourceKey: 20 / 4 { source @ 0, service @ 16 };
    RateLimiter: 16 / 4 { second @ 0, count @ 4, until_s @ 8, floods @ 12 };
    WriteBudget: 64 / 4 { syns @ 0, flows @ 16, udp @ 32, full_s @ 48 };
    IngressSettings: 40 / 4 { abi_version @ 0, ipv6 @ 4, icmp_per_s @ 8, icmp_burst @ 12, features @ 16,
        nat_first @ 20, nat_last @ 22, syns_per_s @ 24, flows_per_s @ 28, udp_per_s @ 32, kernel @ 36 };
    LastHop: 24 / 4 { macs @ 0, tags @ 12, ifindex @ 20 };
    ReplyKey: 40 / 4 { worker @ 0, source @ 16, port @ 32, source_port @ 34, protocol @ 36 };
    Embryonic: 48 / 4 { key @ 0, client @ 40 };
    Load: 32 / 8 { report @ 0, added @ 8, cost @ 16, source @ 20 };
    DecapSettings: 12 / 4 { abi_version @ 0, gue_port @ 4, ipv6 @ 6, vlan @ 7, kernel @ 8 };
}

#[cfg(not(feature = "other-abi"))]
layout! {
    FlowKey: 24 / 4 { source @ 0, source_port @ 16, port @ 18, service @ 20 };
    Flow: 16 / 4 { backend @ 0, last_seen_s @ 4, created_s @ 8, flags @ 12 };
    Nat: 76 / 4 { source @ 0, worker @ 16, source_port @ 32, port @ 34, backend @ 36, created_s @ 40,
        last_seen_s @ 44, flags @ 48, hop @ 52 };
    Reply: 72 / 4 { flow @ 0, vip @ 24, hop @ 40, last_seen_s @ 64, flags @ 68 };
}
