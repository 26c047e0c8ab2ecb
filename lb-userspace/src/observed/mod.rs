//! What is measured outside: health, replicas, neighbours and routes, regions.

pub mod health;
pub mod neighbour;
pub mod regions;
pub mod replica;
