//! Sweeps the flow tables: counts live flows, removes expired ones, and reports indices that no entry names.
//!
//! Runs on a thread of its own beside the reconciler, with handles of its own: a million entries take
//! a good part of a second, and no change of the tables should wait for that. [`super::sweep_schedule`] decides how
//! often it runs, and which tables it can skip.

use super::{
    Event,
    sweep_counts::SweepCounts,
    sweep_nat::sweep_bindings,
    sweep_schedule::{self, EmptyTables, MeterSignals, PERIOD},
    sweep_slots::{FlowSlots, SlotSet},
};
use crate::{
    apply::dataplane::{DataplaneError, Reader, now_tick},
    clock,
};
use lb_common::{
    Flow, FlowKey,
    backend::flags::{DOWN, DRAINING, USED},
    flow::{CLOSING_S, flags::CLOSING},
    rate_limit::{FULL_S, WriteBudget},
    service, syn_cache,
};
use lb_ebpf::FlowTable;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Order of the walks: a cached SYN becomes a flow, possibly between the two walks.
const ORDER: [FlowTable; 3] = [FlowTable::Syns, FlowTable::Flows, FlowTable::UdpFlows];

/// Result of a sweep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Boot clock at the start of the sweep.
    pub began: Duration,
    /// Live tracked flows by backend index.
    pub flows: BTreeMap<u32, u64>,
    /// Services with tracked TCP flows.
    pub services_tcp: BTreeSet<u32>,
    /// Services with cached SYNs.
    pub services_syns: BTreeSet<u32>,
    /// Slots of tracked TCP flows, by service; none for a service whose table changed meanwhile.
    pub slots: BTreeMap<u32, SlotSet>,
    /// Services with any entries.
    pub services: BTreeSet<u32>,
    /// Backends that entries name.
    pub backends: BTreeSet<u32>,
    /// Number of expired entries that were removed.
    pub removed: u64,
    /// Number of entries left in each table.
    pub entries: [u64; 3],
    /// Number of bindings of mode `nat` left.
    pub bindings: u64,
    /// Services by index that are, or have been, under flood.
    pub floods: BTreeMap<u32, Flood>,
}

/// Flood state of a service: more entries are requested than its write budget allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flood {
    /// Whether the service is under flood now.
    pub now: bool,
    /// Number of floods so far, over all CPUs and tables.
    pub times: u64,
}

