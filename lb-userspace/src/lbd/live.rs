//! The API's engine over the live reconciler and dataplane.

use super::{hardware::Hardware, reconciler_client::ReconcilerClient};
use crate::{
    apply::{
        dataplane::{HASH_MAPS, Reader},
        reconcile::Published,
    },
    clock,
    desired::model::{BackendId, Desired, Name, region_list},
    serve::{
        api::{
            Engine, EngineError,
            engine::{Counters, FlowFilter, Snapshot},
            types::{AppliedStatus, FlowInfo, Interface, Loaded},
        },
        explain::{Explanation, Query, explain},
    },
};
use futures_util::future::BoxFuture;
use lb_common::{BackendStats, flow::flags::CLOSING};
use lb_ebpf::FlowTable;
use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// [`Engine`] over live maps.
pub struct LiveEngine {
    reconciler: ReconcilerClient,
    reader: Arc<Reader>,
    hardware: Arc<Hardware>,
}

impl LiveEngine {
    /// Creates an engine over a reconciler and a reader of its maps.
    pub fn new(reconciler: ReconcilerClient, reader: Arc<Reader>, hardware: Arc<Hardware>) -> Self {
        Self { reconciler, reader, hardware }
    }

    fn published(&self) -> Arc<Published> {
        self.reconciler.published()
    }
}

fn plus(a: BackendStats, b: BackendStats) -> BackendStats {
    BackendStats {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
        flows: a.flows.wrapping_add(b.flows),
    }
}

/// Describes a service's residency and the regions of its table, for `lbctl explain`.
fn region_steps(published: &Published, name: &Name) -> Vec<String> {
    let (Some(wanted), Some(service)) = (published.desired.services.get(name), published.services.get(name))
    else {
        return Vec::new();
    };
    let mut steps = Vec::new();
    if let Some(allowed) = wanted.regions.as_ref().and_then(|rules| rules.allowed.as_ref()) {
        let inside = wanted.backends.values().filter(|b| wanted.allows(b)).count();
        let all = wanted.backends.len();
        let names = region_list(allowed);
        let refused =
            if service.eligible == 0 { ": none of them takes flows, so new flows are refused" } else { "" };
        steps.push(format!("residency: only {names}, with {inside} of {all} backends{refused}"));
    }
    if !service.regions.is_empty() {
        let shares = service.regions.iter().map(|s| format!("{} {} ‰", s.name, s.permille));
        let shares: Vec<String> = shares.collect();
        steps.push(format!(
            "regions: {}; see `lbctl policy explain {name}` for the reason",
            shares.join(", ")
        ));
    }
    steps
}

/// Whether a filter selects a flow of this service to this backend.
fn selects(filter: &FlowFilter, service: Option<&Name>, backend: Option<&Name>) -> bool {
    filter.service.as_ref().is_none_or(|s| service == Some(s))
        && filter.backend.as_ref().is_none_or(|b| backend == Some(b))
}

/// Names the service of a flow, which may not exist any more.
fn service_name(service: Option<&Name>) -> String {
    service.map_or_else(|| "gone".to_owned(), Name::to_string)
}

/// Names the backend of a flow, which may be removed or not exist any more.
fn backend_name(backend: Option<&Name>, address: Option<IpAddr>) -> String {
    let removed = || address.map_or_else(|| "gone".to_owned(), |a| format!("{a} (removed)"));
    backend.map_or_else(removed, Name::to_string)
}

fn ip(address: lb_common::Address) -> IpAddr {
    Ipv6Addr::from(address).to_canonical()
}

