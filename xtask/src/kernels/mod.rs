//! The suite `kernels`: tests other kernels and their drivers in virtual machines.
//!
//! Input: kernels and drivers. Output: a line for each check and, with `--full`, records in `tests/kernels.json` and
//! docs/compatibility.md. Kernels and QEMU come as Debian packages from a cache; the machines run the host's own files,
//! mounted read-only, so that they test what was just built.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::shell;

mod image;
mod matrix;
mod packages;
mod report;
mod results;
mod version;
mod vm;

use matrix::{Program, Work};
use packages::{Kernel, Store, Tools, Unpacked};
use results::{Check, Record};
use version::Version;

pub use packages::unsuitable;
pub use report::write as write_report;

/// Factor by which timeouts grow in the emulator, on an idle machine.
const PATIENCE: f32 = 12.0;

/// Which kernels and drivers to test.
#[derive(clap::Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Options {
    /// Suite kernels: test every kernel with every driver and setting (takes hours) and record the results.
    #[arg(long)]
    full: bool,
    /// Suite kernels: test only this kernel line, such as 6.1 or newest; may be repeated.
    #[arg(long = "kernel", value_name = "LINE")]
    kernels: Vec<String>,
    /// Suite kernels: test only this driver, such as veth or igb; may be repeated.
    #[arg(long = "driver", value_name = "NAME")]
    drivers: Vec<String>,
    /// Suite kernels: test only this network setting, such as "mtu 9000"; may be repeated.
    #[arg(long = "setting", value_name = "NAME")]
    settings: Vec<String>,
}

impl Options {
    /// Whether any option of this suite is set.
    pub fn is_set(&self) -> bool {
        self.full || ![&self.kernels, &self.drivers, &self.settings].iter().all(|list| list.is_empty())
    }
}

/// Result of the suite.
#[derive(Debug, Default)]
pub struct Summary {
    /// Checks that passed.
    pub passed: usize,
    /// Checks that failed, by name.
    pub failed: Vec<String>,
    /// Skips: a name that CI may expect, a tab, the reason.
    pub skips: Vec<String>,
    /// Boots that hung before init and were repeated.
    hung: u32,
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skips.extend(other.skips);
        self.hung += other.hung;
    }

    /// The suite's closing line.
    pub fn line(&self) -> String {
        let mut line =
            format!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skips.len());
        if self.hung > 0 {
            line += &format!(" ({} boots hung in the emulator and were repeated)", self.hung);
        }
        line
    }
}

/// Builds the programs, fetches the kernels, boots them and collects the checks.
pub fn run(options: &Options, release: bool) -> Result<Summary> {
    let lines = lines(options)?;
    let work = matrix::work(options.full, &options.drivers, &options.settings);
    ensure!(!work.is_empty(), "unknown driver or setting: {}", matrix::names());
    let store = Store::open()?;
    let tools = store.tools()?;
    let all = store.kernels()?;
    let programs = build(release, &work)?;
    let mut summary = Summary::default();
    let mut kernels = Vec::new();
    for line in lines {
        let Some(kernel) = newest_of(&all, &line) else {
            summary.skips.push(format!("no-kernel-{line}\tkernels: the package lists have no kernel {line}"));
            continue;
        };
        let kernel = store.unpack(kernel)?;
        println!("kernel {line}: {} ({})", kernel.kernel.release, kernel.kernel.version);
        kernels.push((line, kernel));
    }
    // A booting guest, and one in its verifier, keep one processor busy: two machines at once take little longer than
    // one. With --full each result is recorded at once, and a day's run need not be fast.
    let at_once = if options.full { 1 } else { 2 };
    let test = |(line, kernel): &(String, Unpacked)| -> Result<Summary> {
        let mut summary = Summary::default();
        for work in &work {
            let checks = boot(&tools, (line, kernel), work, &programs, &mut summary)?;
            if options.full {
                record(&tools, line, &kernel.kernel, work, checks)?;
            }
        }
        Ok(summary)
    };
    for some in kernels.chunks(at_once) {
        let results: Vec<Result<Summary>> = thread::scope(|scope| {
            let running: Vec<_> = some.iter().map(|kernel| scope.spawn(|| test(kernel))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("a test of a kernel does not panic"))
                .collect()
        });
        for result in results {
            summary.add(result?);
        }
    }
    println!("{}", summary.line());
    Ok(summary)
}

