//! A flood of forged SYNs on a service: its live connections stay, and clients still get in, because SYNs push
//! out nothing but SYNs on the ingress host, and a worker whose listener is full answers by cookies. In mode nat every
//! forged packet needs a binding: those give way to newer ones.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use test_support::{
    bed::{INGRESS_V4, vip_v4},
    flood::{Flood, Kind, SOURCES},
    hold::Holder,
    program::attach_pass,
    stage::{ECHO, LINE, LINES, Plan, Stage, UDP, WEB},
    udp::Flows,
};

/// Connections that are there before.
const LIVE: usize = 1_000;
/// SYNs per second that are meant to be sent, and that must be.
const RATE: u32 = 300_000;
const LEAST_RATE: f64 = 200_000.0;
const TIME: Duration = Duration::from_secs(4);
/// Share of new connections that must come about.
const GET_IN: f64 = 0.99;
/// How much lbd's memory may grow: it is told nothing of SYNs.
const GROWTH_KIB: u64 = 32 * 1024;

fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}

/// Opens connections one after another until told to stop; how many came about, and how many did not.
fn knock(target: SocketAddr, until: Instant) -> (usize, Vec<String>) {
    let (mut fine, mut failed) = (0, Vec::new());
    while Instant::now() < until {
        // A SYN that is lost is repeated after 1 s and 3 s, as any client does.
        match TcpStream::connect_timeout(&target, Duration::from_secs(8)).and_then(|stream| talk(&stream)) {
            Ok(()) => fine += 1,
            Err(error) => failed.push(error.to_string()),
        }
    }
    (fine, failed)
}

fn talk(mut stream: &TcpStream) -> std::io::Result<()> {
    use std::io::{Read, Write};
    stream.set_read_timeout(Some(Duration::from_secs(8)))?;
    stream.write_all(b"who\n")?;
    let mut answer = [0; 64];
    match stream.read(&mut answer)? {
        0 => Err(std::io::Error::other("closed without an answer")),
        _ => Ok(()),
    }
}

/// A counter that all workers have, added up.
fn cookies(stage: &Stage) -> Result<u64> {
    let mut sum = 0;
    for worker in &stage.bed.workers {
        let text = worker.namespace.run("curl", &["-sS", "http://127.0.0.1:9465/metrics"])?;
        let line = text.lines().find(|line| line.contains("decap_cookie"));
        let line = line.with_context(|| format!("no counter of cookies in\n{text}"))?;
        sum += line.split_whitespace().last().context("no number")?.parse::<f64>()? as u64;
    }
    Ok(sum)
}

fn reasons(stage: &Stage) -> Result<BTreeMap<String, u64>> {
    let stats = stage.lbctl.json(&["stats"])?;
    let all = stats["reasons"].as_array().context("stats list reasons")?;
    Ok(all.iter().filter_map(|r| Some((r["reason"].as_str()?.to_owned(), r["packets"].as_u64()?))).collect())
}

