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
    limit::FULL_S,
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
    /// Services by index that are, or have been, under flood.
    pub floods: BTreeMap<u32, Flood>,
}

/// A service that more is asked for than is written to the flow tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flood {
    /// Whether it is so now.
    pub now: bool,
    /// How often it has become so, over all processors and tables.
    pub times: u64,
}

/// What the meters of all services say.
fn floods(reader: &Reader, now_s: u32) -> BTreeMap<u32, Flood> {
    let (services, ..) = reader.sizes();
    let used = (0..services).filter(|index| reader.is_used(*index));
    let mut floods = BTreeMap::new();
    for index in used {
        let mut flood = Flood::default();
        for pressure in reader.pressure(index) {
            for meter in [pressure.syns, pressure.flows, pressure.udp] {
                flood.now |= meter.is_flood(now_s);
                flood.times += u64::from(meter.floods);
            }
            flood.now |= pressure.full_s.iter().any(|s| *s != 0 && now_s.saturating_sub(*s) < FULL_S);
        }
        if flood.now || flood.times > 0 {
            floods.insert(index, flood);
        }
    }
    floods
}

/// What an entry's fate depends on.
struct Judge<'a> {
    reader: &'a Reader,
    now_s: u32,
    /// UDP timeout by service, read once per sweep.
    udp_timeouts: BTreeMap<u32, u32>,
    /// Whether the table was more than half full at the last sweep: then what is idle for long goes.
    is_tight: bool,
}

impl Judge<'_> {
    /// Whether an entry no longer means anything.
    fn is_over(&mut self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let age_s = self.now_s.saturating_sub(flow.last_seen_s);
        let aged = match table {
            FlowTable::Syns => age_s > SYN_TIMEOUT_S,
            FlowTable::Flows if flow.flags & CLOSING != 0 => age_s > CLOSING_S,
            // A client that vanished would hold a removed backend's index for ever.
            // Nothing else makes room: the table evicts nobody.
            FlowTable::Flows => age_s > TCP_IDLE_S && (self.is_tight || self.is_leaving(flow.backend)),
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

/// Sweeps all tables once; `before`: what the last sweep found.
pub fn sweep(reader: &Reader, before: &Sweep) -> Result<Sweep, DataplaneError> {
    let mut result = Sweep { began: clock::boot(), ..Sweep::default() };
    let mut judge = Judge { reader, now_s: clock::boot_s(), udp_timeouts: BTreeMap::new(), is_tight: false };
    for table in FLOW_TABLES {
        let room = u64::from(reader.flow_room(table));
        judge.is_tight = before.entries[table as usize] > room / 2;
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
    result.floods = floods(reader, judge.now_s);
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
        let mut last = Arc::<Sweep>::default();
        loop {
            let began = Instant::now();
            match sweep(&reader, &last) {
                Ok(sweep) => {
                    last = Arc::new(sweep);
                    if events.blocking_send(Event::Swept(last.clone())).is_err() {
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
