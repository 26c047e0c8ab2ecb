//! Kinds of events: their names, which settings and queries use too, and their meaning.

/// Kinds of events, with their meaning.
pub const EVENT_KINDS: &[(&str, &str)] = &[
    ("lbd.started", "lbd has started; numbers begin at 1"),
    ("backend.up", "a backend passed its health checks"),
    ("backend.down", "a backend failed its health checks"),
    ("backend.reachable", "a next hop to the backend is known again"),
    ("backend.unreachable", "no route to the backend, or its next hop does not answer"),
    ("backend.drain.begun", "a backend gets no new flows: an operator drained or removed it"),
    ("backend.drain.ended", "the drain time is over, or the operator ended the drain"),
    ("replica.ready", "a replica reports that it is ready"),
    ("replica.loading", "a replica reports that it loads its model"),
    ("replica.draining", "a replica reports that it drains"),
    ("replica.failed", "a replica reports that it failed"),
    ("replica.lost", "a replica does not report any more"),
    ("replica.unknown", "nothing is known of a replica yet"),
    ("panic.begun", "too few backends are healthy: health is ignored"),
    ("panic.ended", "enough backends are healthy again"),
    ("flood.begun", "new flows arrive faster than the flow tables accept them"),
    ("flood.ended", "the flow tables accept all new flows again"),
    ("spill.begun", "part of a service's new flows goes to other regions or zones, for want of room"),
    ("spill.ended", "a service's new flows stay in the region and zone"),
    ("rollout.started", "a roll-out of a model version began"),
    ("rollout.step", "the share or the regions of a roll-out changed"),
    ("rollout.promoted", "a new version gets all new flows"),
    ("rollout.aborted", "a new version gets no new flows any more"),
    ("rollout.cleared", "a roll-out was removed"),
    ("region.drain.begun", "a region drains"),
    ("region.drain.ended", "a region gets new flows again"),
    ("host.drain.begun", "this host drains: its VIPs are withdrawn"),
    ("host.drain.ended", "this host is back in service"),
    ("interface.attached", "the program runs on an interface, or runs on it again"),
    ("interface.lost", "the program does not run on an interface any more"),
    ("vip.announced", "a VIP was added to this host"),
    ("vip.withdrawn", "a VIP was removed from this host"),
    ("revision.applied", "a revision of the desired state is in the maps"),
    ("apply.failed", "a revision could not be applied; it is retried"),
    ("problem.begun", "`lbctl status` reports a problem, for at least a second"),
    ("problem.ended", "`lbctl status` does not report a problem any more"),
];

/// Whether a kind is `prefix` or begins with its words: `backend.drain` is a prefix of `backend.drain.begun`.
pub fn has_kind_prefix(kind: &str, prefix: &str) -> bool {
    kind.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Why no kind of event has a prefix, with the nearest one; none if a kind has it.
pub fn unknown_kind(prefix: &str) -> Option<String> {
    if EVENT_KINDS.iter().any(|(kind, _)| has_kind_prefix(kind, prefix)) {
        return None;
    }
    let kinds = EVENT_KINDS.iter().map(|(kind, _)| *kind);
    let near =
        super::nearest(prefix, kinds).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    Some(format!("no kind of event is {prefix:?} or begins with it{near}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_made_of_whole_words() {
        assert!(
            ["backend", "backend.drain", "backend.drain.begun"].iter().all(|p| unknown_kind(p).is_none())
        );
        assert!(["", "back", "backend.", "backend.gone"].iter().all(|p| unknown_kind(p).is_some()));
        let said = unknown_kind("backend.dwn").unwrap();
        assert!(said.contains("did you mean backend.down?"), "{said}");
    }

    #[test]
    fn kinds_are_distinct_dotted_words() {
        let names: std::collections::BTreeSet<&str> = EVENT_KINDS.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(names.len(), EVENT_KINDS.len());
        let is_word = |c: char| c.is_ascii_lowercase() || c == '.';
        assert!(names.iter().all(|kind| kind.contains('.') && kind.chars().all(is_word)));
    }
}
