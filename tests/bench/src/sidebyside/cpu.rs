//! Where processor time goes.
//!
//! The kernel charges a packet's way to whoever runs when it is handled: over veth that is mostly the
//! sender, whose system call carries the packet through every namespace. So what a balancer costs does
//! not show in its own process alone: all parties are added up and compared with the same without it.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

/// Time that all processors have spent in soft interrupts since the machine started. The kernel
/// samples it at each tick, so short stretches are coarse.
pub fn softirq() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let seconds = parse(&text).context("/proc/stat has no line for all processors")?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Processor time of a process, all its threads and its children.
pub fn of_process(pid: u32) -> Duration {
    let directory = format!("/proc/{pid}/task");
    let threads = fs::read_dir(directory).into_iter().flatten().flatten();
    threads
        .map(|thread| {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            // Nanoseconds on a processor, exact, unlike the ticks of stat.
            let own = read("schedstat").split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
            let children = read("children");
            let children = children.split_whitespace().filter_map(|child| child.parse().ok()).map(of_process);
            Duration::from_nanos(own) + children.sum::<Duration>()
        })
        .sum()
}

/// Processor time of the kernel's threads that handle packets when interrupts alone do not keep up.
pub fn of_softirq_threads() -> Duration {
    let Ok(entries) = fs::read_dir("/proc") else { return Duration::ZERO };
    entries
        .flatten()
        .filter(|entry| {
            fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(of_process)
        .sum()
}

/// Seconds in soft interrupts by `/proc/stat`.
fn parse(text: &str) -> Option<f64> {
    const TICKS_PER_S: f64 = 100.0; // USER_HZ, the same on every architecture that Linux has XDP on.
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    // user nice system idle iowait irq softirq steal
    let ticks: f64 = line.split_whitespace().nth(6)?.parse().ok()?;
    Some(ticks / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softirq_is_the_seventh_field() {
        let seconds = parse("cpu  100 10 50 9000 5 1 30 400 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n").unwrap();
        assert!((seconds - 0.3).abs() < 1e-9);
    }

    #[test]
    fn own_time_grows() {
        let before = of_process(std::process::id());
        let busy = std::time::Instant::now();
        while busy.elapsed() < Duration::from_millis(20) {}
        assert!(of_process(std::process::id()) > before);
    }
}
