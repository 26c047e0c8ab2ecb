//! Everything in one run: figures as JSON, a report to read, charts.
//!
//! In: [`Options`]. Out: `report.json`, `report.md` and `*.svg` in one directory.

mod chart;
mod text;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    claims::{self, Claim},
    control,
    machine::Machine,
    packet, sidebyside,
};

/// Arguments of `bench` without a subcommand.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Everything, coarsely, in under two minutes.
    #[arg(long)]
    pub quick: bool,
    /// Samples of each packet row, instead of the usual number.
    #[arg(long)]
    pub samples: Option<usize>,
    /// Packets of each sample, likewise.
    #[arg(long)]
    pub packets: Option<u32>,
    /// Rounds of each load side by side, likewise.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Take the parts that were measured on their own from here: packet.json, side-by-side.json, control.json, those
    /// that there are, as `packet --json` and its kin write them.
    #[arg(long, value_name = "DIRECTORY")]
    pub parts: Option<PathBuf>,
    /// Show what changed since this report.
    #[arg(long, value_name = "JSON")]
    pub compare: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    pub out: PathBuf,
    /// Also write the report as docs/performance.md, with its charts beside it.
    #[arg(long)]
    pub publish: bool,
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Whole {
    /// When it began (RFC 3339).
    pub taken_at: String,
    /// The source's commit, with `+` where files had been changed since.
    pub revision: String,
    /// Whether it was a quick one.
    pub quick: bool,
    /// What makes it less than a full run in one go, for people; empty if nothing does.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// Where.
    pub machine: Machine,
    /// Samples of each packet row.
    pub samples: usize,
    /// Packets of each sample.
    pub packets: u32,
    /// Nanoseconds per packet.
    pub rows: Vec<packet::Figures>,
    /// The loaded programs.
    pub programs: Vec<packet::Program>,
    /// Their maps.
    pub maps: Vec<packet::MapMemory>,
    /// The control plane.
    pub control: control::Report,
    /// Real requests.
    pub side_by_side: sidebyside::Report,
    /// What is claimed, and whether it holds.
    pub claims: Vec<Claim>,
}

/// Measures everything and writes the report.
pub fn run(options: &Options) -> Result<()> {
    let other = options.compare.as_deref().map(read).transpose()?;
    fs::create_dir_all(&options.out).with_context(|| format!("create {}", options.out.display()))?;
    let whole = measure(options)?;
    let json = serde_json::to_string_pretty(&whole)?;
    write(&options.out.join("report.json"), &json)?;
    let charts = draw(&whole, &options.out)?;
    write(&options.out.join("report.md"), &text::render(&whole, &charts, "", other.as_ref()))?;
    if options.publish {
        publish(&whole, &charts, &options.out)?;
    }
    println!("{}", whole.machine.describe());
    println!("\n{}", claims::table(&whole.claims));
    if let Some(other) = &other {
        println!("{}", text::comparison(&whole, other));
    }
    println!("{}", options.out.join("report.md").display());
    Ok(())
}

/// Puts a run into the documentation.
fn publish(whole: &Whole, charts: &[Chart], from: &Path) -> Result<()> {
    let folder = Path::new("docs/performance");
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    for chart in charts {
        let (from, to) = (from.join(&chart.file), folder.join(&chart.file));
        fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    }
    write(Path::new("docs/performance.md"), &text::render(whole, charts, "performance/", None))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn read(path: &Path) -> Result<Whole> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is no report of this version of the bench", path.display()))
}

fn measure(options: &Options) -> Result<Whole> {
    let quick = options.quick;
    let taken_at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    // The control plane first: its daemons would otherwise run on the processor that packets pin.
    eprintln!("control plane …");
    let control = match part(options, "control.json")? {
        Some(control) => control,
        None => control::measure_all(&control::Options { quick, ..Default::default() })?,
    };
    eprintln!("side by side …");
    let side_by_side = match part(options, "side-by-side.json")? {
        Some(side_by_side) => side_by_side,
        None => sidebyside::measure_all(&sidebyside::Options {
            quick,
            rounds: options.rounds,
            ..Default::default()
        })?,
    };
    eprintln!("packets …");
    let packet = match part(options, "packet.json")? {
        Some(packet) => packet,
        None => packet::measure_all(&packet::Options {
            quick,
            samples: options.samples,
            packets: options.packets,
            ..Default::default()
        })?,
    };
    let lacks = lacks(options, &packet, &control);
    let mut claims = claims::packet(&packet);
    claims.extend(claims::control(&control));
    claims.extend(claims::side_by_side(&side_by_side));
    Ok(Whole {
        taken_at,
        revision: revision(),
        quick,
        lacks,
        machine: packet.machine,
        samples: packet.samples,
        packets: packet.packets,
        rows: packet.rows,
        programs: packet.programs,
        maps: packet.maps,
        control,
        side_by_side,
        claims,
    })
}

