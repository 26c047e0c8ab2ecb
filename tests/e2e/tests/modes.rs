//! Forwarding modes `l2`, `nat` and `local` with real clients and workers: many short connections, bulk traffic both
//! ways, lbd killed meanwhile, ports rewritten, senders that leave checksums to their network cards.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::{Bed, Layout, vip_v4, vip_v6},
    check::{ensure_none_failed, request},
    daemon::Ingress,
    hold::Holder,
    http::{Load, Running},
    iperf,
    netns::Namespace,
    nginx, program,
    stage::{ECHO, LINES, Plan, Stage},
    udp::Flows,
    wait,
};

const BULK: u16 = 5201;
/// Connections that are opened and closed one after the other.
const SHORT: usize = 100_000;

/// What `nstat` says of a counter in a namespace.
fn counter(namespace: &Namespace, name: &str) -> Result<u64> {
    let text = namespace.run("nstat", &["-asz", name])?;
    let line = text.lines().find(|line| line.starts_with(name)).with_context(|| text.clone())?;
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).with_context(|| line.to_owned())
}

fn retransmits(bed: &Bed) -> Result<u64> {
    let workers = bed.workers.iter().map(|worker| &worker.namespace);
    workers.chain([&bed.client]).map(|namespace| counter(namespace, "TcpRetransSegs")).sum()
}

/// Opens `count` connections to `targets` in turn, on four threads; each asks once and reads the answer. The number
/// that failed, and the first failure.
fn short_connections(client: &Namespace, targets: Vec<SocketAddr>, count: usize) -> Result<(usize, String)> {
    const THREADS: usize = 4;
    let next = Arc::new(AtomicUsize::new(0));
    let handles: Vec<_> = (0..THREADS)
        .map(|_| {
            let (targets, next) = (targets.clone(), next.clone());
            client.spawn(move || {
                let (mut failed, mut first) = (0, String::new());
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        return (failed, first);
                    }
                    if let Err(error) = ask(targets[i % targets.len()]) {
                        failed += 1;
                        first = format!("connection {i}: {error}");
                    }
                }
            })
        })
        .collect::<Result<_>>()?;
    let mut sum = (0, String::new());
    for handle in handles {
        let (failed, first) = handle.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
        sum = (sum.0 + failed, if sum.1.is_empty() { first } else { sum.1 });
    }
    Ok(sum)
}

fn ask(target: SocketAddr) -> std::io::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200") {
        Ok(())
    } else {
        Err(std::io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
    }
}

/// Many short connections, and bulk traffic both ways that is repeated no more than without us.
fn carries(mode: &'static str) -> Result<()> {
    let stage = Stage::start(Plan { mode, ..Plan::default() })?;
    let worker = &stage.bed.workers[0];
    let began = (Instant::now(), retransmits(&stage.bed)?);
    let (failed, first) = short_connections(&stage.bed.client, stage.targets(nginx::PORT), SHORT)?;
    let again = retransmits(&stage.bed)? - began.1;
    println!(
        "{mode}: {SHORT} connections in {:.1?}, {failed} failed, {again} segments again",
        began.0.elapsed()
    );
    ensure!(failed == 0, "{mode}: {failed} of {SHORT} connections failed: {first}");

    let _iperf = iperf::start_worker(&worker.namespace, &worker.name, BULK, stage.bed.directory())?;
    let service = format!(
        "[[service]]\nname = \"bulk\"\nvip = \"{}\"\nport = {BULK}\nprotocol = \"tcp\"\nmode = \"{mode}\"\n\
         [[service.backend]]\nname = \"{}\"\naddress = \"{}\"\n",
        vip_v4(1),
        worker.name,
        worker.v4
    );
    stage.apply(&(stage.configuration(&[0, 1, 2]) + &service))?;
    // Without us: the ingress host's kernel routes to the worker's own address.
    for reverse in [false, true] {
        let run = |target| iperf::run(&stage.bed.client, target, BULK, 3, 300, reverse);
        let (direct, ours) = (run(worker.v4.into())?, run(vip_v4(1).into())?);
        println!(
            "{mode}{}: {:.0} Mbit/s, {} again; without us {:.0} Mbit/s, {} again",
            if reverse { " reverse" } else { "" },
            ours.bits_per_second / 1e6,
            ours.retransmits,
            direct.bits_per_second / 1e6,
            direct.retransmits
        );
        ensure!(ours.bits_per_second > 0.8 * direct.bits_per_second, "{mode}: too slow");
        // One in ten thousand: a loaded machine drops a burst now and then, with us and without.
        let segments = ours.bytes / 1_448;
        ensure!(ours.retransmits <= direct.retransmits + segments / 10_000 + 5, "{mode}: too many again");
    }
    Ok(())
}

