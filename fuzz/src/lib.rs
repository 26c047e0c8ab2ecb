//! What the fuzzers check; also compiled into `lb-ebpf`'s tests.

pub mod bodies;
