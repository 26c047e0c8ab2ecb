//! Makes bindings: chooses the worker, takes an address and a port, writes both entries.
//!
//! Ports are tried in an order that the flow's own hash gives: the same client port gets the same one again, which a
//! worker whose stack still remembers the last connection knows how to handle. A port whose flow is over is taken,
//! so that new flows find room even while nobody sweeps.
//!
//! A packet gets a binding only if it can begin a flow (a SYN, a datagram) or has ACK set: the latter may belong to
//! an established flow whose binding is lost (maps that could not be taken over, an early drop). The first port tried
//! follows from the flow's hash, so such a flow most likely gets its former port and goes on; otherwise the worker's
//! reset tells the client. Resets, and segments that no established flow sends, are dropped (`nat_stray`). Each
//! processor puts its new bindings into a ring (`NAT_EMBRYONIC`). The binding that a newer one displaces is removed
//! unless its client has shown itself ([`lb_common::nat::is_assured`]), so a flood has a bounded number of bindings
//! and each handshake the time of one round. Where all of a worker's ports that are tried are taken, the oldest such
//! binding among them gives up its port. Where the tables have no room either, the least recently used UDP binding among
//! them goes even if it is assured, as in conntrack: two forged datagrams and an answer make an assured one. Above seven
//! eighths of the tables lbd removes UDP bindings in that order, so this is rare. A rate limit would not do: it cannot tell a rush from a flood, and refuses
//! clients as readily as forged packets.

use super::{NatScratch, NatTables, hop::by_fib};
use crate::{
    Frame, Tables, Verdict,
    forward::{known_hop, varied},
    guard::{limit::is_limited, martian},
    packet::{
        fib::Fib,
        network::Network,
        parse::{Headers, address, mapped, tcp, words},
        verdict::{Outcome, refuse},
    },
    select::{
        choose::{choose_once, flow_key},
        hash::{flow_hash, mix, slot_of},
        service::lookup_service,
    },
};
use lb_common::{
    Address, Backend, Be16, FlowKey, Nat, Reason, Reply, ReplyKey,
    backend::{flags, mode},
    is_mapped,
    names::stage,
    nat::{self, Embryonic},
    service::{TCP, UDP},
    settings::{IngressSettings, features},
};

/// Ports that are tried before a flow is refused. At nine tenths of all in use one flow in 29 finds none.
const TRIES: u32 = 32;

/// In [`NatScratch::yields_s`]: the binding is an assured one of UDP. Seconds since boot do not reach this bit.
const ASSURED_UDP: u32 = 1 << 31;

/// What came of writing an entry where there must be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is there.
    Done,
    /// Another one is there.
    Taken,
    /// There is no room.
    Full,
}

/// The entry of a chosen backend, if it is one that addresses can be translated for.
#[inline(always)]
pub fn worker<T: Tables>(tables: &T, index: u32, service: u32, is_ipv6: bool) -> Result<&Backend, Reason> {
    let backend = tables.backend(index).ok_or(Reason::BrokenTable)?;
    if backend.flags & flags::USED == 0 || backend.service != service {
        return Err(Reason::BrokenTable);
    }
    if backend.mode != mode::NAT {
        return Err(if backend.mode == mode::FORBIDDEN { Reason::Residency } else { Reason::BadMode });
    }
    if is_mapped(&backend.address) == is_ipv6 {
        return Err(Reason::BadFamily);
    }
    Ok(backend)
}

/// Binds the flow of a client's packet, and hands the packet back to the stage that goes by bindings.
#[inline(always)]
pub fn process<F: Frame + Fib, T: NatTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    match bind(frame, tables, settings) {
        Ok(next) => (Verdict::Stage(next), Outcome::Not(Reason::StageMissing)),
        Err(reason) => refuse(tables, reason),
    }
}

#[inline(always)]
fn bind<F: Frame + Fib, T: NatTables>(
    frame: &F,
    tables: &T,
    settings: &IngressSettings,
) -> Result<u32, Reason> {
    let chosen = tables.scratch(|scratch| choose_worker(frame, tables, settings, scratch));
    chosen.ok_or(Reason::BrokenTable)??;
    let entered = tables.scratch(|scratch| {
        enter(tables, settings.nat_first, settings.nat_last, scratch)?;
        Ok(if scratch.is_part != 0 { stage::NAT_FRAGMENT } else { stage::NAT })
    });
    entered.ok_or(Reason::BrokenTable)?
}

