//! A deterministic simulation of the control plane: several ingress hosts on one thread, in simulated time, from a seed.
//!
//! Real: the API with its handlers and rights, `Control`, compile and policy, the reconciler, the file store and the local
//! data (on files in memory), the records of the etcd store, health checks, replica streams over HTTP, regions, and the
//! wiring of their parts. Simulated: time and chance ([`environment`]), workers and the network to them, the cluster of
//! etcd, disks that fill up, and the kernel's maps (in memory, and checked at each write).
//!
//! Each seed runs in a process of its own, so that nothing of one run is left in another. [`main`] runs many.

mod bugs;
mod disk;
pub mod environment;
mod faults;
mod host;
mod invariants;
mod model;
mod operations;
mod runner;
mod shared;
mod simulation;
mod tables;
mod workers;

pub use runner::main;
