//! What a service gets that names nothing: a check along the path of its traffic, and the panic rule; and what limits the
//! ejections of one that asks for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use test_support::{
    bed::{Layout, vip_v4},
    stage::{LINES, Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);

fn start(mode: &'static str, workers: u8, settings: &'static str) -> Result<Stage> {
    Stage::start(Plan {
        mode,
        offers: vec![WEB],
        settings,
        layout: Layout { workers, ..Layout::default() },
        ..Plan::default()
    })
}

fn list(stage: &Stage, service: &str) -> Vec<Value> {
    let list = stage.lbctl.json(&["backend", "list", service]).unwrap_or_default();
    list.as_array().cloned().unwrap_or_default()
}

fn wait_list(stage: &Stage, service: &str, condition: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
    let mut last = Vec::new();
    wait::until("the backends are as expected", PATIENCE, || {
        last = list(stage, service);
        condition(&last)
    })
    .with_context(|| format!("they are {last:?}"))?;
    Ok(last)
}

fn status(stage: &Stage) -> Result<(Option<i32>, String)> {
    let output = stage.lbctl.output(&["status"])?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// `lbctl service add` without any word of health, with worker 1 behind it.
fn add(stage: &Stage, name: &str, vip: &str, more: &[&str]) -> Result<Value> {
    stage.lbctl.run(&[&["service", "add", name, "--vip", vip], more].concat())?;
    stage.lbctl.run(&["backend", "add", name, "w1", &stage.bed.workers[0].v4.to_string()])?;
    Ok(stage.lbctl.json(&["service", "show", name])?["spec"].take())
}

#[test]
fn a_service_that_names_no_check_is_checked_along_the_path_of_its_traffic() -> Result<()> {
    let stage = start("gue", 1, "")?;
    let vip = |port: u16, protocol: &str| format!("{}:{port}/{protocol}", vip_v4(1));
    let spec = add(&stage, "new", &vip(LINES, "tcp"), &["--mode", "gue"])?;
    ensure!(spec["health"]["kind"] == "tcp" && spec["health"]["via"] == "tunnel", "{spec}");
    ensure!(spec["panic_percent"] == 10, "{spec}");
    wait_list(&stage, "new", |all| {
        let probe = &all[0]["status"]["last_probe"];
        all[0]["status"]["health"] == "healthy" && probe["reason"] == "connected, through the tunnel"
    })?;
    // Nobody listens there: the default check finds that.
    add(&stage, "nobody", &vip(4444, "tcp"), &["--mode", "gue", "--panic", "0"])?;
    wait_list(&stage, "nobody", |all| all[0]["status"]["health"] == "unhealthy")?;
    let (code, text) = status(&stage)?;
    ensure!(code == Some(1) && text.contains("nobody/w1"), "{text}");
    stage.lbctl.run(&["service", "rm", "nobody"])?;

    // What cannot be checked, or is not to be, says so.
    let udp = add(&stage, "datagrams", &vip(9001, "udp"), &["--mode", "gue"])?;
    let none = add(&stage, "none", &vip(4445, "tcp"), &["--mode", "gue", "--health", "none"])?;
    ensure!(udp["health"]["kind"] == "none" && none["health"]["kind"] == "none", "{udp} {none}");
    for service in ["datagrams", "none"] {
        let table = stage.lbctl.run(&["backend", "list", service])?;
        ensure!(table.contains("unchecked"), "{table}");
        wait_list(&stage, service, |all| all[0]["status"]["slots"].as_u64() > Some(0))?;
    }
    let (code, text) = status(&stage)?;
    ensure!(code == Some(0) && text.contains("2 unchecked"), "{text}");
    // Another mode takes the check along, directly.
    stage.lbctl.run(&["service", "set", "new", "--mode", "ipip"])?;
    let spec = stage.lbctl.json(&["service", "show", "new"])?["spec"].take();
    ensure!(spec["health"]["via"] == "tunnel", "{spec}");
    Ok(())
}

#[test]
fn if_all_fail_at_once_health_is_ignored() -> Result<()> {
    let mut stage = start("nat", 2, "")?;
    for host in &mut stage.hosts {
        host.http = None;
    }
    let is_in = |b: &Value| b["status"]["health"] == "unhealthy" && b["status"]["slots"].as_u64() > Some(0);
    wait_list(&stage, "web", |all| all.iter().all(is_in))?;
    let (code, text) = status(&stage)?;
    ensure!(
        code == Some(1) && text.contains("too few backends are healthy, so health is ignored in: web"),
        "{text}"
    );
    stage.revive(0)?;
    wait_list(&stage, "web", |all| {
        all[0]["status"]["health"] == "healthy" && all[1]["status"]["slots"].as_u64() == Some(0)
    })?;
    Ok(())
}

#[test]
fn checks_take_out_no_more_than_the_limit_at_once() -> Result<()> {
    let mut stage = start("nat", 4, "max_ejection_percent = 50\nejection_window_s = 8\npanic_percent = 0")?;
    for host in &mut stage.hosts[..3] {
        host.http = None;
    }
    let out = |all: &[Value]| all.iter().filter(|b| b["status"]["slots"].as_u64() == Some(0)).count();
    let failing = |all: &[Value]| all.iter().filter(|b| b["status"]["health"] == "unhealthy").count();
    let all = wait_list(&stage, "web", |all| failing(all) == 3 && out(all) == 2)?;
    let held: Vec<&Value> = all.iter().filter(|b| b["status"]["held"] == true).collect();
    ensure!(held.len() == 1 && held[0]["status"]["slots"].as_u64() > Some(0), "{all:?}");
    let (code, text) = status(&stage)?;
    let line =
        format!("in service web: {}; checks take out at most 50 %", held[0]["name"].as_str().unwrap_or("?"));
    ensure!(code == Some(1) && text.contains(&line), "{text}");
    let table = stage.lbctl.run(&["backend", "list", "web"])?;
    ensure!(table.contains("held in by the ejection limit"), "{table}");
    // An operator's drain is not limited.
    stage.lbctl.run(&["backend", "drain", "web6", "w4"])?;
    wait_list(&stage, "web6", |all| all[3]["status"]["slots"].as_u64() == Some(0))?;
    // The rest goes once the first are out for as long as the window.
    wait_list(&stage, "web", |all| out(all) == 3 && all.iter().all(|b| b["status"]["held"].is_null()))?;
    Ok(())
}