/// Chooses a worker, and writes down all that the binding needs but its port.
#[inline(always)]
fn choose_worker<F: Frame + Fib, T: NatTables>(
    frame: &F,
    tables: &T,
    settings: &IngressSettings,
    scratch: &mut NatScratch,
) -> Result<(), Reason> {
    let mut place = Network::default();
    let network = tables.parse_network(frame, settings, &mut place)?;
    scratch.is_part = network.fragment.is_some() as u32;
    super::parse_ports(frame, network)?;
    let headers = &network.headers;
    let (service, _) = lookup_service(tables, headers)?;
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    // A port that this packet takes may be one that the program before has given to its flow.
    if tables.is_taking_over() && !headers.is_syn() {
        return Err(Reason::TakenOver);
    }
    if headers.protocol == TCP && !may_be_bound(headers.tcp_flags) {
        return Err(Reason::NatStray);
    }
    if headers.protocol == TCP && !headers.is_syn() {
        tables.count(Reason::NatUnknown);
        // It takes a binding like any other; SYNs and datagrams are counted where their worker is chosen.
        if settings.features & features::RATE != 0
            && is_limited(view)
            && let Some(reason) = tables.limit(service, view, headers.source)
        {
            return Err(reason);
        }
    }
    let hash = flow_hash(view.seed, headers);
    let choice = choose_once(tables, service, view, headers, hash)?;
    let backend = worker(tables, choice.backend, service, headers.is_ipv6)?;
    let now_s = tables.now_s();
    scratch.key = flow_key(service, headers);
    scratch.from = super::last_hop(frame, headers).ok_or(Reason::Truncated)?;
    scratch.hash = hash;
    scratch.udp_timeout_s = view.udp_timeout_s;
    scratch.nat = Nat {
        source: known_hop(tables, choice.backend, backend)
            .map_or(backend.source, |(_, source)| address(source)),
        worker: backend.address,
        source_port: Be16::ZERO,
        port: if backend.port.get() == 0 { scratch.key.port } else { backend.port },
        backend: choice.backend,
        created_s: now_s,
        last_seen_s: now_s,
        flags: nat::flags::FRESH | if choice.is_new { nat::flags::NEW } else { 0 },
        hop: scratch.from,
    };
    scratch.source_bits = backend.source_bits as u32;
    if scratch.nat.source == [0; 16] {
        // The daemon does not know the way yet.
        scratch.nat.source = source_by_fib(frame, headers, backend)?;
    }
    if is_own_source(tables, headers, scratch) {
        return Err(Reason::OwnSource);
    }
    martian::check_worker(tables, headers, u16::from_ne_bytes(scratch.nat.port.to_bytes()))?;
    scratch.reply = Reply {
        flow: scratch.key,
        vip: headers.destination_address(),
        hop: scratch.from,
        last_seen_s: now_s,
        flags: 0,
    };
    scratch.reply_key = reply_key(&scratch.nat, headers.protocol);
    Ok(())
}

/// Whether a TCP packet with these flags, of a flow that has no binding, gets one: it begins a flow, or acknowledges
/// something and so may belong to one whose binding is lost. That one's port is most likely the same again, as its hash
/// is; else the worker's reset tells the client. A reset needs no answer, and no established flow sends the others.
#[inline(always)]
const fn may_be_bound(tcp_flags: u8) -> bool {
    let kind = tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST);
    kind == tcp::ACK || kind == tcp::SYN && tcp_flags & tcp::FIN == 0
}

/// Whether an address is one of those that a worker's packets get as source: `pool` but for its low `bits`.
#[inline(always)]
pub fn is_in_pool(source: [u32; 4], pool: Address, bits: u32) -> bool {
    address(varied(source, bits, u64::MAX)) == address(varied(words(pool), bits, u64::MAX))
}

