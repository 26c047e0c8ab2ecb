//! Sweeps the bindings of mode `nat`: both entries of what is over go together, and what is left of a pair goes too.

use super::sweep::Sweep;
use crate::{
    clock,
    dataplane::{DataplaneError, Reader},
};
use lb_common::{
    FlowKey, Nat, Reply, ReplyKey,
    backend::flags::USED,
    nat::{is_expired, is_over, tcp_idle_s},
    service::{TCP, UDP},
};
use std::collections::{BTreeMap, HashMap};

/// Age in seconds from which an entry without its other half is a remnant: a binding's two are written at once.
const REMNANT_S: u32 = 5;

/// Idle seconds by service, and whether it is there at all; read once per sweep.
struct Services<'a> {
    reader: &'a Reader,
    known: BTreeMap<u32, Option<u32>>,
}

impl Services<'_> {
    /// Idle time of UDP flows of a service that is there.
    fn udp_timeout_s(&mut self, service: u32) -> Option<u32> {
        let reader = self.reader;
        *self.known.entry(service).or_insert_with(|| {
            let service = reader.service(service).filter(|s| s.used != 0)?;
            Some(service.views[(service.active & 1) as usize].udp_timeout_s)
        })
    }

    /// Whether a binding may be forgotten.
    fn is_done(&mut self, protocol: u32, nat: &Nat, reply: &Reply, now_s: u32) -> bool {
        let Some(udp_timeout_s) = self.udp_timeout_s(reply.flow.service) else { return true };
        let backend = self.reader.backend(nat.backend);
        if backend.is_none_or(|b| b.flags & USED == 0 || b.service != reply.flow.service) {
            return true;
        }
        let idle_s = if protocol == u32::from(TCP) { tcp_idle_s(reply.flags) } else { udp_timeout_s };
        is_expired(idle_s, nat.last_seen_s, reply.last_seen_s, now_s)
    }
}

/// Key of a binding's answers. Which of the two protocols it has, the service says, and so does the key.
fn is_pair(nat: &Nat, key: &ReplyKey) -> bool {
    (nat.source, nat.source_port, nat.worker, nat.port) == (key.source, key.source_port, key.worker, key.port)
}

/// Sweeps once, and adds what is left to `sweep`.
pub fn sweep_bindings(reader: &Reader, sweep: &mut Sweep) -> Result<(), DataplaneError> {
    let mut nats: HashMap<FlowKey, Nat> = HashMap::new();
    reader.for_each_nat(|key, nat| {
        nats.insert(key, nat);
    })?;
    let mut services = Services { reader, known: BTreeMap::new() };
    let now_s = clock::boot_s();
    let (mut done, mut remnants) = (Vec::new(), Vec::new());
    reader.for_each_reply(|key, reply| {
        let Some(nat) = nats.get(&reply.flow).filter(|nat| is_pair(nat, &key)) else {
            if now_s.saturating_sub(reply.last_seen_s) > REMNANT_S {
                remnants.push(key);
            }
            return;
        };
        if services.is_done(key.protocol, nat, &reply, now_s) {
            done.push(key);
            return;
        }
        sweep.bindings += 1;
        sweep.services.insert(reply.flow.service);
        sweep.backends.insert(nat.backend);
        if key.protocol == u32::from(UDP) || !is_over(reply.flags) {
            *sweep.flows.entry(nat.backend).or_default() += 1;
        }
    })?;
    for key in done {
        sweep.removed += u64::from(remove_pair(reader, &mut services, &key)?);
    }
    for key in remnants {
        sweep.removed += u64::from(remove_remnant(reader, &key)?);
    }
    for (key, nat) in nats {
        // Those whose answers' entry has gone, or never came to be: their flow is bound anew.
        if now_s.saturating_sub(nat.created_s) > REMNANT_S && !has_answers(reader, &key, &nat) {
            reader.remove_nat(&key)?;
            sweep.removed += 1;
        }
    }
    Ok(())
}

/// Removes a binding that is still over: a packet may have come since the scan.
fn remove_pair(reader: &Reader, services: &mut Services<'_>, key: &ReplyKey) -> Result<bool, DataplaneError> {
    let Some(reply) = reader.reply(key) else { return Ok(false) };
    let Some(nat) = reader.nat(&reply.flow).filter(|nat| is_pair(nat, key)) else { return Ok(false) };
    if !services.is_done(key.protocol, &nat, &reply, clock::boot_s()) {
        return Ok(false);
    }
    // The client's first: what has no answers is bound anew by its next packet.
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
