//! Side by side with what people use: the same client, workers and load through each, in turn.
//!
//! In: [`Options`], root, the programs that `cargo xtask setup` installs. Out: a [`Report`].

mod arrangement;
mod cpu;
mod load;

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use test_support::nginx;

pub use arrangement::Kind;
use arrangement::{Arrangement, BULK_PORT, bulk_vip, web_vip};

use crate::{claims, machine::Machine, statistics::median};

/// Arguments of `bench side-by-side`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Fewer and shorter rounds.
    #[arg(long)]
    pub quick: bool,
    /// Only these, beside direct.
    #[arg(long, value_enum)]
    pub only: Vec<Kind>,
    /// Rounds; in each, every balancer has its turn at every kind of load.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Seconds of each load.
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Requests per second at which times and processor use are measured.
    #[arg(long, default_value_t = 1_000)]
    pub rate: u32,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { quick: false, only: Vec::new(), rounds: None, seconds: None, rate: 1_000, json: None }
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of each load.
    pub seconds: u64,
    /// The fixed rate, in requests per second.
    pub rate: u32,
    /// A row per balancer and kind of figure.
    pub rows: Vec<Row>,
}

/// One figure of one balancer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Balancer.
    pub balancer: String,
    /// What: see [`METRICS`].
    pub metric: String,
    /// Median over the rounds.
    pub median: f64,
    /// Least of them.
    pub min: f64,
    /// Greatest of them.
    pub max: f64,
    /// Median of the rounds' ratios to direct, where direct has such a figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_direct: Option<f64>,
    /// One a round.
    pub values: Vec<f64>,
}

/// Figures with their units, and for people whether more is better.
pub const METRICS: [(&str, &str); 12] = [
    ("new connections", "per s"),
    ("kept connections", "requests per s"),
    ("bulk", "Gbit/s"),
    ("closed p50", "µs"),
    ("closed p99", "µs"),
    ("closed p99.9", "µs"),
    ("kept p50", "µs"),
    ("kept p99", "µs"),
    ("CPU", "µs per closed request: client, workers, balancer and kernel"),
    ("CPU of the balancer's process", "µs per closed request"),
    ("CPU in softirq", "µs per closed request, whole machine, by sampling"),
    ("CPU in our programs", "µs per closed request"),
];

/// Figures of one turn, in the order of [`METRICS`]; NaN where there is none.
type Turn = [f64; METRICS.len()];

/// Measures, prints and writes what the options ask for.
pub fn run(options: &Options) -> Result<()> {
    let report = measure_all(options)?;
    print(&report);
    println!("\n{}", claims::table(&claims::side_by_side(&report)));
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Measures every balancer that the options name.
pub fn measure_all(options: &Options) -> Result<Report> {
    ensure!(geteuid().is_root(), "network namespaces take root");
    let machine = Machine::read();
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 });
    let seconds = options.seconds.unwrap_or(if options.quick { 1 } else { 2 });
    ensure!(rounds > 0 && seconds > 0 && options.rate > 0, "at least one round, second and request");
    let kinds: Vec<Kind> = Kind::ALL
        .into_iter()
        .filter(|kind| *kind == Kind::Direct || options.only.is_empty() || options.only.contains(kind))
        .collect();
    let mut arrangements = Vec::new();
    for kind in &kinds {
        eprintln!("  {} …", kind.label());
        arrangements.push(Arrangement::build(*kind).with_context(|| format!("set up {}", kind.label()))?);
    }
    let mut turns = vec![Vec::new(); kinds.len()];
    for round in 0..rounds {
        eprintln!("  round {} of {rounds} …", round + 1);
        let loads = if options.quick { &LOADS[..QUICK_LOADS] } else { &LOADS };
        let turn = measure(&arrangements, loads, round, Duration::from_secs(seconds), options.rate)?;
        for (own, turn) in turns.iter_mut().zip(turn) {
            own.push(turn);
        }
    }
    let rows = kinds.iter().zip(&turns).flat_map(|(kind, own)| rows_of(*kind, own, &turns[0])).collect();
    Ok(Report { machine, rounds, seconds, rate: options.rate, rows })
}

