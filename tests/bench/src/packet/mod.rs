//! Nanoseconds per packet of the loaded programs, by BPF_PROG_TEST_RUN.
//!
//! In: the compiled objects, [`rows`]. Out: a [`Report`]. The kernel's loop and the wrapper are
//! measured around a bare XDP_TX in the same turn and subtracted.

mod bed;
mod frame;
mod measure;
pub mod rows;
mod wrapper;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use lb_common::names;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};

use crate::{
    claims,
    dataplane::{Decap, GUARD_BLOCKS, Ingress, Tables, map_memory},
    machine::Machine,
    objects,
    statistics::{least, median},
};
use measure::{Effort, Samples};
use rows::Row;

/// Arguments of `bench packet`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Fewer and shorter samples: good enough to see a change of a tenth.
    #[arg(long)]
    pub quick: bool,
    /// Only rows whose name contains one of these.
    #[arg(long, value_name = "TEXT")]
    pub filter: Vec<String>,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure this object of the ingress program too, in turn with the present one.
    #[arg(long, value_name = "OBJECT")]
    pub before: Option<PathBuf>,
    /// Measure this object of the ingress program instead of the present one.
    #[arg(long, value_name = "OBJECT")]
    pub object: Option<PathBuf>,
    /// Copy the present object of the ingress program here, for a later `--before`.
    #[arg(long, value_name = "OBJECT")]
    pub save: Option<PathBuf>,
    /// Processor to run on; the last one by default.
    #[arg(long)]
    pub cpu: Option<usize>,
    /// Samples of each row.
    #[arg(long)]
    pub samples: Option<usize>,
    /// Packets of each sample.
    #[arg(long)]
    pub packets: Option<u32>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// Samples of each row.
    pub samples: usize,
    /// Packets of each sample.
    pub packets: u32,
    /// Which rows are missing, and why; empty if none is.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// The rows.
    pub rows: Vec<Figures>,
    /// The loaded programs.
    pub programs: Vec<Program>,
    /// Their maps.
    pub maps: Vec<MapMemory>,
}

/// A row's figures. Nanoseconds per packet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Heading.
    pub section: String,
    /// Name.
    pub name: String,
    /// Least of the samples, wrapper and kernel's loop included.
    pub ns_min: f64,
    /// Their median.
    pub ns_median: f64,
    /// Least of a bare XDP_TX in the same wrapper.
    pub bare_min: f64,
    /// `ns_min` less `bare_min`: the program's own cost.
    pub net: f64,
    /// Median of the differences, sample by sample.
    pub net_median: f64,
    /// Millions of packets per second and core at `net`: the program alone, no driver.
    pub mpps: f64,
    /// `ns_min` as a multiple of `bare_min`.
    pub tx_multiple: f64,
    /// `net` of the encapsulation with a fixed header on the same frame.
    pub floor_net: f64,
    /// `net` as a multiple of `floor_net`.
    pub floor_multiple: f64,
    /// The curve of growth on which it stands, and how many there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<(String, u32)>,
    /// `net` of the older object, where one was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before_net: Option<f64>,
}

/// A loaded program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Name.
    pub name: String,
    /// Instructions that the verifier walked through, over all paths.
    pub verified_instructions: u32,
    /// Instructions that are left after it removed what is switched off.
    pub instructions: u32,
    /// Bytes of machine code.
    pub jited_bytes: u32,
}

/// A map's memory as the kernel reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapMemory {
    /// Name.
    pub name: String,
    /// Entries that it has room for.
    pub entries: u32,
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes per entry.
    pub bytes_per_entry: f64,
}

