//! An ingress host's way for a packet, from frame to verdict.
//!
//! Called by `bin/ingress.rs` in the kernel and by tests and fuzzers natively.

use crate::{
    Frame, Tables, Verdict, chain,
    choose::{KEEP, Why, choose_with},
    forward::{Fib, Refusal, forward},
    guard,
    hash::flow_hash,
    icmp, martian, nat,
    parse::Headers,
    quick,
    service::{lookup_service, vip_of},
};
use lb_common::{
    Backend, Reason,
    backend::flags,
    names::stage,
    service,
    settings::{IngressSettings, features},
    slot::NO_BACKEND,
};

/// What was found out about a packet on its way, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Forwarded to this backend (index) of this service (index).
    Forwarded {
        /// Service.
        service: u32,
        /// Backend.
        backend: u32,
    },
    /// A worker's packet, sent on to a client of this service (index).
    Returned {
        /// Service.
        service: u32,
    },
    /// Not forwarded, for this reason.
    Not(Reason),
}

/// Decides a packet's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    if let Some(done) = quick::process(frame, tables, settings) {
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
        Ok((verdict, service, backend)) => (verdict, Outcome::Forwarded { service, backend }),
        // Nobody's port is perhaps that of a translated flow.
        Err(Refusal::Reason(reason @ (Reason::NotVip | Reason::NoService)))
            if nat::is_reply(settings, headers.port) =>
        {
            (Verdict::Stage(stage::NAT), Outcome::Not(reason))
        }
        Err(Refusal::Reason(reason)) => refuse(tables, reason),
        Err(Refusal::Stage(index)) => (Verdict::Stage(index), Outcome::Not(Reason::StageMissing)),
        Err(Refusal::TooBig(mtu)) => refuse(tables, too_big(frame, tables, settings, headers, mtu)),
    }
}

/// Drops what its source keeps from a VIP. It is not known yet whether the packet is for one, and what is for the host is
/// not looked at. It comes early, as the verifier walks all that follows once for each state in which it gets here.
#[inline(always)]
fn screen<T: Tables>(tables: &T, settings: &IngressSettings, headers: &Headers) -> Result<(), Reason> {
    let checked = martian::check(tables, headers);
    let Err(reason) = checked.and_then(|()| guard::check(tables, settings, headers.source)) else {
        return Ok(());
    };
    if tables.is_vip(vip_of(headers)) { Err(reason) } else { Ok(()) }
}

/// The end of a packet's way for a reason, counted.
#[inline(always)]
pub fn refuse<T: Tables>(tables: &T, reason: Reason) -> (Verdict, Outcome) {
    tables.count(reason);
    let verdict =
        if reason == Reason::TakenOver { Verdict::Stage(stage::PREDECESSOR) } else { Verdict::of(reason) };
    (verdict, Outcome::Not(reason))
}

/// The end of a packet's way in a stage after which there is none.
#[inline(always)]
pub fn end<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    result: Result<(Verdict, u32, u32), Refusal>,
) -> (Verdict, Outcome) {
    match result {
        Ok((verdict, service, backend)) => (verdict, Outcome::Forwarded { service, backend }),
        Err(Refusal::Reason(reason)) => refuse(tables, reason),
        Err(Refusal::Stage(_)) => refuse(tables, Reason::StageMissing),
        Err(Refusal::TooBig(mtu)) => refuse(tables, too_big(frame, tables, settings, headers, mtu)),
    }
}

/// What becomes of a packet by what a stage of translation decided; a new flow goes on to the stage that binds it.
#[inline(always)]
pub fn conclude<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    result: Result<(Verdict, Outcome), Refusal>,
) -> (Verdict, Outcome) {
    match result {
        Ok(done) => done,
        Err(Refusal::Reason(reason)) => refuse(tables, reason),
        Err(Refusal::TooBig(mtu)) => refuse(tables, too_big(frame, tables, settings, headers, mtu)),
        Err(Refusal::Stage(index)) => (Verdict::Stage(index), Outcome::Not(Reason::StageMissing)),
    }
}

/// A chosen backend's entry. Another service's: this run was halted while its table was written anew.
#[inline(always)]
pub fn backend_of<T: Tables>(tables: &T, index: u32, service: u32) -> Result<&Backend, Reason> {
    let backend = tables.backend(index).ok_or(Reason::BrokenTable)?;
    if backend.flags & flags::USED == 0 || backend.service != service {
        return Err(Reason::BrokenTable);
    }
    Ok(backend)
}

/// Service, backend, forwarding, counters.
#[inline(always)]
fn balance<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
) -> Result<(Verdict, u32, u32), Refusal> {
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
    let mut backend = backend_of(tables, index, service)?;
    if backend.flags & flags::RESOLVED == 0 {
        tables.count(Reason::FibLookup);
    }
    let has_feature = settings.features & features::SECOND_CHANCE != 0;
    let (mut has_chain, mut others) = (false, hash);
    if has_feature && chain::is_carried_to(backend) {
        (has_chain, others) = (true, chain::others(tables, service, view, headers, hash, index));
        let first = others as u32;
        if first != NO_BACKEND && chain::asks_first(headers, is_young) {
            backend = tables.backend(first).ok_or(Reason::BrokenTable)?;
            others = chain::list(index, NO_BACKEND);
        }
    }
    let (has_chain, others) = (hide(has_chain as u64, hash), hide(others, hash));
    let verdict = forward(frame, settings, headers, backend, hash)?;
    if has_feature && has_chain != 0 && !chain::write(frame, tables, backend, others) {
        return Err(Reason::BrokenTable.into());
    }
    if settings.stats != 0 {
        tables.account(index, headers.ip_len, is_new);
    }
    Ok((verdict, service, index))
}

/// `value`, of which the verifier and the compiler no longer know anything. The verifier walks the code after a join
/// once for each combination of values that it knows there; with hidden values it walks that code once. `unknown` is any
/// number that the verifier does not know.
#[inline(always)]
fn hide(value: u64, unknown: u64) -> u64 {
    core::hint::black_box(value.wrapping_add(unknown)).wrapping_sub(unknown)
}

/// Answers a packet that is too big, within the budget.
#[inline(always)]
pub fn too_big<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    mtu: u32,
) -> Reason {
    if settings.icmp_per_s == 0 || !tables.take_icmp(settings.icmp_per_s, settings.icmp_burst) {
        return Reason::TooBigDropped;
    }
    match icmp::answer_too_big(frame, headers, mtu) {
        Ok(()) => Reason::TooBigAnswered,
        Err(reason) => reason,
    }
}
