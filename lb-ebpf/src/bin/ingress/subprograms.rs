//! Global functions of the ingress object: the verifier walks each of them once, by itself, and carries nothing that
//! it learned there on to the callers.

use crate::{
    Xdp,
    maps::{NETWORK, PRIMARIES, SECONDARIES, SERVICES, SETTINGS, WRITE_BUDGETS},
    tables::{Line, Maps, coarse_now_ns, has_own_address, syn_state, view_at, word},
};
use aya_ebpf::{bindings::xdp_md, programs::XdpContext};
use lb_common::{
    Reason, Slot, VipKey,
    backend::own_address,
    rate_limit::FULL_S,
    syn_cache::{self, CachedSyn},
};
use lb_ebpf::{
    FlowTable, Tables,
    guard::{self, limit, martian},
    kernel::global,
    packet::{
        network::{self, Network},
        parse::parse,
    },
    quic,
    select::{
        others::{NONE, others_of},
        scheduler::{SlotRef, encode, less_loaded, schedule},
        service,
    },
};

/// [`guard::is_denied`]. A global function: verified once, by itself, and what it found out about the source is not
/// carried on.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn guard_source(a: u32, b: u32, c: u32, d: u32) -> u32 {
    guard::is_denied(&Maps, [a, b, c, d]) as u32
}

/// [`limit::admit`] for the view whose table begins at `slot_base`: 0 if the flow may begin, 1 if its source has had its
/// share, 2 if the service has.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn limit_flow(service: u32, slot_base: u32, high: u64, low: u64) -> u32 {
    let Some(entry) = SERVICES.get(service) else { return 0 };
    let view = view_at(entry, slot_base);
    let source = [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32];
    match limit::admit(&Maps, service, view, source) {
        None => 0,
        Some(Reason::RateSource) => 1,
        Some(_) => 2,
    }
}

/// Whether a table may take one more flow of a service. `factor` is that of the budget for flows from before a transition.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admits_flow(service: u32, table: u32, now_s: u32, factor: u32) -> u32 {
    const SYNS: u32 = FlowTable::Syns as u32;
    const UDP: u32 = FlowTable::UdpFlows as u32;
    let Some(budget) = WRITE_BUDGETS.get_ptr_mut(service) else { return 0 };
    // SAFETY: this CPU's own, and programs do not preempt each other.
    let budget = unsafe { &mut *budget };
    let settings = global(&SETTINGS);
    let full_s = budget.full_s[(table == UDP) as usize];
    if full_s != 0 && now_s.saturating_sub(full_s) < FULL_S {
        return 0;
    }
    let is_admitted = match table {
        SYNS => budget.syns.allow(now_s, settings.syns_per_s),
        UDP => budget.udp.allow(now_s, settings.udp_per_s),
        _ => budget.flows.allow_each_second(now_s, settings.flows_per_s.saturating_mul(factor.max(1))),
    };
    is_admitted as u32
}

/// What the next two functions found, in `NETWORK`, or the reason that their answer stands for.
#[inline(always)]
pub fn parsed(answer: u32) -> Result<&'static mut Network, Reason> {
    // LLVM knows which reasons the functions give, and leaves out the table's bounds check, of which the verifier lives.
    let answer = core::hint::black_box(answer);
    if answer != PARSED {
        return Err(Reason::from_index(answer).unwrap_or(Reason::Truncated));
    }
    let network = NETWORK.get_ptr_mut(0).ok_or(Reason::BrokenTable)?;
    // SAFETY: this CPU's own, and programs do not preempt each other. It holds a whole one since the first packet, and
    // held zeros before, which are one as well.
    Ok(unsafe { &mut *network })
}

/// The answer of the next two functions where they refuse nothing.
const PARSED: u32 = u32::MAX;

/// [`network::parse_network`] into `NETWORK`. A global function: verified once, by itself. Of what lies in a map the
/// verifier knows nothing, so the rest is walked once, and not for each form of headers.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn parse_frame(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    let place = match parsed(PARSED) {
        Ok(place) => place,
        Err(reason) => return reason as u32,
    };
    match network::parse_network(&Xdp::new(&ctx), global(&SETTINGS), place) {
        Ok(()) => PARSED,
        Err(reason) => reason as u32,
    }
}

/// [`parse`] into `NETWORK`.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn parse_headers(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    let place = match parsed(PARSED) {
        Ok(place) => place,
        Err(reason) => return reason as u32,
    };
    match parse(&Xdp::new(&ctx), global(&SETTINGS)) {
        Ok(headers) => {
            place.headers = headers;
            PARSED
        }
        Err(reason) => reason as u32,
    }
}

