//! Two ingress hosts whose etcd loses members while changes go on.

use std::{
    env, fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;

use anyhow::{Context, Result, anyhow, bail, ensure};
use test_support::{
    bed,
    check::ensure_none_failed,
    daemon::Lbctl,
    hold::Holder,
    http::{Load, Running},
    pair::{MEMBERS, Pair},
    stage::LINES,
    wait,
};

/// How long members are cut off and changes made, unless LB_STORE_FAULT_S says otherwise.
const FAULTS: Duration = Duration::from_secs(40);
/// Changes whose way to the other host's maps is measured.
const MEASURED: usize = 100;

/// A writer's account.
#[derive(Default)]
struct Written {
    /// Names of backends whose addition was confirmed.
    confirmed: Vec<String>,
    /// Attempts that were refused or not confirmed.
    refused: usize,
    /// The longest that one took.
    slowest: Duration,
}

/// Adds one backend after the other to a service of its own, and moves weights of `web` now and then.
fn write(lbctl: &Lbctl, service: &str, stop: &AtomicBool) -> Result<Written> {
    let mut written = Written::default();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let name = format!("k{number}");
        let address = format!("10.200.{}.{}", number / 250, number % 250 + 1);
        let began = Instant::now();
        let output = lbctl.output(&["backend", "add", service, &name, &address])?;
        written.slowest = written.slowest.max(began.elapsed());
        match output.status.code() {
            Some(0) => written.confirmed.push(name),
            // Cut off, or not confirmed: said so, by the documented code.
            Some(4) => {
                written.refused += 1;
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let known = ["cut off from the store", "did not confirm", "has a backend", "by now, not"];
                ensure!(known.iter().any(|text| said.contains(text)), "refused oddly: {said}");
                thread::sleep(Duration::from_millis(100));
            }
            code => bail!("lbctl ended with {code:?}: {}", String::from_utf8_lossy(&output.stderr)),
        }
        if number % 5 == 0 {
            let weight = (number / 5 % 3 + 1).to_string();
            let worker = format!("w{}", number / 5 % 3 + 1);
            lbctl.output(&["backend", "set", "web", &worker, "--weight", &weight])?;
        }
    }
    Ok(written)
}

/// Cuts members off at random: one as a rule, two now and then, so that nobody can write.
fn cut_at_random(pair: &Pair, time: Duration, random: &mut impl FnMut(u64) -> u64) -> Result<(usize, usize)> {
    let until = Instant::now() + time;
    let (mut singles, mut doubles) = (0, 0);
    while Instant::now() < until {
        let first = random(MEMBERS as u64) as usize;
        let both = random(4) == 0;
        let mut cut = vec![first];
        if both {
            cut.push((first + 1) % MEMBERS);
            doubles += 1;
        } else {
            singles += 1;
        }
        cut.iter().try_for_each(|&member| pair.cut(member, true))?;
        thread::sleep(Duration::from_millis(1_000 + random(3_000)));
        cut.iter().try_for_each(|&member| pair.cut(member, false))?;
        thread::sleep(Duration::from_millis(500 + random(2_000)));
    }
    Ok((singles, doubles))
}

/// A generator that needs no crate; the seed is printed.
fn random() -> impl FnMut(u64) -> u64 {
    let seed = env::var("LB_STORE_FAULT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64 | 1)
    });
    println!("LB_STORE_FAULT_SEED={seed}");
    let mut state: u64 = seed;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    }
}

