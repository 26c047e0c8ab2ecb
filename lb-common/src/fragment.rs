//! Fragmented packets: where the first part of each went.

use crate::{Address, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the parts of a packet have in common (RFC 791, RFC 8200 4.5).
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
    /// Protocol (IPv4), or 0: IPv6 tells packets apart without it.
    pub protocol: u32,
}

/// Parts of a packet that are told apart. Of a longer packet (above 12,000 bytes in parts of 1,500) the
/// rest are only compared with these.
pub const PARTS: usize = 8;

/// Seconds after its first part for which the others are expected. Linux's `ipfrag_time`; RFC 8200 has 60.
pub const FRAGMENT_TIMEOUT_S: u32 = 30;

/// Bits of [`Fragment::flags`].
pub mod flags {
    /// Parts overlapped: the rest is dropped too (RFC 5722).
    pub const OVERLAP: u32 = 1 << 0;
    /// The packet is for this host, not for a service.
    pub const HOST: u32 = 1 << 1;
    /// Mode nat: the parts go by their flow's binding, and [`super::Fragment::hash`] says which flow that is.
    pub const NAT: u32 = 1 << 2;
}

/// Where a packet's parts go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Fragment {
    /// The flow's hash, for what varies by flow in outer headers; with [`flags::NAT`] its ports and protocol.
    pub hash: u64,
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Index in `SERVICES`.
    pub service: u32,
    /// Boot clock of the first part, in seconds.
    pub seen_s: u32,
    /// See [`flags`].
    pub flags: u32,
    /// Used entries of `parts`.
    pub count: u32,
    /// Zero.
    pub pad: u32,
    /// First and last of the units of 8 bytes that each part covers.
    pub parts: [[u16; 2]; PARTS],
}

map_value!(FragmentKey, Fragment);