#[test]
fn l2_carries_short_and_bulk() -> Result<()> {
    carries("l2")
}

#[test]
fn nat_carries_short_and_bulk() -> Result<()> {
    carries("nat")
}

/// Requests, open connections and datagrams go on while lbd is killed and comes back: bindings live in pinned maps.
#[test]
fn nat_survives_kill_and_change() -> Result<()> {
    let mut stage = Stage::start(Plan { mode: "nat", ..Plan::default() })?;
    let held = Holder::open(&stage.bed.client, &stage.targets(LINES), 300)
        .with_context(|| stage.lbctl.run(&["stats"]).unwrap_or_default())?;
    let mut flows = Flows::open(&stage.bed.client, SocketAddr::from((vip_v4(1), ECHO)), 100)?;
    let before = flows.exchange()?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    for _ in 0..2 {
        stage.ingress.stop(Signal::SIGKILL)?;
        thread::sleep(Duration::from_secs(1));
        ensure!(flows.exchange()? == before, "a UDP flow changed its worker while lbd was away");
        stage.ingress.start_again(&stage.bed)?;
        thread::sleep(Duration::from_millis(500));
    }
    // New tables under live flows.
    stage.change_backend("drain", 0)?;
    thread::sleep(Duration::from_millis(500));
    stage.change_backend("rm", 1)?;
    thread::sleep(Duration::from_millis(1_500));
    let account = load.finish()?;
    ensure_none_failed(&account)?;
    ensure!(account.requests.len() > 500, "too little load to mean anything: {}", account.requests.len());
    let moved: Vec<_> = held.exchange()?.into_iter().filter(|held| !held.stays()).collect();
    ensure!(moved.is_empty(), "{} of 300 connections moved or broke: {:?}", moved.len(), moved.first());
    ensure!(flows.exchange()? == before, "a UDP flow changed its worker");
    let listed = stage.lbctl.json(&["flows", "--limit", "10000"])?;
    let nat = listed["flows"].as_array().map_or(0, |all| all.iter().filter(|f| f["table"] == "nat").count());
    ensure!(nat >= 400, "lbctl flows shows {nat} translated flows");
    Ok(())
}

/// Where an interface completes no checksum: what was left to it must be completed by us, both ways.
#[test]
fn nat_completes_checksums_left_to_cards() -> Result<()> {
    let stage = Stage::start(Plan { mode: "nat", ..Plan::default() })?;
    let hosts = stage.bed.workers.iter().map(|worker| &worker.namespace).chain([&stage.bed.client]);
    for namespace in hosts {
        namespace.run("ethtool", &["-K", "eth0", "tx", "on"])?;
    }
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 300)?)?;
    for target in stage.targets(ECHO) {
        let answers = Flows::open(&stage.bed.client, target, 50)?.exchange()?;
        ensure!(answers.iter().all(Option::is_some), "{target}: datagrams were lost: {answers:?}");
    }
    let reasons = stage.lbctl.json(&["stats"])?;
    let completed = reasons["reasons"]
        .as_array()
        .and_then(|all| all.iter().find(|r| r["reason"] == "nat_completed"))
        .and_then(|r| r["packets"].as_u64());
    ensure!(completed.is_some_and(|n| n > 500), "checksums were not left to the card: {completed:?}");
    Ok(())
}

