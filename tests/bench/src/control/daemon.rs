//! A running `lbd`: changes through its API, health checks, rest.

use std::{
    fs,
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use test_support::{
    bed::{Bed, Layout, vip_v4},
    daemon::Ingress,
    nginx,
    process::Process,
    wait,
};

use super::{Change, Daemon};
use crate::{processor::process_time, statistics::median};

/// All backends' addresses, which one worker answers for.
const NETWORK: &str = "10.200.0.0/14";

/// Changes and daemons measured.
pub fn measure(quick: bool) -> Result<(Vec<Change>, Vec<Daemon>)> {
    let (sizes, samples): (&[u32], usize) =
        if quick { (&[1_000], 20) } else { (&[10, 100, 1_000, 10_000], 60) };
    let (rest, interval_s) = if quick { (Duration::from_secs(2), 2) } else { (Duration::from_secs(10), 5) };
    let (mut changes, mut daemons) = (Vec::new(), Vec::new());
    for &backends in sizes {
        eprintln!("  changes with {backends} backends …");
        let lab = Lab::start()?;
        // Each change of a large state takes room on the file system of the tests.
        changes.extend(lab.changes(backends, if backends > 1_000 { samples / 3 } else { samples })?);
        daemons.push(lab.spent("at rest, no health checks", backends, rest, 0.0)?);
    }
    eprintln!("  a whole state …");
    changes.extend(Lab::start()?.whole(if quick { 5 } else { 20 })?);
    for &backends in if quick { &[1_000][..] } else { &[1_000, 10_000] } {
        eprintln!("  health of {backends} backends …");
        daemons.push(Lab::start()?.health(backends, interval_s)?);
    }
    Ok((changes, daemons))
}

/// A daemon in a network with one worker.
struct Lab {
    ingress: Ingress,
    socket: PathBuf,
    _http: Process,
    _bed: Bed,
}

impl Lab {
    fn start() -> Result<Self> {
        let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
        let worker = bed.workers.first().context("the bed has a worker")?;
        bed.ingress.ip(&["route", "add", NETWORK, "via", &worker.v4.to_string()])?;
        worker.namespace.ip(&["route", "add", "local", NETWORK, "dev", "lo"])?;
        let http = nginx::start(&worker.namespace, &worker.name, bed.directory())?;
        let ingress = Ingress::start(&bed, &["--log-level", "warn"])?;
        let socket = bed.path("lbd.sock");
        let lab = Self { ingress, socket, _http: http, _bed: bed };
        lab.warm_up()?;
        Ok(lab)
    }

    /// Waits until the daemon is there: its socket takes requests while programs are still being loaded, and whoever
    /// sends one then waits for these. Then one change, so that the next is no first of anything.
    fn warm_up(&self) -> Result<()> {
        self.ask("GET", "/v1/status", &json!({}))?;
        let mut other = service(10, json!({ "kind": "none" }));
        other["vip"] = json!(vip_v4(2));
        self.change("POST", "/v1/services/first", &other)?;
        self.ask("DELETE", "/v1/services/first", &json!({}))?;
        Ok(())
    }

    /// Sends a request and returns the answer's body.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(&self.socket).context("connect to lbd")?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: lbd\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("lbd did not answer")?;
        ensure!(
            head.starts_with("HTTP/1.1 200"),
            "{method} {path}: {}: {body}",
            head.lines().next().unwrap_or("")
        );
        serde_json::from_str(body).with_context(|| format!("{method} {path}: {body}"))
    }

    /// A change that is applied when it is answered: the whole time, and the daemon's own.
    fn change(&self, method: &str, path: &str, body: &Value) -> Result<(f64, f64)> {
        let begin = Instant::now();
        let answer = self.ask(method, path, body)?;
        let took_ms = begin.elapsed().as_secs_f64() * 1e3;
        let (revision, applied) = (&answer["revision"], &answer["applied"]);
        // Where the answer numbers its revision differs by version; that it is applied must hold.
        ensure!(applied["took_us"].is_u64(), "revision {revision} was not applied: {answer}");
        Ok((took_ms, applied["took_us"].as_f64().unwrap_or(f64::NAN) / 1e3))
    }

    fn changes(&self, backends: u32, samples: usize) -> Result<Vec<Change>> {
        let new = self.change("POST", "/v1/services/bench", &service(backends, json!({ "kind": "none" })))?;
        let mut weights = Vec::new();
        for i in 0..samples {
            let path = format!("/v1/services/bench/backends/b{}", i as u32 % backends);
            // Another weight each time: one that changes nothing is not applied.
            weights.push(self.change("PATCH", &path, &json!({ "weight": 101 + i }))?);
        }
        let drained = self.change("POST", "/v1/services/bench/backends/b0/drain", &json!({}))?;
        let removed = self.change("DELETE", "/v1/services/bench/backends/b1", &json!({}))?;
        Ok(vec![
            summary("a service with all its backends", backends, &[new]),
            summary("one weight", backends, &weights),
            summary("a backend drained", backends, &[drained]),
            summary("a backend removed", backends, &[removed]),
        ])
    }

    /// All that a large host has, at once, and one change in it.
    fn whole(&self, samples: usize) -> Result<Vec<Change>> {
        const SERVICES: u32 = 1_000;
        const EACH: u32 = 10;
        let services: serde_json::Map<String, Value> = (0..SERVICES)
            .map(|number| {
                let backends: serde_json::Map<String, Value> = (0..EACH)
                    .map(|i| {
                        (
                            format!("b{i}"),
                            json!({ "address": Ipv4Addr::from(0x0ac8_0001 + number * EACH + i) }),
                        )
                    })
                    .collect();
                let service = json!({
                    "vip": vip_v4(1), "port": 10_000 + number, "protocol": "tcp", "mode": "ipip",
                    "table_size": lb_common::limits::TABLE_SIZES[1], "health": { "kind": "none" }, "backends": backends,
                });
                (format!("s{number}"), service)
            })
            .collect();
        let new = self.change("PUT", "/v1/config", &json!({ "desired": { "services": services } }))?;
        let mut weights = Vec::new();
        for i in 0..samples {
            let path = format!("/v1/services/s{}/backends/b3", i * 37 % SERVICES as usize);
            weights.push(self.change("PATCH", &path, &json!({ "weight": 101 + i }))?);
        }
        Ok(vec![
            summary("1,000 services of 10 backends each, at once", SERVICES * EACH, &[new]),
            summary("one weight in one of 1,000 services", SERVICES * EACH, &weights),
        ])
    }

    fn health(&self, backends: u32, interval_s: u64) -> Result<Daemon> {
        let check = json!({
            "kind": "tcp", "port": nginx::PORT, "interval_ms": interval_s * 1_000, "timeout_ms": 2_000,
            "rise": 1, "fall": 3,
        });
        self.change("POST", "/v1/services/bench", &service(backends, check))?;
        wait::until("every backend is healthy", Duration::from_secs(60), || {
            let status = self.ask("GET", "/v1/status", &json!({}));
            status.is_ok_and(|status| status["backends"]["healthy"] == json!(backends))
        })?;
        // Past the first round of probes, whole intervals from here on.
        thread::sleep(Duration::from_secs(interval_s));
        let probes = f64::from(backends) / interval_s as f64;
        let what = format!("TCP health checks every {interval_s} s");
        self.spent(&what, backends, Duration::from_secs(2 * interval_s), probes)
    }

    /// What the daemon spends while nobody asks it for anything.
    fn spent(&self, what: &str, backends: u32, duration: Duration, probes_per_s: f64) -> Result<Daemon> {
        let pid = self.ingress.process().id();
        let before = process_time(pid);
        thread::sleep(duration);
        let share = (process_time(pid) - before).as_secs_f64() / duration.as_secs_f64();
        Ok(Daemon {
            what: what.to_owned(),
            backends,
            cpu_share: share,
            probe_us: (probes_per_s > 0.0).then(|| share * 1e6 / probes_per_s),
            memory_mib: memory_mib(pid)?,
        })
    }
}

/// A service of so many weighted backends in a table of the usual size.
fn service(backends: u32, health: Value) -> Value {
    let backends: serde_json::Map<String, Value> = (0..backends)
        .map(|i| {
            let address = Ipv4Addr::from(0x0ac8_0001 + i);
            (format!("b{i}"), json!({ "address": address, "weight": 1 + i * 7 % 100 }))
        })
        .collect();
    json!({
        "vip": vip_v4(1), "port": 80, "protocol": "tcp", "mode": "ipip",
        "table_size": lb_common::limits::TABLE_SIZE, "health": health, "backends": backends,
    })
}

fn summary(what: &str, backends: u32, samples: &[(f64, f64)]) -> Change {
    let whole: Vec<f64> = samples.iter().map(|(whole, _)| *whole).collect();
    Change {
        what: what.to_owned(),
        backends,
        min_ms: whole.iter().copied().fold(f64::INFINITY, f64::min),
        max_ms: whole.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        median_ms: median(whole),
        apply_ms: median(samples.iter().map(|(_, own)| *own).collect()),
    }
}

/// Resident memory of its own; mapped BPF arrays are the kernel's and counted with the maps.
fn memory_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("RssAnon is a number")?;
    Ok(kib / 1_024.0)
}
