//! Replica state: what the process behind each backend reports about itself, and how loaded it is.
//!
//! Input: the watched desired state; workers' event streams ([`events`]), or the metrics pages of other servers
//! ([`exposition`], [`scrape`]). Output: `(BackendId, Readiness)` events for the reconciler, load scores for the
//! dataplane ([`LoadSink`]), and the [`ReplicaRegistry`] that API and metrics read. Called by the daemon.
//!
//! A broken stream triggers an immediate probe, which confirms or refutes that the replica is dead. An implausible report
//! is refused with the offending name, and the last valid report stays in effect.

pub mod events;
pub mod exposition;
pub mod fetch;
pub mod registry;
pub mod scores;
pub mod scrape;
pub mod watch;
pub mod watcher;

#[cfg(test)]
mod tests;

pub use registry::{ReplicaEntry, ReplicaRegistry, ReplicaTransition};
pub use scores::{BackendIndices, LoadSink, Scores};
pub use watcher::Watcher;
