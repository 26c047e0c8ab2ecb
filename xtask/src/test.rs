//! `cargo xtask test [SUITE…]`: sets up what the suites need, runs them, and
//! prints a summary table. The exit code is non-zero if a suite fails or runs
//! no test and, in CI, if there is an unexpected skip.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{kernels, setup, shell};

mod ahead;
mod inference_suite;
mod properties;

use ahead::Ahead;
use inference_suite::{inference_builds, inference_commands};

/// Which suites to run.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Suites to run [default: all].
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Run only tests whose names contain this text.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Test optimised builds, for suites that measure performance.
    #[arg(long)]
    release: bool,
    /// Repeat one seed of the suite simulation, and show its account.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run the suite simulation for this many hours, with new seeds.
    #[arg(long, value_name = "N")]
    hours: Option<f64>,
    #[command(flatten)]
    kernels: kernels::Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Check the formatting.
    Fmt,
    /// Run clippy, with warnings as errors.
    Clippy,
    /// Unit tests, and integration tests that do not need root.
    Unit,
    /// Property tests over generated input.
    Property,
    /// Command lines of the binaries.
    Cli,
    /// Several ingress hosts on one thread, in simulated time, from seeds.
    Simulation,
    /// Guarantees of the store on each engine, and hosts with a failing etcd.
    Store,
    /// Single packets through the loaded programs (root).
    Packet,
    /// Load every shipped setting within its instruction budget (root).
    Verifier,
    /// Real traffic in network namespaces (root).
    E2e,
    /// Failures under real traffic (root).
    Fault,
    /// Other kernels and drivers in virtual machines (root; downloads QEMU and kernels once).
    Kernels,
    /// The inference worker with a real model (downloads libtorch and the model once).
    Inference,
}

/// Crates that build and test without root, libtorch or network.
const CRATES: [&str; 4] = ["lb-common", "lb-ebpf", "lb-userspace", "xtask"];

/// Skips that CI accepts, by the name that the test gives, each with the reason.
const EXPECTED_SKIPS: [(&str, &str); 4] = [
    ("no-kernel-5.10", "its release is out of support, so mirrors may drop it"),
    ("no-kernel-6.18", "backports keep a kernel line only for some months"),
    ("no-tcx", "kernels before 6.6 cannot attach the program that tags the client's frames"),
    ("no-previous-lbd", "runs only if LB_PREVIOUS_LBD names an lbd that was built from an earlier commit"),
];

/// Module of the tests of suite e2e that measure times: they run one at a time.
const ALONE: &str = "alone::";

/// Flaky tests that a run may have; more cannot be explained by pauses of a busy machine.
const FLAKY_MAX: usize = 2;

struct SuiteOutcome {
    suite: Suite,
    took: Duration,
    result: Result<String>,
    /// Tests that failed at first and passed when repeated.
    flaky: Vec<String>,
}

/// Runs the suites. An error names the failed suites.
pub fn run(options: &Options) -> Result<()> {
    let suites =
        if options.suites.is_empty() { Suite::value_variants().to_vec() } else { options.suites.clone() };
    if options.kernels.is_set() && !suites.contains(&Suite::Kernels) {
        bail!(
            "--full, --kernel, --driver and --setting apply to the suite kernels only: name it, as in `cargo xtask test kernels`"
        );
    }
    if (options.seed.is_some() || options.hours.is_some()) && suites != [Suite::Simulation] {
        bail!(
            "--seed and --hours apply to the suite simulation only: name it, as in `cargo xtask test simulation`"
        );
    }
    setup::run(&setup::Options {
        bpf: suites.iter().any(|suite| *suite != Suite::Fmt),
        packages: suites.iter().any(|suite| suite.needs_programs()),
        inference: suites.contains(&Suite::Inference),
    })?;
    let mut outcomes = Vec::new();
    let mut ahead = None;
    for &suite in &suites {
        println!("\n── {} ──", suite.name());
        let started = Instant::now();
        if suite.needs_root() && ahead.is_none() && suites.contains(&Suite::Inference) {
            ahead = Some(Ahead::start("the inference worker", inference_builds()?)?);
        }
        if suite == Suite::Inference
            && let Some(ahead) = ahead.take()
        {
            ahead.finish();
        }
        let mut flaky = Vec::new();
        let result = run_suite(suite, options, &mut flaky);
        if let Err(error) = &result {
            println!("{}: {error:#}", suite.name());
        }
        outcomes.push(SuiteOutcome { suite, took: started.elapsed(), result, flaky });
    }
    summarise(&outcomes)
}

