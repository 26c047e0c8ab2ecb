//! The control plane of the balancer: everything behind `lbd` and `lbctl`.
//!
//! Inside, pure (no clock, no random source, no I/O; time and seeds are arguments):
//! [`model`] ← `policy`, `maglev` ← `compile`. Around it, the edges: `dataplane` (aya maps and
//! programs), `store`, `health`, `replica`, `regions`, `neighbour`, `api`, `cli`. `reconcile` ties them together.

pub mod apply;
pub mod clock;
pub mod desired;
pub mod lbctl;
pub mod lbd;
pub mod observed;
pub mod plan;
pub mod printable;
pub mod serve;

/// Where `lbd` listens, and `lbctl` looks for it, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/lb/lbd.sock";
