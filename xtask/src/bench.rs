//! `cargo xtask bench`: builds the measuring program with optimisations, and runs it as root.
//!
//! The measuring code needs aya and the loaded programs, which xtask must not: it has a package of
//! its own, `tests/bench`, whose command line this one is.

use anyhow::{Context, Result, bail};

use crate::{setup, shell};

/// What to measure: handed on to the measuring program.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Its arguments; `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Measures. An error if the program could not be built or did not succeed.
pub fn run(options: &Options) -> Result<()> {
    // The inference worker needs libtorch, and no root: it is measured by a program of its own.
    if let Some((first, rest)) = options.arguments.split_first()
        && first == "inference"
    {
        return crate::inference::bench::run(rest);
    }
    setup::run(&setup::Options { bpf: true, packages: true, inference: false })?;
    let workspace = shell::workspace();
    let mut build = std::process::Command::new("cargo");
    build.current_dir(&workspace).args(["build", "--release", "--package", "test-bench"]);
    shell::with_progress("building the measuring program", &mut build)?;
    let program = target_directory(&workspace)?.join("release/test-bench");
    let mut command = shell::as_root(&program);
    let status = command
        .args(&options.arguments)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        bail!("{}: {status}", program.display());
    }
    Ok(())
}

/// Where cargo puts what it builds.
fn target_directory(workspace: &std::path::Path) -> Result<std::path::PathBuf> {
    Ok(std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |directory| workspace.join(directory)))
}