impl Engine for LiveEngine {
    fn check(&self, desired: Arc<Desired>) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            self.hardware.check(&desired).map_err(|what| EngineError::Refused { what })?;
            self.reconciler.check(self.hardware.served(desired, false)).await
        })
    }

    fn apply(
        &self,
        desired: Arc<Desired>,
        revision: u64,
    ) -> BoxFuture<'_, Result<AppliedStatus, EngineError>> {
        Box::pin(async move { self.reconciler.apply(self.hardware.served(desired, true), revision).await })
    }

    fn own_addresses(&self) -> BTreeMap<IpAddr, String> {
        let Ok(all) = nix::ifaddrs::getifaddrs() else { return BTreeMap::new() };
        let address = |i: &nix::ifaddrs::InterfaceAddress| {
            let address = i.address.as_ref()?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        };
        all.filter(|i| !i.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK))
            .filter_map(|i| Some((address(&i)?, i.interface_name)))
            .collect()
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.reconciler.snapshot()
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        self.reconciler.changed()
    }

    fn interfaces(&self) -> Vec<Interface> {
        self.hardware.attached()
    }

    fn loaded(&self) -> Loaded {
        self.hardware.loaded()
    }

    fn counters(&self) -> Result<Counters, EngineError> {
        let published = self.published();
        let mut counters = Counters {
            reasons: self.reader.reasons().into_iter().map(|(_, n)| n).collect(),
            ..Counters::default()
        };
        for (name, s) in &published.services {
            let [packets, bytes, flows] = published.retired_stats.get(name).copied().unwrap_or_default();
            let mut sum = BackendStats { packets, bytes, flows };
            for b in &s.backends {
                let stats = self.reader.backend_stats(b.index);
                sum = plus(sum, stats);
                if let Some(backend) = &b.name {
                    counters
                        .backends
                        .insert(BackendId { service: name.clone(), backend: backend.clone() }, stats);
                }
            }
            counters.services.insert(name.clone(), sum);
        }
        Ok(counters)
    }

    fn flows(&self, filter: &FlowFilter) -> Result<(Vec<FlowInfo>, bool), EngineError> {
        let published = self.published();
        let mut services: HashMap<u32, &Name> = HashMap::new();
        let mut backends: HashMap<u32, (Option<&Name>, IpAddr)> = HashMap::new();
        for (name, s) in &published.services {
            services.insert(s.index, name);
            backends.extend(s.backends.iter().map(|b| (b.index, (b.name.as_ref(), b.address))));
        }
        let (now_s, mut found, mut more) = (clock::boot_s(), Vec::new(), false);
        for table in HASH_MAPS {
            let label = if table == FlowTable::UdpFlows { "udp" } else { "tcp" };
            let each = |key: lb_common::FlowKey, flow: lb_common::Flow| {
                let service = services.get(&key.service).copied();
                let (backend, address) =
                    backends.get(&flow.backend).map_or((None, None), |b| (b.0, Some(b.1)));
                if !selects(filter, service, backend) {
                    return;
                }
                if found.len() == filter.limit {
                    more = true;
                    return;
                }
                found.push(FlowInfo {
                    table: label.to_owned(),
                    client: SocketAddr::new(ip(key.source), key.source_port.get()),
                    port: key.port.get(),
                    service: service_name(service),
                    backend: backend_name(backend, address),
                    age_s: now_s.saturating_sub(flow.created_s),
                    idle_s: now_s.saturating_sub(flow.last_seen_s),
                    closing: flow.flags & CLOSING != 0,
                });
            };
            let failed =
                |e: crate::apply::dataplane::DataplaneError| EngineError::Failed { what: e.to_string() };
            self.reader.for_each_flow(table, each).map_err(failed)?;
        }
        let failed = |e: crate::apply::dataplane::DataplaneError| EngineError::Failed { what: e.to_string() };
        let each = |key: lb_common::FlowKey, nat: lb_common::Nat| {
            let service = services.get(&key.service).copied();
            let (backend, address) = backends.get(&nat.backend).map_or((None, None), |b| (b.0, Some(b.1)));
            if !selects(filter, service, backend) {
                return;
            }
            if found.len() == filter.limit {
                more = true;
                return;
            }
            let answers = |p| self.reader.reply(&lb_ebpf::nat::reply_key(&nat, p)).filter(|r| r.flow == key);
            let reply = answers(lb_common::service::TCP).or_else(|| answers(lb_common::service::UDP));
            found.push(FlowInfo {
                table: "nat".to_owned(),
                client: SocketAddr::new(ip(key.source), key.source_port.get()),
                port: key.port.get(),
                service: service_name(service),
                backend: backend_name(backend, address),
                age_s: now_s.saturating_sub(nat.created_s),
                idle_s: now_s.saturating_sub(reply.map_or(0, |r| r.last_seen_s).max(nat.last_seen_s)),
                closing: reply.is_some_and(|r| lb_common::nat::is_over(r.flags)),
            });
        };
        self.reader.for_each_nat(each).map_err(failed)?;
        Ok((found, more))
    }

    fn explain(&self, query: Query) -> Result<Explanation, EngineError> {
        let published = self.published();
        let mut explanation = explain(&self.reader, &*published, query);
        let name = explanation.service.as_ref().and_then(|name| name.parse::<Name>().ok());
        if let Some(name) = name {
            explanation.steps.extend(region_steps(&published, &name));
        }
        Ok(explanation)
    }
}
