//! Replica state: what the process behind each backend says of itself, and how loaded it is.
//!
//! Input: the watched desired state; workers' event streams ([`events`]), or the metrics pages of other servers
//! ([`exposition`], [`scrape`]). Output: `(BackendId, Readiness)` events for the reconciler, load scores for the
//! dataplane ([`LoadSink`]), and the [`ReplicaRegistry`] that API and metrics read. Called by the daemon.
//!
//! A stream that breaks is a hint at once, and a probe at once confirms it or not. A report that cannot be true
//! is refused by name, and the last good one stands.

pub mod events;
pub mod exposition;
pub mod http;
pub mod registry;
pub mod scores;
pub mod scrape;
pub mod watch;
pub mod watcher;

#[cfg(test)]
mod tests;

pub use registry::{Entry, ReplicaRegistry, ReplicaTransition};
pub use scores::{LoadSink, Places, Scores};
pub use watcher::Watcher;
