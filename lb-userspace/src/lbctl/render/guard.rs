//! Deny and allow lists.

use super::{
    Out, Tone,
    observe::fields,
    table::{Table, plain},
    units,
};
use crate::serve::api::guard::{Entries, EntryInfo, GuardDecision, GuardInfo};
use std::io;

fn left(entry: &EntryInfo) -> String {
    entry.left_s.map_or_else(|| "for good".to_owned(), units::span)
}

/// `lbctl guard show`.
///
/// # Errors
/// Writing failed.
pub fn show(out: &mut Out<'_>, info: &GuardInfo) -> io::Result<()> {
    fields(
        out,
        &[
            ("deny", format!("{} entries", info.deny)),
            ("allow", format!("{} entries", info.allow)),
            ("room", format!("{} entries", info.limit)),
            ("denied", format!("{} packets", info.dropped)),
            ("above a source's rate", format!("{} new flows", info.rate_source)),
            ("above a service's rate", format!("{} new flows", info.rate_service)),
            ("placed by hash in a flood", format!("{} new flows", info.flood)),
        ],
    )
}

/// `lbctl guard LIST list`.
///
/// # Errors
/// Writing failed.
pub fn entries(out: &mut Out<'_>, found: &Entries) -> io::Result<()> {
    let mut table = Table::new(&["PREFIX", "STANDS"], out.colour);
    for entry in &found.entries {
        table.row([plain(entry.prefix), plain(left(entry))]);
    }
    table.print(out)
}

/// `lbctl guard check`.
///
/// # Errors
/// Writing failed.
pub fn decision(out: &mut Out<'_>, decision: &GuardDecision) -> io::Result<()> {
    let text = match (decision.list, &decision.entry) {
        (Some(list), Some(entry)) => {
            format!("{} list has {} ({})", list.label(), entry.prefix, left(entry))
        }
        _ => "on no list".to_owned(),
    };
    let verdict =
        if decision.denied { out.paint(Tone::Bad, "denied") } else { out.paint(Tone::Good, "let through") };
    out.line(format!("{}: {verdict}: {text}", decision.address))
}
