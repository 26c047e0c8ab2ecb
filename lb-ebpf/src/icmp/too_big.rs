//! Tells a sender that its packet does not fit once encapsulated: fragmentation needed (RFC 792,
//! RFC 1191) or packet too big (RFC 4443), from the VIP, out of the interface it came in by.

use crate::{
    Frame, Tables, Verdict,
    icmp::answer::{self, Message},
    packet::{
        network::Network,
        parse::Headers,
        verdict::{Outcome, Refusal, refuse},
    },
};
use lb_common::{Reason, settings::IngressSettings};

/// Bytes of the packet that are quoted. A packet that is too big is longer; RFC 1812 asks for as much
/// as keeps the message within 576 bytes, RFC 4443 within 1,280; 512 is one call of the checksum helper.
pub const QUOTE: usize = 512;

/// Turns the frame into the answer to its sender.
#[inline(always)]
pub fn answer_too_big<F: Frame>(frame: &mut F, headers: &Headers, mtu: u32) -> Result<(), Reason> {
    // A later part of an IPv4 packet, which has no ports, is not answered (RFC 1122 3.2.2).
    if !headers.is_answerable() || (!headers.is_ipv6 && headers.port == 0) {
        return Err(Reason::TooBigDropped);
    }
    let message = Message { v4: [3, 4], v6: [2, 0], mtu: mtu as u16 };
    answer::error::<F, QUOTE, QUOTE>(frame, headers, message).ok_or(Reason::TooBigDropped)
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
    match answer_too_big(frame, headers, mtu) {
        Ok(()) => Reason::TooBigAnswered,
        Err(reason) => reason,
    }
}

/// A stage: parses the frame's network header, has `decide` work on it, and ends the packet's way as that says.
#[inline(always)]
pub fn run_stage<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    decide: impl FnOnce(&mut F, &mut Network) -> Result<(Verdict, Outcome), Refusal>,
) -> (Verdict, Outcome) {
    let mut place = Network::default();
    let network = match tables.parse_network(frame, settings, &mut place) {
        Ok(network) => network,
        Err(reason) => return refuse(tables, reason),
    };
    let result = decide(frame, network);
    conclude(frame, tables, settings, &network.headers, result)
}

/// Ends a packet's way: as decided, counted with a reason, answered as too big, or in the stage that takes it over.
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
