//! Addresses that the program must know as its own system's: those of workers, and the source addresses of packets to
//! workers in mode `nat`, from which no other host sends.
//!
//! Input: writes of backends. Output: `OWN_ADDRESSES`, which belongs to the program and is filled again with each load.
//! Pools are not in it: all backends of a family share one, and the program compares with it. Used by
//! [`super::Dataplane`] only.

use super::{DataplaneError, mapped::MappedArray};
use aya::maps::{HashMap, MapData, MapError};
use lb_common::{
    Address, Backend,
    backend::{
        flags, mode,
        own_address::{TRANSLATED, WORKER},
    },
    names,
};
use std::collections::HashMap as Counts;

/// The map, and the number of backends for each of its addresses and bits.
pub(super) struct OwnAddresses {
    map: HashMap<MapData, Address, u32>,
    counts: Counts<AddressBit, u32>,
}

impl OwnAddresses {
    /// Fills the map of a newly loaded program.
    pub fn new(
        map: HashMap<MapData, Address, u32>,
        backends: &MappedArray<Backend>,
    ) -> Result<Self, DataplaneError> {
        let mut own = Self { map, counts: Counts::new() };
        for entry in (0..backends.len()).filter_map(|index| backends.load(index)) {
            own.change(&Backend::default(), &entry)?;
        }
        Ok(own)
    }

    /// Applies a change of a backend's entry. Call it before the entry is written.
    pub fn change(&mut self, old: &Backend, new: &Backend) -> Result<(), DataplaneError> {
        for (bit, of) in [(TRANSLATED, source_of as fn(&Backend) -> Option<Address>), (WORKER, worker_of)] {
            let with_bit = |address| (address, bit);
            let (added, removed) = count(&mut self.counts, of(old).map(with_bit), of(new).map(with_bit));
            for (address, _) in added.into_iter().chain(removed) {
                self.write(address)?;
            }
        }
        Ok(())
    }

    /// Writes the bits of an address, or removes it.
    fn write(&mut self, address: Address) -> Result<(), DataplaneError> {
        let bits = [TRANSLATED, WORKER].into_iter().filter(|bit| self.counts.contains_key(&(address, *bit)));
        let written = match bits.fold(0, |all, bit| all | bit) {
            0 => self.map.remove(&address),
            bits => self.map.insert(address, bits, 0),
        };
        match written {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(DataplaneError::Map { map: names::OWN_ADDRESSES, source }),
        }
    }
}

/// The only source address of packets to a backend in mode nat; none for pools and other modes.
fn source_of(backend: &Backend) -> Option<Address> {
    let is_single = backend.flags & flags::USED != 0
        && backend.mode == mode::NAT
        && backend.source_bits == 0
        && backend.source != [0; 16];
    is_single.then_some(backend.source)
}

/// The address of a worker.
fn worker_of(backend: &Backend) -> Option<Address> {
    (backend.flags & flags::USED != 0).then_some(backend.address)
}

/// An address and its bit.
type AddressBit = (Address, u32);

/// Counts a change from one address to another; returns the address that is new, and the one that is no longer used.
fn count(
    counts: &mut Counts<AddressBit, u32>,
    old: Option<AddressBit>,
    new: Option<AddressBit>,
) -> (Option<AddressBit>, Option<AddressBit>) {
    if old == new {
        return (None, None);
    }
    let added = new.filter(|address| {
        let count = counts.entry(*address).or_default();
        *count += 1;
        *count == 1
    });
    let removed = old.filter(|address| {
        let left = counts.get_mut(address).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            counts.remove(address);
        }
        left == 0
    });
    (added, removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::mapped;

    const A: AddressBit = (mapped([10, 1, 0, 1]), TRANSLATED);
    const B: AddressBit = (mapped([10, 2, 0, 1]), TRANSLATED);

    #[test]
    fn an_address_is_there_while_a_backend_has_it() {
        let mut counts = Counts::new();
        let mut change = |old, new| count(&mut counts, old, new);
        assert_eq!(change(None, Some(A)), (Some(A), None));
        assert_eq!(change(None, Some(A)), (None, None));
        assert_eq!(change(Some(A), Some(A)), (None, None));
        assert_eq!(change(Some(A), Some(B)), (Some(B), None));
        assert_eq!(change(Some(A), None), (None, Some(A)));
        assert_eq!(change(None, Some(A)), (Some(A), None));
        assert_eq!(change(Some(B), Some(A)), (None, Some(B)));
    }

    #[test]
    fn only_translated_backends_with_one_address_have_one() {
        let nat = Backend {
            flags: flags::USED,
            mode: mode::NAT,
            source: A.0,
            source_bits: 0,
            ..Backend::default()
        };
        assert_eq!(source_of(&nat), Some(A.0));
        for other in [
            Backend { flags: 0, ..nat },
            Backend { mode: mode::IPIP, ..nat },
            Backend { source_bits: 2, ..nat },
            Backend { source: [0; 16], ..nat },
        ] {
            assert_eq!(source_of(&other), None);
        }
    }
}
