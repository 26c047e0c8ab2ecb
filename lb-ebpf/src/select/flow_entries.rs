//! Entries of TCP flows and of recent SYNs, as `choose` reads and writes them.

use crate::{FlowTable, Tables, packet::parse::Headers};
use lb_common::{Flow, FlowKey, Reason, flow, slot::NO_BACKEND};

/// A flow that no table knows. Not an `Option`: of its contents LLVM leaves nothing on the stack where there are none, and
/// yet reads them before it asks whether there are; kernels before 6.3 refuse that.
pub const NO_FLOW: Flow = Flow {
    backend: NO_BACKEND,
    last_seen_s: 0,
    created_s: 0,
    flags: 0,
    #[cfg(feature = "other-abi")]
    other: 0,
};

/// Whether a table knows the flow.
#[inline(always)]
pub const fn is_some(flow: Flow) -> bool {
    flow.backend != NO_BACKEND
}

/// What the table of TCP flows says of a flow, where it may say anything.
#[inline(always)]
pub fn known<T: Tables>(tables: &T, key: &FlowKey, syn_hash: u64) -> Flow {
    if tables.may_hold_flow(syn_hash) {
        tables.flow(FlowTable::Flows, key).unwrap_or(NO_FLOW)
    } else {
        NO_FLOW
    }
}

/// Whether a packet is not one of the flow whose handshake wrote an entry, see [`Flow::follow`].
#[inline(always)]
pub const fn is_foreign(known: Flow, headers: &Headers, now_s: u32) -> bool {
    Flow::follow(known.flags, known.created_s, headers.sequence, now_s) & flow::flags::FOREIGN != 0
}

/// Writes a TCP flow down.
#[inline(always)]
pub fn record_flow<T: Tables>(
    tables: &T,
    (key, syn_hash): (&FlowKey, u64),
    backend: u32,
    now_s: u32,
    flags: u32,
) -> bool {
    count_if_full(tables, tables.record_flow(key, syn_hash, &Flow::new(backend, now_s, now_s, flags)))
}

/// Caches where a SYN went, and its sequence number.
#[inline(always)]
pub fn cache_syn<T: Tables>(
    tables: &T,
    headers: &Headers,
    (key, syn_hash): (&FlowKey, u64),
    backend: u32,
) -> bool {
    count_if_full(tables, tables.cache_syn(key, syn_hash, backend, headers.sequence))
}

/// Counts what was not written for want of room.
#[inline(always)]
pub fn count_if_full<T: Tables>(tables: &T, written: bool) -> bool {
    if !written {
        tables.count(Reason::FlowNotRecorded);
    }
    written
}
