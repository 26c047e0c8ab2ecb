//! The BPF objects that build.rs compiled.

use aya::include_bytes_aligned;

/// The ingress host's program, as it ships.
pub static INGRESS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ingress"));
/// The worker's program, as it ships.
pub static DECAP: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/decap"));
/// The wrapper, and the programs to compare with.
pub static REWIND: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rewind"));
