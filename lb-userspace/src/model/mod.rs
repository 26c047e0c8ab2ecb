//! Desired state: what the operator asked for. Pure data with its own validity rules; it is what the
//! store keeps, what the API and the configuration file speak, and what `compile` starts from.

mod desired;
mod health;
mod name;
mod observed;
mod ports;

pub use desired::{Backend, BackendState, Desired, ForwardingMode, Invalid, OnDown, Scheduler, Service};
pub use health::{HealthCheck, HealthKind};
pub use name::{Name, NameError};
pub use observed::{BackendId, Health, NextHop, Observed};
pub use ports::{Ports, PortsError, Protocol};
