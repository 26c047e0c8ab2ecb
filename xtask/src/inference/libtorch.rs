//! Provides libtorch 2.11 for building and running the worker.
//!
//! In this order: `LIBTORCH` if set; a full Python torch 2.11 if installed (it has CUDA); else the CPU part of
//! PyPI's wheel, which is 498 MB instead of 2.7 GB: of CUDA, `libtorch_cpu.so` needs only two small libraries,
//! which have their own wheels; else, without Python, torch-sys' own download.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use super::{Wheel, cache, python, unpack};
use crate::shell;

const VERSION: &str = "2.11.0";

const WHEELS: [Wheel; 3] = [
    Wheel {
        requirement: "torch==2.11.0",
        file: "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        sha256: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
    },
    Wheel {
        requirement: "nvidia-cuda-cupti==13.0.85",
        file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    },
    Wheel {
        requirement: "nvidia-cuda-runtime==13.0.96",
        file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    },
];

/// Python code that selects the files. The real `libtorch.so` requires `libtorch_cuda.so`, so that name links to the
/// CPU part.
const PICK: &str = r#"
import os
LIBRARIES = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13")
def pick(entry):
    base = os.path.basename(entry)
    if entry.startswith("torch/include/"):
        return entry[len("torch/"):]
    if base in LIBRARIES:
        return "lib/" + base
def finish(part):
    missing = [name for name in LIBRARIES if not os.path.exists(os.path.join(part, "lib", name))]
    if missing:
        raise SystemExit(f"the wheels do not contain {', '.join(missing)}")
    os.symlink("libtorch_cpu.so", os.path.join(part, "lib", "libtorch.so"))
    with open(os.path.join(part, "build-version"), "w") as f:
        f.write("2.11.0")
"#;

/// A libtorch to build with.
#[derive(Debug)]
pub enum Libtorch {
    /// A directory with `include` and `lib`.
    Folder(PathBuf),
    /// The directory of the Python package, which has CUDA if it was built with it.
    Python(PathBuf),
    /// torch-sys downloads libtorch during the build.
    Download,
}

impl Libtorch {
    /// Returns environment variables for cargo.
    pub fn variables(&self) -> Vec<(&'static str, PathBuf)> {
        match self {
            Self::Folder(folder) => vec![("LIBTORCH", folder.clone())],
            Self::Python(_) => vec![("LIBTORCH_USE_PYTORCH", "1".into())],
            Self::Download => Vec::new(),
        }
    }

    /// Returns additional arguments for cargo.
    pub fn features(&self) -> &'static [&'static str] {
        match self {
            Self::Download => &["--features", "inference-worker/download-libtorch"],
            _ => &[],
        }
    }
}

/// Finds libtorch, or fetches it.
pub fn ensure() -> Result<Libtorch> {
    if let Some(folder) = env::var_os("LIBTORCH").filter(|value| !value.is_empty()) {
        let folder = PathBuf::from(folder);
        if !has_libraries(&folder) {
            bail!(
                "LIBTORCH is {}, which does not contain lib/libtorch_cpu.so: correct or unset LIBTORCH",
                folder.display()
            );
        }
        return Ok(Libtorch::Folder(folder));
    }
    if let Some(folder) = full_python_torch() {
        return Ok(Libtorch::Python(folder));
    }
    let folder = cache()?.join(format!("libtorch-{VERSION}-cpu"));
    if has_libraries(&folder) {
        return Ok(Libtorch::Folder(folder));
    }
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) || python::system().is_err() {
        eprintln!("  no Python with pip for x86-64 Linux: the build will download libtorch");
        return Ok(Libtorch::Download);
    }
    unpack("libtorch for the CPU (544 MB to download)", &WHEELS, &folder, PICK)?;
    Ok(Libtorch::Folder(folder))
}

/// Calls [`ensure`] and returns a line for the set-up.
pub fn install() -> Result<String> {
    Ok(match ensure()? {
        Libtorch::Folder(folder) => format!("libtorch {VERSION} in {}", folder.display()),
        Libtorch::Python(folder) => format!("Python's torch {VERSION} in {}", folder.display()),
        Libtorch::Download => "downloaded when the worker is built".into(),
    })
}

fn has_libraries(folder: &Path) -> bool {
    fs::metadata(folder.join("lib/libtorch_cpu.so")).is_ok()
}

/// Finds the directory of a complete Python torch of our version, without importing it, which takes seconds.
fn full_python_torch() -> Option<PathBuf> {
    const FIND: &str = "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '')";
    let python = python::system().ok()?;
    let folder = PathBuf::from(shell::quiet(&python, &["-c", FIND])?.trim());
    let version = fs::read_to_string(folder.join("version.py")).ok()?;
    (version.contains(&format!("'{VERSION}")) && has_libraries(&folder)).then_some(folder)
}
