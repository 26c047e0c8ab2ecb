//! The common packet's way, made short: untagged, no IP options or extension headers, TCP or UDP, to an exact port whose
//! service goes by its table alone, in a slot without exceptions, to a backend whose next hop is known.
//!
//! It decides nothing of its own: each step is what [`crate::packet::parse`], [`crate::select::service`], [`crate::select::choose`] and
//! [`crate::forward`] would do, with all offsets known at compile time, one bounds check for all headers, and nothing
//! written before the last doubt is gone. Whatever is not common gives None, and the long way begins from the
//! start. Tests hold both against each other on any packet and tables.
//!
//! Called by [`crate::ingress::process`].

use crate::{
    Frame, Tables, Verdict,
    forward::{GUE_OVERHEAD, PROTOCOL_IPV4, PROTOCOL_IPV6},
    guard::martian,
    nat,
    packet::{
        Window, csum,
        parse::{ETH_IPV4, ETH_IPV6, ETHERNET, tcp},
        verdict::{Outcome, refuse},
    },
    select::{
        hash::{flow_hash_v4, flow_hash_v6, ports_word, slot_of},
        service::lookup_exact,
    },
};
use lb_common::{
    Backend, Reason, ServiceView,
    backend::{self, mode},
    exact,
    names::stage,
    service::{TCP, UDP, flags},
    settings::{IngressSettings, features},
    slot::{BACKEND_MASK, NO_BACKEND, TRACKED},
};

/// Flags of a service with which packets may go this way. One that is new is not here.
const COMMON_FLAGS: u32 = flags::UDP_STATELESS | flags::RESET_ON_DOWN;

/// Ethernet, IPv4 and TCP headers without options; also the least of a UDP packet that goes this way.
const V4: usize = ETHERNET + 20 + 20;
/// The same for IPv6.
const V6: usize = ETHERNET + 40 + 20;

/// What is needed of a packet.
struct Common {
    /// Source and destination as the maps keep them, as words in memory's order.
    source: [u64; 2],
    vip: [u64; 2],
    /// As loaded.
    source_port: u16,
    port: u16,
    protocol: u8,
    tos: u8,
    is_ipv6: bool,
    is_syn: bool,
    ip_len: u32,
}

