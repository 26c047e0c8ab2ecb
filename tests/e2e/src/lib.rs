//! End-to-end tests in network namespaces; they need root. Each file under
//! `tests/` is one promise of the system, checked with real clients, real
//! workers and the shipped binaries.
