//! Limits and defaults of the maps. Each default can be changed when the programs are loaded;
//! the bounds are fixed by the types.

/// Services, by default.
pub const SERVICES: u32 = 4_096;
/// Backends over all services, by default: ten for each of [`SERVICES`], and room for those that are removed but still have
/// flows. A backend of two services counts twice.
pub const BACKENDS: u32 = 49_152;
/// Slots of all tables, live and being written, by default (8 bytes each).
pub const SLOTS: u32 = 8 * 1024 * 1024;
/// Tracked TCP flows (exceptions only), by default.
pub const FLOWS: u32 = 1_048_576;
/// Recent SYN choices that a stateless lookup would not repeat; a power of two. As many as a second-level cache holds beside
/// the tables: with twice as many a SYN that is placed by load costs a tenth more.
pub const SYNS: u32 = 65_536;
/// Tracked UDP flows, by default.
pub const UDP_FLOWS: u32 = 1_048_576;
/// Configs of QUIC connection ids, over all services.
pub const QUIC_CONFIGS: u32 = 1_024;
/// Fragmented packets of which parts are expected, by default.
pub const FRAGMENTS: u32 = 65_536;
/// Bindings of mode `nat`, by default. They take memory only as they are made.
pub const NAT_FLOWS: u32 = 262_144;
/// Bindings of mode `nat` that one processor keeps whose clients have not shown themselves, by default.
pub const NAT_YOUNG: u32 = 16_384;
/// Addresses of a host that mode `nat` gives to packets to workers, one for each route to them at most.
pub const NAT_SOURCES: u32 = 4_096;
/// Entries of the deny and allow lists together, by default. They take memory only as they are made.
pub const GUARD_ENTRIES: u32 = 1_048_576;
/// Sources whose rate of new flows is known, over all services, by default.
pub const SOURCES: u32 = 131_072;
/// VIP addresses, by default.
pub const VIPS: u32 = 4_096;
/// Egress interfaces.
pub const EGRESS: u32 = 256;
/// Encapsulated health probes whose answers are waited for.
pub const PROBES: u32 = 65_536;
/// Addresses on which one worker accepts encapsulated packets, and VIPs that it serves.
pub const DECAP_ADDRESSES: u32 = 4_096;

/// Port ranges that one VIP can have, TCP and UDP together.
pub const RANGES_PER_VIP: usize = 16;
/// Highest backend index (24 bits: the rest of a slot's word is flags).
pub const MAX_BACKEND_INDEX: u32 = (1 << 24) - 2;

/// Table sizes on offer (primes). A service gets the first that is at least
/// [`SLOTS_PER_BACKEND`] times its backend count, unless it names one.
pub const TABLE_SIZES: [u32; 8] = [251, 1_021, 4_093, 16_381, 65_537, 131_071, 262_139, 524_287];
/// Slots per backend that keep shares within about 1 % of the weights.
pub const SLOTS_PER_BACKEND: u32 = 100;
/// Table size of a service that names none and is small enough for it.
pub const TABLE_SIZE: u32 = 65_537;

/// The oldest supported kernel, as major and minor version: the oldest on which every program loads and the whole tour of
/// the suite `kernels` passes (docs/compatibility.md).
pub const KERNEL_FLOOR: (u32, u32) = (6, 1);
