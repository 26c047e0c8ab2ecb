//! The stage for fragments of packets to a VIP: the first part is placed like any packet and remembered,
//! the others follow it.
//!
//! A part that comes before the first is dropped (`fragment_unknown`): XDP cannot hold it back, and another
//! backend could not use it. Senders send parts in order, and networks that hash by ports hash all parts of a
//! packet alike or by address. Parts that overlap (RFC 5722), that hide the ports (RFC 1858) or that cannot be
//! parts at all are dropped, each kind counted; exact repeats are forwarded, and a first part begins anew.
//! Parts of translated packets, either way, are the business of [`crate::nat::process_fragment`].
//!
//! Reached by tail call from `ingress` with the frame as it came in; called natively by tests and fuzzers.

use crate::{
    Frame, Tables, Verdict,
    forward::forward,
    guard::{self, martian},
    icmp::too_big::run_stage,
    packet::{
        fib::Fib,
        network::{Network, Part},
        parse::Headers,
        verdict::{Outcome, Refusal},
    },
    select::{
        choose::{backend_of, choose},
        fragments::{FragmentTable, is_awaited, key_of, mark, parse_first, units},
        hash::flow_hash,
        service::{lookup_service, vip_of},
    },
};
use lb_common::{
    Reason,
    fragment::{Fragment, FragmentKey, flags},
    names::stage,
    service::{NO_SERVICE, TCP, UDP, flags as service_flags},
    settings::{IngressSettings, features},
    slot::NO_BACKEND,
};

/// Where a part goes.
#[derive(Clone, Copy)]
struct Place {
    hash: u64,
    backend: u32,
    service: u32,
}

/// Decides a fragment's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: Tables + FragmentTable>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    run_stage(frame, tables, settings, |frame, network| balance(frame, tables, settings, network))
}

#[inline(always)]
fn balance<F: Frame + Fib, T: Tables + FragmentTable>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &mut Network,
) -> Result<(Verdict, Outcome), Refusal> {
    let part = network.fragment.ok_or(Reason::Fragment)?;
    if !tables.is_vip(vip_of(&network.headers)) {
        // Perhaps a worker's answer.
        return Err(if translates(settings) {
            Refusal::Stage(stage::NAT_FRAGMENT)
        } else {
            Reason::NotVip.into()
        });
    }
    martian::check(tables, &network.headers)?;
    guard::check(tables, settings, network.headers.source)?;
    let protocol = network.headers.protocol;
    // Behind a fragment header may come more of IPv6's own headers; the first part has been read beyond them.
    if part.offset == 0 && protocol != TCP && protocol != UDP {
        return Err(Reason::Fragment.into());
    }
    let units = units(network, part)?;
    let (place, is_new) = if part.offset == 0 {
        first(frame, tables, settings, network, part, units)?
    } else {
        let key = key_of(network, part);
        let now_s = tables.now_s();
        let known =
            tables.with_fragment(&key, |known| is_awaited(known, now_s).then(|| follow(known, units)));
        match known.flatten() {
            Some(followed) => (followed?, false),
            // What is no transport that we balance is the host's in all its parts.
            None if protocol != TCP && protocol != UDP && !network.headers.is_ipv6 => {
                return Err(Reason::Fragment.into());
            }
            None => return Err(Reason::FragmentUnknown.into()),
        }
    };
    let backend = backend_of(tables, place.backend, place.service)?;
    let verdict = forward(frame, tables, settings, &network.headers, (place.backend, backend), place.hash)?;
    if settings.stats != 0 {
        tables.account(place.backend, network.headers.ip_len, is_new);
    }
    tables.count(Reason::FragmentForwarded);
    Ok((verdict, Outcome::Forwarded { service: place.service, backend: place.backend }))
}

#[inline(always)]
const fn translates(settings: &IngressSettings) -> bool {
    settings.features & features::NAT != 0
}

/// A part of a packet whose first is known: notes it, and says where they all go.
#[inline(always)]
fn follow(known: &mut Fragment, units: [u16; 2]) -> Result<Place, Refusal> {
    if known.flags & flags::HOST != 0 {
        return Err(Reason::Fragment.into());
    }
    if known.flags & flags::NAT != 0 {
        return Err(Refusal::Stage(stage::NAT_FRAGMENT));
    }
    mark(known, units)?;
    Ok(Place { hash: known.hash, backend: known.backend, service: known.service })
}

/// A first part: placed by its ports, and remembered. It begins a packet even where one with this id is known:
/// 16 bits come round fast, and a client's sockets count each for itself.
#[inline(always)]
fn first<F: Frame, T: Tables + FragmentTable>(
    frame: &F,
    tables: &T,
    settings: &IngressSettings,
    network: &mut Network,
    part: Part,
    units: [u16; 2],
) -> Result<(Place, bool), Refusal> {
    parse_first(frame, network)?;
    martian::check_worker(tables, &network.headers, network.headers.port)?;
    let placed = place(tables, settings, &network.headers);
    let (place, is_new) = match placed {
        Ok(placed) => placed,
        Err(Refusal::Reason(Reason::NoService)) => {
            (Place { hash: 0, backend: NO_BACKEND, service: NO_SERVICE }, false)
        }
        Err(reason) => return Err(reason),
    };
    let units = units[0] as u32 | (units[1] as u32) << 16;
    let key = key_of(network, part);
    if !remember(tables, &key, place.hash, place.backend, (place.service as u64) << 32 | units as u64) {
        tables.count(Reason::FlowNotRecorded);
    }
    if place.service == NO_SERVICE { Err(Reason::NoService.into()) } else { Ok((place, is_new)) }
}

/// Remembers a packet whose first part covers these units (the low half of `what`; the other is its service). A function
/// of its own: the stack of its caller has no room for the entry.
#[inline(never)]
fn remember<T: Tables + FragmentTable>(
    tables: &T,
    key: &FragmentKey,
    hash: u64,
    backend: u32,
    what: u64,
) -> bool {
    let service = (what >> 32) as u32;
    let mut entry = Fragment {
        hash,
        backend,
        service,
        seen_s: tables.now_s(),
        flags: if service == NO_SERVICE { flags::HOST } else { 0 },
        count: 1,
        ..Fragment::default()
    };
    entry.parts[0] = [what as u16, (what >> 16) as u16];
    tables.record_fragment(key, &entry)
}

/// Where the packet goes by its ports.
#[inline(always)]
fn place<T: Tables>(
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
) -> Result<(Place, bool), Refusal> {
    let (service, _) = lookup_service(tables, headers)?;
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    if translates(settings) && view.flags & service_flags::NAT != 0 {
        return Err(Refusal::Stage(stage::NAT_FRAGMENT));
    }
    let hash = flow_hash(view.seed, headers);
    let choice = choose(tables, service, view, headers, hash)?;
    // The verifier walks the rest once, and not for each way to choose.
    let is_new = core::hint::black_box(choice.is_new);
    Ok((Place { hash, backend: choice.backend, service }, is_new))
}
