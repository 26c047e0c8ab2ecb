//! Signs of a dead worker (ICMP errors about what was sent to it, refused connections) bring probes forward: with checks
//! ten seconds apart its death is known before two of them could have said so, by traffic alone.

use std::{
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::Value;
use test_support::{
    bed::{Layout, binary},
    netns::{self, Namespace},
    program,
    stage::{LINE, Plan, Stage, WEB},
    wait,
};

/// Checks of all services; a death takes two failed ones, and so longer than this.
const INTERVAL: Duration = Duration::from_secs(10);

/// Connections to `targets`, opened and closed all the time until it is dropped.
struct Traffic(Arc<AtomicBool>);

impl Traffic {
    fn start(client: &Namespace, targets: Vec<SocketAddr>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for target in targets {
            let stop = stop.clone();
            client.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Whether it opens is all the same.
                    let _ = TcpStream::connect_timeout(&target, Duration::from_millis(100));
                    thread::sleep(Duration::from_millis(10));
                }
            })?;
        }
        Ok(Self(stop))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Two workers, and two services on both: one heeds signs, the other does not.
fn start(mode: &'static str, via: &str) -> Result<Stage> {
    let stage = Stage::start(Plan {
        mode,
        offers: vec![WEB, LINE],
        layout: Layout { workers: 2, ..Layout::default() },
        // Errors come back where packets were sent to; mode nat has them already.
        arguments: if mode == "nat" { &[] } else { &["--iface", "w1", "--iface", "w2"] },
        ..Plan::default()
    })?;
    for (service, signs) in [("web", "true"), ("web6", "true"), ("lines", "false"), ("lines6", "false")] {
        let interval = format!("{}s", INTERVAL.as_secs());
        let more = ["--health-via", via, "--health-interval", &interval, "--health-signs", signs];
        stage.lbctl.run(&[&["service", "set", service][..], &more].concat())?;
    }
    Ok(stage)
}

fn shown(stage: &Stage, service: &str) -> Result<Value> {
    Ok(stage.lbctl.json(&["backend", "show", service, "w1"])?["status"].take())
}

/// Worker 1 dies by `kill`, which leaves signs in the sight of `services`: they know it first, and say why.
fn dies(
    mut stage: Stage,
    services: &[&str],
    sign: &str,
    kill: impl FnOnce(&mut Stage) -> Result<()>,
) -> Result<()> {
    for service in services {
        let status = shown(&stage, service)?;
        ensure!(status["signs"].is_null() && status["health"] == "healthy", "{service}: {status}");
    }
    let _traffic = Traffic::start(&stage.bed.client, stage.targets(WEB.port))?;
    kill(&mut stage)?;
    let start = Instant::now();
    let is_dead = |service: &str| shown(&stage, service).is_ok_and(|status| status["health"] == "unhealthy");
    wait::until("the services that heed signs know it", INTERVAL * 3, || {
        services.iter().all(|name| is_dead(name))
    })?;
    let took = start.elapsed();
    println!("known after {took:?}, with checks each {INTERVAL:?}");
    ensure!(took < INTERVAL, "known after {took:?}: as two checks would have taken without signs");
    for service in ["lines", "lines6"] {
        let status = shown(&stage, service)?;
        ensure!(status["health"] == "healthy" && status["signs"].is_null(), "{service} heeds none: {status}");
    }
    for service in services {
        let status = shown(&stage, service)?;
        let last = status["history"].as_array().and_then(|all| all.last()).cloned().unwrap_or_default();
        let reason = last["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("; probed early: "), "{service}: {last}");
        ensure!(status["signs"][sign].as_u64() > Some(0), "{service}: {status}");
        let table = stage.lbctl.run(&["backend", "show", service, "w1"])?;
        ensure!(table.contains("; probed early: ") && table.contains("passive checks"), "{table}");
    }
    Ok(())
}

/// Nobody unpacks on worker 1 any more: its kernel says so for each packet.
fn no_agent(stage: &mut Stage) -> Result<()> {
    stage.hosts[0].agent = None;
    let worker = &stage.bed.workers[0];
    let pins = stage.bed.pin_path("w1").display().to_string();
    let detach = ["worker", "--iface", "eth0", "--detach", "--pin-path", &pins];
    netns::run(worker.namespace.command(binary("lbd")?).args(detach))?;
    // Without any program its virtual interface would take no redirected frames.
    let pass = program::attach_pass(&worker.namespace, "eth0")?;
    std::mem::forget(pass);
    Ok(())
}

#[test]
fn icmp_errors_about_ipip() -> Result<()> {
    dies(start("ipip", "tunnel")?, &["web", "web6"], "unreachable", no_agent)
}

/// Over IPv4 only: Linux answers no IPv6 datagram without a checksum (RFC 8200 8.1), which GUE's are (RFC 6935).
#[test]
fn icmp_errors_about_gue() -> Result<()> {
    dies(start("gue", "tunnel")?, &["web"], "unreachable", no_agent)
}

#[test]
fn refused_connections_in_nat() -> Result<()> {
    dies(start("nat", "direct")?, &["web", "web6"], "refused", |stage| {
        stage.hosts[0].http = None;
        Ok(())
    })
}

/// Its server runs, so that probes refute what the tunnel's errors say: they become rarer, and nothing falls.
#[test]
fn what_probes_refute_is_no_verdict() -> Result<()> {
    let mut stage = start("gue", "direct")?;
    let _traffic = Traffic::start(&stage.bed.client, stage.targets(WEB.port))?;
    no_agent(&mut stage)?;
    wait::until("signs are refuted", INTERVAL * 2, || {
        shown(&stage, "web").is_ok_and(|status| status["signs"]["refuted"].as_u64() >= Some(3))
    })?;
    let status = shown(&stage, "web")?;
    ensure!(status["health"] == "healthy", "{status}");
    ensure!(status["signs"]["unreachable"].as_u64() > Some(0), "{status}");
    Ok(())
}