/// The service's port is not the worker's.
#[test]
fn nat_rewrites_ports() -> Result<()> {
    let stage = Stage::start(Plan { mode: "nat", ..Plan::default() })?;
    for (name, vip) in [("moved", vip_v4(1).to_string()), ("moved6", format!("[{}]", vip_v6(1)))] {
        let at = format!("{vip}:8000/tcp");
        stage.lbctl.run(&["service", "add", name, "--vip", &at, "--mode", "nat", "--health", "http:/"])?;
        for (index, worker) in stage.bed.workers.iter().enumerate() {
            let address = stage.backend_address(index, name.ends_with('6')).to_string();
            let port = nginx::PORT.to_string();
            stage.lbctl.run(&["backend", "add", name, &worker.name, &address, "--port", &port])?;
        }
        // Health is asked at the worker's port too.
        wait::until("its workers are healthy", Duration::from_secs(15), || {
            stage.lbctl.json(&["service", "show", name]).is_ok_and(|s| s["status"]["eligible"] == 3)
        })?;
    }
    let account = request(&stage, stage.targets(8_000), 200)?;
    ensure_none_failed(&account)?;
    ensure!(account.by_worker().len() == 3, "{:?}", account.by_worker());
    let client = "10.0.0.2:40000";
    let text = stage.lbctl.run(&["explain", client, &format!("{}:8000", vip_v4(1)), "tcp"])?;
    ensure!(text.contains("nat ") && text.contains(":80"), "{text}");
    Ok(())
}

/// A worker whose answers would come in where lbd is not attached takes no flows, and says what to do.
#[test]
fn nat_names_an_interface_that_is_missing() -> Result<()> {
    let mut stage = Stage::start(Plan { mode: "nat", ..Plan::default() })?;
    let new = stage.add_host()?;
    stage.change_backend("add", new)?;
    let name = stage.bed.workers[new].name.clone();
    wait::until("the backend says why", Duration::from_secs(10), || {
        let shown = stage.lbctl.json(&["backend", "show", "web", &name]);
        shown.is_ok_and(|b| b["status"]["problem"].as_str().is_some_and(|p| p.contains("--iface")))
    })?;
    let status = stage.lbctl.output(&["status"])?;
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    ensure!(status.status.code() == Some(1) && text.contains("lbd is not attached"), "{text}");
    let account = request(&stage, stage.targets(nginx::PORT), 200)?;
    ensure_none_failed(&account)?;
    ensure!(!account.by_worker().contains_key(&name), "{:?}", account.by_worker());
    Ok(())
}

/// The ingress host serves the VIP itself.
#[test]
fn local_is_the_host_s_own_stack() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let vip = vip_v4(1);
    bed.ingress.add_address("lo", vip.into(), 32)?;
    let _nginx = nginx::start(&bed.ingress, "host", bed.directory())?;
    let ingress = Ingress::start(&bed, &[])?;
    let lbctl = ingress.lbctl()?;
    let at = format!("{vip}:80/tcp");
    lbctl.run(&["service", "add", "web", "--vip", &at, "--mode", "local", "--health", "http:/"])?;
    lbctl.run(&["backend", "add", "web", "own", "127.0.0.1"])?;
    wait::until("it is healthy", Duration::from_secs(10), || {
        lbctl.backends("own").is_ok_and(|b| b.iter().all(|b| b.is_healthy && b.slots > 0))
    })?;
    let (failed, first) = short_connections(&bed.client, vec![SocketAddr::from((vip, 80))], 500)?;
    ensure!(failed == 0, "{failed} failed: {first}");
    let shown = lbctl.json(&["backend", "show", "web", "own"])?;
    ensure!(shown["status"]["flows"] == 500, "{shown}");
    Ok(())
}

/// Without any of ours on the way: the bed's own programs do not disturb a plain connection.
#[test]
fn plain_workers_answer_without_us() -> Result<()> {
    let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
    let worker = &bed.workers[0];
    let _pass = program::attach_pass(&worker.namespace, "eth0")?;
    let _nginx = nginx::start(&worker.namespace, &worker.name, bed.directory())?;
    let (failed, first) = short_connections(&bed.client, vec![SocketAddr::from((worker.v4, 80))], 200)?;
    ensure!(failed == 0, "{failed} failed: {first}");
    Ok(())
}