/// Reads the flood state from a service's meters.
fn flood(pressure: &[WriteBudget], now_s: u32) -> Flood {
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

/// Conditions for the expiry of entries.
struct ExpiryRules {
    now_s: u32,
}

impl ExpiryRules {
    /// Whether an entry can be removed.
    fn is_expired(&self, counts: &mut SweepCounts<'_>, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let age_s = self.now_s.saturating_sub(flow.last_seen_s);
        let Some(timeouts) = counts.timeouts(key.service) else { return true };
        let idle_s = match table {
            FlowTable::Flows if flow.flags & CLOSING != 0 => CLOSING_S.min(timeouts.tcp_s),
            // A client that vanished would keep its slot tracked, and a removed backend's index in use, for ever.
            FlowTable::Flows | FlowTable::Syns => timeouts.tcp_s,
            FlowTable::UdpFlows => timeouts.udp_s,
        };
        age_s > idle_s || !counts.is_served(key.service, flow.backend)
    }

    /// Whether a flow that is not expired goes on.
    fn is_live(table: FlowTable, flow: &Flow) -> bool {
        match table {
            FlowTable::Flows => flow.flags & CLOSING == 0,
            FlowTable::UdpFlows => true,
            FlowTable::Syns => false,
        }
    }
}

/// Sweeps all tables repeatedly.
pub struct Sweeper {
    reader: Reader,
    empty_tables: EmptyTables,
    last: Arc<Sweep>,
}

impl Sweeper {
    /// Creates a sweeper that knows nothing about the tables yet.
    pub fn new(reader: Reader) -> Self {
        Self { reader, empty_tables: EmptyTables::default(), last: Arc::default() }
    }

    /// Sweeps the tables once.
    pub fn sweep(&mut self) -> Result<Arc<Sweep>, DataplaneError> {
        let reader = &self.reader;
        let mut result = Sweep { began: clock::boot(), ..Sweep::default() };
        let now_s = clock::boot_s();
        let mut signals = MeterSignals::default();
        for service in reader.used_services() {
            let pressure = reader.pressure(service)?;
            signals.add(service, &pressure);
            let flood = flood(&pressure, now_s);
            if flood.now || flood.times > 0 {
                result.floods.insert(service, flood);
            }
        }
        let memory = reader.bindings_memory();
        let walk = self.empty_tables.next(signals, memory, result.began);
        let mut counts = SweepCounts::new(reader);
        for table in ORDER.into_iter().filter(|table| walk.tables[*table as usize]) {
            let (entries, removed) = match table {
                FlowTable::Syns => sweep_syns(reader, &mut counts),
                FlowTable::Flows => sweep_flows(reader, now_s, &mut counts, &mut result.slots)?,
                FlowTable::UdpFlows => sweep_udp(reader, now_s, &mut counts)?,
            };
            self.empty_tables.walked(table, entries + removed);
            result.entries[table as usize] = entries;
            result.removed += removed;
        }
        if walk.bindings {
            let found = sweep_bindings(reader, self.last.bindings, &mut counts)?;
            self.empty_tables.walked_bindings(found.entries, memory, reader.bindings_memory());
            result.bindings = found.bindings;
            result.removed += found.removed;
        }
        counts.report(&mut result);
        self.last = Arc::new(result);
        Ok(Arc::clone(&self.last))
    }

    /// Whether the next sweep should not be delayed: a table fills up, or flows are waited for to end or be counted.
    fn is_urgent(&self) -> bool {
        let (reader, last) = (&self.reader, &self.last);
        let is_filling =
            ORDER.iter().any(|table| last.entries[*table as usize] > u64::from(reader.flow_room(*table)) / 2);
        // The dataplane evicts unconfirmed bindings by itself, until there are none left.
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

    /// Waits as long as the cost of the last sweep requires, or until a sweep becomes urgent.
    fn rest(&self, took: Duration, cost: Duration, events: &mpsc::Sender<Event>) {
        let began = Instant::now();
        loop {
            // Urgency is checked only where it would shorten the wait.
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

/// Sweeps the tracked TCP flows: removes those that expired or need no entry any more, and collects the slots of the
/// others. Returns the numbers of entries left and removed.
fn sweep_flows(
    reader: &Reader,
    now_s: u32,
    counts: &mut SweepCounts<'_>,
    slots: &mut BTreeMap<u32, SlotSet>,
) -> Result<(u64, u64), DataplaneError> {
    let (table, rules) = (FlowTable::Flows, ExpiryRules { now_s });
    let mut flow_slots = FlowSlots::new(reader)?;
    let (mut over, mut count) = (Vec::new(), 0u64);
    let mut scan = reader.syn_cache().begin();
    reader.for_each_flow(table, |key, flow| {
        scan.add(&key);
        if rules.is_expired(counts, table, &key, &flow) || flow_slots.is_redundant(&key, &flow) {
            over.push(key);
            return;
        }
        count += 1;
        counts.count(key.service, flow.backend, true, ExpiryRules::is_live(table, &flow));
        flow_slots.add(&key);
    })?;
    reader.syn_cache().settle(&scan);
    let mut removed = 0;
    for key in over {
        // A packet may have come since the walk, or a change of the table.
        let Some(flow) = reader.flow(table, &key) else { continue };
        if rules.is_expired(counts, table, &key, &flow) || flow_slots.is_redundant(&key, &flow) {
            reader.remove_flow(table, &key)?;
            removed += 1;
        } else {
            count += 1;
            counts.count(key.service, flow.backend, true, ExpiryRules::is_live(table, &flow));
            flow_slots.add(&key);
        }
    }
    *slots = flow_slots.into_slots();
    Ok((count, removed))
}

/// Sweeps the UDP flows; returns the numbers of entries left and removed.
fn sweep_udp(
    reader: &Reader,
    now_s: u32,
    counts: &mut SweepCounts<'_>,
) -> Result<(u64, u64), DataplaneError> {
    let (table, rules) = (FlowTable::UdpFlows, ExpiryRules { now_s });
    let (mut over, mut count) = (Vec::new(), 0u64);
    reader.for_each_flow(table, |key, flow| {
        if rules.is_expired(counts, table, &key, &flow) {
            over.push(key);
            return;
        }
        count += 1;
        counts.count(key.service, flow.backend, false, ExpiryRules::is_live(table, &flow));
    })?;
    let mut removed = 0;
    for key in over {
        // A packet may have come since the walk.
        let Some(flow) = reader.flow(table, &key) else { continue };
        if rules.is_expired(counts, table, &key, &flow) {
            reader.remove_flow(table, &key)?;
            removed += 1;
        } else {
            count += 1;
            counts.count(key.service, flow.backend, false, ExpiryRules::is_live(table, &flow));
        }
    }
    Ok((count, removed))
}

/// Sweeps the SYN cache; only recent SYNs count. Returns the numbers of entries left and removed.
fn sweep_syns(reader: &Reader, counts: &mut SweepCounts<'_>) -> (u64, u64) {
    let tick = now_tick();
    let (mut count, mut removed) = (0, 0);
    reader.syn_cache().for_each(|place, head, _| {
        let index = syn_cache::backend(head);
        let backend = reader.backend(index).filter(|b| b.flags & USED != 0);
        match backend.filter(|_| syn_cache::is_fresh(head, tick)) {
            Some(backend) if counts.is_served(backend.service, index) => {
                count += 1;
                counts.count_syn(backend.service, index);
            }
            _ => {
                reader.syn_cache().remove(place, head);
                removed += 1;
            }
        }
    });
    (count, removed)
}

/// Starts the sweeper thread; it ends when the receiver of `events` is gone.
pub fn start(pin_path: PathBuf, events: mpsc::Sender<Event>) -> std::io::Result<()> {
    let run = move || {
        let mut sweeper = match Reader::open(&pin_path) {
            Ok(reader) => Sweeper::new(reader),
            Err(error) => return tracing::error!(%error, "cannot open the flow tables; they are not swept"),
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
