//! Ordered operations that turn one plan into another.
//!
//! What is added: backends → tables → services → where packets find them. What is removed, the other way
//! round. So at every moment each entry that a packet can reach names only things that are there.

use super::{Plan, View};
use lb_common::{Backend, ServiceKey, Slot, Vip, VipKey, backend::flags::RESOLVED};
use std::{collections::BTreeMap, sync::Arc};

/// One change of the maps. Each is whole for every packet: none sees half of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Makes an interface an egress.
    PutEgress(u32),
    /// Writes a backend's entry, which no packet uses yet or of which only single words change.
    PutBackend(u32, Backend),
    /// Writes entries whose next hop changes: each is marked unresolved, and after a grace period for
    /// packets under way, written and marked resolved.
    ChangeBackends(Vec<(u32, Backend)>),
    /// Writes a table beside the live one and switches the service to it and to the view at once.
    PutService {
        /// Index.
        index: u32,
        /// View.
        view: View,
        /// Table.
        table: Arc<Vec<Slot>>,
        /// The table is the live one; only the view changes.
        same_table: bool,
    },
    /// Lets packets find a service by exact port.
    PutIndex(ServiceKey, u32),
    /// Writes a VIP's ranges and any-port services.
    PutVip(VipKey, Vip),
    /// The inverse of [`Self::PutIndex`].
    RemoveIndex(ServiceKey),
    /// The inverse of [`Self::PutVip`].
    RemoveVip(VipKey),
    /// Clears a service's entry and frees its table.
    RemoveService(u32),
    /// Clears a backend's entry and counters.
    RemoveBackend(u32),
    /// The inverse of [`Self::PutEgress`].
    RemoveEgress(u32),
}

/// What has to be done to get from `old` to `new`, in order. Empty if they are equal.
pub fn diff(old: &Plan, new: &Plan) -> Vec<Op> {
    let mut ops = Vec::new();
    ops.extend(new.egress.difference(&old.egress).map(|&i| Op::PutEgress(i)));
    diff_backends(old, new, &mut ops);
    for (&index, entry) in &new.services {
        let before = old.services.get(&index);
        let same_table =
            before.is_some_and(|b| Arc::ptr_eq(&b.table, &entry.table) || b.table == entry.table);
        if !same_table || before.is_some_and(|b| b.view != entry.view) {
            ops.push(Op::PutService { index, view: entry.view, table: entry.table.clone(), same_table });
        }
    }
    // Reachable by a port before the VIP stops leading to another service, and the other way round.
    ops.extend(changed(&old.index, &new.index).map(|(k, v)| Op::PutIndex(*k, *v)));
    ops.extend(changed(&old.vips, &new.vips).map(|(k, v)| Op::PutVip(*k, *v)));
    ops.extend(missing(&old.index, &new.index).map(|k| Op::RemoveIndex(*k)));
    ops.extend(missing(&old.vips, &new.vips).map(|k| Op::RemoveVip(*k)));
    ops.extend(missing(&old.services, &new.services).map(|i| Op::RemoveService(*i)));
    ops.extend(missing(&old.backends, &new.backends).map(|i| Op::RemoveBackend(*i)));
    ops.extend(old.egress.difference(&new.egress).map(|&i| Op::RemoveEgress(i)));
    ops
}

/// Entries that are new or differ.
fn changed<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    new.iter().filter(|(k, v)| old.get(k) != Some(v))
}

/// Keys that are gone.
fn missing<'a, K: Ord, V>(old: &'a BTreeMap<K, V>, new: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    old.keys().filter(|k| !new.contains_key(k))
}

fn diff_backends(old: &Plan, new: &Plan, ops: &mut Vec<Op>) {
    let mut with_grace = Vec::new();
    for (&index, entry) in &new.backends {
        match old.backends.get(&index) {
            Some(before) if before == entry => {}
            Some(before) if needs_grace(before, entry) => with_grace.push((index, *entry)),
            // Of an entry with another owner, nothing may be left that a packet could take for its own.
            Some(before) if before.address != entry.address || before.service != entry.service => {
                ops.push(Op::RemoveBackend(index));
                ops.push(Op::PutBackend(index, *entry));
            }
            _ => ops.push(Op::PutBackend(index, *entry)),
        }
    }
    if !with_grace.is_empty() {
        ops.push(Op::ChangeBackends(with_grace));
    }
}

/// Whether a packet could see the old and the new next hop mixed.
fn needs_grace(before: &Backend, after: &Backend) -> bool {
    let hop = |b: &Backend| (b.next_hop, b.mtu, b.egress_mac, b.vlan, b.ifindex, b.source, b.source_bits);
    before.flags & RESOLVED != 0
        && after.flags & RESOLVED != 0
        && before.address == after.address
        && before.service == after.service
        && hop(before) != hop(after)
}

/// Does to a plan what the operations do to the maps.
pub fn apply(ops: &[Op], plan: &mut Plan) {
    for op in ops {
        match op {
            Op::PutEgress(i) => drop(plan.egress.insert(*i)),
            Op::RemoveEgress(i) => drop(plan.egress.remove(i)),
            Op::PutBackend(i, entry) => drop(plan.backends.insert(*i, *entry)),
            Op::ChangeBackends(all) => plan.backends.extend(all.iter().copied()),
            Op::RemoveBackend(i) => drop(plan.backends.remove(i)),
            Op::PutService { index, view, table, .. } => {
                let entry = super::ServiceEntry { view: *view, table: table.clone() };
                plan.services.insert(*index, entry);
            }
            Op::RemoveService(i) => drop(plan.services.remove(i)),
            Op::PutIndex(key, i) => drop(plan.index.insert(*key, *i)),
            Op::RemoveIndex(key) => drop(plan.index.remove(key)),
            Op::PutVip(key, vip) => drop(plan.vips.insert(*key, *vip)),
            Op::RemoveVip(key) => drop(plan.vips.remove(key)),
        }
    }
}
