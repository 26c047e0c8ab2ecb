//! The stage for forwarding mode `nat`: full translation, for workers that run nothing of ours.
//!
//! A client's packet gets this host's address and a port of its own as source, and the worker's address and port as
//! destination; the worker's answer is found by just these and gets the VIP and the client back. So a worker needs
//! neither a VIP nor a route to clients, and both ways pass this host. A binding holds a flow to its worker,
//! whatever the tables say meanwhile.
//!
//! Four programs, each with a stack of its own: [`process`] for flows that are bound, both ways; [`process_new`] binds
//! a flow and goes back; [`process_error`] for ICMP errors; [`process_fragment`] for packets in parts. Reached by tail call from `ingress` with the frame as
//! it came in; called natively by tests and fuzzers.
//! Behaviour follows RFC 4787 (UDP), RFC 5382 (TCP) and RFC 5508 (ICMP).
//!
//! Anybody can forge a FIN or RST, and nothing here follows sequence numbers as conntrack does. So data from the same
//! side takes the mark back (after a true end there is none), and a client's RST alone shortens an established flow's
//! idle time to four minutes, not to seconds: a worker silently drops a RST that does not nearly fit (RFC 5961).
//! Answers leave by the last hop of the client's packets (MACs, tags, interface), because the client's router is
//! often not a neighbour that this host's kernel knows; a packet from another hop updates the entry. The interface's
//! MTU is checked (`bpf_check_mtu`), and the worker is told.

mod bind;
mod error;
mod fragment;
mod hop;
mod rewrite;

pub use bind::{Added, is_in_pool, process as process_new, reply_key, worker};
pub use error::process as process_error;
pub use fragment::process as process_fragment;

use crate::{
    Frame, Tables, Verdict,
    forward::known_hop,
    icmp::too_big::run_stage,
    packet::{
        fib::Fib,
        network::Network,
        parse::{Headers, parse_transport, tcp, words},
        verdict::{Outcome, Refusal},
    },
    select::{choose::flow_key, service::lookup_service},
};
use hop::{NO_HOP, as_last_hop, hop_by_fib, last_hop, raw, transmit};
use lb_common::{
    Address, Be16, FlowKey, LastHop, Nat, Reason, Reply, ReplyKey, ServiceView,
    backend::flags::{DOWN, DRAINING},
    fragment::{Fragment, FragmentKey, PARTS},
    names::stage,
    nat::{self, Embryonic, flags},
    passive::PassiveFailure,
    service::{self, TCP, UDP},
    settings::{IngressSettings, features},
};
use rewrite::{Rewrite, rewrite};

/// The maps of bindings.
pub trait NatTables: Tables {
    /// Calls `f` on a client's entry, in place.
    fn nat<R>(&self, key: &FlowKey, f: impl FnOnce(&mut Nat) -> R) -> Option<R>;
    /// Calls `f` on a worker's entry, in place.
    fn reply<R>(&self, key: &ReplyKey, f: impl FnOnce(&mut Reply) -> R) -> Option<R>;
    /// Writes a client's entry where there is none.
    fn add_nat(&self, key: &FlowKey, nat: &Nat) -> Added;
    /// Writes a worker's entry where there is none.
    fn add_reply(&self, key: &ReplyKey, reply: &Reply) -> Added;
    /// Removes a client's entry; false if there was none.
    fn remove_nat(&self, key: &FlowKey) -> bool;
    /// Removes a worker's entry; false if there was none.
    fn remove_reply(&self, key: &ReplyKey) -> bool;
    /// Whether this is an address, of no pool, that packets to some worker get as source.
    fn is_translated(&self, source: &Address) -> bool;
    /// Calls `f` on a place of this processor's ring of new bindings, whose size is the map's.
    fn embryonic<R>(&self, place: u32, f: impl FnOnce(&mut Embryonic) -> R) -> Option<R>;
    /// One's complement sum (not folded) of `len` bytes of the frame from `offset` on.
    fn sum<F: Frame>(&self, frame: &F, offset: usize, len: usize) -> Option<u32>;
    /// Calls `f` with room for what is gathered about the packet in hand.
    fn scratch<R>(&self, f: impl FnOnce(&mut NatScratch) -> R) -> Option<R>;
}

