//! What others may ask of a running daemon: the API, explain and metrics.

pub mod api;
pub mod explain;
pub mod metrics;
