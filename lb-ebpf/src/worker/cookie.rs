//! The worker's stage for SYNs: while a listener's queue is full, they are answered by SYN cookies before
//! the stack sees them, so that a flood costs little and clients still get in.
//!
//! The listener decides. The kernel is asked for its cookie, made with its own secret; it gives one when the
//! listener would itself answer by cookie (`net.ipv4.tcp_syncookies=1`: its queue is full; `=2`: always), and
//! notes that cookies are out, so that it takes the client's ACK. Otherwise, and whenever anything is unusual
//! (options in the IP header, tags, no way back), the SYN goes to the stack as ever.
//! A cookie carries the MSS and nothing else: no window scaling, no SACK (RFC 4987, 3.6).
//!
//! Reached by tail call from `decap` with the inner packet; called natively by tests.
//!
//! The answer leaves by the next hop that `lbd worker` keeps in `REPLY_HOPS`: a worker does not forward, so
//! `bpf_fib_lookup` would refuse.

use crate::{
    Frame, Packet, Verdict,
    packet::{
        csum,
        parse::{ETH_IPV4, ETH_IPV6, ETHERNET, tcp},
        wire::{Ipv4, Ipv6, Tcp},
    },
};
use lb_common::{Reason, reply::ReplyHop, service::TCP};

/// Longest TCP header.
pub const TCP_MAX: usize = 60;
/// A TCP header with the one option that a cookie carries.
const SYN_ACK: usize = 24;
const OPTION_MSS: u8 = 2;

/// What the kernel is asked.
pub struct Syn {
    /// The IP header, if it is IPv4.
    pub ipv4: Option<Ipv4>,
    /// The IP header otherwise.
    pub ipv6: Ipv6,
    /// The TCP header, options and all, zero behind its end.
    pub tcp: [u32; TCP_MAX / 4],
    /// Its length in bytes.
    pub tcp_len: usize,
    /// Its ports: source, destination.
    pub ports: [u16; 2],
}

/// A cookie, and the MSS that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie {
    /// Sequence number of the answer, host byte order.
    pub sequence: u32,
    /// MSS to announce.
    pub mss: u16,
}

/// The listeners of this host, and its way to clients.
pub trait Listeners {
    /// The cookie with which the SYN's listener would answer it now.
    fn cookie(&self, syn: &Syn) -> Option<Cookie>;
    /// The way back.
    fn reply_hop(&self, is_ipv6: bool) -> Option<ReplyHop>;
    /// Adds one to a reason's counter.
    fn count(&self, reason: Reason);
}

/// Whether an untagged frame is a SYN without anything unusual.
#[inline(always)]
pub fn is_syn(packet: &Packet) -> bool {
    const PLAIN_IPV4: u8 = 0x45;
    let Some(kind) = packet.read::<u16>(12) else { return false };
    // Whole headers: one bounds check each, which the verifier follows.
    let header = if kind == ETH_IPV4.to_be() {
        match packet.read::<Ipv4>(ETHERNET) {
            Some(ip) if ip.version_len == PLAIN_IPV4 && ip.protocol == TCP => {
                packet.read::<Tcp>(ETHERNET + 20)
            }
            _ => return false,
        }
    } else if kind == ETH_IPV6.to_be() {
        match packet.read::<Ipv6>(ETHERNET) {
            Some(ip) if ip.next == TCP => packet.read::<Tcp>(ETHERNET + 40),
            _ => return false,
        }
    } else {
        return false;
    };
    let all = tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN;
    matches!(header, Some(header) if header.flags & all == tcp::SYN)
}

/// Decides a SYN's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame, L: Listeners>(frame: &mut F, listeners: &L) -> Verdict {
    let packet = frame.packet();
    let answered = if packet.read::<u16>(12) == Some(ETH_IPV4.to_be()) {
        read::<F, { ETHERNET + 20 }>(frame, false)
            .and_then(|syn| answer::<F, L, { ETHERNET + 20 }>(frame, listeners, &syn))
    } else {
        read::<F, { ETHERNET + 40 }>(frame, true)
            .and_then(|syn| answer::<F, L, { ETHERNET + 40 }>(frame, listeners, &syn))
    };
    match answered {
        Some(verdict) => verdict,
        None => Verdict::Pass,
    }
}

/// The SYN in a frame whose TCP header is at `L4`.
#[inline(always)]
fn read<F: Frame, const L4: usize>(frame: &F, is_ipv6: bool) -> Option<Syn> {
    let packet = frame.packet();
    let tcp: Tcp = packet.read(L4)?;
    let tcp_len = ((tcp.offset >> 4) as usize) * 4;
    if tcp_len < 20 {
        return None;
    }
    let mut words = [0; TCP_MAX / 4];
    for (i, word) in words.iter_mut().enumerate() {
        if i * 4 < tcp_len {
            *word = packet.read(L4 + i * 4)?;
        }
    }
    let zero = Ipv6 {
        version_class_label: 0,
        payload_len: 0,
        next: 0,
        hop_limit: 0,
        source: [0; 4],
        destination: [0; 4],
    };
    Some(Syn {
        ipv4: if is_ipv6 { None } else { Some(packet.read(ETHERNET)?) },
        ipv6: if is_ipv6 { packet.read(ETHERNET)? } else { zero },
        tcp: words,
        tcp_len,
        ports: [tcp.source_port, tcp.port],
    })
}

