//! Backends: destination and forwarding data of one backend, in one cache line.

use crate::{Address, Be16, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of the values of [`crate::names::OWN_ADDRESSES`].
pub mod own_address {
    /// Packets to a worker in mode `nat` have it as source.
    pub const TRANSLATED: u32 = 1 << 0;
    /// A worker has it.
    pub const WORKER: u32 = 1 << 1;
}

/// Bits of [`Backend::flags`].
pub mod flags {
    /// The entry belongs to a backend.
    pub const USED: u32 = 1 << 0;
    /// Takes no new flow: its slots are compiled away, and the flag is for flows that still name it.
    pub const DRAINING: u32 = 1 << 1;
    /// Down by health check or by the operator.
    pub const DOWN: u32 = 1 << 2;
    /// The next hop fields are valid; otherwise the program asks the kernel's FIB.
    pub const RESOLVED: u32 = 1 << 3;
    /// Not [`RESOLVED`], because the entry is being changed: next hop and source are those of the entry in
    /// [`crate::names::CHANGING_BACKENDS`]. Programs that do not know this bit ask the FIB.
    pub const CHANGING: u32 = 1 << 4;
}

/// Forwarding modes, as [`Backend::mode`] holds them.
pub mod mode {
    /// No mode: the service's residency forbids this backend, and packets for it are dropped
    /// ([`crate::Reason::Residency`]).
    pub const FORBIDDEN: u8 = 0;
    /// IP in IP: 4in4, 6in6, 4in6, 6in4 (RFC 2003, RFC 2473, RFC 4213).
    pub const IPIP: u8 = 1;
    /// Generic UDP encapsulation, variant 0 (draft-ietf-intarea-gue).
    pub const GUE: u8 = 2;
    /// Rewrite of the destination MAC address.
    pub const L2: u8 = 3;
    /// Full address translation.
    pub const NAT: u8 = 4;
    /// Delivery to this host's own stack.
    pub const LOCAL: u8 = 5;
    /// GUE whose private data names the other backends that may have the flow.
    pub const GUE_CHAIN: u8 = 6;

    /// Whether packets travel in GUE.
    #[inline(always)]
    pub const fn is_gue(mode: u8) -> bool {
        mode == GUE || mode == GUE_CHAIN
    }
}

/// A backend of one service. A worker that serves two services has two entries, so that
/// one counter update per packet counts for both the service and the backend.
///
/// To change an entry in place: copy it to [`crate::names::CHANGING_BACKENDS`], set [`flags::CHANGING`] instead of
/// [`flags::RESOLVED`], wait for a grace period, write the rest, wait again, exchange the flags again. A copy is not
/// written anew before another grace period. So a packet sees all of the old hop or all of the new one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Backend {
    /// Outer destination.
    pub address: Address,
    /// Outer source; its low `source_bits` bits are replaced by bits of the flow hash.
    pub source: Address,
    /// Next hop's MAC.
    pub next_hop: [u8; 6],
    /// Largest IP packet that fits the path (egress MTU or less); 0: unknown, not checked.
    pub mtu: u16,
    /// Egress interface's MAC.
    pub egress_mac: [u8; 6],
    /// VLAN tag (TCI) to push on egress, 0 for none.
    pub vlan: Be16,
    /// Egress interface.
    pub ifindex: u32,
    /// See [`flags`].
    pub flags: u32,
    /// See [`mode`].
    pub mode: u8,
    /// Low bits of `source` that vary by flow, 0 to 64 (ipip only).
    pub source_bits: u8,
    /// Destination port of GUE, or the worker's port in nat mode.
    pub port: Be16,
    /// Index in `SERVICES` of the service of this backend.
    pub service: u32,
}

map_value!(Backend);
