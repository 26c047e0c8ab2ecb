//! The CLI: its commands, HTTP client, terminal output, and doctor.

pub mod client;
pub mod commands;
pub mod doctor;
pub mod render;
mod top;
