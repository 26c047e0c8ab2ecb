//! Desired state: what the operator wants. Pure data with its own validity rules; it is what the
//! store keeps, what the API and the configuration file contain, and the input of `compile`.

mod check;
mod check_service;
mod defaults;
mod desired;
mod difference;
mod event;
#[cfg(any(test, feature = "test-support"))]
pub mod generate;
pub mod guard;
mod health;
mod name;
mod observed;
mod ports;
mod quic;
mod rate;
mod region;
mod replica;
mod rollout;
mod seats;
mod sizes;
mod source;

pub use check::{Invalid, Subject};
pub use desired::{Backend, BackendState, Desired, ForwardingMode, OnDown, Scheduler, Service, WhenAllDown};
pub use difference::{Difference, differences};
pub use event::{EVENT_KINDS, has_kind_prefix, unknown_kind};
pub use guard::{Guard, ListName};
pub use health::{
    DEFAULT_PATH, DEFAULT_STATUS, GrpcCheck, HealthCheck, HealthError, HealthKind, HttpCheck, TlsCheck, Via,
};
pub use name::{Name, NameError, nearest};
pub use observed::{BackendId, Health, NextHop, Observed, Paths};
pub use ports::{Ports, PortsError, Protocol};
pub use quic::{QuicConfig, QuicError, ServerId};
pub(crate) use quic::{from_hex, to_hex};
pub use rate::{Rate, RateError, RateLimits};
pub use region::{
    Locality, Region, RegionPolicy, RegionRules, RegionShares, RegionState, Share, WHOLE, list as region_list,
};
pub use replica::{
    Answers, ClockWatch, GpuMemory, MOST_REQUESTS, PROTOCOL, Phase, REPORT_LIMIT, Readiness, Report,
    ReportError, gpu_memory, name as report_name, requests, share, tokens,
};
pub use rollout::{Canary, Rollout, RolloutState, percent};
pub use seats::MAX_SEATS;
pub use sizes::by_need;
pub use source::{Quantity, ReplicaSource, Selector, SelectorError, SourceKind};
