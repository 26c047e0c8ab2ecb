//! The stage for ICMP and ICMPv6: echo requests for a VIP are answered, errors
//! about its flows go to their backends.
//!
//! Reached by tail call from `ingress` with the frame as it came in; called natively by tests and fuzzers.

use crate::{
    Frame, Tables, Verdict,
    guard::{self, martian},
    icmp::{
        echo,
        error::{deliver, is_error},
    },
    packet::{
        fib::Fib,
        network::{ICMP, ICMPV6, Network},
        parse::{address, mapped},
        verdict::{Outcome, refuse},
        wire::{Echo, IcmpError, Ipv4, Ipv6},
    },
};
use lb_common::{
    Reason, VipKey,
    names::stage,
    passive::PassiveFailure,
    settings::{IngressSettings, features},
};

/// Decides the fate of an ICMP message and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    match receive(frame, tables, settings) {
        Ok(done) => done,
        // Counted by the program that takes it over.
        Err(Reason::NatError) => (Verdict::Stage(stage::NAT_ERROR), Outcome::Not(Reason::NatError)),
        Err(reason) => refuse(tables, reason),
    }
}

#[inline(always)]
fn receive<F: Frame + Fib, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> Result<(Verdict, Outcome), Reason> {
    let mut place = Network::default();
    let network = &*tables.parse_network(frame, settings, &mut place)?;
    let protocol = if network.headers.is_ipv6 { ICMPV6 } else { ICMP };
    if network.fragment.is_some() {
        return Err(Reason::Fragment);
    }
    if network.headers.protocol != protocol || network.l4_len < size_of::<Echo>() {
        return Err(Reason::Icmp);
    }
    let message: Echo = frame.packet().read(network.l4()).ok_or(Reason::Truncated)?;
    let about_flow = is_error(network, message.kind);
    // Neighbour discovery and whatever else is for this host is most of what comes here.
    if tables.vip(&VipKey { vip: network.headers.destination_address() }).is_none() {
        // An error from where nothing comes says nothing about a worker.
        if about_flow && martian::check(tables, &network.headers).is_ok() {
            note_unreachable(frame, tables, network, message);
        }
        let translates = settings.features & features::NAT != 0;
        return Err(if about_flow && translates { Reason::NatError } else { Reason::NotVip });
    }
    martian::check(tables, &network.headers)?;
    guard::check(tables, settings, network.headers.source)?;
    if settings.features & features::ICMP == 0 && !about_flow {
        return Err(Reason::Icmp);
    }
    let request = if network.headers.is_ipv6 { echo::REQUEST_V6 } else { echo::REQUEST_V4 };
    if message.kind == request && message.code == 0 {
        return Err(answer_echo(frame, tables, settings, network));
    }
    if about_flow {
        return deliver(frame, tables, settings, network);
    }
    Err(Reason::Icmp)
}

/// Counts an error that says that a packet of this host (encapsulated, translated, or its own) did not reach its
/// destination. Whoever that is: lbd knows its backends.
#[inline(always)]
fn note_unreachable<F: Frame, T: Tables>(frame: &F, tables: &T, network: &Network, message: Echo) {
    const UNREACHABLE: u8 = 3;
    const FRAGMENTATION_NEEDED: u8 = 4;
    const UNREACHABLE_V6: u8 = 1;
    const PARAMETER_PROBLEM_V6: u8 = 4;
    // What a worker answers that does not decapsulate.
    const UNKNOWN_NEXT_HEADER: u8 = 1;
    let (kind, code) = (message.kind, message.code);
    let (packet, at) = (frame.packet(), network.l4() + size_of::<IcmpError>());
    let (source, destination) = if network.headers.is_ipv6 {
        if kind != UNREACHABLE_V6 && (kind, code) != (PARAMETER_PROBLEM_V6, UNKNOWN_NEXT_HEADER) {
            return;
        }
        let Some(quoted) = packet.read::<Ipv6>(at) else { return };
        (quoted.source, quoted.destination)
    } else {
        if kind != UNREACHABLE || code == FRAGMENTATION_NEEDED {
            return;
        }
        let Some(quoted) = packet.read::<Ipv4>(at) else { return };
        (mapped(quoted.source), mapped(quoted.destination))
    };
    // Whoever caused an error is told of it: anything else is made up.
    if source == network.headers.destination {
        tables.count_failure(&address(destination), PassiveFailure::Unreachable);
    }
}

/// Answers an echo request, within the budget. Requests that cannot be turned round in place are the host's.
#[inline(always)]
fn answer_echo<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &Network,
) -> Reason {
    let header_len = if network.headers.is_ipv6 { 40 } else { 20 };
    if settings.icmp_per_s == 0 || network.l4() != network.headers.l2_len() + header_len {
        return Reason::Icmp;
    }
    if !network.headers.is_answerable() || !tables.take_icmp(settings.icmp_per_s, settings.icmp_burst) {
        return Reason::EchoDropped;
    }
    echo::answer(frame, network).map_or(Reason::EchoDropped, |()| Reason::EchoAnswered)
}
