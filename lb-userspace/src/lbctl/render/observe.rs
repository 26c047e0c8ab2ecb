//! Output of `lbctl status`, `stats`, `flows`, `explain` and `history`.

use super::{
    Out, Tone, ago,
    backend::drain,
    fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    desired::store::Revision,
    printable::escape,
    serve::api::{events::EventRecord, types::*},
};
use std::io;

/// Formats the store's engine, its location, and whether lbd is connected to it.
fn store(link: &crate::desired::store::StoreLink) -> String {
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
    fields(out, &status_fields(s))?;
    checked(out, "UNHEALTHY", Tone::Bad, &s.unhealthy)?;
    checked(out, "BUSY", Tone::Warn, &s.busy)?;
    if !s.draining.is_empty() {
        out.line("")?;
        let mut table = TextTable::new(&["DRAINING", "PROGRESS"], out.colour);
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

/// Prints backends that failed their checks, or answer them late.
fn checked(out: &mut Out<'_>, heading: &str, tone: Tone, all: &[CheckedBackend]) -> io::Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let mut table = TextTable::new(&[heading, "SINCE", "REASON"], out.colour);
    for b in all {
        let name = format!("{}/{}", b.service, b.backend);
        table.row([toned(name, tone), plain(ago(b.since_ms)), plain(&b.reason)]);
    }
    table.print(out)
}

/// Formats the fields of `lbctl status`.
fn status_fields(s: &Status) -> Vec<(&'static str, String)> {
    let r = &s.revision;
    let by = if r.number == 0 {
        "empty, nothing has been configured yet".to_owned()
    } else {
        let reason = r.reason().map(|reason| format!(" ({reason})")).unwrap_or_default();
        format!("by {}, {}: {}{reason}", r.author, units::time(r.time_ms), r.change())
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
                "{}: {} healthy, {} busy, {} unhealthy, {} unknown, {} unchecked; {} draining, {} down",
                b.total, b.healthy, b.busy, b.unhealthy, b.unknown, b.unchecked, b.draining, b.down
            ),
        ),
    ];
    if let Some(why) = &s.checks_without_tunnel {
        pairs.push(("health checks", format!("direct, because they cannot take the tunnel: {why}")));
    }
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
        pairs.push(("capacity", room.join(", ")));
    }
    if !s.unresolved.is_empty() {
        pairs.push(("no next hop", format!("{}: {}", s.unresolved.len(), first_few(&s.unresolved))));
    }
    if !s.narrow_paths.is_empty() {
        pairs.push(("path MTU", format!("{} (a router said so)", first_few(&s.narrow_paths))));
    }
    pairs
}

/// The first five of a list.
fn first_few(list: &[impl ToString]) -> String {
    let names: Vec<String> = list.iter().take(5).map(ToString::to_string).collect();
    format!("{}{}", names.join(", "), if list.len() > names.len() { ", ..." } else { "" })
}

fn reasons<'a>(
    out: &mut Out<'_>,
    title: &str,
    list: impl Iterator<Item = &'a ReasonCount>,
) -> io::Result<()> {
    let mut table = TextTable::new(&[title, ">PACKETS", "FATE", "MEANING"], out.colour);
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
    let mut headings = vec!["SERVICE", "BACKEND", ">NEW FLOWS", ">PACKETS", ">BYTES"];
    if seconds.is_some() {
        headings.extend([">FLOWS/S", ">PACKETS/S", ">RATE"]);
    }
    let mut table = TextTable::new(&headings, out.colour);
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
    let mut table = TextTable::new(&headings, out.colour);
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
        out.line(format!("{:>2}. {}", i + 1, escape(step)))?;
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
        let outcome = e.outcome.as_deref().unwrap_or("not forwarded");
        out.line(format!("=> {}", out.paint(Tone::Bad, outcome)))?;
    }
    Ok(())
}

/// Prints an event as a line; columns are as wide as most events need, because later ones are not known.
///
/// # Errors
/// Writing failed.
pub fn event(out: &mut Out<'_>, e: &EventRecord) -> io::Result<()> {
    let tone = if e.is_bad() { Tone::Bad } else { Tone::Strong };
    let kind = out.paint(tone, &format!("{:<19}", e.kind));
    let subject = format!("{:<16}", escape(&e.subject.to_string()));
    out.line(format!("{}  {kind}  {subject}  {}", units::time(e.time_ms), escape(&e.cause)).trim_end())
}

/// Prints `lbctl history`.
///
/// # Errors
/// Writing failed.
pub fn history(out: &mut Out<'_>, list: &[Revision]) -> io::Result<()> {
    let mut headings = vec![">REVISION", "TIME", "AUTHOR", "CHANGE"];
    if list.iter().any(|r| r.reason().is_some()) {
        headings.push("MESSAGE");
    }
    let mut table = TextTable::new(&headings, out.colour);
    for r in list {
        table.row([
            toned(r.number, Tone::Strong),
            plain(units::time(r.time_ms)),
            plain(&r.author),
            plain(r.change()),
            plain(r.reason().unwrap_or_default()),
        ]);
    }
    table.print(out)
}

/// Prints author, time and message of a revision.
///
/// # Errors
/// Writing failed.
pub fn revision(out: &mut Out<'_>, r: &Revision) -> io::Result<()> {
    let mut pairs = vec![
        ("revision", r.number.to_string()),
        ("author", r.author.clone()),
        ("time", format!("{} ({} ago)", units::time(r.time_ms), ago(r.time_ms))),
    ];
    match r.reason() {
        Some(reason) => pairs.extend([("message", reason.to_owned()), ("change", r.change().to_owned())]),
        None => pairs.push(("change", r.change().to_owned())),
    }
    fields(out, &pairs)
}
