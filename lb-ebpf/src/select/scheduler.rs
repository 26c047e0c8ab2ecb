//! Places a new flow by the service's scheduler, and knows where a flow is that no table names.
//!
//! Whatever a scheduler takes, a stateless lookup of a later packet answers with the slot's primary; so `choose`
//! tracks what was placed elsewhere. `p2c` and a capped `source-hash` take a half of the slot's pair, so that hosts
//! that know nothing of the flow have only two places to look for it (second chance); the others take any backend.
//!
//! Input: [`Tables`], a service's live view, the slot, its place. Output: a backend's index and [`Why`].
//! Called by `choose`.

use crate::{
    Tables,
    packet::parse::{Headers, words},
    select::{
        choose::Why,
        hash::{flow_hash, slot_of, source_hash},
    },
};
use lb_common::{
    Address, FlowKey, Reason, ServiceView, Slot, backend,
    service::{flags, scheduler},
    slot::{BACKEND_MASK, NO_BACKEND},
};

/// Backends that [`scheduler::LEAST_CONN`] compares for one flow. A longer list is looked at in turn, so many at a time.
pub const LEAST_CONN_SAMPLE: u32 = 32;

/// A slot with what belongs to it in the view.
#[derive(Clone, Copy, Debug)]
pub struct SlotRef {
    /// The slot; its secondary may not have been read.
    pub slot: Slot,
    /// Its number in the table.
    pub number: u32,
}

/// Hash by which the flow's slot is found.
#[inline(always)]
pub fn slot_hash(view: &ServiceView, headers: &Headers, hash: u64) -> u64 {
    if view.flags & flags::HASH_SOURCE != 0 { source_hash(view.seed, headers) } else { hash }
}

/// Number of the slot of a flow of a service with this VIP, for those who have no packet of it. The table has slots.
pub fn number_of(view: &ServiceView, key: &FlowKey, vip: &Address) -> u32 {
    let headers = Headers {
        source: words(key.source),
        destination: words(*vip),
        source_port: u16::from_ne_bytes(key.source_port.to_bytes()),
        port: u16::from_ne_bytes(key.port.to_bytes()),
        protocol: view.protocol,
        is_ipv6: !lb_common::is_mapped(vip),
        ..Headers::default()
    };
    slot_of(slot_hash(view, &headers, flow_hash(view.seed, &headers)), view.slot_count)
}

/// Whether flows of this slot that no table names may belong elsewhere than to its primary.
#[inline(always)]
pub fn is_in_transition(view: &ServiceView, slot: Slot) -> bool {
    view.old_count != 0 || slot.is_transition()
}

/// Whether a flow on this backend is found there without any table.
#[inline(always)]
pub fn is_at_home(view: &ServiceView, slot: Slot, backend: u32) -> bool {
    backend == slot.primary_index() && !is_in_transition(view, slot) && view.flags & flags::COUNT_FLOWS == 0
}

/// Where a flow from before the transition is; [`NO_BACKEND`] if there is no transition.
#[inline(always)]
pub fn previous<T: Tables>(tables: &T, view: &ServiceView, headers: &Headers, slot: Slot) -> u32 {
    if view.old_count != 0 {
        let by_source = view.flags & flags::OLD_HASH_SOURCE != 0;
        let hash =
            if by_source { source_hash(view.old_seed, headers) } else { flow_hash(view.old_seed, headers) };
        let place = view.old_base().wrapping_add(slot_of(hash, view.old_count));
        tables.primary(place).unwrap_or(NO_BACKEND) & BACKEND_MASK
    } else if slot.is_transition() {
        slot.secondary_index()
    } else {
        NO_BACKEND
    }
}

/// The other half of the slot's pair; [`NO_BACKEND`] if it has none.
#[inline(always)]
pub fn second<T: Tables>(tables: &T, view: &ServiceView, place: SlotRef) -> u32 {
    if !place.slot.is_transition() {
        place.slot.secondary_index()
    } else if view.flags & flags::SECONDS != 0 {
        // The secondary is the previous primary just now; the second choice stands behind the table.
        tables.primary(view.seconds_base().wrapping_add(place.number)).unwrap_or(NO_BACKEND) & BACKEND_MASK
    } else {
        NO_BACKEND
    }
}

