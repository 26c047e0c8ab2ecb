//! Output about replicas.

use super::{
    Out, Tone,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    desired::model::{Readiness, Report},
    observed::replica::ReplicaEntry,
    plan::policy::load,
    serve::api::types::{NotReady, Replicas},
};
use std::io;

/// Returns a readiness with its tone.
pub fn readiness(readiness: Readiness) -> (String, Option<Tone>) {
    let tone = match readiness {
        Readiness::Ready => Tone::Good,
        Readiness::Unknown | Readiness::Loading | Readiness::Draining => Tone::Warn,
        Readiness::Failed | Readiness::Lost => Tone::Bad,
    };
    toned(readiness, tone)
}

fn or_dash<T>(value: Option<T>, text: impl Fn(T) -> String) -> (String, Option<Tone>) {
    plain(value.map_or_else(|| "-".to_owned(), text))
}

/// Formats a load score as a share of the replica's capacity.
pub fn load_share(score: u32) -> String {
    format!("{:.1}%", f64::from(score) * 100.0 / f64::from(load::FULL))
}

/// Prints a table of replicas.
///
/// # Errors
/// Writing failed.
pub fn list(out: &mut Out<'_>, list: &Replicas) -> io::Result<()> {
    let headings = [
        "SERVICE",
        "BACKEND",
        "~SOURCE",
        "STATE",
        ">LOAD",
        ">RUNNING",
        ">WAITING",
        "~>CAPACITY",
        "~>KV CACHE",
        "~>TOKENS/S",
        "~MODEL",
        "VERSION",
        "~>AGE",
        "NOTE",
    ];
    let mut table = TextTable::new(&headings, out.colour);
    for r in &list.replicas {
        let report = r.state.report.as_ref();
        let count = |value: fn(&Report) -> u32| or_dash(report.map(value), |n| n.to_string());
        let source = if r.state.streaming { format!("{} (open)", r.source) } else { r.source.clone() };
        let note = r.state.trouble.as_ref().map_or(String::new(), |t| t.what.clone());
        table.row([
            plain(&r.service),
            toned(&r.backend, Tone::Strong),
            plain(source),
            readiness(r.state.readiness),
            or_dash(r.state.score, load_share),
            count(|r| r.running),
            count(|r| r.waiting),
            or_dash(report.and_then(|r| r.capacity), |n| n.to_string()),
            or_dash(report.and_then(|r| r.kv_cache_usage), |n| format!("{:.0}%", n * 100.0)),
            or_dash(report.and_then(|r| r.tokens_per_second), units::rate),
            or_dash(report.and_then(|r| r.model.clone()), |m| m),
            or_dash(report.and_then(|r| r.version.clone()), |v| v),
            or_dash(r.age_ms, |ms| if ms < 10_000 { format!("{ms}ms") } else { units::span(ms / 1_000) }),
            plain(note),
        ]);
    }
    table.print(out)
}

/// Formats a replica as pairs of name and value, for `backend show`.
pub fn lines(entry: &ReplicaEntry) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let state = entry.readiness.label();
    let why = entry.history.back().map_or(String::new(), |t| format!(": {}", t.reason));
    lines.push(("replica", format!("{state}{why}")));
    if let (Some(report), Some(score)) = (&entry.report, entry.score) {
        let mut parts = vec![format!("{} running", report.running), format!("{} waiting", report.waiting)];
        parts.extend(report.capacity.map(|n| format!("capacity {n}")));
        parts.extend(report.kv_cache_usage.map(|n| format!("KV cache {:.0} %", n * 100.0)));
        parts.extend(report.tokens_per_second.map(|n| format!("{} tokens/s", units::rate(n))));
        parts.extend(report.gpu_memory.map(|m| {
            format!("GPU memory {} of {}", units::bytes(m.used_bytes), units::bytes(m.total_bytes))
        }));
        lines.push(("load", format!("{} ({})", load_share(score), parts.join(", "))));
    }
    if let Some(report) = &entry.report {
        let model = report.model.as_deref().unwrap_or("not named");
        let version = report.version.as_ref().map_or(String::new(), |v| format!(" version {v}"));
        lines.push(("model", format!("{model}{version}")));
    }
    let counts = format!(
        "{} accepted, {} rejected, {} interrupted streams or failed polls",
        entry.reports, entry.refused, entry.breaks
    );
    lines.push(("reports", counts));
    if let Some(trouble) = &entry.trouble {
        lines.push(("last error", trouble.what.clone()));
    }
    lines
}

/// Prints a table of readiness changes.
///
/// # Errors
/// Writing failed.
pub fn history(out: &mut Out<'_>, entry: &ReplicaEntry) -> io::Result<()> {
    let mut table = TextTable::new(&["TIME", "REPLICA FROM", "TO", "REASON"], out.colour);
    for t in &entry.history {
        table.row([plain(units::time(t.time_ms)), readiness(t.from), readiness(t.to), plain(&t.reason)]);
    }
    table.print(out)
}

/// Prints a table of the replicas that do not serve, for `lbctl status`.
///
/// # Errors
/// Writing failed.
pub fn not_ready(out: &mut Out<'_>, list: &[NotReady]) -> io::Result<()> {
    let mut table = TextTable::new(&["REPLICA", "STATE", ">TRACKED FLOWS", "REASON"], out.colour);
    for r in list {
        let (state, tone) = readiness(r.readiness);
        let name = (format!("{}/{}", r.service, r.backend), tone);
        table.row([name, (state, tone), plain(r.flows_left), plain(&r.reason)]);
    }
    table.print(out)
}