fn summarise(outcomes: &[SuiteOutcome]) -> Result<()> {
    println!("\n{:<10} {:>8}  result", "suite", "time");
    for outcome in outcomes {
        let result = match &outcome.result {
            Ok(summary) => summary.clone(),
            Err(error) => format!("FAILED: {}", error.to_string().lines().next().unwrap_or_default()),
        };
        println!("{:<10} {:>6.1} s  {result}", outcome.suite.name(), outcome.took.as_secs_f32());
    }
    let flaky: Vec<&str> = outcomes.iter().flat_map(|outcome| &outcome.flaky).map(String::as_str).collect();
    for test in &flaky {
        println!("flaky: {test} failed, then passed when repeated");
    }
    let failed: Vec<String> =
        outcomes.iter().filter(|outcome| outcome.result.is_err()).map(|o| o.suite.name()).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    if flaky.len() > FLAKY_MAX {
        bail!("{} tests are flaky, but at most {FLAKY_MAX} may be: {}", flaky.len(), flaky.join(", "));
    }
    Ok(())
}

fn run_suite(suite: Suite, options: &Options, flaky: &mut Vec<String>) -> Result<String> {
    let uses_namespaces = suite.needs_root() || suite == Suite::Inference;
    let obstacle = if uses_namespaces { namespaces_unavailable() } else { None };
    if let Some(reason) = obstacle.filter(|_| suite.needs_root()) {
        return skip(reason);
    }
    if suite == Suite::Kernels {
        return run_kernels(options);
    }
    let skips = skip_file();
    let _ = fs::remove_file(&skips);
    let mut passed = 0;
    let filter = options.filter.as_deref();
    let mut commands = suite.commands(options.release, filter)?;
    if let Some(reason) = obstacle.filter(|_| suite == Suite::Inference) {
        // The tests of the worker alone need no namespaces.
        skip(reason)?;
        commands.truncate(INFERENCE_ALONE);
    }
    for mut command in commands {
        let tests = command.get_args().next().is_some_and(|first| first == "test");
        if tests {
            if !command.get_args().any(|argument| argument == "--") {
                command.arg("--");
            }
            command.args(suite.runner_arguments()).args(filter);
            if let Some(seed) = options.seed {
                command.args(["--seed", &seed.to_string()]);
            }
            if let Some(hours) = options.hours {
                command.args(["--hours", &hours.to_string()]);
            }
        }
        let result = stream(&mut command)?;
        passed += result.passed;
        if result.status.success() {
            continue;
        }
        if !tests || !suite.is_timing_sensitive() || result.failed.is_empty() {
            bail!("{}", result.status);
        }
        flaky.extend(repeat_failed(&command, &result.failed)?);
    }
    if suite.runs_tests() && passed == 0 && filter.is_none() {
        bail!("no test ran");
    }
    report_skips(&fs::read_to_string(&skips).unwrap_or_default())?;
    if !suite.runs_tests() {
        return Ok("ok".to_owned());
    }
    let again = if flaky.is_empty() { String::new() } else { format!(", {} of them flaky", flaky.len()) };
    Ok(format!("{} passed{again}", passed as usize + flaky.len()))
}

fn run_kernels(options: &Options) -> Result<String> {
    if let Some(reason) = kernels::unsuitable() {
        return skip(&reason);
    }
    let summary = kernels::run(&options.kernels, options.release)?;
    report_skips(&summary.skips.join("\n"))?;
    if !summary.failed.is_empty() {
        bail!("{}: {}", summary.line(), summary.failed.join("; "));
    }
    if summary.passed == 0 && !in_ci() {
        return Ok(format!("SKIP: {}", summary.line()));
    }
    if summary.passed == 0 {
        bail!("no kernel was tested: {}", summary.line());
    }
    Ok(summary.line())
}

/// Repeats failed tests once, each by its name, because real traffic on a shared machine may meet a pause. The summary
/// reports them as flaky; a second failure fails the run, and so do too many flaky tests.
fn repeat_failed(command: &Command, failed: &[String]) -> Result<Vec<String>> {
    println!("\nrepeating failed tests: {}", failed.join(", "));
    for name in failed {
        let mut again = Command::new(command.get_program());
        again.current_dir(shell::workspace()).args(command.get_args()).args([name.as_str(), "--exact"]);
        again.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        let result = stream(&mut again)?;
        if !result.status.success() || result.passed == 0 {
            bail!("{name} failed twice");
        }
    }
    Ok(failed.to_vec())
}

