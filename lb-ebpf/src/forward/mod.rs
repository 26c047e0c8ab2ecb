//! Sends a packet to its backend: checks that it fits, encapsulates or rewrites the MACs, picks the next hop.
//!
//! Input: frame, [`Headers`], [`Backend`], flow hash. Output: a [`Verdict`] or the [`Reason`] against it.
//! Outer headers follow RFC 2003 and RFC 2473 (ipip), draft-ietf-intarea-gue (gue) and RFC 6040 (ECN).
//!
//! The next hop stands in the backend's entry (one cache line), which lbd keeps filled from the kernel's routes and
//! neighbours. `bpf_fib_lookup` is used, and counted as `fib_lookup`, only where the entry has no next hop. DSCP and
//! ECN are copied into the outer header. An IPv6 service takes IPv6 backends only: an IPv4 tunnel that cannot carry
//! 1,280 bytes would break IPv6's minimum MTU.

mod outer;

pub use crate::select::next_hop::{filled_in, known_hop};
pub use outer::{PROTOCOL_IPV4, PROTOCOL_IPV6, source as outer_source, varied};

use crate::{
    Frame, Packet, Tables, Verdict,
    packet::{
        fib::{Fib, FibQuery, Hop},
        parse::{ETH_IPV4, ETH_IPV6, ETH_VLAN, ETHERNET, Headers, VLAN_TAG, words},
        verdict::Refusal,
        wire::Gue,
    },
};
use lb_common::{Backend, Reason, backend::mode, is_mapped, settings::IngressSettings};

/// UDP and GUE headers.
pub const GUE_OVERHEAD: usize = 8 + size_of::<Gue>();

/// Bytes that the forwarding mode adds to a packet of this backend; None for modes that send it no further
/// from here (`local`, and `nat`, which has a stage of its own).
#[inline(always)]
pub fn overhead(backend: &Backend) -> Option<usize> {
    let outer_len = if is_mapped(&backend.address) { 20 } else { 40 };
    match backend.mode {
        mode::IPIP => Some(outer_len),
        mode::GUE => Some(outer_len + GUE_OVERHEAD),
        mode::L2 => Some(0),
        mode::GUE_CHAIN => {
            Some(outer_len + GUE_OVERHEAD + crate::second_chance::header::len(outer_len == 40))
        }
        _ => None,
    }
}

/// What becomes of a packet to a backend whose mode sends it no further from here.
#[inline(always)]
pub fn without_header(backend: &Backend) -> Result<Verdict, Reason> {
    match backend.mode {
        // This host serves it itself: nothing is changed.
        mode::LOCAL => Ok(Verdict::Pass),
        mode::FORBIDDEN => Err(Reason::Residency),
        _ => Err(Reason::BadMode),
    }
}

/// Encapsulates a packet for its backend, or gives it the worker's MAC, and says where it leaves.
#[inline(always)]
pub fn forward<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    (index, backend): (u32, &Backend),
    hash: u64,
) -> Result<Verdict, Refusal> {
    let outer_is_ipv6 = !is_mapped(&backend.address);
    let Some(overhead) = overhead(backend) else {
        return Ok(without_header(backend)?);
    };
    let is_l2 = backend.mode == mode::L2;
    let mut source = outer_source(backend, hash);
    let len = headers.ip_len + overhead as u32;
    // The outer header's length has 16 bits.
    if len > u16::MAX as u32 {
        return Err(Refusal::TooBig(u16::MAX as u32 - overhead as u32));
    }
    let hop = if let Some((hop, from)) = known_hop(tables, index, backend) {
        source = varied(from, backend.source_bits as u32, hash);
        hop
    } else {
        let query = FibQuery {
            source,
            destination: words(backend.address),
            is_ipv6: outer_is_ipv6,
            // A router would look at the packet's own destination, and bring it back here.
            on_link: is_l2,
            tos: headers.tos,
            protocol: outer::protocol(backend, headers),
            len,
        };
        match frame.lookup(&query) {
            Ok(answer) => {
                source = answer.source;
                // Kernels before 6.7 choose no source. The VIP is this host's as well, and no router drops it as it
                // does a packet from nowhere.
                if source[3] == 0 && source[0] == 0 && headers.is_ipv6 == outer_is_ipv6 {
                    source = headers.destination;
                }
                answer.hop
            }
            Err((Reason::TooBigAnswered, mtu)) => {
                return Err(Refusal::TooBig(mtu.saturating_sub(overhead as u32)));
            }
            Err((reason, _)) => return Err(reason.into()),
        }
    };
    if hop.mtu != 0 && len > hop.mtu {
        return Err(Refusal::TooBig(hop.mtu.saturating_sub(overhead as u32)));
    }
    let l2_len = if hop.vlan == 0 { ETHERNET } else { ETHERNET + VLAN_TAG };
    if !frame.adjust_head(headers.l2_len() as i32 - (l2_len + overhead) as i32) {
        return Err(Reason::NoHeadroom.into());
    }
    let is_ipv6 = if is_l2 { headers.is_ipv6 } else { outer_is_ipv6 };
    let kind = if is_ipv6 { ETH_IPV6 } else { ETH_IPV4 };
    let mut packet = frame.packet();
    // One call per length, so that all offsets are constants.
    let written = if hop.vlan == 0 {
        write_ethernet(&mut packet, &hop)
            && packet.write(12, kind.to_be())
            && (is_l2 || outer::write(&mut packet, ETHERNET, settings, headers, backend, source, hash))
    } else {
        write_ethernet(&mut packet, &hop)
            && packet.write(12, [ETH_VLAN.to_be(), hop.vlan])
            && packet.write(16, kind.to_be())
            && (is_l2
                || outer::write(&mut packet, ETHERNET + VLAN_TAG, settings, headers, backend, source, hash))
    };
    if !written {
        return Err(Reason::NoHeadroom.into());
    }
    if hop.ifindex == frame.ifindex() { Ok(Verdict::Transmit) } else { Ok(Verdict::Redirect(hop.ifindex)) }
}

#[inline(always)]
fn write_ethernet(packet: &mut Packet, hop: &Hop) -> bool {
    packet.write(0, hop.next_hop.0)
        && packet.write(4, hop.next_hop.1)
        && packet.write(6, hop.egress_mac.0)
        && packet.write(10, hop.egress_mac.1)
}