/// Measures, prints and writes what the options ask for.
pub fn run(options: &Options) -> Result<()> {
    if let Some(path) = &options.save {
        fs::write(path, objects::INGRESS).with_context(|| format!("write {}", path.display()))?;
    }
    let report = measure_all(options)?;
    print(&report);
    println!("\n{}", claims::table(&claims::packet(&report)));
    if let Some(path) = &options.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Measures every row that the options name.
pub fn measure_all(options: &Options) -> Result<Report> {
    ensure!(geteuid().is_root(), "measuring loads BPF programs: run it as root");
    ensure!(!objects::INGRESS.is_empty(), "built with LB_SKIP_BPF=1: there is nothing to measure");
    let machine = Machine::read();
    if !machine.jit {
        eprintln!("warning: net.core.bpf_jit_enable is 0: the figures below are of the interpreter");
    }
    pin(options.cpu)?;
    let read = |path: &PathBuf| -> Result<_> {
        Ok(aligned(&fs::read(path).with_context(|| format!("read {}", path.display()))?))
    };
    let before = options.before.as_ref().map(read).transpose()?;
    let other = options.object.as_ref().map(read).transpose()?;
    let object = other.as_deref().map_or(objects::INGRESS, as_bytes);
    let effort = Effort {
        samples: options.samples.unwrap_or(if options.quick { 3 } else { 21 }),
        packets: options.packets.unwrap_or(if options.quick { 50_000 } else { 100_000 }),
    };
    ensure!(effort.samples > 0 && effort.packets >= 1_000, "at least 1 sample of 1,000 packets");
    let (programs, maps) = sizes(object)?;
    let has_lists = maps.iter().any(|map| map.name == GUARD_BLOCKS);
    let mut rows = rows::all();
    let mut left_out = Vec::new();
    let mut leave_out = |why: &str, is_wanted: &dyn Fn(&Row) -> bool| {
        let count = rows.len();
        rows.retain(is_wanted);
        if rows.len() < count {
            left_out.push(format!("{} rows: {why}", count - rows.len()));
        }
    };
    leave_out("the program has no deny list", &|row| {
        has_lists || !matches!(row.subject, rows::Subject::Guarded(..))
    });
    if !options.filter.is_empty() {
        let why = format!("only names that contain {}", options.filter.join(" or "));
        leave_out(&why, &|row| options.filter.iter().any(|text| row.name.contains(text)));
    } else if options.quick {
        leave_out("a quick run", &Row::is_quick);
    }
    let room_mib = machine.available_mib / 2;
    leave_out(
        &format!("their flow tables take more than half of the {} MiB that were free", room_mib * 2),
        &|row| {
            // The programs' other maps take some 200 MiB.
            row.tables.memory_mib() + 200 <= room_mib
        },
    );
    for reason in &left_out {
        eprintln!("  left out: {reason}");
    }
    if rows.is_empty() {
        bail!("no rows are left");
    }
    Ok(Report {
        machine,
        samples: effort.samples,
        packets: effort.packets,
        left_out,
        rows: measure_rows(&rows, object, before.as_deref().map(as_bytes), effort)?,
        programs,
        maps,
    })
}

/// Measures rows, those that share their maps together; the result is in the order of `rows`.
fn measure_rows(rows: &[Row], object: &[u8], before: Option<&[u8]>, effort: Effort) -> Result<Vec<Figures>> {
    let mut figures: Vec<Option<Figures>> = rows.iter().map(|_| None).collect();
    while let Some(first) = figures.iter().position(Option::is_none) {
        let group: Vec<usize> =
            (first..rows.len()).filter(|i| rows[*i].tables == rows[first].tables).collect();
        eprintln!("  {} rows: {} …", group.len(), rows[first].section);
        let members: Vec<&Row> = group.iter().map(|i| &rows[*i]).collect();
        let samples = measure::measure(&members, object, before, effort)?;
        for (i, samples) in group.into_iter().zip(samples) {
            figures[i] = Some(Figures::new(&rows[i], &samples));
        }
    }
    Ok(figures.into_iter().flatten().collect())
}

impl Figures {
    fn new(row: &Row, samples: &Samples) -> Self {
        let (ns_min, bare_min) = (least(&samples.row), least(&samples.bare));
        let net = ns_min - bare_min;
        let floor_net = least(&samples.floor) - bare_min;
        let differences = samples.row.iter().zip(&samples.bare).map(|(row, bare)| row - bare).collect();
        Self {
            section: row.section.to_owned(),
            name: row.name.clone(),
            ns_min,
            ns_median: median(samples.row.clone()),
            bare_min,
            net,
            net_median: median(differences),
            mpps: 1_000.0 / net,
            tx_multiple: ns_min / bare_min,
            floor_net,
            floor_multiple: net / floor_net,
            growth: row.growth.map(|growth| (growth.curve.to_owned(), growth.x)),
            before_net: samples.before.as_ref().map(|before| least(before) - bare_min),
        }
    }
}

/// Keeps this thread on one processor.
fn pin(cpu: Option<usize>) -> Result<()> {
    let mut allowed = nix::sched::sched_getaffinity(Pid::from_raw(0))?;
    let cpu = match cpu {
        Some(cpu) => cpu,
        None => (0..CpuSet::count())
            .rev()
            .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
            .context("no processor to run on")?,
    };
    allowed = CpuSet::new();
    allowed.set(cpu).with_context(|| format!("no processor {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &allowed).with_context(|| format!("cannot run on processor {cpu}"))
}

/// An object file at an address that the ELF reader accepts.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut words = vec![0u64; bytes.len().div_ceil(8)];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_ne_bytes(padded);
    }
    words
}

fn as_bytes(words: &[u64]) -> &[u8] {
    // SAFETY: the same memory, every byte of which is initialised, at a weaker alignment.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// Figures of the programs and maps as they ship.
fn sizes(object: &[u8]) -> Result<(Vec<Program>, Vec<MapMemory>)> {
    let ingress = Ingress::load(object, Tables::DEFAULT)?;
    let decap = Decap::load(&[], &[])?;
    let programs =
        vec![program(ingress.bpf(), names::PROGRAM_INGRESS)?, program(decap.bpf(), names::PROGRAM_DECAP)?];
    let mut maps = Vec::new();
    for (name, map) in ingress.bpf().maps() {
        let Ok((bytes, entries)) = map_memory(map) else { continue };
        let bytes_per_entry = bytes as f64 / f64::from(entries.max(1));
        maps.push(MapMemory { name: name.to_owned(), entries, bytes, bytes_per_entry });
    }
    maps.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.name.cmp(&b.name)));
    Ok((programs, maps))
}

