//! What status calls a problem, in words for an operator: what is wrong, since when, and what to do.

use super::{engine::Snapshot, types::*};
use crate::{
    clock,
    desired::model::{Name, Readiness, Service},
    observed::health::ObstacleKind,
    plan::policy::announce::KeptVip,
};
use std::net::IpAddr;

/// A problem: what status prints, and what tells it from others when its words change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundProblem {
    /// Kind of problem.
    pub code: &'static str,
    /// What it is about, if there may be several of the kind.
    pub subject: String,
    /// The words of status.
    pub text: String,
}

impl FoundProblem {
    fn new(code: &'static str, text: impl Into<String>) -> Self {
        Self { code, subject: String::new(), text: text.into() }
    }

    /// One of several.
    pub(super) fn about(code: &'static str, subject: impl ToString, text: impl Into<String>) -> Self {
        Self { code, subject: subject.to_string(), text: text.into() }
    }

    /// A problem that is known by its words, except for their numbers, which may change.
    pub(super) fn of_text(code: &'static str, text: String) -> Self {
        let words: Vec<&str> = text.split(|c: char| c.is_ascii_digit()).filter(|w| !w.is_empty()).collect();
        Self { code, subject: words.join("#"), text }
    }
}

/// The problem of an empty store while the maps hold services, and what to do about it.
fn orphaned_problem(services: usize) -> String {
    let services = if services == 1 { "1 service".to_owned() } else { format!("{services} services") };
    format!(
        "the store is empty, but the maps hold {services}: lbd keeps forwarding for them, without following health and \
         drains. Start lbd with its earlier --store or --state-dir, or restore the state with \
         `lbctl store restore FILE` or `lbctl config apply FILE` (any change replaces what the maps hold). If the \
         store is meant to be empty, `lbctl store accept 0` removes the services"
    )
}

/// The problem of a VIP that is announced although nothing serves it.
fn kept_problem(vip: IpAddr, kept: KeptVip) -> String {
    let new = if kept.resets { "reset" } else { "dropped" };
    format!(
        "VIP {vip} is kept although no backend takes new flows and no other host serves it, {}: established flows continue, \
         new ones are {new} (`lbctl service set NAME --when-all-down withdraw` takes it off)",
        kept.describe(clock::unix_ms())
    )
}

/// Services that could not be brought up to date: the first ten by name, the rest as a number.
pub(super) fn not_up_to_date_problems(snapshot: &Snapshot) -> Vec<FoundProblem> {
    const NAMED: usize = 10;
    let all = &snapshot.problems;
    let named = all.iter().take(NAMED).map(|(name, problem)| {
        let text = format!("service {name} is not up to date: {}", problem.text);
        FoundProblem::about("service.not_up_to_date", name, text)
    });
    let rest = all.len().saturating_sub(NAMED);
    let more = (rest > 0).then(|| {
        let text = format!("{rest} more services are not up to date; `lbctl status -o json` names them");
        FoundProblem::about("service.not_up_to_date", "more", text)
    });
    named.chain(more).collect()
}

/// Whether anything can take a backend of the service out by itself.
pub(super) fn is_checked(service: &Service) -> bool {
    !service.health.kind.is_none() || service.replica.is_some()
}

/// The problem of backends that cannot be reached and that no check finds: there is none, or it cannot be made.
pub(super) fn unreachable_problem(backends: &[String], takes_flows: bool) -> Option<String> {
    let (first, rest) = backends.split_first()?;
    let others = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
    let flows = if takes_flows { "get new flows, because none is reachable" } else { "get no new flows" };
    Some(format!("unreachable: {first}{others}; {flows}. Fix the route or the network"))
}

/// Checks that this host cannot make, one line for each kind of obstacle.
fn not_probed_problems(all: &[NotProbedBackend]) -> impl Iterator<Item = String> {
    ObstacleKind::ALL.into_iter().filter_map(|kind| {
        let of_kind: Vec<_> = all.iter().filter(|b| b.obstacle.reason == kind).collect();
        let first = of_kind.first()?;
        let since_ms = of_kind.iter().map(|b| b.obstacle.since_ms).min()?;
        let for_s = clock::unix_ms().saturating_sub(since_ms) / 1_000;
        let others = if of_kind.len() > 1 { format!(" and {} more", of_kind.len() - 1) } else { String::new() };
        Some(format!(
            "health checks of {}/{}{others} cannot be made for {for_s} s, so their last verdicts stand: {} (to fix it: {})",
            first.service,
            first.backend,
            first.obstacle.what,
            kind.advice()
        ))
    })
}

/// The problem of backends that the ejection limit holds in although they fail their checks: the first ten by name.
pub(super) fn held_problem(service: &Name, spec: &Service, held: &[Name]) -> Option<String> {
    const NAMED: usize = 10;
    let percent = spec.max_ejection_percent.filter(|_| !held.is_empty())?;
    let named: Vec<&str> = held.iter().take(NAMED).map(Name::as_str).collect();
    let more = held.len().saturating_sub(NAMED);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    Some(format!(
        "held in although they fail their checks, in service {service}: {}{rest}; checks take out at most {percent} % of \
         the weight within {} s (--max-ejection)",
        named.join(", "),
        spec.ejection_window_s
    ))
}

