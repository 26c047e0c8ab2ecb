//! BPF objects compiled by build.rs, embedded so that `lbd` is a single file to install.
//!
//! Empty when built with `LB_SKIP_BPF=1`. Used by `dataplane` and by the tests that load programs.

/// Program of an ingress host.
pub static INGRESS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ingress"));

/// Program of a worker.
pub static DECAP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/decap"));

/// Programs that encapsulate health probes along the path of traffic.
pub static PROBE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe"));
