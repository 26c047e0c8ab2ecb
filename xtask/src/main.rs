//! `cargo xtask`: the entry point for developers. Set-up, demo, tests, release files.
//!
//! Input: a command line. Output: what the command promises, or a non-zero exit code
//! and an error that says what to do. Each command has its own file.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod demo;
mod dist;
mod docs;
mod inference;
mod kernels;
#[cfg(test)]
mod names;
mod rooms;
mod setup;
mod shell;
mod test;
mod toolchain;

/// Set-up, demo, tests and release files of the load balancer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what this machine lacks for builds and tests; a second run changes nothing.
    Setup(setup::Options),
    /// Run a demo of the load balancer with real clients and workers, under changes and failures.
    Demo(demo::Options),
    /// Build the release: binaries, man pages, completions, service files.
    Dist(dist::Options),
    /// Generate docs/reference from the code, and optionally build the documentation site.
    Docs(docs::Options),
    /// Run benchmarks of the load balancer or of one part; `bench --help` lists the parts.
    Bench(bench::Options),
    /// Run all test suites, or the named ones.
    Test(test::Options),
    /// Print which parts of the source import which; fail if an import points upwards.
    Rooms,
    /// Regenerate docs/compatibility.md from the recorded runs in tests/kernels.json.
    Compatibility,
}

fn main() -> ExitCode {
    // The demo starts this program as its workers, which serve until they are killed.
    if let Err(error) = test_support::replica::serve() {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let result = match Arguments::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Docs(options) => docs::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Rooms => rooms::run(),
        Command::Compatibility => kernels::write_report(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
