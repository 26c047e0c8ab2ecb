//! The traits outside the kernel: a frame in a vector, tables in hash maps. For tests, fuzzers,
//! simulations and `explain`; no packet of production passes here.
//!
//! [`VecFrame`] has as much room around the packet as the test gives it, may have a part outside the
//! linear one (as a multi-buffer frame has), and remembers how its ends were moved. [`HashTables`] holds
//! what both programs ask for; its clock stands until a test moves it.
extern crate std;

mod frame;
mod quic;
mod stages;
mod tables;

pub use frame::{Adjust, FibFn, VecFrame};
pub use quic::route_id;
pub use stages::run;
pub use tables::{HashTables, WhenFull, run_on};
