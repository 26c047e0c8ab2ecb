//! Bindings of forwarding mode `nat`: the translation of a client's flow to the workers' side, and back.
//!
//! A flow has two entries. [`Nat`] is looked up for the client's packets ([`crate::FlowKey`]) and holds their new
//! addresses; [`Reply`] is looked up for the worker's packets ([`ReplyKey`]) and holds the client's flow and its state.
//! A port is allocated by inserting a [`Reply`] where there is none: the kernel lets only one writer succeed, so no lock
//! and no list of free ports is needed. The key contains the worker, so a port serves as many flows as there are workers.

use crate::{Address, Be16, FlowKey, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Previous hop of a client's packets: answers leave by it, whatever the routes say. They therefore need no neighbour
/// entry of the kernel, and pass the router (and the VLAN) that knows the client.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LastHop {
    /// MAC address of the hop, then the one that it sent to: the first 12 bytes of an answer.
    pub macs: [Be16; 6],
    /// VLAN tags as received, type and value of each; zero where there is none.
    pub tags: [Be16; 4],
    /// Interface on which the client's packets arrive.
    pub ifindex: u32,
}

#[cfg(feature = "other-abi")]
pub use crate::other_abi::{Nat, Reply};

/// Translation of a client's packets.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nat {
    /// New source address: this host's, or one of its pool.
    pub source: Address,
    /// New destination address.
    pub worker: Address,
    /// New source port.
    pub source_port: Be16,
    /// New destination port.
    pub port: Be16,
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Seconds of the boot clock when the binding was made.
    pub created_s: u32,
    /// Seconds of the boot clock when the client's latest packet was seen, to about a second.
    pub last_seen_s: u32,
    /// [`flags::ESTABLISHED`], so that most packets need not read the reply entry, [`flags::FRESH`] and [`flags::NEW`].
    pub flags: u32,
    /// Previous hop of the client's packets.
    pub hop: LastHop,
}

/// Key of a worker's packets.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct ReplyKey {
    /// Worker's address.
    pub worker: Address,
    /// Destination address of the worker's packets.
    pub source: Address,
    /// Worker's port.
    pub port: Be16,
    /// Destination port of the worker's packets.
    pub source_port: Be16,
    /// IP protocol number.
    pub protocol: u32,
}

/// Translation of a worker's packets.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Reply {
    /// Flow of the client: its address and port are the new destination, the VIP's port the new source port.
    pub flow: FlowKey,
    /// New source address.
    pub vip: Address,
    /// Hop by which answers leave.
    pub hop: LastHop,
    /// Seconds of the boot clock when the worker's latest packet was seen, to about a second; before the first packet,
    /// when the binding was made.
    pub last_seen_s: u32,
    /// State of the flow, see [`flags`].
    pub flags: u32,
}

/// Bits of [`Reply::flags`].
pub mod flags {
    /// The worker has answered.
    pub const ANSWERED: u32 = 1 << 0;
    /// TCP: the client has acknowledged an answer. UDP: it has sent again after one.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// TCP: a FIN of the client has been seen, and no data since: data after a FIN proves that the FIN was forged. Stored
    /// in [`super::Nat`] too, as is [`CLIENT_RST`], so that most packets need not read the reply entry.
    pub const CLIENT_FIN: u32 = 1 << 2;
    /// TCP: a FIN of the worker has been seen, and no data since.
    pub const WORKER_FIN: u32 = 1 << 3;
    /// TCP: a RST of the client has been seen, and since then neither data nor an answer: a worker answers a forged RST
    /// whose sequence number is nearly right (RFC 5961).
    pub const CLIENT_RST: u32 = 1 << 4;
    /// TCP: a RST of the worker has been seen, and no data since.
    pub const WORKER_RST: u32 = 1 << 5;
    /// In [`super::Nat`] only: the binding has not translated a packet yet. The first packet always passes.
    pub const FRESH: u32 = 1 << 30;
    /// In [`super::Nat`] only, together with [`FRESH`]: the first packet is that of a new flow.
    pub const NEW: u32 = 1 << 31;
}

