//! `cargo xtask`: the one entry for people. Set-up, demo, tests, release files.
//!
//! In: a command line. Out: what the command promises, or a non-zero exit code
//! and one line that says what to do. Each command has a file of its own.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod demo;
mod dist;
mod docs;
mod inference;
mod kernels;
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
    /// Install what is missing on this machine; a second run changes nothing.
    Setup(setup::Options),
    /// Show the balancer at work: real clients, real workers, everything changing.
    Demo(demo::Options),
    /// Build the release: binaries, man pages, completions, service files.
    Dist(dist::Options),
    /// Write docs/reference from the code; build all documents as one site.
    Docs(docs::Options),
    /// Measure the balancer, or one part of it; `bench --help` lists what there is.
    Bench(bench::Options),
    /// Run the test suites, all or the named ones.
    Test(test::Options),
    /// Print which parts of the source import which, and fail if one imports upwards.
    Rooms,
    /// Write docs/compatibility.md again from the runs that tests/kernels.json has.
    Compatibility,
}

fn main() -> ExitCode {
    // Started again as a worker of the demo, it is that until it is killed.
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
