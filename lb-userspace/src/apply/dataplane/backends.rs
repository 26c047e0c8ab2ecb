//! Writer of backends: a packet sees all of a next hop as it was before a change, or all of it as it is after.
//!
//! Input: entries to write. Output: `BACKENDS`, and in `CHANGING_BACKENDS` the entries before the change while it is under
//! way ([`lb_common::backend::flags::CHANGING`]). Used by [`super::Dataplane`] only.

use super::{DataplaneError, mapped::MappedArray, missing, stored};
use lb_common::{
    Backend,
    backend::flags::{CHANGING, RESOLVED, USED},
    names,
};
use std::{collections::BTreeSet, mem::offset_of};

/// The writer.
pub(super) struct Backends {
    banks: Banks,
    /// Copies that a program may still be reading, because no grace period has passed since their change ended.
    read: BTreeSet<u32>,
}

/// Both arrays.
struct Banks {
    entries: MappedArray<Backend>,
    changing: MappedArray<Backend>,
}

/// How an entry is written.
struct HopChange {
    index: u32,
    new: Backend,
    /// Whether packets may use the entry's next hop meanwhile, so that it is switched off and on again.
    is_torn: bool,
    /// Whether packets may be reading the entry when its next hop becomes valid.
    is_switched: bool,
}

impl Backends {
    /// A writer of the program's arrays.
    pub fn new(entries: MappedArray<Backend>, changing: MappedArray<Backend>) -> Self {
        Self { banks: Banks { entries, changing }, read: BTreeSet::new() }
    }

    /// The array of entries.
    pub fn entries(&self) -> &MappedArray<Backend> {
        &self.banks.entries
    }

    /// Continues with a newly loaded program, whose array of copies is empty.
    pub fn renew(&mut self, changing: MappedArray<Backend>) {
        self.banks.changing = changing;
        self.read.clear();
    }

    /// Writes entries. `before` is called with the old and the new entry before the new one is written, and `grace`
    /// returns when every program that was running at the call has ended.
    pub fn write(
        &mut self,
        backends: &[(u32, Backend)],
        before: impl FnMut(&Backend, &Backend) -> Result<(), DataplaneError>,
        grace: impl FnMut(),
    ) -> Result<(), DataplaneError> {
        let changes = self.banks.changes(backends)?;
        self.banks.write(&mut self.read, &changes, before, grace)
    }
}

impl Banks {
    /// How each entry is to be written.
    fn changes(&self, backends: &[(u32, Backend)]) -> Result<Vec<HopChange>, DataplaneError> {
        let mut changes = Vec::with_capacity(backends.len());
        for (index, new) in backends {
            let old = self.load(*index)?;
            let is_torn = is_torn(&old, new);
            // Packets read the entry by the tables of now, or will by those to come.
            let is_used = old.flags & USED != 0 && old.service == new.service;
            let is_switched = is_torn || is_used && old.flags & RESOLVED == 0 && new.flags & RESOLVED != 0;
            changes.push(HopChange { index: *index, new: *new, is_torn, is_switched });
        }
        Ok(changes)
    }

    /// See [`Backends::write`].
    fn write(
        &self,
        read: &mut BTreeSet<u32>,
        changes: &[HopChange],
        mut before: impl FnMut(&Backend, &Backend) -> Result<(), DataplaneError>,
        mut grace: impl FnMut(),
    ) -> Result<(), DataplaneError> {
        let torn = || changes.iter().filter(|change| change.is_torn);
        if torn().any(|change| read.contains(&change.index)) {
            grace();
            read.clear();
        }
        for HopChange { index, .. } in torn() {
            let old = self.load(*index)?;
            stored(self.changing.store(*index, &old), names::CHANGING_BACKENDS, *index)?;
            self.store_flags(*index, old.flags & !RESOLVED | CHANGING)?;
            read.insert(*index);
        }
        if torn().next().is_some() {
            grace();
        }
        for HopChange { index, new, is_torn, is_switched } in changes {
            before(&self.load(*index)?, new)?;
            let switch = if *is_torn { CHANGING } else { 0 };
            let flags = if *is_switched { new.flags & !RESOLVED | switch } else { new.flags };
            stored(self.entries.store(*index, &Backend { flags, ..*new }), names::BACKENDS, *index)?;
        }
        if changes.iter().any(|change| change.is_switched) {
            // A program that has loaded words of the entry before the last of them was written does not see the switch.
            grace();
        }
        for HopChange { index, new, .. } in changes.iter().filter(|change| change.is_switched) {
            self.store_flags(*index, new.flags)?;
        }
        Ok(())
    }

