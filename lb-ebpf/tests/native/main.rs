//! The dataplane's packet code, run natively: against independent readings, tables of cases, and models.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../../fuzz/src/bodies/mod.rs"]
mod bodies;
#[path = "../../../tests/packet/src/build.rs"]
#[allow(dead_code, reason = "the packet tests use the rest")]
mod build;
mod choose;
mod fast_path;
mod flood;
mod hostile;
mod hostile_stages;
mod keep;
mod nat;
mod passive;
mod reject;
mod scheduler;
mod second_chance;
#[path = "../../../tests/packet/src/seeds.rs"]
mod seeds;
mod syn_cache;
mod too_big;
mod two_processors;
mod worker;
mod world;
