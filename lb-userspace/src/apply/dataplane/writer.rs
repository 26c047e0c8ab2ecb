//! Implements [`Maps`], the reconciler's view of the maps, for the kernel's maps.

use super::{Dataplane, DataplaneError};
use crate::{
    apply::reconcile::Maps,
    desired::model::Guard,
    plan::compile::{Cost, Plan},
};
use lb_common::{
    Backend, BackendStats, Service, ServiceKey, ServiceView, Slot, Vip, VipKey,
    quic::{QuicConfig, ServerIdKey},
};

impl Maps for Dataplane {
    fn sizes(&self) -> (u32, u32, u32) {
        (self.limits.services, self.limits.slots, self.limits.backends)
    }
    fn keys(&self) -> Result<Vec<(ServiceKey, u32)>, DataplaneError> {
        self.reader().service_keys()
    }
    fn vips(&self) -> Result<Vec<(VipKey, Vip)>, DataplaneError> {
        self.reader().vips()
    }
    fn service(&self, index: u32) -> Option<Service> {
        Self::service(self, index)
    }
    fn slots(&self, base: u32, count: u32) -> Vec<Slot> {
        self.read_slots(base, count)
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        Self::backend(self, index)
    }
    fn backend_stats(&self, index: u32) -> BackendStats {
        self.reader().backend_stats(index)
    }
    fn predecessor(&self) -> Option<Plan> {
        let all = Self::predecessor(self)?.clone();
        Some(Plan { index: all.index, vips: all.vips, backends: all.backends, ..Plan::default() })
    }
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
        Self::write_slots(self, base, slots)
    }
    fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<(), DataplaneError> {
        Self::rewrite_slots(self, slots)
    }
    fn grace_period(&mut self) {
        super::grace_period();
    }
    fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<(), DataplaneError> {
        Self::write_view(self, index, view, value)
    }
    fn set_active(&mut self, index: u32, view: u32) -> Result<(), DataplaneError> {
        Self::set_active(self, index, view)
    }
    fn set_used(&mut self, index: u32, used: bool) -> Result<(), DataplaneError> {
        Self::set_used(self, index, used)
    }
    fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<(), DataplaneError> {
        Self::write_backends(self, backends)
    }
    fn clear_stats(&mut self, index: u32) -> Result<(), DataplaneError> {
        self.clear_backend_stats(index)
    }
    fn cost(&self, index: u32) -> Cost {
        self.loads().cost(index)
    }
    fn set_cost(&mut self, index: u32, cost: Cost) -> Result<(), DataplaneError> {
        self.loads().set_cost(index, cost)
    }
    fn clear_load(&mut self, index: u32) -> Result<(), DataplaneError> {
        self.loads().clear(index)
    }
    fn report_flows(&self, index: u32, flows: u64) {
        self.loads().set_flows(index, flows);
    }
    fn set_key(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<(), DataplaneError> {
        self.set_service_index(key, service)
    }
    fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<(), DataplaneError> {
        Self::set_vip(self, key, vip)
    }
    fn set_egress(&mut self, ifindex: u32, allowed: bool) -> Result<(), DataplaneError> {
        Self::set_egress(self, ifindex, allowed)
    }
    fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>, DataplaneError> {
        Self::quic_configs(self)
    }
    fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>, DataplaneError> {
        Self::quic_servers(self)
    }
    fn set_quic_config(&mut self, key: u32, config: Option<&QuicConfig>) -> Result<(), DataplaneError> {
        Self::set_quic_config(self, key, config)
    }
    fn set_quic_server(&mut self, key: &ServerIdKey, backend: Option<u32>) -> Result<(), DataplaneError> {
        Self::set_quic_server(self, key, backend)
    }
    fn apply_guard(&mut self, guard: &Guard, now_s: u64) -> Result<Option<u64>, DataplaneError> {
        Self::apply_guard(self, guard, now_s)
    }
    fn use_features(&mut self, wanted: u32) -> Result<(), DataplaneError> {
        Self::use_features(self, wanted)
    }
}
