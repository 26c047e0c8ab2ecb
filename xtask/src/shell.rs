//! Runs other programs: as root if needed, with progress, and with their
//! output kept for error messages.

use std::{
    ffi::OsStr,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// The repository's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns a command that runs as root, through sudo if this process is not root.
pub fn as_root(program: impl AsRef<OsStr>) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    command
}

/// Finds a program in PATH and in the administrator's directories, which an
/// ordinary user's PATH often lacks.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs `command` with a progress line, and returns its standard output. On
/// failure, the error contains the end of its output.
pub fn with_progress(what: &str, command: &mut Command) -> Result<String> {
    let started = Instant::now();
    let bar = if std::io::stderr().is_terminal() {
        let bar = ProgressBar::new_spinner()
            .with_style(
                ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("a valid template"),
            )
            .with_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    } else {
        eprintln!("  {what} …");
        ProgressBar::hidden()
    };
    let output = command
        .stdin(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()));
    bar.finish_and_clear();
    let output = output?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        bail!("{what}: {}\n{}", output.status, tail(&text, 15));
    }
    eprintln!("  {what}: done in {:.1} s", started.elapsed().as_secs_f32());
    Ok(text)
}

/// Returns the standard output of a program, or None if it fails or does not exist.
pub fn quiet(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    with_output(&mut Command::new(program), arguments)
}

/// Returns the standard output of a prepared command, or None if it fails or does not exist.
pub fn with_output(command: &mut Command, arguments: &[&str]) -> Option<String> {
    let output = command.args(arguments).stdin(Stdio::inherit()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
