//! What a running daemon serves: the API, explain and metrics.

pub mod api;
pub mod connections;
pub mod explain;
pub mod metrics;