fn withstands(settings: &'static str, change: bool) -> Result<()> {
    let plan = Plan {
        offers: vec![WEB, LINE],
        settings,
        worker_arguments: &["--metrics", "127.0.0.1:9465"],
        ..Plan::default()
    };
    let stage = Stage::start(plan)?;
    stage.bed.ingress.ip(&["route", "add", "blackhole", SOURCES])?;
    // What the workers' programs send out again arrives only at an interface with a program of its own.
    let links = stage.bed.workers.iter().map(|w| attach_pass(&stage.bed.ingress, &w.name));
    let _links = links.collect::<Result<Vec<_>>>()?;
    let target = SocketAddr::from((IpAddr::from(vip_v4(1)), LINES));
    let live = Holder::open(&stage.bed.client, &[target], LIVE)?;
    if change {
        // From now on slots are in transition: SYNs are noted, and flows written down.
        stage.change_backend("drain", 2)?;
    }
    let rss = resident_kib(stage.ingress.process().id())?;
    let flood = Flood {
        kind: Kind::Syn,
        vip: vip_v4(1),
        port: LINES,
        rate: RATE,
        time: TIME,
        macs: [stage.bed.ingress.mac("eth0")?, stage.bed.client.mac("eth0")?],
    };
    ensure!(INGRESS_V4.octets()[0] == 10, "the flood's sources are not the bed's addresses");

    let until = Instant::now() + TIME;
    let clients = (0..8)
        .map(|_| {
            stage.bed.client.spawn(move || {
                // The flood comes first.
                thread::sleep(Duration::from_millis(500));
                knock(target, until)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let sent = flood.run(&stage.bed.client, "eth0")?;
    let (mut fine, mut failed) = (0, Vec::new());
    for client in clients {
        let (good, bad) = client.join().map_err(|_| anyhow!("a client panicked"))?;
        fine += good;
        failed.extend(bad);
    }
    let held = live.exchange()?;
    let lost: Vec<_> = held.iter().filter(|held| !held.stays()).collect();
    let (counts, cookies) = (reasons(&stage)?, cookies(&stage)?);
    let growth = resident_kib(stage.ingress.process().id())?.saturating_sub(rss);
    println!(
        "{} SYNs at {:.0}/s; {fine} new connections, {} failed; {} of {LIVE} lost; {cookies} cookies; \
         lbd grew {growth} KiB; {counts:?}",
        sent.count,
        sent.rate(),
        failed.len(),
        lost.len()
    );
    ensure!(sent.rate() >= LEAST_RATE, "only {:.0} SYNs per second were sent", sent.rate());
    ensure!(lost.is_empty(), "{} of {LIVE} live connections lost: {:?}", lost.len(), lost[0]);
    ensure!(fine >= 100, "too few new connections to mean anything: {fine}, {failed:?}");
    let share = fine as f64 / (fine + failed.len()) as f64;
    ensure!(share >= GET_IN, "{:.2} % of new connections came about: {:?}", share * 100.0, failed.first());
    ensure!(cookies > sent.count / 20, "workers answered only {cookies} of {} SYNs by cookie", sent.count);
    ensure!(growth < GROWTH_KIB, "lbd grew by {growth} KiB");
    Ok(())
}

#[test]
fn a_flood_of_syns_takes_nothing_from_anyone() -> Result<()> {
    withstands("", false)
}

#[test]
fn a_flood_of_syns_while_the_backends_change() -> Result<()> {
    withstands("", true)
}

/// In mode nat the table has room for 65,536 bindings and a processor's ring for 8,192; each flood brings many times that.
#[test]
fn floods_in_mode_nat_take_nothing_from_anyone() -> Result<()> {
    const RATE: u32 = 100_000;
    let plan = Plan {
        mode: "nat",
        offers: vec![LINE, UDP],
        arguments: &["--max-nat-flows", "65536"],
        ..Plan::default()
    };
    let stage = Stage::start(plan)?;
    let target = SocketAddr::from((IpAddr::from(vip_v4(1)), LINES));
    let live = Holder::open(&stage.bed.client, &[target], LIVE)?;
    let mut datagrams = Flows::open(&stage.bed.client, SocketAddr::from((vip_v4(1), ECHO)), 200)?;
    let before = datagrams.exchange()?;
    ensure!(before.iter().all(Option::is_some), "all flows are answered before");
    // The second shows that the clients are there.
    ensure!(datagrams.exchange()? == before, "nobody moves before");
    let macs = [stage.bed.ingress.mac("eth0")?, stage.bed.client.mac("eth0")?];
    let until = Instant::now() + TIME;
    let clients = (0..4)
        .map(|_| {
            stage.bed.client.spawn(move || {
                thread::sleep(Duration::from_millis(500));
                knock(target, until)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    for (kind, port) in [(Kind::Syn, LINES), (Kind::Ack, LINES), (Kind::Udp, ECHO)] {
        let flood = Flood { kind, vip: vip_v4(1), port, rate: RATE, time: TIME, macs };
        let sent = flood.run(&stage.bed.client, "eth0")?;
        println!("{kind:?}: {} at {:.0}/s; {:?}", sent.count, sent.rate(), reasons(&stage)?);
        ensure!(sent.count > 100_000, "only {} packets were sent", sent.count);
    }
    let (mut fine, mut failed) = (0, Vec::new());
    for client in clients {
        let (good, bad) = client.join().map_err(|_| anyhow!("a client panicked"))?;
        fine += good;
        failed.extend(bad);
    }
    let held = live.exchange()?;
    let lost: Vec<_> = held.iter().filter(|held| !held.stays()).collect();
    let after = datagrams.exchange()?;
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    let counts = reasons(&stage)?;
    println!(
        "{fine} new connections, {} failed; {} of {LIVE} lost; {moved} of 200 moved; {counts:?}",
        failed.len(),
        lost.len()
    );
    ensure!(lost.is_empty(), "{} of {LIVE} live connections lost: {:?}", lost.len(), lost[0]);
    ensure!(moved == 0, "{moved} of 200 UDP flows moved");
    ensure!(fine >= 100, "too few new connections to mean anything: {fine}, {failed:?}");
    let share = fine as f64 / (fine + failed.len()) as f64;
    ensure!(share >= GET_IN, "{:.2} % of new connections came about: {:?}", share * 100.0, failed.first());
    let count = |reason: &str| counts.get(reason).copied().unwrap_or(0);
    ensure!(count("nat_gave_way") > 100_000, "the floods' bindings gave way to each other: {counts:?}");
    ensure!(count("nat_no_room") == 0, "and left room: {counts:?}");
    Ok(())
}
