//! `cargo xtask dist`: builds a release under target/dist, as a directory and as an
//! archive: binaries, man pages, completions, service files.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{setup, shell};

const BINARIES: [&str; 2] = ["lbd", "lbctl"];
/// Shells, with the file names under which they look for completions.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "lbctl"), ("zsh", "_lbctl"), ("fish", "lbctl.fish")];

/// How to build the release.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Keep debugging symbols in the binaries.
    #[arg(long)]
    symbols: bool,
}

/// Rebuilds the release and prints its paths.
pub fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Options { bpf: true, ..setup::Options::default() })?;
    let dist = shell::workspace().join("target/dist");
    let name = format!("lb-{}-{}", env!("CARGO_PKG_VERSION"), env::consts::ARCH);
    let root = dist.join(&name);
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| format!("cannot remove {}", dist.display()))?;
    }
    build_binaries(&root, options.symbols)?;
    write_manuals(&root)?;
    write_completions(&root)?;
    copy_files(&root)?;
    let archive = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&dist).args(["--owner=0", "--group=0", "--sort=name", "-czf"]).arg(&archive).arg(&name);
    run_quietly(&mut tar)?;
    println!("{}\n{}", root.display(), archive.display());
    Ok(())
}

fn build_binaries(root: &Path, symbols: bool) -> Result<()> {
    let skips = env::var_os("LB_SKIP_BPF").is_some_and(|value| value == "1");
    ensure!(!skips, "LB_SKIP_BPF=1 is set, which builds lbd without its XDP programs: unset it");
    let workspace = shell::workspace();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&workspace).args(["build", "--release", "--package", "lb-userspace", "--bins"]);
    let status = cargo.status().context("cannot start cargo")?;
    ensure!(status.success(), "the build failed");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let directory = make_directory(root, "bin")?;
    for binary in BINARIES {
        let (from, to) = (target.join("release").join(binary), directory.join(binary));
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        if !symbols {
            run_quietly(Command::new("strip").arg(&to))?;
        }
    }
    let version = run_quietly(Command::new(directory.join("lbd")).arg("--version"))?;
    ensure!(version.starts_with("lbd "), "unexpected output of lbd --version: {version:?}");
    Ok(())
}

fn write_manuals(root: &Path) -> Result<()> {
    let directory = make_directory(root, "share/man/man1")?;
    run_quietly(Command::new(root.join("bin/lbctl")).arg("man").arg(&directory))?;
    ensure!(directory.join("lbctl.1").is_file(), "`lbctl man` did not write lbctl.1");
    Ok(())
}

fn write_completions(root: &Path) -> Result<()> {
    for (shell, file) in COMPLETIONS {
        let directory = make_directory(root, &format!("share/completions/{shell}"))?;
        let script = run_quietly(Command::new(root.join("bin/lbctl")).args(["completions", shell]))?;
        let path = directory.join(file);
        fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Copies service files, documents and licences; skips those that do not exist.
fn copy_files(root: &Path) -> Result<()> {
    let workspace = shell::workspace();
    let units = make_directory(root, "lib/systemd/system")?;
    let documents = make_directory(root, "share/doc/lb")?;
    let examples = make_directory(root, "share/doc/lb/examples")?;
    copy_all(&workspace.join("deploy"), &units, "service")?;
    copy_all(&workspace.join("deploy"), &examples, "toml")?;
    copy_all(&workspace.join("deploy"), &examples, "env")?;
    copy_all(&workspace.join("deploy"), &examples, "conf")?;
    copy_all(&workspace.join("deploy"), &examples, "yml")?;
    copy_all(&workspace.join("docs"), &documents, "md")?;
    for folder in ["operate", "reference"] {
        let target = make_directory(root, &format!("share/doc/lb/{folder}"))?;
        copy_all(&workspace.join("docs").join(folder), &target, "md")?;
    }
    for file in ["README.md", "ARCHITECTURE.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        let from = workspace.join(file);
        if from.is_file() {
            fs::copy(&from, documents.join(file)).with_context(|| format!("cannot copy {file}"))?;
        }
    }
    Ok(())
}

fn copy_all(from: &Path, to: &Path, extension: &str) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", from.display()))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            let name = path.file_name().expect("a listed file has a name");
            fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

fn make_directory(root: &Path, name: &str) -> Result<PathBuf> {
    let directory = root.join(name);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn run_quietly(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} printed something other than text"))
}