#[test]
fn members_cut_off_at_random_lose_no_change_and_stop_no_traffic() -> Result<()> {
    let time = env::var("LB_STORE_FAULT_S").ok().and_then(|text| text.parse().ok());
    let time = time.map_or(FAULTS, Duration::from_secs);
    let mut random = random();
    let pair = Pair::start(&[])?;
    for (service, vip) in [("log-a", "10.99.0.11:80/tcp"), ("log-b", "10.99.0.12:80/tcp")] {
        pair.a.lbctl.run(&["service", "add", service, "--vip", vip])?;
    }
    pair.converge(Duration::from_secs(20))?;
    let load = |namespace| Running::start(namespace, Load::new(vec![pair.target()]));
    let (first, second) = (load(&pair.bed.client)?, load(&pair.second_client)?);

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = [(&pair.a, "log-a"), (&pair.b, "log-b")]
        .into_iter()
        .map(|(host, service)| {
            let (lbctl, stop) = (host.lbctl.clone(), stop.clone());
            thread::spawn(move || write(&lbctl, service, &stop))
        })
        .collect();
    let cuts = cut_at_random(&pair, time, &mut random);
    stop.store(true, Ordering::Relaxed);
    let mut accounts = Vec::new();
    for writer in writers {
        accounts.push(writer.join().map_err(|_| anyhow!("a writer panicked"))??);
    }
    let (singles, doubles) = cuts?;
    let (revision, took) = pair.converge(Duration::from_secs(30))?;
    println!(
        "{time:?} with one member cut off {singles} times, and two {doubles} times; then at revision {revision} \
         with the same tables after {took:?}"
    );
    for (service, account) in ["log-a", "log-b"].into_iter().zip(&accounts) {
        println!(
            "{service}: {} changes confirmed, {} refused, slowest answer {:?}",
            account.confirmed.len(),
            account.refused,
            account.slowest
        );
        ensure!(account.confirmed.len() > 20, "too few changes to say anything");
        for host in [&pair.a, &pair.b] {
            let list = host.lbctl.json(&["backend", "list", service])?;
            let there: Vec<&str> =
                list.as_array().context("a list")?.iter().filter_map(|b| b["name"].as_str()).collect();
            let lost: Vec<_> =
                account.confirmed.iter().filter(|name| !there.contains(&name.as_str())).collect();
            ensure!(lost.is_empty(), "confirmed, and lost: {lost:?}");
        }
    }
    for (name, load) in [("a", first), ("b", second)] {
        let account = load.finish()?;
        println!("client of {name}: {} requests, {} failed", account.requests.len(), account.failed());
        ensure_none_failed(&account)?;
    }
    Ok(())
}

#[test]
fn a_change_on_one_host_is_soon_in_the_others_maps() -> Result<()> {
    let pair = Pair::start(&[])?;
    let now_ms = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
    let mut times = Vec::new();
    for round in 0..MEASURED {
        let began_ms = now_ms();
        let weight = (round % 3 + 1).to_string();
        let (from, worker) = (if round % 2 == 0 { &pair.a } else { &pair.b }, format!("w{}", round % 2 + 1));
        let change = from.lbctl.json(&["backend", "set", "web", &worker, "--weight", &weight])?;
        let revision = change["revision"].as_u64().context("a revision")?;
        // When each host had it in its maps, by its own account (one clock, on this machine).
        let slowest = wait::until_some("both hosts have the change", Duration::from_secs(10), || {
            let info = from.lbctl.json(&["store", "status"]).ok()?;
            let committed = info["revision"]["time_ms"].as_u64()?;
            let hosts = info["hosts"].as_array().filter(|hosts| hosts.len() == 2)?;
            let lags = hosts.iter().map(|host| {
                (host["revision"].as_u64()? == revision).then(|| host["lag"]["last_ms"].as_u64())?
            });
            let slowest = lags.collect::<Option<Vec<_>>>()?.into_iter().max()?;
            Some(committed + slowest)
        })?;
        times.push(slowest.saturating_sub(began_ms));
    }
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let (p50, p99, max) = (at(0.5), at(0.99), at(1.0));
    println!(
        "lbctl started → in the maps of both hosts: p50 {p50} ms, p99 {p99} ms, longest {max} ms ({MEASURED} changes)"
    );
    ensure!(p99 < 1_000, "p99 is {p99} ms");
    Ok(())
}

/// A host that lost everything, pins and files, knows from the store which backend each slot had before.
#[test]
fn a_fresh_host_knows_the_transitions_that_are_going_on() -> Result<()> {
    let mut pair = Pair::start(&[])?;
    let target = SocketAddr::new(pair.target().ip(), LINES);
    let holder = Holder::open(&pair.second_client, &[target], 200)?;
    let on_drained = holder.exchange()?.iter().filter(|held| held.worker == "w1").count();
    ensure!(on_drained > 20, "only {on_drained} of 200 connections are on w1");
    pair.a.lbctl.run(&["backend", "drain", "lines", "w1"])?;
    pair.converge(Duration::from_secs(10))?;

    pair.b.ingress.stop(Signal::SIGKILL)?;
    let pins = pair.bed.pin_path("ingress-b").display().to_string();
    let mut detach = bed::command_in(&pair.second_ingress, "lbd")?;
    let status = detach.args(["detach", "--pin-path", &pins]).status()?;
    ensure!(status.success(), "lbd detach: {status}");
    fs::remove_dir_all(pair.bed.path("state-b"))?;
    pair.b.ingress.start_again_on(&pair.second_ingress)?;
    pair.converge(Duration::from_secs(20))?;

    let held = holder.exchange()?;
    let moved = held.iter().filter(|held| !held.stays()).count();
    ensure!(moved == 0, "{moved} of 200 connections broke, {on_drained} had been on w1");
    println!("{on_drained} connections stayed on the drained worker, through a host that knew nothing");
    Ok(())
}

