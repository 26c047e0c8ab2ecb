//! Events and hooks: what happens is told once, in order, to readers, to the log and to programs.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use test_support::{
    bed::{Bed, Layout},
    daemon::Ingress,
    process::Process,
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);

/// The events so far.
fn events(ingress: &Ingress, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = ingress.lbctl()?.run(&[&["events", "-o", "json"], arguments].concat())?;
    text.lines().map(|line| serde_json::from_str(line).context("an event is not JSON")).collect()
}

fn has(events: &[Value], kind: &str, key: &str, value: &str) -> bool {
    events.iter().any(|event| event["kind"] == kind && event[key] == value)
}

fn wait_for(ingress: &Ingress, kind: &str, key: &str, value: &str) -> Result<()> {
    let what = format!("{kind} of {value} is told");
    wait::until(&what, PATIENCE, || events(ingress, &[]).is_ok_and(|all| has(&all, kind, key, value)))
        .map(drop)
}

#[test]
fn what_happens_is_told_once_and_in_order() -> Result<()> {
    let mut stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    let follower = stage.bed.path("followed");
    let mut command = Command::new(test_support::bed::binary("lbctl")?);
    command.args(["events", "--follow", "-o", "json"]).env("LBD_SOCKET", stage.bed.path("lbd.sock"));
    let mut follows = Process::spawn("lbctl events", command, &follower)?;

    // A worker dies and returns.
    stage.hosts[0].http = None;
    let died = Instant::now();
    wait_for(&stage.ingress, "backend.down", "backend", "w1")?;
    ensure!(died.elapsed() < PATIENCE, "it took {:?}", died.elapsed());
    wait::until("the problem is told", PATIENCE, || {
        events(&stage.ingress, &["--kind", "problem.begun"])
            .is_ok_and(|all| all.iter().any(|event| event["cause"].to_string().contains("unhealthy")))
    })?;
    stage.revive(0)?;
    wait_for(&stage.ingress, "backend.up", "backend", "w1")?;

    // A drain of two seconds.
    stage.lbctl.run(&["service", "set", "web", "--drain", "2s"])?;
    stage.lbctl.run(&["backend", "drain", "web", "w2", "-m", "RAM swap"])?;
    wait_for(&stage.ingress, "backend.drain.begun", "backend", "w2")?;
    wait_for(&stage.ingress, "backend.drain.ended", "backend", "w2")?;
    let drains = events(&stage.ingress, &["--kind", "backend.drain", "--service", "web"])?;
    ensure!(drains.len() == 2, "{drains:#?}");
    let cause = drains[0]["cause"].as_str().unwrap_or_default();
    ensure!(cause.contains("state up → draining (RAM swap)"), "{cause}");

    // Numbers have no gaps, and whoever follows has seen the same.
    let all = events(&stage.ingress, &[])?;
    let numbers: Vec<u64> = all.iter().filter_map(|event| event["seq"].as_u64()).collect();
    ensure!(numbers == (1..=all.len() as u64).collect::<Vec<_>>(), "{numbers:?}");
    let followed = || -> Vec<Value> {
        let text = fs::read_to_string(&follower).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    wait::until("the follower has all", PATIENCE, || followed().len() >= all.len())?;
    ensure!(followed()[..all.len()] == all[..]);

    // The log has each once.
    let log = stage.ingress.process().output();
    for event in &all {
        let seq = format!("seq={} ", event["seq"]);
        let lines = log.lines().filter(|line| line.contains("event=") && line.contains(&seq)).count();
        ensure!(lines == 1, "{lines} lines for {event}:\n{log}");
    }
    ensure!(!log.contains("health changed") && !log.contains("desired state applied"), "told twice:\n{log}");

    // Over a restart the follower goes on with the events of the new run.
    stage.ingress.stop(Signal::SIGTERM)?;
    stage.ingress.start_again(&stage.bed)?;
    let started = |all: &[Value]| all.iter().filter(|event| event["kind"] == "lbd.started").count();
    wait::until("the follower sees the restart", PATIENCE, || started(&followed()) == 2)?;
    follows.stop(Signal::SIGINT, PATIENCE).map(drop)
}

#[test]
fn interfaces_that_go_and_come_are_told() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    bed.ingress.ip(&["link", "add", "spare", "type", "veth", "peer", "name", "spare-peer"])?;
    bed.ingress.ip(&["link", "set", "spare", "up"])?;
    let ingress = Ingress::start(&bed, &["--iface", "spare", "--allow-generic"])?;
    wait_for(&ingress, "lbd.started", "kind", "lbd.started")?;
    bed.ingress.ip(&["link", "del", "spare"])?;
    wait_for(&ingress, "interface.lost", "interface", "spare")?;
    bed.ingress.ip(&["link", "add", "spare", "type", "veth", "peer", "name", "spare-peer"])?;
    bed.ingress.ip(&["link", "set", "spare", "up"])?;
    wait_for(&ingress, "interface.attached", "interface", "spare")
}

