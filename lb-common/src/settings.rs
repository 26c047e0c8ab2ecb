//! Settings that a deployment makes once: a read-only global of each program, set at load time,
//! so that the verifier removes what is switched off.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Settings of the `ingress` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IngressSettings {
    /// [`crate::ABI_VERSION`] that the loader was built with.
    pub abi_version: u32,
    /// Whether IPv6 packets are looked at (0: passed to the host).
    pub ipv6: u8,
    /// Whether IEEE 802.1Q and 802.1ad tags are looked through.
    pub vlan: u8,
    /// TTL or hop limit of outer headers.
    pub outer_ttl: u8,
    /// Whether counters of bytes and packets are kept.
    pub stats: u8,
    /// Generated ICMP messages per second and CPU; 0: none.
    pub icmp_per_s: u32,
    /// Largest number of messages in a burst.
    pub icmp_burst: u32,
}

impl IngressSettings {
    /// Everything on.
    pub const DEFAULT: Self = Self {
        abi_version: crate::ABI_VERSION,
        ipv6: 1,
        vlan: 1,
        outer_ttl: 64,
        stats: 1,
        icmp_per_s: 1_000,
        icmp_burst: 100,
    };
}

/// Settings of the `decap` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DecapSettings {
    /// [`crate::ABI_VERSION`] that the loader was built with.
    pub abi_version: u32,
    /// UDP port on which GUE arrives, host byte order.
    pub gue_port: u16,
    /// Whether IPv6 outer headers are looked at.
    pub ipv6: u8,
    /// Whether tags are looked through.
    pub vlan: u8,
}

impl DecapSettings {
    /// Everything on, GUE on its registered port.
    pub const DEFAULT: Self = Self { abi_version: crate::ABI_VERSION, gue_port: GUE_PORT, ipv6: 1, vlan: 1 };
}

/// GUE's registered UDP port (IANA).
pub const GUE_PORT: u16 = 6080;

map_value!(IngressSettings, DecapSettings);
