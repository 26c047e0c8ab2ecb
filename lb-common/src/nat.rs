//! Bindings of forwarding mode `nat`: what a client's flow is called on the workers' side, and back.
//!
//! A flow has two entries. [`Nat`] is found by the client's packets ([`crate::FlowKey`]) and says who they become;
//! [`Reply`] is found by the worker's ([`ReplyKey`]) and says whose answers they are, and how the flow stands. A port
//! is taken by writing a [`Reply`] where there is none: the kernel lets only one writer do that, so no lock and no
//! list of free ports is needed. The key names the worker too, so a port serves as many flows as there are workers.

use crate::{Address, Be16, FlowKey, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The hop that a client's packets come by: answers leave that way, whatever the routes say. So they need no
/// neighbour of the kernel's, and pass the router (and the VLAN) that knows the client.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LastHop {
    /// The hop's MAC, then the one that it sent to: the first 12 bytes of an answer.
    pub macs: [Be16; 6],
    /// VLAN tags, type and value of each, as they came; zero where there is none.
    pub tags: [Be16; 4],
    /// Interface that they come in by.
    pub ifindex: u32,
}

#[cfg(feature = "other-abi")]
pub use crate::other_abi::{Nat, Reply};

/// What becomes of a client's packets.
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
    /// The same when the client's latest packet was seen, to about a second.
    pub last_seen_s: u32,
    /// [`flags::ESTABLISHED`], so that most packets need not look at the other entry, [`flags::FRESH`] and [`flags::NEW`].
    pub flags: u32,
    /// Where the client's packets come from.
    pub hop: LastHop,
}

/// Whose packet an answer is.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct ReplyKey {
    /// Worker's address.
    pub worker: Address,
    /// Address that it answers to.
    pub source: Address,
    /// Worker's port.
    pub port: Be16,
    /// Port that it answers to.
    pub source_port: Be16,
    /// IP protocol number.
    pub protocol: u32,
}

/// What becomes of a worker's packets.
#[cfg(not(feature = "other-abi"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Reply {
    /// The client's flow: its address and port are the new destination, the VIP's port the new source port.
    pub flow: FlowKey,
    /// New source address.
    pub vip: Address,
    /// Where answers leave.
    pub hop: LastHop,
    /// Seconds of the boot clock when the worker's latest packet was seen, to about a second; before there is one,
    /// when the binding was made.
    pub last_seen_s: u32,
    /// How the flow stands, see [`flags`].
    pub flags: u32,
}

/// Bits of [`Reply::flags`].
pub mod flags {
    /// The worker has answered.
    pub const ANSWERED: u32 = 1 << 0;
    /// TCP: the client has acknowledged an answer. UDP: it has sent again after one.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// TCP: a FIN of the client has been seen, and no data since: after one there is none, so it was forged. In
    /// [`super::Nat`] too, and the same of its RST, so that most packets need not look.
    pub const CLIENT_FIN: u32 = 1 << 2;
    /// TCP: a FIN of the worker has been seen, and no data since.
    pub const WORKER_FIN: u32 = 1 << 3;
    /// TCP: a RST of the client has been seen, and since then neither data nor an answer: a worker answers one that was
    /// forged, if it nearly fits (RFC 5961).
    pub const CLIENT_RST: u32 = 1 << 4;
    /// TCP: a RST of the worker has been seen, and no data since.
    pub const WORKER_RST: u32 = 1 << 5;
    /// In [`super::Nat`] only: no packet has gone by the binding yet. The first one does, come what may.
    pub const FRESH: u32 = 1 << 30;
    /// In [`super::Nat`] only: and it is a new flow's.
    pub const NEW: u32 = 1 << 31;
}

/// Whether a flow that stands so has shown that its client is there: it has acknowledged an answer (UDP: sent again
/// after one), and its worker has not refused that. Any other binding gives way to newer ones, as whoever forges
/// addresses can have as many of those made as he likes.
#[inline(always)]
pub const fn is_proven(state: u32) -> bool {
    state & flags::ESTABLISHED != 0 && state & flags::WORKER_RST == 0
}

/// A binding in the order of their making: see [`is_proven`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Young {
    /// Where its answers' entry is.
    pub key: ReplyKey,
    /// Words of its client's address, folded; and both ports: whether that entry is still this flow's.
    pub client: [u32; 2],
}

impl Young {
    /// No binding.
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

    /// What tells a client's flow from others under the same [`ReplyKey`].
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

/// Idle seconds after which an established TCP flow is forgotten: RFC 5382 asks for two hours and four minutes.
pub const ESTABLISHED_S: u32 = 7_440;
/// The same once one side has closed (RFC 5382: four minutes).
pub const HALF_CLOSED_S: u32 = 240;
/// The same while the handshake is not complete. Retransmissions keep it: they come at most 32 s apart by then.
pub const OPENING_S: u32 = 40;
/// The same when both sides have closed: as long as the worker's stack remembers the ports (`TIME_WAIT`).
pub const CLOSED_S: u32 = 60;
/// The same after a reset by the worker, or before the flow was established.
pub const RESET_S: u32 = 10;

/// Whether a TCP flow is over, so that a SYN starts a new one.
#[inline(always)]
pub const fn is_over(state: u32) -> bool {
    use flags::{CLIENT_FIN, CLIENT_RST, WORKER_FIN, WORKER_RST};
    state & (CLIENT_RST | WORKER_RST) != 0 || state & (CLIENT_FIN | WORKER_FIN) == CLIENT_FIN | WORKER_FIN
}

/// Idle seconds that a TCP flow which stands so is remembered for.
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
        // Anybody can forge a reset that the worker drops in silence, and a flow may well be idle just then.
        HALF_CLOSED_S
    } else {
        ESTABLISHED_S
    }
}

/// Whether a binding whose packets were last seen then (client's, worker's) may be forgotten. A clock that
/// another processor has seen tick already is not long ago.
#[inline(always)]
pub const fn is_expired(idle_s: u32, client_s: u32, worker_s: u32, now_s: u32) -> bool {
    now_s.saturating_sub(client_s) > idle_s && now_s.saturating_sub(worker_s) > idle_s
}

map_value!(LastHop, Nat, ReplyKey, Reply, Young);
