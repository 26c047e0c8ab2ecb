//! Debian's and Ubuntu's package manager: checks which packages are available, and
//! installs them without starting daemons or removing packages.

use std::{fs, time::Duration};

use anyhow::{Result, bail};

use crate::shell;

/// Whether this machine has apt.
pub fn is_available() -> bool {
    shell::which("apt-get").is_some()
}

/// Whether `package` can be installed from the configured sources.
pub fn offers(package: &str) -> bool {
    shell::quiet("apt-cache", &["policy", package]).is_some_and(|policy| {
        policy.lines().any(|line| {
            line.trim().strip_prefix("Candidate:").is_some_and(|version| version.trim() != "(none)")
        })
    })
}

/// Fetches the package lists if they are older than a day.
pub fn refresh() -> Result<()> {
    let is_fresh = fs::metadata("/var/lib/apt/lists/partial")
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < Duration::from_secs(24 * 3600)));
    let has_lists = fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with("_Packages"))
    });
    if is_fresh && has_lists {
        return Ok(());
    }
    let mut command = shell::as_root("apt-get");
    command.args(["-o", "DPkg::Lock::Timeout=300", "update"]);
    shell::with_progress("fetching the package lists", &mut command).map(drop)
}

/// Installs `packages` without starting their services: a `policy-rc.d` that
/// refuses is in place meanwhile, and the machine's own one is restored
/// afterwards. Never removes a package.
pub fn install(packages: &[&str]) -> Result<()> {
    if !is_available() {
        bail!("apt is not available: install these packages by hand: {}", packages.join(", "));
    }
    let mut command = shell::as_root("sh");
    command.arg("-c").arg(INSTALL).arg("install").args(packages);
    shell::with_progress(&format!("installing {}", packages.join(", ")), &mut command).map(drop)
}

/// Script of [`install`]. The marker lets a later run clean up after a killed one.
const INSTALL: &str = r#"
set -e
policy=/usr/sbin/policy-rc.d
saved=$policy.lb-saved
marker='# no daemons while xtask installs packages'
restore() {
    if grep -qsF "$marker" "$policy"; then rm -f "$policy"; fi
    if [ -e "$saved" ]; then mv "$saved" "$policy"; fi
}
restore
trap restore EXIT
trap 'exit 130' INT TERM HUP
if [ -e "$policy" ]; then mv "$policy" "$saved"; fi
printf '#!/bin/sh\n%s\nexit 101\n' "$marker" > "$policy"
chmod 755 "$policy"
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install -y --no-install-recommends --no-remove "$@"
"#;