/// Whether a packet comes from an address that this host gives to packets to workers: one of the pool, or one that some
/// worker is asked from. So what has been translated for another service, whose worker is a VIP of ours, goes no further.
#[inline(always)]
fn is_own_source<T: NatTables>(tables: &T, headers: &Headers, scratch: &mut NatScratch) -> bool {
    // The key lies in a map: the stack has no room for it.
    scratch.reply_key.source = headers.source_address();
    is_in_pool(headers.source, scratch.nat.source, scratch.source_bits)
        || tables.is_translated(&scratch.reply_key.source)
}

/// The address of this host that the kernel's routes give packets to a backend.
#[inline(always)]
fn source_by_fib<F: Frame + Fib>(frame: &F, headers: &Headers, backend: &Backend) -> Result<Address, Reason> {
    let unset = if headers.is_ipv6 { [0; 4] } else { mapped(0) };
    match by_fib(frame, headers, (unset, words(backend.address))) {
        // Kernels before 6.7 choose no source; answers to a VIP would reach any host, so the daemon has to say it.
        Ok(answer) if answer.source[3] == 0 && answer.source[0] == 0 => Err(Reason::NoRoute),
        Ok(answer) => Ok(address(answer.source)),
        // Whoever sends the packet on asks again, and tells the client.
        Err((Reason::TooBigAnswered, _)) => Err(Reason::TooBigDropped),
        Err((reason, _)) => Err(reason),
    }
}

/// Takes a port and writes both entries. A function of its own to the verifier, which then does not walk it
/// again for every way to get here.
#[inline(never)]
fn enter<T: NatTables>(tables: &T, first: u16, last: u16, scratch: &mut NatScratch) -> Result<(), Reason> {
    take_port(tables, first, last, scratch)?;
    match tables.add_nat(&scratch.key, &scratch.nat) {
        Added::Done => {
            let NatScratch { key, reply_key, .. } = scratch;
            if tables.reply(reply_key, |reply| reply.flow == *key) != Some(true) {
                // Another processor took the port before the client's entry was there: see `release`.
                tables.remove_nat(key);
                return Err(Reason::NatNoPort);
            }
            early_drop(tables, scratch);
            Ok(())
        }
        added => {
            tables.remove_reply(&scratch.reply_key);
            // Taken: another processor was faster with a packet of the same flow, and its binding is the flow's.
            if added == Added::Taken { Ok(()) } else { Err(Reason::NatNoRoom) }
        }
    }
}

/// Notes a new binding in the ring. The one that it pushes out of it has had its time: if its client has not shown
/// itself, it goes. So a flood of forged packets has this many bindings at most, and each one a handshake's time.
#[inline(always)]
fn early_drop<T: NatTables>(tables: &T, scratch: &mut NatScratch) {
    scratch.embryonic = Embryonic { key: scratch.reply_key, client: Embryonic::client(&scratch.key) };
    let turn = scratch.turn;
    scratch.turn = turn + 1;
    // Exchanged in place: the stack has no room for either.
    if tables.embryonic(turn, |place| core::mem::swap(place, &mut scratch.embryonic)).is_none() {
        // Beyond its end.
        scratch.turn = 1;
        if tables.embryonic(0, |place| core::mem::swap(place, &mut scratch.embryonic)).is_none() {
            return;
        }
    }
    if scratch.embryonic.key.protocol == 0 {
        return;
    }
    let is_early_dropped = tables
        .reply(&scratch.embryonic.key, |reply| {
            Embryonic::client(&reply.flow) == scratch.embryonic.client && !nat::is_assured(reply.flags)
        })
        .unwrap_or(false);
    if is_early_dropped && release(tables, &scratch.embryonic.key, &mut scratch.victim) {
        tables.count(Reason::NatGaveWay);
    }
}

/// Removes a binding, by its answers' key; true if it was this call that did. Only one processor can remove an entry,
/// so only one goes on to take its port. The reply entry is removed first: a processor that writes the client's entry
/// after that finds its reply entry gone, and removes what it wrote.
#[inline(always)]
fn release<T: NatTables>(tables: &T, key: &ReplyKey, victim: &mut FlowKey) -> bool {
    if tables.reply(key, |reply| *victim = reply.flow).is_none() || !tables.remove_reply(key) {
        return false;
    }
    let is_own = |nat: &mut Nat| nat.source == key.source && nat.source_port == key.source_port;
    if tables.nat(victim, is_own) == Some(true) {
        tables.remove_nat(victim);
    }
    true
}