impl Common {
    /// The source as the long way has it.
    #[inline(always)]
    const fn source_words(&self) -> [u32; 4] {
        let [a, b] = self.source;
        [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
    }
}

impl Common {
    /// Whether no host sends from its source.
    #[inline(always)]
    const fn is_martian(&self) -> bool {
        if self.is_ipv6 {
            martian::is_martian_v6(self.source)
        } else {
            martian::is_martian_v4((self.source[1] >> 32) as u32)
        }
    }
}

/// An IPv4 address as loaded, as the second word of a mapped one.
#[inline(always)]
const fn mapped_word(v4: u32) -> u64 {
    // The BPF target is little-endian.
    0xffff_0000 | (v4 as u64) << 32
}

/// Whether these words are a mapped address.
#[inline(always)]
const fn is_mapped(words: [u64; 2]) -> bool {
    words[0] == 0 && words[1] as u32 == 0xffff_0000
}

/// Decides a common packet's fate and carries it out; None, with nothing done, for any other.
#[inline(always)]
pub fn process<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> Option<(Verdict, Outcome)> {
    if cfg!(target_endian = "big") {
        return None;
    }
    let packet = frame.packet();
    let window = packet.window::<V4>()?;
    let kind: u16 = window.read::<u16, 12>();
    if kind == ETH_IPV4.to_be() {
        let common = parse_ipv4(&window, packet.len())?;
        balance(frame, tables, settings, &common)
    } else if kind == ETH_IPV6.to_be() && settings.ipv6 != 0 {
        let common = parse_ipv6(&packet.window::<V6>()?, packet.len())?;
        balance(frame, tables, settings, &common)
    } else {
        None
    }
}

#[inline(always)]
fn parse_ipv4(window: &Window<V4>, len: usize) -> Option<Common> {
    const IP: usize = ETHERNET;
    const L4: usize = IP + 20;
    // Version, header length and TOS; total length.
    let first: u32 = window.read::<u32, IP>();
    let fragment: u16 = window.read::<u16, { IP + 6 }>();
    let ip_len = u16::from_be((first >> 16) as u16) as u32;
    if first as u8 != 0x45 || fragment & 0x3fff_u16.to_be() != 0 || len < ETHERNET + ip_len as usize {
        return None;
    }
    let protocol: u8 = window.read::<u8, { IP + 9 }>();
    let is_syn = parse_transport(
        protocol,
        ip_len.wrapping_sub(20),
        window.read::<u16, { L4 + 12 }>(),
        window.read::<u16, { L4 + 4 }>(),
        ip_len >= 20,
    )?;
    Some(Common {
        source: [0, mapped_word(window.read::<u32, { IP + 12 }>())],
        vip: [0, mapped_word(window.read::<u32, { IP + 16 }>())],
        source_port: window.read::<u16, L4>(),
        port: window.read::<u16, { L4 + 2 }>(),
        protocol,
        tos: (first >> 8) as u8,
        is_ipv6: false,
        is_syn,
        ip_len,
    })
}

#[inline(always)]
fn parse_ipv6(window: &Window<V6>, len: usize) -> Option<Common> {
    const IP: usize = ETHERNET;
    const L4: usize = IP + 40;
    let first = u32::from_be(window.read::<u32, IP>());
    let payload = u16::from_be(window.read::<u16, { IP + 4 }>()) as u32;
    let source = [window.read::<u64, { IP + 8 }>(), window.read::<u64, { IP + 16 }>()];
    let vip = [window.read::<u64, { IP + 24 }>(), window.read::<u64, { IP + 32 }>()];
    if first >> 28 != 6 || len < ETHERNET + 40 + payload as usize || is_mapped(source) || is_mapped(vip) {
        return None;
    }
    let protocol: u8 = window.read::<u8, { IP + 6 }>();
    let is_syn = parse_transport(
        protocol,
        payload,
        window.read::<u16, { L4 + 12 }>(),
        window.read::<u16, { L4 + 4 }>(),
        true,
    )?;
    Some(Common {
        source,
        vip,
        source_port: window.read::<u16, L4>(),
        port: window.read::<u16, { L4 + 2 }>(),
        protocol,
        tos: (first >> 20) as u8,
        is_ipv6: true,
        is_syn,
        ip_len: payload + 40,
    })
}

/// Checks a transport header of `len` bytes with its data, by TCP's offset and flags and by UDP's length, both as
/// loaded. Whether it is a SYN.
#[inline(always)]
fn parse_transport(protocol: u8, len: u32, offset_flags: u16, udp_len: u16, has_ip: bool) -> Option<bool> {
    if !has_ip {
        return None;
    }
    if protocol == TCP {
        let data = (offset_flags as u32 & 0xf0) >> 2;
        let tcp_flags = (offset_flags >> 8) as u8;
        let is_syn = tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN;
        if data < 20 || data > len { None } else { Some(is_syn) }
    } else if protocol == UDP {
        let udp_len = u16::from_be(udp_len) as u32;
        if udp_len < 8 || udp_len > len { None } else { Some(false) }
    } else {
        None
    }
}

#[inline(always)]
fn balance<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    common: &Common,
) -> Option<(Verdict, Outcome)> {
    let Some(service) = lookup_exact(tables, common.vip, common.port, common.protocol) else {
        if !tables.is_no_vip(exact::filter_bit(common.vip)) {
            return None;
        }
        // Nobody's port is perhaps that of a translated flow.
        return Some(if nat::is_reply(settings, common.port) {
            (Verdict::Stage(stage::NAT), Outcome::Not(Reason::NotVip))
        } else {
            refuse(tables, Reason::NotVip)
        });
    };
    if common.is_martian() {
        return Some(refuse(tables, Reason::MartianSource));
    }
    // Perhaps a worker's own service: see `martian::check_worker`.
    if common.protocol == UDP && common.source_port == common.port {
        return None;
    }
    // Perhaps a VIP itself.
    if tables.has_vip_bit(exact::filter_bit(common.source)) {
        return None;
    }
    if settings.features & features::GUARD != 0 && tables.is_denied(common.source_words()) {
        return Some(refuse(tables, Reason::GuardDenied));
    }
    let view = tables.service(service)?;
    if view.flags & !COMMON_FLAGS != 0 {
        return staged(settings, view);
    }
    if common.protocol == UDP && view.flags & flags::UDP_STATELESS == 0 || view.slot_count == 0 {
        return None;
    }
    let ports = ports_word(common.protocol, common.source_port, common.port);
    let hash = if common.is_ipv6 {
        flow_hash_v6(view.seed, common.source, common.vip, ports)
    } else {
        flow_hash_v4(view.seed, (common.source[1] >> 32) as u32, (common.vip[1] >> 32) as u32, ports)
    };
    let primary = tables.primary(view.slot_base.wrapping_add(slot_of(hash, view.slot_count)))?;
    // Stateless UDP takes the primary whatever its slot.
    if primary & TRACKED != 0 && common.protocol == TCP {
        return None;
    }
    let index = primary & BACKEND_MASK;
    if index == NO_BACKEND {
        return None;
    }
    let backend = tables.backend(index)?;
    let verdict = match forward(frame, settings, common, service, backend, hash)? {
        Ok(verdict) => verdict,
        Err(reason) => return Some(refuse(tables, reason)),
    };
    if settings.stats != 0 {
        tables.account(index, common.ip_len, common.is_syn);
    }
    Some((verdict, Outcome::Forwarded { service, backend: index }))
}

