//! Services, backends, status, counters, flows and explanations as text.

use super::{
    Out, Tone,
    table::{Table, plain, toned},
    units,
};
use crate::{
    clock,
    desired::{
        model::{BackendState, Health, HealthKind, Readiness, ReplicaSource, Service},
        store::Revision,
    },
    serve::api::types::*,
};
use std::{io, net::IpAddr};

/// Formats a VIP with its ports: `10.0.0.1:80`, `[fd00::1]:any`.
fn vip(service: &Service) -> String {
    match service.vip {
        IpAddr::V4(v4) => format!("{v4}:{}", service.port),
        IpAddr::V6(v6) => format!("[{v6}]:{}", service.port),
    }
}

fn mode(service: &Service) -> String {
    format!("{:?}", service.mode).to_lowercase()
}

fn health_tone(health: Health) -> (String, Option<Tone>) {
    match health {
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

/// Time since a moment in milliseconds since 1970; `-` if there is none (0).
pub(super) fn ago(ms: u64) -> String {
    let now = clock::unix_ms();
    if ms == 0 { "-".to_owned() } else { units::span(now.saturating_sub(ms) / 1_000) }
}

fn drain(drain: &Drain) -> String {
    let flows = format!("{} flows left", drain.flows_left);
    if drain.deadline_s == 0 {
        format!("{flows}, drain time is over")
    } else {
        format!("{flows}, ends in {}", units::span(drain.deadline_s))
    }
}

/// Prints a table of services.
///
/// # Errors
/// Writing failed.
pub fn services(out: &mut Out<'_>, list: &[ServiceInfo]) -> io::Result<()> {
    let headings =
        ["NAME", "VIP", "PROTOCOL", "MODE", "HEALTH", "BACKENDS", ">SLOTS", ">FLOWS", ">PACKETS", ">BYTES"];
    let mut table = Table::new(&headings, out.colour);
    for s in list {
        let (eligible, all) = (s.status.eligible, s.spec.backends.len());
        let backends = format!("{eligible}/{all}");
        let tone = if eligible == 0 {
            Tone::Bad
        } else if eligible < all {
            Tone::Warn
        } else {
            Tone::Good
        };
        table.row([
            toned(&s.name, Tone::Strong),
            plain(vip(&s.spec)),
            plain(s.spec.protocol),
            plain(mode(&s.spec)),
            plain(s.spec.health.kind.label()),
            toned(backends, tone),
            plain(s.status.table_size),
            plain(s.status.flows),
            plain(s.status.packets),
            plain(units::bytes(s.status.bytes)),
        ]);
    }
    table.print(out)
}

/// Prints one service in full.
///
/// # Errors
/// Writing failed.
pub fn service(out: &mut Out<'_>, s: &ServiceInfo, backends: &[BackendInfo]) -> io::Result<()> {
    let health = &s.spec.health;
    let check = match &health.kind {
        HealthKind::None => "none".to_owned(),
        kind => {
            let port = health.port.map_or_else(|| "the service's port".to_owned(), |p| format!("port {p}"));
            let what = match kind {
                HealthKind::Http(http) => {
                    let (a, b) = http.status;
                    let body =
                        http.body.as_ref().map_or(String::new(), |text| format!(", body contains {text:?}"));
                    format!("{} {} (status {a} to {b}{body})", kind.label(), http.path)
                }
                HealthKind::Grpc(grpc) if !grpc.service.is_empty() => {
                    format!("{} service {}", kind.label(), grpc.service)
                }
                other => other.label().to_owned(),
            };
            format!(
                "{what} on {port}, every {} ms ±{} %, timeout {} ms, rise {}, fall {}",
                health.interval_ms, health.jitter_percent, health.timeout_ms, health.rise, health.fall
            )
        }
    };
    let mut pairs = vec![
        ("service", s.name.to_string()),
        ("vip", format!("{} {}", vip(&s.spec), s.spec.protocol)),
        ("mode", mode(&s.spec)),
        ("scheduler", scheduler(&s.spec)),
        ("health check", check),
        ("drain time", units::span(s.spec.drain_s.into())),
        ("on down", format!("{:?} established flows", s.spec.on_down).to_lowercase()),
        ("table", format!("{} slots, {} in transition", s.status.table_size, s.status.transition_slots)),
        ("eligible", format!("{} of {} backends", s.status.eligible, s.spec.backends.len())),
        ("forwarded", format!("{} packets, {}", s.status.packets, units::bytes(s.status.bytes))),
        ("new flows", s.status.flows.to_string()),
    ];
    if let Some(vip) = &s.status.vip {
        pairs.insert(2, ("announced", super::host::vip_state(vip)));
    }
    if s.spec.has_second_chance() {
        pairs.push(("second chance", "packets name the other backends that may have their flow".to_owned()));
    }
    if s.spec.slow_start_s > 0 {
        pairs.push(("slow start", units::span(s.spec.slow_start_s.into())));
    }
    if let Some(rate) = s.spec.new_flow_rate {
        let burst = rate.burst(s.spec.new_flow_burst);
        pairs.push(("new flow limit", format!("{rate}, burst {burst}")));
    }
    if let Some(rate) = s.spec.source_rate {
        let (burst, v4, v6) =
            (rate.burst(s.spec.source_burst), s.spec.source_prefix_v4, s.spec.source_prefix_v6);
        pairs.push(("source limit", format!("{rate}, burst {burst}; a source is a /{v4} or a /{v6}")));
    }
    if let Some(source) = &s.spec.replica {
        pairs.push(("replica state", replica_source(source)));
    }
    if let Some(rules) = &s.spec.regions {
        pairs.push(("regions", super::region::rules(rules)));
    }
    if s.spec.panic_percent > 0 {
        let holds = if s.status.panic { ", active now" } else { "" };
        pairs.push(("panic rule", format!("below {} % healthy{holds}", s.spec.panic_percent)));
    }
    fields(out, &pairs)?;
    out.line("")?;
    self::backends(out, backends)
}

/// Formats a service's scheduler as the configuration spells it, with its load cap.
fn scheduler(spec: &Service) -> String {
    let word = serde_json::to_value(spec.scheduler).ok().and_then(|v| v.as_str().map(str::to_owned));
    let cap = spec.load_cap.map_or_else(String::new, |cap| format!(", up to {cap} flows of load"));
    word.unwrap_or_default() + &cap
}

fn replica_source(source: &ReplicaSource) -> String {
    let port = source.port.map_or_else(|| "the service's port".to_owned(), |p| format!("port {p}"));
    let (kind, path) = (source.kind.label(), source.path());
    let mut text =
        format!("{kind} {path} on {port}, every {} ms, timeout {} ms", source.interval_ms, source.timeout_ms);
    for (quantity, selector) in &source.metrics {
        text.push_str(&format!(", {} is {selector}", quantity.label()));
    }
    text
}

/// Prints aligned `name: value` lines.
pub(super) fn fields(out: &mut Out<'_>, pairs: &[(&str, String)]) -> io::Result<()> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    for (name, value) in pairs {
        let label = format!("{:<width$}", format!("{name}:"));
        out.line(format!("{} {value}", out.paint(Tone::Strong, &label)))?;
    }
    Ok(())
}

/// Prints a table of backends.
///
/// # Errors
/// Writing failed.
pub fn backends(out: &mut Out<'_>, list: &[BackendInfo]) -> io::Result<()> {
    let headings = [
        "SERVICE", "NAME", "ADDRESS", ">WEIGHT", "STATE", "HEALTH", ">SLOTS", ">SHARE", ">FLOWS", ">PACKETS",
        ">BYTES", "SINCE", "NOTE",
    ];
    let mut table = Table::new(&headings, out.colour);
    for b in list {
        let readiness = b.status.replica.as_ref().map(|r| r.readiness);
        let note = match (&b.status.drain, &b.status.last_probe, readiness) {
            _ if b.status.excluded.is_some() => b.status.excluded.clone().unwrap_or_default(),
            (Some(progress), ..) => drain(progress),
            (None, _, Some(readiness)) if readiness.declines() => format!("replica reports {readiness}"),
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
            health_tone(b.status.health),
            plain(b.status.slots),
            plain(units::share(b.status.slots, b.status.table_size)),
            plain(b.status.flows),
            plain(b.status.packets),
            plain(units::bytes(b.status.bytes)),
            plain(ago(b.status.health_since_ms)),
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
    let health = health_tone(s.health).0;
    let mut pairs = vec![
        ("backend", format!("{}/{}", b.service, b.name)),
        ("address", b.spec.address.to_string()),
        ("weight", b.spec.weight.to_string()),
        ("state", state_tone(b.spec.state).0),
        (
            "health",
            if s.health_since_ms > 0 { format!("{health} for {}", ago(s.health_since_ms)) } else { health },
        ),
    ];
    if let Some(needed) = s.damped {
        pairs.push(("flapping", format!("needs {needed} consecutive successful probes to be healthy again")));
    }
    if let Some(percent) = s.slow_start_percent {
        pairs.push(("slow start", format!("at {percent} % of its weight")));
    }
    if let Some(probe) = &s.last_probe {
        let word = if probe.ok { "passed" } else { "failed" };
        let took = units::micros(probe.took_us);
        pairs.push(("last probe", format!("{word} {} ago: {} ({took})", ago(probe.time_ms), probe.reason)));
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
    let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    pairs.push((
        "next hop",
        match &s.next_hop {
            Some(hop) => {
                let vlan = if hop.vlan > 0 { format!(", VLAN {}", hop.vlan) } else { String::new() };
                format!("{} by interface {}{vlan}, MTU {}", mac(hop.next_hop), hop.ifindex, hop.mtu)
            }
            None => "not resolved: each packet is routed by a kernel lookup".to_owned(),
        },
    ));
    fields(out, &pairs)?;
    if !s.history.is_empty() {
        out.line("")?;
        let mut table = Table::new(&["TIME", "FROM", "TO", "REASON"], out.colour);
        for t in &s.history {
            table.row([
                plain(units::time(t.time_ms)),
                health_tone(t.from),
                health_tone(t.to),
                plain(&t.reason),
            ]);
        }
        table.print(out)?;
    }
    if let Some(replica) = s.replica.as_ref().filter(|r| !r.history.is_empty()) {
        out.line("")?;
        super::replica::history(out, replica)?;
    }
    Ok(())
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

/// Formats the store's engine, its location, and whether lbd is connected to it.
fn store(link: &crate::desired::store::Link) -> String {
    let word = if link.connected { "connected" } else { "disconnected" };
    format!("{} at {}, {word} for {}", link.engine, link.place, ago(link.since_ms))
}

/// Prints `lbctl status`.
///
/// # Errors
/// Writing failed.
pub fn status(out: &mut Out<'_>, s: &Status) -> io::Result<()> {
    let verdict =
        if s.healthy { out.paint(Tone::Good, "healthy") } else { out.paint(Tone::Bad, "unhealthy") };
    out.line(format!(
        "lbd {} (ABI {}, pid {}, up {}): {verdict}",
        s.version,
        s.abi,
        s.pid,
        units::span(s.uptime_s)
    ))?;
    for problem in &s.problems {
        out.line(out.paint(Tone::Bad, &format!("  ! {problem}")))?;
    }
    let r = &s.revision;
    let by = if r.number == 0 {
        "empty, nothing has been configured yet".to_owned()
    } else {
        format!("by {}, {}: {}", r.author, units::time(r.time_ms), r.message)
    };
    let interfaces: Vec<String> =
        s.interfaces.iter().map(|i| format!("{} ({} XDP)", i.name, i.mode)).collect();
    let waiting = s.loaded.waiting.iter().map(|w| format!("{} (not attached)", w.name));
    let interfaces: Vec<String> = interfaces.into_iter().chain(waiting).collect();
    let generic =
        s.interfaces.iter().filter_map(|i| Some(format!("{}: {}", i.name, i.why_generic.as_ref()?)));
    let generic: Vec<String> = generic.collect();
    let left_out = s.loaded.left_out.iter().map(|l| format!("{} ({})", l.feature, l.reason));
    let left_out: Vec<String> = left_out.collect();
    let b = &s.backends;
    let applied = &s.applied;
    let took = units::micros(applied.took_us);
    let mut pairs = vec![
        ("interfaces", if interfaces.is_empty() { "none".to_owned() } else { interfaces.join(", ") }),
        ("store", store(&s.store)),
        ("revision", format!("{} {by}", r.number)),
        ("applied", format!("{} in {took}, {} slots changed", applied.revision, applied.slots_changed)),
        ("services", s.services.to_string()),
        (
            "backends",
            format!(
                "{}: {} healthy, {} unhealthy, {} unknown; {} draining, {} down",
                b.total, b.healthy, b.unhealthy, b.unknown, b.draining, b.down
            ),
        ),
    ];
    if !left_out.is_empty() {
        pairs.insert(1, ("left out", left_out.join("; ")));
    }
    if !generic.is_empty() {
        pairs.insert(1, ("generic", generic.join("; ")));
    }
    if let Some(announcement) = &s.announcement {
        pairs.insert(1, ("announces", super::host::summary(announcement)));
    }
    let room: Vec<String> = s.room.iter().map(|r| format!("{} {}/{}", r.what, r.used, r.limit)).collect();
    if !room.is_empty() {
        pairs.push(("room", room.join(", ")));
    }
    if !s.unresolved.is_empty() {
        let names: Vec<String> = s.unresolved.iter().take(5).map(ToString::to_string).collect();
        let more = if s.unresolved.len() > 5 { ", ..." } else { "" };
        pairs.push(("no next hop", format!("{}: {}{more}", s.unresolved.len(), names.join(", "))));
    }
    fields(out, &pairs)?;
    if !s.unhealthy.is_empty() {
        out.line("")?;
        let mut table = Table::new(&["UNHEALTHY", "SINCE", "REASON"], out.colour);
        for u in &s.unhealthy {
            let name = format!("{}/{}", u.service, u.backend);
            table.row([toned(name, Tone::Bad), plain(ago(u.since_ms)), plain(&u.reason)]);
        }
        table.print(out)?;
    }
    if !s.draining.is_empty() {
        out.line("")?;
        let mut table = Table::new(&["DRAINING", "PROGRESS"], out.colour);
        for d in &s.draining {
            table.row([toned(format!("{}/{}", d.service, d.backend), Tone::Warn), plain(drain(&d.drain))]);
        }
        table.print(out)?;
    }
    if !s.replicas.is_empty() {
        out.line("")?;
        super::replica::not_ready(out, &s.replicas)?;
    }
    let notable: Vec<&ReasonCount> =
        s.reasons.iter().filter(|r| matches!(r.fate.as_str(), "drop" | "answer")).collect();
    if !notable.is_empty() {
        out.line("")?;
        reasons(out, "DROPPED OR ANSWERED", notable.into_iter())?;
    }
    Ok(())
}

fn reasons<'a>(
    out: &mut Out<'_>,
    title: &str,
    list: impl Iterator<Item = &'a ReasonCount>,
) -> io::Result<()> {
    let mut table = Table::new(&[title, ">PACKETS", "FATE", "MEANING"], out.colour);
    for r in list {
        let tone = match r.fate.as_str() {
            "drop" => Some(Tone::Bad),
            "answer" => Some(Tone::Warn),
            _ => None,
        };
        table.row([(r.reason.clone(), tone), plain(r.packets), plain(&r.fate), plain(&r.about)]);
    }
    table.print(out)
}

/// Prints `lbctl stats`; with an earlier reading, also rates since then.
///
/// # Errors
/// Writing failed.
pub fn stats(out: &mut Out<'_>, now: &Stats, before: Option<&Stats>) -> io::Result<()> {
    let seconds = before.map(|b| (now.time_ms.saturating_sub(b.time_ms) as f64 / 1_000.0).max(0.001));
    let mut headings = vec!["SERVICE", "BACKEND", ">FLOWS", ">PACKETS", ">BYTES"];
    if seconds.is_some() {
        headings.extend([">FLOWS/S", ">PACKETS/S", ">RATE"]);
    }
    let mut table = Table::new(&headings, out.colour);
    for b in &now.backends {
        let mut row = vec![
            plain(&b.service),
            toned(&b.backend, Tone::Strong),
            plain(b.flows),
            plain(b.packets),
            plain(units::bytes(b.bytes)),
        ];
        if let (Some(before), Some(seconds)) = (before, seconds) {
            let old = before.backends.iter().find(|o| o.service == b.service && o.backend == b.backend);
            let per_s = |new: u64, old: Option<u64>| new.saturating_sub(old.unwrap_or(0)) as f64 / seconds;
            row.push(plain(units::rate(per_s(b.flows, old.map(|o| o.flows)))));
            row.push(plain(units::rate(per_s(b.packets, old.map(|o| o.packets)))));
            row.push(plain(units::bit_rate(per_s(b.bytes, old.map(|o| o.bytes)))));
        }
        table.row(row);
    }
    table.print(out)?;
    if now.reasons.is_empty() {
        return Ok(());
    }
    out.line("")?;
    reasons(out, "REASON", now.reasons.iter())
}

/// Prints `lbctl flows`.
///
/// # Errors
/// Writing failed.
pub fn flows(out: &mut Out<'_>, list: &Flows) -> io::Result<()> {
    let headings = ["TABLE", "CLIENT", ">PORT", "SERVICE", "BACKEND", ">AGE", ">IDLE", "STATE"];
    let mut table = Table::new(&headings, out.colour);
    for f in &list.flows {
        table.row([
            plain(&f.table),
            plain(f.client),
            plain(f.port),
            plain(&f.service),
            plain(&f.backend),
            plain(units::span(f.age_s.into())),
            plain(units::span(f.idle_s.into())),
            plain(if f.closing { "closing" } else { "open" }),
        ]);
    }
    table.print(out)
}

/// Prints `lbctl explain`.
///
/// # Errors
/// Writing failed.
pub fn explanation(out: &mut Out<'_>, e: &Explanation) -> io::Result<()> {
    for (i, step) in e.steps.iter().enumerate() {
        out.line(format!("{:>2}. {step}", i + 1))?;
    }
    for answer in &e.answers {
        let line = match &answer.backend {
            Some(b) => {
                let name = b.name.as_deref().unwrap_or("a removed backend");
                out.paint(Tone::Good, &format!("{} goes to {name} ({})", answer.packet, b.address))
            }
            None => out.paint(Tone::Bad, &format!("{} is not forwarded: {}", answer.packet, answer.why)),
        };
        out.line(format!("=> {line}"))?;
    }
    if e.answers.is_empty() {
        out.line(format!("=> {}", out.paint(Tone::Bad, "not forwarded")))?;
    }
    Ok(())
}

/// Prints `lbctl history`.
///
/// # Errors
/// Writing failed.
pub fn history(out: &mut Out<'_>, list: &[Revision]) -> io::Result<()> {
    let mut table = Table::new(&[">REVISION", "TIME", "AUTHOR", "CHANGE"], out.colour);
    for r in list {
        table.row([
            toned(r.number, Tone::Strong),
            plain(units::time(r.time_ms)),
            plain(&r.author),
            plain(&r.message),
        ]);
    }
    table.print(out)
}
