//! Output of `lbctl backend`.

use super::{
    Out, Tone, ago, fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    desired::model::{BackendState, Health, Readiness},
    observed::health::NotProbed,
    serve::api::types::{BackendInfo, BackendStatus, Drain},
};
use std::io;

/// The verdict on a backend, or what is known without one.
fn health_tone(status: &BackendStatus) -> (String, Option<Tone>) {
    match status.health {
        Health::Healthy
            if (status.unchecked || status.not_probed.is_some()) && status.unreachable.is_some() =>
        {
            toned("unreachable", Tone::Bad)
        }
        Health::Healthy if status.busy_since_ms.is_some() => toned("busy", Tone::Warn),
        Health::Healthy if status.unchecked => toned("unchecked", Tone::Dim),
        verdict => verdict_tone(verdict),
    }
}

/// Start of what the HEALTH column says.
fn since_ms(status: &BackendStatus) -> u64 {
    status.busy_since_ms.unwrap_or(status.health_since_ms)
}

fn verdict_tone(verdict: Health) -> (String, Option<Tone>) {
    match verdict {
        Health::Healthy => toned("healthy", Tone::Good),
        Health::Unhealthy => toned("unhealthy", Tone::Bad),
        Health::Unknown => toned("unknown", Tone::Warn),
    }
}

fn state_tone(state: BackendState) -> (String, Option<Tone>) {
    match state {
        BackendState::Up => plain("up"),
        BackendState::Draining => toned("draining", Tone::Warn),
        BackendState::Down => toned("down", Tone::Dim),
    }
}

/// Formats the progress of a drain.
pub(super) fn drain(drain: &Drain) -> String {
    let flows = format!("{} tracked flows left", drain.flows_left);
    if drain.deadline_s == 0 {
        format!("{flows}, drain time is over")
    } else {
        format!("{flows}, ends in {}", units::span(drain.deadline_s))
    }
}

/// Why checks cannot be made, and since when.
fn not_probed(obstacle: &NotProbed) -> String {
    format!("not probed for {}, the last verdict stands: {}", ago(obstacle.since_ms), obstacle.what)
}

/// Prints a table of backends.
///
/// # Errors
/// Writing failed.
pub fn backends(out: &mut Out<'_>, list: &[BackendInfo]) -> io::Result<()> {
    let headings = [
        "SERVICE",
        "NAME",
        "ADDRESS",
        "~>WEIGHT",
        "STATE",
        "HEALTH",
        "~>SLOTS",
        ">SHARE",
        ">NEW FLOWS",
        "~>PACKETS",
        "~>BYTES",
        "~SINCE",
        "NOTE",
    ];
    let mut table = TextTable::new(&headings, out.colour);
    for b in list {
        let readiness = b.status.replica.as_ref().map(|r| r.readiness);
        let note = match (&b.status.drain, &b.status.last_probe, readiness) {
            _ if b.status.excluded.is_some() => b.status.excluded.clone().unwrap_or_default(),
            (Some(progress), ..) => drain(progress),
            (None, _, Some(readiness)) if readiness.declines() => format!("replica reports {readiness}"),
            (None, Some(probe), _) if b.status.held => {
                format!("held in by the ejection limit: {}", probe.reason)
            }
            _ if b.status.not_probed.is_some() => {
                b.status.not_probed.as_ref().map(not_probed).unwrap_or_default()
            }
            (None, Some(probe), _) if !probe.ok => probe.reason.clone(),
            (None, _, Some(Readiness::Lost)) => "replica lost".to_owned(),
            _ => String::new(),
        };
        table.row([
            plain(&b.service),
            toned(&b.name, Tone::Strong),
            plain(b.spec.address),
            plain(b.spec.weight),
            state_tone(b.spec.state),
            health_tone(&b.status),
            plain(b.status.slots),
            plain(units::share(b.status.slots, b.status.table_size)),
            plain(b.status.flows),
            plain(b.status.packets),
            plain(units::bytes(b.status.bytes)),
            plain(ago(since_ms(&b.status))),
            plain(note),
        ]);
    }
    table.print(out)
}