/// The stage that takes a service's packets, if one does.
#[inline(always)]
fn staged(settings: &IngressSettings, view: &ServiceView) -> Option<(Verdict, Outcome)> {
    let to = |index| Some((Verdict::Stage(index), Outcome::Not(Reason::StageMissing)));
    if settings.features & features::NAT != 0 && view.flags & flags::NAT != 0 {
        return to(stage::NAT);
    }
    None
}

/// Encapsulates the packet, or rewrites its MACs.
#[inline(always)]
fn forward<F: Frame>(
    frame: &mut F,
    settings: &IngressSettings,
    common: &Common,
    service: u32,
    backend: &Backend,
    hash: u64,
) -> Option<Result<Verdict, Reason>> {
    let words: &[u64; 8] = zerocopy::transmute_ref!(backend);
    let state = backend::flags::USED | backend::flags::RESOLVED;
    // The next hop's MAC and the MTU; the egress MAC and the tag.
    let (to, from) = (words[4], words[5]);
    let mtu = (to >> 48) as u32;
    if backend.flags & state != state || backend.service != service || from >> 48 != 0 {
        return None;
    }
    let outer_is_ipv4 = is_mapped([words[0], words[1]]);
    let outer_len: u32 = if outer_is_ipv4 { 20 } else { 40 };
    let overhead = match backend.mode {
        mode::IPIP => outer_len,
        mode::GUE => outer_len + GUE_OVERHEAD as u32,
        mode::L2 => 0,
        _ => return None,
    };
    let len = common.ip_len + overhead;
    if mtu != 0 && len > mtu || len > u16::MAX as u32 {
        return None;
    }
    let outer = OuterHeader {
        tos: common.tos,
        ttl: settings.outer_ttl,
        inner: if common.is_ipv6 { PROTOCOL_IPV6 } else { PROTOCOL_IPV4 },
        len: len as u16,
        source: [words[2], words[3]],
        source_bits: backend.source_bits as u32,
        destination: [words[0], words[1]],
        port: u16::from_ne_bytes(backend.port.to_bytes()),
        hash,
        macs: (to, from),
    };
    let (mode, ifindex) = (backend.mode, backend.ifindex);
    // From here on the packet is changed.
    if overhead != 0 && !frame.adjust_head(-(overhead as i32)) {
        return Some(Err(Reason::NoHeadroom));
    }
    let packet = frame.packet();
    // One window per length, so that all offsets are constants.
    let written = match (mode, outer_is_ipv4) {
        (mode::L2, _) => packet.window().map(|w| outer.write_macs::<ETHERNET>(w, common.is_ipv6)),
        (mode::IPIP, true) => packet.window().map(|w| outer.write_ipip4(w)),
        (mode::IPIP, false) => packet.window().map(|w| outer.write_ipip6(w)),
        (_, true) => packet.window().map(|w| outer.write_gue4(w)),
        (_, false) => packet.window().map(|w| outer.write_gue6(w)),
    };
    if written.is_none() {
        return Some(Err(Reason::NoHeadroom));
    }
    Some(Ok(if ifindex == frame.ifindex() { Verdict::Transmit } else { Verdict::Redirect(ifindex) }))
}

/// What goes in front of a packet. Words are in memory's order, little-endian.
struct OuterHeader {
    tos: u8,
    ttl: u8,
    /// Protocol of the inner packet.
    inner: u8,
    /// Length of the outer packet.
    len: u16,
    source: [u64; 2],
    source_bits: u32,
    destination: [u64; 2],
    /// GUE's port, network order.
    port: u16,
    hash: u64,
    /// Next hop's and egress MAC, each with 16 bits of something else above.
    macs: (u64, u64),
}

