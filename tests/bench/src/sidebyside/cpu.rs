//! Where processor time goes.
//!
//! The kernel charges a packet's way to whoever runs when it is handled: over veth that is mostly the
//! sender, whose system call carries the packet through every namespace. So what a balancer costs does
//! not show in its own process alone: all parties are added up and compared with the same without it.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

use crate::processor::process_time;

/// Time that all processors have spent in soft interrupts since the machine started. The kernel
/// samples it at each tick, so short stretches are coarse.
pub fn softirq() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let seconds = parse(&text).context("/proc/stat has no line for all processors")?;
    Ok(Duration::from_secs_f64(seconds))
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
        .map(process_time)
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
}
