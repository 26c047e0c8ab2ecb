//! A client on a 1,500-byte path uploads to workers on 1,500-byte links: full
//! frames do not fit once encapsulated, so the client must be told, and the
//! upload must come through whole.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use test_support::{
    bed::Layout,
    check::block_on,
    http::{Answer, Connection},
    nginx,
    stage::{Plan, Stage},
};

const BYTES: usize = 4 << 20;

fn uploads(mode: &'static str, v4_over_v6: bool) -> Result<()> {
    let layout = Layout { worker_mtu: 1500, ..Layout::default() };
    let stage = Stage::start(Plan { layout, mode, v4_over_v6, ..Plan::default() })?;
    for target in stage.targets(nginx::PORT) {
        let answer = upload(&stage, target)?;
        ensure!(answer.status == 200, "{mode} {target}: {answer:?}");
        // Without this the link might simply have been large enough.
        let learnt = learnt_mtu(&stage, target.ip())?;
        ensure!(learnt.is_some_and(|mtu| mtu < 1500), "{mode} {target}: nothing was too big: {learnt:?}");
    }
    Ok(())
}

fn upload(stage: &Stage, target: SocketAddr) -> Result<Answer> {
    block_on(&stage.bed.client, move || async move {
        let body = vec![7; BYTES];
        Connection::open(target).await?.post("/upload", &body, Duration::from_secs(20)).await
    })
}

/// What the client's kernel has been told about the path to `address`.
fn learnt_mtu(stage: &Stage, address: std::net::IpAddr) -> Result<Option<u64>> {
    let text = stage.bed.client.ip(&["-json", "route", "get", &address.to_string()])?;
    let routes: serde_json::Value = serde_json::from_str(&text)?;
    let metrics = routes[0]["metrics"].as_array();
    Ok(metrics.and_then(|metrics| metrics.iter().find_map(|metric| metric["mtu"].as_u64())))
}

#[test]
fn ipip_upload_completes() -> Result<()> {
    uploads("ipip", false)
}

#[test]
fn gue_upload_completes() -> Result<()> {
    uploads("gue", false)
}

/// Nothing is added, but the workers' links are narrower than the client's.
fn uploads_over_a_narrow_link(mode: &'static str) -> Result<()> {
    let layout = Layout { worker_mtu: 1400, ..Layout::default() };
    let stage = Stage::start(Plan { layout, mode, ..Plan::default() })?;
    advertise_more(&stage)?;
    for target in stage.targets(nginx::PORT) {
        let answer = upload(&stage, target)?;
        ensure!(answer.status == 200, "{mode} {target}: {answer:?}");
        let overhead = match (mode, target.is_ipv6()) {
            ("ipip", false) => 20,
            ("ipip", true) => 40,
            // With the other backends that may have the flow.
            ("gue", false) => 44,
            ("gue", true) => 88,
            _ => 0,
        };
        let learnt = learnt_mtu(&stage, target.ip())?;
        ensure!(learnt == Some(1400 - overhead), "{mode} {target}: learnt {learnt:?}");
        let (answer, bytes) = block_on(&stage.bed.client, move || async move {
            let mut connection = Connection::open(target).await?;
            let (answer, bytes) = connection.begin("/download/1").await?;
            connection.finish_body(bytes).await?;
            Ok((answer, bytes))
        })?;
        ensure!(answer.status == 200 && bytes == 1 << 20, "{mode} {target}: {bytes} bytes down");
    }
    Ok(())
}

/// Has the workers announce the segments of a full-size link, or they would keep the client from ever sending too much.
fn advertise_more(stage: &Stage) -> Result<()> {
    for (index, worker) in stage.bed.workers.iter().enumerate() {
        let number = index + 1;
        // The metrics are those that the kernel gives its own routes.
        for (family, own, metric, gateway, mss) in [
            ("-4", format!("10.1.{number}.0/24"), "0", format!("10.1.{number}.1"), "1460"),
            ("-6", format!("fd00:1:{number}::/64"), "256", format!("fd00:1:{number}::1"), "1440"),
        ] {
            let change = [family, "route", "change"];
            let own = [own.as_str(), "dev", "eth0", "proto", "kernel", "metric", metric, "advmss", mss];
            worker.namespace.ip(&[&change[..], &own[..]].concat())?;
            let default = ["default", "via", gateway.as_str(), "advmss", mss];
            worker.namespace.ip(&[&change[..], &default[..]].concat())?;
        }
    }
    Ok(())
}

#[test]
fn ipip_over_a_narrow_link() -> Result<()> {
    uploads_over_a_narrow_link("ipip")
}

#[test]
fn gue_over_a_narrow_link() -> Result<()> {
    uploads_over_a_narrow_link("gue")
}

#[test]
fn l2_over_a_narrow_link() -> Result<()> {
    uploads_over_a_narrow_link("l2")
}

#[test]
fn nat_over_a_narrow_link() -> Result<()> {
    uploads_over_a_narrow_link("nat")
}

#[test]
fn v4_service_on_v6_backends_upload_completes() -> Result<()> {
    uploads("ipip", true)
}

/// Frames of 9,000 bytes span several buffers; the program must attach to such
/// links all the same, and carry what fits.
#[test]
fn jumbo_frames_are_carried() -> Result<()> {
    let layout = Layout { client_mtu: 9000, worker_mtu: 9100, ..Layout::default() };
    let stage = Stage::start(Plan { layout, ..Plan::default() })?;
    for target in stage.targets(nginx::PORT) {
        let answer = upload(&stage, target)?;
        ensure!(answer.status == 200, "{target}: {answer:?}");
        let learnt = learnt_mtu(&stage, target.ip())?;
        ensure!(learnt.is_none(), "{target}: told to send no more than {learnt:?}");
    }
    let (packets, bytes) =
        (stage.bed.client.counter("eth0", "tx_packets")?, stage.bed.client.counter("eth0", "tx_bytes")?);
    ensure!(bytes / packets > 2000, "no jumbo frames were sent: {bytes} bytes in {packets} packets");
    Ok(())
}
