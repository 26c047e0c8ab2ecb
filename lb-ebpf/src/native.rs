//! The traits outside the kernel: a frame in a vector, tables in hash maps. For tests, fuzzers and
//! simulations; nothing here runs in production.
