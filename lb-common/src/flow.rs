//! Tracked flows: TCP flows that differ from the stateless answer, and UDP flows.

use crate::{Address, Be16, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[cfg(feature = "other-abi")]
pub use crate::other_abi::{Flow, FlowKey};

/// Key of a flow. The service index stands for destination address and protocol.
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
    /// The client has sent a FIN or RST: the flow is not counted as live, and a SYN starts a new one.
    pub const CLOSING: u32 = 1 << 0;
    /// The entry was written at the end of a handshake, and the upper half of the flags is the upper half of a sequence
    /// number near the client's latest: see [`super::Flow::follow`]. Versions that do not know this bit ignore both.
    pub const HANDSHAKE: u32 = 1 << 1;
    /// A packet came that does not belong to the flow of that handshake, although its addresses and ports are the same.
    pub const DISPUTED: u32 = 1 << 2;
    /// In the answer of [`super::Flow::follow`] only: the packet does not belong to the flow of the handshake.
    pub const FOREIGN: u32 = 1 << 3;
    /// Place of the sequence number's upper half.
    pub const SEQUENCE_SHIFT: u32 = 16;
}

/// Seconds for which a flow's packets are compared with its handshake.
pub const YOUNG_S: u32 = 60;

/// Largest distance between sequence numbers of a flow's packets as they arrive, in units of 65,536: what a sender has in
/// flight at most (Linux: 4 MiB by default). So a forged handshake fits one flow in 500.
pub const SEQUENCE_REACH: i16 = 64;

/// Backend and times of a flow.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow {
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Seconds of the boot clock (`CLOCK_MONOTONIC`) when a packet was last seen, to about a second.
    pub last_seen_s: u32,
    /// Seconds of the boot clock when the first packet was seen. In a SYN cache entry: the SYN's sequence number, host byte order.
    pub created_s: u32,
    /// See [`flags`].
    pub flags: u32,
}

impl Flow {
    /// A flow to `backend`; the other arguments are the fields of the same names.
    #[inline(always)]
    #[allow(clippy::needless_update, reason = "another layout has more fields")]
    pub fn new(backend: u32, last_seen_s: u32, created_s: u32, flags: u32) -> Self {
        Self { backend, last_seen_s, created_s, flags, ..Self::default() }
    }

    /// Flags of the entry of a flow whose handshake a packet with this sequence number completes.
    #[inline(always)]
    pub const fn begun_at(sequence: u32) -> u32 {
        flags::HANDSHAKE | sequence >> 16 << flags::SEQUENCE_SHIFT
    }

    /// Flags after a packet with this sequence number; with [`flags::FOREIGN`] if the packet is another flow's.
    ///
    /// Whoever knows a flow's addresses and ports can forge a SYN and the ACK of its handshake, and so write an entry for
    /// a flow that needs none; it must not move that flow. So an entry is followed by packets that go on from its
    /// handshake, until it is [`YOUNG_S`] old; and where another flow's packets came in that time, for as long as it exists.
    #[inline(always)]
    pub const fn follow(flags: u32, created_s: u32, sequence: u32, now_s: u32) -> u32 {
        let is_certain = flags & flags::DISPUTED == 0 && now_s.saturating_sub(created_s) > YOUNG_S;
        if flags & flags::HANDSHAKE == 0 || is_certain {
            return flags;
        }
        let half = sequence >> 16;
        let ahead = (half as u16).wrapping_sub((flags >> flags::SEQUENCE_SHIFT) as u16) as i16;
        if ahead < -SEQUENCE_REACH || ahead > SEQUENCE_REACH {
            flags | flags::FOREIGN
        } else if ahead > 0 {
            flags & 0xffff | half << flags::SEQUENCE_SHIFT
        } else {
            flags
        }
    }
}

/// Age in seconds beyond which a cached SYN choice is no longer repeated. Longer than a client's
/// retransmissions of a SYN (Linux gives up after 127 s; RFC 6298 backs off 1, 3, 7, 15, 31, 63 s).
pub const SYN_TIMEOUT_S: u32 = 130;

/// Distance from a SYN's sequence number within which a packet still belongs to the handshake or to the first data
/// after it (an initial window). To forge a SYN on a live flow, an attacker would have to guess the flow's number.
pub const SYN_WINDOW: u32 = 65_535;

/// Idle time in seconds beyond which a sweep removes a tracked TCP flow: two hours and four minutes (RFC 5382). Until then
/// the flow is followed.
pub const TCP_IDLE_S: u32 = 7_440;

/// Seconds for which a closing flow is still followed; after this time a sweep may remove it.
pub const CLOSING_S: u32 = 120;

map_value!(FlowKey, Flow);
