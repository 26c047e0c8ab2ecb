//! The machine that the figures come from.

use std::fs;

use serde::{Deserialize, Serialize};

/// What a reader needs to know to place the figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Processor, as it names itself.
    pub cpu: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory that was free for use, in MiB.
    #[serde(default)]
    pub available_mib: u64,
    /// Whether it is a virtual machine.
    pub is_virtual: bool,
    /// Whether BPF programs are compiled to machine code.
    pub jit: bool,
    /// Processes that were running or waiting to, on average over the last minute, at the start.
    pub load: f64,
}

impl Machine {
    /// Reads it from /proc.
    pub fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        let cpuinfo = read("/proc/cpuinfo");
        let meminfo = read("/proc/meminfo");
        let memory = |name| {
            let kib = field(&meminfo, name).split(' ').next().and_then(|kib| kib.parse::<u64>().ok());
            kib.unwrap_or(0) / 1_024
        };
        Self {
            cpu: field(&cpuinfo, "model name"),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            memory_mib: memory("MemTotal:"),
            available_mib: memory("MemAvailable:"),
            is_virtual: field(&cpuinfo, "flags").split(' ').any(|flag| flag == "hypervisor"),
            // Absent where the kernel was built with nothing but the compiler.
            jit: read("/proc/sys/net/core/bpf_jit_enable").trim() != "0",
            load: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        format!(
            "{}, {} CPUs{}, {} MiB, Linux {}, BPF JIT {}, load {:.1} at the start",
            self.cpu,
            self.cpus,
            if self.is_virtual { " (virtual machine)" } else { "" },
            self.memory_mib,
            self.kernel,
            if self.jit { "on" } else { "off" },
            self.load,
        )
    }
}
