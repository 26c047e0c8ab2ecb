//! Guard, live: an address is denied while it talks, and only it; exceptions, expiry, a restart of lbd; a rate limit
//! that meets the offender only; floods of forged packets against small flow tables with a thousand live connections.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::{
    signal::Signal,
    socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket},
};
use std::os::fd::AsRawFd;
use test_support::{
    bed::{CLIENT_V4, vip_v4},
    flood::{Flood, Kind, SOURCES},
    hold::Holder,
    program::attach_pass,
    stage::{ECHO, LINE, LINES, Plan, Stage, UDP},
    udp::Flows,
    wait,
};

/// The client's other address.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);
const PATIENCE: Duration = Duration::from_secs(15);
/// Longer than a packet takes, shorter than a SYN is repeated.
const SOON: Duration = Duration::from_millis(700);

fn target(port: u16) -> SocketAddr {
    SocketAddr::from((IpAddr::from(vip_v4(1)), port))
}

/// A connection from one of the client's addresses; none if it takes longer than [`SOON`].
fn open(from: Ipv4Addr, wait: Duration) -> Option<TcpStream> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).ok()?;
    bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(from, 0))).ok()?;
    let stream = TcpStream::from(fd);
    stream.set_write_timeout(Some(wait)).ok()?;
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(vip_v4(1), LINES));
    // A connect obeys the time-out for writing.
    connect(stream.as_raw_fd(), &to).ok()?;
    stream.set_read_timeout(Some(wait)).ok()?;
    Some(stream)
}

/// Whether a line is answered.
fn talks(mut stream: &TcpStream) -> bool {
    let mut answer = [0; 64];
    stream.write_all(b"who\n").is_ok() && matches!(stream.read(&mut answer), Ok(1..))
}

/// Runs `f` in the client's network.
fn on_client<T: Send + 'static>(stage: &Stage, f: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    stage.bed.client.enter(f)
}

fn gets_in(stage: &Stage, from: Ipv4Addr) -> Result<bool> {
    on_client(stage, move || open(from, SOON).is_some_and(|stream| talks(&stream)))
}

fn reasons(stage: &Stage) -> Result<BTreeMap<String, u64>> {
    let stats = stage.lbctl.json(&["stats"])?;
    let all = stats["reasons"].as_array().context("stats list reasons")?;
    Ok(all.iter().filter_map(|r| Some((r["reason"].as_str()?.to_owned(), r["packets"].as_u64()?))).collect())
}

fn count(stage: &Stage, reason: &str) -> Result<u64> {
    Ok(reasons(stage)?.get(reason).copied().unwrap_or(0))
}