/// Returns why network namespaces cannot be created here, if so.
fn namespaces_unavailable() -> Option<&'static str> {
    if !shell::is_root() && shell::which("sudo").is_none() {
        return Some("needs root, and sudo is not installed");
    }
    let may = shell::with_output(&mut shell::as_root("unshare"), &["--net", "true"]).is_some();
    (!may).then_some("cannot create network namespaces here (CAP_SYS_ADMIN is missing)")
}

fn skip(reason: &str) -> Result<String> {
    println!("SKIP: {reason}");
    if in_ci() {
        bail!("skipped in CI: {reason}");
    }
    Ok(format!("SKIP: {reason}"))
}

/// Prints skips, one per line: the skip's name, a tab, the test and the reason. Fails in CI if one is unexpected.
fn report_skips(lines: &str) -> Result<()> {
    for line in lines.lines() {
        println!("SKIP {line}");
        let name = line.split('\t').next().unwrap_or_default();
        if in_ci() && !EXPECTED_SKIPS.iter().any(|(expected, _)| *expected == name) {
            bail!("unexpected skip in CI: {line}");
        }
    }
    Ok(())
}

fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// The file to which `test_support::skip` appends skipped tests.
fn skip_file() -> PathBuf {
    shell::workspace().join("target/skipped.log")
}

/// Result of one test command.
struct CommandResult {
    status: ExitStatus,
    passed: u32,
    failed: Vec<String>,
}

/// Runs `command`, streams its output, and collects passed and failed tests.
fn stream(command: &mut Command) -> Result<CommandResult> {
    let name = format!("{command:?}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {name}"))?;
    let output = child.stdout.take().expect("standard output was piped");
    let (mut passed, mut failed) = (0, Vec::new());
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read the output of the tests")?;
        println!("{line}");
        passed += parse_passed(&line);
        let name = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"));
        failed.extend(name.map(str::to_owned));
    }
    let status = child.wait().context("cannot wait for the tests")?;
    Ok(CommandResult { status, passed, failed })
}

/// Parses the number of passed tests from cargo test's closing line.
fn parse_passed(line: &str) -> u32 {
    line.strip_prefix("test result: ")
        .and_then(|rest| rest.split_once(". ")?.1.split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

impl Suite {
    fn name(self) -> String {
        self.to_possible_value().expect("no suite is hidden").get_name().to_owned()
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Packet | Self::Verifier | Self::E2e | Self::Fault | Self::Kernels)
    }

    /// Whether it runs programs that set-up must find or install.
    fn needs_programs(self) -> bool {
        self.needs_root() || matches!(self, Self::Store | Self::Inference)
    }

    /// Whether its tests depend on timing.
    fn is_timing_sensitive(self) -> bool {
        matches!(self, Self::Store | Self::E2e | Self::Fault | Self::Inference)
    }

    fn runs_tests(self) -> bool {
        !matches!(self, Self::Fmt | Self::Clippy)
    }

    /// Returns arguments of the test runner. Tests that measure times or load the machine run one at a time, so as not to
    /// disturb each other; those of suite e2e are divided by [`Suite::commands`].
    fn runner_arguments(self) -> &'static [&'static str] {
        match self {
            Self::Fault => &["--test-threads=1"],
            // Each test starts its own etcd members.
            Self::Store => &["--test-threads=2"],
            _ => &[],
        }
    }

    fn commands(self, release: bool, filter: Option<&str>) -> Result<Vec<Command>> {
        let profile = if release { ["--profile", "release"] } else { ["--profile", "dev"] };
        Ok(match self {
            Self::Fmt => vec![cargo(&["fmt", "--all", "--check"])],
            Self::Clippy => vec![cargo(&[
                "clippy",
                "--workspace",
                "--exclude",
                "inference-worker",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])],
            Self::Unit => {
                let names = integration_tests(|name| !is_cli(name))?;
                let tests = names.iter().flat_map(|name| ["--test", name]);
                let targets: Vec<&str> = ["--lib", "--bins"].into_iter().chain(tests).collect();
                vec![test_crates(profile, &targets)]
            }
            Self::Property => properties::commands(profile)?,
            Self::Cli => {
                let names = integration_tests(is_cli)?;
                let mut command = cargo(&["test", "--package", "lb-userspace", "--features", "test-support"]);
                command.args(profile);
                command.args(names.iter().flat_map(|name| ["--test", name]));
                vec![command]
            }
            Self::Simulation => vec![test_crates(profile, &["--test", "simulation"])],
            Self::Store => {
                let mut command =
                    cargo(&["test", "--no-fail-fast", "--manifest-path", "tests/store/Cargo.toml"]);
                command.args(profile);
                vec![command]
            }
            Self::Packet | Self::Verifier | Self::E2e | Self::Fault => {
                let manifest = format!("tests/{}/Cargo.toml", self.name());
                let test = |arguments: &[&str]| {
                    let mut command = cargo(&["test", "--no-fail-fast", "--manifest-path", &manifest]);
                    command.args(profile);
                    run_as_root(&mut command);
                    command.args(arguments);
                    command
                };
                let mut build = cargo(&["build", "--package", "lb-userspace", "--bins"]);
                build.args(profile);
                let mut commands = vec![build];
                if self == Self::E2e && filter.is_none() {
                    let both =
                        ["--test", "e2e", "--test", "kernel", "--", "--test-threads=2", "--skip", ALONE];
                    commands.push(test(&both));
                    commands.push(test(&["--test", "e2e", "--", "--test-threads=1", ALONE]));
                } else if self == Self::E2e {
                    commands.push(test(&["--", "--test-threads=1"]));
                } else {
                    commands.push(test(&[]));
                }
                if self == Self::Fault {
                    // The other version of upgrade tests.
                    let other = ["--features", "other-abi", "--bin", "lbd-other-abi"];
                    let mut build = cargo(&["build", "--package", "lb-userspace"]);
                    build.args(other).args(profile);
                    commands.insert(0, build);
                }
                commands
            }
            Self::Kernels => Vec::new(), // has no cargo commands: see `run_kernels`
            Self::Inference => inference_commands()?,
        })
    }
}

