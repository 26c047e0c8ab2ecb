//! `cargo xtask bench`: builds the benchmark program and the daemon with optimisations, runs the criterion
//! benchmarks of the control plane, and runs the other benchmarks as root.
//!
//! The benchmark code needs aya and the loaded programs, on which xtask must not depend, so it has its own
//! package, `tests/bench`, whose command line this command passes through.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{setup, shell};

/// What to measure; passed on to the benchmark program, including `--help`.
#[derive(clap::Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Options {
    /// packet, side-by-side, placement, control or inference [default: all but inference, with a report].
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Options {
    /// Whether the run needs the daemon and criterion's results.
    fn has_control(&self) -> bool {
        match self.arguments.first() {
            Some(first) => first == "control" || (first.starts_with('-') && !self.has("--help")),
            None => true,
        }
    }

    fn has(&self, flag: &str) -> bool {
        self.arguments.iter().any(|argument| argument == flag)
    }
}

/// Runs the benchmarks. Fails if something cannot be built or a benchmark fails.
pub fn run(options: &Options) -> Result<()> {
    // The inference worker needs libtorch but not root, so it has its own benchmark program.
    if let Some((first, rest)) = options.arguments.split_first()
        && first == "inference"
    {
        return crate::inference::bench::run(rest);
    }
    setup::run(&setup::Options { bpf: true, packages: true, ..Default::default() })?;
    let target = target_directory();
    let mut build = cargo(&["build", "--release", "--package", "test-bench"]);
    if options.has_control() {
        build.args(["--package", "lb-userspace", "--bins"]);
    }
    shell::with_progress("building the benchmark program", &mut build)?;
    if options.has_control() {
        let mut bench = cargo(&["bench", "--package", "lb-userspace", "--bench", "*", "--"]);
        if options.has("--quick") {
            // Only benchmarks behind a published claim.
            bench.args(["--quick", "65537x1000|compile"]);
        } else {
            bench.args(["--warm-up-time", "1", "--measurement-time", "2"]);
        }
        shell::with_progress("running the benchmarks of the control plane", &mut bench)?;
    }
    let program = target.join("release/test-bench");
    // The placement simulation does not need root.
    let is_placement = options.arguments.first().is_some_and(|first| first == "placement");
    let mut command = if is_placement { Command::new("env") } else { shell::as_root("env") };
    command.arg(format!("LB_CRITERION={}", target.join("criterion").display())).arg(&program);
    let status = command
        .args(&options.arguments)
        .current_dir(shell::workspace())
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        bail!("the benchmark program failed: {status}");
    }
    Ok(())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::workspace()).args(arguments);
    command
}

/// Returns cargo's target directory.
fn target_directory() -> PathBuf {
    let workspace = shell::workspace();
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |directory| workspace.join(directory))
}
