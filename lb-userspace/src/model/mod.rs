//! Desired state: what the operator asked for. Pure data with its own validity rules; it is what the
//! store keeps, what the API and the configuration file speak, and what `compile` starts from.

mod check;
mod desired;
mod difference;
mod health;
mod name;
mod observed;
mod ports;
mod quic;
mod seats;

pub use check::Invalid;
pub use desired::{Backend, BackendState, Desired, ForwardingMode, OnDown, Scheduler, Service};
pub use difference::{Difference, differences};
pub use health::{DEFAULT_PATH, DEFAULT_STATUS, HealthCheck, HealthError, HealthKind};
pub use name::{Name, NameError};
pub use observed::{BackendId, Health, NextHop, Observed};
pub use ports::{Ports, PortsError, Protocol};
pub use quic::{QuicConfig, QuicError, ServerId};