fn lines_stage(settings: &'static str, arguments: &'static [&'static str]) -> Result<Stage> {
    let stage = Stage::start(Plan { offers: vec![LINE, UDP], settings, arguments, ..Plan::default() })?;
    stage.bed.client.add_address("eth0", OTHER.into(), 24)?;
    Ok(stage)
}

/// Each of two addresses of one client: whether it gets in, whether its running connection talks.
fn both(stage: &Stage, running: &[TcpStream; 2]) -> Result<[(bool, bool); 2]> {
    let mut found = [(false, false); 2];
    for ((found, from), running) in found.iter_mut().zip([CLIENT_V4, OTHER]).zip(running) {
        *found = (gets_in(stage, from)?, talks(running));
    }
    Ok(found)
}

#[test]
fn an_address_is_denied_while_it_talks() -> Result<()> {
    let mut stage = lines_stage("", &[])?;
    let guard = |stage: &Stage, arguments: &[&str]| stage.lbctl.run(&[&["guard"], arguments].concat());
    let running = on_client(&stage, || [CLIENT_V4, OTHER].map(|from| open(from, SOON)))?;
    let running = running.map(|stream| stream.expect("nobody is denied yet"));
    ensure!(both(&stage, &running)? == [(true, true); 2], "before");

    guard(&stage, &["deny", "add", "10.0.0.77", "-m", "it scans"])?;
    ensure!(both(&stage, &running)? == [(true, true), (false, false)], "one is denied");
    ensure!(count(&stage, "guard_denied")? >= 2, "its packets are counted");
    let check = stage.lbctl.output(&["guard", "check", "10.0.0.77"])?;
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(check.status.code() == Some(1) && said.contains("10.0.0.77/32 on the deny list"), "{said}");
    let explained = stage.lbctl.output(&["explain", "10.0.0.77:4000", "10.99.0.1:9000", "tcp"])?;
    let said = String::from_utf8_lossy(&explained.stdout).into_owned();
    ensure!(said.contains("10.0.0.77/32"), "explain names the entry: {said}");

    // All of the network, but for one address.
    guard(&stage, &["allow", "add", "10.0.0.2"])?;
    guard(&stage, &["deny", "add", "10.0.0.0/24"])?;
    guard(&stage, &["deny", "rm", "10.0.0.77"])?;
    ensure!(both(&stage, &running)? == [(true, true), (false, false)], "an exception");

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        stage.ingress.stop(signal)?;
        ensure!(both(&stage, &running)? == [(true, true), (false, false)], "without lbd");
        stage.ingress.start_again(&stage.bed)?;
        ensure!(both(&stage, &running)? == [(true, true), (false, false)], "with it again, after {signal}");
    }

    guard(&stage, &["deny", "flush"])?;
    wait::until("the running connection goes on", PATIENCE, || talks(&running[1]))?;
    ensure!(both(&stage, &running)? == [(true, true); 2], "after");

    guard(&stage, &["deny", "add", "10.0.0.77", "--for", "3s"])?;
    let denied = Instant::now();
    ensure!(!gets_in(&stage, OTHER)?, "denied for a while");
    wait::until("the entry ends", PATIENCE, || gets_in(&stage, OTHER).is_ok_and(|gets_in| gets_in))?;
    let after = denied.elapsed();
    ensure!(after >= Duration::from_secs(2), "it ended after {after:?}");
    Ok(())
}

#[test]
fn a_file_is_loaded_whole_or_not_at_all() -> Result<()> {
    const ENTRIES: u32 = 50_000;
    let stage = lines_stage("", &[])?;
    let file = stage.bed.path("deny.txt");
    let mut text = String::from("# a list\n");
    for i in 0..ENTRIES {
        // Anywhere but where the bed's own addresses are.
        let address = Ipv4Addr::from(0x2000_0000 + i.wrapping_mul(2_654_435_761) / 16);
        writeln!(text, "{address}")?;
    }
    text.push_str("10.0.0.77/32 # the other\n2001:db8:bad::/48\n");
    fs::write(&file, format!("{text}10.0.0.300\n10.0.0.1/24\n"))?;
    let path = file.display().to_string();
    let refused = stage.lbctl.output(&["guard", "deny", "load", &path])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(4), "{}: {said}", refused.status);
    for words in ["2 lines are invalid", "line 50004", "10.0.0.300", "give 10.0.0.0/24 or 10.0.0.1", "fix:"] {
        ensure!(said.contains(words), "{words:?} is not in {said}");
    }
    ensure!(stage.lbctl.json(&["guard", "show"])?["deny"] == 0, "nothing has changed");
    ensure!(gets_in(&stage, OTHER)?, "nobody is denied");

    fs::write(&file, &text)?;
    let started = Instant::now();
    stage.lbctl.run(&["guard", "deny", "load", &path])?;
    let loaded = started.elapsed();
    let total = stage.lbctl.json(&["guard", "show"])?["deny"].as_u64().context("a number")?;
    ensure!(total > u64::from(ENTRIES) * 9 / 10, "{total} entries");
    ensure!(!gets_in(&stage, OTHER)? && gets_in(&stage, CLIENT_V4)?, "one of many");
    let started = Instant::now();
    stage.lbctl.run(&["guard", "deny", "add", "10.0.0.78"])?;
    println!("{total} entries loaded in {loaded:?}, one more in {:?}", started.elapsed());

    let over = stage.lbctl.output(&["rollback", "1"])?;
    ensure!(over.status.success(), "{}", String::from_utf8_lossy(&over.stderr));
    ensure!(gets_in(&stage, OTHER)?, "the lists are part of the history");
    Ok(())
}

