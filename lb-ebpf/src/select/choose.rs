//! Chooses a packet's backend: slot pairs and just-enough tracking.
//!
//! A slot answers by itself unless its flows may be exceptions (it is `TRACKED`: its primary
//! changed within the drain time, or flows of such a time are still in the flow table). For those:
//!
//! - a SYN takes the primary; in a transition that is noted in `SYN_CACHE`, because a stateless
//!   lookup of a later packet would answer with the previous primary;
//! - the packet that completes the handshake moves the note to `FLOWS`. So a flood of SYNs can push
//!   out nothing but SYNs;
//! - an established flow that is in no table was there before the transition began: it belongs to the
//!   secondary (the previous primary), and this is written down so that a second change keeps it.
//!
//! Services whose scheduler places flows on other backends than the primary (`scheduler`) have all their SYNs cached, so
//! that a repeated one goes where the first went; what the handshake's last packet finds on the primary needs no entry. A
//! new seed, size or hash leaves the view with the old table: then all slots are in transition, and the previous primary
//! is found there.
//!
//! While a table has no room, or a service's flows come faster than is written for it, a new flow is placed where a
//! stateless lookup finds it and nothing is written: so floods push out no live flow, and new ones still come through.
//!
//! UDP has no SYN, so its flows are remembered from the first packet unless the service is stateless.
//! Input: [`Tables`], a service's live view, [`Headers`] and the flow's hash. Output: [`Choice`].

pub use super::choice::{Choice, Why};
use super::flow_entries::{NO_FLOW, cache_syn, count_if_full, is_foreign, is_some, known, record_flow};
use crate::{
    FlowTable, Tables,
    guard::limit::is_limited,
    packet::parse::Headers,
    select::{
        hash::slot_of,
        scheduler::{SlotRef, is_at_home, is_in_transition, previous, slot_hash},
    },
};
use lb_common::{
    Backend, Be16, Flow, FlowKey, Reason, ServiceView, Slot, backend,
    flow::{self, SYN_TIMEOUT_S},
    service::{UDP, flags, scheduler},
    settings::features,
    slot::NO_BACKEND,
    syn_cache::{continues, upper_half},
};

/// Seconds within which a worker has made the connected socket of a new UDP flow.
pub const UDP_YOUNG_S: u32 = 3;

/// Beside the features of a program: flows that were said to end are kept while they go on. Whole packets do that; the
/// stages have no stack left for it.
pub const KEEP: u32 = 1 << 31;

/// Chooses the backend of a packet.
#[inline(always)]
pub fn choose<T: Tables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
) -> Result<Choice, Reason> {
    choose_with(tables, features::ALL, service, view, headers, hash)
}

/// The same in a program with these features.
#[inline(always)]
pub fn choose_with<T: Tables>(
    tables: &T,
    features: u32,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
) -> Result<Choice, Reason> {
    find(tables, features, service, view, headers, hash).map_err(|reason| explain(view, reason))
}

/// Why there is no backend, and whether the sender is told.
#[inline(always)]
fn explain(view: &ServiceView, reason: Reason) -> Reason {
    match reason {
        Reason::NoBackend if view.flags & flags::REJECT != 0 => Reason::NoBackendAnswered,
        Reason::NoBackend if view.flags & flags::REFUSED_BY_RESIDENCY != 0 => Reason::Residency,
        other => other,
    }
}

/// The same for a flow that something else will hold to its backend from now on: no table is asked, and none written.
#[inline(always)]
pub fn choose_once<T: Tables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
) -> Result<Choice, Reason> {
    once(tables, service, view, headers, hash).map_err(|reason| explain(view, reason))
}

#[inline(always)]
fn once<T: Tables>(
    tables: &T,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
) -> Result<Choice, Reason> {
    if view.slot_count == 0 {
        return Err(Reason::NoBackend);
    }
    let is_new = headers.protocol == UDP || headers.is_syn();
    if is_new
        && is_limited(view)
        && let Some(reason) = tables.limit(service, view, headers.source)
    {
        return Err(reason);
    }
    let number = slot_of(slot_hash(view, headers, hash), view.slot_count);
    let at = view.slot_base.wrapping_add(number);
    let broken = Reason::BrokenTable;
    let slot =
        Slot { primary: tables.primary(at).ok_or(broken)?, secondary: tables.secondary(at).ok_or(broken)? };
    if is_new && view.scheduler != scheduler::MAGLEV {
        let (backend, why) = tables.schedule(service, view, SlotRef { slot, number }, tables.now_s())?;
        return Ok(Choice { backend, is_new, why });
    }
    if !is_new {
        // It was there before: where it would have been before the transition.
        let backend = previous(tables, view, headers, slot);
        if backend != NO_BACKEND && keeps(backend_flags(tables, backend, service), view) {
            return Ok(Choice { backend, is_new, why: Why::Previous });
        }
    }
    primary(slot, is_new, if is_new { Why::NewFlow } else { Why::NotTracked })
}

