//! Flow tables as another version might define them: other field orders, and a longer value. Upgrade tests use a program
//! and an `lbd` built with this feature; no shipped build has it.

use crate::{Address, Be16, LastHop};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// See the shipped type for the fields of each type in this module.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[allow(missing_docs, reason = "as in the shipped type")]
pub struct FlowKey {
    pub service: u32,
    pub port: Be16,
    pub source_port: Be16,
    pub source: Address,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[allow(missing_docs, reason = "as in the shipped type")]
pub struct Flow {
    /// A field that the shipped type does not have.
    pub other: u64,
    pub flags: u32,
    pub created_s: u32,
    pub backend: u32,
    pub last_seen_s: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[allow(missing_docs, reason = "as in the shipped type")]
pub struct Nat {
    pub hop: LastHop,
    pub flags: u32,
    pub last_seen_s: u32,
    pub created_s: u32,
    pub backend: u32,
    pub port: Be16,
    pub source_port: Be16,
    pub worker: Address,
    pub source: Address,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[allow(missing_docs, reason = "as in the shipped type")]
pub struct Reply {
    pub flags: u32,
    pub last_seen_s: u32,
    pub vip: Address,
    pub hop: LastHop,
    pub flow: FlowKey,
}
