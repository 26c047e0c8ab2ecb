//! Hops of translated packets: where a frame came from, and how one leaves that keeps its IP packet.

use super::rewrite::Rewrite;
use crate::{
    Frame, Packet, Verdict,
    packet::{
        fib::{Fib, FibAnswer, FibQuery, Hop},
        parse::{ETH_IPV4, ETH_IPV6, ETH_VLAN, ETHERNET, Headers, VLAN_TAG},
        verdict::Refusal,
    },
};
use lb_common::{Be16, LastHop, Reason};

/// No hop.
pub const NO_HOP: LastHop = LastHop { macs: [Be16::ZERO; 6], tags: [Be16::ZERO; 4], ifindex: 0 };

/// What the kernel's routes say of a packet between other addresses.
#[inline(always)]
pub fn by_fib<F: Frame + Fib>(
    frame: &F,
    headers: &Headers,
    (source, destination): ([u32; 4], [u32; 4]),
) -> Result<FibAnswer, (Reason, u32)> {
    let &Headers { is_ipv6, tos, protocol, ip_len: len, .. } = headers;
    frame.lookup(&FibQuery { source, destination, is_ipv6, on_link: false, tos, protocol, len })
}

/// The hop that they give.
#[inline(always)]
pub fn hop_by_fib<F: Frame + Fib>(frame: &F, headers: &Headers, to: &Rewrite) -> Result<Hop, Refusal> {
    match by_fib(frame, headers, (to.source, to.destination)) {
        Ok(answer) => Ok(answer.hop),
        Err((Reason::TooBigAnswered, mtu)) => Err(Refusal::TooBig(mtu)),
        Err((reason, _)) => Err(reason.into()),
    }
}

/// A worker's hop in the form of a client's.
#[inline(always)]
pub fn as_last_hop(hop: &Hop) -> LastHop {
    let be = |w: u16| Be16::from_bytes(w.to_ne_bytes());
    // Halves of a word in the order of its bytes; the BPF target is little-endian, as `filled_in` knows.
    let pair = |w: u32| [be(w.to_le() as u16), be((w.to_le() >> 16) as u16)];
    let ([a, b], [d, e]) = (pair(hop.next_hop.0), pair(hop.egress_mac.0));
    let tag = if hop.vlan == 0 { Be16::ZERO } else { Be16::new(ETH_VLAN) };
    LastHop {
        macs: [a, b, be(hop.next_hop.1), d, e, be(hop.egress_mac.1)],
        tags: [tag, be(hop.vlan), Be16::ZERO, Be16::ZERO],
        ifindex: hop.ifindex,
    }
}

/// Where a frame comes from, and its tags.
#[inline(always)]
pub fn last_hop<F: Frame>(frame: &F, headers: &Headers) -> Option<LastHop> {
    let packet = frame.packet();
    let [a, b, c, d, e, f]: [u16; 6] = packet.read(0)?;
    let (mut first, mut second) = ([0u16; 2], [0u16; 2]);
    if headers.l2_len() > ETHERNET {
        first = packet.read(12)?;
    }
    if headers.l2_len() > ETHERNET + VLAN_TAG {
        second = packet.read(ETHERNET + 2)?;
    }
    let be = |w: u16| Be16::from_bytes(w.to_ne_bytes());
    Some(LastHop {
        macs: [be(d), be(e), be(f), be(a), be(b), be(c)],
        tags: [be(first[0]), be(first[1]), be(second[0]), be(second[1])],
        ifindex: frame.ifindex(),
    })
}

/// Sends a frame that keeps its IP packet out by a hop.
#[inline(always)]
pub fn transmit<F: Frame>(
    frame: &mut F,
    l2_len: usize,
    is_ipv6: bool,
    hop: &LastHop,
) -> Result<Verdict, Refusal> {
    let tagged = raw(hop.tags[0]) != 0;
    let twice = raw(hop.tags[2]) != 0;
    let len = ETHERNET + if tagged { VLAN_TAG } else { 0 } + if twice { VLAN_TAG } else { 0 };
    if !frame.adjust_head(l2_len as i32 - len as i32) {
        return Err(Reason::NoHeadroom.into());
    }
    let mut packet = frame.packet();
    let [a, b, c, d, e, f] = hop.macs;
    let macs = [raw(a), raw(b), raw(c), raw(d), raw(e), raw(f)];
    let kind = if is_ipv6 { ETH_IPV6 } else { ETH_IPV4 }.to_be();
    // Each length has its own constants.
    let written = packet.write(0, macs)
        && match (tagged, twice) {
            (false, _) => packet.write(12, kind),
            (true, false) => write_tag(&mut packet, 12, hop, 0) && packet.write(16, kind),
            (true, true) => {
                write_tag(&mut packet, 12, hop, 0)
                    && write_tag(&mut packet, 16, hop, 2)
                    && packet.write(20, kind)
            }
        };
    if !written {
        return Err(Reason::NoHeadroom.into());
    }
    Ok(if hop.ifindex == frame.ifindex() { Verdict::Transmit } else { Verdict::Redirect(hop.ifindex) })
}

#[inline(always)]
fn write_tag(packet: &mut Packet, at: usize, hop: &LastHop, first: usize) -> bool {
    packet.write(at, [raw(hop.tags[first]), raw(hop.tags[first + 1])])
}

/// A number in network order as loaded.
#[inline(always)]
pub fn raw(number: Be16) -> u16 {
    u16::from_ne_bytes(number.to_bytes())
}