/// What makes a run less than a full one in one go. Side by side says its rounds itself.
fn lacks(options: &Options, packet: &packet::Report, control: &control::Report) -> Vec<String> {
    let mut lacks = Vec::new();
    let apart: Vec<&str> =
        PARTS.into_iter().filter(|(_, file)| has_part(options, file)).map(|(part, _)| part).collect();
    if !apart.is_empty() {
        lacks.push(format!("measured on their own, at other times: {}", apart.join(", ")));
    }
    lacks.extend(packet.left_out.iter().cloned());
    if control.quick && !options.quick {
        lacks.push("control plane: few sizes and samples".to_owned());
    }
    lacks
}

/// The parts, and the files from which they may be taken.
const PARTS: [(&str, &str); 3] =
    [("packets", "packet.json"), ("control plane", "control.json"), ("side by side", "side-by-side.json")];

fn has_part(options: &Options, file: &str) -> bool {
    options.parts.as_ref().is_some_and(|directory| directory.join(file).exists())
}

/// A part that was measured on its own.
fn part<T: serde::de::DeserializeOwned>(options: &Options, file: &str) -> Result<Option<T>> {
    let Some(path) =
        options.parts.as_ref().map(|directory| directory.join(file)).filter(|path| path.exists())
    else {
        return Ok(None);
    };
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let part = serde_json::from_str(&text);
    part.map(Some).with_context(|| format!("{} is of another version of the bench", path.display()))
}

/// The source's commit, as git names it; "unknown" outside a checkout.
fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let is_changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|said| !said.is_empty());
    if is_changed { commit + "+" } else { commit }
}

/// A chart's file and what it shows.
pub struct Chart {
    /// File name.
    pub file: String,
    /// Title.
    pub title: String,
}

/// Draws every chart that there are figures for.
fn draw(whole: &Whole, directory: &Path) -> Result<Vec<Chart>> {
    let mut charts = Vec::new();
    let mut add = |file: &str, title: &str| {
        charts.push(Chart { file: file.to_owned(), title: title.to_owned() });
        directory.join(file)
    };
    for (file, title, x, prefix) in [
        ("growth-services.svg", "ns per packet against services", "services", "services-"),
        ("growth-backends.svg", "ns per packet against backends", "backends", "backends"),
        ("growth-flows.svg", "ns per packet against flows", "flows", "flows"),
        ("growth-deny.svg", "ns per packet against deny entries", "deny entries", "deny"),
    ] {
        let lines = curves(&whole.rows, prefix);
        if !lines.is_empty() {
            chart::lines(&add(file, title), title, x, "ns per packet, net", &lines)?;
        }
    }
    let lines = control::curves(&whole.control)
        .into_iter()
        .map(|(name, points)| chart::Line { name, points })
        .collect::<Vec<_>>();
    if !lines.is_empty() {
        let title = "Control plane against backends";
        chart::lines(&add("growth-control.svg", title), title, "backends", "ms", &lines)?;
    }
    for (file, metric) in [
        ("side-new.svg", "new connections"),
        ("side-kept.svg", "kept connections"),
        ("side-bulk.svg", "bulk"),
        ("side-p50.svg", "closed p50"),
        ("side-p99.svg", "closed p99"),
        ("side-cpu.svg", "CPU"),
    ] {
        let unit = sidebyside::METRICS.iter().find(|(name, _)| *name == metric).map_or("", |(_, unit)| unit);
        let unit = unit.split(':').next().unwrap_or(unit);
        let bars: Vec<chart::Bar> = whole
            .side_by_side
            .rows
            .iter()
            .filter(|row| row.metric == metric)
            .map(|row| chart::Bar {
                name: row.balancer.clone(),
                value: row.median,
                range: (row.min, row.max),
            })
            .collect();
        if !bars.is_empty() {
            let title = format!("Side by side: {metric}");
            chart::bars(&add(file, &title), &title, unit, &bars)?;
        }
    }
    Ok(charts)
}

/// Curves of growth whose name begins so.
fn curves(rows: &[packet::Figures], prefix: &str) -> Vec<chart::Line> {
    let mut lines: Vec<chart::Line> = Vec::new();
    for row in rows {
        let Some((curve, x)) = row.growth.as_ref().filter(|(curve, _)| curve.starts_with(prefix)) else {
            continue;
        };
        let point = (f64::from(*x).max(1.0), row.net);
        match lines.iter_mut().find(|line| line.name == *curve) {
            Some(line) => line.points.push(point),
            None => lines.push(chart::Line { name: curve.clone(), points: vec![point] }),
        }
    }
    lines
}
