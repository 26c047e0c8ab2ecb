//! Sweeps the bindings of mode `nat`: removes both entries of an expired binding, and single entries left over.
//!
//! Two walks, and nothing else per binding: the first gathers the clients' entries, the second matches the workers'
//! entries with them. Single entries are looked up only before they are removed.
//!
//! Above seven eighths of the room, UDP bindings are removed, the least recently used first. A service that answers
//! anybody lets anybody make assured ones with two forged datagrams each, so they must not take the room of others. TCP
//! bindings are left alone: an assured one has completed a handshake.

use super::sweep_counts::SweepCounts;
use crate::{
    apply::dataplane::{DataplaneError, Reader},
    clock,
};
use foldhash::fast::RandomState;
use lb_common::{
    FlowKey, Nat, Reply, ReplyKey,
    nat::{is_expired, is_over, tcp_idle_s},
    service::{TCP, UDP},
};
use std::{collections::HashMap, hash::BuildHasher};

/// Age in seconds from which an entry without its counterpart is a remnant: a binding's two are written together.
const REMNANT_S: u32 = 5;

/// Result of a sweep of the bindings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindingCounts {
    /// Number of entries found in both maps.
    pub entries: u64,
    /// Number of bindings left.
    pub bindings: u64,
    /// Number of removals: pairs and single entries.
    pub removed: u64,
}

/// Fields of a client's entry that the sweep needs.
struct ClientEntry {
    flow: FlowKey,
    backend: u32,
    created_s: u32,
    last_seen_s: u32,
    has_answers: bool,
}

/// Entries of clients, indexed by the fields that both entries of a binding have in common.
struct ClientEntries {
    all: Vec<ClientEntry>,
    /// By [`ClientEntries::name`], whose seed is secret: two bindings share a name only by chance, which costs one of
    /// them an additional lookup, or a delay until the next sweep.
    by_name: HashMap<u64, u32, RandomState>,
    names: RandomState,
}

impl ClientEntries {
    fn read(reader: &Reader, expected: usize) -> Result<Self, DataplaneError> {
        let by_name = HashMap::with_capacity_and_hasher(expected, RandomState::default());
        let mut clients = Self { all: Vec::with_capacity(expected), by_name, names: RandomState::default() };
        reader.for_each_nat(|flow, nat| {
            // The service implies the protocol.
            let name = clients.name(&flow, &lb_ebpf::nat::reply_key(&nat, 0));
            clients.by_name.insert(name, clients.all.len() as u32);
            let Nat { backend, created_s, last_seen_s, .. } = nat;
            clients.all.push(ClientEntry { flow, backend, created_s, last_seen_s, has_answers: false });
        })?;
        Ok(clients)
    }

    fn name(&self, flow: &FlowKey, answers: &ReplyKey) -> u64 {
        let ReplyKey { worker, source, port, source_port, protocol: _ } = *answers;
        self.names.hash_one((
            flow,
            u128::from_ne_bytes(worker),
            u128::from_ne_bytes(source),
            port,
            source_port,
        ))
    }

    /// The client's entry of the binding that a reply entry belongs to.
    fn find(&mut self, answers: &ReplyKey, reply: &Reply) -> Option<&mut ClientEntry> {
        let name = self.name(&reply.flow, answers);
        self.by_name.get(&name).map(|&i| &mut self.all[i as usize])
    }
}

/// Whether a binding can be removed, given when its client was last seen.
fn is_removable(
    counts: &mut SweepCounts<'_>,
    protocol: u32,
    (backend, client_s): (u32, u32),
    reply: &Reply,
    now_s: u32,
) -> bool {
    let service = reply.flow.service;
    let Some(timeouts) = counts.timeouts(service) else { return true };
    let idle_s =
        if protocol == u32::from(TCP) { tcp_idle_s(reply.flags).min(timeouts.tcp_s) } else { timeouts.udp_s };
    !counts.is_served(service, backend) || is_expired(idle_s, client_s, reply.last_seen_s, now_s)
}

/// Bindings of UDP that may be removed for want of room.
struct LeastRecent {
    /// Number of bindings beyond which they are removed.
    most: u64,
    /// Time of the last packet, and key, of each; none while there is room.
    udp: Option<Vec<(u32, ReplyKey)>>,
}

impl LeastRecent {
    fn new(room: u64, entries: u64) -> Self {
        let most = room / 8 * 7;
        Self { most, udp: (entries > most).then(Vec::new) }
    }

    fn add(&mut self, key: &ReplyKey, last_seen_s: u32) {
        if let Some(udp) = self.udp.as_mut().filter(|_| key.protocol == u32::from(UDP)) {
            udp.push((last_seen_s, *key));
        }
    }

    /// Bindings to remove of as many as there are, the least recently used.
    fn into_excess(self, bindings: u64) -> Vec<(u32, ReplyKey)> {
        let mut udp = self.udp.unwrap_or_default();
        let excess = usize::try_from(bindings.saturating_sub(self.most)).unwrap_or(usize::MAX);
        if excess < udp.len() {
            udp.select_nth_unstable_by_key(excess, |(last_seen_s, _)| *last_seen_s);
            udp.truncate(excess);
        }
        udp
    }
}

