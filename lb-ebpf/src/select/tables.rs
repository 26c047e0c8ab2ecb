//! The maps as the packet code sees them. Implemented over BPF maps in the kernel, over hash maps in
//! tests, and over the live maps, read-only, for `explain`.

use crate::{
    packet::{network::Network, parse::Headers},
    select::service::Match,
};
use lb_common::{
    Address, Backend, Flow, FlowKey, Reason, ServiceKey, ServiceView, Vip, VipKey, exact,
    passive::PassiveFailure,
    settings::IngressSettings,
    syn_cache::{CachedSyn, upper_half},
};

/// The three flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowTable {
    /// Established TCP flows that the stateless answer would misplace.
    Flows,
    /// Recent SYN choices that the stateless answer would not repeat.
    Syns,
    /// UDP flows.
    UdpFlows,
}

/// The maps and the clock.
pub trait Tables {
    /// Index of the service with this exact port.
    fn service_index(&self, key: &ServiceKey) -> Option<u32>;
    /// A line of exact ports. Without any, services are found by [`Tables::service_index`].
    #[inline(always)]
    fn exact(&self, _line: u32) -> Option<&exact::ExactLine> {
        None
    }
    /// Whether an address that has this bit in the filter cannot be a VIP.
    #[inline(always)]
    fn is_no_vip(&self, _bit: u32) -> bool {
        false
    }
    /// Whether an address has this bit set in the filter: [`Tables::is_no_vip`] for those who may miss a VIP for as long as
    /// nobody has filled the filter.
    #[inline(always)]
    fn has_vip_bit(&self, _bit: u32) -> bool {
        false
    }
    /// What else this VIP serves.
    fn vip(&self, key: &VipKey) -> Option<&Vip>;
    /// Whether an address, as two words in memory's order, is a VIP. A function of its own in the kernel, as the next one.
    #[inline(always)]
    fn is_vip(&self, vip: [u64; 2]) -> bool {
        self.vip(&VipKey { vip: zerocopy::transmute!(vip) }).is_some()
    }
    /// Whether a worker has this address; a function of its own in the kernel.
    #[inline(always)]
    fn is_worker(&self, _address: [u32; 4]) -> bool {
        false
    }
    /// [`crate::guard::martian::fault`]; a function of its own in the kernel.
    #[inline(always)]
    fn source_fault(&self, source: [u32; 4]) -> Option<Reason>
    where
        Self: Sized,
    {
        crate::guard::martian::fault(self, source)
    }
    /// [`crate::select::service::find`]. The kernel side has this as a function of its own, which the verifier looks at once
    /// instead of on every path, and whose keys lie on a stack of its own.
    #[inline(always)]
    fn find_service(&self, vip: [u64; 2], port: u16, protocol: u8) -> Result<(u32, Match), Reason>
    where
        Self: Sized,
    {
        crate::select::service::find(self, vip, port, protocol)
    }
    /// [`crate::packet::network::parse_network`]. A function of its own in the kernel: each combination of tags and extension
    /// headers is walked there, and not once more with all that follows. It has a place
    /// for the result as well, which then does not lie on the stack.
    #[inline(always)]
    fn parse_network<'a, F: crate::Frame>(
        &self,
        frame: &F,
        settings: &IngressSettings,
        place: &'a mut Network,
    ) -> Result<&'a mut Network, Reason>
    where
        Self: Sized,
    {
        crate::packet::network::parse_network(frame, settings, place)?;
        Ok(place)
    }
    /// [`crate::packet::parse::parse`]; a function of its own in the kernel.
    #[inline(always)]
    fn parse<'a, F: crate::Frame>(
        &self,
        frame: &F,
        settings: &IngressSettings,
        place: &'a mut Headers,
    ) -> Result<&'a mut Headers, Reason>
    where
        Self: Sized,
    {
        *place = crate::packet::parse::parse(frame, settings)?;
        Ok(place)
    }
    /// Live view of a service.
    fn service(&self, index: u32) -> Option<&ServiceView>;
    /// A slot's primary with its flag, by the slot's place among those of all tables.
    fn primary(&self, place: u32) -> Option<u32>;
    /// Its secondary with its flag.
    fn secondary(&self, place: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, index: u32) -> Option<&Backend>;
    /// A backend's entry before the change that is under way: see [`lb_common::backend::flags::CHANGING`].
    #[inline(always)]
    fn changing_backend(&self, _index: u32) -> Option<&Backend> {
        None
    }
    /// A remembered flow.
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow>;
    /// Remembers a flow, replacing what was known of it. False if there is no room.
    fn record(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool;
    /// Writes in place when a remembered flow was last seen, and its flags.
    fn touch(&self, table: FlowTable, key: &FlowKey, now_s: u32, flags: u32);
    /// Notes in place that an established flow was seen now; and that it does not end, if there is data.
    #[inline(always)]
    fn keep(&self, _key: &FlowKey, _now_s: u32, _data_len: u32) {}
    /// Forgets a flow.
    fn forget(&self, table: FlowTable, key: &FlowKey);
    /// A flow's hash, by which its SYN is cached ([`lb_common::syn_cache`]); any value for tables without a cache.
    #[inline(always)]
    fn syn_hash(&self, _headers: &Headers, _service: u32) -> u64 {
        0
    }
    /// Looks up where a flow's recent SYN was placed.
    #[inline(always)]
    fn cached_syn(&self, key: &FlowKey, _syn_hash: u64) -> CachedSyn {
        self.flow(FlowTable::Syns, key).map_or(CachedSyn::NONE, |flow| CachedSyn {
            backend: flow.backend,
            sequence: upper_half(flow.created_s),
            age_s: self.now_s().saturating_sub(flow.last_seen_s),
        })
    }
    /// Caches where a SYN is placed, over the flow's earlier entry. False if there is no room.
    #[inline(always)]
    fn cache_syn(&self, key: &FlowKey, _syn_hash: u64, backend: u32, sequence: u32) -> bool {
        self.record(FlowTable::Syns, key, &Flow::new(backend, self.now_s(), sequence, 0))
    }
    /// Removes a flow's cached SYN.
    #[inline(always)]
    fn forget_syn(&self, key: &FlowKey, _syn_hash: u64) {
        self.forget(FlowTable::Syns, key);
    }
    /// Whether the table of TCP flows may hold a flow. Never false for one that it holds.
    #[inline(always)]
    fn may_hold_flow(&self, _syn_hash: u64) -> bool {
        true
    }
    /// [`Tables::record`] of a TCP flow.
    #[inline(always)]
    fn record_flow(&self, key: &FlowKey, _syn_hash: u64, flow: &Flow) -> bool {
        self.record(FlowTable::Flows, key, flow)
    }
    /// Places a new flow: [`crate::select::scheduler::schedule`]; a function of its own in the kernel.
    #[inline(always)]
    fn schedule(
        &self,
        service: u32,
        view: &ServiceView,
        place: crate::select::scheduler::SlotRef,
        now_s: u32,
    ) -> Result<(u32, crate::select::choose::Why), Reason>
    where
        Self: Sized,
    {
        crate::select::scheduler::schedule(self, service, view, place, now_s)
    }
    /// One step of a comparison of loads; a function of its own in the kernel.
    #[inline(always)]
    fn less_loaded(&self, service: u32, at: u32, best: u64, now_s: u32) -> u64
    where
        Self: Sized,
    {
        crate::select::scheduler::less_loaded(self, service, at, best, now_s)
    }
    /// [`crate::select::others::others_of`]; a function of its own in the kernel.
    #[inline(always)]
    fn others(&self, service: u32, view: &ServiceView, number: u32, chosen: u32) -> u64
    where
        Self: Sized,
    {
        crate::select::others::others_of(self, service, view, number, chosen)
    }
    /// Whether the program of another ABI version still knows flows that these tables do not.
    #[inline(always)]
    fn is_taking_over(&self) -> bool {
        false
    }
    /// Load of a backend: its last report, and what was placed since. An index without an entry has none.
    fn load(&self, backend: u32, now_s: u32) -> u32;
    /// Adds the cost of a flow to a backend's load.
    fn charge(&self, backend: u32, now_s: u32);
    /// A service's next turn: each call another number, one after the other.
    fn next_turn(&self, service: u32) -> u64;
    /// A random number.
    fn random(&self) -> u32;
    /// Seconds of the boot clock.
    fn now_s(&self) -> u32;
    /// Adds one to a reason's counter.
    fn count(&self, reason: Reason);
    /// Adds a forwarded packet of `bytes` to a backend's counters.
    fn account(&self, backend: u32, bytes: u32, new_flow: bool);
    /// Adds one to the signs of a worker.
    #[inline(always)]
    fn count_failure(&self, _worker: &Address, _sign: PassiveFailure) {}
    /// Takes one message from the budget for generated ICMP; false when it is used up.
    fn take_icmp(&self, per_s: u32, burst: u32) -> bool;
    /// Whether the lists deny this source, see [`crate::guard`].
    #[inline(always)]
    fn is_denied(&self, _source: [u32; 4]) -> bool {
        false
    }
    /// Takes a new flow from the buckets of its source and its service, see [`crate::guard::limit`].
    #[inline(always)]
    fn limit(&self, _service: u32, _view: &ServiceView, _source: [u32; 4]) -> Option<Reason> {
        None
    }
    /// Whether a table may take one more flow of a service just now. If not, the flow is placed where a stateless
    /// lookup finds it.
    #[inline(always)]
    fn admits(&self, _service: u32, _table: FlowTable, _now_s: u32) -> bool {
        true
    }
    /// Whether one more flow from before a transition may be written, by the service's [`ServiceView::record_factor`].
    #[inline(always)]
    fn admits_record(&self, _service: u32, _view: &ServiceView, _now_s: u32) -> bool {
        true
    }
}

