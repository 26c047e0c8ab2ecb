//! An engine without a dataplane: applies at once, forwards nothing. For tests of API and CLI, which need
//! neither root nor a kernel.

use super::{
    engine::*,
    types::{AppliedStatus, FlowInfo, Interface, Room},
};
use crate::{
    desired::model::{BackendId, BackendState as State, Desired},
    serve::explain::{Explanation, Query},
};
use futures_util::future::BoxFuture;
use lb_common::{BackendStats, Reason, limits};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// An engine without a dataplane, for tests.
pub struct MemoryEngine {
    snapshot: Mutex<Arc<Snapshot>>,
    max_backends: usize,
    fail: Mutex<Option<String>>,
    delay: Mutex<Duration>,
    /// Whether a call has been delayed.
    delayed: AtomicBool,
}

impl MemoryEngine {
    /// Creates an engine with room for `max_backends` backends.
    pub fn new(max_backends: usize) -> Self {
        Self {
            snapshot: Mutex::default(),
            max_backends,
            fail: Mutex::default(),
            delay: Mutex::default(),
            delayed: AtomicBool::new(false),
        }
    }

    /// Makes each later check and application take `time`.
    pub fn set_delay(&self, time: Duration) {
        *self.delay.lock().unwrap_or_else(PoisonError::into_inner) = time;
    }

    /// Whether a check or an application has begun since a delay was set.
    pub fn has_begun(&self) -> bool {
        self.delayed.load(Ordering::Relaxed)
    }

    async fn wait(&self) {
        let time = *self.delay.lock().unwrap_or_else(PoisonError::into_inner);
        if !time.is_zero() {
            self.delayed.store(true, Ordering::Relaxed);
            tokio::time::sleep(time).await;
        }
    }

    /// Makes each later application fail with this message; None lets them succeed again.
    pub fn set_failure(&self, message: Option<String>) {
        *self.fail.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }

    fn build(&self, desired: &Desired, revision: u64) -> Snapshot {
        let applied =
            AppliedStatus { revision, slots_changed: 0, took_us: 100, error: None, waiting: Vec::new() };
        let mut snapshot = Snapshot { applied, ..Snapshot::default() };
        let mut next = 0;
        for (index, (service, s)) in desired.services.iter().enumerate() {
            let table_size = limits::TABLE_SIZES[0];
            let takes = |b: &crate::desired::model::Backend| b.state == State::Up && b.weight > 0;
            let eligible = s.backends.values().filter(|b| takes(b)).count();
            let weights: u32 = s.backends.values().filter(|b| takes(b)).map(|b| b.weight).sum();
            for (backend, b) in &s.backends {
                let id = BackendId { service: service.clone(), backend: backend.clone() };
                let slots = if takes(b) { table_size * b.weight / weights } else { 0 };
                let takes_flows = slots > 0;
                let state = AppliedBackend {
                    index: next,
                    slots,
                    tracked_flows: 2,
                    takes_flows,
                    resolved: true,
                    unreachable: None,
                    ..AppliedBackend::default()
                };
                snapshot.backends.insert(id, state);
                next += 1;
            }
            let state =
                AppliedService { index: index as u32, table_size, eligible, ..AppliedService::default() };
            snapshot.services.insert(service.clone(), state);
        }
        snapshot.room =
            vec![Room { what: "backends".into(), used: next.into(), limit: self.max_backends as u64 }];
        snapshot
    }
}

/// Address that this host claims to have.
pub const OWN_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 250));

impl Engine for MemoryEngine {
    fn own_addresses(&self) -> BTreeMap<IpAddr, String> {
        BTreeMap::from([(OWN_ADDRESS, "eth0".to_owned())])
    }

    fn check(&self, desired: Arc<Desired>) -> BoxFuture<'_, Result<(), EngineError>> {
        let count: usize = desired.services.values().map(|s| s.backends.len()).sum();
        let limit = self.max_backends;
        let refused =
            EngineError::Refused { what: format!("{count} backends do not fit: there is room for {limit}") };
        let result = if count <= limit { Ok(()) } else { Err(refused) };
        Box::pin(async {
            self.wait().await;
            result
        })
    }

    fn apply(
        &self,
        desired: Arc<Desired>,
        revision: u64,
    ) -> BoxFuture<'_, Result<AppliedStatus, EngineError>> {
        Box::pin(async move {
            self.wait().await;
            if let Some(what) = self.fail.lock().unwrap_or_else(PoisonError::into_inner).clone() {
                return Err(EngineError::Failed { what });
            }
            let snapshot = self.build(&desired, revision);
            let applied = snapshot.applied.clone();
            *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
            Ok(applied)
        })
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn interfaces(&self) -> Vec<Interface> {
        let (name, mode) = ("memory".into(), "driver".into());
        vec![Interface { name, ifindex: 0, mode, why_generic: None, problem: None }]
    }

    fn counters(&self) -> Result<Counters, EngineError> {
        let snapshot = self.snapshot();
        let count = |index: u64| BackendStats { packets: 10 * index, bytes: 15_000 * index, flows: index };
        let mut counters = Counters { reasons: vec![0; Reason::COUNT as usize], ..Counters::default() };
        counters.reasons[Reason::NotIp as usize] = 7;
        for (id, b) in &snapshot.backends {
            let stats = count(u64::from(b.index) + 1);
            counters.backends.insert(id.clone(), stats);
            let sum = counters.services.entry(id.service.clone()).or_default();
            sum.packets += stats.packets;
            sum.bytes += stats.bytes;
            sum.flows += stats.flows;
        }
        Ok(counters)
    }

    fn flows(&self, filter: &FlowFilter) -> Result<(Vec<FlowInfo>, bool), EngineError> {
        let matches = |id: &BackendId| {
            filter.service.as_ref().is_none_or(|s| *s == id.service)
                && filter.backend.as_ref().is_none_or(|b| *b == id.backend)
        };
        let snapshot = self.snapshot();
        let all = snapshot.backends.keys().filter(|id| matches(id)).map(|id| FlowInfo {
            table: "tcp".into(),
            client: SocketAddr::from(([192, 0, 2, 1], 40_000)),
            port: 80,
            service: id.service.to_string(),
            backend: id.backend.to_string(),
            age_s: 75,
            idle_s: 3,
            closing: false,
        });
        let mut flows: Vec<FlowInfo> = all.collect();
        let more = flows.len() > filter.limit;
        flows.truncate(filter.limit);
        Ok((flows, more))
    }

    fn explain(&self, query: Query) -> Result<Explanation, EngineError> {
        let step =
            format!("nothing is forwarded to {} {} without a dataplane", query.destination, query.protocol);
        Ok(Explanation { steps: vec![step], ..Explanation::new(query) })
    }
}