    fn load(&self, index: u32) -> Result<Backend, DataplaneError> {
        self.entries.load(index).ok_or(missing(names::BACKENDS, index))
    }

    fn store_flags(&self, index: u32, flags: u32) -> Result<(), DataplaneError> {
        let is_stored = self.entries.store_u32(index, offset_of!(Backend, flags), flags);
        stored(is_stored, names::BACKENDS, index)
    }
}

/// Whether a packet could see a mixture of two next hops.
fn is_torn(old: &Backend, new: &Backend) -> bool {
    // An entry that is being cleared is no longer in any table.
    if old.flags & RESOLVED == 0 || new.flags & USED == 0 {
        return false;
    }
    let (a, b): (&[u64; 8], &[u64; 8]) = (zerocopy::transmute_ref!(old), zerocopy::transmute_ref!(new));
    (0..8).filter(|i| a[*i] != b[*i]).count() > 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::Be16;
    use std::sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    };

    /// An entry of which all words of its hop, and its source, name the same number.
    fn entry(n: u8, flags: u32) -> Backend {
        Backend {
            address: [1; 16],
            source: [n; 16],
            next_hop: [n; 6],
            mtu: u16::from_ne_bytes([n; 2]),
            egress_mac: [n; 6],
            vlan: Be16::from_bytes([n; 2]),
            ifindex: n.into(),
            flags: USED | flags,
            service: 3,
            ..Backend::default()
        }
    }

    /// What a packet goes by, as the packet code does: the number, or none for the FIB. `None`: a mixture.
    fn seen(banks: &Banks) -> Option<Option<u8>> {
        // Words of the hop are loaded before the flags, which is the worst order that a compiler may choose.
        let entry = banks.entries.load(0).expect("in range");
        let by = match entry.flags & (RESOLVED | CHANGING) {
            0 => return Some(None),
            CHANGING => banks.changing.load(0).expect("in range"),
            _ => entry,
        };
        let n = by.next_hop[0];
        let is_whole = self::entry(n, by.flags & !USED) == by;
        is_whole.then_some(Some(n))
    }

    #[test]
    fn a_packet_sees_a_whole_hop_and_never_needs_the_fib() {
        let array = || MappedArray::<Backend>::private(4);
        let banks = Banks { entries: array(), changing: array() };
        let mut read = BTreeSet::new();
        let mut write = |n, grace: &dyn Fn()| {
            let changes = banks.changes(&[(0, entry(n, RESOLVED))]).expect("in range");
            banks.write(&mut read, &changes, |_, _| Ok(()), grace).expect("in range");
        };
        write(1, &|| {});
        // Readers hold it as programs hold RCU; a grace period waits for all of them.
        let (running, is_over, packets) = (RwLock::new(()), AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Acquire) {
                        let run = running.read().expect("no panic");
                        let seen = seen(&banks);
                        drop(run);
                        assert!(matches!(seen, Some(Some(_))), "{seen:?} is no whole hop");
                        packets.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let grace = || drop(running.write().expect("no panic"));
            for n in 0..20_000_u32 {
                let n = (n % 200 + 1) as u8;
                write(n, &grace);
                assert_eq!(seen(&banks), Some(Some(n)));
            }
            is_over.store(true, Ordering::Release);
        });
        assert!(packets.into_inner() > 1_000);
    }

    #[test]
    fn grace_periods_are_waited_for_only_where_a_packet_may_be_reading() {
        let array = || MappedArray::<Backend>::private(4);
        let mut backends = Backends::new(array(), array());
        let mut graces = |list: &[(u32, Backend)]| {
            let mut graces = 0;
            backends.write(list, |_, _| Ok(()), || graces += 1).expect("in range");
            graces
        };
        assert_eq!(graces(&[(0, entry(1, RESOLVED)), (1, entry(1, 0))]), 0, "new entries");
        assert_eq!(graces(&[(0, Backend { mtu: 9, ..entry(1, RESOLVED) })]), 0, "a single word");
        assert_eq!(graces(&[(1, entry(1, RESOLVED))]), 1, "its packets ask the FIB until then");
        assert_eq!(graces(&[(0, entry(2, RESOLVED)), (1, entry(2, RESOLVED))]), 2);
        assert_eq!(graces(&[(0, entry(3, RESOLVED))]), 3, "its copy may be read");
        assert_eq!(graces(&[(0, Backend::default())]), 0, "no table has it");
    }
}
