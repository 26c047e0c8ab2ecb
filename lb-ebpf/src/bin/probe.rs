//! Health probes on the way of traffic, on an ingress host's interfaces (tc): `probe_out` sends a marked probe as the
//! XDP program would send a client's packet, `probe_in` makes the answer one that the probe's socket knows.
//!
//! lbd's socket is connected to the backend's own address, so that routes and neighbours are those of the tunnel, no
//! rule or route is needed, and the VIP may be an address of this host. On its way out the packet gets the VIP as its
//! destination, and the outer headers with the backend as theirs; the answer comes from the VIP straight to this
//! host and gets the backend as its source, before the stack would take it for a forgery.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the classifier attribute adds undocumented functions")]

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    macros::{classifier, map},
    maps::{HashMap, LruHashMap},
    programs::TcContext,
};
use lb_common::{
    Address, Be16,
    backend::mode,
    limits, mapped,
    probe::{MARK, MARK_BITS, ProbeKey, ProbeTunnel},
};
use lb_ebpf::{
    forward::GUE_OVERHEAD,
    packet::{
        csum,
        wire::{Gue, Ipv4, Ipv6, Udp},
    },
};

#[map]
static PROBE_TUNNELS: HashMap<u32, ProbeTunnel> = HashMap::with_max_entries(limits::BACKENDS, 0);
#[map]
static PROBES: LruHashMap<ProbeKey, Address> = LruHashMap::with_max_entries(limits::PROBES, 0);

/// Whoever comes next decides (TCX_NEXT, and what a classifier without an opinion says).
const NEXT: i32 = -1;
const DROP: i32 = 2;
const ETHERNET: usize = 14;
const IPV4: u32 = 0x0800;
const IPV6: u32 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const CHECK_OFFSET: usize = 16;
const TTL: u8 = 64;

/// What both programs look at.
struct Seen {
    is_ipv6: bool,
    source: [u32; 4],
    destination: [u32; 4],
    ports: [u16; 2],
    /// Length of the IP packet.
    len: u16,
    tos: u8,
}

#[inline(always)]
fn see(ctx: &TcContext) -> Option<Seen> {
    // SAFETY: the context is valid for as long as the program runs.
    let protocol = u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16);
    let ipv4_words = |address: u32| [0, 0, 0xffff_u32.to_be(), address];
    match u32::from(protocol) {
        IPV4 => {
            let ip: Ipv4 = ctx.load(ETHERNET).ok()?;
            let is_first = u16::from_be(ip.fragment) & 0x3fff == 0;
            if ip.version_len != 0x45 || ip.protocol != TCP || !is_first {
                return None;
            }
            Some(Seen {
                is_ipv6: false,
                source: ipv4_words(ip.source),
                destination: ipv4_words(ip.destination),
                ports: ctx.load(ETHERNET + 20).ok()?,
                len: u16::from_be(ip.total_len),
                tos: ip.tos,
            })
        }
        IPV6 => {
            let ip: Ipv6 = ctx.load(ETHERNET).ok()?;
            if ip.next != TCP {
                return None;
            }
            Some(Seen {
                is_ipv6: true,
                source: ip.source,
                destination: ip.destination,
                ports: ctx.load(ETHERNET + 40).ok()?,
                len: u16::from_be(ip.payload_len) + 40,
                tos: (u32::from_be(ip.version_class_label) >> 20) as u8,
            })
        }
        _ => None,
    }
}

#[inline(always)]
fn bytes(words: [u32; 4]) -> Address {
    // SAFETY: integers of the same size, and every pattern is a value.
    unsafe { core::mem::transmute(words) }
}

#[inline(always)]
fn words(address: &Address) -> [u32; 4] {
    // SAFETY: as above.
    unsafe { core::mem::transmute(*address) }
}

/// Changes an address, and both checksums that it is in. `at`: its place within the IP header.
#[inline(always)]
fn readdress(ctx: &TcContext, is_ipv6: bool, at: usize, old: [u32; 4], new: [u32; 4]) -> Option<()> {
    let pseudo = u64::from(BPF_F_PSEUDO_HDR) | 4;
    if is_ipv6 {
        let mut i = 0;
        while i < 4 {
            ctx.l4_csum_replace(ETHERNET + 40 + CHECK_OFFSET, old[i].into(), new[i].into(), pseudo).ok()?;
            i += 1;
        }
        ctx.store(ETHERNET + at, &new, 0).ok()
    } else {
        ctx.l4_csum_replace(ETHERNET + 20 + CHECK_OFFSET, old[3].into(), new[3].into(), pseudo).ok()?;
        ctx.l3_csum_replace(ETHERNET + 10, old[3].into(), new[3].into(), 4).ok()?;
        ctx.store(ETHERNET + at, &new[3], 0).ok()
    }
}