/// Key of a binding's answers.
#[inline(always)]
pub fn reply_key(nat: &Nat, protocol: u8) -> ReplyKey {
    ReplyKey {
        worker: nat.worker,
        source: nat.source,
        port: nat.port,
        source_port: nat.source_port,
        protocol: protocol as u32,
    }
}

/// Takes a free address and port for answers, and puts them into the binding.
#[inline(always)]
fn take_port<T: NatTables>(
    tables: &T,
    first: u16,
    last: u16,
    scratch: &mut NatScratch,
) -> Result<(), Reason> {
    let count = (last as u32 + 1).saturating_sub(first as u32);
    let pool = scratch.nat.source;
    let mut full = false;
    scratch.yields_s = u32::MAX;
    for i in 0..TRIES {
        let h = mix(scratch.hash.wrapping_add(i as u64));
        // The port is made of the high half.
        scratch.reply_key.source = address(varied(words(pool), scratch.source_bits, h & 0xffff_ffff));
        scratch.reply_key.source_port = Be16::new(first.wrapping_add(slot_of(h, count) as u16));
        let mut added = tables.add_reply(&scratch.reply_key, &scratch.reply);
        if added == Added::Taken && reclaim(tables, scratch) {
            tables.count(Reason::NatReused);
            added = tables.add_reply(&scratch.reply_key, &scratch.reply);
        }
        match added {
            Added::Done => {
                scratch.nat.source = scratch.reply_key.source;
                scratch.nat.source_port = scratch.reply_key.source_port;
                return Ok(());
            }
            Added::Full => full = true,
            Added::Taken => {}
        }
    }
    let none = if full { Reason::NatNoRoom } else { Reason::NatNoPort };
    // Assured bindings are dropped early only where there is no room at all.
    if scratch.yields_s == u32::MAX || (!full && scratch.yields_s & ASSURED_UDP != 0) {
        return Err(none);
    }
    // The oldest of those that were met and that are not assured, else the least recently used of UDP.
    (scratch.reply_key.source, scratch.reply_key.source_port) = scratch.yields;
    if !release(tables, &scratch.reply_key, &mut scratch.victim) {
        return Err(none);
    }
    tables.count(Reason::NatGaveWay);
    if tables.add_reply(&scratch.reply_key, &scratch.reply) != Added::Done {
        return Err(none);
    }
    (scratch.nat.source, scratch.nat.source_port) = scratch.yields;
    Ok(())
}

/// Removes the binding that has this port if it has expired; true if it was this call that did. Otherwise it is
/// recorded as the one to drop early, if it comes before those that were met so far: unconfirmed bindings first, then
/// those of UDP, the longest idle first.
#[inline(always)]
fn reclaim<T: NatTables>(tables: &T, scratch: &mut NatScratch) -> bool {
    let NatScratch {
        reply_key: key,
        reply: Reply { last_seen_s: now_s, .. },
        udp_timeout_s,
        yields_s,
        yields,
        victim,
        ..
    } = scratch;
    let (key, now_s) = (&*key, *now_s);
    let found = tables.reply(key, |reply| {
        let is_own = |nat: &mut Nat| nat.source == key.source && nat.source_port == key.source_port;
        let client_s = tables.nat(&reply.flow, |nat| if is_own(nat) { nat.last_seen_s } else { 0 });
        let client_s = client_s.unwrap_or(0);
        let idle_s = if key.protocol == TCP as u32 {
            nat::tcp_idle_s(reply.flags)
        } else {
            tables.service(reply.flow.service).map_or(*udp_timeout_s, |view| view.udp_timeout_s)
        };
        if nat::is_expired(idle_s, client_s, reply.last_seen_s, now_s) {
            return true;
        }
        let rank = if !nat::is_assured(reply.flags) {
            reply.last_seen_s
        } else if key.protocol == UDP as u32 {
            ASSURED_UDP | client_s.max(reply.last_seen_s)
        } else {
            u32::MAX
        };
        // Without the client's entry, another processor is making this binding right now.
        if client_s != 0 && rank < *yields_s {
            *yields_s = rank;
            *yields = (key.source, key.source_port);
        }
        false
    });
    found == Some(true) && release(tables, key, victim)
}