fn is_cli(name: &str) -> bool {
    name.starts_with("cli")
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::workspace()).args(arguments);
    command
}

const INFERENCE_WORKER: [&str; 3] = ["--release", "--package", "inference-worker"];

/// Number of leading [`inference_commands`] that do not need network namespaces.
const INFERENCE_ALONE: usize = 2;

/// Tests these targets. All packages are named whichever targets they are of, so that all suites that use this build the
/// dependencies with the same features, once.
fn test_crates(profile: [&str; 2], targets: &[&str]) -> Command {
    let mut command = cargo(&["test"]);
    command.args(profile);
    command.args(CRATES.iter().flat_map(|name| ["--package", name]));
    command.args(["--package", "test-bench", "--package", "test-simulation"]);
    command.args(targets);
    command
}

/// Makes cargo run the test programs as root, while it builds as the current user.
fn run_as_root(command: &mut Command) {
    if !shell::is_root() {
        command.args(["--config", r#"target.'cfg(all())'.runner="sudo --preserve-env --""#]);
    }
}

/// Returns the names of the crates' `tests/NAME.rs` that are `wanted`.
fn integration_tests(wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for directory in CRATES.map(|name| shell::workspace().join(name).join("tests")) {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", directory.display()))?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if path.extension().is_some_and(|extension| extension == "rs") && wanted(&name) {
                names.push(name);
            }
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_tests_are_counted_from_the_closing_line() {
        assert_eq!(parse_passed("test result: ok. 17 passed; 0 failed; 0 ignored"), 17);
        assert_eq!(parse_passed("test result: FAILED. 3 passed; 1 failed"), 3);
        assert_eq!(parse_passed("test wait::works ... ok"), 0);
    }

    #[test]
    fn a_run_with_more_flaky_tests_than_two_fails() {
        let run = |counts: &[usize]| {
            let outcomes = counts.iter().map(|&count| SuiteOutcome {
                suite: Suite::E2e,
                took: Duration::ZERO,
                result: Ok(String::new()),
                flaky: (0..count).map(|n| format!("t{n}")).collect(),
            });
            summarise(&outcomes.collect::<Vec<_>>())
        };
        assert!(run(&[0, 0]).is_ok() && run(&[2]).is_ok() && run(&[1, 1]).is_ok());
        let error = run(&[1, 2]).expect_err("three are too many").to_string();
        assert_eq!(error, "3 tests are flaky, but at most 2 may be: t0, t0, t1");
    }

    #[test]
    fn what_fails_twice_has_failed() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script, "sh"]);
            command
        };
        let failed = ["slow".to_owned()];
        let passes = shell("test $1,$2 = slow,--exact && echo 'test result: ok. 1 passed; 0 failed'");
        assert_eq!(repeat_failed(&passes, &failed).expect("it passes"), failed);
        for script in
            ["echo 'test result: ok. 0 passed; 0 failed'", "echo 'test result: FAILED. 0 passed'; exit 1"]
        {
            assert!(repeat_failed(&shell(script), &failed).is_err(), "{script}");
        }
    }

    #[test]
    fn only_listed_skips_are_expected() {
        assert!(EXPECTED_SKIPS.iter().all(|(name, why)| !name.is_empty() && !why.is_empty()));
    }
}
