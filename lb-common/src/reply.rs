//! A worker's way back to clients, for answers that its XDP program gives itself.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Places in the map of ways.
pub mod family {
    /// Of IPv4.
    pub const V4: u32 = 0;
    /// Of IPv6.
    pub const V6: u32 = 1;
    /// Number of places.
    pub const COUNT: u32 = 2;
}

/// How packets to clients leave a worker: by its default route. Written in one piece where it matters: an entry
/// whose `ifindex` is 0 is not used.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReplyHop {
    /// Gateway's MAC.
    pub next_hop: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
    /// Interface's MAC.
    pub egress_mac: [u8; 6],
    /// Zero.
    pub pad2: [u8; 2],
    /// Interface; 0: none is known.
    pub ifindex: u32,
    /// Zero.
    pub pad3: u32,
}

map_value!(ReplyHop);
