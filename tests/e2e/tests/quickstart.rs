//! The quick start, command by command: what docs/quickstart.md tells a reader to type works as it says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use test_support::bed::binary;

/// Directories that the quick start writes to, hidden behind empty ones of the test's own.
const PRIVATE: &str = "\
set -e
mount --make-rprivate /
mount -t bpf bpf /sys/fs/bpf
for d in /run/netns /run/lb /var/lib/lb /tmp/quickstart; do mkdir -p $d; mount -t tmpfs tmpfs $d; done
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
";

/// The commands of the blocks marked `sh`, in their order.
fn commands(text: &str) -> String {
    let mut is_shell = false;
    let mut out = String::new();
    for line in text.lines() {
        match line {
            "```sh" => is_shell = true,
            "```" => is_shell = false,
            line if is_shell => out.push_str(&format!("{line}\n")),
            _ => {}
        }
    }
    // The directory is a mount point here.
    out.replace("rm -r /tmp/quickstart /var/lib/lb/*", "rm -r /tmp/quickstart/* /var/lib/lb/*")
}

/// Directory of the two binaries under test.
fn programs() -> Result<PathBuf> {
    let lbd = binary("lbd")?;
    binary("lbctl")?;
    Ok(lbd.parent().context("lbd lies in no directory")?.to_owned())
}

#[test]
fn the_quick_start_works_as_written() -> Result<()> {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/quickstart.md");
    let text = fs::read_to_string(&guide).with_context(|| format!("cannot read {}", guide.display()))?;
    let script = format!("{PRIVATE}export PATH={}:$PATH\n{}", programs()?.display(), commands(&text));
    let mut command = Command::new("timeout");
    command.args(["240", "unshare", "--mount", "bash", "-c", &script]).stdin(Stdio::null());
    let output = command.output().context("cannot start unshare")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}\n{said}\n{errors}", output.status);
    let lines = |wanted: &str| said.lines().filter(|line| line.trim_end().ends_with(wanted)).count();
    // Eight requests over both workers, by hash: that all fell on one has a chance of 1 in 128, so only the sum is
    // certain; after the drain all eight are the other's, then two more are the first one's.
    ensure!(said.contains("      8 hello from w2"), "the drained worker was used:\n{said}");
    ensure!(lines("hello from w1") >= 2, "w1 did not take over:\n{said}");
    for expected in ["=> syn goes to w", "tunnel to web/w1: 10.99.0.1:80 answers", "connection refused"] {
        ensure!(said.contains(expected), "{expected:?} was not said:\n{said}");
    }
    ensure!(said.contains("exit code 1") && said.contains("exit code 3"), "exit codes:\n{said}");
    Ok(())
}
