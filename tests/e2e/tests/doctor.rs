//! `lbctl doctor` on a whole bed: all well, a path that is narrow without a word, a worker that does not unpack, no lbd.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use test_support::{
    bed::{Layout, binary},
    stage::{LINE, Plan, Stage, WEB},
};

/// Findings by what they are about, and the exit code.
fn ask(stage: &Stage) -> Result<(Option<i32>, Vec<Value>)> {
    let mut command = stage.bed.ingress.command(binary("lbctl")?);
    command.arg("--socket").arg(stage.bed.path("lbd.sock")).args(["-o", "json", "doctor"]);
    command.arg("--pin-path").arg(stage.bed.pin_path("ingress"));
    let output = command.output().context("cannot start lbctl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Vec<Value> = serde_json::from_str(&text)
        .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.status.code(), found))
}

fn about<'a>(found: &'a [Value], about: &str) -> Result<&'a Value> {
    let one = found.iter().find(|finding| finding["about"] == about);
    one.with_context(|| format!("nothing about {about}: {found:#?}"))
}

fn says(finding: &Value, level: &str, text: &str) -> Result<()> {
    let whole = format!("{} {}", finding["what"], finding["fix"]);
    ensure!(finding["level"] == level && whole.contains(text), "{finding:#}: not {level:?}, {text:?}");
    Ok(())
}

#[test]
fn paths_are_measured_and_tunnels_tried() -> Result<()> {
    let plan = Plan {
        layout: Layout { workers: 2, ..Layout::default() },
        offers: vec![WEB, LINE],
        ..Plan::default()
    };
    let mut stage = Stage::start(plan)?;
    let (code, found) = ask(&stage)?;
    ensure!(code == Some(0) && found.iter().all(|f| f["level"] != "fail"), "{code:?}: {found:#?}");
    for (address, tunnel) in [("10.1.1.2", "tunnel to web/w1"), ("fd00:1:2::2", "tunnel to web6/w2")] {
        says(about(&found, &format!("path to {address}"))?, "ok", "1600 bytes")?;
        says(about(&found, tunnel)?, "ok", "answers")?;
    }
    says(about(&found, "service web")?, "ok", "1580 bytes")?;

    // What is too large for the worker's end is lost without a word; a virtual link has room for a tag beyond its MTU.
    stage.bed.workers[0].namespace.ip(&["link", "set", "eth0", "mtu", "1390"])?;
    let (code, found) = ask(&stage)?;
    ensure!(code == Some(0), "{found:#?}");
    for address in ["10.1.1.2", "fd00:1:1::2"] {
        says(about(&found, &format!("path to {address}"))?, "ok", "1394 bytes")?;
    }
    says(about(&found, "path to 10.1.2.2")?, "ok", "1600 bytes")?;
    says(about(&found, "service web")?, "warn", "advmss 1334")?;
    says(about(&found, "service web6")?, "warn", "advmss 1294")?;

    // Nobody unpacks there any more.
    let mut agent = stage.hosts[1].agent.take().context("ipip has one")?;
    agent.stop(Signal::SIGTERM, std::time::Duration::from_secs(5))?;
    let mut detach = stage.bed.workers[1].namespace.command(binary("lbd")?);
    detach.arg("detach").arg("--pin-path").arg(stage.bed.pin_path("w2"));
    ensure!(detach.status()?.success(), "cannot detach");
    let (_, found) = ask(&stage)?;
    says(about(&found, "tunnel to web/w2")?, "warn", "lbd worker")?;
    says(about(&found, "tunnel to web/w1")?, "ok", "answers")?;

    stage.ingress.stop(Signal::SIGTERM)?;
    let (code, found) = ask(&stage)?;
    ensure!(code == Some(1), "{code:?}");
    says(about(&found, "lbd")?, "fail", "cannot reach lbd")
}

#[test]
fn gue_with_other_backends_aboard_is_reckoned_with() -> Result<()> {
    let layout = Layout { workers: 1, worker_mtu: 1500, ..Layout::default() };
    let stage = Stage::start(Plan { layout, mode: "gue", offers: vec![WEB], ..Plan::default() })?;
    let (_, found) = ask(&stage)?;
    says(about(&found, "service web")?, "warn", "advmss 1416")?;
    says(about(&found, "service web6")?, "warn", "advmss 1352")?;
    says(about(&found, "tunnel to web/w1")?, "ok", "answers")?;
    says(about(&found, "tunnel to web6/w1")?, "ok", "answers")
}
