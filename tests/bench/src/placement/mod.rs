//! How long requests of language models wait in queue, by scheduler: a simulation that drives the packet code.
//!
//! In: nothing but numbers. Out: a table and JSON. Needs neither root nor time: a run takes seconds.

mod simulate;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use lb_userspace::desired::model::Scheduler;
use serde::Serialize;
use simulate::{AT_ONCE, Case, Delays, MEAN_S, Placer, SIGMA, simulate};

use crate::statistics::median;

/// Arguments of `bench placement`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Requests of each run.
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1_000..))]
    pub requests: u32,
    /// Runs of each case; medians are shown.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
}

/// A row: placer, and how old its reports get.
#[derive(Clone, Copy, Debug)]
struct Row {
    name: &'static str,
    placer: Placer,
    report_s: f64,
}

/// What a worker that pushes its state is behind, at most.
const PUSHED_S: f64 = 0.1;
/// What a stream that sends each change is.
const STREAMED_S: f64 = 0.005;
/// What a scraped one is.
const SCRAPED_S: f64 = 1.0;

const ROWS: [Row; 10] = [
    Row { name: "ideal", placer: Placer::Ideal, report_s: PUSHED_S },
    Row { name: "p2c", placer: Placer::Ours(Scheduler::P2c), report_s: PUSHED_S },
    Row { name: "p2c, reports each 1 s", placer: Placer::Ours(Scheduler::P2c), report_s: SCRAPED_S },
    Row { name: "p2c, no reports", placer: Placer::Ours(Scheduler::P2c), report_s: f64::INFINITY },
    Row { name: "lc", placer: Placer::Ours(Scheduler::Lc), report_s: PUSHED_S },
    Row { name: "lc, reports each 5 ms", placer: Placer::Ours(Scheduler::Lc), report_s: STREAMED_S },
    Row { name: "lc, counts each 1 s", placer: Placer::Ours(Scheduler::Lc), report_s: SCRAPED_S },
    Row { name: "rr", placer: Placer::Ours(Scheduler::Rr), report_s: PUSHED_S },
    Row { name: "random", placer: Placer::Ours(Scheduler::Random), report_s: PUSHED_S },
    Row { name: "maglev", placer: Placer::Ours(Scheduler::Maglev), report_s: PUSHED_S },
];

/// A row's figures: time in queue, in seconds, medians over the runs.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    workers: usize,
    load: f64,
    scheduler: &'static str,
    /// None: nothing is reported.
    report_s: Option<f64>,
    p50_s: f64,
    p99_s: f64,
    mean_s: f64,
    /// p99 as a multiple of p2c's, if that waits at all.
    p99_of_p2c: Option<f64>,
    /// Share of flows that are not on their slot's primary.
    elsewhere: f64,
}

#[derive(Serialize)]
struct Report {
    requests: u32,
    runs: u32,
    at_once: usize,
    service_mean_s: f64,
    service_sigma: f64,
    rows: Vec<Figures>,
}

/// The median of several runs, each with a seed of its own, the same for every row.
fn runs(row: Row, workers: usize, load: f64, requests: u32, runs: u32) -> Delays {
    let case = |seed| Case {
        placer: row.placer,
        workers,
        load,
        report_s: row.report_s,
        requests: requests as usize,
        seed: 0x706c_6163 + u64::from(seed),
    };
    let all: Vec<Delays> = (0..runs).map(|seed| simulate(&case(seed))).collect();
    let of = |figure: fn(&Delays) -> f64| median(all.iter().map(figure).collect());
    Delays { p50: of(|d| d.p50), p99: of(|d| d.p99), mean: of(|d| d.mean), elsewhere: of(|d| d.elsewhere) }
}

/// `a` as a multiple of `b`, if that is a number.
fn multiple(a: f64, b: f64) -> Option<f64> {
    Some(a / b).filter(|times| times.is_finite())
}

/// Simulates and prints.
pub fn run(options: &Options) -> Result<()> {
    println!(
        "time in queue, in seconds: lognormal service of mean {MEAN_S} s (sigma {SIGMA}), {AT_ONCE} at once on each \
         worker, {} requests, median of {} runs\n",
        options.requests, options.runs
    );
    let mut rows = Vec::new();
    for workers in [8, 16, 64] {
        for load in [0.6, 0.7, 0.8, 0.9] {
            println!("{workers} workers at {:.0} %", load * 100.0);
            println!(
                "  {:<24} {:>8} {:>8} {:>8} {:>8} {:>10}",
                "scheduler", "mean", "p50", "p99", "/ p2c", "elsewhere"
            );
            let all: Vec<(Row, Delays)> = ROWS
                .iter()
                .map(|&row| (row, runs(row, workers, load, options.requests, options.runs)))
                .collect();
            let p2c = all[1].1.p99;
            for (row, d) in all {
                println!(
                    "  {:<24} {:>8.3} {:>8.3} {:>8.3} {:>8} {:>9.0} %",
                    row.name,
                    d.mean,
                    d.p50,
                    d.p99,
                    multiple(d.p99, p2c).map_or_else(|| "-".to_owned(), |times| format!("{times:.2}")),
                    d.elsewhere * 100.0
                );
                rows.push(Figures {
                    workers,
                    load,
                    scheduler: row.name,
                    report_s: row.report_s.is_finite().then_some(row.report_s),
                    p50_s: d.p50,
                    p99_s: d.p99,
                    mean_s: d.mean,
                    p99_of_p2c: multiple(d.p99, p2c),
                    elsewhere: d.elsewhere,
                });
            }
            println!();
        }
    }
    if let Some(path) = &options.json {
        let report = Report {
            requests: options.requests,
            runs: options.runs,
            at_once: AT_ONCE,
            service_mean_s: MEAN_S,
            service_sigma: SIGMA,
            rows,
        };
        let text = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p99(name: &str) -> f64 {
        let row = ROWS.iter().find(|row| row.name == name).expect("a row's name");
        runs(*row, 16, 0.8, 50_000, 3).p99
    }

    /// The promise of p2c at 80 % on 16 workers.
    #[test]
    fn placing_by_load_cuts_the_tail_of_the_queue() {
        let (ideal, p2c, stale) = (p99("ideal"), p99("p2c"), p99("p2c, reports each 1 s"));
        let (rr, maglev) = (p99("rr"), p99("maglev"));
        println!(
            "p99 in s: ideal {ideal:.3}, p2c {p2c:.3}, stale {stale:.3}, rr {rr:.3}, maglev {maglev:.3}"
        );
        assert!(maglev >= 10.0 * p2c, "maglev {maglev:.3} s, p2c {p2c:.3} s");
        assert!(rr >= 5.0 * p2c, "rr {rr:.3} s, p2c {p2c:.3} s");
        assert!(ideal <= p2c, "ideal {ideal:.3} s, p2c {p2c:.3} s");
        assert!(
            stale - p2c < (p2c - ideal) / 2.0,
            "ideal {ideal:.3}, p2c {p2c:.3}, with old reports {stale:.3} s"
        );
    }

    #[test]
    fn a_seed_gives_the_same_again() {
        let again = || runs(ROWS[1], 8, 0.7, 2_000, 1).p99.to_bits();
        assert_eq!(again(), again());
    }
}
