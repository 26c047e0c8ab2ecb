//! Results of the demo by phase, as a table and as JSON.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;
use test_support::http::Account;

/// Results of one phase.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Phase {
    /// What happened in the phase.
    pub name: String,
    /// Length in seconds.
    pub seconds: f64,
    /// HTTP requests that ended in it.
    pub requests: usize,
    /// Requests that failed, except those on connections to a killed worker.
    pub failed: usize,
    /// Requests on connections that were open to the worker as it was killed.
    pub failed_open_to_killed: usize,
    /// Requests whose connection was refused at first and that a retry served:
    /// the killed worker's share until its failure was detected.
    pub retried: usize,
    /// Time from the kill until lbd detected it, in milliseconds.
    pub detect_ms: Option<u64>,
    /// Open TCP connections and UDP flows that left a live worker.
    pub moved: usize,
    /// UDP datagrams without a reply, except those to a killed worker.
    pub udp_lost: usize,
    /// Answered requests by worker.
    pub by_worker: BTreeMap<String, usize>,
    /// Median duration of answered requests, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of the duration of answered requests, in microseconds.
    pub p99_us: u64,
    /// In LLM phases: number of received tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Tokens per second, over all clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// Median of the time to the first token, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_p50_ms: Option<f64>,
    /// 99th percentile of the time to the first token, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_p99_ms: Option<f64>,
    /// Further notes.
    pub notes: Vec<String>,
}

impl Phase {
    /// Creates a phase from the requests of `account`.
    pub fn new(name: &str, seconds: f64, account: &Account) -> Self {
        Self {
            name: name.to_owned(),
            seconds,
            requests: account.requests.len(),
            failed: account.failed(),
            retried: account.retried(),
            by_worker: account.by_worker(),
            p50_us: micros(account.quantile(0.5)),
            p99_us: micros(account.quantile(0.99)),
            ..Self::default()
        }
    }

    /// Whether nothing was lost that should have survived.
    pub fn is_clean(&self) -> bool {
        self.requests > 0 && self.failed == 0 && self.moved == 0 && self.udp_lost == 0
    }
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Results of all phases.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether every phase was clean.
    pub ok: bool,
    /// Phases, in order.
    pub phases: Vec<Phase>,
}

impl Report {
    /// Adds a phase and prints its line.
    pub fn add(&mut self, phase: Phase) {
        if self.phases.is_empty() {
            println!(
                "\n  {:<26} {:>8} {:>6} {:>7} {:>5} {:>8} {:>8}  requests by worker",
                "phase", "requests", "failed", "retried", "moved", "p50", "p99"
            );
        }
        let shares: Vec<String> =
            phase.by_worker.iter().map(|(worker, count)| format!("{worker} {count}")).collect();
        println!(
            "{} {:<26} {:>8} {:>6} {:>7} {:>5} {:>8} {:>8}  {}",
            if phase.is_clean() { "✓" } else { "✗" },
            phase.name,
            phase.requests,
            phase.failed,
            phase.retried,
            phase.moved,
            milliseconds(phase.p50_us),
            milliseconds(phase.p99_us),
            shares.join(", ")
        );
        for note in &phase.notes {
            println!("      {note}");
        }
        self.phases.push(phase);
        self.ok = self.phases.iter().all(Phase::is_clean);
    }

    /// Prints the closing line.
    pub fn conclude(&self) {
        let sum = |count: fn(&Phase) -> usize| self.phases.iter().map(count).sum::<usize>();
        println!(
            "\n{} requests, {} failed, {} on connections to the killed worker, {} moved, {} datagrams lost",
            sum(|phase| phase.requests),
            sum(|phase| phase.failed),
            sum(|phase| phase.failed_open_to_killed),
            sum(|phase| phase.moved),
            sum(|phase| phase.udp_lost),
        );
    }

    /// Writes the results to `path` as JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("cannot write the report as JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

fn milliseconds(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}
