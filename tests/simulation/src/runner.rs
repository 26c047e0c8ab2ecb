//! Runs seeds, each in a process of its own, and reports what they found and what they covered.

use super::{
    bugs::Bug,
    environment,
    faults::Fault,
    operations::Kind,
    simulation::{Simulation, Violation},
};
use clap::Parser;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    panic,
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Real time of a run without arguments.
const SHORT: Duration = Duration::from_secs(60);
/// Seeds of a run without arguments at most, so that a fast machine does not run seeds that nobody has run.
const SHORT_SEEDS: u64 = 16;
/// Hours of a run from which on it must fill the whole table.
const COVERS_ALL: f64 = 1.0;
/// Seeds within which each bug must be found.
const BUG_SEEDS: u64 = 24;
/// Real time after which a seed counts as hung.
const HUNG: Duration = Duration::from_secs(300);

#[derive(Parser)]
#[command(about = "Simulates the control plane")]
struct Arguments {
    /// Run only this seed, and show its account.
    #[arg(long)]
    seed: Option<u64>,
    /// Run for this many hours.
    #[arg(long)]
    hours: Option<f64>,
    /// Steps of each seed.
    #[arg(long, default_value_t = 120)]
    steps: u64,
    /// Put a bug back.
    #[arg(long, value_parser = bug_of)]
    bug: Option<Bug>,
    /// Print only a result for the program that started this one.
    #[arg(long, hide = true)]
    child: bool,
    /// Run nothing unless the name of this test contains the text.
    #[arg(hide = true)]
    filter: Option<String>,
}

fn bug_of(name: &str) -> Result<Bug, String> {
    let known: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
    Bug::ALL
        .iter()
        .copied()
        .find(|bug| bug.name() == name)
        .ok_or_else(|| format!("the bugs are {}", known.join(", ")))
}

/// Result of one seed.
#[derive(Serialize, Deserialize)]
struct SeedResult {
    seed: u64,
    simulated_s: f64,
    operations: u64,
    /// Kind of operation, fault, number.
    coverage: Vec<(String, String, u64)>,
    violation: Option<(String, String)>,
    /// Hash of all that has happened.
    trace: u64,
    account: Vec<String>,
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.filter.as_ref().is_some_and(|text| !"simulation".contains(text.as_str())) {
        println!("test result: ok. 0 passed; 0 failed; 0 ignored");
        return ExitCode::SUCCESS;
    }
    match arguments.seed {
        Some(seed) => run_seed(seed, &arguments),
        None => run_many(&arguments),
    }
}

fn run_seed(seed: u64, arguments: &Arguments) -> ExitCode {
    let (steps, bug) = (arguments.steps, arguments.bug);
    let result = std::thread::Builder::new()
        .name("simulation".to_owned())
        .stack_size(16 << 20)
        .spawn(move || simulate(seed, steps, bug))
        .expect("a thread can be started")
        .join()
        .expect("panics are caught");
    let code = if result.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if arguments.child {
        println!("{}", serde_json::to_string(&result).expect("it has a JSON form"));
        return ExitCode::SUCCESS;
    }
    println!("seed {seed}: {} operations in {:.0} simulated seconds", result.operations, result.simulated_s);
    match &result.violation {
        Some(_) => describe(&result),
        None => println!("no violation"),
    }
    code
}

fn simulate(seed: u64, steps: u64, bug: Option<Bug>) -> SeedResult {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let directory = directory.expect("a temporary directory can be created");
    lb_userspace::blocking::run_on_this_thread();
    let panicked = std::sync::Arc::new(Mutex::new(None));
    let seen = panicked.clone();
    panic::set_hook(Box::new(move |info| {
        let text = info.to_string();
        seen.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
    }));
    environment::begin(seed);
    let mut simulation = Simulation::new(seed, directory.path(), bug);
    let run = panic::catch_unwind(panic::AssertUnwindSafe(|| simulation.run(steps)));
    let mut violation = match run {
        Ok(result) => result.err(),
        Err(_) => Some(Violation { invariant: "no panic", what: String::new() }),
    };
    if let Some(text) = panicked.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let what = violation.map(|v| v.what).unwrap_or_default();
        violation = Some(Violation { invariant: "no panic", what: format!("{text} {what}") });
    }
    let coverage =
        simulation.coverage.iter().map(|((a, b), n)| ((*a).to_owned(), (*b).to_owned(), *n)).collect();
    let simulated_s = environment::now().saturating_sub(environment::ORIGIN).as_secs_f64();
    SeedResult {
        seed,
        simulated_s,
        operations: simulation.asked.len() as u64,
        coverage,
        violation: violation.map(|v| (v.invariant.to_owned(), v.what)),
        trace: simulation.trace,
        account: simulation.account(),
    }
}

fn describe(result: &SeedResult) {
    for line in &result.account {
        println!("  {line}");
    }
    if let Some((invariant, what)) = &result.violation {
        println!("VIOLATED by seed {}: {invariant}", result.seed);
        println!("  {what}");
        println!("  repeat it with: cargo xtask test simulation --seed {}", result.seed);
    }
}

