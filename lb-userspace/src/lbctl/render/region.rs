//! Output about regions, policy decisions, residency and rollouts.

use super::{
    Out, Tone, ago, fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    desired::model::{RegionPolicy, RegionRules, RegionState, RolloutState, Share, percent, region_list},
    observed::regions::{Explained, RolloutShown},
    plan::policy::{
        audit::Residency,
        canary::Tally,
        region::{Agreed, Place},
    },
    printable::escape,
    serve::api::regions::Regions,
};
use std::io;

/// Formats shares: `eu 70 %, us 30 %`.
fn shares(shares: &[Share]) -> String {
    let one = |s: &Share| format!("{} {}", s.name, percent(s.permille));
    shares.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Formats the region rules of a service on one line.
pub fn rules(rules: &RegionRules) -> String {
    let mut text = rules.policy.label().to_owned();
    match &rules.allowed {
        Some(allowed) => text.push_str(&format!(", only {}", region_list(allowed))),
        None => text.push_str(", anywhere"),
    }
    match rules.policy {
        RegionPolicy::ActiveActive => text.push_str(&format!(
            ", spill from {} % of the local capacity until below {} %, at most {} %",
            rules.spill_at_percent, rules.spill_until_percent, rules.spill_most_percent
        )),
        RegionPolicy::Weighted => {
            let one = |(name, weight)| format!("{name} {weight}");
            let weights: Vec<String> = rules.weights.iter().map(one).collect();
            text.push_str(&format!(", weights {}", weights.join(", ")));
        }
        RegionPolicy::ActivePassive => {}
    }
    text
}

/// Prints `lbctl region list`.
///
/// # Errors
/// Writing failed.
pub fn regions(out: &mut Out<'_>, list: &Regions) -> io::Result<()> {
    let headings = ["REGION", "STATE", "SEEN", ">RTT", ">HOSTS", ">BACKENDS", ">READY", "VOTES"];
    let mut table = TextTable::new(&headings, out.colour);
    for r in &list.regions {
        let name = if r.is_local { format!("{} (here)", r.name) } else { r.name.to_string() };
        let state = match r.state {
            RegionState::Up => plain("up"),
            RegionState::Draining => toned("draining", Tone::Warn),
        };
        let seen = match r.agreed {
            Agreed::Up if r.votes.is_empty() => toned("-", Tone::Dim),
            Agreed::Up => toned("up", Tone::Good),
            Agreed::Hint => toned("maybe down", Tone::Warn),
            Agreed::Down => toned("down", Tone::Bad),
        };
        let vote = |v: &crate::plan::policy::region::Vote| {
            format!("{} ({}) {}", v.host, v.from, if v.is_up { "up" } else { "down" })
        };
        table.row([
            toned(name, Tone::Strong),
            state,
            seen,
            plain(r.rtt_us.map_or_else(|| "-".to_owned(), |us| units::micros(us.into()))),
            plain(r.hosts),
            plain(r.backends),
            plain(r.ready),
            plain(r.votes.iter().map(vote).collect::<Vec<_>>().join(", ")),
        ]);
    }
    table.print(out)
}

fn places(out: &mut Out<'_>, heading: &str, list: &[Place], weights: &[Share]) -> io::Result<()> {
    let headings = [heading, "SHARE", ">BACKENDS", ">CAPACITY", ">LOAD", ">FREE", ">RTT", "NOTE"];
    let mut table = TextTable::new(&headings, out.colour);
    for p in list {
        let name = if p.is_local { format!("{} (here)", p.name) } else { p.name.to_string() };
        let share = weights.iter().find(|s| s.name == p.name).map_or(0, |s| s.permille);
        let free = p.capacity.map(|c| i128::from(c) - i128::from(p.load));
        let notes: Vec<&str> = [
            (!p.is_allowed, "not allowed (residency)"),
            (p.is_draining, "draining"),
            (p.is_down, "down, as other hosts agree"),
            (p.is_spilling, "spills its own flows"),
            (p.lacks_version, "lacks the new version"),
            (p.is_stale, "stale report"),
        ]
        .into_iter()
        .filter_map(|(holds, note)| holds.then_some(note))
        .collect();
        let dash = || "-".to_owned();
        table.row([
            toned(name, Tone::Strong),
            plain(percent(share)),
            plain(p.backends),
            plain(p.capacity.map_or_else(dash, |c| c.to_string())),
            plain(p.load),
            plain(free.map_or_else(dash, |f| f.to_string())),
            plain(p.rtt_us.map_or_else(dash, |us| units::micros(us.into()))),
            plain(notes.join(", ")),
        ]);
    }
    table.print(out)
}

/// Prints `lbctl policy explain`: every input and the decision.
///
/// # Errors
/// Writing failed.
pub fn explained(out: &mut Out<'_>, e: &Explained) -> io::Result<()> {
    let allowed =
        e.allowed.as_ref().map_or_else(|| "anywhere".to_owned(), |a| format!("only {}", region_list(a)));
    let decision =
        if e.steer.shares.is_empty() { "new flows are refused".to_owned() } else { shares(&e.steer.shares) };
    let demand = e.decision.spill.demand;
    let mut pairs = vec![
        ("service", e.service.to_string()),
        ("here", format!("region {}, zone {}", e.region, e.zone)),
        ("policy", e.policy.label().to_owned()),
        ("residency", allowed),
        ("decision", decision),
        ("why", e.decision.reason.clone()),
        ("decided by", e.decided_by.clone()),
        (
            "fallback order",
            if e.steer.order.is_empty() { "none".to_owned() } else { region_list(&e.steer.order) },
        ),
    ];
    if demand > 0 {
        pairs.insert(6, ("demand", format!("{demand} slots would be busy here without the spill")));
    }
    if !e.steer.zones.is_empty() {
        pairs.push(("zones", shares(&e.steer.zones)));
    }
    if let Some(rollout) = &e.rollout {
        pairs.push(("rollout", rollout_text(rollout)));
        let canaries = e.steer.canary.iter().flat_map(|c| &c.backends);
        pairs.push((
            "new version on",
            match region_list(canaries) {
                names if names.is_empty() => "no backend".to_owned(),
                names => names,
            },
        ));
    }
    pairs.extend(e.notes.iter().map(|note| ("note", note.clone())));
    fields(out, &pairs)?;
    out.line("")?;
    places(out, "REGION", &e.regions, &e.steer.shares)?;
    if e.zones.len() > 1 {
        out.line("")?;
        places(out, "ZONE", &e.zones, &e.steer.zones)?;
    }
    Ok(())
}

/// Prints `lbctl audit residency`.
///
/// # Errors
/// Writing failed.
pub fn residency(out: &mut Out<'_>, list: &[Residency]) -> io::Result<()> {
    let mut table = TextTable::new(&["SERVICE", "ALLOWED", "BACKENDS (READY)", "FINDINGS"], out.colour);
    for r in list {
        let places: Vec<String> = r
            .places
            .iter()
            .map(|home| {
                let region = home.region.as_ref().map_or("no region", |name| name.as_str());
                let not = if home.is_allowed { "" } else { ", not allowed" };
                format!("{region} {} ({}{not})", home.backends, home.ready)
            })
            .collect();
        let findings = match r.findings.is_empty() {
            true => toned("none", Tone::Good),
            false => toned(r.findings.join("; "), Tone::Bad),
        };
        table.row([
            toned(&r.service, Tone::Strong),
            plain(r.allowed.as_ref().map_or_else(|| "any".to_owned(), region_list)),
            plain(places.join(", ")),
            findings,
        ]);
    }
    table.print(out)
}

fn rollout_text(r: &RolloutShown) -> String {
    let (title, scope) = (r.rollout.title(), r.rollout.scope());
    format!("{title}, {} at {scope}: {}; {}", r.rollout.state.label(), r.verdict, r.coverage.text)
}

fn tally(t: &Tally) -> String {
    let latency = t.latency_ms().map_or_else(String::new, |ms| format!(", {ms:.0} ms"));
    format!("{} replicas, {} requests, {:.1} % failed{latency}", t.replicas, t.finished, t.errors_percent())
}

/// Prints the rollouts of `lbctl rollout status`.
///
/// # Errors
/// Writing failed.
pub fn rollouts(out: &mut Out<'_>, list: &[RolloutShown]) -> io::Result<()> {
    let headings = ["SERVICE", "~MODEL", "VERSION", "STATE", ">SHARE", "~SINCE", "~NEW", "~OLD"];
    let mut table = TextTable::new(&headings, out.colour);
    for r in list {
        let state = match r.rollout.state {
            RolloutState::Running => toned("running", Tone::Warn),
            RolloutState::Promoted => toned("promoted", Tone::Good),
            RolloutState::Aborted => toned("aborted", Tone::Bad),
        };
        table.row([
            toned(&r.service, Tone::Strong),
            plain(&r.rollout.model),
            plain(&r.rollout.version),
            state,
            plain(percent(r.rollout.share())),
            plain(ago(r.rollout.since_ms)),
            plain(tally(&r.new)),
            plain(tally(&r.old)),
        ]);
    }
    table.print(out)?;
    for r in list {
        let verdict = if r.rollout.reason.is_empty() { &r.verdict } else { &r.rollout.reason };
        out.line(format!("{}: {}; {}", r.service, escape(verdict), escape(&r.coverage.text)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_roll_out_fits_eighty_columns_and_says_where_the_version_runs() {
        let tally = json!({"replicas": 2, "counting": 2, "finished": 100, "failed": 1, "first_token_ms": 5000.0,
            "first_tokens": 100});
        let shown: RolloutShown = serde_json::from_value(json!({"service": "chat-completions", "model": "llama-8b",
            "version": "2026-11-29", "permille": 50, "state": "promoted", "since_ms": 1, "reason": "by ann",
            "new": tally, "old": tally, "verdict": "v",
            "coverage": {"text": "2026-11-29 in 2 of 3 regions; north still serves 2026-11-01", "with": 2, "of": 3,
                "regions": []}}))
        .unwrap();
        let mut written = Vec::new();
        let mut out = Out::new(&mut written, false, false).with_width(Some(80));
        rollouts(&mut out, &[shown]).unwrap();
        let text = String::from_utf8(written).unwrap();
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(
            lines[2..].join(" "),
            "chat-completions: by ann; 2026-11-29 in 2 of 3 regions; north still serves 2026-11-01"
        );
        assert!(text.contains("promoted") && text.contains("100 %"), "{text}");
    }
}