/// Whether an address, as two words, is a VIP.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn is_vip(first: u64, second: u64) -> u32 {
    Maps.vip(&VipKey { vip: zerocopy::transmute!([first, second]) }).is_some() as u32
}

/// Whether a worker has an address.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn is_worker(a: u32, b: u32, c: u32, d: u32) -> u32 {
    has_own_address(&zerocopy::transmute!([a, b, c, d]), own_address::WORKER) as u32
}

/// [`martian::fault`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn source_fault(a: u32, b: u32, c: u32, d: u32) -> u32 {
    martian::encode(martian::fault(&Maps, [a, b, c, d]))
}

/// [`service::find`] for a port (low half) and protocol.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn find_service(first: u64, second: u64, port_protocol: u32) -> u64 {
    let (port, protocol) = (port_protocol as u16, (port_protocol >> 16) as u8);
    service::encode(service::find(&Maps, [first, second], port, protocol))
}

/// [`syn_cache::hash`] under this host's key. A global function: verified once, by itself.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn hash_flow(first: u64, second: u64, third: u64) -> u64 {
    syn_cache::hash(syn_state().map_or([0; 2], |state| state.key), [first, second, third])
}

/// [`schedule`] for the view whose table begins at `slot_base`. A global function: verified once, by itself.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn schedule_flow(service: u32, slot_base: u32, number: u32, now_s: u32) -> u64 {
    let Some(entry) = SERVICES.get(service) else { return u64::MAX };
    let view = view_at(entry, slot_base);
    let at = slot_base.wrapping_add(number);
    let (Some(primary), Some(secondary)) = (word(&PRIMARIES, at), word(&SECONDARIES, at)) else {
        return u64::MAX;
    };
    encode(schedule(&Maps, service, view, SlotRef { slot: Slot { primary, secondary }, number }, now_s))
}

/// [`others_of`] for the view whose table begins at `slot_base`.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn others_in(service: u32, slot_base: u32, number: u32, chosen: u32) -> u64 {
    let Some(entry) = SERVICES.get(service) else { return NONE };
    let view = view_at(entry, slot_base);
    others_of(&Maps, service, view, number, chosen)
}

/// [`less_loaded`]. A global function too: its caller is a loop.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn less_loaded_of(service: u32, at: u32, best: u64, now_s: u32) -> u64 {
    less_loaded(&Maps, service, at, best, now_s)
}

/// [`quic::read_id`] of the id in `QUIC_WORK`.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn read_quic_id(service: u32, key: u32) -> u64 {
    quic::encode(quic::read_id(&Maps, service, key))
}

/// Sets a flow's bit in the flow filter: [`syn_cache::add`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn add_to_filter(syn_hash: u64) -> u32 {
    let (Some(state), Some(line)) = (syn_state(), Line::of(syn_hash)) else { return 0 };
    // SAFETY: the entry stays mapped during the run; lbd stores the word in one piece.
    syn_cache::add(&line, unsafe { core::ptr::read_volatile(&state.epoch) }, syn_hash);
    1
}

/// Whether the table of flows may hold a flow: [`syn_cache::may_hold`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn may_hold_flow(syn_hash: u64) -> u32 {
    if syn_state().is_none_or(|state| state.armed == 0) {
        return 1;
    }
    let Some(line) = Line::of(syn_hash) else { return 1 };
    syn_cache::may_hold(&line, syn_hash) as u32
}

/// Where a recent SYN was placed: [`syn_cache::find`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn find_syn(syn_hash: u64) -> u64 {
    let Some(line) = Line::of(syn_hash) else { return CachedSyn::NONE.encode() };
    syn_cache::find(&line, syn_hash, || syn_cache::tick_of(coarse_now_ns())).encode()
}

/// Caches where a SYN is placed: [`syn_cache::insert`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn insert_syn(syn_hash: u64, backend: u32, sequence: u32) -> u32 {
    let Some(line) = Line::of(syn_hash) else { return 0 };
    let tick = syn_cache::tick_of(coarse_now_ns());
    let head = syn_cache::head(syn_hash, backend, tick);
    if syn_cache::insert(&line, head, syn_cache::upper_half(sequence), tick) {
        Maps.count(Reason::SynEvicted);
    }
    1
}

/// Removes a SYN's entry: [`syn_cache::forget`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn forget_syn(syn_hash: u64) -> u32 {
    let Some(line) = Line::of(syn_hash) else { return 0 };
    syn_cache::forget(&line, syn_hash);
    1
}
