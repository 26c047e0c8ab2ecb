//! Services: their lookup keys, and the data for choosing a backend.

use crate::{Address, Be16, limits::RANGES_PER_VIP, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Index that stands for "no service".
pub const NO_SERVICE: u32 = u32::MAX;

/// Key of an exact-port service.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct ServiceKey {
    /// The VIP.
    pub vip: Address,
    /// Destination port.
    pub port: Be16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

/// Key of a VIP.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct VipKey {
    /// The VIP.
    pub vip: Address,
}

/// A service that covers a port range. Bounds are inclusive, in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
    /// [`TCP`] or [`UDP`]; 0 in an unused entry.
    pub protocol: u32,
    /// Index in `SERVICES`.
    pub service: u32,
}

/// Services of a VIP for port ranges and any port. Its presence marks the address as a VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vip {
    /// Service for all other TCP ports, or [`NO_SERVICE`].
    pub any_tcp: u32,
    /// Service for all other UDP ports, or [`NO_SERVICE`].
    pub any_udp: u32,
    /// Used entries of `ranges`.
    pub range_count: u32,
    /// Zero.
    pub pad: u32,
    /// Ranges; those of one protocol do not overlap.
    pub ranges: [PortRange; RANGES_PER_VIP],
}

impl Vip {
    /// A VIP that serves exact ports only.
    pub const EMPTY: Self = Self {
        any_tcp: NO_SERVICE,
        any_udp: NO_SERVICE,
        range_count: 0,
        pad: 0,
        ranges: [PortRange { first: 0, last: 0, protocol: 0, service: NO_SERVICE }; RANGES_PER_VIP],
    };
}

/// Schedulers, as in [`ServiceView::scheduler`].
pub mod scheduler {
    /// The slot's primary.
    pub const MAGLEV: u8 = 0;
    /// The less loaded of the slot's pair of backends.
    pub const P2C: u8 = 1;
    /// The next backend of the list; `rr` and `wrr` differ in the list only.
    pub const ROUND_ROBIN: u8 = 2;
    /// A random slot's primary.
    pub const RANDOM: u8 = 3;
    /// The backend of the list with the least load, which the daemon reports as its live flows.
    pub const LEAST_CONN: u8 = 4;
    /// The primary, unless its load is above the service's cap and the secondary's is lower.
    pub const BOUNDED_LOAD: u8 = 5;

    /// Whether new flows are placed on either backend of their slot's pair.
    #[inline(always)]
    pub const fn is_by_pair(scheduler: u8) -> bool {
        matches!(scheduler, P2C | BOUNDED_LOAD)
    }
}

/// Bits of [`ServiceView::flags`].
pub mod flags {
    /// Any flow may be an exception: look up the flow table even where the slot is not marked.
    pub const TRACK_ALL: u32 = 1 << 0;
    /// UDP packets are placed by hash alone; UDP flows are not tracked.
    pub const UDP_STATELESS: u32 = 1 << 1;
    /// An established flow whose backend is down moves to the slot's primary (whose reset tells the
    /// client at once); otherwise it stays, in case the health check was wrong.
    pub const RESET_ON_DOWN: u32 = 1 << 2;
    /// Slots are selected by the client's address alone.
    pub const HASH_SOURCE: u32 = 1 << 3;
    /// Slots of the old table are selected by the client's address alone, see [`super::ServiceView::old_count`].
    pub const OLD_HASH_SOURCE: u32 = 1 << 4;
    /// Flows are written to the flow table even where the stateless answer is right, so that they can be counted.
    pub const COUNT_FLOWS: u32 = 1 << 5;
    /// The table is followed by as many slots whose primaries are the second choices of slots in transition.
    pub const SECONDS: u32 = 1 << 6;
    /// GUE packets carry the other backends that may have the flow.
    pub const SECOND_CHANCE: u32 = 1 << 7;
    /// Packets go to the stage that translates addresses.
    pub const NAT: u32 = 1 << 8;
    /// The service has a rate limit of new flows.
    pub const LIMIT_FLOWS: u32 = 1 << 17;
    /// Each source has a rate limit of new flows.
    pub const LIMIT_SOURCES: u32 = 1 << 18;
    /// No allowed region of the service takes flows: packets without a backend are dropped with
    /// [`crate::Reason::Residency`].
    pub const REFUSED_BY_RESIDENCY: u32 = 1 << 19;
    /// No backend takes new flows: packets without a backend are answered ([`crate::Reason::NoBackendAnswered`]).
    pub const REJECT: u32 = 1 << 20;
    /// Packets are routed by QUIC connection id where it names a backend.
    pub const QUIC: u32 = 1 << 16;
}