/// Cut off from etcd, also over a restart, a host forwards, shows what it knows, refuses changes and says why.
#[test]
fn a_host_that_is_cut_off_says_so_and_catches_up() -> Result<()> {
    let mut pair = Pair::start(&["--metrics", "127.0.0.1:9464"])?;
    let load = Running::start(&pair.second_client, Load::new(vec![pair.target()]))?;
    pair.cut_host("b", true)?;
    let status = || -> Result<serde_json::Value> {
        // Unhealthy is exit code 1, with the same output.
        Ok(serde_json::from_slice(&pair.b.lbctl.output(&["status", "-o", "json"])?.stdout)?)
    };
    let took = wait::until("b notices", Duration::from_secs(15), || {
        status().is_ok_and(|status| status["store"]["connected"] == false)
    })?;
    println!("noticed after {took:?}");
    let told = status()?;
    let problems = told["problems"].to_string();
    ensure!(problems.contains("cut off from the store") && told["healthy"] == false, "{problems}");
    let metrics = pair.second_ingress.run("curl", &["-s", "http://127.0.0.1:9464/metrics"])?;
    let line =
        |name: &str| metrics.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    ensure!(line("lb_store_connected").ends_with(" 0.0"), "{}", line("lb_store_connected"));
    ensure!(!line("lb_store_contact_age_seconds").ends_with(" 0.0"), "{}", line("lb_store_contact"));
    let refused = pair.b.lbctl.output(&["backend", "drain", "lines", "w2"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(4) && said.contains("cut off from the store"), "{said}");
    pair.a.lbctl.run(&["backend", "drain", "lines", "w1"])?;

    // What it knows outlives it.
    let before = pair.b.lbctl.run(&["config", "export"])?;
    pair.b.ingress.stop(Signal::SIGTERM)?;
    pair.b.ingress.start_again_on(&pair.second_ingress)?;
    ensure!(pair.b.lbctl.run(&["config", "export"])? == before, "the last known state was not kept");

    pair.cut_host("b", false)?;
    let (revision, took) = pair.converge(Duration::from_secs(20))?;
    println!("back and at revision {revision} after {took:?}");
    ensure!(pair.b.lbctl.run(&["config", "export"])? != before, "a's change did not arrive");
    pair.b.lbctl.run(&["backend", "drain", "lines", "w2"])?;
    let account = load.finish()?;
    println!("client of b: {} requests, {} failed", account.requests.len(), account.failed());
    ensure_none_failed(&account)
}

/// The same with a store that all hosts share, and which is empty for all: another prefix, a new cluster.
#[test]
fn an_empty_etcd_takes_no_service_away() -> Result<()> {
    let mut pair = Pair::start(&[])?;
    let load = Running::start(&pair.bed.client, Load::new(vec![pair.target()]))?;
    pair.a.ingress.stop(Signal::SIGKILL)?;
    pair.b.ingress.stop(Signal::SIGKILL)?;
    pair.cluster.etcdctl_in(&pair.bed.ingress, &["del", "lb/", "--prefix"])?;
    for state in ["state", "state-b"] {
        fs::remove_dir_all(pair.bed.path(state))?;
    }
    pair.a.ingress.start_again(&pair.bed)?;
    pair.b.ingress.start_again_on(&pair.second_ingress)?;
    for host in [&pair.a, &pair.b] {
        let output = host.lbctl.output(&["status", "-o", "json"])?;
        let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(output.status.code() == Some(1) && told["orphaned_services"] == 2, "{told}");
    }
    thread::sleep(Duration::from_secs(2));
    // One host's first change is everybody's state.
    let path = pair.bed.path("services.toml").display().to_string();
    pair.a.lbctl.run(&["config", "apply", &path])?;
    pair.converge(Duration::from_secs(20))?;
    for host in [&pair.a, &pair.b] {
        let output = host.lbctl.output(&["status", "-o", "json"])?;
        let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(told["orphaned_services"].is_null(), "{told}");
    }
    ensure_none_failed(&load.finish()?)
}
