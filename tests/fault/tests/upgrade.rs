//! lbd is replaced by one of another ABI version, up and down, under load: connections stay, traffic has no gap, and
//! whoever is killed in the middle leaves something that forwards.
//!
//! The other version is this very code with flow tables laid out in another way (`lbd-other-abi`). With
//! `LB_PREVIOUS_LBD` set to an lbd built from an earlier commit, upgrades from that are tested too.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use lb_common::ABI_VERSION;
use nix::sys::signal::Signal;
use test_support::{
    bed::{Layout, binary, vip_v4},
    check::{ensure_none_failed, request},
    hold::Holder,
    http::{Load, Running},
    iperf,
    netns::run,
    nginx, skip,
    stage::{ECHO, LINES, Plan, Stage},
    udp::Flows,
    wait,
};

const BULK: u16 = 5201;
/// ABI version of `lbd-other-abi`.
const OTHER: u32 = ABI_VERSION + 1_000;

fn homes(stage: &Stage) -> Result<Vec<String>> {
    let entries = fs::read_dir(stage.bed.pin_path("ingress")).context("no pins")?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with("abi-"));
    names.sort();
    Ok(names)
}

fn bulk_service(stage: &Stage) -> String {
    let (vip, worker) = (vip_v4(1), &stage.bed.workers[0]);
    format!(
        "[[service]]\nname = \"bulk\"\nvip = \"{vip}\"\nport = {BULK}\nprotocol = \"tcp\"\nmode = \"{}\"\n\
         [service.health]\nkind = \"tcp\"\nport = {}\n\
         [[service.backend]]\nname = \"{}\"\naddress = \"{}\"\n",
        stage.plan.mode,
        nginx::PORT,
        worker.name,
        worker.v4
    )
}

/// Connections that are exceptions in every way that this mode knows: placed by load, and from before a change.
fn open_exceptions(stage: &Stage, all: &[usize], count: usize) -> Result<[Holder; 2]> {
    let targets = stage.targets(LINES);
    let before = Holder::open(&stage.bed.client, &targets, count / 2)?;
    stage.apply(&stage.configuration(all))?;
    stage.wait_healthy(all)?;
    Ok([before, Holder::open(&stage.bed.client, &targets, count / 2)?])
}

fn ensure_all_stay(stage: &Stage, holders: &[Holder], when: &str) -> Result<()> {
    for holder in holders {
        let moved: Vec<_> = holder.exchange()?.into_iter().filter(|held| !held.stays()).collect();
        if let Some(first) = moved.first() {
            let flow = [first.local.to_string(), first.target.to_string()];
            let why = stage.lbctl.run(&["explain", &flow[0], &flow[1], "tcp"])?;
            bail!(
                "{when}: {} connections broken: {first:?}\n{why}\n{}",
                moved.len(),
                stage.ingress.process().output()
            );
        }
    }
    Ok(())
}

