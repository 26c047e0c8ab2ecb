//! Health probes that take the way of traffic: what the programs on an ingress host's interfaces know of them.

use crate::{Address, Be16, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Marks (`SO_MARK`) of probes: these upper bits, and a number below.
pub const MARK: u32 = 0x6c62_0000;
/// Bits of the number.
pub const MARK_BITS: u32 = 16;

/// What becomes of a probe with a mark: its destination, a backend, is where the outer packet goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ProbeWay {
    /// VIP that the inner packet is for.
    pub vip: Address,
    /// Destination port of GUE.
    pub gue_port: Be16,
    /// One of [`crate::backend::mode`]: GUE, IPIP or L2.
    pub mode: u8,
    /// Zero.
    pub pad: u8,
}

/// By what an answer is known: it comes from the VIP itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ProbeKey {
    /// The VIP.
    pub vip: Address,
    /// This host's address.
    pub local: Address,
    /// Port asked.
    pub port: Be16,
    /// This host's port.
    pub local_port: Be16,
}

map_value!(ProbeWay, ProbeKey);
