//! What lbd observes: health of backends, state of replicas, neighbours and routes, regions.

pub mod dial;
pub mod health;
mod http;
pub mod neighbour;
pub mod path_mtu;
pub mod regions;
pub mod replica;