#[inline(always)]
fn find<T: Tables>(
    tables: &T,
    features: u32,
    service: u32,
    view: &ServiceView,
    headers: &Headers,
    hash: u64,
) -> Result<Choice, Reason> {
    if view.slot_count == 0 {
        return Err(Reason::NoBackend);
    }
    if features & features::RATE != 0
        && headers.is_syn()
        && is_limited(view)
        && let Some(reason) = tables.limit(service, view, headers.source)
    {
        return Err(reason);
    }
    let by_load = features & features::P2C != 0;
    let hash = if by_load { slot_hash(view, headers, hash) } else { hash };
    let number = slot_of(hash, view.slot_count);
    let at = view.slot_base.wrapping_add(number);
    // The secondary is read only where it can matter.
    let slot = Slot { primary: tables.primary(at).ok_or(Reason::BrokenTable)?, ..Slot::EMPTY };
    let is_udp = headers.protocol == UDP;
    if is_udp && view.flags & flags::UDP_STATELESS != 0 {
        return primary(slot, false, Why::Primary);
    }
    if !is_udp && !slot.is_tracked() && view.flags & flags::TRACK_ALL == 0 {
        return primary(slot, headers.is_syn(), Why::Primary);
    }
    let is_maglev = !by_load || view.scheduler == scheduler::MAGLEV;
    let slot = if is_udp && is_maglev {
        slot
    } else {
        Slot { secondary: tables.secondary(at).ok_or(Reason::BrokenTable)?, ..slot }
    };
    let flow = FlowPacket { service, view, headers, place: SlotRef { slot, number }, is_maglev };
    let key = flow_key(service, headers);
    if is_udp {
        return choose_udp(tables, features, &flow, &key);
    }
    if headers.is_syn() {
        choose_syn(tables, &flow, &key)
    } else {
        choose_established(tables, features, &flow, &key)
    }
}

/// A packet and what was found out about it so far.
struct FlowPacket<'a> {
    service: u32,
    view: &'a ServiceView,
    headers: &'a Headers,
    place: SlotRef,
    /// Whether new flows take the primary.
    is_maglev: bool,
}

impl FlowPacket<'_> {
    /// Places a new flow.
    #[inline(always)]
    fn schedule<T: Tables>(&self, tables: &T, now_s: u32) -> Result<Choice, Reason> {
        if self.is_maglev {
            return primary(self.place.slot, true, Why::NewFlow);
        }
        let (backend, why) = tables.schedule(self.service, self.view, self.place, now_s)?;
        Ok(Choice { backend, is_new: true, why })
    }

    /// Whether a flow on this backend is found there without any table.
    #[inline(always)]
    fn is_at_home(&self, backend: u32) -> bool {
        is_at_home(self.view, self.place.slot, backend)
    }
}

/// The slot's primary.
#[inline(always)]
fn primary(slot: Slot, is_new: bool, why: Why) -> Result<Choice, Reason> {
    match slot.primary_index() {
        NO_BACKEND => Err(Reason::NoBackend),
        backend => Ok(Choice { backend, is_new, why }),
    }
}

/// Key of a packet's flow.
#[inline(always)]
pub fn flow_key(service: u32, headers: &Headers) -> FlowKey {
    FlowKey {
        source: headers.source_address(),
        source_port: Be16::from_bytes(headers.source_port.to_ne_bytes()),
        port: Be16::from_bytes(headers.port.to_ne_bytes()),
        service,
    }
}

/// Flags of the backend with this index if it belongs to `service`, else none.
#[inline(always)]
fn backend_flags<T: Tables>(tables: &T, index: u32, service: u32) -> Option<u32> {
    let entry = tables.backend(index)?;
    if entry.flags & backend::flags::USED == 0 || entry.service != service { None } else { Some(entry.flags) }
}

