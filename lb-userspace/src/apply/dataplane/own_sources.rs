//! Source addresses of packets to workers in mode `nat`, for the program: no other host sends from them.
//!
//! Input: writes of backends. Output: `NAT_SOURCES`, which belongs to the program and is filled again with each load.
//! Pools are not in it: all backends of a family share one, and the program compares with it. Used by
//! [`super::Dataplane`] only.

use super::{DataplaneError, mapped::MappedArray};
use aya::maps::{HashMap, MapData, MapError};
use lb_common::{
    Address, Backend,
    backend::{flags, mode},
    names,
};
use std::collections::HashMap as Counts;

/// The map, and the number of backends for each of its addresses.
pub(super) struct OwnSources {
    map: HashMap<MapData, Address, u32>,
    counts: Counts<Address, u32>,
}

impl OwnSources {
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
        let failed = |source| DataplaneError::Map { map: names::NAT_SOURCES, source };
        let (added, removed) = count(&mut self.counts, source_of(old), source_of(new));
        if let Some(address) = added {
            self.map.insert(address, 1, 0).map_err(failed)?;
        }
        match removed.map(|address| self.map.remove(&address)) {
            None | Some(Ok(()) | Err(MapError::KeyNotFound)) => Ok(()),
            Some(Err(error)) => Err(failed(error)),
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

/// Counts a change from one address to another; returns the address that is new, and the one that is no longer used.
fn count(
    counts: &mut Counts<Address, u32>,
    old: Option<Address>,
    new: Option<Address>,
) -> (Option<Address>, Option<Address>) {
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

    const A: Address = mapped([10, 1, 0, 1]);
    const B: Address = mapped([10, 2, 0, 1]);

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
        let nat =
            Backend { flags: flags::USED, mode: mode::NAT, source: A, source_bits: 0, ..Backend::default() };
        assert_eq!(source_of(&nat), Some(A));
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
