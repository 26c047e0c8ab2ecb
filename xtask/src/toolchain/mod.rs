//! Toolchains beyond stable Rust that the build needs.

#[allow(dead_code, reason = "shared with lb-userspace/build.rs, which uses the rest")]
pub mod bpf;
