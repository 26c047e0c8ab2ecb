//! Output about the store: its members, the hosts that share it, and its locks.

use super::{
    Out, Tone, ago, fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::serve::api::{
    locks::HeldLock,
    store::{Lag, StoreInfo},
};
use std::io;

fn lag(lag: &Lag) -> [(String, Option<Tone>); 3] {
    let ms = |ms: u64| if lag.changes == 0 { plain("-") } else { plain(units::micros(ms * 1_000)) };
    [ms(lag.last_ms), ms(lag.mean_ms), ms(lag.max_ms)]
}

fn revisions_behind(revisions: u64) -> (String, Option<Tone>) {
    if revisions == 0 { plain("0") } else { toned(revisions, Tone::Warn) }
}

/// Prints `lbctl store status`.
///
/// # Errors
/// Writing failed.
pub fn status(out: &mut Out<'_>, s: &StoreInfo) -> io::Result<()> {
    let r = &s.revision;
    let link = if s.link.connected {
        format!("connected for {}", ago(s.link.since_ms))
    } else {
        format!(
            "disconnected for {}: {}",
            ago(s.link.since_ms),
            s.link.problem.as_deref().unwrap_or("not connected yet")
        )
    };
    let by = if s.orphaned_services > 0 {
        format!(
            "empty, but the maps hold {} services and forward them as before: see `lbctl status`",
            s.orphaned_services
        )
    } else if r.number == 0 {
        "empty".to_owned()
    } else {
        format!("by {}, {}", r.author, units::time(r.time_ms))
    };
    let mut pairs = vec![
        ("store", format!("{} at {}", s.about.engine, s.about.place)),
        ("id", s.about.id.clone()),
        ("this host", link),
        ("revision", format!("{} {by}", r.number)),
    ];
    if let Some(refusal) = s.link.refusal() {
        pairs.push(("retired", refusal.to_string()));
    }
    fields(out, &pairs)?;
    out.line("")?;
    members(out, s)?;
    if s.hosts.is_empty() {
        return Ok(());
    }
    out.line("")?;
    regions(out, s)?;
    out.line("")?;
    hosts(out, s)?;
    if s.gone.is_empty() {
        return Ok(());
    }
    out.line("")?;
    super::host::hosts(out, &s.gone)
}

fn members(out: &mut Out<'_>, s: &StoreInfo) -> io::Result<()> {
    let mut table = TextTable::new(&["MEMBER", "ADDRESS", "ROLE", "~VERSION", "~>SIZE", "STATE"], out.colour);
    for m in &s.about.members {
        let state = match (&m.problem, m.healthy) {
            (None, true) => toned("healthy", Tone::Good),
            (Some(problem), _) => toned(problem, Tone::Bad),
            (None, false) => toned("unhealthy", Tone::Bad),
        };
        let role = if m.leader { "leader" } else { "follower" };
        table.row([
            toned(if m.name.is_empty() { "?" } else { &m.name }, Tone::Strong),
            plain(&m.address),
            plain(if m.healthy { role } else { "-" }),
            plain(&m.version),
            plain(units::bytes(m.size_bytes)),
            state,
        ]);
    }
    table.print(out)
}

fn regions(out: &mut Out<'_>, s: &StoreInfo) -> io::Result<()> {
    let headings = ["REGION", ">HOSTS", ">BEHIND", ">LAG LAST", ">MEAN", ">MAX"];
    let mut table = TextTable::new(&headings, out.colour);
    for region in &s.regions {
        let [last, mean, max] = lag(&region.lag);
        table.row([
            toned(&region.region, Tone::Strong),
            plain(region.hosts),
            revisions_behind(region.behind),
            last,
            mean,
            max,
        ]);
    }
    table.print(out)
}

fn hosts(out: &mut Out<'_>, s: &StoreInfo) -> io::Result<()> {
    let headings = [
        "HOST",
        "REGION",
        "ZONE",
        ">REVISION",
        ">BEHIND",
        ">LAG LAST",
        "~>MEAN",
        "~>MAX",
        "~TABLES",
        "SINCE",
    ];
    let mut table = TextTable::new(&headings, out.colour);
    for host in &s.hosts {
        let [last, mean, max] = lag(&host.lag);
        table.row([
            toned(&host.host, Tone::Strong),
            plain(&host.region),
            plain(&host.zone),
            plain(host.revision),
            revisions_behind(s.revision.number.saturating_sub(host.revision)),
            last,
            mean,
            max,
            plain(&host.table_hash),
            plain(ago(host.time_ms)),
        ]);
    }
    table.print(out)
}

/// Prints the locks of `lbctl rollout status`.
///
/// # Errors
/// Writing failed.
pub fn locks(out: &mut Out<'_>, list: &[HeldLock]) -> io::Result<()> {
    let mut table = TextTable::new(&["LOCK", "HOLDER", "REASON", "~SINCE", ">EXPIRES IN"], out.colour);
    for HeldLock { lock, is_operation } in list {
        table.row([
            toned(&lock.name, Tone::Strong),
            plain(&lock.holder),
            plain(&lock.reason),
            plain(ago(lock.since_ms)),
            plain(if *is_operation { "-".to_owned() } else { units::span(lock.left_s) }),
        ]);
    }
    table.print(out)
}
