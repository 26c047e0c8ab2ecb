//! Bulk TCP through iperf3, with its own report read in steps of 100 ms, so
//! that a gap in the packet path shows.

use std::{net::IpAddr, path::Path, thread::JoinHandle, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::{netns::Namespace, process::Process};

/// Starts an iperf3 service on `port`; returns once it listens.
pub fn start_worker(namespace: &Namespace, name: &str, port: u16, directory: &Path) -> Result<Process> {
    let mut command = namespace.command("iperf3");
    command.args(["--server", "--port", &port.to_string(), "--forceflush"]);
    let log = directory.join(format!("iperf3-{name}.log"));
    let mut process = Process::spawn(&format!("iperf3 {name}"), command, &log)?;
    let needle = format!("Server listening on {port}");
    process.wait_ready("iperf3 listens", Duration::from_secs(10), || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains(&needle))
    })?;
    Ok(process)
}

/// What a run measured, at the client.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes sent and acknowledged.
    pub bytes: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Mean rate.
    pub bits_per_second: f64,
    /// Bytes sent in each 100 ms.
    pub steps: Vec<u64>,
}

impl Report {
    /// The longest stretch without a single byte.
    pub fn longest_gap(&self) -> Duration {
        let longest = self.steps.split(|&bytes| bytes > 0).map(<[u64]>::len).max().unwrap_or(0);
        Duration::from_millis(100) * u32::try_from(longest).unwrap_or(u32::MAX)
    }
}

/// A client run in progress.
#[derive(Debug)]
pub struct Running {
    thread: JoinHandle<Result<String>>,
}

/// Starts an upload to `target` for `seconds`, at no more than `megabits` a
/// second (0: as fast as it goes).
pub fn start(
    namespace: &Namespace,
    target: IpAddr,
    port: u16,
    seconds: u32,
    megabits: u32,
) -> Result<Running> {
    launch(namespace, target, port, seconds, megabits, false)
}

fn launch(
    namespace: &Namespace,
    target: IpAddr,
    port: u16,
    seconds: u32,
    megabits: u32,
    reverse: bool,
) -> Result<Running> {
    let mut command = namespace.command("iperf3");
    command
        .args(["--client", &target.to_string(), "--port", &port.to_string(), "--json", "--interval", "0.1"])
        .args(["--time", &seconds.to_string(), "--bitrate", &format!("{megabits}M")])
        .args(["--connect-timeout", "5000"]);
    if reverse {
        command.arg("--reverse");
    }
    let thread = std::thread::spawn(move || {
        let output = command.output().context("cannot start iperf3")?;
        // On failure too, the reason stands in the JSON on standard output.
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    });
    Ok(Running { thread })
}

/// Runs to the end; `reverse` has the worker send.
pub fn run(
    namespace: &Namespace,
    target: IpAddr,
    port: u16,
    seconds: u32,
    megabits: u32,
    reverse: bool,
) -> Result<Report> {
    launch(namespace, target, port, seconds, megabits, reverse)?.finish()
}

impl Running {
    /// Waits for the end of the run.
    pub fn finish(self) -> Result<Report> {
        let text = self.thread.join().map_err(|_| anyhow!("the iperf3 thread panicked"))??;
        parse(&text)
    }
}

fn parse(text: &str) -> Result<Report> {
    let report: Value = serde_json::from_str(text).with_context(|| format!("iperf3 said: {text}"))?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let sum = &report["end"]["sum_sent"];
    let steps = report["intervals"]
        .as_array()
        .context("iperf3 reported no intervals")?
        .iter()
        .filter_map(|interval| interval["sum"]["bytes"].as_u64())
        .collect();
    Ok(Report {
        bytes: sum["bytes"].as_u64().context("iperf3 reported no bytes")?,
        retransmits: sum["retransmits"].as_u64().unwrap_or(0),
        bits_per_second: sum["bits_per_second"].as_f64().context("iperf3 reported no rate")?,
        steps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gap_is_the_longest_run_of_empty_steps() {
        let report =
            |steps: &[u64]| Report { bytes: 0, retransmits: 0, bits_per_second: 0.0, steps: steps.to_vec() };
        assert_eq!(report(&[5, 0, 0, 3, 0]).longest_gap(), Duration::from_millis(200));
        assert_eq!(report(&[5, 3]).longest_gap(), Duration::ZERO);
    }

    #[test]
    fn an_error_report_is_an_error() {
        let error = parse(r#"{"start":{},"error":"unable to connect"}"#).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
    }
}