/// Tables to which nothing is written: for a choice that must leave no trace.
pub struct ReadOnly<'a, T>(pub &'a T);

impl<T: Tables> Tables for ReadOnly<'_, T> {
    #[inline(always)]
    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.0.service_index(key)
    }

    #[inline(always)]
    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        self.0.vip(key)
    }

    #[inline(always)]
    fn service(&self, index: u32) -> Option<&ServiceView> {
        self.0.service(index)
    }

    #[inline(always)]
    fn primary(&self, place: u32) -> Option<u32> {
        self.0.primary(place)
    }

    #[inline(always)]
    fn secondary(&self, place: u32) -> Option<u32> {
        self.0.secondary(place)
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<&Backend> {
        self.0.backend(index)
    }

    #[inline(always)]
    fn changing_backend(&self, index: u32) -> Option<&Backend> {
        self.0.changing_backend(index)
    }

    #[inline(always)]
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        self.0.flow(table, key)
    }

    #[inline(always)]
    fn record(&self, _: FlowTable, _: &FlowKey, _: &Flow) -> bool {
        true
    }

    #[inline(always)]
    fn touch(&self, _: FlowTable, _: &FlowKey, _: u32, _: u32) {}

    #[inline(always)]
    fn forget(&self, _: FlowTable, _: &FlowKey) {}

    #[inline(always)]
    fn syn_hash(&self, headers: &Headers, service: u32) -> u64 {
        self.0.syn_hash(headers, service)
    }

    #[inline(always)]
    fn cached_syn(&self, key: &FlowKey, syn_hash: u64) -> CachedSyn {
        self.0.cached_syn(key, syn_hash)
    }

    #[inline(always)]
    fn may_hold_flow(&self, syn_hash: u64) -> bool {
        self.0.may_hold_flow(syn_hash)
    }

    /// Whoever only asks about a flow that is in no table is told its slot's primary.
    #[inline(always)]
    fn schedule(
        &self,
        _: u32,
        _: &ServiceView,
        place: crate::select::scheduler::SlotRef,
        _: u32,
    ) -> Result<(u32, crate::select::choose::Why), Reason> {
        match place.slot.primary_index() {
            lb_common::slot::NO_BACKEND => Err(Reason::NoBackend),
            primary => Ok((primary, crate::select::choose::Why::NewFlow)),
        }
    }

    #[inline(always)]
    fn load(&self, backend: u32, now_s: u32) -> u32 {
        self.0.load(backend, now_s)
    }

    #[inline(always)]
    fn charge(&self, _: u32, _: u32) {}

    #[inline(always)]
    fn next_turn(&self, _: u32) -> u64 {
        0
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        self.0.random()
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        self.0.now_s()
    }

    #[inline(always)]
    fn count(&self, _: Reason) {}

    #[inline(always)]
    fn account(&self, _: u32, _: u32, _: bool) {}

    #[inline(always)]
    fn take_icmp(&self, _: u32, _: u32) -> bool {
        false
    }
}
