//! The control plane: how long its parts take (criterion, read from where it leaves its results), and
//! how long a change takes from the API to the maps of a running daemon; health checks; what it costs
//! at rest.

mod daemon;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use lb_userspace::plan::maglev::{Member, build};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::{claims, machine::Machine, statistics::median};

/// Arguments of `bench control`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Fewer samples and sizes.
    #[arg(long)]
    pub quick: bool,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// Whether sizes and samples were few.
    #[serde(default)]
    pub quick: bool,
    /// Parts, by criterion.
    pub parts: Vec<Part>,
    /// Changes through the API.
    pub changes: Vec<Change>,
    /// The daemon at work.
    pub daemons: Vec<Daemon>,
}

/// A part of the control plane.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// Criterion's name for it.
    pub name: String,
    /// Median time in milliseconds.
    pub median_ms: f64,
}

/// A change of a running daemon's desired state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Change {
    /// What was changed.
    pub what: String,
    /// Backends of the service.
    pub backends: u32,
    /// Least time from the request to the answer, which comes when the maps are written, in ms.
    pub min_ms: f64,
    /// Median of the same.
    pub median_ms: f64,
    /// Greatest of the same.
    pub max_ms: f64,
    /// Median of the daemon's own time from the event to maps written, in ms.
    pub apply_ms: f64,
}

/// What a daemon needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Daemon {
    /// What it was doing.
    pub what: String,
    /// Backends.
    pub backends: u32,
    /// Share of one processor.
    pub cpu_share: f64,
    /// Processor time per health probe in microseconds, where it made any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_us: Option<f64>,
    /// Resident memory in MiB, without the maps, which are the kernel's.
    pub memory_mib: f64,
}

/// Measures, prints and writes what the options ask for.
pub fn run(options: &Options) -> Result<()> {
    let report = measure_all(options)?;
    println!("{}\n\n{}", report.machine.describe(), markdown(&report));
    println!("{}", claims::table(&claims::control(&report)));
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Measures a daemon, and reads what criterion measured before.
pub fn measure_all(options: &Options) -> Result<Report> {
    ensure!(geteuid().is_root(), "the daemon loads BPF programs: run it as root");
    let machine = Machine::read();
    let directory = std::env::var_os("LB_CRITERION").map_or_else(|| "target/criterion".into(), PathBuf::from);
    let mut parts = Vec::new();
    for group in ["maglev", "compile", "reconcile"] {
        find_parts(&directory.join(group), group, &mut parts);
    }
    if parts.is_empty() {
        eprintln!("  no results of criterion in {}: tables are timed here …", directory.display());
        parts = tables();
    }
    parts.sort_by(|a, b| a.name.cmp(&b.name));
    let (changes, daemons) = daemon::measure(options.quick)?;
    Ok(Report { machine, quick: options.quick, parts, changes, daemons })
}

/// Medians of building tables, where criterion has not been asked.
fn tables() -> Vec<Part> {
    const SIZE: u32 = lb_common::limits::TABLE_SIZE;
    let mut parts = Vec::new();
    for count in [10, 100, 1_000, 10_000] {
        for (name, weighted) in [("equal", false), ("weighted", true)] {
            let members: Vec<Member> = (0..count)
                .map(|i| Member {
                    seat: i,
                    weight: if weighted { 1 + i * 7 % 100 } else { 1 },
                    eligible: true,
                })
                .collect();
            let took_ms = |_| {
                let begin = Instant::now();
                std::hint::black_box(build([1, 2], SIZE, &[], std::hint::black_box(&members)));
                begin.elapsed().as_secs_f64() * 1e3
            };
            let samples = (0..31).map(took_ms).collect();
            parts.push(Part { name: format!("maglev/{name}/{SIZE}x{count}"), median_ms: median(samples) });
        }
    }
    parts
}

/// Collects criterion's medians below `directory`, whose benches are called `name`.
fn find_parts(directory: &Path, name: &str, parts: &mut Vec<Part>) {
    #[derive(Deserialize)]
    struct Estimate {
        point_estimate: f64,
    }
    #[derive(Deserialize)]
    struct Estimates {
        median: Estimate,
    }
    let estimates = fs::read_to_string(directory.join("new/estimates.json")).ok();
    if let Some(estimates) = estimates.and_then(|text| serde_json::from_str::<Estimates>(&text).ok()) {
        parts.push(Part { name: name.to_owned(), median_ms: estimates.median.point_estimate / 1e6 });
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let inner = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && inner != "report" {
            find_parts(&entry.path(), &format!("{name}/{inner}"), parts);
        }
    }
}

/// The report as Markdown tables.
pub fn markdown(report: &Report) -> String {
    let mut text = String::from("| part | median, ms |\n|---|---:|\n");
    for part in &report.parts {
        text.push_str(&format!("| {} | {:.3} |\n", part.name, part.median_ms));
    }
    text.push_str(
        "\n| change, from the request until the maps are written | backends | least, ms | median | greatest | \
         the daemon's own, median |\n|---|---:|---:|---:|---:|---:|\n",
    );
    for change in &report.changes {
        text.push_str(&format!(
            "| {} | {} | {:.2} | {:.2} | {:.2} | {:.2} |\n",
            change.what, change.backends, change.min_ms, change.median_ms, change.max_ms, change.apply_ms
        ));
    }
    text.push_str(
        "\n| daemon | backends | share of a processor | µs per probe | memory, MiB |\n|---|---:|---:|---:|---:|\n",
    );
    for daemon in &report.daemons {
        text.push_str(&format!(
            "| {} | {} | {:.2} % | {} | {:.0} |\n",
            daemon.what,
            daemon.backends,
            daemon.cpu_share * 100.0,
            daemon.probe_us.map_or_else(String::new, |us| format!("{us:.0}")),
            daemon.memory_mib
        ));
    }
    text
}

/// Curves against the number of backends, in milliseconds.
pub fn curves(report: &Report) -> Vec<(String, Vec<(f64, f64)>)> {
    let mut curves: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for change in &report.changes {
        let point = (f64::from(change.backends), change.median_ms);
        match curves.iter_mut().find(|(name, _)| *name == change.what) {
            Some((_, points)) => points.push(point),
            None => curves.push((change.what.clone(), vec![point])),
        }
    }
    curves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criterion_results_are_found_by_name() {
        let directory = std::env::temp_dir().join(format!("bench-criterion-{}", std::process::id()));
        let place = directory.join("maglev/weighted/65537x1000/new");
        fs::create_dir_all(&place).unwrap();
        fs::create_dir_all(directory.join("maglev/report")).unwrap();
        let estimates = r#"{"mean":{"point_estimate":1.0},"median":{"point_estimate":1500000.0}}"#;
        fs::write(place.join("estimates.json"), estimates).unwrap();
        let mut parts = Vec::new();
        find_parts(&directory.join("maglev"), "maglev", &mut parts);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(parts.len(), 1);
        assert_eq!((parts[0].name.as_str(), parts[0].median_ms), ("maglev/weighted/65537x1000", 1.5));
    }
}
