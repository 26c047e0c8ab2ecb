//! Finds a BPF toolchain and builds the XDP programs with it.
//!
//! Input: the machine's compilers, `lb-ebpf`. Output: one object file per program.
//! Called by `cargo xtask` (set-up, `dist`) and, through `#[path]`, by
//! `lb-userspace/build.rs`, so it depends on `std` only.
//!
//! Order of search: a rustc that ships `core` for the BPF target; a toolchain
//! with the standard library's source, with which cargo builds `core`. Both
//! link with `bpf-linker`.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// The compile target, in the host's byte order: maps are shared memory.
pub const TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// The programs of `lb-ebpf`, by the names of its binaries.
pub const PROGRAMS: [&str; 3] = ["ingress", "decap", "probe"];

/// Nightly toolchains that can build `core` from source, best first. The dated
/// ones contain an LLVM (the number) that distributions package, so set-up
/// prefers them.
pub const NIGHTLIES: [(&str, Option<u32>); 3] =
    [("nightly-2026-05-19", Some(22)), ("nightly-2025-12-01", Some(21)), ("nightly", None)];

/// A compiler and a linker that together produce BPF objects.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The cargo that belongs to `rustc`.
    pub cargo: PathBuf,
    /// The compiler.
    pub rustc: PathBuf,
    /// Whether `core` must be built from source first.
    pub build_std: bool,
    /// `bpf-linker`.
    pub linker: PathBuf,
    /// Features of `lb-ebpf`.
    pub features: &'static str,
}

/// Why the programs cannot be built. Each message says what to do.
#[derive(Debug)]
pub enum Error {
    /// No compiler knows the BPF target.
    NoCompiler,
    /// There is a compiler but no `bpf-linker`.
    NoLinker,
    /// cargo could not be started.
    Start {
        /// The cargo that was tried.
        cargo: PathBuf,
        /// Why it did not start.
        source: std::io::Error,
    },
    /// cargo ran and failed.
    Failed {
        /// Output of cargo and rustc.
        output: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCompiler => write!(f, "no Rust compiler for {TARGET} found: run `cargo xtask setup`"),
            Self::NoLinker => write!(f, "bpf-linker not found: run `cargo xtask setup`"),
            Self::Start { cargo, source } => write!(f, "cannot start {}: {source}", cargo.display()),
            Self::Failed { output } => write!(f, "the BPF programs do not compile:\n{output}"),
        }
    }
}

impl std::error::Error for Error {}

/// Finds the first toolchain that can build the programs.
pub fn find() -> Result<Toolchain, Error> {
    let (cargo, rustc, build_std) = find_compiler().ok_or(Error::NoCompiler)?;
    let linker = find_linker().ok_or(Error::NoLinker)?;
    Ok(Toolchain { cargo, rustc, build_std, linker, features: "bpf" })
}

/// Finds the first usable compiler: cargo, rustc, and whether `core` must be built.
pub fn find_compiler() -> Option<(PathBuf, PathBuf, bool)> {
    let mut installed = on_path("rustc");
    // Finds the distribution's compiler even if rustup's shims come first in PATH.
    let packaged = PathBuf::from("/usr/bin/rustc");
    if packaged.is_file() && !installed.contains(&packaged) {
        installed.push(packaged);
    }
    let sysroots: Vec<(PathBuf, PathBuf)> = installed
        .into_iter()
        .filter_map(|rustc| Some((sysroot(&mut Command::new(&rustc))?, rustc)))
        .collect();
    for (root, rustc) in &sysroots {
        if has_core(root) {
            return Some((cargo_beside(rustc, root)?, rustc.clone(), false));
        }
    }
    let nightlies = NIGHTLIES.iter().filter_map(|(name, _)| {
        // The query must not install the toolchain.
        let mut rustup = Command::new("rustup");
        sysroot(rustup.args(["run", name, "rustc"]).env("RUSTUP_AUTO_INSTALL", "0"))
    });
    let roots = nightlies.chain(sysroots.into_iter().map(|(root, _)| root));
    for root in roots {
        let rustc = root.join("bin/rustc");
        if root.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() && rustc.is_file() {
            return Some((cargo_beside(&rustc, &root)?, rustc, true));
        }
    }
    None
}

/// Finds `bpf-linker` in PATH, or where `cargo install` puts it.
pub fn find_linker() -> Option<PathBuf> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
        .map(|home| home.join("bin/bpf-linker"))
        .filter(|path| path.is_file());
    on_path("bpf-linker").into_iter().next().or(cargo_bin)
}