impl OuterHeader {
    #[inline(always)]
    fn write_macs<const N: usize>(&self, mut window: Window<N>, is_ipv6: bool) {
        // The last two bytes of each are overwritten by what follows.
        window.write::<u64, 0>(self.macs.0);
        window.write::<u64, 6>(self.macs.1);
        window.write::<u16, 12>(if is_ipv6 { ETH_IPV6 } else { ETH_IPV4 }.to_be());
    }

    /// Bits of the flow's hash that vary the source, as they lie in its second word.
    #[inline(always)]
    fn variation(&self) -> u64 {
        if self.source_bits == 0 {
            0
        } else {
            (self.hash & (u64::MAX >> ((64 - self.source_bits) & 63))).to_be()
        }
    }

    #[inline(always)]
    fn write_ipip4(&self, window: Window<{ ETHERNET + 20 }>) {
        self.write_macs(window, false);
        self.write_ipv4(window, self.inner);
    }

    #[inline(always)]
    fn write_ipip6(&self, window: Window<{ ETHERNET + 40 }>) {
        self.write_macs(window, true);
        self.write_ipv6(window, self.inner);
    }

    #[inline(always)]
    fn write_gue4(&self, mut window: Window<{ ETHERNET + 20 + GUE_OVERHEAD }>) {
        self.write_macs(window, false);
        self.write_ipv4(window, UDP);
        window.write::<u64, { ETHERNET + 20 }>(self.udp(20));
        window.write::<u32, { ETHERNET + 28 }>((self.inner as u32) << 8);
    }

    #[inline(always)]
    fn write_gue6(&self, mut window: Window<{ ETHERNET + 40 + GUE_OVERHEAD }>) {
        self.write_macs(window, true);
        self.write_ipv6(window, UDP);
        window.write::<u64, { ETHERNET + 40 }>(self.udp(40));
        window.write::<u32, { ETHERNET + 48 }>((self.inner as u32) << 8);
    }

    /// See `forward::outer::ipv4`.
    #[inline(always)]
    fn write_ipv4<const N: usize>(&self, mut window: Window<N>, protocol: u8) {
        let source = ((self.source[1] | self.variation()) >> 32) as u32;
        let destination = (self.destination[1] >> 32) as u32;
        let version_tos = 0x45 | (self.tos as u64) << 8;
        let len = self.len.to_be() as u64;
        let dont_fragment = 0x40;
        let ttl_protocol = self.ttl as u64 | (protocol as u64) << 8;
        // One's complement does not mind the byte order, as long as it is the same for all words (RFC 1071).
        let sum = version_tos + len + dont_fragment + ttl_protocol + source as u64 + destination as u64;
        let check = csum::finish(sum) as u64;
        window.write::<u64, ETHERNET>(version_tos | len << 16 | dont_fragment << 48);
        window.write::<u64, { ETHERNET + 8 }>(ttl_protocol | check << 16 | (source as u64) << 32);
        window.write::<u32, { ETHERNET + 16 }>(destination);
    }

    #[inline(always)]
    fn write_ipv6<const N: usize>(&self, mut window: Window<N>, protocol: u8) {
        let label = 6 << 28 | (self.tos as u32) << 20 | (self.hash as u32 & 0xf_ffff);
        let payload = self.len.wrapping_sub(40).to_be() as u64;
        let next_limit = protocol as u64 | (self.ttl as u64) << 8;
        window.write::<u64, ETHERNET>(label.to_be() as u64 | payload << 32 | next_limit << 48);
        window.write::<u64, { ETHERNET + 8 }>(self.source[0]);
        window.write::<u64, { ETHERNET + 16 }>(self.source[1] | self.variation());
        window.write::<u64, { ETHERNET + 24 }>(self.destination[0]);
        window.write::<u64, { ETHERNET + 32 }>(self.destination[1]);
    }

    /// See `forward::outer::write_gue`.
    #[inline(always)]
    fn udp(&self, ip_len: u16) -> u64 {
        let source_port = (0xc000 | (self.hash as u16 & 0x3fff)).to_be();
        let len = self.len.wrapping_sub(ip_len).to_be();
        source_port as u64 | (self.port as u64) << 16 | (len as u64) << 32
    }
}
