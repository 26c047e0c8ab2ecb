//! Types that cross the kernel line: map keys and values, their limits, map and program names,
//! verdict reasons, and [`ABI_VERSION`].
//!
//! Input: nothing. Output: plain `repr(C)` types without padding, with the same layout on both targets
//! (`layout` asserts it at compile time). Called by `lb-ebpf` (kernel side, and natively in tests)
//! and by `lb-userspace` (which writes the maps).
#![no_std]
#![cfg_attr(
    feature = "other-abi",
    allow(unused_imports, reason = "some types are replaced by the other ABI's")
)]

pub mod backend;
pub mod describe;
pub mod exact;
pub mod flow;
pub mod fragment;
pub mod guard;
mod layout;
pub mod limits;
pub mod load;
pub mod names;
pub mod nat;
#[cfg(feature = "other-abi")]
mod other_abi;
pub mod passive;
pub mod probe;
pub mod quic;
pub mod rate_limit;
pub mod reason;
pub mod reply;
pub mod service;
pub mod settings;
pub mod slot;
pub mod stats;
pub mod syn_cache;

pub use backend::Backend;
pub use flow::{Flow, FlowKey};
pub use load::Load;
pub use nat::{LastHop, Nat, Reply, ReplyKey};
pub use reason::Reason;
pub use service::{PortRange, Service, ServiceKey, ServiceView, Vip, VipKey};
pub use slot::Slot;
pub use stats::BackendStats;

/// Version of everything in this crate on which a loaded program and a daemon must agree.
/// Increase it with any change of a map's key, value, flags or meaning. Other versions read flows by [`describe`]: a
/// field whose meaning changes gets another name.
pub const ABI_VERSION: u32 = if cfg!(feature = "other-abi") { VERSION + 1_000 } else { VERSION };
const VERSION: u32 = 6;

/// An address in maps: IPv6 in network order, IPv4 as `::ffff:a.b.c.d` (RFC 4291).
pub type Address = [u8; 16];

/// A 16-bit number in network byte order.
pub type Be16 = zerocopy::byteorder::network_endian::U16;

/// IPv4-mapped form of an IPv4 address given as its four bytes.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// Whether `address` is an IPv4-mapped address.
#[inline(always)]
pub const fn is_mapped(address: &Address) -> bool {
    let mut i = 0;
    while i < 10 {
        if address[i] != 0 {
            return false;
        }
        i += 1;
    }
    address[10] == 0xff && address[11] == 0xff
}

/// Implements the marker that lets aya copy a type in and out of maps.
macro_rules! map_value {
    ($($ty:ty),+ $(,)?) => { $(
        // SAFETY: the type is repr(C), holds only integers and arrays of them, has no padding
        // (its zerocopy derives prove that), and any bit pattern is valid.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $ty {}
    )+ };
}
pub(crate) use map_value;
