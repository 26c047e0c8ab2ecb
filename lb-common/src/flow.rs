//! Flows that are remembered: exceptions to the stateless answer (TCP), and UDP flows.

use crate::{Address, Be16, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[cfg(feature = "other-abi")]
pub use crate::other_abi::{Flow, FlowKey};

/// A flow. The service stands for destination address and protocol.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct FlowKey {
    /// Client's address.
    pub source: Address,
    /// Client's port.
    pub source_port: Be16,
    /// The VIP's port.
    pub port: Be16,
    /// Index in `SERVICES`.
    pub service: u32,
}

/// Bits of [`Flow::flags`].
pub mod flags {
    /// A FIN or RST of the client has been seen: not counted as live, and a SYN starts anew.
    pub const CLOSING: u32 = 1 << 0;
}

/// Where a flow goes.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow {
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Seconds of the boot clock (`CLOCK_MONOTONIC`) when a packet was last seen, to about a second.
    pub last_seen_s: u32,
    /// The same of the first packet. Of a note instead: the SYN's sequence number, host byte order.
    pub created_s: u32,
    /// See [`flags`].
    pub flags: u32,
}

impl Flow {
    /// A flow to `backend`; the rest as the fields of these names say.
    #[inline(always)]
    #[allow(clippy::needless_update, reason = "another layout has more fields")]
    pub fn new(backend: u32, last_seen_s: u32, created_s: u32, flags: u32) -> Self {
        Self { backend, last_seen_s, created_s, flags, ..Self::default() }
    }
}

/// Age in seconds beyond which a SYN choice is no longer repeated. Longer than a client's
/// retransmissions of a SYN (Linux gives up after 127 s; RFC 6298 backs off 1, 3, 7, 15, 31, 63 s).
pub const SYN_TIMEOUT_S: u32 = 130;

/// Sequence numbers from a SYN's on that still belong to its handshake or the first data after it (an
/// initial window). A SYN forged on somebody's live flow would have to guess the flow's own.
pub const SYN_WINDOW: u32 = 65_535;

/// Idle age in seconds beyond which a tracked TCP flow no longer counts as live. It is
/// still followed: only the least recently used are forgotten, and only for want of room.
pub const TCP_IDLE_S: u32 = 7_440;

/// Seconds for which a closing flow is still followed as before, and after which a sweep may remove it.
pub const CLOSING_S: u32 = 120;

map_value!(FlowKey, Flow);