/// Problems of the host as a whole.
pub(super) fn general_problems(status: &Status) -> Vec<FoundProblem> {
    let mut found = store_problems(status);
    match &status.applied.error {
        Some(error) => {
            let text = format!("revision {} is not applied: {error}", status.revision.number);
            found.push(FoundProblem::new("apply.failed", text));
        }
        None if status.applied.revision < status.revision.number => {
            let text = format!("revision {} is not applied yet", status.revision.number);
            found.push(FoundProblem::new("apply.late", text));
        }
        None => {}
    }
    if status.interfaces.is_empty() {
        found.push(FoundProblem::new("interface.none", "the program is not attached to any interface"));
    }
    found.extend(status.loaded.problems.iter().map(|text| FoundProblem::of_text("program", text.clone())));
    found.extend(announcement_problems(status));
    let names = |list: &[Name]| list.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
    if !status.no_backend.is_empty() {
        let text = format!("no backend takes new flows in: {}", names(&status.no_backend));
        found.push(FoundProblem::about("service.no_backend", names(&status.no_backend), text));
    }
    if !status.panic.is_empty() {
        let text = format!("too few backends are healthy, so health is ignored in: {}", names(&status.panic));
        found.push(FoundProblem::about("service.panic", names(&status.panic), text));
    }
    if !status.flood.is_empty() {
        let text = format!(
            "under flood: more new flows, or flows of changed slots, than may be recorded; the hash alone places new \
             flows in: {}",
            names(&status.flood)
        );
        found.push(FoundProblem::about("service.flood", names(&status.flood), text));
    }
    let not_probed = not_probed_problems(&status.not_probed);
    found.extend(not_probed.map(|text| FoundProblem::of_text("backend.not_probed", text)));
    match status.unhealthy.len() {
        0 => {}
        1 => found.push(FoundProblem::new("backend.unhealthy", "1 backend is unhealthy")),
        n => found.push(FoundProblem::new("backend.unhealthy", format!("{n} backends are unhealthy"))),
    }
    let count =
        |wanted: fn(Readiness) -> bool| status.replicas.iter().filter(|r| wanted(r.readiness)).count();
    let plural = |n: usize, what: &str| {
        if n == 1 { format!("1 replica {what}") } else { format!("{n} replicas {what}") }
    };
    for (code, n, what) in [
        ("replica.lost", count(|r| matches!(r, Readiness::Lost | Readiness::Failed)), "lost or failed"),
        ("replica.unknown", count(|r| r == Readiness::Unknown), "without a report"),
    ] {
        if n > 0 {
            found.push(FoundProblem::new(code, plural(n, what)));
        }
    }
    found
}

/// Problems of the store, and of this host's place in the fleet.
fn store_problems(status: &Status) -> Vec<FoundProblem> {
    let mut found = Vec::new();
    if status.orphaned_services > 0 {
        found.push(FoundProblem::new("store.empty", orphaned_problem(status.orphaned_services)));
    }
    let refusal = status.store.refusal();
    found.extend(refusal.map(|refusal| FoundProblem::new("store.moved", refusal.to_string())));
    if !status.store.connected {
        let for_s = clock::unix_ms().saturating_sub(status.store.since_ms) / 1_000;
        let why = status.store.problem.as_deref().unwrap_or("not connected yet");
        let number = status.revision.number;
        // A file is always within reach, but not always writable.
        let what = if status.store.engine == "redb" {
            "the store cannot be written"
        } else {
            "cut off from the store"
        };
        let text = format!("{what} for {for_s} s: forwarding by revision {number}, refusing changes: {why}");
        found.push(FoundProblem::new("store.lost", text));
    }
    if let Some(name) = &status.store.name_taken {
        let text = format!(
            "another live host is named {name} too: this host publishes nothing, so that others do not see it, until the \
             name is free: give each host a name of its own (--host)"
        );
        found.push(FoundProblem::new("host.name_taken", text));
    }
    found
}

/// Problems of the VIPs that this host announces.
fn announcement_problems(status: &Status) -> Vec<FoundProblem> {
    let mut found = Vec::new();
    if let Some(drain) = &status.host_drain {
        let by = if drain.reason.is_empty() { String::new() } else { format!(": {}", drain.reason) };
        let text = format!("this host is draining, requested by {}{by}", drain.author);
        found.push(FoundProblem::new("host.drain", text));
    }
    let Some(announcement) = &status.announcement else { return found };
    found.extend(announcement.problem.iter().map(|p| FoundProblem::new("vip.failed", format!("VIPs: {p}"))));
    let kept = announcement.kept();
    found.extend(kept.map(|(vip, kept)| FoundProblem::about("vip.kept", vip, kept_problem(vip, kept))));
    let stuck = announcement.vips.iter().filter(|v| v.on && !v.decision.is_on());
    found.extend(stuck.filter_map(|v| {
        let other = v.foreign.as_ref()?;
        let text = format!(
            "VIP {} should be off ({}), but is on {other}: lbd did not add it there and does not remove it",
            v.vip, v.decision
        );
        Some(FoundProblem::about("vip.foreign", v.vip, text))
    }));
    found
}
