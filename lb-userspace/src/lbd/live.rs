//! The API's engine over the live reconciler and dataplane.

use super::hardware::Hardware;
use crate::{
    apply::{
        dataplane::{HASH_MAPS, MapLimits, Reader},
        reconcile::{self, Event, Published, ReconcileError},
    },
    clock,
    desired::model::{BackendId, Desired, Name, region_list},
    serve::{
        api::{
            Engine, EngineError,
            engine::{
                AppliedBackend, AppliedService, Counters, FlowFilter, Removed, ServiceProblem, Snapshot,
            },
            types::{AppliedStatus, FlowInfo, Interface, Loaded, Room},
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
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// [`Engine`] over live maps.
pub struct LiveEngine {
    events: mpsc::Sender<Event>,
    published: watch::Receiver<Arc<Published>>,
    reader: Arc<Reader>,
    hardware: Arc<Hardware>,
    limits: MapLimits,
    /// The last snapshot, and what it was made from.
    last: Mutex<Option<(Arc<Published>, Arc<Snapshot>)>>,
}

impl LiveEngine {
    /// Creates an engine over a reconciler's channels and a reader of its maps.
    pub fn new(
        events: mpsc::Sender<Event>,
        published: watch::Receiver<Arc<Published>>,
        reader: Arc<Reader>,
        hardware: Arc<Hardware>,
        limits: MapLimits,
    ) -> Self {
        Self { events, published, reader, hardware, limits, last: Mutex::new(None) }
    }

    fn published(&self) -> Arc<Published> {
        self.published.borrow().clone()
    }

    /// Sends an event to the reconciler and waits for its answer.
    async fn request<T>(
        &self,
        event: Event,
        answer: oneshot::Receiver<Result<T, ReconcileError>>,
    ) -> Result<T, EngineError> {
        let gone =
            || EngineError::Failed { what: "the reconciler has stopped: see the log of lbd".to_owned() };
        self.events.send(event).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|error| match error {
            ReconcileError::Compile(_) => EngineError::Refused { what: error.to_string() },
            ReconcileError::Apply(_) | ReconcileError::Together(_) => {
                EngineError::Failed { what: error.to_string() }
            }
        })
    }
}

fn applied(applied: &reconcile::Applied, error: Option<String>) -> AppliedStatus {
    AppliedStatus {
        revision: applied.revision,
        slots_changed: applied.written.slots.into(),
        took_us: applied.took.as_micros() as u64,
        error,
        waiting: applied.waiting.iter().map(ToString::to_string).collect(),
    }
}

fn plus(a: BackendStats, b: BackendStats) -> BackendStats {
    BackendStats {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
        flows: a.flows.wrapping_add(b.flows),
    }
}

fn snapshot(published: &Published, limits: &MapLimits) -> Snapshot {
    let mut snapshot =
        Snapshot { applied: applied(&published.applied, published.error.clone()), ..Snapshot::default() };
    snapshot.verdict_lags = published.verdict_lags.clone();
    let mut backends = 0;
    for (name, s) in &published.services {
        let flood = published.sweep.floods.get(&s.index).copied().unwrap_or_default();
        let state = AppliedService {
            index: s.index,
            table_size: s.table_size,
            eligible: s.eligible as usize,
            panic: s.panic,
            transition_slots: s.transition_slots,
            regions: s.regions.clone(),
            flood: flood.now,
            floods: flood.times,
        };
        snapshot.services.insert(name.clone(), state);
        for b in &s.backends {
            backends += 1;
            let tracked_flows = published.tracked_flows(b.index);
            let Some(backend) = &b.name else {
                let until = Duration::from_millis(b.removed_until_ms.unwrap_or(0).max(0) as u64);
                let (service, address) = (name.clone(), b.address);
                snapshot.removed.push(Removed { service, address, until, tracked_flows });
                continue;
            };
            let next_hop = published.observed.paths.next_hops.get(&b.address).filter(|_| b.resolved).copied();
            let problem = b.problem.clone();
            let id = BackendId { service: name.clone(), backend: backend.clone() };
            let state = AppliedBackend {
                index: b.index,
                slots: b.slots,
                tracked_flows,
                slow_start_percent: b.slow_start_percent,
                next_hop,
                resolved: b.resolved,
                unreachable: published.observed.paths.unreachable.get(&b.address).cloned(),
                problem,
                takes_flows: b.eligible,
                held: b.held,
                excluded: b.excluded.clone(),
            };
            snapshot.backends.insert(id, state);
        }
    }
    for (name, problem) in &published.problems {
        let (reason, text) = (problem.label(), problem.to_string());
        snapshot.problems.insert(name.clone(), ServiceProblem { reason, text });
    }
    let room = |what: &str, used: u64, limit: u32| Room { what: what.to_owned(), used, limit: limit.into() };
    let entries = |table: FlowTable| published.sweep.entries[table as usize];
    snapshot.room = vec![
        room("services", published.services.len() as u64, limits.services),
        room("backends", backends, limits.backends),
        room("slots", published.slots_used.into(), limits.slots),
        room("tcp flows", entries(FlowTable::Flows), limits.flows),
        room("syns", entries(FlowTable::Syns), limits.syns),
        room("udp flows", entries(FlowTable::UdpFlows), limits.flows),
        room("nat flows", published.sweep.bindings, limits.nat_flows),
        room("guard entries", published.desired.guard.len() as u64, limits.guard_entries),
    ];
    snapshot
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
            let desired = self.hardware.served(desired, false);
            let (fits, answer) = oneshot::channel();
            self.request(Event::Check { desired, fits }, answer).await
        })
    }

    fn apply(
        &self,
        desired: Arc<Desired>,
        revision: u64,
    ) -> BoxFuture<'_, Result<AppliedStatus, EngineError>> {
        Box::pin(async move {
            let desired = self.hardware.served(desired, true);
            let (tell, answer) = oneshot::channel();
            let event = Event::Desired { desired, revision, applied: Some(tell) };
            Ok(applied(&self.request(event, answer).await?, None))
        })
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
        let published = self.published();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, snapshot)) = &*last
            && Arc::ptr_eq(from, &published)
        {
            return snapshot.clone();
        }
        let snapshot = Arc::new(snapshot(&published, &self.limits));
        *last = Some((published, snapshot.clone()));
        snapshot
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