/// A SYN of a slot that may have exceptions.
#[inline(always)]
fn choose_syn<T: Tables>(tables: &T, packet: &FlowPacket<'_>, key: &FlowKey) -> Result<Choice, Reason> {
    let (headers, now_s) = (packet.headers, tables.now_s());
    let syn_hash = tables.syn_hash(headers, key.service);
    let known = known(tables, key, syn_hash);
    // A SYN on a live flow follows it: the worker's stack knows what it means, and nobody can move
    // a flow by forging one.
    if is_some(known)
        && known.flags & flow::flags::CLOSING == 0
        && is_up(backend_flags(tables, known.backend, key.service))
    {
        if is_foreign(known, headers, now_s) {
            // The client may have begun anew without a FIN: what follows this SYN does not follow the entry.
            if tables.admits(key.service, FlowTable::Syns, now_s) {
                cache_syn(tables, headers, (key, syn_hash), known.backend);
            } else {
                tables.count(Reason::FlowFlood);
            }
        }
        return Ok(Choice { backend: known.backend, is_new: false, why: Why::Tracked });
    }
    let recent = tables.cached_syn(key, syn_hash);
    let is_cached = recent.is_some() && recent.age_s <= SYN_TIMEOUT_S;
    if is_cached && is_up(backend_flags(tables, recent.backend, key.service)) {
        if recent.sequence != upper_half(headers.sequence) {
            // Another attempt from the same port; where the first went is as good.
            cache_syn(tables, headers, (key, syn_hash), recent.backend);
        }
        return Ok(Choice { backend: recent.backend, is_new: false, why: Why::RecentSyn });
    }
    // The packet that completes this handshake would otherwise follow what is known of an earlier flow, be it by the
    // program of the other ABI version.
    let must_cache = is_some(known)
        || is_cached
        || !packet.is_maglev
        || is_in_transition(packet.view, packet.place.slot)
        || tables.is_taking_over();
    if must_cache && !tables.admits(key.service, FlowTable::Syns, now_s) {
        tables.count(Reason::FlowFlood);
        return uncached(tables, packet, known);
    }
    let choice = packet.schedule(tables, now_s)?;
    if must_cache
        && cache_syn(tables, headers, (key, syn_hash), choice.backend)
        && is_some(known)
        && known.flags & flow::flags::CLOSING == 0
    {
        // Its backend is gone, but may be back before this handshake is complete.
        tables.touch(FlowTable::Flows, key, now_s, known.flags | flow::flags::CLOSING);
    }
    Ok(choice)
}

/// Where a flow's later packets will be sent if nothing is written of its SYN: there the SYN must go, too.
#[inline(always)]
fn uncached<T: Tables>(tables: &T, packet: &FlowPacket<'_>, known: Flow) -> Result<Choice, Reason> {
    let (view, slot) = (packet.view, packet.place.slot);
    let stays = |backend| keeps(backend_flags(tables, backend, packet.service), view);
    let mut backend = previous(tables, view, packet.headers, slot);
    if is_some(known) && stays(known.backend) {
        backend = known.backend;
    } else if backend == NO_BACKEND || !stays(backend) {
        backend = slot.primary_index();
    }
    if backend == NO_BACKEND {
        return Err(Reason::NoBackend);
    }
    Ok(Choice { backend, is_new: true, why: Why::NewFlow })
}

/// Whether a flow was seen at most `limit_s` ago. Another processor, whose coarse clock has ticked
/// already, may have seen it in our future: that is not long ago.
#[inline(always)]
const fn is_within(limit_s: u32, flow: Flow, now_s: u32) -> bool {
    now_s.saturating_sub(flow.last_seen_s) <= limit_s
}

#[inline(always)]
fn is_up(backend_flags: Option<u32>) -> bool {
    matches!(backend_flags, Some(flags) if flags & backend::flags::DOWN == 0)
}

/// Whether an established flow stays on a backend with these flags.
#[inline(always)]
fn keeps(backend_flags: Option<u32>, view: &ServiceView) -> bool {
    match backend_flags {
        None => false,
        Some(f) => f & backend::flags::DOWN == 0 || view.flags & flags::RESET_ON_DOWN == 0,
    }
}

