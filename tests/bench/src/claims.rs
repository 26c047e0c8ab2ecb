//! What the balancer claims of itself, each with the figures that show it or not.

use serde::{Deserialize, Serialize};

use crate::{
    control,
    packet::{Figures, Report},
    sidebyside,
    statistics::median,
};

/// A claim: a figure, and the bound that it keeps or misses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// What is claimed.
    pub what: String,
    /// The figure.
    pub value: f64,
    /// Its upper bound.
    pub bound: f64,
}

impl Claim {
    /// Whether the figure keeps its bound.
    pub fn holds(&self) -> bool {
        self.value <= self.bound
    }
}

/// Claims about packets, those whose rows were measured.
pub fn packet(report: &Report) -> Vec<Claim> {
    let row = |name: &str| report.rows.iter().find(|row| row.name == name);
    let ratio = |what: &str, a: &str, b: &str, bound: f64| {
        let (a, b): (&Figures, &Figures) = (row(a)?, row(b)?);
        Some(Claim { what: what.to_owned(), value: a.net / b.net, bound })
    };
    const ESTABLISHED: &str = "v4/tcp-established/ipip/1M";
    const EVERY: &str = "every-feature/v4/tcp-established/ipip/1M";
    let against_floor = |what: &str, name: &str| {
        row(name).map(|row| Claim { what: what.to_owned(), value: row.floor_multiple, bound: 4.0 })
    };
    [
        ratio("1 M flows against one flow", ESTABLISHED, "v4/tcp-established/ipip/1", 1.25),
        ratio(
            "1 M flows against one flow, every feature",
            EVERY,
            "every-feature/v4/tcp-established/ipip/1",
            1.25,
        ),
        against_floor("against the fixed-header encapsulation", ESTABLISHED),
        against_floor("against the fixed-header encapsulation, every feature", EVERY),
        ratio("against a balancer without features", ESTABLISHED, "plain/v4/tcp-established/ipip/1M", 1.5),
        ratio("SYN against established", "v4/tcp-syn/ipip/1M", ESTABLISHED, 1.1),
        ratio("SYN against established, v6", "v6/tcp-syn/ipip/1M", "v6/tcp-established/ipip/1M", 1.1),
        ratio("SYN against established, every feature", "every-feature/v4/tcp-syn/ipip/1M", EVERY, 1.1),
        ratio("p2c SYN against established", "p2c/v4/tcp-syn/ipip/1M", ESTABLISHED, 3.0),
        ratio("gue against ipip", "v4/tcp-established/gue/1M", ESTABLISHED, 1.3),
        ratio("gue against ipip, v6", "v6/tcp-established/gue/1M", "v6/tcp-established/ipip/1M", 1.3),
        ratio("v6 against v4", "v6/tcp-established/ipip/1M", ESTABLISHED, 1.2),
        ratio("not a VIP against established", "v4/not-vip/1M", ESTABLISHED, 0.5),
        flat(report, "services-one-busy"),
        flat(report, "services-all-busy"),
        flat(report, "backends"),
        ratio("not a VIP against established, v6", "v6/not-vip/1M", "v6/tcp-established/ipip/1M", 0.5),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The dearest point of a curve against its first.
fn flat(report: &Report, curve: &str) -> Option<Claim> {
    let mut points: Vec<(u32, f64)> = report
        .rows
        .iter()
        .filter_map(|row| row.growth.as_ref().filter(|(name, _)| name == curve).map(|(_, x)| (*x, row.net)))
        .collect();
    points.sort_by_key(|(x, _)| *x);
    let (first, last) = (points.first()?, points.last()?);
    let most = points.iter().map(|(_, net)| *net).fold(0.0, f64::max);
    let what = format!("{curve}: {} to {}, the dearest against the first", first.0, last.0);
    (points.len() > 1).then(|| Claim { what, value: most / first.1, bound: 1.15 })
}

/// Claims about the control plane. Milliseconds.
pub fn control(report: &control::Report) -> Vec<Claim> {
    let mut claims = Vec::new();
    let build = "maglev/weighted/65537x1000";
    if let Some(part) = report.parts.iter().find(|part| part.name == build) {
        let what = "weighted Maglev, 65,537 x 1,000, ms".to_owned();
        claims.push(Claim { what, value: part.median_ms, bound: 2.0 });
    }
    if let Some(change) = report.changes.iter().find(|c| c.what == "one weight" && c.backends == 1_000) {
        let what = "one weight of 1,000 applied, ms".to_owned();
        claims.push(Claim { what, value: change.apply_ms, bound: 5.0 });
        let what = "the same with API, check and store, ms".to_owned();
        claims.push(Claim { what, value: change.median_ms, bound: 5.0 });
    }
    for (what, bound) in [
        ("1,000 services of 10 backends each, at once", 2_000.0),
        ("one weight in one of 1,000 services", 20.0),
    ] {
        if let Some(change) = report.changes.iter().find(|change| change.what == what) {
            claims.push(Claim { what: format!("{what}, ms"), value: change.median_ms, bound });
        }
    }
    if let Some(daemon) = report.daemons.iter().find(|d| d.probe_us.is_some() && d.backends == 1_000) {
        let what = format!("1,000 backends, {}: per cent of a processor", daemon.what);
        claims.push(Claim { what, value: daemon.cpu_share * 100.0, bound: 2.0 });
    }
    claims
}

/// Claims about ours beside others, those that were measured: medians of the rounds' ratios.
pub fn side_by_side(report: &sidebyside::Report) -> Vec<Claim> {
    let row = |balancer: &str, metric: &str| {
        report.rows.iter().find(|row| row.balancer == balancer && row.metric == metric)
    };
    let ratio = |a: &str, b: &str, metric: &str| {
        let (a, b) = (row(a, metric)?, row(b, metric)?);
        Some(median(a.values.iter().zip(&b.values).map(|(a, b)| a / b).collect()))
    };
    let mut claims = Vec::new();
    for (ours, direct) in [
        ("ours-ipip", "direct"),
        ("ours-gue", "direct"),
        ("ours-l2", "direct"),
        ("ours-ipip", "direct-xdp"),
        ("ours-gue", "direct-xdp"),
        ("ours-l2", "direct-xdp"),
    ] {
        // Rates the other way round, so that less is better throughout.
        for metric in ["new connections", "kept connections", "bulk"] {
            if let Some(value) = ratio(direct, ours, metric) {
                let what = format!("{direct} against {ours}: {metric}");
                claims.push(Claim { what, value, bound: 1.05 });
            }
        }
        if let Some(value) = ratio(ours, direct, "closed p50") {
            let what = format!("{ours} against {direct}: closed p50");
            claims.push(Claim { what, value, bound: 1.05 });
        }
    }
    for ours in ["ours-nat", "ours-ipip", "ours-gue"] {
        for other in ["haproxy", "nginx", "nftables"] {
            if let Some(value) = ratio(other, ours, "new connections") {
                let what = format!("{other} against {ours}: new connections");
                claims.push(Claim { what, value, bound: 1.0 });
            }
            for metric in ["closed p50", "CPU"] {
                if let Some(value) = ratio(ours, other, metric) {
                    let what = format!("{ours} against {other}: {metric}");
                    claims.push(Claim { what, value, bound: 1.0 });
                }
            }
        }
    }
    claims
}

/// A table of claims for people.
pub fn table(claims: &[Claim]) -> String {
    let mut text = format!("{:<52} {:>8} {:>8}\n", "claim", "measured", "at most");
    for claim in claims {
        let verdict = if claim.holds() { "holds" } else { "MISSED" };
        text.push_str(&format!(
            "  {:<50} {:>8.2} {:>8.2}  {verdict}\n",
            claim.what, claim.value, claim.bound
        ));
    }
    text
}
