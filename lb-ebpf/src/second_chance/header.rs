//! Second chance, the ingress host's side: which other backends may have a packet's flow, and the private data of its
//! GUE header that names them.
//!
//! Private data, right behind GUE's first four bytes, with the header's length to match (3 or 9 words):
//!
//! ```text
//!  0               1               2               3
//! +---------------+---------------+---------------+---------------+
//! |  0x6c  'l'    |  0x62  'b'    | version | left|     hops      |
//! +---------------+---------------+---------------+---------------+
//! |  address to visit next (4 bytes, or 16 with an outer IPv6 header), zero if `left` is 0
//! |  address to visit after that, zero if `left` is below 2
//! ```
//!
//! `version` is the upper half of its byte, 1; `left` the lower, 0 to 2. `hops` counts workers that have sent the packet
//! on; `hops` + `left` never exceed 2, so no packet visits more than three workers, whoever wrote it. GUE flags stay zero:
//! fields that an extension flag announces would come before private data, and there are none.
//!
//! Called by `ingress` for backends in mode [`mode::GUE_CHAIN`], and by `explain`.
//!
//! Overhead and MTU follow from the backend's mode. Senders that know no other backend (fragments, ICMP errors) write
//! an empty header. While a UDP flow is young, its packets visit the other half of the pair first: to an ingress host
//! a new flow and one that another host placed look the same, and only a connected socket can tell; the chosen
//! backend comes last and takes the packet without a socket.

use crate::{
    Frame, Tables,
    packet::{
        parse::{ETHERNET, Headers, VLAN_TAG, words},
        wire::{Chain4, Chain6},
    },
    select::{next_hop::known_hop, others::split},
};
use lb_common::{
    Backend,
    backend::{self, mode},
    is_mapped,
    service::UDP,
    slot::NO_BACKEND,
};

/// First two bytes of the private data.
pub const KIND: u16 = 0x6c62;
/// Version of its format.
pub const VERSION: u8 = 1;
/// Workers that a packet can be sent on to.
pub const MOST: u8 = 2;

/// Length of the private data, by the family of the outer header.
#[inline(always)]
pub const fn len(is_ipv6: bool) -> usize {
    if is_ipv6 { size_of::<Chain6>() } else { size_of::<Chain4>() }
}

/// Whether a datagram is to visit the others before the chosen backend: those that have a connected socket for it
/// keep it, and the chosen one, last of all, takes it without.
#[inline(always)]
pub fn asks_first(headers: &Headers, is_young: bool) -> bool {
    headers.protocol == UDP && is_young
}

/// Writes the private data's content into a packet that `forward` has encapsulated for `backend`. False if it is
/// not there, which cannot be.
#[inline(always)]
pub fn write<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    (index, backend): (u32, &Backend),
    others: u64,
) -> bool {
    let others = split(others);
    let has_tag = known_hop(tables, index, backend).is_some_and(|(hop, _)| hop.vlan != 0);
    // One call per length, so that all offsets are constants.
    match (has_tag, is_mapped(&backend.address)) {
        (false, true) => write_ipv4(frame, tables, ETHERNET + 20 + 12, others),
        (true, true) => write_ipv4(frame, tables, ETHERNET + VLAN_TAG + 20 + 12, others),
        (false, false) => write_ipv6(frame, tables, ETHERNET + 40 + 12, others),
        (true, false) => write_ipv6(frame, tables, ETHERNET + VLAN_TAG + 40 + 12, others),
    }
}

/// Addresses in the order of a chain, and how many.
#[inline(always)]
fn addresses<T: Tables>(tables: &T, others: [u32; 2]) -> ([Option<&Backend>; 2], u8) {
    let of = |index| if index == NO_BACKEND { None } else { tables.backend(index) };
    let first = of(others[0]);
    let second = if first.is_some() { of(others[1]) } else { None };
    ([first, second], first.is_some() as u8 + second.is_some() as u8)
}

#[inline(always)]
fn write_ipv4<F: Frame, T: Tables>(frame: &mut F, tables: &T, at: usize, others: [u32; 2]) -> bool {
    let ([first, second], left) = addresses(tables, others);
    let last = |b: Option<&Backend>| b.map_or(0, |b| words(b.address)[3]);
    let chain = Chain4 {
        kind: KIND.to_be(),
        version_left: VERSION << 4 | left,
        hops: 0,
        next: [last(first), last(second)],
    };
    frame.packet().write(at, chain)
}

#[inline(always)]
fn write_ipv6<F: Frame, T: Tables>(frame: &mut F, tables: &T, at: usize, others: [u32; 2]) -> bool {
    let ([first, second], left) = addresses(tables, others);
    let mut packet = frame.packet();
    let mut all = packet.write(at, KIND.to_be()) && packet.write(at + 2, [VERSION << 4 | left, 0]);
    if let Some(first) = first {
        all = all && packet.write(at + 4, words(first.address));
    }
    if let Some(second) = second {
        all = all && packet.write(at + 20, words(second.address));
    }
    all
}

/// Whether a backend's packets carry a chain.
#[inline(always)]
pub const fn is_carried_to(backend: &Backend) -> bool {
    backend.mode == mode::GUE_CHAIN && backend.flags & backend::flags::USED != 0
}
