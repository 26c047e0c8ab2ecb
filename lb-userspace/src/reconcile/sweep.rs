//! Sweeps the flow tables: counts live flows, removes what is over, tells what is no longer named.
//!
//! Runs on a thread of its own beside the reconciler, with handles of its own: a million entries take
//! a good part of a second, which no change of the tables should wait for.

use super::Event;
use crate::{
    clock,
    dataplane::{DataplaneError, FLOW_TABLES, Reader},
};
use lb_common::{
    Flow, FlowKey,
    backend::flags::{DOWN, DRAINING, USED},
    flow::{CLOSING_S, SYN_TIMEOUT_S, TCP_IDLE_S, flags::CLOSING},
};
use lb_ebpf::FlowTable;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Least time between the starts of two sweeps.
const PERIOD: Duration = Duration::from_secs(1);
/// At most this share of a processor goes into sweeping: one part in so many.
const REST: u32 = 20;

/// What a sweep found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Clock since boot at its start.
    pub began: Duration,
    /// Live tracked flows by backend index.
    pub flows: BTreeMap<u32, u64>,
    /// Services that some TCP entry belongs to.
    pub services_tcp: BTreeSet<u32>,
    /// Services that any entry belongs to.
    pub services: BTreeSet<u32>,
    /// Backends that any entry names.
    pub backends: BTreeSet<u32>,
    /// Entries that were over and have been removed.
    pub removed: u64,
    /// Entries left in each table.
    pub entries: [u64; 3],
    /// Bindings of mode `nat` left.
    pub bindings: u64,
}

/// What an entry's fate depends on.
struct Judge<'a> {
    reader: &'a Reader,
    now_s: u32,
    /// UDP timeout by service, read once per sweep.
    udp_timeouts: BTreeMap<u32, u32>,
}

impl Judge<'_> {
    /// Whether an entry no longer means anything.
    fn is_over(&mut self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let age_s = self.now_s.saturating_sub(flow.last_seen_s);
        let aged = match table {
            FlowTable::Syns => age_s > SYN_TIMEOUT_S,
            FlowTable::Flows if flow.flags & CLOSING != 0 => age_s > CLOSING_S,
            // A client that vanished would hold a removed backend's index for ever.
            FlowTable::Flows => age_s > TCP_IDLE_S && self.is_leaving(flow.backend),
            FlowTable::UdpFlows => age_s > self.udp_timeout(key.service),
        };
        aged || !self.is_served(key, flow)
    }

    fn is_leaving(&self, backend: u32) -> bool {
        self.reader.backend(backend).is_none_or(|b| b.flags & (DRAINING | DOWN) != 0)
    }

    fn is_served(&self, key: &FlowKey, flow: &Flow) -> bool {
        let backend = self.reader.backend(flow.backend);
        backend.is_some_and(|b| b.flags & USED != 0 && b.service == key.service)
            && self.reader.service(key.service).is_some_and(|s| s.used != 0)
    }

    fn udp_timeout(&mut self, service: u32) -> u32 {
        let reader = self.reader;
        let read = || reader.service(service).map_or(0, |s| s.views[(s.active & 1) as usize].udp_timeout_s);
        *self.udp_timeouts.entry(service).or_insert_with(read)
    }

    fn is_live(&self, table: FlowTable, flow: &Flow) -> bool {
        let age_s = self.now_s.saturating_sub(flow.last_seen_s);
        match table {
            FlowTable::Flows => flow.flags & CLOSING == 0 && age_s <= TCP_IDLE_S,
            FlowTable::UdpFlows => true,
            FlowTable::Syns => false,
        }
    }
}

/// Sweeps all tables once.
pub fn sweep(reader: &Reader) -> Result<Sweep, DataplaneError> {
    let mut result = Sweep { began: clock::boot(), ..Sweep::default() };
    let mut judge = Judge { reader, now_s: clock::boot_s(), udp_timeouts: BTreeMap::new() };
    for table in FLOW_TABLES {
        let mut over = Vec::new();
        let mut count = 0u64;
        reader.for_each_flow(table, |key, flow| {
            if judge.is_over(table, &key, &flow) {
                over.push(key);
                return;
            }
            count += 1;
            result.services.insert(key.service);
            result.backends.insert(flow.backend);
            if table != FlowTable::UdpFlows {
                result.services_tcp.insert(key.service);
            }
            if judge.is_live(table, &flow) {
                *result.flows.entry(flow.backend).or_default() += 1;
            }
        })?;
        for key in &over {
            reader.remove_flow(table, key)?;
        }
        result.removed += over.len() as u64;
        result.entries[table as usize] = count;
    }
    super::sweep_nat::sweep_bindings(reader, &mut result)?;
    Ok(result)
}

/// Starts the sweeper; it ends when nobody listens to `events` any more.
pub fn start(pin_path: PathBuf, events: mpsc::Sender<Event>) -> std::io::Result<()> {
    let run = move || {
        let reader = match Reader::open(&pin_path) {
            Ok(reader) => reader,
            Err(error) => return tracing::error!(%error, "flow tables cannot be swept"),
        };
        loop {
            let began = Instant::now();
            match sweep(&reader) {
                Ok(sweep) => {
                    if events.blocking_send(Event::Swept(Arc::new(sweep))).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!(%error, "sweep of the flow tables failed"),
            }
            let took = began.elapsed();
            std::thread::sleep(PERIOD.saturating_sub(took).max(took * REST));
        }
    };
    std::thread::Builder::new().name("sweep".to_owned()).spawn(run).map(drop)
}
