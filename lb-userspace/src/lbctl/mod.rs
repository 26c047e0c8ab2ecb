//! The CLI: its commands, HTTP client, terminal output, importers, and doctor.

pub mod client;
pub mod commands;
pub mod doctor;
pub mod import;
pub mod render;
mod top;
