//! Map operations that the reconciler needs: `dataplane::writer` implements them, and `fake` in memory for tests.

use crate::{
    apply::dataplane::DataplaneError,
    desired::model::Guard,
    plan::compile::{Cost, Plan},
};
use lb_common::{
    Backend, BackendStats, Service, ServiceKey, ServiceView, Slot, Vip, VipKey,
    quic::{QuicConfig, ServerIdKey},
};

/// Map operations of the single writer.
pub trait Maps: Send {
    /// Numbers of entries: services, slots, backends.
    fn sizes(&self) -> (u32, u32, u32);
    /// Lists all exact-port services.
    fn keys(&self) -> Result<Vec<(ServiceKey, u32)>, DataplaneError>;
    /// Lists all VIPs.
    fn vips(&self) -> Result<Vec<(VipKey, Vip)>, DataplaneError>;
    /// Reads a service's entry.
    fn service(&self, index: u32) -> Option<Service>;
    /// Reads `count` slots from `base` on.
    fn slots(&self, base: u32, count: u32) -> Vec<Slot>;
    /// Reads a backend's entry.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// Reads a backend's counters.
    fn backend_stats(&self, index: u32) -> BackendStats;
    /// Lists the configs of QUIC connection ids.
    fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError>;
    /// Lists the QUIC server ids.
    fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError>;

    /// Reads the indices of services and backends from another ABI version's maps, where ours are still empty.
    fn predecessor(&self) -> Option<Plan> {
        None
    }

    /// Writes slots.
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError>;
    /// Writes single slots of a table that packets may be reading, one after the other. A reader that sees a slot's new
    /// primary sees its new secondary too.
    fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<(), DataplaneError>;
    /// Returns when every program that was running at the call has ended.
    fn grace_period(&mut self);
    /// Writes the view of a service that is not live.
    fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError>;
    /// Makes a view the live one.
    fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError>;
    /// Marks a service's entry as taken or free.
    fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError>;
    /// Writes backends so that no packet uses a half-written next hop.
    fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError>;
    /// Sets a backend's counters to zero.
    fn clear_stats(&mut self, index: u32) -> Result<(), DataplaneError>;
    /// Reads how a backend's load is counted.
    fn cost(&self, index: u32) -> Cost;
    /// Sets how a backend's load is counted.
    fn set_cost(&mut self, index: u32, cost: Cost) -> Result<(), DataplaneError>;
    /// Clears a backend's load, for an index that is reused.
    fn clear_load(&mut self, index: u32) -> Result<(), DataplaneError>;
    /// Reports a backend's live flows as its load.
    fn report_flows(&self, index: u32, flows: u64);
    /// Points an exact port at a service, or removes it.
    fn set_key(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError>;
    /// Writes the port ranges and any-port services of a VIP, or removes the VIP.
    fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError>;
    /// Allows or forbids an egress interface.
    fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError>;
    /// Writes the format of QUIC connection ids of a config, or removes it.
    fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError>;
    /// Points a QUIC server id at a backend, or removes it.
    fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError>;
    /// Updates the deny and allow lists; returns when the next entry expires, in seconds since 1970 UTC.
    fn apply_guard(&mut self, _guard: &Guard, _now_s: u64) -> Result<Option<u64>, DataplaneError> {
        Ok(None)
    }
    /// Loads a program that has those of these features that are loaded on demand.
    fn use_features(&mut self, _wanted: u32) -> Result<(), DataplaneError> {
        Ok(())
    }
}
