//! Slots: one entry of a service's Maglev table, holding a pair of backends.
//!
//! The halves of the pairs are in two maps: most packets read the primary only, and so touch half as
//! much memory. Both maps hold [`Line`]s, because an array map would round a word up to 8 bytes.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits of a slot's words that hold a backend's index.
pub const BACKEND_MASK: u32 = (1 << 24) - 1;
/// Index that stands for "no backend".
pub const NO_BACKEND: u32 = BACKEND_MASK;
/// In `primary`: the flow table may contain flows of this slot, so look them up.
pub const TRACKED: u32 = 1 << 31;
/// In `secondary`: the slot is in transition; the secondary is its previous primary.
pub const TRANSITION: u32 = 1 << 31;
/// In `secondary`: one more backend may have flows of this slot. The secondary behind the table names it, beside the
/// second choice ([`crate::service::flags::SECONDS`]).
pub const EARLIER: u32 = 1 << 30;

/// A pair of backends. A table is written completely before a service points to it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Slot {
    /// Index of the primary, and [`TRACKED`].
    pub primary: u32,
    /// Index of the secondary, [`TRANSITION`] and [`EARLIER`].
    pub secondary: u32,
}

impl Slot {
    /// A slot without any backend.
    pub const EMPTY: Self = Self { primary: NO_BACKEND, secondary: NO_BACKEND };

    /// Index of the primary, [`NO_BACKEND`] if none.
    #[inline(always)]
    pub const fn primary_index(self) -> u32 {
        self.primary & BACKEND_MASK
    }

    /// Index of the secondary, [`NO_BACKEND`] if none.
    #[inline(always)]
    pub const fn secondary_index(self) -> u32 {
        self.secondary & BACKEND_MASK
    }

    /// Whether the flow table may contain flows of this slot.
    #[inline(always)]
    pub const fn is_tracked(self) -> bool {
        self.primary & TRACKED != 0
    }

    /// Whether the slot's primary changed less than the drain time ago.
    #[inline(always)]
    pub const fn is_transition(self) -> bool {
        self.secondary & TRANSITION != 0
    }

    /// Whether one more backend may have flows of this slot.
    #[inline(always)]
    pub const fn has_earlier(self) -> bool {
        self.secondary & EARLIER != 0
    }
}

/// Number of words of a [`Line`].
pub const LINE: u32 = 16;

/// A cache line of primaries or of secondaries: slot `place` is word `place % LINE` of entry `place / LINE`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Line {
    /// The words of 16 slots.
    pub words: [u32; LINE as usize],
}

map_value!(Slot, Line);
