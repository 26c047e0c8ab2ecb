//! Fragmented packets: the backend of the first fragment of each.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Fields that all fragments of a packet have in common (RFC 791, RFC 8200 4.5).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct FragmentKey {
    /// Source.
    pub source: Address,
    /// Destination.
    pub destination: Address,
    /// Identification as on the wire, 16 bits of IPv4 or 32 of IPv6.
    pub id: u32,
    /// Protocol (IPv4), or 0: in IPv6 the protocol does not tell packets apart.
    pub protocol: u32,
}

/// Number of fragments of a packet that are recorded. Further fragments of a longer packet (above 12,000 bytes in
/// fragments of 1,500) are only compared with these.
pub const PARTS: usize = 8;

/// Seconds after the first fragment within which the others are expected. Linux's `ipfrag_time`; RFC 8200 has 60.
pub const FRAGMENT_TIMEOUT_S: u32 = 30;

/// Bits of [`Fragment::flags`].
pub mod flags {
    /// Fragments overlapped: the rest of the packet is dropped too (RFC 5722).
    pub const OVERLAP: u32 = 1 << 0;
    /// The packet is for this host, not for a service.
    pub const HOST: u32 = 1 << 1;
    /// Mode nat: fragments follow the binding of their flow, which [`super::Fragment::hash`] identifies.
    pub const NAT: u32 = 1 << 2;
}

/// Destination of a packet's fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Fragment {
    /// Flow hash, for outer header fields that vary by flow; with [`flags::NAT`] the flow's ports and protocol.
    pub hash: u64,
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Index in `SERVICES`.
    pub service: u32,
    /// Boot clock when the first fragment was seen, in seconds.
    pub seen_s: u32,
    /// See [`flags`].
    pub flags: u32,
    /// Used entries of `parts`.
    pub count: u32,
    /// Zero.
    pub pad: u32,
    /// First and last unit of 8 bytes that each fragment covers.
    pub parts: [[u16; 2]; PARTS],
}

map_value!(FragmentKey, Fragment);
