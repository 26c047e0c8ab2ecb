//! The BPF objects that build.rs compiled: `lbd` is one file to install.
//!
//! Empty when built with `LB_SKIP_BPF=1`. Read by `dataplane` and by the tests that load programs.

/// The ingress host's program.
pub static INGRESS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ingress"));

/// The worker's program.
pub static DECAP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/decap"));

/// Programs that health probes on the way of traffic pass.
pub static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe"));
