//! Desired state: the model, the configuration file, the store.

pub mod config;
pub mod model;
pub mod store;