/// Any other TCP packet of a slot that may have exceptions.
#[inline(always)]
fn choose_established<T: Tables>(
    tables: &T,
    features: u32,
    packet: &FlowPacket<'_>,
    key: &FlowKey,
) -> Result<Choice, Reason> {
    let FlowPacket { view, headers, place: SlotRef { slot, .. }, .. } = *packet;
    let now_s = tables.now_s();
    let end = if headers.is_closing() { flow::flags::CLOSING } else { 0 };
    let found = |backend, why| Ok(Choice { backend, is_new: false, why });
    let syn_hash = tables.syn_hash(headers, key.service);
    let known = known(tables, key, syn_hash);
    let state = Flow::follow(known.flags, known.created_s, headers.sequence, now_s);
    let is_foreign = state & flow::flags::FOREIGN != 0;
    let (mut stays, mut is_live) = (false, false);
    if is_some(known) {
        let backend = backend_flags(tables, known.backend, key.service);
        stays = keeps(backend, view);
        is_live = is_up(backend) && known.flags & flow::flags::CLOSING == 0;
        if is_foreign {
            if known.flags & flow::flags::DISPUTED == 0 {
                let flags = known.flags | flow::flags::DISPUTED;
                tables.touch(FlowTable::Flows, key, known.last_seen_s, flags);
            }
        } else if is_live {
            if known.last_seen_s != now_s || state | end != known.flags {
                tables.touch(FlowTable::Flows, key, now_s, state | end);
            }
            return found(known.backend, Why::Tracked);
        }
    }
    // A SYN that came after the entry's flow had closed, or its backend gone down, goes before it.
    // One whose numbers do not go on from the SYN's is another flow's packet: the SYN was forged.
    let recent = tables.cached_syn(key, syn_hash);
    if recent.is_some()
        && recent.age_s <= SYN_TIMEOUT_S
        && continues(recent.sequence, headers.sequence)
        && keeps(backend_flags(tables, recent.backend, key.service), view)
    {
        // An entry that another flow's packets follow stays as it is: whose SYN was forged is not known.
        if is_live {
            return found(recent.backend, Why::RecentSyn);
        }
        // Nothing need be written where a stateless lookup gives the same, and no other program is asked first.
        let needs_entry = is_some(known) || !packet.is_at_home(recent.backend) || tables.is_taking_over();
        let flags = Flow::begun_at(headers.sequence) | end;
        let is_recorded = needs_entry && record_flow(tables, (key, syn_hash), recent.backend, now_s, flags);
        if is_recorded {
            tables.count(Reason::FlowPromoted);
        }
        if is_recorded || !needs_entry {
            tables.forget_syn(key, syn_hash);
        }
        return found(recent.backend, Why::RecentSyn);
    }
    if is_foreign {
        // Where a stateless lookup finds it.
    } else if is_some(known) {
        if stays {
            if features & KEEP != 0 && known.flags & flow::flags::CLOSING != 0 && end == 0 {
                // Anybody can forge a FIN or RST, as nothing here knows its sequence numbers: so the flow stays as long as
                // there are packets, and lives again with data, of which there is none after a true one.
                tables.keep(key, now_s, headers.data_len);
            }
            return found(known.backend, Why::Tracked);
        }
        tables.count(Reason::FlowStale);
    } else if tables.is_taking_over() {
        return Err(Reason::TakenOver);
    }
    let backend = previous(tables, view, headers, slot);
    if backend != NO_BACKEND && keeps(backend_flags(tables, backend, key.service), view) {
        // Forged packets would fill the table. A flow that lives has more of them: one will be let through.
        if is_foreign {
            // Nor is the entry's flow known to be over.
        } else if !tables.admits_record(key.service, view, now_s) {
            tables.count(Reason::FlowFlood);
        } else if record_flow(tables, (key, syn_hash), backend, now_s, end) {
            tables.count(Reason::FlowPromoted);
        }
        return found(backend, Why::Previous);
    }
    primary(slot, false, Why::NotTracked)
}

/// A packet of a tracked UDP service.
#[inline(always)]
fn choose_udp<T: Tables>(
    tables: &T,
    features: u32,
    packet: &FlowPacket<'_>,
    key: &FlowKey,
) -> Result<Choice, Reason> {
    let now_s = tables.now_s();
    let known = tables.flow(FlowTable::UdpFlows, key).unwrap_or(NO_FLOW);
    if is_some(known) && is_within(packet.view.udp_timeout_s, known, now_s) {
        // A client that goes on asking a dead worker would hold the entry for ever: it moves.
        if is_up(backend_flags(tables, known.backend, key.service)) {
            if known.last_seen_s != now_s {
                tables.touch(FlowTable::UdpFlows, key, now_s, known.flags);
            }
            let is_young = now_s.saturating_sub(known.created_s) <= UDP_YOUNG_S;
            let why = if is_young && packet.view.flags & flags::SECOND_CHANCE != 0 {
                Why::TrackedYoung
            } else {
                Why::Tracked
            };
            return Ok(Choice { backend: known.backend, is_new: false, why });
        }
        tables.count(Reason::FlowStale);
    } else if tables.is_taking_over() {
        return Err(Reason::TakenOver);
    }
    if features & features::RATE != 0
        && is_limited(packet.view)
        && let Some(reason) = tables.limit(key.service, packet.view, packet.headers.source)
    {
        return Err(reason);
    }
    if tables.admits(key.service, FlowTable::UdpFlows, now_s) {
        let choice = packet.schedule(tables, now_s)?;
        let flow = Flow::new(choice.backend, now_s, now_s, 0);
        if count_if_full(tables, tables.record(FlowTable::UdpFlows, key, &flow)) {
            return Ok(choice);
        }
    } else {
        tables.count(Reason::FlowFlood);
    }
    // In no table: the next packet must be sent to the same one.
    primary(packet.place.slot, true, Why::NewFlow)
}

/// A chosen backend's entry. Another service's: this run was halted while its table was written anew.
#[inline(always)]
pub fn backend_of<T: Tables>(tables: &T, index: u32, service: u32) -> Result<&Backend, Reason> {
    let backend = tables.backend(index).ok_or(Reason::BrokenTable)?;
    if backend.flags & backend::flags::USED == 0 || backend.service != service {
        return Err(Reason::BrokenTable);
    }
    Ok(backend)
}
