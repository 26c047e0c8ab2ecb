//! Limits and defaults of the maps. Each default can be changed when the programs are loaded;
//! the bounds are fixed by the types.

/// Default number of services.
pub const SERVICES: u32 = 4_096;
/// Default number of backends over all services: ten for each of [`SERVICES`], and room for removed backends that still
/// have flows. A backend of two services counts twice.
pub const BACKENDS: u32 = 49_152;
/// Default number of slots of all tables, live ones and those being written (8 bytes each).
pub const SLOTS: u32 = 8 * 1024 * 1024;
/// Default number of tracked TCP flows (exceptions only).
pub const FLOWS: u32 = 1_048_576;
/// Cached SYN choices that a stateless lookup would not repeat: five for each of a power of two of cache lines
/// ([`crate::syn_cache`] says how many handshakes that holds).
pub const SYNS: u32 = 5 * 131_072;
/// Default number of tracked UDP flows.
pub const UDP_FLOWS: u32 = 1_048_576;
/// Number of QUIC connection id configs over all services.
pub const QUIC_CONFIGS: u32 = 1_024;
/// Default number of fragmented packets with fragments outstanding.
pub const FRAGMENTS: u32 = 65_536;
/// Default number of bindings of mode `nat`. Memory is taken as they are made.
pub const NAT_FLOWS: u32 = 262_144;
/// Default number of unconfirmed bindings of mode `nat` per CPU: their clients have not acknowledged an answer.
pub const NAT_EMBRYONIC: u32 = 16_384;
/// Number of source addresses of packets to workers in mode `nat`: at most one per route to a worker.
pub const NAT_SOURCES: u32 = 4_096;
/// Default number of entries of the deny and allow lists together. Memory is taken as they are made.
pub const GUARD_ENTRIES: u32 = 1_048_576;
/// Default number of sources whose rate of new flows is tracked, over all services.
pub const SOURCES: u32 = 131_072;
/// Default number of VIP addresses.
pub const VIPS: u32 = 4_096;
/// Number of egress interfaces.
pub const EGRESS: u32 = 256;
/// Number of encapsulated health probes that await an answer.
pub const PROBES: u32 = 65_536;
/// Number of addresses on which one worker accepts encapsulated packets, and of VIPs that it serves.
pub const DECAP_ADDRESSES: u32 = 4_096;

/// Maximum number of port ranges of one VIP, TCP and UDP together.
pub const RANGES_PER_VIP: usize = 16;
/// Highest backend index (24 bits; the other bits of a slot's word are flags).
pub const MAX_BACKEND_INDEX: u32 = (1 << 24) - 2;

/// Available table sizes (primes). A service gets the first that is at least
/// [`SLOTS_PER_BACKEND`] times its number of backends, unless it sets a size.
pub const TABLE_SIZES: [u32; 8] = [251, 1_021, 4_093, 16_381, 65_537, 131_071, 262_139, 524_287];
/// Slots per backend that keep shares within about 1 % of the weights.
pub const SLOTS_PER_BACKEND: u32 = 100;
/// Table size of a service that sets none and has few enough backends for it.
pub const TABLE_SIZE: u32 = 65_537;

/// The oldest supported kernel, as major and minor version: the oldest on which every program loads and the whole tour of
/// the suite `kernels` passes (docs/compatibility.md).
pub const KERNEL_FLOOR: (u32, u32) = (6, 1);
