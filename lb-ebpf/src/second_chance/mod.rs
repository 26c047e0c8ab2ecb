//! The header that names the backends that may have a flow instead, and what a worker does with it.

pub mod header;
pub mod worker;
