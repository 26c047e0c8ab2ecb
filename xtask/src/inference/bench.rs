//! `cargo xtask bench inference`: compares the worker with transformers and llama.cpp in one run on one machine.
//!
//! Input: the default model. Output: a table, and with `--json FILE` the same as JSON. The engines' rounds alternate,
//! so that a busy moment affects all of them; each figure is the best of its rounds.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use super::{build_worker, model, python};
use crate::shell;

/// Measure the inference worker.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench inference")]
struct Options {
    /// Number of rounds per engine.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write the figures to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Skip transformers (which needs a download of 2.7 GB) and llama.cpp.
    #[arg(long)]
    no_reference: bool,
}

/// Goals by figure: minimum ratio of the worker's figure to that of transformers.
const GOALS: [(&str, f64); 3] = [("decode_1", 2.5), ("decode_8", 2.0), ("prefill_512", 1.0)];
/// Figures of llama.cpp with the same file and 2 threads, measured once on an AVX2 machine; shown if its package cannot
/// be installed. For orientation only.
const LLAMA_CPP: [(&str, f64); 4] =
    [("decode_1", 138.0), ("decode_4", 154.0), ("decode_8", 172.0), ("prefill_512", 206.0)];

type Figures = BTreeMap<String, f64>;

/// Runs the benchmark with the arguments after `inference`.
pub fn run(arguments: &[String]) -> Result<()> {
    let options =
        Options::parse_from(std::iter::once("inference".to_owned()).chain(arguments.iter().cloned()));
    let worker = build_worker()?;
    let mut build =
        super::cargo(&["build", "--release", "--package", "inference-worker", "--example", "measure"])?;
    shell::with_progress("building the benchmark program", &mut build)?;
    let measure = worker.with_file_name("examples").join("measure");
    let model = model::ensure()?;
    let peers = if options.no_reference { Vec::new() } else { peers()? };
    let mut engines: BTreeMap<&str, Figures> = BTreeMap::new();
    if peers.iter().all(|(name, ..)| *name != "llama_cpp") {
        engines.insert("llama_cpp_elsewhere", LLAMA_CPP.map(|(name, value)| (name.to_owned(), value)).into());
    }
    for round in 1..=options.rounds {
        eprintln!("  round {round} of {}", options.rounds);
        for (name, arguments) in [
            ("worker", ["step", "native"]),
            ("worker_f32", ["step", "native-f32"]),
            ("libtorch_f32", ["step", "torch-f32"]),
        ] {
            let mut command = Command::new(&measure);
            command.args(arguments).arg(&model);
            keep_best(engines.entry(name).or_default(), measured(&mut command)?);
        }
        for (name, python, script) in &peers {
            let mut command = Command::new(python);
            command.arg(script).arg(&model);
            keep_best(engines.entry(name).or_default(), measured(&mut command)?);
        }
        let mut command = Command::new(&measure);
        command.args(["serve", "native"]).arg(&model);
        keep_best(engines.entry("worker").or_default(), measured(&mut command)?);
    }
    let verdicts = report(&engines);
    if let Some(path) = &options.json {
        let all = json!({"unit": "tokens/s unless named otherwise", "engines": engines, "goals": verdicts});
        fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Returns the engines to compare with: name, Python and script of each.
fn peers() -> Result<Vec<(&'static str, PathBuf, PathBuf)>> {
    let script = |file: &str| shell::workspace().join("inference-worker/tests/reference").join(file);
    let mut peers =
        vec![("transformers_f32", python::ensure(python::REFERENCE)?, script("measure_transformers.py"))];
    match python::ensure(python::LLAMA_CPP) {
        Ok(python) => peers.push(("llama_cpp", python, script("measure_llama_cpp.py"))),
        Err(error) => eprintln!("cannot install llama.cpp, showing earlier figures instead: {error:#}"),
    }
    Ok(peers)
}

/// Runs a command and parses its figures, a JSON object on the last line.
fn measured(command: &mut Command) -> Result<Figures> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // Comment lines report the engine's version.
    text.lines().filter_map(|line| line.strip_prefix("# ")).for_each(|line| eprintln!("  {line}"));
    let last = text
        .lines()
        .rfind(|line| line.starts_with('{'))
        .with_context(|| format!("{name} printed no figures"))?;
    serde_json::from_str(last).with_context(|| format!("{name} printed {last}"))
}

/// Keeps the better value of each figure: the smaller of times (`…_ms`, `…_ratio`), the larger of speeds.
fn keep_best(best: &mut Figures, new: Figures) {
    for (name, value) in new {
        let small = name.ends_with("_ms") || name.ends_with("_ratio");
        let entry = best.entry(name).or_insert(value);
        *entry = if small { entry.min(value) } else { entry.max(value) };
    }
}

/// Prints the ratios of the worker's speeds to those of the other engines.
fn print_ratios(engines: &BTreeMap<&str, Figures>) {
    let Some(worker) = engines.get("worker") else { return };
    println!(
        "\n{:<28}{}",
        "worker over",
        engines.keys().map(|name| format!("{name:>20}")).collect::<String>()
    );
    for (name, ours) in
        worker.iter().filter(|(name, _)| name.starts_with("decode") || name.starts_with("prefill"))
    {
        let cells = engines.values().map(|figures| {
            let ratio =
                figures.get(name).map_or_else(|| "–".into(), |theirs| format!("{:.2}", ours / theirs));
            format!("{ratio:>20}")
        });
        println!("{name:<28}{}", cells.collect::<String>());
    }
    println!();
}

fn report(engines: &BTreeMap<&str, Figures>) -> Vec<Value> {
    let mut names: Vec<&String> = engines.values().flat_map(Figures::keys).collect();
    names.sort();
    names.dedup();
    print!("{:<28}", "figure");
    engines.keys().for_each(|engine| print!("{engine:>20}"));
    println!();
    for name in names {
        print!("{name:<28}");
        for figures in engines.values() {
            print!("{:>20}", figures.get(name).map_or_else(|| "–".into(), |value| format!("{value:.1}")));
        }
        println!();
    }
    print_ratios(engines);
    let mut verdicts = Vec::new();
    let mut verdict = |what: String, value: f64, goal: f64, met: bool| {
        println!("{} {what}: {value:.2}, goal {goal}", if met { "met   " } else { "MISSED" });
        verdicts.push(json!({"what": what, "value": value, "goal": goal, "met": met}));
    };
    let get = |engine: &str, name: &str| engines.get(engine).and_then(|figures| figures.get(name)).copied();
    for (name, goal) in GOALS {
        if let (Some(ours), Some(theirs)) = (get("worker", name), get("transformers_f32", name)) {
            verdict(format!("{name} over transformers"), ours / theirs, goal, ours >= goal * theirs);
        }
    }
    if let Some(ratio) = get("worker", "ttft_busy_over_idle_ratio") {
        verdict("first token during a 1,000-token prefill over idle".into(), ratio, 3.0, ratio <= 3.0);
    }
    if let (Some(eight), Some(one)) = (get("worker", "serve_8"), get("worker", "serve_1")) {
        verdict("8 streams over 1".into(), eight / one, 3.0, eight >= 3.0 * one);
    }
    verdicts
}
