//! Next hop of a worker towards clients, for answers that its XDP program sends itself.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Indices of the map of next hops.
pub mod family {
    /// IPv4.
    pub const V4: u32 = 0;
    /// IPv6.
    pub const V6: u32 = 1;
    /// Number of entries.
    pub const COUNT: u32 = 2;
}

/// How packets to clients leave a worker: by its default route. An entry whose `ifindex` is 0 is not used; `ifindex` is
/// written in one store.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReplyHop {
    /// MAC address of the gateway.
    pub next_hop: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
    /// MAC address of the interface.
    pub egress_mac: [u8; 6],
    /// Zero.
    pub pad2: [u8; 2],
    /// Interface; 0: none is known.
    pub ifindex: u32,
    /// Zero.
    pub pad3: u32,
}

map_value!(ReplyHop);
