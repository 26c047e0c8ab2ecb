//! The report as Markdown.

use std::fmt::Write;

use super::{Chart, Whole};
use crate::{claims::Claim, control, packet::Figures, sidebyside};

/// The whole report; compared with `other` if there is one. Charts lie in `folder`.
pub fn render(whole: &Whole, charts: &[Chart], folder: &str, other: Option<&Whole>) -> String {
    let mut text = String::from("# Performance\n\nOne run of `cargo xtask bench`.\n\n");
    put(&mut text, &format!("{}, commit {}, {}\n", whole.taken_at, whole.revision, effort(whole)));
    put(&mut text, &format!("{}.\n", whole.machine.describe()));
    put(&mut text, "## Claims\n\nRatios; each holds when the figure is at most its bound.\n");
    put(&mut text, &claims(&whole.claims));
    put(&mut text, READING);
    put(&mut text, METHOD);
    packets(&mut text, whole);
    put(&mut text, "## Control plane\n");
    put(&mut text, &control::markdown(&whole.control));
    side_by_side(&mut text, &whole.side_by_side);
    if !charts.is_empty() {
        put(&mut text, "## Charts\n");
        for chart in charts {
            put(&mut text, &format!("![{}]({folder}{})\n", chart.title, chart.file));
        }
    }
    if let Some(other) = other {
        put(&mut text, &comparison(whole, other));
    }
    put(&mut text, LIMITS);
    text
}

const METHOD: &str = include_str!("method.md");

/// What people ask who read the claims.
const READING: &str = include_str!("reading.md");

const LIMITS: &str = "\
## What these figures do not show

- No driver and no network card: a packet is in the cache when its program starts, and sending it costs \
nothing. A card's driver adds its own time to every row, the bare XDP_TX included.
- One core. Counters and tables are per processor or read-only, so cores should add up; that is not measured here.
- Side by side, client, balancer and workers share this machine's processors, and veth stands for \
network cards. veth makes XDP dearer than plain forwarding (direct-xdp against direct), a real card makes it \
cheaper. Ratios between rows of one run mean something; the rates themselves say little about other machines.
- Where other work shares the machine, least values are closer to the truth than medians.
";

fn put(text: &mut String, block: &str) {
    text.push_str(block);
    text.push('\n');
}

fn effort(whole: &Whole) -> String {
    match (whole.quick, whole.lacks.is_empty()) {
        (false, true) => "a full run.".to_owned(),
        (true, true) => "a quick run.".to_owned(),
        (true, false) => format!("a quick run ({}).", whole.lacks.join("; ")),
        (false, false) => format!("**not a full run in one go** ({}).", whole.lacks.join("; ")),
    }
}

fn claims(claims: &[Claim]) -> String {
    let mut text = String::from("| claim | measured | at most | |\n|---|---:|---:|---|\n");
    for claim in claims {
        let verdict = if claim.holds() { "holds" } else { "**missed**" };
        line(&mut text, &format!("| {} | {:.2} | {:.2} | {verdict} |", claim.what, claim.value, claim.bound));
    }
    text
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("a String takes all");
}

fn packets(text: &mut String, whole: &Whole) {
    put(
        text,
        &format!(
            "## Nanoseconds per packet\n\nBPF_PROG_TEST_RUN on one pinned processor, {} samples of {} packets, \
             in turn. *net*: least sample less the least of a bare XDP_TX in the same wrapper; *median*: of the \
             differences sample by sample; *× TX*: with the wrapper, against the bare XDP_TX; *× floor*: net, \
             against an encapsulation with one fixed header.\n",
            whole.samples, whole.packets
        ),
    );
    let mut section = "";
    for row in &whole.rows {
        if row.section != section {
            section = &row.section;
            line(text, &format!("\n### {section}\n\n| row | net | median | Mpps | × TX | × floor |"));
            line(text, "|---|---:|---:|---:|---:|---:|");
        }
        line(
            text,
            &format!(
                "| {} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} |",
                row.name, row.net, row.net_median, row.mpps, row.tx_multiple, row.floor_multiple
            ),
        );
    }
    line(text, "\n### Programs\n\n| program | verified | instructions | bytes of machine code |");
    line(text, "|---|---:|---:|---:|");
    for program in &whole.programs {
        line(
            text,
            &format!(
                "| {} | {} | {} | {} |",
                program.name, program.verified_instructions, program.instructions, program.jited_bytes
            ),
        );
    }
    line(text, "\n### Maps, as the kernel accounts them\n\n| map | entries | KiB | bytes per entry |");
    line(text, "|---|---:|---:|---:|");
    for map in &whole.maps {
        let kib = map.bytes / 1_024;
        line(text, &format!("| {} | {} | {kib} | {:.0} |", map.name, map.entries, map.bytes_per_entry));
    }
    text.push('\n');
}

fn side_by_side(text: &mut String, report: &sidebyside::Report) {
    put(
        text,
        &format!(
            "## Side by side\n\nNetwork namespaces; the same client, two workers and the same load through each, \
             in turn; {} rounds of {} s; medians, in brackets against direct. Times and processor use at {} \
             requests per second.\n",
            report.rounds, report.seconds, report.rate
        ),
    );
    let mut balancers: Vec<&str> = Vec::new();
    for row in &report.rows {
        if !balancers.contains(&row.balancer.as_str()) {
            balancers.push(&row.balancer);
        }
    }
    line(text, &format!("| | {} |", balancers.join(" | ")));
    line(text, &format!("|---|{}", "---:|".repeat(balancers.len())));
    for (metric, unit) in sidebyside::METRICS {
        let cells: Vec<String> = balancers
            .iter()
            .map(|balancer| {
                let row = report.rows.iter().find(|row| row.balancer == *balancer && row.metric == metric);
                row.map_or_else(String::new, |row| {
                    let ratio = row.to_direct.map(|ratio| format!(" ({ratio:.2})")).unwrap_or_default();
                    format!("{}{ratio}", sidebyside::figure(row.median))
                })
            })
            .collect();
        line(text, &format!("| {metric}, {unit} | {} |", cells.join(" | ")));
    }
    text.push('\n');
}

/// What changed since `other`, row by row.
pub fn comparison(whole: &Whole, other: &Whole) -> String {
    let mut text = format!(
        "## Compared with {} ({})\n\nNet of the least; on another machine or another day only ratios compare.\n\n\
         | row | before | now | change | × floor before | now |\n|---|---:|---:|---:|---:|---:|\n",
        other.revision, other.taken_at
    );
    for row in &whole.rows {
        let Some(before) = find(&other.rows, &row.name) else { continue };
        let change = (row.net / before.net - 1.0) * 100.0;
        line(
            &mut text,
            &format!(
                "| {} | {:.1} | {:.1} | {change:+.1} % | {:.2} | {:.2} |",
                row.name, before.net, row.net, before.floor_multiple, row.floor_multiple
            ),
        );
    }
    line(&mut text, "\n| claim | before | now | at most |\n|---|---:|---:|---:|");
    for claim in &whole.claims {
        let Some(before) = other.claims.iter().find(|known| known.what == claim.what) else { continue };
        let (before, now, bound) = (before.value, claim.value, claim.bound);
        line(&mut text, &format!("| {} | {before:.2} | {now:.2} | {bound:.2} |", claim.what));
    }
    text
}

fn find<'a>(rows: &'a [Figures], name: &str) -> Option<&'a Figures> {
    rows.iter().find(|row| row.name == name)
}
