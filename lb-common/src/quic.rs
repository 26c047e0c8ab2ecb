//! QUIC-LB: how a connection id names the backend that issued it (draft-ietf-quic-load-balancers-21).

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest server id, in bytes.
pub const SERVER_ID_MAX: usize = 15;
/// Number of config ids that a service can have at once: three bits, of which all ones means "not routable".
pub const CONFIGS: u32 = 7;
/// Shortest nonce, in bytes.
pub const NONCE_MIN: u8 = 4;
/// Longest server id and nonce together, in bytes: a connection id has 20, and the first holds the config id.
pub const TOGETHER_MAX: u8 = 19;
/// Number of words of the round keys of AES-128.
pub const ROUND_KEYS: usize = 44;

/// Key of a config: index of the service × 8 + config id.
pub const fn config_key(service: u32, id: u8) -> u32 {
    service << 3 | id as u32
}

/// Format of the connection ids of one config.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct QuicConfig {
    /// Length of the server id in bytes, 1 to 15.
    pub server_id_len: u8,
    /// Length of the nonce in bytes.
    pub nonce_len: u8,
    /// 1: encrypted with the keys below.
    pub keyed: u8,
    /// Zero.
    pub pad: u8,
    /// Round keys of AES-128, encryption (FIPS 197 5.2), big-endian words in host order.
    pub keys: [u32; ROUND_KEYS],
}

/// A server id of a service.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct ServerIdKey {
    /// Index in `SERVICES`.
    pub service: u32,
    /// The id, padded with zeros.
    pub id: [u8; SERVER_ID_MAX],
    /// Length of the id in bytes.
    pub len: u8,
}

map_value!(QuicConfig, ServerIdKey);
