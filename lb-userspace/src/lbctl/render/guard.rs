//! Output of `lbctl guard`.

use super::{
    Out, Tone, fields,
    table::{TextTable, plain},
    units,
};
use crate::serve::api::guard::{Entries, EntryInfo, GuardDecision, GuardInfo};
use std::io;

fn expiry(entry: &EntryInfo) -> String {
    entry.left_s.map_or_else(|| "never".to_owned(), units::span)
}

/// Prints `lbctl guard show`.
///
/// # Errors
/// Writing failed.
pub fn show(out: &mut Out<'_>, info: &GuardInfo) -> io::Result<()> {
    fields(
        out,
        &[
            ("deny", format!("{} entries", info.deny)),
            ("allow", format!("{} entries", info.allow)),
            ("capacity", format!("{} entries", info.limit)),
            ("denied", format!("{} packets", info.dropped)),
            ("above source limits", format!("{} new flows", info.rate_source)),
            ("above service limits", format!("{} new flows", info.rate_service)),
            ("by hash during floods", format!("{} new flows", info.flood)),
        ],
    )
}

/// Prints `lbctl guard LIST list`.
///
/// # Errors
/// Writing failed.
pub fn entries(out: &mut Out<'_>, found: &Entries) -> io::Result<()> {
    let mut table = TextTable::new(&["PREFIX", "EXPIRES IN"], out.colour);
    for entry in &found.entries {
        table.row([plain(entry.prefix), plain(expiry(entry))]);
    }
    table.print(out)
}

/// Prints `lbctl guard check`.
///
/// # Errors
/// Writing failed.
pub fn decision(out: &mut Out<'_>, decision: &GuardDecision) -> io::Result<()> {
    let text = match (decision.list, &decision.entry) {
        (Some(list), Some(entry)) => {
            format!("{} on the {} list, expires: {}", entry.prefix, list.label(), expiry(entry))
        }
        _ => "on no list".to_owned(),
    };
    let verdict =
        if decision.denied { out.paint(Tone::Bad, "denied") } else { out.paint(Tone::Good, "allowed") };
    out.line(format!("{}: {verdict}: {text}", decision.address))
}