/// Whether a flow in this state is confirmed: its client has acknowledged an answer (UDP: sent again after one), and its
/// worker has not refused that. Unconfirmed bindings are removed for newer ones, because a sender of forged addresses
/// can create any number of them.
#[inline(always)]
pub const fn is_assured(state: u32) -> bool {
    state & flags::ESTABLISHED != 0 && state & flags::WORKER_RST == 0
}

/// An unconfirmed binding in the ring of bindings, in the order of creation: see [`is_assured`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Embryonic {
    /// Key of the binding's reply entry.
    pub key: ReplyKey,
    /// Folded words of the client's address, and both ports: they tell whether the reply entry is still this flow's.
    pub client: [u32; 2],
}

impl Embryonic {
    /// An unused entry.
    pub const EMPTY: Self = Self {
        key: ReplyKey {
            worker: [0; 16],
            source: [0; 16],
            port: Be16::ZERO,
            source_port: Be16::ZERO,
            protocol: 0,
        },
        client: [0; 2],
    };

    /// Tells a client's flow from others under the same [`ReplyKey`].
    #[inline(always)]
    pub fn client(flow: &FlowKey) -> [u32; 2] {
        let s = &flow.source;
        let word = |i: usize| u32::from_ne_bytes([s[i], s[i + 1], s[i + 2], s[i + 3]]);
        let [a, b] = flow.source_port.to_bytes();
        let [c, d] = flow.port.to_bytes();
        [
            word(0) ^ word(4).rotate_left(8) ^ word(8).rotate_left(16) ^ word(12),
            u32::from_ne_bytes([a, b, c, d]),
        ]
    }
}

/// Idle seconds after which an established TCP flow is removed: RFC 5382 asks for two hours and four minutes.
pub const ESTABLISHED_S: u32 = 7_440;
/// Idle seconds after which a TCP flow is removed once one side has closed (RFC 5382: four minutes).
pub const HALF_CLOSED_S: u32 = 240;
/// Idle seconds for a TCP flow whose handshake is not complete. Retransmissions, at most 32 s apart by then, keep it.
pub const OPENING_S: u32 = 40;
/// Idle seconds for a TCP flow that both sides have closed: as long as the worker's stack keeps the ports (`TIME_WAIT`).
pub const CLOSED_S: u32 = 60;
/// Idle seconds for a TCP flow that the worker has reset, or that was reset before it was established.
pub const RESET_S: u32 = 10;

/// Whether a TCP flow has ended, so that a SYN starts a new one.
#[inline(always)]
pub const fn is_over(state: u32) -> bool {
    use flags::{CLIENT_FIN, CLIENT_RST, WORKER_FIN, WORKER_RST};
    state & (CLIENT_RST | WORKER_RST) != 0 || state & (CLIENT_FIN | WORKER_FIN) == CLIENT_FIN | WORKER_FIN
}

/// Idle seconds after which a TCP flow in this state is removed.
#[inline(always)]
pub const fn tcp_idle_s(state: u32) -> u32 {
    use flags::{CLIENT_FIN, CLIENT_RST, ESTABLISHED, WORKER_FIN, WORKER_RST};
    if state & WORKER_RST != 0 || (state & CLIENT_RST != 0 && state & ESTABLISHED == 0) {
        RESET_S
    } else if state & (CLIENT_FIN | WORKER_FIN) == CLIENT_FIN | WORKER_FIN {
        CLOSED_S
    } else if state & ESTABLISHED == 0 {
        OPENING_S
    } else if state & (CLIENT_FIN | CLIENT_RST | WORKER_FIN) != 0 {
        // Anybody can forge a reset that the worker drops silently, and the flow may well be idle at that time.
        HALF_CLOSED_S
    } else {
        ESTABLISHED_S
    }
}

/// Whether a binding whose packets were last seen at these times may be removed. Another CPU may have seen the clock tick
/// already, so times in the future count as now.
#[inline(always)]
pub const fn is_expired(idle_s: u32, client_s: u32, worker_s: u32, now_s: u32) -> bool {
    now_s.saturating_sub(client_s) > idle_s && now_s.saturating_sub(worker_s) > idle_s
}

map_value!(LastHop, Nat, ReplyKey, Reply, Embryonic);