/// Replaces lbd by `programs` in turn, under connections, requests, datagrams and bulk traffic.
fn replace(plan: Plan, programs: &[Version], flows: &[&str]) -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let mut stage = Stage::start(Plan { layout, backends: Some(3), ..plan })?;
    let worker = &stage.bed.workers[0];
    let _iperf = iperf::start_worker(&worker.namespace, &worker.name, BULK, stage.bed.directory())?;
    let holders = open_exceptions(&stage, &[0, 1, 2, 3], 1_000)?;
    stage.apply(&(stage.configuration(&[0, 1, 2, 3]) + &bulk_service(&stage)))?;
    wait::until("the bulk service is healthy", Duration::from_secs(10), || {
        stage.lbctl.json(&["backend", "list"]).is_ok_and(|all| {
            let all = all.as_array().cloned().unwrap_or_default();
            all.iter().any(|b| b["service"] == "bulk" && b["status"]["health"] == "healthy")
        })
    })?;
    let echo = SocketAddr::from((vip_v4(1), ECHO));
    let mut datagrams = Flows::open(&stage.bed.client, echo, 100)?;
    let answered = datagrams.exchange()?;

    let seconds = 6 + 6 * programs.len() as u32;
    let bulk = iperf::start(&stage.bed.client, vip_v4(1).into(), BULK, seconds, 100)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    for (number, version) in programs.iter().enumerate() {
        let took = change_to(&mut stage, version)?;
        let when = format!("change {number} to {version:?}");
        println!("{when}: {took:.2?}");
        ensure_all_stay(&stage, &holders, &when)?;
        let now = datagrams.exchange()?;
        let moved =
            answered.iter().zip(&now).filter(|(then, now)| then.is_some() && now.is_some() && then != now);
        ensure!(moved.count() == 0, "{when}: UDP flows moved");
    }
    let account = load.finish()?;
    if account.failed() > 0 {
        eprintln!("{}", stage.ingress.process().output());
    }
    ensure_none_failed(&account)?;
    let gap = bulk.finish()?.longest_gap();
    println!("{} requests, longest gap of bulk traffic {gap:?}", account.requests.len());
    ensure!(gap <= Duration::from_millis(300), "bulk traffic stood still for {gap:?}");
    let log = stage.ingress.process().output();
    let taken: Vec<&str> = log.lines().filter(|line| line.contains("taken over from another ABI")).collect();
    ensure!(taken.len() == programs.len(), "{} takeovers of {}: {log}", taken.len(), programs.len());
    for flow in flows {
        ensure!(taken.iter().all(|line| line.contains(flow)), "{flow} did not come along: {taken:?}");
    }
    taken.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Up, down, up, down.
fn there_and_back() -> Result<Vec<Version>> {
    let [other, own] = both()?;
    Ok(vec![other.clone(), own.clone(), other, own])
}

#[test]
fn upgrades_and_downgrades_keep_flows_placed_by_load() -> Result<()> {
    let plan = Plan { settings: "scheduler = \"p2c\"", ..Plan::default() };
    replace(plan, &there_and_back()?, &["\"FLOWS\"", "\"UDP_FLOWS\""])
}

#[test]
fn upgrades_and_downgrades_keep_translated_flows() -> Result<()> {
    let plan = Plan { mode: "nat", ..Plan::default() };
    replace(plan, &there_and_back()?, &["\"NAT_FLOWS\"", "\"NAT_REPLIES\""])
}

#[test]
fn an_earlier_build_is_taken_over_from() -> Result<()> {
    let Some(previous) = std::env::var_os("LB_PREVIOUS_LBD").map(PathBuf::from) else {
        skip("no-previous-lbd", "LB_PREVIOUS_LBD names no lbd that was built from an earlier commit");
        return Ok(());
    };
    let plan = Plan { settings: "scheduler = \"p2c\"", ..Plan::default() };
    let layout = Layout { workers: 4, ..Layout::default() };
    let mut stage = Stage::start(Plan { layout, backends: Some(3), ..plan })?;
    stage.ingress.stop(Signal::SIGTERM)?;
    let pins = stage.bed.pin_path("ingress");
    run(stage.bed.ingress.command(binary("lbd")?).args(["detach", "--pin-path"]).arg(&pins))?;
    stage.ingress.start_again_as(&previous, &stage.bed)?;
    stage.wait_healthy(&[0, 1, 2])?;
    let holders = open_exceptions(&stage, &[0, 1, 2, 3], 1_000)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    change_to(&mut stage, &both()?[1])?;
    ensure_all_stay(&stage, &holders, "from the earlier build")?;
    let log = stage.ingress.process().output();
    ensure!(log.contains("taken over from another ABI version"), "{log}");
    // Down again: one that reads layouts takes over; one from before version 3 finds what it does not know, says so, and
    // leaves it alone.
    stage.ingress.stop(Signal::SIGTERM)?;
    stage.ingress.begin_again_as(&previous, &stage.bed)?;
    let mut has_ended = false;
    wait::until("the earlier build takes over or gives up", Duration::from_secs(20), || {
        has_ended = stage.ingress.has_ended();
        has_ended || stage.ingress.process().output().contains("taken over from another ABI version")
    })?;
    if has_ended {
        ensure!(stage.ingress.process().output().contains(&format!("ABI version {ABI_VERSION}")));
    } else {
        ensure_all_stay(&stage, &holders, "down to the earlier build")?;
        stage.ingress.stop(Signal::SIGTERM)?;
    }
    stage.ingress.start_again(&stage.bed)?;
    ensure_all_stay(&stage, &holders, "after the earlier build")?;
    ensure_none_failed(&load.finish()?)
}

