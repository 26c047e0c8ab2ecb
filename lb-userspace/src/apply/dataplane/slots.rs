//! The two memory-mapped maps of slots, as one array of pairs.

use super::{DataplaneError, mapped::MappedArray};
use aya::maps::MapData;
use lb_common::{
    Slot, names,
    slot::{LINE, Line},
};

/// All slots.
pub struct MappedSlots {
    primaries: MappedArray<Line>,
    secondaries: MappedArray<Line>,
}

/// Index of the entry that holds a slot's words, and byte offset in it.
fn place(slot: u32) -> (u32, usize) {
    (slot / LINE, (slot % LINE) as usize * size_of::<u32>())
}

impl MappedSlots {
    /// Maps both maps into memory.
    pub fn new(primaries: &MapData, secondaries: &MapData, writable: bool) -> Result<Self, DataplaneError> {
        Ok(Self {
            primaries: MappedArray::new(primaries, names::PRIMARIES, writable)?,
            secondaries: MappedArray::new(secondaries, names::SECONDARIES, writable)?,
        })
    }

    /// Number of slots.
    pub fn len(&self) -> u32 {
        self.primaries.len().min(self.secondaries.len()).saturating_mul(LINE)
    }

    /// Reads a slot; none past the end.
    pub fn load(&self, slot: u32) -> Option<Slot> {
        let (index, offset) = place(slot);
        let primary = self.primaries.load_u32(index, offset)?;
        Some(Slot { primary, secondary: self.secondaries.load_u32(index, offset)? })
    }

    /// Writes a slot, secondary first; false past the end or if the mapping is read-only.
    #[must_use]
    pub fn store(&self, slot: u32, value: Slot) -> bool {
        let (index, offset) = place(slot);
        self.store_secondary(slot, value) && self.primaries.store_u32(index, offset, value.primary)
    }

    /// Writes the secondary of a slot; false past the end or if the mapping is read-only.
    #[must_use]
    pub fn store_secondary(&self, slot: u32, value: Slot) -> bool {
        let (index, offset) = place(slot);
        self.secondaries.store_u32(index, offset, value.secondary)
    }
}
