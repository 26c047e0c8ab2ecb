//! What a program decides about a packet.

use lb_common::{Reason, reason::Fate};

/// The end of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To this host's own stack.
    Pass,
    /// Nowhere.
    Drop,
    /// Out of the interface that it came in by.
    Transmit,
    /// Out of this interface.
    Redirect(u32),
    /// To the program at this place of `STAGES`.
    Stage(u32),
}

impl Verdict {
    /// The verdict that a reason stands for.
    #[inline(always)]
    pub const fn of(reason: Reason) -> Self {
        match reason.fate() {
            Fate::Pass | Fate::Note => Self::Pass,
            Fate::Drop => Self::Drop,
            Fate::Answer => Self::Transmit,
        }
    }
}