fn lines(options: &Options) -> Result<Vec<String>> {
    let known: Vec<&str> = matrix::LINES.into_iter().chain([matrix::NEWEST]).collect();
    if let Some(unknown) = options.kernels.iter().find(|line| !known.contains(&line.as_str())) {
        bail!("--kernel {unknown} is unknown: give one of {}", known.join(", "));
    }
    let lines = match (&options.kernels[..], options.full) {
        ([], true) => known,
        ([], false) => matrix::USUAL.to_vec(),
        (some, _) => some.iter().map(String::as_str).collect(),
    };
    Ok(lines.into_iter().map(str::to_owned).collect())
}

/// Returns the newest kernel of a line. `all` is sorted by version.
fn newest_of<'a>(all: &'a [Kernel], line: &str) -> Option<&'a Kernel> {
    all.iter().rfind(|kernel| line == matrix::NEWEST || Version::parse(&kernel.version).is_of(line))
}

/// Boots a machine, and prints and counts its checks.
fn boot(
    tools: &Tools,
    (line, kernel): (&str, &Unpacked),
    work: &Work,
    programs: &[(Program, PathBuf)],
    summary: &mut Summary,
) -> Result<Vec<Check>> {
    println!("{line:<7} {}", work.name());
    let directory = shell::workspace().join("target/kernels").join(line);
    let slowness = vm::load_factor();
    let path = programs.iter().find(|(program, _)| *program == work.driver.program);
    let (_, path) = path.context("a test program was not built")?;
    let script = work.script(path, (PATIENCE * slowness.min(2.0)) as u32);
    let machine = vm::Machine {
        tools,
        kernel,
        device: work.driver.device,
        queues: work.driver.queues,
        script: &script,
        limit: work.limit().mul_f32(slowness),
        directory: &directory,
    };
    let mut checks = Vec::new();
    let on_line = |line: &str| {
        let found = match work.driver.program {
            Program::Tour => Check::parse(line),
            Program::Verifier => Check::parse_test(line).map(|check| (check, 0.0)),
        };
        if let Some((mut check, seconds)) = found {
            check.detail = anonymise(&check.detail);
            let result = if check.passed { "ok" } else { "FAILED" };
            println!("{line:<7} {:<14} {result:<6} {seconds:>6.1} s  {}", check.name, check.detail);
            checks.push(check);
        }
    };
    let outcome = vm::run(&machine, on_line);
    let log = directory.join("out/log");
    match outcome {
        Ok(outcome) => {
            summary.hung += outcome.hung;
            let problem = match outcome.status {
                None => Some(format!(
                    "the machine ended or was stopped before the test program ended: {}",
                    vm::tail(&log)
                )),
                Some(_) if checks.is_empty() => {
                    Some(format!("the test program reported no checks: {}", vm::tail(&log)))
                }
                Some(status) if status != 0 && checks.iter().all(|check| check.passed) => {
                    Some(format!("the test program ended with {status}: {}", vm::tail(&log)))
                }
                Some(_) => kernel_problem(&directory.join("out/dmesg")),
            };
            checks.extend(problem.map(|detail| failed(line, "machine", detail)));
            println!("{line:<7} {:.0} s", outcome.took.as_secs_f32());
        }
        Err(error) => checks.push(failed(line, "boot", format!("{error:#}"))),
    }
    for check in &mut checks {
        check.detail = anonymise(&check.detail);
        if check.passed {
            summary.passed += 1;
        } else {
            summary.failed.push(format!("{} {}: {}", kernel.kernel.release, work.name(), check.name));
        }
    }
    Ok(checks)
}

fn failed(line: &str, name: &str, detail: String) -> Check {
    println!("{line:<7} {name:<14} FAILED           {detail}");
    Check { name: name.to_owned(), passed: false, detail: detail.replace('\n', " | ") }
}

/// Returns the first problem in the guest's kernel log.
fn kernel_problem(dmesg: &Path) -> Option<String> {
    let Ok(text) = std::fs::read(dmesg) else { return Some("the guest left no kernel log".into()) };
    let text = String::from_utf8_lossy(&text);
    let words = ["BUG:", "Oops", "WARNING:", "general protection"];
    // Lockup warnings come from the emulator, which gives a processor no time.
    let is_problem = |line: &&str| words.iter().any(|word| line.contains(word)) && !line.contains("lockup");
    let line = text.lines().find(is_problem)?;
    Some(format!("the kernel reports: {line}"))
}

