//! Health probes that take the path of traffic: data for the programs on an ingress host's interfaces.

use crate::{Address, Be16, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Upper bits of the marks (`SO_MARK`) of probes; the lower bits hold a number.
pub const MARK: u32 = 0x6c62_0000;
/// Number of lower bits of a mark, which hold the number.
pub const MARK_BITS: u32 = 16;

/// Encapsulation of a probe with a mark: its destination, a backend, becomes the outer destination.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ProbeTunnel {
    /// VIP that the inner packet is for.
    pub vip: Address,
    /// Destination port of GUE.
    pub gue_port: Be16,
    /// One of [`crate::backend::mode`]: GUE, IPIP or L2.
    pub mode: u8,
    /// Zero.
    pub pad: u8,
}

/// Key of an answer to a probe: it comes from the VIP itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ProbeKey {
    /// The VIP.
    pub vip: Address,
    /// This host's address.
    pub local: Address,
    /// Port that is probed.
    pub port: Be16,
    /// This host's port.
    pub local_port: Be16,
}

map_value!(ProbeTunnel, ProbeKey);
