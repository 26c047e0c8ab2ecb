//! The worker: decapsulation and SYN cookies.

pub mod cookie;
pub mod decap;
