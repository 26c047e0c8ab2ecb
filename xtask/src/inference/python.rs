//! Python environments in the cache, so that nothing is installed into the machine's Python.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::cache;
use crate::shell;

/// Environment of the worker's tests: OpenAI's client, and a TorchScript module to serve.
pub const TEST: (&str, &[&str], &[&str]) = ("python-test", &["openai>=2,<3"], &["silero-vad==6.2.3"]);
/// Environment of the benchmark and of the generation of reference values: 2.7 GB.
pub const REFERENCE: (&str, &[&str], &[&str]) =
    ("python-reference", &["torch==2.11.0", "transformers==5.23.0", "gguf==0.19.0", "jinja2"], &[]);
/// Environment of the benchmark with llama.cpp, which this package contains in one library: 32 MB.
pub const LLAMA_CPP: (&str, &[&str], &[&str]) = ("python-llama-cpp", &[], &["xllamacpp==2026.10.11549"]);

/// Finds a Python 3 with pip.
pub fn system() -> Result<PathBuf> {
    let python =
        shell::which("python3").context("no python3 found: install python3, python3-pip and python3-venv")?;
    if shell::quiet(&python, &["-m", "pip", "--version"]).is_none() {
        bail!("python3 has no pip: install python3-pip and python3-venv");
    }
    Ok(python)
}

/// Returns the Python of an environment that [`ensure`] has created; None if it does not exist.
pub fn existing((name, packages, bare): (&str, &[&str], &[&str])) -> Result<Option<PathBuf>> {
    let folder = cache()?.join(name);
    let is_made = fs::read_to_string(folder.join("packages"))
        .is_ok_and(|installed| installed == [packages, bare].concat().join("\n"));
    Ok(is_made.then(|| folder.join("bin/python")))
}

/// Creates an environment with `packages`, and with `bare` packages without their dependencies; returns its Python.
pub fn ensure((name, packages, bare): (&str, &[&str], &[&str])) -> Result<PathBuf> {
    if let Some(python) = existing((name, packages, bare))? {
        return Ok(python);
    }
    let folder = cache()?.join(name);
    let python = folder.join("bin/python");
    let wanted = [packages, bare].concat().join("\n");
    let stamp = folder.join("packages");
    let mut make = Command::new(system()?);
    make.args(["-m", "venv"]).arg(&folder);
    shell::with_progress(&format!("creating the Python environment {name}"), &mut make)?;
    if !packages.is_empty() {
        pip(&python, packages, &[])?;
    }
    if !bare.is_empty() {
        pip(&python, bare, &["--no-deps"])?;
    }
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(python)
}

fn pip(python: &Path, packages: &[&str], options: &[&str]) -> Result<()> {
    let mut install = Command::new(python);
    install
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(options)
        .args(packages);
    shell::with_progress(&format!("installing {}", packages.join(", ")), &mut install).map(drop)
}
