//! The CLI: commands, its HTTP client, how things look on a terminal, and doctor.

pub mod client;
pub mod commands;
pub mod doctor;
pub mod render;
