//! Health checks that take the way of traffic: a broken tunnel and a missing VIP are seen, in every mode, in both
//! families, and with the VIP on the ingress host itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use test_support::{
    bed::{Layout, binary, vip_v4, vip_v6},
    check, netns,
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);

fn start(mode: &'static str) -> Result<Stage> {
    let stage = Stage::start(Plan {
        mode,
        offers: vec![WEB],
        layout: Layout { workers: 2, ..Layout::default() },
        ..Plan::default()
    })?;
    for service in ["web", "web6"] {
        stage.lbctl.run(&[
            "service",
            "set",
            service,
            "--health-via",
            "tunnel",
            "--health-interval",
            "200ms",
        ])?;
    }
    Ok(stage)
}

/// What the last probe of a backend said.
fn reason(stage: &Stage, service: &str, backend: &str) -> Result<(bool, String)> {
    let shown = stage.lbctl.json(&["backend", "show", service, backend])?;
    let probe = &shown["status"]["last_probe"];
    Ok((probe["ok"].as_bool().unwrap_or(false), probe["reason"].as_str().unwrap_or_default().to_owned()))
}

/// Every backend's last probe is this good, and took the tunnel.
fn wait_probes(stage: &Stage, worker: &str, is_ok: bool) -> Result<()> {
    for service in ["web", "web6"] {
        let mut last = None;
        wait::until(&format!("{service}/{worker}: {is_ok}, through the tunnel"), PATIENCE, || {
            last = reason(stage, service, worker).ok();
            last.as_ref().is_some_and(|(ok, why)| *ok == is_ok && why.ends_with(", through the tunnel"))
        })
        .with_context(|| format!("the last said {last:?}"))?;
    }
    Ok(())
}

fn good_in_mode(mode: &'static str) -> Result<()> {
    let stage = start(mode)?;
    for worker in ["w1", "w2"] {
        wait_probes(&stage, worker, true)?;
    }
    // An ingress host that announces the VIP has it.
    stage.bed.ingress.add_address("lo", vip_v4(1).into(), 32)?;
    stage.bed.ingress.add_address("lo", vip_v6(1).into(), 128)?;
    std::thread::sleep(Duration::from_millis(600));
    for worker in ["w1", "w2"] {
        wait_probes(&stage, worker, true)?;
    }
    let probes = stage.lbctl.json(&["backend", "show", "web", "w1"])?;
    ensure!(probes["status"]["health"] == "healthy", "never found ill: {probes}");
    let history = probes["status"]["history"].as_array().map_or(0, Vec::len);
    ensure!(history <= 1, "never found ill: {probes}");
    Ok(())
}

#[test]
fn probes_take_ipip() -> Result<()> {
    good_in_mode("ipip")
}

#[test]
fn probes_take_gue() -> Result<()> {
    good_in_mode("gue")
}

#[test]
fn probes_take_l2() -> Result<()> {
    good_in_mode("l2")
}

#[test]
fn a_broken_tunnel_and_a_missing_vip_are_found() -> Result<()> {
    let mut stage = start("gue")?;
    for worker in ["w1", "w2"] {
        wait_probes(&stage, worker, true)?;
    }
    // Nobody unpacks on w1 any more; its server answers as before.
    stage.hosts[0].agent = None;
    let worker = &stage.bed.workers[0];
    let pins = stage.bed.pin_path("w1").display().to_string();
    netns::run(worker.namespace.command(binary("lbd")?).args([
        "worker",
        "--iface",
        "eth0",
        "--detach",
        "--pin-path",
        &pins,
    ]))?;
    stage.wait_health(0, false)?;
    wait_probes(&stage, "w1", false)?;
    check::ensure_none_failed(&check::request(&stage, stage.targets(WEB.port), 50)?)?;
    stage.lbctl.run(&["service", "set", "web", "--health-via", "direct"])?;
    let direct = || reason(&stage, "web", "w1").is_ok_and(|(ok, why)| ok && !why.contains("tunnel"));
    wait::until("a direct check finds nothing", PATIENCE, direct)?;

    // w2 unpacks, and has nobody of this name.
    stage.lbctl.run(&["service", "set", "web", "--health-via", "tunnel"])?;
    wait_probes(&stage, "w2", true)?;
    let vip = format!("{}/32", vip_v4(1));
    stage.bed.workers[1].namespace.ip(&["address", "del", &vip, "dev", "lo"])?;
    let gone = || {
        reason(&stage, "web", "w2").is_ok_and(|(ok, why)| !ok && why.contains("tunnel"))
            && reason(&stage, "web6", "w2").is_ok_and(|(ok, _)| ok)
    };
    wait::until("the missing VIP is found, and the other family's is not", PATIENCE, gone)?;
    Ok(())
}

#[test]
fn what_has_no_tunnel_is_refused() -> Result<()> {
    let stage = Stage::start(Plan { mode: "nat", offers: vec![WEB], ..Plan::default() })?;
    let output = stage.lbctl.output(&["service", "set", "web", "--health-via", "tunnel"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(4) && said.contains("modes ipip, gue and l2"), "{said}");
    Ok(())
}
