//! What the reconciler needs of the dataplane: `dataplane::writer` implements it, and tests in memory.

use crate::{
    apply::dataplane::DataplaneError,
    desired::model::Guard,
    plan::compile::{Cost, Plan},
};
use lb_common::{
    Backend, BackendStats, Service, ServiceKey, ServiceView, Slot, Vip, VipKey,
    quic::{QuicConfig, ServerIdKey},
};

/// The writer's view of the maps.
pub trait Maps: Send {
    /// Sizes: services, slots, backends.
    fn sizes(&self) -> (u32, u32, u32);
    /// All exact-port services.
    fn keys(&self) -> Result<Vec<(ServiceKey, u32)>, DataplaneError>;
    /// All VIPs.
    fn vips(&self) -> Result<Vec<(VipKey, Vip)>, DataplaneError>;
    /// A service's entry.
    fn service(&self, index: u32) -> Option<Service>;
    /// `count` slots from `base` on.
    fn slots(&self, base: u32, count: u32) -> Vec<Slot>;
    /// A backend's entry.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// A backend's counters.
    fn backend_stats(&self, index: u32) -> BackendStats;
    /// Configs of QUIC connection ids.
    fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError>;
    /// QUIC server ids.
    fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError>;

    /// What another ABI version's maps say about who has which index, where ours are still empty.
    fn predecessor(&self) -> Option<Plan> {
        None
    }

    /// Writes slots.
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError>;
    /// Writes single slots of a table that packets may be looking at, one after the other. Whoever sees a slot's new primary
    /// sees its new secondary too.
    fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<(), DataplaneError>;
    /// Returns when every program that ran when it was called has ended.
    fn grace_period(&mut self);
    /// Writes the view of a service that is not live.
    fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError>;
    /// Makes a view the live one.
    fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError>;
    /// Marks a service's entry as taken or free.
    fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError>;
    /// Writes backends, each without a torn way.
    fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError>;
    /// Sets a backend's counters to zero.
    fn clear_stats(&mut self, index: u32) -> Result<(), DataplaneError>;
    /// How a backend's load is counted.
    fn cost(&self, index: u32) -> Cost;
    /// Sets that.
    fn set_cost(&mut self, index: u32, cost: Cost) -> Result<(), DataplaneError>;
    /// Forgets a backend's load, for an index that is used again.
    fn clear_load(&mut self, index: u32) -> Result<(), DataplaneError>;
    /// Reports a backend's live flows as its load.
    fn report_flows(&self, index: u32, flows: u64);
    /// Points an exact port at a service, or at none.
    fn set_key(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError>;
    /// Writes what else a VIP serves, or that it is none.
    fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError>;
    /// Allows or forbids an egress interface.
    fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError>;
    /// Writes how QUIC connection ids are read, or that they are not.
    fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError>;
    /// Points a QUIC server id at a backend, or at none.
    fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError>;
    /// Brings the deny and allow lists up to date; says when the next entry ends, in seconds since 1970 UTC.
    fn apply_guard(&mut self, _guard: &Guard, _now_s: u64) -> Result<Option<u64>, DataplaneError> {
        Ok(None)
    }
    /// Runs a program that has these of the features that are loaded on demand.
    fn use_features(&mut self, _wanted: u32) -> Result<(), DataplaneError> {
        Ok(())
    }
}
