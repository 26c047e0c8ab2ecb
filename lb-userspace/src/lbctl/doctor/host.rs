//! Checks of the host itself: kernel, BPF file system, memory, privileges, clock.

use super::Finding;
use crate::{apply::dataplane, lbd::TRUNCATED_RISES, serve::api::types::Status};
use std::{fs, path::Path, process::Command};

use lb_common::limits::KERNEL_FLOOR;

/// Available memory below which maps of the usual sizes, and a second set beside them during an upgrade, may not fit.
const MEMORY_KIB: u64 = 768 * 1_024;

/// Runs the checks that do not need lbd.
pub fn examine(pin_path: &Path) -> Vec<Finding> {
    let mut found = vec![kernel(&read("/proc/sys/kernel/osrelease"))];
    found.push(jit(dataplane::is_jitted().map_err(|e| e.raw_os_error())));
    found.push(file_system(pin_path));
    found.push(memory(&read("/proc/meminfo")));
    found.extend(clock());
    found
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn kernel(release: &str) -> Finding {
    let Some(version) = dataplane::kernel_version(release) else {
        return Finding::warn(
            "kernel",
            format!("unknown release {release:?}"),
            "compare the kernel with docs/compatibility.md",
        );
    };
    let what = format!("Linux {}", release.trim());
    if version < KERNEL_FLOOR {
        let (major, minor) = KERNEL_FLOOR;
        let fix = format!("use Linux {major}.{minor} or later: older kernels are not supported");
        return Finding::fail("kernel", what, fix);
    }
    Finding::ok("kernel", what)
}

/// Checks whether programs are JIT-compiled. `is_jitted` comes from loading a program, because the kernel's setting is
/// not visible in every network namespace.
fn jit(is_jitted: Result<bool, Option<i32>>) -> Finding {
    match is_jitted {
        Ok(true) => Finding::ok("BPF JIT", "on"),
        Ok(false) => Finding::fail(
            "BPF JIT",
            "off: programs are interpreted, many times slower",
            "`sysctl -w net.core.bpf_jit_enable=1`, then restart lbd",
        ),
        Err(Some(libc::EPERM)) => {
            Finding::warn("BPF JIT", "not checked", "run `lbctl doctor` as root (sudo)")
        }
        Err(_) => Finding::warn(
            "BPF JIT",
            "not checked: no test program can be loaded",
            "check that the kernel has BPF",
        ),
    }
}

fn file_system(pin_path: &Path) -> Finding {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let about = "BPF file system";
    // statfs also works for a directory that only root may enter.
    let existing = pin_path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statfs::statfs(existing).map(|s| s.filesystem_type().0) {
        Ok(BPF_FS_MAGIC) => Finding::ok(about, format!("mounted at {}", existing.display())),
        _ => Finding::fail(
            about,
            format!("{} is not on a BPF file system", pin_path.display()),
            "`mount -t bpf bpf /sys/fs/bpf`, or give lbd's pin directory with --pin-path",
        ),
    }
}

fn memory(meminfo: &str) -> Finding {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    match kib {
        None => Finding::warn("memory", "cannot read the available memory", "check /proc/meminfo"),
        Some(kib) if kib < MEMORY_KIB => Finding::warn(
            "memory",
            format!("{} MiB available", kib / 1_024),
            "maps take about 300 MiB, and twice that during an upgrade: free memory, or lower max_flows and max_slots",
        ),
        Some(kib) => Finding::ok("memory", format!("{} MiB available", kib / 1_024)),
    }
}

/// Checks whether the clock is synchronized; None if systemd cannot tell.
fn clock() -> Option<Finding> {
    let output = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output();
    match String::from_utf8_lossy(&output.ok().filter(|o| o.status.success())?.stdout).trim() {
        "yes" => Some(Finding::ok("clock", "synchronized")),
        "no" => Some(Finding::warn(
            "clock",
            "not synchronized: times of revisions and rollouts differ between hosts",
            "`timedatectl set-ntp true`, or run chrony",
        )),
        _ => None,
    }
}

/// Checks lbd's own reports, and the capabilities of its process.
pub fn daemon(status: &Status) -> Vec<Finding> {
    let mut found = Vec::new();
    let about = "lbd";
    found.push(if status.version == env!("CARGO_PKG_VERSION") && status.abi == lb_common::ABI_VERSION {
        Finding::ok(about, format!("running, version {}, ABI {}", status.version, status.abi))
    } else {
        Finding::warn(
            about,
            format!("version {}, ABI {}, which is not that of this lbctl", status.version, status.abi),
            "install both from one build and restart lbd (no packet is lost)",
        )
    });
    found.extend(privileges(&read(&format!("/proc/{}/status", status.pid))));
    for one in &status.loaded.left_out {
        let fix = "install a newer kernel or another lbd; services that need the feature are refused";
        found.push(Finding::warn(
            format!("feature {}", one.feature),
            format!("not available: {}", one.reason),
            fix,
        ));
    }
    if status.problems.iter().any(|problem| problem == TRUNCATED_RISES) {
        let fix = "check `lbctl status`, and `ethtool -g` and `ethtool --show-priv-flags` of the interfaces";
        found.push(Finding::fail("headers", TRUNCATED_RISES, fix));
    }
    if let Some(error) = &status.applied.error {
        found.push(Finding::fail("tables", error, "check `lbctl status` and the log of lbd"));
    }
    if !status.store.connected {
        let fix = "check `lbctl store status`; until the store is back, lbd uses the last known state";
        found.push(Finding::fail("store", "disconnected", fix));
    }
    for room in status.room.iter().filter(|r| r.used * 10 > r.limit * 9) {
        let what = format!("{} of {} used", room.used, room.limit);
        let fix = "run `lbd detach`, then start lbd with a larger max_* setting";
        found.push(Finding::warn(format!("capacity for {}", room.what), what, fix));
    }
    found
}

/// Checks the capabilities that lbd needs, given its /proc/PID/status.
fn privileges(status: &str) -> Option<Finding> {
    const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let held = u64::from_str_radix(line.trim(), 16).ok()?;
    // Root has all of them. Kernels before 5.8 have CAP_SYS_ADMIN in place of the last two.
    let missing: Vec<&str> = NEEDED.iter().filter(|(bit, _)| held >> bit & 1 == 0).map(|(_, n)| *n).collect();
    const CAP_NET_RAW: u32 = 13;
    Some(if missing.is_empty() && held >> CAP_NET_RAW & 1 == 0 {
        let what =
            "lbd lacks CAP_NET_RAW, so it cannot hear routers that have no room for encapsulated packets";
        Finding::warn(
            "privileges",
            what,
            "grant it in lbd.service (AmbientCapabilities, CapabilityBoundingSet)",
        )
    } else if missing.is_empty() {
        Finding::ok("privileges", "lbd has the capabilities it needs")
    } else {
        let fix = "grant it in lbd.service (AmbientCapabilities, CapabilityBoundingSet)";
        Finding::fail("privileges", format!("lbd lacks {}", missing.join(", ")), fix)
    })
}

/// Returns a function that tells whether this host forwards packets of a family (`true`: IPv4).
pub fn forwards() -> impl Fn(bool) -> bool {
    let (v4, v6) = (read("/proc/sys/net/ipv4/ip_forward"), read("/proc/sys/net/ipv6/conf/all/forwarding"));
    move |is_ipv4| if is_ipv4 { v4.trim() != "0" } else { v6.trim() != "0" }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn kernels() {
        for (release, level) in [
            ("5.10.0-28-amd64", Level::Fail),
            ("5.15.0", Level::Fail),
            ("6.0.19", Level::Fail),
            ("6.1.0-56-amd64", Level::Ok),
            ("7.3", Level::Ok),
            ("6.18.5+deb\n", Level::Ok),
            ("odd", Level::Warn),
        ] {
            assert_eq!(kernel(release).level, level, "{release}");
        }
    }

    #[test]
    fn privileges_are_those_of_the_process() {
        let status = |held: u64| format!("Name:\tlbd\nCapEff:\t{held:016x}\n");
        let all = 1 << 12 | 1 << 13 | 1 << 38 | 1 << 39;
        assert_eq!(privileges(&status(all)).map(|f| f.level), Some(Level::Ok));
        assert_eq!(privileges(&status(all & !(1 << 13))).map(|f| f.level), Some(Level::Warn));
        let lacking = privileges(&status(all & !(1 << 39))).expect("it was read");
        assert!(lacking.level == Level::Fail && lacking.what.contains("CAP_BPF"), "{lacking:?}");
        assert_eq!(privileges(""), None);
    }

    #[test]
    fn memory_and_jit() {
        assert_eq!(memory("MemAvailable:   2000000 kB\n").level, Level::Ok);
        assert_eq!(memory("MemAvailable:   200000 kB\n").level, Level::Warn);
        let all = [Ok(true), Ok(false), Err(Some(libc::EPERM)), Err(None)].map(|found| jit(found).level);
        assert_eq!(all, [Level::Ok, Level::Fail, Level::Warn, Level::Warn]);
    }
}