/// Killed at any point, up or down, it leaves one of the two whole and forwarding, and the next start goes on.
#[test]
fn kill_9_while_taking_over_leaves_one_that_forwards() -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let plan = Plan { settings: "scheduler = \"p2c\"", layout, backends: Some(3), ..Plan::default() };
    let mut stage = Stage::start(plan)?;
    let holders = open_exceptions(&stage, &[0, 1, 2, 3], 300)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    let versions = both()?;
    let whole = change_to(&mut stage, &versions[0])?;
    change_to(&mut stage, &versions[1])?;
    let mut finished = 0;
    for round in 0..14_u32 {
        // From before its objects are made to after the others are gone.
        let (program, abi) = &versions[(round % 2) as usize];
        let wait = whole * round / 12;
        stage.ingress.stop(Signal::SIGTERM)?;
        stage.ingress.begin_again_as(program, &stage.bed)?;
        thread::sleep(wait);
        stage.ingress.stop(Signal::SIGKILL)?;
        let left = homes(&stage)?;
        finished += u32::from(left == [format!("abi-{abi}")]);
        ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 100)?)
            .with_context(|| format!("round {round}: killed after {wait:?}, {left:?} left"))?;
        // The other one half the time.
        change_to(&mut stage, &versions[(round / 2 % 2) as usize])?;
        ensure_all_stay(&stage, &holders, &format!("round {round}: killed after {wait:?}, {left:?} left"))?;
    }
    println!("{finished} of 14 had finished before they were killed; a whole change took {whole:?}");
    ensure_none_failed(&load.finish()?)
}

/// Whether the program of a version sends packets of flows that no table knows to the program before it.
fn is_taking_over(pins: &Path, abi: u32) -> bool {
    let path = pins.join(format!("abi-{abi}/TAKEOVER"));
    let Ok(map) = MapData::from_pin(path) else { return false };
    let flag = Array::<_, u32>::try_from(Map::Array(map)).and_then(|flag| flag.get(&0, 0));
    flag.is_ok_and(|flag| flag != 0)
}

/// Starts a version and kills it in the middle of its takeover, while connections are opened: once its program runs, and
/// before it has copied what changed meanwhile. Whether it was killed there, and the connections.
fn kill_in_the_middle(stage: &mut Stage, (program, abi): &Version) -> Result<(bool, Vec<Holder>)> {
    let pins = stage.bed.pin_path("ingress");
    let (client, targets) = (&stage.bed.client, stage.targets(LINES));
    if !stage.ingress.has_ended() {
        stage.ingress.stop(Signal::SIGTERM)?;
    }
    stage.ingress.begin_again_as(program, &stage.bed)?;
    let is_over = AtomicBool::new(false);
    let holders = thread::scope(|scope| -> Result<Vec<Holder>> {
        let opening = scope.spawn(|| -> Result<Vec<Holder>> {
            let mut holders = Vec::new();
            // The last ones are what matters, and descriptors are finite.
            while !is_over.load(Ordering::Relaxed) {
                holders.truncate(20);
                holders.insert(0, Holder::open(client, &targets, 200)?);
            }
            Ok(holders)
        });
        let patience = Instant::now() + Duration::from_secs(20);
        while !is_taking_over(&pins, *abi) && Instant::now() < patience {}
        let is_late = Instant::now() >= patience;
        thread::sleep(Duration::from_micros(300));
        let killed = stage.ingress.stop(Signal::SIGKILL);
        is_over.store(true, Ordering::Relaxed);
        let holders = opening.join().expect("no panic");
        killed?;
        ensure!(!is_late, "no takeover: {}", stage.ingress.process().output());
        holders.with_context(|| format!("connections are opened while {abi} starts"))
    })?;
    Ok((is_taking_over(&pins, *abi) && homes(stage)?.len() > 1, holders))
}