/// Removes this machine's paths from a text, and shortens it.
fn anonymise(detail: &str) -> String {
    let mut text = detail.replace(&shell::workspace().display().to_string(), ".");
    if let Some(home) = env::var_os("HOME") {
        let home = home.to_string_lossy().into_owned();
        if home.len() > 1 {
            text = text.replace(&home, "~");
        }
    }
    // The beginning says what failed, the end why: a verifier's reasons come last.
    let all: Vec<char> = text.chars().collect();
    if all.len() <= 400 {
        return text;
    }
    let part = |chars: &[char]| chars.iter().collect::<String>();
    format!("{} … {}", part(&all[..200]), part(&all[all.len() - 195..]))
}

/// Records the result of a boot at once, because a full run takes hours.
fn record(tools: &Tools, line: &str, kernel: &Kernel, work: &Work, checks: Vec<Check>) -> Result<()> {
    let mut records = results::read()?;
    let record = Record {
        line: line.to_owned(),
        kernel: kernel.version.clone(),
        driver: work.driver.name.to_owned(),
        setting: work.setting.name.to_owned(),
        commit: results::commit(),
        date: results::today(),
        emulator: format!("QEMU {}", tools.version),
        checks,
    };
    results::add(&mut records, record);
    results::write(&records)?;
    report::write()
}

/// Builds the daemons, the other version to upgrade to, and the test programs that `work` needs; returns the paths of
/// the test programs.
fn build(release: bool, work: &[Work]) -> Result<Vec<(Program, PathBuf)>> {
    let profile = if release { "release" } else { "dev" };
    for rest in [&["--features", "other-abi", "--bin", "lbd-other-abi"][..], &["--bins"]] {
        let mut build = cargo(&["build", "--profile", profile, "--package", "lb-userspace"]);
        let status = build.args(rest).status().context("cannot start cargo")?;
        ensure!(status.success(), "the build failed");
    }
    let mut programs = Vec::new();
    for (program, suite, name) in
        [(Program::Tour, "e2e", "kernel"), (Program::Verifier, "verifier", "budget")]
    {
        if work.iter().any(|work| work.driver.program == program) {
            programs.push((program, build_test(profile, suite, name)?));
        }
    }
    Ok(programs)
}

fn build_test(profile: &str, suite: &str, name: &str) -> Result<PathBuf> {
    let mut build = cargo(&["test", "--no-run", "--profile", profile, "--message-format", "json"]);
    build.args(["--manifest-path", &format!("tests/{suite}/Cargo.toml"), "--test", name]);
    let output = build.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the test program {name} does not build");
    let output = String::from_utf8_lossy(&output.stdout);
    let messages = output.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut found = messages.filter(|message| message["target"]["name"] == name);
    let path = found.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.with_context(|| format!("cargo did not report the path of the test program {name}"))
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::workspace()).args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_counts_checks_and_names_boots_that_hung() {
        let mut summary = Summary { passed: 3, ..Summary::default() };
        assert_eq!(summary.line(), "3 passed, 0 failed, 0 skipped");
        summary.hung = 1;
        summary.skips.push("no-kernel-5.10\tgone".into());
        assert!(summary.line().starts_with("3 passed, 0 failed, 1 skipped (1 boots hung"));
    }

    #[test]
    fn only_known_lines_and_drivers_are_taken() {
        let asked = |kernel: &str| lines(&Options { kernels: vec![kernel.into()], ..Options::default() });
        assert!(asked("6.1").is_ok());
        assert!(asked("6.11").is_err_and(|error| error.to_string().contains("6.12")));
        assert!(matrix::work(false, &["igbb".into()], &[]).is_empty());
    }

    #[test]
    fn details_do_not_reveal_paths_of_this_machine() {
        let path = shell::workspace().join("target/debug/lbd");
        assert_eq!(anonymise(&format!("{} said no", path.display())), "./target/debug/lbd said no");
        assert!(anonymise(&"x".repeat(1_000)).chars().count() < 410);
    }
}