fn program(bpf: &Ebpf, name: &str) -> Result<Program> {
    let info = bpf.program(name).with_context(|| format!("no program {name}"))?.info()?;
    Ok(Program {
        name: name.to_owned(),
        verified_instructions: info.verified_instruction_count().unwrap_or(0),
        instructions: info.size_translated().unwrap_or(0) / 8,
        jited_bytes: info.size_jitted(),
    })
}

fn print(report: &Report) {
    println!("{}", report.machine.describe());
    println!("{} samples of {} packets; ns per packet", report.samples, report.packets);
    let has_before = report.rows.iter().any(|row| row.before_net.is_some());
    let mut section = "";
    for row in &report.rows {
        if row.section != section {
            section = &row.section;
            let before = if has_before { "  before  change" } else { "" };
            println!(
                "\n{section:<48} {:>7} {:>7} {:>7} {:>6} {:>7}{before}",
                "net", "median", "Mpps", "x TX", "x floor"
            );
        }
        print!(
            "  {:<46} {:>7.1} {:>7.1} {:>7.2} {:>6.2} {:>7.2}",
            row.name, row.net, row.net_median, row.mpps, row.tx_multiple, row.floor_multiple
        );
        match row.before_net {
            Some(before) => println!(" {before:>7.1} {:>+6.1} %", (row.net / before - 1.0) * 100.0),
            None => println!(),
        }
    }
    println!("\n{:<20} {:>10} {:>13} {:>12}", "program", "verified", "instructions", "jited bytes");
    for program in &report.programs {
        println!(
            "  {:<18} {:>10} {:>13} {:>12}",
            program.name, program.verified_instructions, program.instructions, program.jited_bytes
        );
    }
    println!("\n{:<20} {:>10} {:>14} {:>16}", "map", "entries", "KiB", "bytes per entry");
    for map in &report.maps {
        println!(
            "  {:<18} {:>10} {:>14} {:>16.0}",
            map.name,
            map.entries,
            map.bytes / 1_024,
            map.bytes_per_entry
        );
    }
}
