//! What a program decides about a packet.

use crate::Tables;
use lb_common::{Reason, names::stage, reason::Fate};

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
    /// The verdict that a reason stands for. By bits and not by a table: of a reason that is not a constant the verifier
    /// knows no bound, and LLVM makes a table of a match.
    #[inline(always)]
    pub const fn of(reason: Reason) -> Self {
        if is_in(DROPPED, reason) {
            Self::Drop
        } else if is_in(ANSWERED, reason) {
            Self::Transmit
        } else {
            Self::Pass
        }
    }
}

/// What was found out about a packet on its way, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Forwarded to this backend (index) of this service (index).
    Forwarded {
        /// Service.
        service: u32,
        /// Backend.
        backend: u32,
    },
    /// A worker's packet, sent on to a client of this service (index).
    Returned {
        /// Service.
        service: u32,
    },
    /// Not forwarded, for this reason.
    Not(Reason),
}

/// Why a packet cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// For this reason.
    Reason(Reason),
    /// The stage at this place of `STAGES` takes it over.
    Stage(u32),
    /// It would fit with this many bytes, its own IP header included.
    TooBig(u32),
}

impl From<Reason> for Refusal {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Reason(reason)
    }
}

/// The end of a packet's way for a reason, counted; what is to be answered is counted by the stage that answers.
#[inline(always)]
pub fn refuse<T: Tables>(tables: &T, reason: Reason) -> (Verdict, Outcome) {
    if reason == Reason::NoBackendAnswered {
        return (Verdict::Stage(stage::REJECT), Outcome::Not(reason));
    }
    tables.count(reason);
    let verdict =
        if reason == Reason::TakenOver { Verdict::Stage(stage::PREDECESSOR) } else { Verdict::of(reason) };
    (verdict, Outcome::Not(reason))
}

/// Reasons as bits.
type Set = [u64; 2];

const _: () = assert!(Reason::COUNT <= 128, "two words hold all reasons");
const DROPPED: Set = of_fate(Fate::Drop);
const ANSWERED: Set = of_fate(Fate::Answer);

const fn of_fate(fate: Fate) -> Set {
    let (mut set, mut i) = ([0; 2], 0);
    while i < Reason::ALL.len() {
        if Reason::ALL[i].fate() as u32 == fate as u32 {
            set[i / 64] |= 1 << (i % 64);
        }
        i += 1;
    }
    set
}

#[inline(always)]
const fn is_in(set: Set, reason: Reason) -> bool {
    let i = reason as u32;
    (if i < 64 { set[0] } else { set[1] }) >> (i & 63) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_those_of_fates() {
        for reason in Reason::ALL {
            let verdict = match reason.fate() {
                Fate::Pass | Fate::Note => Verdict::Pass,
                Fate::Drop => Verdict::Drop,
                Fate::Answer => Verdict::Transmit,
            };
            assert_eq!(Verdict::of(*reason), verdict, "{}", reason.label());
        }
    }
}
