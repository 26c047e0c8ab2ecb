//! An ingress host's way for a packet, from frame to verdict.
//!
//! Called by `bin/ingress.rs` in the kernel and by tests and fuzzers natively.

pub mod fast_path;
pub mod fragment;

use crate::{
    Frame, Tables, Verdict,
    forward::forward,
    guard::{self, martian},
    icmp::too_big::conclude,
    nat,
    packet::{
        fib::Fib,
        parse::Headers,
        verdict::{Outcome, Refusal, refuse},
    },
    second_chance::header,
    select::{
        choose::{KEEP, Why, backend_of, choose_with},
        hash::flow_hash,
        others,
        service::{lookup_service, vip_of},
    },
};
use lb_common::{
    Reason,
    backend::flags,
    names::stage,
    service,
    settings::{IngressSettings, features},
    slot::NO_BACKEND,
};

/// Decides a packet's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    if let Some(done) = fast_path::process(frame, tables, settings) {
        return done;
    }
    let mut place = Headers::default();
    let headers = match tables.parse(frame, settings, &mut place) {
        Ok(headers) => &*headers,
        // Counted by the program that takes it over.
        Err(Reason::Icmp) if settings.features & (features::ICMP | features::NAT) != 0 => {
            return (Verdict::Stage(stage::ICMP), Outcome::Not(Reason::Icmp));
        }
        Err(Reason::Fragment) if settings.features & features::FRAGMENTS != 0 => {
            return (Verdict::Stage(stage::FRAGMENT), Outcome::Not(Reason::Fragment));
        }
        Err(reason) => return refuse(tables, reason),
    };
    if let Err(reason) = screen(tables, settings, headers) {
        return refuse(tables, reason);
    }
    match balance(frame, tables, settings, headers) {
        // Nobody's port is perhaps that of a translated flow.
        Err(Refusal::Reason(reason @ (Reason::NotVip | Reason::NoService)))
            if nat::is_reply(settings, headers.port) =>
        {
            (Verdict::Stage(stage::NAT), Outcome::Not(reason))
        }
        result => conclude(frame, tables, settings, headers, result),
    }
}

/// Drops what its source keeps from a VIP. It is not known yet whether the packet is for one, and what is for the host is
/// not looked at. It comes early, as the verifier walks all that follows once for each state in which it gets here.
#[inline(always)]
fn screen<T: Tables>(tables: &T, settings: &IngressSettings, headers: &Headers) -> Result<(), Reason> {
    let source = martian::check(tables, headers);
    let checked = source.and_then(|()| martian::check_worker(tables, headers, headers.port));
    let Err(reason) = checked.and_then(|()| guard::check(tables, settings, headers.source)) else {
        return Ok(());
    };
    if tables.is_vip(vip_of(headers)) { Err(reason) } else { Ok(()) }
}

/// Service, backend, forwarding, counters.
#[inline(always)]
fn balance<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
) -> Result<(Verdict, Outcome), Refusal> {
    let (service, _) = lookup_service(tables, headers)?;
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    if settings.features & features::NAT != 0 && view.flags & service::flags::NAT != 0 {
        return Err(Refusal::Stage(stage::NAT));
    }
    if settings.features & features::QUIC != 0 && view.flags & service::flags::QUIC != 0 {
        return Err(Refusal::Stage(stage::QUIC));
    }
    let hash = flow_hash(view.seed, headers);
    let choice = choose_with(tables, settings.features | KEEP, service, view, headers, hash)?;
    let is_young = choice.is_new || choice.why == Why::TrackedYoung;
    let chosen = hide(choice.backend as u64 | (choice.is_new as u64) << 32 | (is_young as u64) << 33, hash);
    let (index, is_new, is_young) = (chosen as u32, chosen >> 32 & 1 != 0, chosen >> 33 & 1 != 0);
    let (mut at, mut backend) = (index, backend_of(tables, index, service)?);
    if backend.flags & (flags::RESOLVED | flags::CHANGING) == 0 {
        tables.count(Reason::FibLookup);
    }
    let has_feature = settings.features & features::SECOND_CHANCE != 0;
    let (mut has_chain, mut others) = (false, hash);
    if has_feature && header::is_carried_to(backend) {
        (has_chain, others) = (true, others::others(tables, service, view, headers, hash, index));
        let first = others as u32;
        if first != NO_BACKEND && header::asks_first(headers, is_young) {
            (at, backend) = (first, tables.backend(first).ok_or(Reason::BrokenTable)?);
            others = others::list(index, NO_BACKEND);
        }
    }
    let (has_chain, others) = (hide(has_chain as u64, hash), hide(others, hash));
    let verdict = forward(frame, tables, settings, headers, (at, backend), hash)?;
    if has_feature && has_chain != 0 && !header::write(frame, tables, (at, backend), others) {
        return Err(Reason::BrokenTable.into());
    }
    if settings.stats != 0 {
        tables.account(index, headers.ip_len, is_new);
    }
    Ok((verdict, Outcome::Forwarded { service, backend: index }))
}

/// `value`, of which the verifier and the compiler no longer know anything. The verifier walks the code after a join
/// once for each combination of values that it knows there; with hidden values it walks that code once. `unknown` is any
/// number that the verifier does not know.
#[inline(always)]
fn hide(value: u64, unknown: u64) -> u64 {
    core::hint::black_box(value.wrapping_add(unknown)).wrapping_sub(unknown)
}
