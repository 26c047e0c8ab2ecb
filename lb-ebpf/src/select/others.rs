//! Other backends that may hold a flow which its chosen backend does not know.
//!
//! Called for backends in mode `GUE_CHAIN` and by `explain`; the second-chance header names them.

use super::{
    hash::slot_of,
    scheduler::{SlotRef, second, slot_hash},
};
use crate::{Tables, packet::parse::Headers};
use lb_common::{
    ServiceView, Slot,
    backend::{flags, mode},
    is_mapped,
    service::{flags::SECONDS, scheduler},
    slot::{BACKEND_MASK, NO_BACKEND},
};

/// Backends that may have a flow which `chosen` lacks, as a [`list`] in the order in which to ask them;
/// [`NO_BACKEND`] for none.
#[inline(always)]
pub fn others<T: Tables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
    chosen: u32,
) -> u64 {
    let number = slot_of(slot_hash(view, headers, hash), view.slot_count);
    tables.others(service, view, number, chosen)
}

/// [`others`] by the number of the flow's slot.
#[inline(always)]
pub fn others_of<T: Tables>(tables: &T, service: u32, view: &ServiceView, number: u32, chosen: u32) -> u64 {
    let at = view.slot_base.wrapping_add(number);
    let (Some(primary), Some(secondary)) = (tables.primary(at), tables.secondary(at)) else { return NONE };
    let slot = Slot { primary, secondary };
    let previous = if slot.is_transition() { slot.secondary_index() } else { NO_BACKEND };
    let Some(entry) = tables.backend(chosen) else { return NONE };
    let is_ipv4 = is_mapped(&entry.address);
    let usable = |index: u32| {
        index != chosen
            && matches!(tables.backend(index), Some(b) if b.flags & (flags::USED | flags::DOWN) == flags::USED
                && b.service == service
                && b.mode == mode::GUE_CHAIN
                && is_mapped(&b.address) == is_ipv4)
    };
    let second = second(tables, view, SlotRef { slot, number });
    let earlier = earlier(tables, view, SlotRef { slot, number });
    // Where new flows are placed, and where they were before.
    let [b, c, d] = if scheduler::is_by_pair(view.scheduler) {
        [second, previous, earlier]
    } else {
        [previous, earlier, second]
    };
    let mut found = NONE;
    for index in [slot.primary_index(), b, c, d] {
        if !is_in(found, index) && usable(index) {
            found = add(found, index);
        }
    }
    found
}

/// One more backend that may have flows of a slot: it was in the pair less than the drain time ago.
#[inline(always)]
fn earlier<T: Tables>(tables: &T, view: &ServiceView, place: SlotRef) -> u32 {
    if !place.slot.has_earlier() || view.flags & SECONDS == 0 {
        return NO_BACKEND;
    }
    tables.secondary(view.seconds_base().wrapping_add(place.number)).unwrap_or(NO_BACKEND) & BACKEND_MASK
}

/// No backend, twice.
pub const NONE: u64 = list(NO_BACKEND, NO_BACKEND);

/// Two backends as one number: the first in the low half.
#[inline(always)]
pub const fn list(first: u32, second: u32) -> u64 {
    (second as u64) << 32 | first as u64
}

/// Whether a list has an index.
#[inline(always)]
const fn is_in(found: u64, index: u32) -> bool {
    found as u32 == index || (found >> 32) as u32 == index
}

/// Puts an index into the first free half.
#[inline(always)]
const fn add(found: u64, index: u32) -> u64 {
    if found as u32 == NO_BACKEND {
        (NO_BACKEND as u64) << 32 | index as u64
    } else if (found >> 32) as u32 == NO_BACKEND {
        (index as u64) << 32 | (found as u32) as u64
    } else {
        found
    }
}

/// The inverse of [`list`].
#[inline(always)]
pub const fn split(found: u64) -> [u32; 2] {
    [found as u32, (found >> 32) as u32]
}