/// Sweeps the bindings once, and counts those left.
pub fn sweep_bindings(
    reader: &Reader,
    expected: u64,
    counts: &mut SweepCounts<'_>,
) -> Result<BindingCounts, DataplaneError> {
    let mut clients = ClientEntries::read(reader, expected as usize)?;
    let mut found = BindingCounts { entries: clients.all.len() as u64, ..BindingCounts::default() };
    let now_s = clock::boot_s();
    let (mut done, mut remnants) = (Vec::new(), Vec::new());
    let mut least_recent = LeastRecent::new(reader.bindings_room().into(), found.entries);
    reader.for_each_reply(|key, reply| {
        found.entries += 1;
        let Some(client) = clients.find(&key, &reply) else {
            if now_s.saturating_sub(reply.last_seen_s) > REMNANT_S {
                remnants.push(key);
            }
            return;
        };
        client.has_answers = true;
        if is_removable(counts, key.protocol, (client.backend, client.last_seen_s), &reply, now_s) {
            done.push(key);
            return;
        }
        found.bindings += 1;
        least_recent.add(&key, client.last_seen_s.max(reply.last_seen_s));
        let is_live = key.protocol == u32::from(UDP) || !is_over(reply.flags);
        counts.count(reply.flow.service, client.backend, false, is_live);
    })?;
    for key in done {
        let is_removable = |nat: &Nat, reply: &Reply, now_s| {
            is_removable(counts, key.protocol, (nat.backend, nat.last_seen_s), reply, now_s)
        };
        found.removed += u64::from(remove_pair(reader, &key, is_removable)?);
    }
    for (last_seen_s, key) in least_recent.into_excess(found.bindings) {
        let is_idle = |nat: &Nat, reply: &Reply, _| nat.last_seen_s.max(reply.last_seen_s) == last_seen_s;
        let is_removed = u64::from(remove_pair(reader, &key, is_idle)?);
        found.removed += is_removed;
        found.bindings -= is_removed;
    }
    for key in remnants {
        found.removed += u64::from(remove_remnant(reader, &key)?);
    }
    // Entries of clients whose reply entry is missing: the next packet of the flow makes a new binding.
    let is_remnant =
        |client: &&ClientEntry| !client.has_answers && now_s.saturating_sub(client.created_s) > REMNANT_S;
    for ClientEntry { flow, .. } in clients.all.iter().filter(is_remnant) {
        // The flow may have another binding by now, made after the walk of the reply entries.
        let is_whole = reader.nat(flow).is_none_or(|nat| {
            now_s.saturating_sub(nat.created_s) <= REMNANT_S || has_answers(reader, flow, &nat)
        });
        if !is_whole {
            reader.remove_nat(flow)?;
            found.removed += 1;
        }
    }
    Ok(found)
}

/// Whether these are the two entries of a binding. Their service and key imply the same protocol.
fn is_pair(nat: &Nat, key: &ReplyKey) -> bool {
    (nat.source, nat.source_port, nat.worker, nat.port) == (key.source, key.source_port, key.worker, key.port)
}

/// Removes a binding that can still be removed: a packet may have come since the walk.
fn remove_pair(
    reader: &Reader,
    key: &ReplyKey,
    is_removable: impl FnOnce(&Nat, &Reply, u32) -> bool,
) -> Result<bool, DataplaneError> {
    let Some(reply) = reader.reply(key) else { return Ok(false) };
    let Some(nat) = reader.nat(&reply.flow).filter(|nat| is_pair(nat, key)) else { return Ok(false) };
    if !is_removable(&nat, &reply, clock::boot_s()) {
        return Ok(false);
    }
    // The client's entry first: without a reply entry, the next packet of the flow would make a new binding.
    reader.remove_nat(&reply.flow)?;
    reader.remove_reply(key)?;
    Ok(true)
}

fn remove_remnant(reader: &Reader, key: &ReplyKey) -> Result<bool, DataplaneError> {
    let Some(reply) = reader.reply(key) else { return Ok(false) };
    if reader.nat(&reply.flow).is_some_and(|nat| is_pair(&nat, key)) {
        return Ok(false);
    }
    reader.remove_reply(key)?;
    Ok(true)
}

fn has_answers(reader: &Reader, flow: &FlowKey, nat: &Nat) -> bool {
    [TCP, UDP].iter().any(|&protocol| {
        let key = lb_ebpf::nat::reply_key(nat, protocol);
        reader.reply(&key).is_some_and(|reply| reply.flow == *flow)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::Be16;

    fn key(port: u16, protocol: u8) -> ReplyKey {
        ReplyKey {
            worker: [1; 16],
            source: [2; 16],
            port: Be16::new(53),
            source_port: Be16::new(port),
            protocol: protocol.into(),
        }
    }

    /// Bindings that go of 100 with room for `room`: 60 of UDP, each idle for a second less than the one before.
    fn excess(room: u64) -> Vec<u16> {
        let mut least_recent = LeastRecent::new(room, 100);
        for port in 0..60 {
            // Not in order of age.
            let port = port * 7 % 60;
            least_recent.add(&key(port, UDP), 1_000 + u32::from(port));
        }
        (100..140).for_each(|port| least_recent.add(&key(port, TCP), 1));
        let mut ports: Vec<u16> =
            least_recent.into_excess(100).iter().map(|(_, key)| key.source_port.get()).collect();
        ports.sort_unstable();
        ports
    }

    #[test]
    fn udp_bindings_go_in_the_order_of_their_last_packets_above_seven_eighths() {
        assert!(excess(1_000).is_empty());
        assert!(excess(120).is_empty(), "105 may stay");
        assert_eq!(excess(104), (0..9).collect::<Vec<_>>(), "91 may stay");
        assert_eq!(excess(16), (0..60).collect::<Vec<_>>(), "TCP stays, whatever its age");
    }
}
