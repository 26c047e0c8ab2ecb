//! Next hop of a chosen backend, as the daemon keeps it in the backend's entry.

use crate::{
    Tables,
    packet::{fib::Hop, parse::words},
};
use lb_common::{Backend, backend::flags};

/// Next hop of a backend, and source of packets to it without the bits that vary, where the daemon has filled them in: of
/// its entry, or of the entry as it was before the change that is under way.
#[inline(always)]
pub fn known_hop<T: Tables>(tables: &T, index: u32, backend: &Backend) -> Option<(Hop, [u32; 4])> {
    const VALID: u32 = flags::USED | flags::RESOLVED;
    if backend.flags & flags::RESOLVED != 0 {
        return Some((filled_in(backend), words(backend.source)));
    }
    if backend.flags & flags::CHANGING == 0 {
        return None;
    }
    let before = tables.changing_backend(index)?;
    if before.flags & VALID != VALID || before.service != backend.service {
        return None;
    }
    Some((filled_in(before), words(before.source)))
}

/// The next hop that the daemon filled in.
#[inline(always)]
pub fn filled_in(backend: &Backend) -> Hop {
    let entry: &[u64; 8] = zerocopy::transmute_ref!(backend);
    // Words 4 and 5 hold a MAC and 16 bits each. The BPF target is little-endian.
    let mac = |word: u64| (word as u32, (word >> 32) as u16);
    Hop {
        next_hop: mac(entry[4].to_le()),
        egress_mac: mac(entry[5].to_le()),
        vlan: (entry[5].to_le() >> 48) as u16,
        ifindex: backend.ifindex,
        mtu: (entry[4].to_le() >> 48) as u32,
    }
}