/// Turns the SYN into its answer.
#[inline(always)]
fn answer<F: Frame, L: Listeners, const L4: usize>(
    frame: &mut F,
    listeners: &L,
    syn: &Syn,
) -> Option<Verdict> {
    let hop = listeners.reply_hop(syn.ipv4.is_none())?;
    let cookie = listeners.cookie(syn)?;
    let delta = (L4 + SYN_ACK) as i32 - frame.total_len() as i32;
    if !frame.adjust_tail(delta) {
        // Nobody else may answer now: the kernel thinks that a cookie is out, and the client tries again.
        listeners.count(Reason::DecapAdjust);
        return Some(Verdict::Drop);
    }
    let sequence = u32::from_be(syn.tcp[1]);
    let header = Tcp {
        source_port: syn.ports[1],
        port: syn.ports[0],
        sequence: cookie.sequence.to_be(),
        acknowledgement: sequence.wrapping_add(1).to_be(),
        offset: ((SYN_ACK / 4) as u8) << 4,
        flags: tcp::SYN | tcp::ACK,
        window: u16::MAX,
        check: 0,
        urgent: 0,
    };
    let option = [u16::from_be_bytes([OPTION_MSS, 4]).to_be(), cookie.mss.to_be()];
    let mut packet = frame.packet();
    let written = write_ethernet(&mut packet, &hop)
        && match &syn.ipv4 {
            Some(ip) => write_ipv4(&mut packet, ip, header, option),
            None => write_ipv6(&mut packet, &syn.ipv6, header, option),
        };
    if !written {
        listeners.count(Reason::DecapAdjust);
        return Some(Verdict::Drop);
    }
    listeners.count(Reason::DecapCookie);
    let stays = hop.ifindex == frame.ifindex();
    Some(if stays { Verdict::Transmit } else { Verdict::Redirect(hop.ifindex) })
}

#[inline(always)]
fn write_ethernet(packet: &mut Packet, hop: &ReplyHop) -> bool {
    let half = |mac: &[u8; 6], i: usize| u16::from_ne_bytes([mac[i], mac[i + 1]]);
    let (to, from) = (&hop.next_hop, &hop.egress_mac);
    packet.write(0, [half(to, 0), half(to, 2), half(to, 4), half(from, 0), half(from, 2), half(from, 4)])
}

/// Sum of a TCP header with its option, without its checksum, in memory order.
#[inline(always)]
fn sum(header: &Tcp, option: [u16; 2]) -> u64 {
    csum::of_tcp(header)
        + option[0] as u64
        + option[1] as u64
        + (TCP as u16).to_be() as u64
        + (SYN_ACK as u16).to_be() as u64
}

#[inline(always)]
fn write_ipv4(packet: &mut Packet, syn: &Ipv4, mut tcp: Tcp, option: [u16; 2]) -> bool {
    let addresses = syn.source as u64 + syn.destination as u64;
    let mut ip = Ipv4 {
        tos: 0,
        total_len: ((20 + SYN_ACK) as u16).to_be(),
        id: 0,
        fragment: 0x4000_u16.to_be(),
        ttl: 64,
        check: 0,
        source: syn.destination,
        destination: syn.source,
        ..*syn
    };
    ip.check = csum::finish(
        u16::from_ne_bytes([ip.version_len, 0]) as u64
            + ip.total_len as u64
            + ip.fragment as u64
            + u16::from_ne_bytes([ip.ttl, ip.protocol]) as u64
            + addresses,
    );
    tcp.check = csum::finish(addresses + sum(&tcp, option));
    packet.write(ETHERNET, ip) && packet.write(ETHERNET + 20, tcp) && packet.write(ETHERNET + 40, option)
}

#[inline(always)]
fn write_ipv6(packet: &mut Packet, syn: &Ipv6, mut tcp: Tcp, option: [u16; 2]) -> bool {
    let ip = Ipv6 {
        version_class_label: (6_u32 << 28).to_be(),
        payload_len: (SYN_ACK as u16).to_be(),
        hop_limit: 64,
        source: syn.destination,
        destination: syn.source,
        ..*syn
    };
    let mut all = sum(&tcp, option);
    for i in 0..4 {
        all += ip.source[i] as u64 + ip.destination[i] as u64;
    }
    tcp.check = csum::finish(all);
    packet.write(ETHERNET, ip) && packet.write(ETHERNET + 40, tcp) && packet.write(ETHERNET + 60, option)
}
