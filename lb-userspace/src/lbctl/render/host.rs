//! Output of `lbctl host`: this host, and the VIPs that it announces.

use super::{
    Out, Tone, ago, fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    apply::announce::{Announcement, VipState},
    clock,
    serve::api::{host::HostInfo, members::HostMember},
};
use std::io;

/// Describes whether the host has a VIP: `on lo`, `off: no backend takes new flows`.
pub fn vip_state(v: &VipState) -> String {
    let interface = &v.interface;
    match (&v.foreign, v.on, v.decision.is_on()) {
        (Some(other), ..) => format!("on {other}, not by lbd, which leaves it alone"),
        (None, true, true) if v.kept.is_some() => format!("on {interface}, {}", reason(v)),
        (None, true, true) => format!("on {interface}"),
        (None, false, true) => "about to be added".to_owned(),
        (None, true, false) => format!("about to be removed: {}", v.decision),
        (None, false, false) => format!("off: {}", v.decision),
    }
}

/// Why a VIP is on or off.
fn reason(v: &VipState) -> String {
    match &v.kept {
        Some(kept) => format!("{}, {}", v.decision, kept.describe(clock::unix_ms())),
        None => v.decision.to_string(),
    }
}

/// Prints `lbctl host list`, and the hosts that are gone in `lbctl store status`.
///
/// # Errors
/// Writing failed.
pub fn hosts(out: &mut Out<'_>, list: &[HostMember]) -> io::Result<()> {
    let headings = ["HOST", "REGION", "ZONE", "STATE", "~VERSION", ">REVISION", "LAST SEEN", ">CLOCK"];
    let mut table = TextTable::new(&headings, out.colour);
    for h in list {
        let r = &h.record;
        let state = if h.is_live { toned("live", Tone::Good) } else { toned("gone", Tone::Bad) };
        let name = if h.is_self { format!("{} (here)", r.host) } else { r.host.clone() };
        // The others' clocks as seen from here.
        let clock = match h.skew_ms {
            _ if h.is_self => "-".to_owned(),
            Some(ms) => format!("{:+.1} s", -ms as f64 / 1_000.0),
            None => "?".to_owned(),
        };
        table.row([
            toned(name, Tone::Strong),
            plain(&r.region),
            plain(&r.zone),
            state,
            plain(&r.version),
            plain(r.revision),
            plain(ago(r.seen_ms)),
            plain(clock),
        ]);
    }
    table.print(out)
}

/// Summarises the announcement on one line, for `lbctl status`.
pub fn summary(a: &Announcement) -> String {
    let on = a.on().count();
    let kept = match a.kept().count() {
        0 => String::new(),
        kept => format!(", {kept} of them kept although nothing serves them"),
    };
    format!("{on} of {} VIPs on {}{kept}", a.vips.len(), a.interface)
}

/// Prints `lbctl host show`.
///
/// # Errors
/// Writing failed.
pub fn host(out: &mut Out<'_>, h: &HostInfo) -> io::Result<()> {
    let mut pairs = vec![("host", format!("{} in {}, zone {}", h.host, h.region, h.zone))];
    match &h.announcement {
        None => pairs.push(("announces", "nothing: lbd was started without --announce".to_owned())),
        Some(a) => {
            pairs.push(("announces", summary(a)));
            if let Some(problem) = &a.problem {
                pairs.push(("problem", problem.clone()));
            }
        }
    }
    if let Some(drain) = &h.drain {
        let reason = if drain.reason.is_empty() { String::new() } else { format!(": {}", drain.reason) };
        pairs.push(("draining", format!("for {}, by {}{reason}", ago(drain.since_ms), drain.author)));
        if let (Some(rate), Some(quiet)) = (h.packets_per_s, h.quiet_ms) {
            pairs.push(("arriving", format!("{rate} packets/s, quiet for {}", units::span(quiet / 1_000))));
        }
    }
    fields(out, &pairs)?;
    let Some(a) = h.announcement.as_ref().filter(|a| !a.vips.is_empty()) else { return Ok(()) };
    out.line("")?;
    let mut table = TextTable::new(&["VIP", "ANNOUNCED", "SINCE", "WHY"], out.colour);
    for v in &a.vips {
        let on = if v.on { toned("on", Tone::Good) } else { toned("off", Tone::Bad) };
        let why = if v.foreign.is_some() { vip_state(v) } else { reason(v) };
        table.row([toned(v.vip, Tone::Strong), on, plain(ago(v.since_ms)), plain(why)]);
    }
    table.print(out)
}