/// Flows that only an earlier program knows, because a later one was killed before it had copied them, survive when the
/// first version takes over again, whether it is killed itself or not.
#[test]
fn flows_of_an_unfinished_takeover_survive_the_next_one() -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let mut stage = Stage::start(Plan { settings: "scheduler = \"p2c\"", layout, ..Plan::default() })?;
    let [other, ours] = both()?;
    let (mut once, mut twice) = (0, 0);
    for round in 1.. {
        ensure!(round <= 30, "killed in the middle once {once} times, twice in a row {twice} times");
        let (is_hit, mut holders) =
            kill_in_the_middle(&mut stage, &other).with_context(|| format!("round {round}"))?;
        if round % 2 == 0 {
            let (is_hit_again, second) = kill_in_the_middle(&mut stage, &ours)
                .with_context(|| format!("round {round}, after {is_hit}"))?;
            holders.extend(second);
            twice += u32::from(is_hit && is_hit_again);
        }
        once += u32::from(is_hit);
        let left = homes(&stage)?;
        change_to(&mut stage, &ours)?;
        ensure_all_stay(&stage, &holders, &format!("round {round}: {left:?} were left"))?;
        if once >= 4 && twice >= 2 {
            println!("{round} rounds: killed in the middle {once} times, {twice} times twice in a row");
            break;
        }
    }
    Ok(())
}

/// An lbd, and its ABI version.
type Version = (PathBuf, u32);

/// The other one, and our own.
fn both() -> Result<[Version; 2]> {
    Ok([(binary("lbd-other-abi")?, OTHER), (binary("lbd")?, ABI_VERSION)])
}

/// Changes to a version, and tells how long it took until no other's objects were left.
fn change_to(stage: &mut Stage, (program, abi): &Version) -> Result<Duration> {
    if !stage.ingress.has_ended() {
        stage.ingress.stop(Signal::SIGTERM)?;
    }
    let began = Instant::now();
    stage.ingress.begin_again_as(program, &stage.bed)?;
    let changed = wait::until("the takeover is complete", Duration::from_secs(20), || {
        homes(stage).is_ok_and(|left| left == [format!("abi-{abi}")])
    });
    changed.with_context(|| stage.ingress.process().output())?;
    let took = began.elapsed();
    wait::until("lbd answers", Duration::from_secs(20), || stage.lbctl.run(&["status"]).is_ok())?;
    Ok(took)
}

fn answers(stage: &Stage) -> Result<bool> {
    let target = SocketAddr::from((vip_v4(1), nginx::PORT));
    let heard =
        stage.bed.client.enter(move || TcpStream::connect_timeout(&target, Duration::from_millis(400)))?;
    Ok(heard.is_ok())
}

/// A user's program before ours stays, and goes on to whichever version runs.
#[test]
fn chained_programs_stay_through_upgrades() -> Result<()> {
    use test_support::chained::{Firewall, Place};
    let plan = Plan { settings: "scheduler = \"p2c\"", arguments: &["--chain"], ..Plan::default() };
    let mut stage = Stage::start(plan)?;
    let pins = stage.bed.pin_path("ingress");
    let firewall = Firewall::start(&pins, Place::Before, 4)?;
    let holder = [Holder::open(&stage.bed.client, &stage.targets(LINES), 200)?];
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    for version in there_and_back()? {
        change_to(&mut stage, &version)?;
        ensure_all_stay(&stage, &holder, &format!("{version:?}"))?;
    }
    ensure_none_failed(&load.finish()?)?;
    let other = Firewall::start(&pins, Place::After, 5)?;
    firewall.stop()?;
    other.stop()?;
    let wall = Firewall::start(&pins, Place::Before, nginx::PORT)?;
    ensure!(!answers(&stage)?, "the place that users know is not the one that the program jumps by");
    for version in there_and_back()? {
        change_to(&mut stage, &version)?;
        ensure!(!answers(&stage)?, "{version:?} let packets by");
    }
    wall.stop()?;
    ensure!(answers(&stage)?, "the firewall is gone");
    Ok(())
}