#[test]
fn a_rate_limit_meets_the_offender_only() -> Result<()> {
    let stage = lines_stage("", &[])?;
    stage.lbctl.run(&["service", "set", "lines", "--source-rate", "2/s", "--source-burst", "5"])?;
    let running = on_client(&stage, || open(OTHER, SOON))?.context("the first gets in")?;
    let offender = stage
        .bed
        .client
        .spawn(|| (0..40).filter(|_| open(OTHER, Duration::from_millis(100)).is_some()).count())?;
    let mut others = 0;
    for _ in 0..5 {
        others += usize::from(gets_in(&stage, CLIENT_V4)?);
        thread::sleep(Duration::from_millis(600));
    }
    let offender = offender.join().map_err(|_| anyhow!("the offender panicked"))?;
    let refused = count(&stage, "rate_source")?;
    println!("{offender} of the offender's 40 came about, {others} of 5 others; {refused} SYNs refused");
    ensure!(offender <= 20, "the offender got {offender}");
    ensure!(others == 5, "others got {others} of 5");
    ensure!(refused >= 15, "{refused} counted");
    ensure!(talks(&running), "what is established goes on");
    stage.lbctl.run(&["service", "set", "lines", "--source-rate", "none"])?;
    let free = on_client(&stage, || (0..20).filter(|_| open(OTHER, SOON).is_some()).count())?;
    ensure!(free == 20, "without the limit {free} of 20 get in");
    Ok(())
}

const LIVE: usize = 1_000;
const RATE: u32 = 100_000;
const TIME: Duration = Duration::from_secs(4);

/// The flow tables have room for 32,768 flows each, and each flood brings ten times as many.
#[test]
fn floods_of_forged_packets_evict_nobody() -> Result<()> {
    let stage = lines_stage("scheduler = \"p2c\"", &["--max-flows", "32768"])?;
    stage.bed.ingress.ip(&["route", "add", "blackhole", SOURCES])?;
    let links = stage.bed.workers.iter().map(|w| attach_pass(&stage.bed.ingress, &w.name));
    let _links = links.collect::<Result<Vec<_>>>()?;
    let live = Holder::open(&stage.bed.client, &[target(LINES)], LIVE)?;
    let mut datagrams = Flows::open(&stage.bed.client, target(ECHO), 200)?;
    let before = datagrams.exchange()?;
    ensure!(before.iter().all(Option::is_some), "all flows are answered before");
    // From now on slots are in transition, in which any packet may be written down.
    stage.change_backend("drain", 2)?;
    let macs = [stage.bed.ingress.mac("eth0")?, stage.bed.client.mac("eth0")?];
    let mut flooded = false;
    for (kind, port) in [(Kind::Ack, LINES), (Kind::Udp, ECHO), (Kind::Syn, LINES)] {
        let flood = Flood { kind, vip: vip_v4(1), port, rate: RATE, time: TIME, macs };
        let sent = flood.run(&stage.bed.client, "eth0")?;
        let status = stage.lbctl.output(&["status", "-o", "json"])?;
        flooded |= String::from_utf8_lossy(&status.stdout).contains("under flood");
        println!("{kind:?}: {} at {:.0}/s; {:?}", sent.count, sent.rate(), reasons(&stage)?);
        ensure!(sent.count > 100_000, "only {} packets were sent", sent.count);
    }
    let held = live.exchange()?;
    let lost: Vec<_> = held.iter().filter(|held| !held.stays()).collect();
    ensure!(lost.is_empty(), "{} of {LIVE} live connections lost: {:?}", lost.len(), lost[0]);
    let after = datagrams.exchange()?;
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    ensure!(moved == 0, "{moved} of 200 UDP flows moved");
    ensure!(flooded, "lbctl status says that there is a flood");
    ensure!(gets_in(&stage, CLIENT_V4)?, "and a new client gets in");
    Ok(())
}
