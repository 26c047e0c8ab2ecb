//! The tool chains beyond stable Rust that the build needs.
pub mod bpf;