/// One round: each load through every balancer, one right after the other, so that what else goes on
/// on the machine meets them alike.
fn measure(
    arrangements: &[Arrangement],
    loads: &[Load],
    round: usize,
    duration: Duration,
    rate: u32,
) -> Result<Vec<Turn>> {
    let web: SocketAddr = (web_vip(), nginx::PORT).into();
    let bulk: SocketAddr = (bulk_vip(), BULK_PORT).into();
    let mut turns = vec![[f64::NAN; METRICS.len()]; arrangements.len()];
    for &load in loads {
        for i in 0..arrangements.len() {
            // Each round begins with another, so that none always follows the same one.
            let place = (i + round) % arrangements.len();
            let (arrangement, turn) = (&arrangements[place], &mut turns[place]);
            let client = arrangement.client();
            let context = || format!("{load:?} through {}", arrangement.kind.label());
            match load {
                Load::New => turn[0] = load::saturate(client, web, duration, true).with_context(context)?,
                Load::Kept => turn[1] = load::saturate(client, web, duration, false).with_context(context)?,
                Load::Bulk => turn[2] = load::bulk(client, bulk, duration).with_context(context)? / 1e9,
                Load::ClosedAtRate => {
                    let closed = closed(arrangement, duration, rate).with_context(context)?;
                    let quantiles = [0.5, 0.99, 0.999].map(|share| closed.timed.quantile(share));
                    turn[3..6].copy_from_slice(&quantiles);
                    turn[8..].copy_from_slice(&closed.cpu_us);
                }
                Load::KeptAtRate => {
                    let timed = load::at_rate(client, web, duration, rate, false).with_context(context)?;
                    ensure!(timed.failed == 0, "{} requests failed: {}", timed.failed, context());
                    turn[6..8].copy_from_slice(&[0.5, 0.99].map(|share| timed.quantile(share)));
                }
            }
        }
    }
    Ok(turns)
}

/// Kinds of load.
#[derive(Clone, Copy, Debug)]
enum Load {
    New,
    Kept,
    Bulk,
    ClosedAtRate,
    KeptAtRate,
}

/// Those about which something is claimed come first.
const LOADS: [Load; 5] = [Load::New, Load::Kept, Load::Bulk, Load::ClosedAtRate, Load::KeptAtRate];
/// How many of them a quick run has.
const QUICK_LOADS: usize = 4;

/// Closed requests at a fixed rate.
struct Closed {
    timed: load::Timed,
    /// Processor time per request in µs: all parties, balancer's process, softirq, our programs.
    cpu_us: [f64; 4],
}

fn closed(arrangement: &Arrangement, duration: Duration, rate: u32) -> Result<Closed> {
    let web = (web_vip(), nginx::PORT).into();
    let counting = enable_stats(Stats::RunTime).context("the kernel cannot count the programs' time")?;
    let before = Spent::read(arrangement)?;
    let timed = load::at_rate(arrangement.client(), web, duration, rate, true)?;
    let after = Spent::read(arrangement)?;
    drop(counting);
    ensure!(timed.failed == 0, "{} closed requests failed at the fixed rate", timed.failed);
    let per_request = |time: Duration| time.as_secs_f64() * 1e6 / timed.took_us.len() as f64;
    let balancer = after.balancer - before.balancer;
    let kernel = after.softirq_threads - before.softirq_threads;
    let cpu_us = [
        per_request(timed.processor + (after.workers - before.workers) + balancer + kernel),
        per_request(balancer),
        per_request(after.softirq - before.softirq),
        after.programs.zip(before.programs).map_or(f64::NAN, |(after, before)| per_request(after - before)),
    ];
    Ok(Closed { timed, cpu_us })
}

/// Processor time spent so far.
struct Spent {
    balancer: Duration,
    workers: Duration,
    softirq_threads: Duration,
    softirq: Duration,
    programs: Option<Duration>,
}

impl Spent {
    fn read(arrangement: &Arrangement) -> Result<Self> {
        Ok(Self {
            balancer: arrangement.process_time(),
            workers: arrangement.worker_time(),
            softirq_threads: cpu::of_softirq_threads(),
            softirq: cpu::softirq()?,
            programs: arrangement.program_time()?,
        })
    }
}

fn rows_of(kind: Kind, own: &[Turn], direct: &[Turn]) -> Vec<Row> {
    METRICS
        .iter()
        .enumerate()
        .map(|(metric, (name, _))| {
            let values: Vec<f64> = own.iter().map(|turn| turn[metric]).collect();
            let ratios = own.iter().zip(direct).map(|(own, direct)| own[metric] / direct[metric]).collect();
            let to_direct = Some(median(ratios)).filter(|ratio| ratio.is_finite());
            Row {
                balancer: kind.label().to_owned(),
                metric: (*name).to_owned(),
                median: median(values.clone()),
                min: values.iter().copied().fold(f64::INFINITY, f64::min),
                max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                to_direct,
                values,
            }
        })
        .filter(|row| row.median.is_finite())
        .collect()
}

fn print(report: &Report) {
    println!("{}", report.machine.describe());
    println!(
        "{} rounds of {} s; times and processor use at {} requests per s; median (least to greatest)",
        report.rounds, report.seconds, report.rate
    );
    for (metric, unit) in METRICS {
        println!("\n{metric}, {unit}");
        for row in report.rows.iter().filter(|row| row.metric == metric) {
            let range = format!("({} to {})", figure(row.min), figure(row.max));
            let ratio = row.to_direct.map(|ratio| format!("{ratio:.2} x direct")).unwrap_or_default();
            println!("  {:<12} {:>10} {range:<20} {ratio:>16}", row.balancer, figure(row.median));
        }
    }
}

/// Three or four digits, as many as mean something.
pub fn figure(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}