/// Packets up to this length fit every interface (RFC 791 has every host take 576): longer ones are compared with
/// the interface's MTU.
const ALWAYS_FITS: u32 = 576;

/// Whether a packet that is for no service, and for this port (network order), may be an answer to a translated one.
#[inline(always)]
pub fn is_reply(settings: &IngressSettings, port: u16) -> bool {
    let port = u16::from_be(port);
    settings.features & features::NAT != 0 && settings.nat_first <= port && port <= settings.nat_last
}

/// Decides a packet's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    run_stage(frame, tables, settings, |frame, network| receive(frame, tables, settings, network))
}

/// The ports of a TCP or UDP packet, or of its first part.
#[inline(always)]
fn parse_ports<F: Frame>(frame: &F, network: &mut Network) -> Result<(), Reason> {
    let len = match network.fragment {
        None => network.l4_len,
        // The lengths in it are those of the whole; whether all of its header is there has been looked at.
        Some(part) if part.offset == 0 => 0xffff,
        Some(_) => return Err(Reason::Fragment),
    };
    match network.headers.protocol {
        TCP | UDP => parse_transport(&frame.packet(), network.l4(), len, &mut network.headers),
        _ => Err(Reason::OtherProtocol),
    }
}

/// What is gathered about a packet on its scratch. It lies in a map of the program's own: the stack has no room for it.
#[derive(Clone, Copy, Debug)]
pub struct NatScratch {
    /// Key of a client's flow.
    key: FlowKey,
    /// Where a client's packet came from.
    from: LastHop,
    /// Its flow's binding.
    nat: Nat,
    /// What the packet becomes.
    to: Rewrite,
    /// Where it leaves.
    hop: LastHop,
    /// Largest packet that does, 0 if not known.
    mtu: u32,
    /// Of a new flow: its hash.
    hash: u64,
    /// Bits of the source that may vary.
    source_bits: u32,
    /// Idle time of UDP flows.
    udp_timeout_s: u32,
    /// Key of its answers.
    reply_key: ReplyKey,
    /// What becomes of them.
    reply: Reply,
    /// Flow of a binding that is removed for this one.
    victim: FlowKey,
    /// Rank of the first binding met that may be dropped early: the second of its last packet, behind all unconfirmed ones
    /// if it is an assured one of UDP. All ones: none.
    yields_s: u32,
    /// Its address and port.
    yields: (Address, Be16),
    /// Place in the ring of this processor's next binding.
    turn: u32,
    /// The newest, and then the one that it pushes out.
    embryonic: Embryonic,
    /// Whether the packet is a first part.
    is_part: u32,
    /// Of a first part: which packet's.
    parts: FragmentKey,
    /// And what is remembered for the others.
    fragment: Fragment,
}

impl NatScratch {
    /// Nothing gathered yet.
    pub const EMPTY: Self = Self {
        key: NO_FLOW,
        from: NO_HOP,
        nat: Nat {
            source: [0; 16],
            worker: [0; 16],
            source_port: Be16::ZERO,
            port: Be16::ZERO,
            backend: 0,
            created_s: 0,
            last_seen_s: 0,
            flags: 0,
            hop: NO_HOP,
        },
        to: Rewrite { source: [0; 4], destination: [0; 4], source_port: 0, port: 0 },
        hop: NO_HOP,
        mtu: 0,
        hash: 0,
        source_bits: 0,
        udp_timeout_s: 0,
        reply_key: ReplyKey {
            worker: [0; 16],
            source: [0; 16],
            port: Be16::ZERO,
            source_port: Be16::ZERO,
            protocol: 0,
        },
        reply: Reply { flow: NO_FLOW, vip: [0; 16], hop: NO_HOP, last_seen_s: 0, flags: 0 },
        victim: NO_FLOW,
        yields_s: u32::MAX,
        yields: ([0; 16], Be16::ZERO),
        turn: 0,
        embryonic: Embryonic::EMPTY,
        is_part: 0,
        parts: FragmentKey { source: [0; 16], destination: [0; 16], id: 0, protocol: 0 },
        fragment: Fragment {
            hash: 0,
            backend: 0,
            service: 0,
            seen_s: 0,
            flags: 0,
            count: 0,
            pad: 0,
            parts: [[0; 2]; PARTS],
        },
    };
}

