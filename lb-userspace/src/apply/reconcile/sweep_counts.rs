//! Counts of a sweep, by index: entries and live flows of each backend, and services with entries.
//!
//! A sweep looks up the same few services and backends for about a million entries, so each is read from the maps once,
//! and counted in place. A missing service or backend is never cached: see [`SweepCounts::is_served`].

use super::sweep::Sweep;
use crate::apply::dataplane::Reader;
use lb_common::{backend::flags::USED, flow::TCP_IDLE_S};

/// Facts about a service that the expiry of flows depends on.
#[derive(Clone, Copy, Default)]
struct ServiceSeen {
    /// Idle times of its flows, once the service was found.
    timeouts: Option<Timeouts>,
    has_tcp: bool,
    has_syns: bool,
    has_any: bool,
}

/// Idle times of a service's flows, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Of UDP flows.
    pub udp_s: u32,
    /// Of TCP flows.
    pub tcp_s: u32,
}

/// What is known of a backend.
#[derive(Clone, Copy, Default)]
struct BackendSeen {
    /// Index of its service, once the backend was found.
    service: Option<u32>,
    is_named: bool,
    flows: u64,
}

/// Counts of a sweep over live maps.
pub struct SweepCounts<'a> {
    reader: &'a Reader,
    services: Vec<ServiceSeen>,
    backends: Vec<BackendSeen>,
}

/// Entry of an index, created if necessary. Indices come from the maps, whose sizes bound them.
fn place<T: Clone + Default>(all: &mut Vec<T>, index: u32) -> &mut T {
    let index = index as usize;
    if index >= all.len() {
        all.resize(index + 1, T::default());
    }
    &mut all[index]
}

impl<'a> SweepCounts<'a> {
    /// Starts with empty counts.
    pub fn new(reader: &'a Reader) -> Self {
        Self { reader, services: Vec::new(), backends: Vec::new() }
    }

    /// Idle times of a service's flows; none if the service does not exist.
    pub fn timeouts(&mut self, service: u32) -> Option<Timeouts> {
        let known = self.services.get(service as usize).and_then(|s| s.timeouts);
        known.or_else(|| {
            let entry = self.reader.service(service).filter(|s| s.used != 0)?;
            let view = &entry.views[(entry.active & 1) as usize];
            let tcp_s = if view.tcp_timeout_s == 0 { TCP_IDLE_S } else { view.tcp_timeout_s };
            let timeouts = Timeouts { udp_s: view.udp_timeout_s, tcp_s };
            place(&mut self.services, service).timeouts = Some(timeouts);
            Some(timeouts)
        })
    }

    /// Whether a backend belongs to an existing service. A negative answer is looked up each time, because a backend
    /// that was added meanwhile must not lose its entries.
    pub fn is_served(&mut self, service: u32, backend: u32) -> bool {
        self.has_backend(backend, service) && self.timeouts(service).is_some()
    }

    /// Whether a service has this backend.
    fn has_backend(&mut self, backend: u32, service: u32) -> bool {
        let is_known = self.backends.get(backend as usize).is_some_and(|seen| seen.service == Some(service));
        let is_there = |entry: lb_common::Backend| entry.flags & USED != 0 && entry.service == service;
        if !is_known && !self.reader.backend(backend).is_some_and(is_there) {
            return false;
        }
        place(&mut self.backends, backend).service = Some(service);
        true
    }

    /// Counts a cached SYN.
    pub fn count_syn(&mut self, service: u32, backend: u32) {
        self.count(service, backend, false, false);
        place(&mut self.services, service).has_syns = true;
    }

    /// Counts an entry that stays, of an existing service and backend.
    pub fn count(&mut self, service: u32, backend: u32, is_tcp: bool, is_live: bool) {
        let seen = place(&mut self.services, service);
        seen.has_any = true;
        seen.has_tcp |= is_tcp;
        let seen = place(&mut self.backends, backend);
        seen.is_named = true;
        seen.flows += u64::from(is_live);
    }

    /// Adds the counts to the result of a sweep.
    pub fn report(&self, sweep: &mut Sweep) {
        for (service, seen) in (0..).zip(&self.services).filter(|(_, seen)| seen.has_any) {
            sweep.services.insert(service);
            if seen.has_tcp {
                sweep.services_tcp.insert(service);
            }
            if seen.has_syns {
                sweep.services_syns.insert(service);
            }
        }
        for (backend, seen) in (0..).zip(&self.backends).filter(|(_, seen)| seen.is_named) {
            sweep.backends.insert(backend);
            if seen.flows > 0 {
                sweep.flows.insert(backend, seen.flows);
            }
        }
    }
}
