//! `lbctl completions` and `lbctl man`.

use super::{Exit, Failure};
use crate::lbctl::render::Out;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::path::PathBuf;

/// Arguments of `lbctl completions`.
#[derive(Debug, Args)]
#[command(after_help = "Example: lbctl completions bash > /etc/bash_completion.d/lbctl")]
pub struct Completions {
    /// Shell that will load the script
    shell: Shell,
}

/// Arguments of `lbctl man`.
#[derive(Debug, Args)]
#[command(after_help = "Example: lbctl man /usr/local/share/man/man1")]
pub struct Man {
    /// Directory for the pages; created if it does not exist
    directory: PathBuf,
}

/// Prints a completion script, which asks `lbctl` for the words: also for names of services and backends.
pub fn completions(out: &mut Out<'_>, completions: &Completions) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    super::complete::script(completions.shell, &mut script)?;
    out.raw(&script)?;
    Ok(Exit::Ok)
}

/// Writes one man page for each command of lbctl and lbd.
pub fn man(man: &Man) -> Result<Exit, Failure> {
    let directory = &man.directory;
    let write = || {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(crate::lbd::args::LbdArgs::command(), directory)?;
        clap_mangen::generate_to(super::command(), directory)
    };
    write().map_err(|e| Failure::Refused {
        what: format!("cannot write man pages to {}: {e}", directory.display()),
        fix: None,
        details: Vec::new(),
    })?;
    say!("man pages written to {}", directory.display());
    Ok(Exit::Ok)
}
