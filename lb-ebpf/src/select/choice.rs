//! What `choose` answers: a backend, and why.

/// Why a backend was chosen, for `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The slot's primary; the slot has no exceptions.
    Primary,
    /// The slot's primary, for a new flow of a slot that may have exceptions.
    NewFlow,
    /// The slot's primary, for a flow in no table of a slot that may have exceptions.
    NotTracked,
    /// The flow table names it.
    Tracked,
    /// The same, for a UDP flow so young that its backend may have no connected socket for it yet.
    TrackedYoung,
    /// A recent SYN was placed there.
    RecentSyn,
    /// The slot's previous primary, for a flow from before the transition.
    Previous,
    /// The slot's second choice, for a new flow, because it has less load than the primary.
    LessLoaded,
    /// A new flow: it is this one's turn.
    RoundRobin,
    /// A new flow: drawn by lot.
    Random,
    /// A new flow: the least load of the list.
    LeastConn,
}

/// A chosen backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index in `BACKENDS`.
    pub backend: u32,
    /// Whether this packet starts a flow.
    pub is_new: bool,
    /// Why.
    pub why: Why,
}
