//! Health checks: probes each backend, and reports each change of its verdict with the reason.
//!
//! Input: the watched desired state, and the verdicts from before a restart. Output: `(BackendId, Health)`
//! events, and the [`HealthRegistry`] that API and metrics read. Called by the daemon.
//! [`passive`] triggers early probes. [`verdict`] is pure; [`probe`] does the I/O of one probe and tells failures of the worker
//! from late answers and from what this host lacks ([`outcome`]); [`checker`] runs one task per backend.

mod backend_watch;
pub mod checker;
pub mod grpc;
pub mod http;
pub mod outcome;
pub mod passive;
pub mod permits;
pub mod probe;
pub mod registry;
pub mod tls;
pub mod tunnel;
pub mod verdict;

#[cfg(test)]
mod tests;

pub use checker::{Checker, Prober};
pub use outcome::{Obstacle, ObstacleKind, Outcome, ProbeError, ProbeStep};
pub use passive::{EarlyProbe, PassiveReport, PassiveSource};
pub use probe::{ProbeTarget, prober, prober_through};
pub use registry::{HealthEntry, HealthRegistry, NotProbed, Probe, ProbeCounts, Transition};
pub use tunnel::{LoadPrograms, ProbePrograms, Through, Tunnel};
