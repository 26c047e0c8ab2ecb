//! Measures the balancer: what a packet costs in the loaded programs, and how it compares with what
//! people use.
//!
//! In: a command line from `cargo xtask bench`, root. Out: tables on standard output, and the same as
//! JSON. Traffic stays in network namespaces that are gone afterwards.

mod claims;
mod control;
mod dataplane;
mod machine;
mod objects;
mod packet;
mod placement;
mod processor;
mod report;
mod sidebyside;
mod statistics;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures the balancer: everything, with a report; or one part, without.
#[derive(Parser)]
#[command(
    args_conflicts_with_subcommands = true,
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    all: report::Options,
}

#[derive(Subcommand)]
enum Command {
    /// Nanoseconds per packet in the loaded programs.
    Packet(packet::Options),
    /// Real requests through ours and through what people use, in network namespaces.
    SideBySide(sidebyside::Options),
    /// Time in queue by scheduler, simulated over the packet code.
    Placement(placement::Options),
    /// The control plane's parts, and a running daemon.
    Control(control::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        None => report::run(&arguments.all),
        Some(Command::Packet(options)) => packet::run(&options),
        Some(Command::SideBySide(options)) => sidebyside::run(&options),
        Some(Command::Placement(options)) => placement::run(&options),
        Some(Command::Control(options)) => control::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