/// Prints one backend in full.
///
/// # Errors
/// Writing failed.
pub fn backend(out: &mut Out<'_>, b: &BackendInfo) -> io::Result<()> {
    let s = &b.status;
    let health = health_tone(s).0;
    let mut pairs = vec![
        ("backend", format!("{}/{}", b.service, b.name)),
        ("address", b.spec.address.to_string()),
        ("weight", b.spec.weight.to_string()),
        ("state", state_tone(b.spec.state).0),
        ("health", if since_ms(s) > 0 { format!("{health} for {}", ago(since_ms(s))) } else { health }),
    ];
    if let Some(needed) = s.damped {
        pairs.push(("flapping", format!("needs {needed} consecutive successful probes to be healthy again")));
    }
    if s.held {
        pairs.push(("ejection", "held in by the limit although it fails its checks".to_owned()));
    }
    if let Some(percent) = s.slow_start_percent {
        pairs.push(("slow start", format!("at {percent} % of its weight")));
    }
    if let Some(probe) = &s.last_probe {
        let word = match (probe.ok, probe.late) {
            (true, false) => "passed",
            (true, true) => "passed late",
            (false, true) if s.health == Health::Healthy => "late",
            (false, _) => "failed",
        };
        let took = units::micros(probe.took_us);
        pairs.push(("last probe", format!("{word} {} ago: {} ({took})", ago(probe.time_ms), probe.reason)));
    }
    if let Some(obstacle) = &s.not_probed {
        pairs.push(("checks", not_probed(obstacle)));
    }
    if let Some(report) = &s.signs {
        pairs.push(("passive checks", passive(report)));
    }
    if let Some(progress) = &s.drain {
        pairs.push(("drain", drain(progress)));
    }
    pairs.extend(s.replica.iter().flat_map(super::replica::lines));
    pairs.push((
        "slots",
        format!("{} of {} ({})", s.slots, s.table_size, units::share(s.slots, s.table_size)),
    ));
    pairs.push(("forwarded", format!("{} packets, {}", s.packets, units::bytes(s.bytes))));
    pairs.push(("new flows", s.flows.to_string()));
    if let Some(problem) = &s.problem {
        pairs.push(("problem", problem.clone()));
    }
    if let Some(region) = &b.spec.region {
        let zone = b.spec.zone.as_ref().map_or_else(String::new, |zone| format!(", zone {zone}"));
        pairs.push(("region", format!("{region}{zone}")));
    }
    if let Some(why) = &s.excluded {
        pairs.push(("excluded", why.clone()));
    }
    pairs.push(("next hop", next_hop(s)));
    fields(out, &pairs)?;
    if !s.history.is_empty() {
        out.line("")?;
        health_history(out, s)?;
    }
    if let Some(replica) = s.replica.as_ref().filter(|r| !r.history.is_empty()) {
        out.line("")?;
        super::replica::history(out, replica)?;
    }
    Ok(())
}

/// Formats the next hop towards a backend.
fn next_hop(s: &BackendStatus) -> String {
    let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    match (&s.next_hop, &s.unreachable) {
        (Some(hop), _) => {
            let vlan = if hop.vlan > 0 { format!(", VLAN {}", hop.vlan) } else { String::new() };
            let ifindex = hop.ifindex;
            let interface = s
                .interface
                .as_ref()
                .map_or_else(|| format!("interface {ifindex}"), |name| format!("{name} (ifindex {ifindex})"));
            format!("{} on {interface}{vlan}, MTU {}", mac(hop.next_hop), hop.mtu)
        }
        (None, Some(why)) => format!("none: {why}"),
        (None, None) => "not resolved: each packet is routed by a kernel lookup".to_owned(),
    }
}

/// Prints the changes of a backend's health.
fn health_history(out: &mut Out<'_>, s: &BackendStatus) -> io::Result<()> {
    let mut table = TextTable::new(&["TIME", "FROM", "TO", "REASON"], out.colour);
    for t in &s.history {
        table.row([
            plain(units::time(t.time_ms)),
            verdict_tone(t.from),
            verdict_tone(t.to),
            plain(&t.reason),
        ]);
    }
    table.print(out)
}

/// Formats the passive health checks of a backend: failures seen in traffic, and the early probes they triggered.
fn passive(report: &crate::observed::health::PassiveReport) -> String {
    let mut text = format!("{} unreachable, {} refused", report.unreachable, report.refused);
    if let Some(last) = &report.last {
        let (times, refuted) = (report.early, report.refuted);
        text += &format!(
            "; {times} early probes ({refuted} found it healthy), last {} ago: {}",
            ago(last.time_ms),
            last.what
        );
    }
    text
}