/// Sends marked probes as clients' packets are sent.
#[classifier]
pub fn probe_out(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs.
    let mark = unsafe { (*ctx.skb.skb).mark };
    if mark >> MARK_BITS != MARK >> MARK_BITS {
        return NEXT;
    }
    // SAFETY: entries are only replaced whole, by lbd, before it makes the probe.
    let Some(way) = (unsafe { PROBE_TUNNELS.get(&mark) }).copied() else { return NEXT };
    // A probe that cannot take the tunnel must not be answered by another way.
    send(&ctx, &way).map_or(DROP, |()| NEXT)
}

#[inline(always)]
fn send(ctx: &TcContext, way: &ProbeTunnel) -> Option<()> {
    let seen = see(ctx)?;
    let vip = words(&way.vip);
    let (local, backend) = (bytes(seen.source), bytes(seen.destination));
    let [local_port, port] = seen.ports.map(|p| Be16::from_bytes(p.to_ne_bytes()));
    PROBES.insert(&ProbeKey { vip: way.vip, local, port, local_port }, &backend, 0).ok()?;
    readdress(ctx, seen.is_ipv6, if seen.is_ipv6 { 24 } else { 16 }, seen.destination, vip)?;
    match way.mode {
        mode::L2 => Some(()),
        mode::GUE => wrap(ctx, &seen, Some(way.gue_port)),
        _ => wrap(ctx, &seen, None),
    }
}

/// Outer headers of `ipip`, or of `gue` to a port. Families inside and outside are the same.
#[inline(always)]
fn wrap(ctx: &TcContext, seen: &Seen, gue: Option<Be16>) -> Option<()> {
    let more = if gue.is_some() { GUE_OVERHEAD as u16 } else { 0 };
    let inner = if seen.is_ipv6 { 41 } else { 4 };
    let protocol = if gue.is_some() { UDP } else { inner };
    let ip = if seen.is_ipv6 { 40 } else { 20 };
    let l3 = if seen.is_ipv6 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 };
    let l4 = if gue.is_some() { BPF_F_ADJ_ROOM_ENCAP_L4_UDP } else { 0 };
    ctx.adjust_room(i32::from(ip + more), BPF_ADJ_ROOM_MAC, u64::from(l3 | l4)).ok()?;
    if seen.is_ipv6 {
        let header = Ipv6 {
            version_class_label: (6 << 28 | u32::from(seen.tos) << 20).to_be(),
            payload_len: (seen.len + more).to_be(),
            next: protocol,
            hop_limit: TTL,
            source: seen.source,
            destination: seen.destination,
        };
        ctx.store(ETHERNET, &header, 0).ok()?;
    } else {
        let total_len = seen.len + more + 20;
        let (source, destination) = (seen.source[3], seen.destination[3]);
        let sum = 0x4500
            + u64::from(seen.tos)
            + u64::from(total_len)
            + 0x4000
            + (u64::from(TTL) << 8 | u64::from(protocol))
            + u64::from(u32::from_be(source))
            + u64::from(u32::from_be(destination));
        let header = Ipv4 {
            version_len: 0x45,
            tos: seen.tos,
            total_len: total_len.to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: TTL,
            protocol,
            check: csum::finish(sum).to_be(),
            source,
            destination,
        };
        ctx.store(ETHERNET, &header, 0).ok()?;
    }
    let Some(port) = gue else { return Some(()) };
    let udp = Udp {
        source_port: (0xc000 | (u16::from_be(seen.ports[0]) & 0x3fff)).to_be(),
        port: u16::from_ne_bytes(port.to_bytes()),
        len: (seen.len + more).to_be(),
        check: 0,
    };
    let gue = Gue { variant_control_len: 0, protocol: inner, flags: 0 };
    if seen.is_ipv6 {
        ctx.store(ETHERNET + 40, &udp, 0).ok()?;
        ctx.store(ETHERNET + 48, &gue, 0).ok()
    } else {
        ctx.store(ETHERNET + 20, &udp, 0).ok()?;
        ctx.store(ETHERNET + 28, &gue, 0).ok()
    }
}

/// Brings answers to probes back to their sockets.
#[classifier]
pub fn probe_in(ctx: TcContext) -> i32 {
    let Some(seen) = see(&ctx) else { return NEXT };
    let [port, local_port] = seen.ports.map(|p| Be16::from_bytes(p.to_ne_bytes()));
    let key = ProbeKey { vip: bytes(seen.source), local: bytes(seen.destination), port, local_port };
    // SAFETY: copied at once; a probe's backend does not change while its packets are under way.
    if let Some(backend) = (unsafe { PROBES.get(&key) }).copied() {
        // If this fails the packet stays the VIP's, for which no socket waits.
        let _ =
            readdress(&ctx, seen.is_ipv6, if seen.is_ipv6 { 8 } else { 12 }, seen.source, words(&backend));
    }
    NEXT
}

// The address of an IPv4 packet as `see` builds it is the mapped one that maps are keyed by.
const _: () = assert!(mapped([1, 2, 3, 4])[10] == 0xff && mapped([1, 2, 3, 4])[11] == 0xff);

lb_ebpf::object!();