const NO_FLOW: FlowKey = FlowKey { source: [0; 16], source_port: Be16::ZERO, port: Be16::ZERO, service: 0 };

#[inline(always)]
fn receive<F: Frame + Fib, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &mut Network,
) -> Result<(Verdict, Outcome), Refusal> {
    if network.fragment.is_some() {
        return Err(Reason::Fragment.into());
    }
    parse_ports(frame, network)?;
    tables
        .scratch(|scratch| translate(frame, tables, settings, network, scratch))
        .ok_or(Reason::BrokenTable)?
}

/// Either way: who the packet becomes, then the same for both.
#[inline(always)]
fn translate<F: Frame + Fib, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &Network,
    scratch: &mut NatScratch,
) -> Result<(Verdict, Outcome), Refusal> {
    let headers = &network.headers;
    let outcome = resolve(frame, tables, headers, scratch)?;
    rewrite(frame, tables, network, &scratch.to)?;
    let verdict = transmit(frame, headers.l2_len(), headers.is_ipv6, &scratch.hop)?;
    account(tables, settings, headers, scratch, outcome);
    Ok((verdict, outcome))
}

/// Who a packet becomes and where it leaves, if it fits there.
#[inline(always)]
fn resolve<F: Frame + Fib, T: NatTables>(
    frame: &F,
    tables: &T,
    headers: &Headers,
    scratch: &mut NatScratch,
) -> Result<Outcome, Refusal> {
    let outcome = match lookup_service(tables, headers) {
        Ok((service, _)) => from_client(frame, tables, headers, service, scratch)?,
        // If it is no answer it is what it seemed to be.
        Err(reason) => match from_worker(frame, tables, headers, scratch)? {
            Some(outcome) => outcome,
            None if tables.is_taking_over() => return Err(Reason::TakenOver.into()),
            None => return Err(reason.into()),
        },
    };
    if scratch.mtu != 0 && headers.ip_len > scratch.mtu {
        return Err(Refusal::TooBig(scratch.mtu));
    }
    Ok(outcome)
}

/// Counts a translated packet.
#[inline(always)]
fn account<T: NatTables>(
    tables: &T,
    settings: &IngressSettings,
    headers: &Headers,
    scratch: &NatScratch,
    outcome: Outcome,
) {
    match outcome {
        Outcome::Forwarded { backend, .. } if settings.stats != 0 => {
            tables.account(backend, headers.ip_len, scratch.nat.flags & flags::NEW != 0);
        }
        Outcome::Returned { .. } => tables.count(Reason::NatReply),
        _ => {}
    }
}

/// A client's packet: to its worker.
#[inline(always)]
fn from_client<F: Frame + Fib, T: NatTables>(
    frame: &F,
    tables: &T,
    headers: &Headers,
    service: u32,
    scratch: &mut NatScratch,
) -> Result<Outcome, Refusal> {
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    if view.flags & service::flags::NAT == 0 {
        return Err(Reason::BadMode.into());
    }
    scratch.from = last_hop(frame, headers).ok_or(Reason::Truncated)?;
    scratch.key = flow_key(service, headers);
    let now_s = tables.now_s();
    if !is_known(tables, view, headers, scratch, now_s) {
        return Err(Refusal::Stage(stage::NAT_BIND));
    }
    if !update_from_client(tables, headers, scratch, now_s) {
        // Another processor has given the port to another flow.
        tables.remove_nat(&scratch.key);
        return Err(Refusal::Stage(stage::NAT_BIND));
    }
    let nat = &scratch.nat;
    scratch.to = Rewrite {
        source: words(nat.source),
        destination: words(nat.worker),
        source_port: raw(nat.source_port),
        port: raw(nat.port),
    };
    let backend = worker(tables, nat.backend, service, headers.is_ipv6)?;
    let hop = match known_hop(tables, nat.backend, backend) {
        Some((hop, _)) => hop,
        None => {
            tables.count(Reason::FibLookup);
            hop_by_fib(frame, headers, &scratch.to)?
        }
    };
    scratch.mtu = hop.mtu;
    scratch.hop = as_last_hop(&hop);
    Ok(Outcome::Forwarded { service, backend: nat.backend })
}

