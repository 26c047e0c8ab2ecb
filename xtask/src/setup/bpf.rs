//! Installs a BPF toolchain: the distribution's compiler if it has one (Debian's
//! rustc-web), otherwise nightly with the standard library's source; and a
//! bpf-linker that matches the compiler's LLVM.

use std::{env, fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::apt;
use crate::{
    shell,
    toolchain::bpf::{self, Toolchain},
};

const LINKER_VERSION: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
const LINKER_RELEASES: &str = "https://github.com/aya-rs/bpf-linker/releases/download";

/// Installs what is missing and verifies the result by linking a program.
pub fn install() -> Result<String> {
    if bpf::find_compiler().is_none() {
        install_compiler()?;
    }
    let (cargo, rustc, _) = bpf::find_compiler().context("the compiler was installed but cannot be found")?;
    if bpf::find_linker().is_none() {
        install_linker(&cargo, &rustc)?;
    }
    let toolchain = bpf::find()?;
    if let Err(first) = probe(&toolchain) {
        // Most likely a linker that is older than the compiler's LLVM.
        install_linker(&cargo, &rustc).with_context(|| format!("{first:#}"))?;
        probe(&toolchain)?;
    }
    let source = if toolchain.build_std { "core built from source" } else { "core precompiled" };
    Ok(format!("{} ({source}), {}", toolchain.rustc.display(), toolchain.linker.display()))
}

fn install_compiler() -> Result<()> {
    const PACKAGED: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
    if apt::is_available() {
        apt::refresh()?;
        if PACKAGED.iter().all(|package| apt::offers(package)) {
            match apt::install(&PACKAGED) {
                Ok(()) => return Ok(()),
                // It conflicts with the plain rustc package, which we leave alone.
                Err(error) => {
                    eprintln!("  cannot install the packaged compiler, trying rustup ({error:#})")
                }
            }
        }
    }
    install_nightly()
}

fn install_nightly() -> Result<()> {
    if shell::which("rustup").is_none() {
        bail!(
            "no packaged Rust compiler for BPF and no rustup: install rustup (https://rustup.rs), then run this again"
        );
    }
    if apt::is_available() {
        apt::refresh()?;
    }
    // A nightly whose LLVM the distribution packages, so that the linker can be built.
    let name = bpf::NIGHTLIES
        .iter()
        .find(|(_, llvm)| llvm.is_none_or(|llvm| apt::offers(&format!("llvm-{llvm}-dev"))))
        .map_or("nightly", |(name, _)| name);
    let mut install = Command::new("rustup");
    install.args(["toolchain", "install", name, "--profile", "minimal", "--component", "rust-src"]);
    shell::with_progress(&format!("installing {name} with rust-src"), &mut install).map(drop)
}

fn install_linker(cargo: &Path, rustc: &Path) -> Result<()> {
    let llvm = llvm_version(rustc)?;
    let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"), "g++".into()];
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    if LINKER_LLVM.contains(&llvm) && apt::is_available() {
        apt::refresh()?;
        if packages.iter().all(|package| apt::offers(package)) {
            apt::install(&packages)?;
            return build_linker(cargo, rustc, llvm);
        }
    }
    download_linker()
        .with_context(|| format!("cannot build bpf-linker (no llvm-{llvm}-dev package) nor download it"))
}

fn build_linker(cargo: &Path, rustc: &Path, llvm: u32) -> Result<()> {
    let mut command = Command::new(cargo);
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))
        .env("RUSTC", rustc)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO_TARGET_DIR")
        .current_dir("/");
    shell::with_progress("building bpf-linker (a few minutes)", &mut command).map(drop)
}

/// Downloads the static build of the bpf-linker project, for machines without a recent LLVM.
fn download_linker() -> Result<()> {
    apt::install(&["zstd", "curl", "ca-certificates"])?;
    let home = env::var_os("CARGO_HOME")
        .map(Into::into)
        .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let directory = home.join("bin");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let file = format!("bpf-linker-{}-unknown-linux-musl.tar.zst", env::consts::ARCH);
    let mut command = Command::new("bash");
    command
        .args(["-o", "pipefail", "-c", r#"curl -fsSL --retry 3 "$1" | tar --zstd -xf - -C "$2""#, "download"])
        .arg(format!("{LINKER_RELEASES}/v{LINKER_VERSION}/{file}"))
        .arg(&directory);
    shell::with_progress("downloading bpf-linker", &mut command).map(drop)
}

/// Returns the major version of the LLVM inside `rustc`.
fn llvm_version(rustc: &Path) -> Result<u32> {
    let version = shell::quiet(rustc, &["-vV"]).with_context(|| format!("cannot run {}", rustc.display()))?;
    parse_llvm(&version).with_context(|| format!("{} -vV does not print its LLVM version", rustc.display()))
}

fn parse_llvm(version: &str) -> Option<u32> {
    version.lines().find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse().ok())
}

/// Compiles and links a minimal XDP program.
fn probe(toolchain: &Toolchain) -> Result<()> {
    const PROGRAM: &str = r#"#![no_std] #![no_main]
#[unsafe(no_mangle)] #[unsafe(link_section = "xdp")] pub extern "C" fn pass(_: *mut u8) -> u32 { 2 }
#[panic_handler] fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
"#;
    if toolchain.build_std {
        return Ok(()); // Needs cargo to build core; rustc alone cannot.
    }
    let directory = shell::workspace().join("target/bpf-probe");
    // The last result is valid while the compiler and the linker are unchanged.
    let (stamp, current) = (directory.join("proven"), fingerprint(toolchain)?);
    if fs::read_to_string(&stamp).is_ok_and(|last| last == current) {
        return Ok(());
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let source = directory.join("probe.rs");
    fs::write(&source, PROGRAM).with_context(|| format!("cannot write {}", source.display()))?;
    let output = Command::new(&toolchain.rustc)
        .args(["--edition", "2024", "--crate-type", "bin", "-Copt-level=2", "-Cpanic=abort", "-Cdebuginfo=2"])
        .args(["--target", bpf::TARGET, "-Clink-arg=--btf"])
        .arg(format!("-Clinker={}", toolchain.linker.display()))
        .arg("-o")
        .arg(directory.join("probe"))
        .arg(&source)
        .env("RUSTC_BOOTSTRAP", "1")
        .output()
        .with_context(|| format!("cannot run {}", toolchain.rustc.display()))?;
    if !output.status.success() {
        bail!("the BPF toolchain cannot build a program:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    fs::write(&stamp, current).with_context(|| format!("cannot write {}", stamp.display()))
}

/// Identifies compiler and linker by their paths and modification times.
fn fingerprint(toolchain: &Toolchain) -> Result<String> {
    let mut lines = String::new();
    for file in [&toolchain.rustc, &toolchain.linker] {
        let changed = fs::metadata(file)
            .and_then(|metadata| metadata.modified())
            .with_context(|| format!("cannot read {}", file.display()))?;
        lines.push_str(&format!("{} {changed:?}\n", file.display()));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::parse_llvm;

    #[test]
    fn llvm_version_is_read_from_rustc() {
        assert_eq!(parse_llvm("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(parse_llvm("rustc 1.96.0\n"), None);
    }
}