/// Backend of a new flow. For schedulers that go by load its cost is added to the backend's.
#[inline(always)]
pub fn schedule<T: Tables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    place: SlotRef,
    now_s: u32,
) -> Result<(u32, Why), Reason> {
    let primary = place.slot.primary_index();
    if primary == NO_BACKEND {
        return Err(Reason::NoBackend);
    }
    let (backend, why) = match view.scheduler {
        scheduler::P2C | scheduler::BOUNDED_LOAD => {
            let second = second(tables, view, place);
            let cap = if view.scheduler == scheduler::BOUNDED_LOAD { view.load_cap } else { 0 };
            let load = tables.load(primary, now_s);
            // Equal loads go to the primary: that needs no tracking.
            if load > cap && takes_new(tables, service, second) && tables.load(second, now_s) < load {
                (second, Why::LessLoaded)
            } else {
                (primary, Why::NewFlow)
            }
        }
        scheduler::ROUND_ROBIN | scheduler::RANDOM => by_list(tables, service, view),
        scheduler::LEAST_CONN => least(tables, service, view, now_s),
        _ => (primary, Why::NewFlow),
    };
    // A list that is older than the backend's state: the primary is as good as any.
    let (backend, why) = if backend == NO_BACKEND { (primary, Why::NewFlow) } else { (backend, why) };
    if matches!(view.scheduler, scheduler::P2C | scheduler::BOUNDED_LOAD | scheduler::LEAST_CONN) {
        tables.charge(backend, now_s);
    }
    Ok((backend, why))
}

/// A placement as one number, for functions that can return no more.
#[inline(always)]
pub fn encode(placed: Result<(u32, Why), Reason>) -> u64 {
    match placed {
        Ok((backend, why)) => {
            let why = match why {
                Why::LessLoaded => 1,
                Why::RoundRobin => 2,
                Why::Random => 3,
                Why::LeastConn => 4,
                _ => 0,
            };
            why << 32 | backend as u64
        }
        Err(_) => u64::MAX,
    }
}

/// The inverse of [`encode`].
#[inline(always)]
pub fn decode(word: u64) -> Result<(u32, Why), Reason> {
    let why = match word >> 32 {
        0 => Why::NewFlow,
        1 => Why::LessLoaded,
        2 => Why::RoundRobin,
        3 => Why::Random,
        4 => Why::LeastConn,
        _ => return Err(Reason::NoBackend),
    };
    Ok((word as u32, why))
}

/// Whether a backend is there and takes new flows.
#[inline(always)]
fn takes_new<T: Tables>(tables: &T, service: u32, index: u32) -> bool {
    let Some(entry) = tables.backend(index) else { return false };
    let state = backend::flags::USED | backend::flags::DOWN | backend::flags::DRAINING;
    entry.flags & state == backend::flags::USED && entry.service == service
}

/// The next of the list, or a random slot's primary.
#[inline(always)]
fn by_list<T: Tables>(tables: &T, service: u32, view: &ServiceView) -> (u32, Why) {
    let (place, why) = if view.scheduler == scheduler::RANDOM {
        let slot = slot_of((tables.random() as u64) << 32, view.slot_count);
        (view.slot_base.wrapping_add(slot), Why::Random)
    } else if view.list_count == 0 {
        return (NO_BACKEND, Why::RoundRobin);
    } else {
        let turn = (tables.next_turn(service) % view.list_count as u64) as u32;
        (view.list_base().wrapping_add(turn), Why::RoundRobin)
    };
    let index = tables.primary(place).unwrap_or(NO_BACKEND) & BACKEND_MASK;
    (if takes_new(tables, service, index) { index } else { NO_BACKEND }, why)
}

/// The least loaded of the list; of equals the first from this turn's place on.
#[inline(always)]
fn least<T: Tables>(tables: &T, service: u32, view: &ServiceView, now_s: u32) -> (u32, Why) {
    if view.list_count == 0 {
        return (NO_BACKEND, Why::LeastConn);
    }
    let compared = if view.list_count < LEAST_CONN_SAMPLE { view.list_count } else { LEAST_CONN_SAMPLE };
    // A short list is gone through whole each time, so that its turn moves by one; a long one in windows.
    let step = if compared < LEAST_CONN_SAMPLE { 1 } else { LEAST_CONN_SAMPLE as u64 };
    let start = (tables.next_turn(service).wrapping_mul(step) % view.list_count as u64) as u32;
    let mut best = NOTHING;
    let mut i = 0;
    while i < LEAST_CONN_SAMPLE {
        if i >= compared {
            break;
        }
        let at = start.wrapping_add(i);
        let at = if at >= view.list_count { at.wrapping_sub(view.list_count) } else { at };
        best = tables.less_loaded(service, view.list_base().wrapping_add(at), best, now_s);
        i += 1;
    }
    (best as u32, Why::LeastConn)
}

/// No backend, and more load than any has.
const NOTHING: u64 = u64::MAX << 32 | NO_BACKEND as u64;

/// The less loaded of `best` (load in the high half, index in the low) and the backend at a place of a list.
#[inline(always)]
pub fn less_loaded<T: Tables>(tables: &T, service: u32, at: u32, best: u64, now_s: u32) -> u64 {
    let index = tables.primary(at).unwrap_or(NO_BACKEND) & BACKEND_MASK;
    let load = tables.load(index, now_s);
    if (load as u64) < best >> 32 && takes_new(tables, service, index) {
        (load as u64) << 32 | index as u64
    } else {
        best
    }
}