/// Finds the flow's binding, if this packet goes by it. One that does not hold any more is removed.
#[inline(always)]
fn is_known<T: NatTables>(
    tables: &T,
    view: &ServiceView,
    headers: &Headers,
    scratch: &mut NatScratch,
    now_s: u32,
) -> bool {
    if tables.nat(&scratch.key, |nat| scratch.nat = *nat).is_none() {
        return false;
    }
    // Nothing is asked of one that has just been made: it would be made again.
    if scratch.nat.flags & flags::FRESH != 0 {
        return true;
    }
    let state = worker(tables, scratch.nat.backend, scratch.key.service, headers.is_ipv6).map(|b| b.flags);
    let moves = headers.protocol == UDP || view.flags & service::flags::RESET_ON_DOWN != 0;
    let holds = match state {
        Err(_) => false,
        // As for flows in the other modes: UDP moves from a dead worker, TCP where the service says so.
        Ok(state) if state & DOWN != 0 && moves => false,
        Ok(_) if headers.protocol == UDP => !is_idle(tables, view, &scratch.nat, now_s),
        Ok(state) if headers.is_syn() => !starts_anew(tables, &scratch.nat, state, now_s),
        Ok(_) => true,
    };
    if !holds {
        tables.remove_reply(&reply_key(&scratch.nat, headers.protocol));
        tables.remove_nat(&scratch.key);
    }
    holds
}

/// Whether a SYN begins a new flow where there was one before. A SYN on a live flow follows it; one on a flow that is
/// over, or whose worker is down, has its place chosen anew, and gets the same port if that is the same worker.
#[inline(always)]
fn starts_anew<T: NatTables>(tables: &T, binding: &Nat, backend_flags: u32, now_s: u32) -> bool {
    let reply = tables.reply(&reply_key(binding, TCP), |reply| (reply.flags, reply.last_seen_s));
    let Some((state, worker_s)) = reply else { return true };
    nat::is_over(state)
        || nat::is_expired(nat::tcp_idle_s(state), binding.last_seen_s, worker_s, now_s)
        || backend_flags & DOWN != 0
        || (state & flags::ANSWERED == 0 && backend_flags & DRAINING != 0)
}

#[inline(always)]
fn is_idle<T: NatTables>(tables: &T, view: &ServiceView, binding: &Nat, now_s: u32) -> bool {
    let worker_s = tables.reply(&reply_key(binding, UDP), |reply| reply.last_seen_s);
    match worker_s {
        None => true,
        Some(worker_s) => nat::is_expired(view.udp_timeout_s, binding.last_seen_s, worker_s, now_s),
    }
}

