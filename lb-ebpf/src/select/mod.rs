//! Service lookup, hash, choice of a backend, schedulers, and the trait over the maps.

mod choice;
pub mod choose;
mod flow_entries;
pub mod fragments;
pub mod hash;
pub mod next_hop;
pub mod others;
pub mod scheduler;
pub mod service;
pub mod tables;
