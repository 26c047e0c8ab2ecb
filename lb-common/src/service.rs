//! Services: how a packet finds one, and all that choosing a backend for it needs.

use crate::{Address, Be16, limits::RANGES_PER_VIP, map_value};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// No service at this place.
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

/// What a VIP serves beside its exact ports, and the mark that it is a VIP at all.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vip {
    /// Service for any other TCP port, or [`NO_SERVICE`].
    pub any_tcp: u32,
    /// Service for any other UDP port, or [`NO_SERVICE`].
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

/// Schedulers, as [`ServiceView::scheduler`] holds them.
pub mod scheduler {
    /// The slot's primary.
    pub const MAGLEV: u8 = 0;
    /// The less loaded of the slot's pair.
    pub const P2C: u8 = 1;
    /// The next of the list (of weighted turns: `rr` and `wrr` differ in the list only).
    pub const TURNS: u8 = 2;
    /// A random slot's primary.
    pub const RANDOM: u8 = 3;
    /// The one of the list with the least load, which the daemon reports as its live flows.
    pub const LEAST: u8 = 4;
    /// The primary, unless its load is above the service's cap and the secondary's is lower.
    pub const CAPPED: u8 = 5;
}

/// Bits of [`ServiceView::flags`].
pub mod flags {
    /// Any flow may be an exception: look the flow table up even where the slot is not marked.
    pub const TRACK_ALL: u32 = 1 << 0;
    /// UDP packets are placed by hash alone; no UDP flow is remembered.
    pub const UDP_STATELESS: u32 = 1 << 1;
    /// An established flow whose backend is down moves to the slot's primary (whose reset tells the
    /// client at once); otherwise it stays, in case the verdict was wrong.
    pub const RESET_ON_DOWN: u32 = 1 << 2;
    /// Slots are found by the client's address alone.
    pub const HASH_SOURCE: u32 = 1 << 3;
    /// The same held for the table before, see [`super::ServiceView::old_count`].
    pub const OLD_HASH_SOURCE: u32 = 1 << 4;
    /// Flows are written to the flow table even where the stateless answer is theirs, so that they can be counted.
    pub const COUNT_FLOWS: u32 = 1 << 5;
    /// The table is followed by as many slots whose primaries are the second choices of slots in transition.
    pub const SECONDS: u32 = 1 << 6;
    /// GUE packets carry the backends that may have the flow instead.
    pub const SECOND_CHANCE: u32 = 1 << 7;
    /// Packets go to the stage that translates addresses.
    pub const NAT: u32 = 1 << 8;
    /// The service has a limit of new flows.
    pub const LIMIT_FLOWS: u32 = 1 << 17;
    /// Each of its clients has.
    pub const LIMIT_SOURCES: u32 = 1 << 18;
    /// Nobody in the regions that the service may run in takes flows: what has nowhere to go is refused by
    /// [`crate::Reason::Residency`].
    pub const REFUSED_BY_RESIDENCY: u32 = 1 << 19;
    /// Packets are routed by their QUIC connection id where it names a backend.
    pub const QUIC: u32 = 1 << 16;
}

/// One version of a service. The half of the pair that is not live is where the next is written.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ServiceView {
    /// Key of the flow hash (two 64-bit words).
    pub seed: [u64; 2],
    /// First slot of the table in `PRIMARIES` and `SECONDARIES`.
    pub slot_base: u32,
    /// Slots of the table; 0: the service has no backend at all.
    pub slot_count: u32,
    /// See [`flags`].
    pub flags: u32,
    /// See [`scheduler`].
    pub scheduler: u8,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// Idle time after which a UDP flow is forgotten, in seconds.
    pub udp_timeout_s: u32,
    /// Revision of the desired state that this view was compiled from (low 32 bits), for people.
    pub revision: u32,
    /// Key of the flow hash of the old table.
    pub old_seed: [u64; 2],
    /// Slots of the old table: where flows are that no flow table names while a new seed, size or hash is younger than
    /// the drain time; 0: there is none. Then every slot is in transition, and secondaries are second choices as ever.
    pub old_count: u32,
    /// Entries of the list of backends of schedulers that go by turn.
    pub list_count: u32,
    /// Load above which [`scheduler::CAPPED`] looks at the secondary.
    pub load_cap: u32,
    /// Zero.
    pub pad2: u32,
    /// Time in which the service earns a new flow, see [`crate::limit::take`].
    pub flow_interval_ns: u64,
    /// Time of all but one of its largest burst.
    pub flow_tolerance_ns: u64,
    /// The same for each source.
    pub source_interval_ns: u64,
    /// The same for each source.
    pub source_tolerance_ns: u64,
    /// How many leading bits of a client's address, IPv4 and IPv6, make a source.
    pub source_bits: [u32; 2],
    /// Zero.
    pub reserved: [u64; 1],
}

impl ServiceView {
    /// Place of the second choices, where the view has them ([`flags::SECONDS`]).
    #[inline(always)]
    pub const fn seconds_base(&self) -> u32 {
        self.slot_base.wrapping_add(self.slot_count)
    }

    /// Place of the list.
    #[inline(always)]
    pub const fn list_base(&self) -> u32 {
        let seconds = if self.flags & flags::SECONDS != 0 { self.slot_count } else { 0 };
        self.seconds_base().wrapping_add(seconds)
    }

    /// Place of the old table.
    #[inline(always)]
    pub const fn old_base(&self) -> u32 {
        self.list_base().wrapping_add(self.list_count)
    }

    /// Slots that the view owns from `slot_base` on: table, second choices, list, old table.
    #[inline(always)]
    pub const fn region(&self) -> u32 {
        self.old_base().wrapping_add(self.old_count).wrapping_sub(self.slot_base)
    }
}

/// A service. `active` picks the live view, so one aligned store changes all of it at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Service {
    /// 0 or 1: the live view.
    pub active: u32,
    /// 1 while the entry belongs to a service.
    pub used: u32,
    /// The two views.
    pub views: [ServiceView; 2],
    /// Zero; keeps entries on their own cache lines, and of each view what every packet reads on one.
    pub reserved: [u64; 1],
}

map_value!(ServiceKey, VipKey, PortRange, Vip, ServiceView, Service);
