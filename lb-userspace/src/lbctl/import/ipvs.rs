//! Settings of IPVS, which ipvsadm and keepalived have in common.

use super::{Notes, assemble::ServiceDraft};
use crate::desired::model::{Protocol, Scheduler};

/// Splits `ADDRESS`, `ADDRESS:PORT` and `[ADDRESS]:PORT`.
pub(super) fn split_address(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return if rest.is_empty() {
            Some((host, None))
        } else {
            Some((host, Some(rest.strip_prefix(':')?)))
        };
    }
    match text.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((text, None)),
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

/// The scheduler of an IPVS service, and what differs: why, and what to use instead.
pub(super) fn scheduler(
    name: &str,
    flags: &str,
) -> Option<(Scheduler, Option<(&'static str, &'static str)>)> {
    let has_port = flags.split([',', '|', ' ']).any(|f| matches!(f, "sh-port" | "mh-port" | "flag-2"));
    Some(match name {
        "rr" => (Scheduler::Rr, None),
        "wrr" => (Scheduler::Wrr, None),
        "lc" | "wlc" => (Scheduler::Lc, None),
        // Both hash the client's address alone, unless the flag adds the port.
        "sh" | "mh" if has_port => (Scheduler::Maglev, None),
        "sh" | "mh" => (Scheduler::SourceHash, None),
        "sed" | "nq" => {
            (Scheduler::Lc, Some(("this scheduler has no counterpart", "lc comes closest, then p2c")))
        }
        "dh" | "lblc" | "lblcr" => (
            Scheduler::Maglev,
            Some((
                "scheduling by the destination address, for caches, has no counterpart",
                "maglev places by addresses and ports",
            )),
        ),
        "fo" | "ovf" => (
            Scheduler::Maglev,
            Some((
                "filling one server before the next has no counterpart",
                "load_cap with source-hash, or regions, cover some uses",
            )),
        ),
        "twos" => (Scheduler::P2c, None),
        _ => return None,
    })
}

/// `lc` of IPVS ignores weights, ours does not.
pub(super) fn plain_least_connection(draft: &mut ServiceDraft, name: &str) {
    if name == "lc" {
        for member in draft.members.iter_mut().filter(|m| m.weight > 0) {
            member.weight = 1;
        }
    }
}

/// Persistence of IPVS becomes placing by the client's address.
pub(super) fn persistence(
    notes: &mut Notes,
    draft: &mut ServiceDraft,
    line: usize,
    time: &str,
    mask: Option<&str>,
) {
    draft.service.scheduler = Scheduler::SourceHash;
    notes.add(
        line,
        format!("persistence of {time} s"),
        "clients are not remembered for a time",
        "source-hash is used: a client stays with its backend while the backends stay the same",
    );
    let whole = ["255.255.255.255", "32", "128"];
    if let Some(mask) = mask.filter(|mask| !whole.contains(mask)) {
        notes.add(
            line,
            format!("netmask {mask} of persistence"),
            "source-hash uses the whole address",
            "nothing",
        );
    }
}

/// One-packet scheduling.
pub(super) fn one_packet(notes: &mut Notes, draft: &mut ServiceDraft, line: usize) {
    if draft.service.protocol != Protocol::Udp {
        notes.add(line, "one-packet scheduling", "it is for UDP only", "nothing");
        return;
    }
    draft.service.udp_stateless = true;
    if !matches!(draft.service.scheduler, Scheduler::Maglev | Scheduler::SourceHash) {
        notes.add(
            line,
            "one-packet scheduling with this scheduler",
            "datagrams that are placed without a flow entry are placed by hash",
            "udp_stateless with maglev is used",
        );
        draft.service.scheduler = Scheduler::Maglev;
    }
}
