//! Fragments of translated packets, both ways.
//!
//! The first part has the ports and goes by its flow's binding, which it makes if it begins the flow; which flow that
//! is, is remembered in the map of fragmented packets, and by that the others find the binding. Parts of a client's
//! packet that come before the first never get here (`fragment_unknown`). An answer's cannot be told from
//! what is for this host itself, whose stack they are handed to (`nat_fragment`).
//!
//! Reached by tail call from `fragment`, and from `nat_bind` with the first part of a new flow.
//!
//! The first part carries the checksum of the whole packet, which is adjusted as for a whole packet.

use super::{NatScratch, NatTables, account, resolve, rewrite::rewrite_part, transmit};
use crate::{
    Frame, Verdict,
    icmp::too_big::run_stage,
    packet::{
        fib::Fib,
        network::{Network, Part},
        verdict::{Outcome, Refusal},
    },
    select::fragments::{FragmentTable, is_awaited, key_of, mark, parse_first, units},
};
use lb_common::{
    Reason,
    fragment::{Fragment, PARTS, flags},
    service::{TCP, UDP},
    settings::IngressSettings,
};

/// Decides a fragment's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: NatTables + FragmentTable>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    run_stage(frame, tables, settings, |frame, network| receive(frame, tables, settings, network))
}

#[inline(always)]
fn receive<F: Frame + Fib, T: NatTables + FragmentTable>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &mut Network,
) -> Result<(Verdict, Outcome), Refusal> {
    let part = network.fragment.ok_or(Reason::Fragment)?;
    let is_first = part.offset == 0;
    if is_first {
        // Another transport is none of ours; so is what is too short to say whose it is.
        if network.headers.protocol != TCP && network.headers.protocol != UDP {
            return Err(Reason::Fragment.into());
        }
        parse_first(frame, network).map_err(|_| Reason::Fragment)?;
    } else {
        follow(tables, network, part)?;
    }
    tables
        .scratch(|scratch| translate(frame, tables, settings, network, (part, is_first), scratch))
        .ok_or(Reason::BrokenTable)?
}

/// A later part: whose it is.
#[inline(always)]
fn follow<T: NatTables + FragmentTable>(
    tables: &T,
    network: &mut Network,
    part: Part,
) -> Result<(), Refusal> {
    let (now_s, units) = (tables.now_s(), units(network, part));
    let known = tables.with_fragment(&key_of(network, part), |known| {
        if known.flags & flags::NAT == 0 || !is_awaited(known, now_s) {
            return None;
        }
        Some(units.and_then(|units| mark(known, units)).map(|()| known.hash))
    });
    // Its flags and numbers are unknown, and say nothing here.
    let flow = known.flatten().ok_or(Reason::NatFragment)??;
    let headers = &mut network.headers;
    (headers.source_port, headers.port) = (flow as u16, (flow >> 16) as u16);
    headers.protocol = (flow >> 32) as u8;
    Ok(())
}

/// A flow's ports and protocol, for [`follow`].
#[inline(always)]
const fn packed(source_port: u16, port: u16, protocol: u8) -> u64 {
    source_port as u64 | (port as u64) << 16 | (protocol as u64) << 32
}

#[inline(always)]
fn translate<F: Frame + Fib, T: NatTables + FragmentTable>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &Network,
    (part, is_first): (Part, bool),
    scratch: &mut NatScratch,
) -> Result<(Verdict, Outcome), Refusal> {
    let headers = &network.headers;
    let outcome = match resolve(frame, tables, headers, scratch) {
        // The binding is gone: only a whole packet, or a first part, can make another.
        Err(Refusal::Stage(_)) if !is_first => return Err(Reason::FragmentUnknown.into()),
        led => led?,
    };
    if is_first {
        remember(tables, network, part, scratch, outcome)?;
    }
    rewrite_part(frame, network, &scratch.to, is_first)?;
    let verdict = transmit(frame, headers.l2_len(), headers.is_ipv6, &scratch.hop)?;
    account(tables, settings, headers, scratch, outcome);
    tables.count(Reason::FragmentForwarded);
    Ok((verdict, outcome))
}

/// Remembers a first part's flow for the others.
#[inline(always)]
fn remember<T: NatTables + FragmentTable>(
    tables: &T,
    network: &Network,
    part: Part,
    scratch: &mut NatScratch,
    outcome: Outcome,
) -> Result<(), Reason> {
    let headers = &network.headers;
    let (service, backend) = match outcome {
        Outcome::Forwarded { service, backend } => (service, backend),
        Outcome::Returned { service } => (service, 0),
        Outcome::Not(reason) => return Err(reason),
    };
    let mut parts = [[0; 2]; PARTS];
    parts[0] = units(network, part)?;
    scratch.parts = key_of(network, part);
    scratch.fragment = Fragment {
        hash: packed(headers.source_port, headers.port, headers.protocol),
        backend,
        service,
        seen_s: tables.now_s(),
        flags: flags::NAT,
        count: 1,
        pad: 0,
        parts,
    };
    if !tables.record_fragment(&scratch.parts, &scratch.fragment) {
        tables.count(Reason::FlowNotRecorded);
    }
    Ok(())
}
