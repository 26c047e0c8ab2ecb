//! Sweeps the flow tables: counts live flows, removes what is over, tells what is no longer named.
//!
//! Runs on a thread of its own beside the reconciler, with handles of its own: a million entries take
//! a good part of a second, which no change of the tables should wait for. How often it runs, and which tables it need
//! not look at, [`super::pace`] says.

use super::{
    Event,
    sweep_counts::Tally,
    sweep_nat::sweep_bindings,
    sweep_schedule::{self, PERIOD, Quiet, Signals},
};
use crate::{
    apply::dataplane::{DataplaneError, Reader},
    clock,
};
use lb_common::{
    Flow, FlowKey,
    backend::flags::{DOWN, DRAINING, USED},
    flow::{CLOSING_S, SYN_TIMEOUT_S, TCP_IDLE_S, flags::CLOSING},
    limit::{FULL_S, Pressure},
    note, service,
};
use lb_ebpf::FlowTable;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// The order of the walks: what is noted of a SYN becomes a flow, and may do so between the two.
const ORDER: [FlowTable; 3] = [FlowTable::Syns, FlowTable::Flows, FlowTable::UdpFlows];

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

/// What a service's meters say about floods.
fn flood(pressure: &[Pressure], now_s: u32) -> Flood {
    let mut flood = Flood::default();
    for pressure in pressure {
        for meter in [pressure.syns, pressure.flows, pressure.udp] {
            flood.now |= meter.is_flood(now_s);
            flood.times += u64::from(meter.floods);
        }
        flood.now |= pressure.full_s.iter().any(|s| *s != 0 && now_s.saturating_sub(*s) < FULL_S);
    }
    flood
}

/// What an entry's fate depends on.
struct Judge {
    now_s: u32,
    /// Whether the table was more than half full at the last sweep: then what is idle for long goes.
    is_tight: bool,
}