#[test]
fn hooks_run_with_the_event_and_never_hold_up_anything() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let (seen, config) = (bed.path("seen"), bed.path("hooks.toml"));
    let script = |name: &str, text: &str| -> Result<String> {
        let path = bed.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.display().to_string())
    };
    let good = script("good", &format!("read -r event; echo \"$LB_EVENT $event\" >> {}", seen.display()))?;
    let slow = script("slow", "sleep 600 & wait")?;
    let stuck_pid = bed.path("stuck.pid");
    let stuck = script("stuck", &format!("echo $$ > {}; sleep 600 & wait", stuck_pid.display()))?;
    let text = format!(
        "[[hook]]\non = [\"lbd\", \"revision\"]\nrun = [\"{good}\"]\n\
         [[hook]]\non = [\"revision\"]\nrun = [\"{slow}\"]\ntimeout_s = 1\n\
         [[hook]]\non = [\"revision\"]\nrun = [\"{stuck}\"]\ntimeout_s = 600\n"
    );
    fs::write(&config, text)?;
    let file = config.display().to_string();
    let metrics = "127.0.0.1:19464";
    let mut ingress = Ingress::start(&bed, &["--config", &file, "--metrics", metrics])?;
    let lbctl = ingress.lbctl()?;
    // More changes than programs may run at the same time: one that waited for the stuck ones would not return.
    for i in 0..8 {
        lbctl.run(&["service", "add", &format!("s{i}"), "--vip", &format!("10.9.0.{}:80/tcp", i + 1)])?;
    }
    let lines = || fs::read_to_string(&seen).unwrap_or_default();
    wait::until("the hook has run for all", PATIENCE, || {
        let seen = lines();
        seen.contains("lbd.started {") && seen.contains("\"revision\":8}")
    })?;
    let scrape = || {
        let mut curl = bed.ingress.command("curl");
        let output = curl.args(["-s", &format!("http://{metrics}/metrics")]).stderr(Stdio::null()).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    wait::until("slow programs are killed and counted", PATIENCE, || {
        let text = scrape();
        let is_counted = |line: &&str| line.contains("slow") && line.contains("result=\"timeout\"");
        text.lines().find(is_counted).is_some_and(|line| !line.ends_with(" 0"))
    })?;
    ensure!(ingress.process().output().contains("hook took too long and was killed"));
    ingress.stop(Signal::SIGTERM)?;
    let pid = fs::read_to_string(&stuck_pid)?.trim().to_owned();
    // Where nobody waits for orphans, a zombie is left of it.
    let is_gone =
        || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    wait::until("the stuck program ends with lbd", PATIENCE, is_gone)?;

    // A file that others may write decides nothing.
    fs::set_permissions(&config, fs::Permissions::from_mode(0o666))?;
    fs::remove_file(&seen)?;
    ingress.start_again(&bed)?;
    let status = ingress.lbctl()?.output(&["status"])?;
    let text = String::from_utf8_lossy(&status.stdout);
    ensure!(text.contains("the hooks of the configuration file do not run"), "{text}");
    std::thread::sleep(Duration::from_secs(2));
    ensure!(!seen.exists(), "a hook ran");
    Ok(())
}
