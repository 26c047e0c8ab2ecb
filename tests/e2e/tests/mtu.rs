//! A client on a 1,500-byte path uploads to workers on 1,500-byte links: full
//! frames do not fit once encapsulated, so the client must be told, and the
//! upload must come through whole.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use test_support::{
    bed::{Layout, make_router},
    check::block_on,
    http::{Answer, Connection},
    netns::{self, Namespace},
    nginx, program,
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

/// Puts a router between the ingress host and the first worker: 1,600 bytes on this side, 1,500 on the other.
fn put_router(stage: &Stage) -> Result<(Namespace, std::os::fd::OwnedFd)> {
    let (ingress, worker) = (&stage.bed.ingress, &stage.bed.workers[0].namespace);
    let router = stage.bed.namespace("router")?;
    make_router(&router)?;
    ingress.ip(&["link", "set", "w1", "netns", router.name()])?;
    for (namespace, interface) in [(&router, "w1"), (worker, "eth0")] {
        namespace.ip(&["link", "set", interface, "mtu", "1500", "up"])?;
    }
    router.add_address("w1", "10.1.1.1".parse()?, 24)?;
    router.add_address("w1", "fd00:1:1::1".parse()?, 64)?;
    netns::connect((ingress, "near"), (&router, "near"), 1_600)?;
    let pass = program::attach_pass(&router, "near")?;
    for (namespace, v4, v6) in [(ingress, "10.2.0.1", "fd00:2::1"), (&router, "10.2.0.2", "fd00:2::2")] {
        namespace.add_address("near", v4.parse()?, 24)?;
        namespace.add_address("near", v6.parse()?, 64)?;
    }
    ingress.ip(&["route", "add", "10.1.1.0/24", "via", "10.2.0.2"])?;
    ingress.ip(&["-6", "route", "add", "fd00:1:1::/64", "via", "fd00:2::2"])?;
    router.add_default_route("10.2.0.1".parse()?)?;
    router.add_default_route("fd00:2::1".parse()?)?;
    netns::wait_up(&router, "w1")?;
    // Its default route went with the link's other end in IPv6 only; the kernel keeps those of IPv4.
    worker.ip(&["-6", "route", "replace", "default", "via", "fd00:1:1::1"])?;
    worker.ip(&["route", "replace", "default", "via", "10.1.1.1"])?;
    Ok((router, pass))
}

fn heard_from_a_router(mode: &'static str, overhead: [u64; 2]) -> Result<()> {
    let layout = Layout { workers: 1, ..Layout::default() };
    let stage = Stage::start(Plan { layout, mode, ..Plan::default() })?;
    let _router = put_router(&stage)?;
    stage.wait_healthy(&[0])?;
    for target in stage.targets(nginx::PORT) {
        let answer = upload(&stage, target)?;
        ensure!(answer.status == 200, "{mode} {target}: {answer:?}");
        let learnt = learnt_mtu(&stage, target.ip())?;
        let expected = 1_500 - overhead[usize::from(target.is_ipv6())];
        ensure!(learnt == Some(expected), "{mode} {target}: learnt {learnt:?}, expected {expected}");
    }
    let status = stage.lbctl.run(&["status"])?;
    ensure!(status.contains("path MTU:") && status.contains("web/w1 1500"), "{status}");
    let backend = stage.lbctl.json(&["backend", "show", "web", "w1"])?;
    ensure!(backend["status"]["next_hop"]["path_mtu"] == 1_500, "{backend}");
    Ok(())
}

/// The link that is too narrow is one that the ingress host knows nothing of.
#[test]
fn a_router_on_the_way_is_heard_by_ipip() -> Result<()> {
    heard_from_a_router("ipip", [20, 40])
}

#[test]
fn a_router_on_the_way_is_heard_by_gue() -> Result<()> {
    // Of one worker a packet names no others, but has room for them.
    heard_from_a_router("gue", [44, 88])
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