/// One version of a service. The next version is written to the view that is not live.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceView {
    /// Key of the flow hash (two 64-bit words).
    pub seed: [u64; 2],
    /// First slot of the table in `PRIMARIES` and `SECONDARIES`.
    pub slot_base: u32,
    /// Number of slots of the table; 0: the service has no backend at all.
    pub slot_count: u32,
    /// See [`flags`].
    pub flags: u32,
    /// See [`scheduler`].
    pub scheduler: u8,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// Idle time after which a UDP flow is removed, in seconds.
    pub udp_timeout_s: u32,
    /// Revision of the desired state that this view was compiled from (low 32 bits), for diagnosis.
    pub revision: u32,
    /// Key of the flow hash of the old table.
    pub old_seed: [u64; 2],
    /// Number of slots of the old table, which places flows that are in no flow table while a new seed, size or hash is
    /// younger than the drain time; 0: there is no old table. While there is one, every slot is in transition, and
    /// secondaries remain second choices.
    pub old_count: u32,
    /// Number of entries in the list of backends, for schedulers that use a list.
    pub list_count: u32,
    /// Load above which [`scheduler::BOUNDED_LOAD`] considers the secondary.
    pub load_cap: u32,
    /// Factor of the write budget for flows from before a transition, see [`crate::rate_limit::record_factor`]; 0, which
    /// an earlier `lbd` leaves: 1.
    pub record_factor: u32,
    /// Time in which the service earns a new flow, see [`crate::rate_limit::take`].
    pub flow_interval_ns: u64,
    /// Time for all but one flow of the service's largest burst.
    pub flow_tolerance_ns: u64,
    /// Time in which one source earns a new flow.
    pub source_interval_ns: u64,
    /// Time for all but one flow of one source's largest burst.
    pub source_tolerance_ns: u64,
    /// Number of leading bits of a client's address, IPv4 and IPv6, that make up a source.
    pub source_bits: [u32; 2],
    /// Idle time after which a tracked TCP flow is removed, in seconds; 0, which an earlier `lbd` leaves:
    /// [`crate::flow::TCP_IDLE_S`]. For `lbd` only.
    pub tcp_timeout_s: u32,
    /// Zero.
    pub reserved: u32,
}

impl ServiceView {
    /// First slot of the second choices, where the view has them ([`flags::SECONDS`]).
    #[inline(always)]
    pub const fn seconds_base(&self) -> u32 {
        self.slot_base.wrapping_add(self.slot_count)
    }

    /// First slot of the list.
    #[inline(always)]
    pub const fn list_base(&self) -> u32 {
        let seconds = if self.flags & flags::SECONDS != 0 { self.slot_count } else { 0 };
        self.seconds_base().wrapping_add(seconds)
    }

    /// First slot of the old table.
    #[inline(always)]
    pub const fn old_base(&self) -> u32 {
        self.list_base().wrapping_add(self.list_count)
    }

    /// Number of slots of the view from `slot_base` on: table, second choices, list, old table.
    #[inline(always)]
    pub const fn region(&self) -> u32 {
        self.old_base().wrapping_add(self.old_count).wrapping_sub(self.slot_base)
    }
}

/// A service. `active` selects the live view, so one aligned store changes all of it at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Service {
    /// 0 or 1: the live view.
    pub active: u32,
    /// 1 while the entry belongs to a service.
    pub used: u32,
    /// The two views.
    pub views: [ServiceView; 2],
    /// Zero; keeps entries on separate cache lines, and the fields of each view that every packet reads on one line.
    pub reserved: [u64; 1],
}

map_value!(ServiceKey, VipKey, PortRange, Vip, ServiceView, Service);