/// Updates a flow's entries by a client's packet. False if the worker's entry is missing or is another flow's.
#[inline(always)]
fn update_from_client<T: NatTables>(tables: &T, headers: &Headers, scratch: &NatScratch, now_s: u32) -> bool {
    const ENDED: u32 = flags::CLIENT_FIN | flags::CLIENT_RST;
    /// No state has all bits.
    const NOT_OURS: u32 = u32::MAX;
    let (mut new, from) = (scratch.nat.flags & !(flags::FRESH | flags::NEW), &scratch.from);
    let unsettled = new & flags::ESTABLISHED == 0;
    let moved = scratch.nat.hop != *from;
    // Who sends data has not ended the flow: somebody else has said so.
    let goes_on = new & ENDED != 0 && headers.data_len != 0 && !headers.is_closing();
    if unsettled || moved || goes_on || headers.is_closing() {
        let bits = headers.tcp_flags;
        let acknowledges = headers.protocol == UDP || bits & (tcp::ACK | tcp::SYN | tcp::RST) == tcp::ACK;
        let state = tables.reply(&reply_key(&scratch.nat, headers.protocol), |reply| {
            if reply.flow != scratch.key {
                return NOT_OURS;
            }
            reply.hop = *from;
            let mut state = if goes_on { reply.flags & !ENDED } else { reply.flags };
            if bits & tcp::FIN != 0 {
                state |= flags::CLIENT_FIN;
            }
            if bits & tcp::RST != 0 {
                state |= flags::CLIENT_RST;
            } else if acknowledges && state & flags::ANSWERED != 0 {
                state |= flags::ESTABLISHED;
            }
            reply.flags = state;
            state
        });
        let state = state.unwrap_or(NOT_OURS);
        if state == NOT_OURS {
            return false;
        }
        new = state & (flags::ESTABLISHED | ENDED);
    }
    if moved || new != scratch.nat.flags || scratch.nat.last_seen_s != now_s {
        tables.nat(&scratch.key, |nat| {
            nat.last_seen_s = now_s;
            nat.flags = new;
            nat.hop = *from;
        });
    }
    true
}

/// A worker's packet: back to the client, if it belongs to a flow.
#[inline(always)]
fn from_worker<F: Frame + Fib, T: NatTables>(
    frame: &F,
    tables: &T,
    headers: &Headers,
    scratch: &mut NatScratch,
) -> Result<Option<Outcome>, Refusal> {
    let key = ReplyKey {
        worker: headers.source_address(),
        source: headers.destination_address(),
        port: Be16::from_bytes(headers.source_port.to_ne_bytes()),
        source_port: Be16::from_bytes(headers.port.to_ne_bytes()),
        protocol: headers.protocol as u32,
    };
    let now_s = tables.now_s();
    let bits = headers.tcp_flags;
    let mut is_refused = false;
    let service = tables.reply(&key, |reply| {
        // Only what has no acknowledgement, a SYN, is answered so (RFC 9293 3.5.2).
        is_refused =
            bits & (tcp::RST | tcp::ACK) == tcp::RST | tcp::ACK && reply.flags & flags::ANSWERED == 0;
        update_from_worker(reply, headers, now_s);
        scratch.hop = reply.hop;
        scratch.to = Rewrite {
            source: words(reply.vip),
            destination: words(reply.flow.source),
            source_port: raw(reply.flow.port),
            port: raw(reply.flow.source_port),
        };
        reply.flow.service
    });
    // Otherwise the host's own, or of a flow that is over: its stack knows.
    let Some(service) = service else { return Ok(None) };
    if is_refused {
        tables.count_failure(&key.worker, PassiveFailure::Refused);
    }
    scratch.mtu = 0;
    if headers.ip_len > ALWAYS_FITS
        && let Some(mtu) = frame.narrower(scratch.hop.ifindex, headers.ip_len)
    {
        scratch.mtu = mtu;
    }
    Ok(Some(Outcome::Returned { service }))
}

/// Notes a worker's packet.
#[inline(always)]
fn update_from_worker(reply: &mut Reply, headers: &Headers, now_s: u32) {
    let bits = headers.tcp_flags;
    let mut state = reply.flags | flags::ANSWERED;
    if headers.data_len != 0 && !headers.is_closing() {
        state &= !(flags::WORKER_FIN | flags::WORKER_RST);
    }
    if bits & tcp::FIN != 0 {
        state |= flags::WORKER_FIN;
    }
    if bits & tcp::RST != 0 {
        state |= flags::WORKER_RST;
    } else {
        // Who answers has not taken the client's reset for one.
        state &= !flags::CLIENT_RST;
    }
    if reply.flags != state {
        reply.flags = state;
    }
    if reply.last_seen_s != now_s {
        reply.last_seen_s = now_s;
    }
}
