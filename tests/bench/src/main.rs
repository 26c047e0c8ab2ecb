//! Measures the balancer: what a packet costs in the loaded programs, and how it compares with what
//! people use.
//!
//! In: a command line from `cargo xtask bench`, root. Out: tables on standard output, and the same as
//! JSON. Traffic stays in network namespaces that are gone afterwards.

mod claims;
mod dataplane;
mod machine;
mod objects;
mod packet;
mod sidebyside;
mod statistics;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures the balancer.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Nanoseconds per packet in the loaded programs.
    Packet(packet::Options),
    /// Real requests through ours and through what people use, in network namespaces.
    SideBySide(sidebyside::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Packet(options) => packet::run(&options),
        Command::SideBySide(options) => sidebyside::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