impl Judge {
    /// Whether an entry no longer means anything.
    fn is_over(&self, tally: &mut Tally<'_>, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let age_s = self.now_s.saturating_sub(flow.last_seen_s);
        let aged = match table {
            FlowTable::Flows if flow.flags & CLOSING != 0 => age_s > CLOSING_S,
            // A client that vanished would hold a removed backend's index for ever.
            // Nothing else makes room: the table evicts nobody.
            FlowTable::Flows | FlowTable::Syns => {
                age_s > TCP_IDLE_S && (self.is_tight || tally.is_leaving(key.service, flow.backend))
            }
            FlowTable::UdpFlows => age_s > tally.udp_timeout_s(key.service).unwrap_or(0),
        };
        aged || !tally.is_served(key.service, flow.backend)
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

/// Sweeps all tables, one time after the other.
pub struct Sweeper {
    reader: Reader,
    quiet: Quiet,
    last: Arc<Sweep>,
}

impl Sweeper {
    /// Over these maps, of which nothing is known yet.
    pub fn new(reader: Reader) -> Self {
        Self { reader, quiet: Quiet::default(), last: Arc::default() }
    }

    /// Sweeps once.
    pub fn sweep(&mut self) -> Result<Arc<Sweep>, DataplaneError> {
        let reader = &self.reader;
        let mut result = Sweep { began: clock::boot(), ..Sweep::default() };
        let now_s = clock::boot_s();
        let mut signals = Signals::default();
        for service in reader.used_services() {
            let pressure = reader.pressure(service)?;
            signals.add(service, &pressure);
            let flood = flood(&pressure, now_s);
            if flood.now || flood.times > 0 {
                result.floods.insert(service, flood);
            }
        }
        let memory = reader.bindings_memory();
        let walk = self.quiet.next(signals, memory, result.began);
        let mut tally = Tally::new(reader);
        for table in ORDER.into_iter().filter(|table| walk.tables[*table as usize]) {
            let room = u64::from(reader.flow_room(table));
            let judge = Judge { now_s, is_tight: self.last.entries[table as usize] > room / 2 };
            let (entries, removed) = sweep_table(reader, table, &judge, &mut tally)?;
            self.quiet.walked(table, entries + removed);
            result.entries[table as usize] = entries;
            result.removed += removed;
        }
        if walk.bindings {
            let found = sweep_bindings(reader, self.last.bindings, &mut tally)?;
            self.quiet.walked_bindings(found.entries, memory, reader.bindings_memory());
            result.bindings = found.bindings;
            result.removed += found.removed;
        }
        tally.report(&mut result);
        self.last = Arc::new(result);
        Ok(Arc::clone(&self.last))
    }

    /// Whether the next sweep should not wait: a table fills up, or somebody waits for flows to end or be counted.
    fn is_urgent(&self) -> bool {
        let (reader, last) = (&self.reader, &self.last);
        let is_filling =
            ORDER.iter().any(|table| last.entries[*table as usize] > u64::from(reader.flow_room(*table)) / 2);
        // Bindings make room among themselves, until there is none at all.
        let is_short = last.bindings > u64::from(reader.bindings_room()) / 8 * 7;
        let is_leaving = |index: &u32| {
            reader.backend(*index).is_none_or(|b| b.flags & USED == 0 || b.flags & (DRAINING | DOWN) != 0)
        };
        let is_awaited = |index: &u32| {
            reader.service(*index).is_none_or(|s| {
                s.used == 0 || s.views[(s.active & 1) as usize].flags & service::flags::COUNT_FLOWS != 0
            })
        };
        is_filling || is_short || last.backends.iter().any(is_leaving) || last.services.iter().any(is_awaited)
    }

    /// Waits for as long as the last sweep's cost asks for. What becomes urgent meanwhile ends it.
    fn rest(&self, took: Duration, cost: Duration, events: &mpsc::Sender<Event>) {
        let began = Instant::now();
        loop {
            // Where the cheaper pace is no longer wait, nobody need be asked.
            let shortest = sweep_schedule::pause(took, cost, true);
            let is_urgent = shortest < sweep_schedule::pause(took, cost, false) && self.is_urgent();
            let rest = sweep_schedule::pause(took, cost, is_urgent).saturating_sub(began.elapsed());
            if rest.is_zero() || events.is_closed() {
                return;
            }
            std::thread::sleep(rest.min(PERIOD));
        }
    }
}

/// Sweeps a table: entries that are left, and how many were removed.
fn sweep_table(
    reader: &Reader,
    table: FlowTable,
    judge: &Judge,
    tally: &mut Tally<'_>,
) -> Result<(u64, u64), DataplaneError> {
    if table == FlowTable::Syns {
        return Ok(sweep_notes(reader, judge, tally));
    }
    let mut over = Vec::new();
    let mut count = 0u64;
    let mut scan = (table == FlowTable::Flows).then(|| reader.notes().begin());
    reader.for_each_flow(table, |key, flow| {
        if let Some(scan) = &mut scan {
            scan.add(&key);
        }
        if judge.is_over(tally, table, &key, &flow) {
            over.push(key);
            return;
        }
        count += 1;
        let is_tcp = table != FlowTable::UdpFlows;
        tally.count(key.service, flow.backend, is_tcp, judge.is_live(table, &flow));
    })?;
    if let Some(scan) = &scan {
        reader.notes().settle(scan);
    }
    for key in &over {
        reader.remove_flow(table, key)?;
    }
    Ok((count, over.len() as u64))
}

/// The same of the notes of SYNs, of which only those that are recent are gone by.
fn sweep_notes(reader: &Reader, judge: &Judge, tally: &mut Tally<'_>) -> (u64, u64) {
    let (mut count, mut removed) = (0, 0);
    reader.notes().for_each(|place, head, _| {
        let index = note::backend(head);
        let backend = reader.backend(index).filter(|b| b.flags & USED != 0);
        match backend.filter(|_| note::age_s(head, judge.now_s) <= SYN_TIMEOUT_S) {
            Some(backend) if tally.is_served(backend.service, index) => {
                count += 1;
                tally.count(backend.service, index, true, false);
            }
            _ => {
                reader.notes().remove(place, head);
                removed += 1;
            }
        }
    });
    (count, removed)
}

/// Starts the sweeper; it ends when nobody listens to `events` any more.
pub fn start(pin_path: PathBuf, events: mpsc::Sender<Event>) -> std::io::Result<()> {
    let run = move || {
        let mut sweeper = match Reader::open(&pin_path) {
            Ok(reader) => Sweeper::new(reader),
            Err(error) => return tracing::error!(%error, "flow tables cannot be swept"),
        };
        loop {
            let (began, spent) = (Instant::now(), clock::thread());
            match sweeper.sweep() {
                Ok(sweep) => {
                    if events.blocking_send(Event::Swept(sweep)).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!(%error, "sweep of the flow tables failed"),
            }
            sweeper.rest(began.elapsed(), clock::thread().saturating_sub(spent), &events);
        }
    };
    std::thread::Builder::new().name("sweep".to_owned()).spawn(run).map(drop)
}