impl Toolchain {
    /// Builds all programs in `target_dir` and returns the objects in the order
    /// of [`PROGRAMS`], with the compiler's warnings. `workspace` is the
    /// repository's root.
    pub fn build(&self, workspace: &Path, target_dir: &Path) -> Result<(Vec<PathBuf>, Vec<String>), Error> {
        self.build_these(&PROGRAMS, workspace, target_dir)
    }

    /// Builds the named binaries of `lb-ebpf` in `target_dir` and returns their
    /// objects, with the compiler's warnings.
    pub fn build_these(
        &self,
        programs: &[&str],
        workspace: &Path,
        target_dir: &Path,
    ) -> Result<(Vec<PathBuf>, Vec<String>), Error> {
        let output = self
            .command(programs, workspace, target_dir)
            .output()
            .map_err(|source| Error::Start { cargo: self.cargo.clone(), source })?;
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(Error::Failed { output: messages });
        }
        let release = target_dir.join(TARGET).join("release");
        let objects = programs.iter().map(|name| release.join(name)).collect();
        Ok((objects, warnings(&messages)))
    }

    fn command(&self, programs: &[&str], workspace: &Path, target_dir: &Path) -> Command {
        let mut command = Command::new(&self.cargo);
        command.current_dir(workspace).args([
            "build",
            "--package",
            "lb-ebpf",
            "--features",
            self.features,
            "--release",
        ]);
        for program in programs {
            command.args(["--bin", program]);
        }
        command.args(["--target", TARGET, "--color", "never", "--target-dir"]).arg(target_dir);
        if self.build_std {
            command.args(["-Z", "build-std=core"]);
        }
        // Variables that an outer cargo sets for build scripts must not reach this
        // cargo: compiler, flags, target directory (whose lock the outer one holds).
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if belongs_to_outer_build(&name) {
                command.env_remove(name);
            }
        }
        let flags = [
            format!("--cfg=bpf_target_arch=\"{}\"", bpf_target_arch()),
            format!("-Clinker={}", self.linker.display()),
            "-Clink-arg=--btf".into(),
            "-Cdebuginfo=2".into(),
            "-Cpanic=abort".into(),
        ];
        command
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("RUSTC", &self.rustc)
            // The BPF target is unstable, so a stable compiler needs this.
            .env("RUSTC_BOOTSTRAP", "1");
        command
    }
}

/// Whether a variable describes the outer build, and not the user's settings
/// for downloads and directories.
fn belongs_to_outer_build(name: &str) -> bool {
    const KEPT: [&str; 5] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    let has_prefix = name.starts_with("CARGO") || name.starts_with("RUST") || name.starts_with("DEP_");
    let build_script = ["TARGET", "HOST", "PROFILE", "OPT_LEVEL", "DEBUG", "NUM_JOBS", "OUT_DIR"];
    let kept = KEPT.iter().any(|kept| name.starts_with(kept)) || name == "RUSTUP_HOME";
    (has_prefix && !kept) || build_script.contains(&name)
}

/// Returns the warnings in a compiler's messages, with their locations.
fn warnings(messages: &str) -> Vec<String> {
    let mut lines = messages.lines().peekable();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if !line.starts_with("warning:") || line.contains("generated") {
            continue;
        }
        let place = lines.peek().filter(|next| next.trim_start().starts_with("-->"));
        found.push(format!("{line}{}", place.map_or(String::new(), |place| format!(" {}", place.trim()))));
    }
    found
}

/// Returns the host's architecture under its name in aya's `bpf_target_arch`.
fn bpf_target_arch() -> &'static str {
    match env::consts::ARCH {
        arch if arch.starts_with("riscv64") => "riscv64",
        arch => arch,
    }
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !path.trim().is_empty()).then(|| PathBuf::from(path.trim()))
}

fn has_core(sysroot: &Path) -> bool {
    let Ok(entries) = sysroot.join("lib/rustlib").join(TARGET).join("lib").read_dir() else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn cargo_beside(rustc: &Path, sysroot: &Path) -> Option<PathBuf> {
    let beside = [rustc.with_file_name("cargo"), sysroot.join("bin/cargo")];
    beside.into_iter().find(|cargo| cargo.is_file()).or_else(|| on_path("cargo").into_iter().next())
}

fn on_path(program: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for directory in env::var_os("PATH").iter().flat_map(env::split_paths) {
        let candidate = directory.join(program);
        if candidate.is_file() && !found.contains(&candidate) {
            found.push(candidate);
        }
    }
    found
}