/// Runs one seed in a process of its own.
fn run_child(seed: u64, steps: u64, bug: Option<Bug>) -> SeedResult {
    let mut command = Command::new(std::env::current_exe().expect("the program has a path"));
    command.args(["--child", "--seed", &seed.to_string(), "--steps", &steps.to_string()]);
    if let Some(bug) = bug {
        command.args(["--bug", bug.name()]);
    }
    let failed = |what: String| SeedResult {
        seed,
        simulated_s: 0.0,
        operations: 0,
        coverage: Vec::new(),
        violation: Some(("the simulation runs to its end".to_owned(), what)),
        trace: 0,
        account: Vec::new(),
    };
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return failed(error.to_string()),
    };
    let (began, id) = (Instant::now(), child.id());
    let done = std::sync::Arc::new(AtomicU64::new(0));
    let flag = done.clone();
    std::thread::spawn(move || {
        while flag.load(Ordering::Relaxed) == 0 {
            if began.elapsed() > HUNG {
                // A child that this program started and has not waited for yet.
                let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let errors = child.stderr.take();
    let stderr = std::thread::spawn(move || {
        errors.map(std::io::read_to_string).and_then(Result::ok).unwrap_or_default()
    });
    let text = child.stdout.take().map(std::io::read_to_string).and_then(Result::ok).unwrap_or_default();
    done.store(1, Ordering::Relaxed);
    let status = child.wait();
    let errors = stderr.join().unwrap_or_default();
    serde_json::from_str(text.trim()).unwrap_or_else(|_| {
        failed(format!("seed {seed} ended with {status:?} after {:?}: {errors}", began.elapsed()))
    })
}

/// Sums of many seeds.
#[derive(Default)]
struct Totals {
    seeds: u64,
    simulated_s: f64,
    operations: u64,
    coverage: BTreeMap<(String, String), u64>,
    violations: Vec<SeedResult>,
}

impl Totals {
    fn add(&mut self, result: SeedResult) {
        self.seeds += 1;
        self.simulated_s += result.simulated_s;
        self.operations += result.operations;
        for (operation, fault, count) in &result.coverage {
            *self.coverage.entry((operation.clone(), fault.clone())).or_default() += count;
        }
        if result.violation.is_some() {
            self.violations.push(result);
        }
    }

    /// Prints the table; returns the number of its empty cells.
    fn print_coverage(&self) -> usize {
        let columns: Vec<&str> =
            std::iter::once("none").chain(Fault::ALL.iter().map(|f| f.label())).collect();
        println!("\noperations by the faults that were active:");
        for (number, column) in columns.iter().enumerate() {
            println!("  {number:>2} {column}");
        }
        let head: String = (0..columns.len()).map(|n| format!("{n:>7}")).collect();
        println!("{:<16}{head}", "");
        let mut empty = 0;
        for kind in Kind::ALL {
            let cell = |column: &&str| {
                self.coverage.get(&(kind.label().to_owned(), (*column).to_owned())).copied().unwrap_or(0)
            };
            let counts: Vec<u64> = columns.iter().map(cell).collect();
            empty += counts.iter().filter(|n| **n == 0).count();
            println!("{:<16}{}", kind.label(), counts.iter().map(|n| format!("{n:>7}")).collect::<String>());
        }
        empty
    }
}

/// Runs seeds on all processors until the time is over or one fails.
fn run_seeds(first: u64, until: Instant, steps: u64, bug: Option<Bug>, limit: u64) -> Totals {
    let (next, totals) = (AtomicU64::new(0), Mutex::new(Totals::default()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let failures = totals.lock().unwrap_or_else(PoisonError::into_inner).violations.len();
                    if number >= limit || (Instant::now() >= until && number >= 1) || failures >= 1 {
                        return;
                    }
                    let result = run_child(first.wrapping_add(number), steps, bug);
                    totals.lock().unwrap_or_else(PoisonError::into_inner).add(result);
                }
            });
        }
    });
    totals.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn run_many(arguments: &Arguments) -> ExitCode {
    let began = Instant::now();
    let is_long = arguments.hours.is_some();
    let time = arguments.hours.map_or(SHORT, |hours| Duration::from_secs_f64(hours * 3_600.0));
    // A short run repeats the same seeds, so that it fails only for a change; a long one takes others each time.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = if is_long { now.as_secs() << 20 } else { 1 };
    let totals = run_seeds(
        first,
        began + time,
        arguments.steps,
        arguments.bug,
        if is_long { u64::MAX } else { SHORT_SEEDS },
    );
    let empty = totals.print_coverage();
    println!(
        "\n{} seeds from {first} on, {:.1} simulated hours, {} operations, in {:.0} s",
        totals.seeds,
        totals.simulated_s / 3_600.0,
        totals.operations,
        began.elapsed().as_secs_f64()
    );
    for result in &totals.violations {
        describe(result);
    }
    let mut failed = totals.violations.len() as u64;
    let mut passed = totals.seeds - failed;
    if empty > 0 && arguments.hours.is_some_and(|hours| hours >= COVERS_ALL) {
        println!("{empty} cells of the table are empty: this run has not tested what it should");
        failed += 1;
    }
    if failed == 0 {
        let (once, again) =
            (run_child(first, arguments.steps, None), run_child(first, arguments.steps, None));
        if once.trace != again.trace {
            println!("seed {first} does not repeat: {:016x}, then {:016x}", once.trace, again.trace);
            failed += 1;
        }
    }
    if arguments.bug.is_none() && !is_long && failed == 0 {
        for bug in Bug::ALL {
            match find(*bug, arguments.steps) {
                Some(seed) => {
                    passed += 1;
                    println!("found by seed {seed}: {} ({})", bug.about(), bug.name());
                }
                None => {
                    failed += 1;
                    println!("NOT FOUND in {BUG_SEEDS} seeds: {} ({})", bug.about(), bug.name());
                }
            }
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The seed that finds a bug.
fn find(bug: Bug, steps: u64) -> Option<u64> {
    let long = Instant::now() + Duration::from_secs(3_600);
    let found = run_seeds(1_000, long, steps, Some(bug), BUG_SEEDS);
    let seed = found.violations.first()?.seed;
    // What is found without the bug too says nothing about it.
    run_child(seed, steps, None).violation.is_none().then_some(seed)
}
