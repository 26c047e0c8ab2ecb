//! Processor time of processes.

use std::{fs, time::Duration};

use nix::{time::ClockId, unistd::Pid};

/// Processor time of a process, ended threads included, and of its living children; zero if it is gone.
pub fn process_time(pid: u32) -> Duration {
    // Exact, unlike the ticks of /proc/PID/stat.
    let own = ClockId::pid_cpu_clock_id(Pid::from_raw(pid.cast_signed()))
        .and_then(ClockId::now)
        .map_or(Duration::ZERO, Duration::from);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.map(|thread| {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.split_whitespace().filter_map(|child| child.parse().ok()).map(process_time).sum::<Duration>()
    });
    own + children.sum::<Duration>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_ended_threads_counts() {
        let before = process_time(std::process::id());
        let work = || {
            let busy = std::time::Instant::now();
            while busy.elapsed() < Duration::from_millis(20) {}
        };
        std::thread::spawn(work).join().unwrap();
        assert!(process_time(std::process::id()) > before);
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        // The number of a process that has ended and was waited for; numbers are not used again soon.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!(process_time(child.id()), Duration::ZERO);
    }
}
