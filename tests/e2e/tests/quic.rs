//! A real QUIC client changes its address and port in the middle of a download and finishes it, because the
//! connection id says whose the connection is: in the clear and encrypted.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use test_support::{
    bed::{CLIENT_V4, vip_v4},
    nginx,
    quic::{Identity, Ids, download, serve},
    stage::{Plan, Stage, WEB},
    wait,
};

const PORT: u16 = 4433;
const DOWNLOADS: usize = 12;
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);
const KEY: &str = "8f95f09245765f80256934e50c66207f";

fn key() -> [u8; 16] {
    std::array::from_fn(|i| u8::from_str_radix(&KEY[i * 2..i * 2 + 2], 16).expect("hexadecimal"))
}

fn service(stage: &Stage) -> String {
    let vip = vip_v4(1);
    // Two configs at once, as while a rotation goes on.
    let mut text = format!(
        "[[service]]\nname = \"quic\"\nvip = \"{vip}\"\nport = {PORT}\nprotocol = \"udp\"\n\
         quic = [\"0:8:4\", \"1:8:8:{KEY}\"]\n\
         [service.health]\nkind = \"tcp\"\nport = {}\ninterval_ms = 200\n",
        nginx::PORT
    );
    for worker in &stage.bed.workers {
        text += &format!("[[service.backend]]\nname = \"{}\"\naddress = \"{}\"\n", worker.name, worker.v4);
    }
    text
}

/// The worker that `explain` names for an id is the one that gave it out, from wherever it comes.
fn explains(stage: &Stage, target: SocketAddr, all: &[Ids]) -> Result<()> {
    let target = target.to_string();
    let explain = |client: &str, id: &str| {
        stage.lbctl.json(&["explain", client, &target, "udp", "--connection-id", id])
    };
    for (worker, ids) in stage.bed.workers.iter().zip(all) {
        for client in ["10.0.0.77:1", "10.0.0.77:40000"] {
            let id = ids.one();
            let found = explain(client, &id)?;
            ensure!(found["answers"][0]["backend"]["name"] == *worker.name, "{id}: {found}");
        }
    }
    // Another's id, one too short, a config that is not there: placed like any datagram.
    for id in ["0cffffffffffffffff00000000", "0c00", "e0"] {
        let found = explain("10.0.0.77:1", id)?;
        ensure!(found["answers"][0]["packet"] == "datagram", "{id}: {found}");
        ensure!(found["steps"].to_string().contains("handled like other packets"), "{id}: {found}");
    }
    Ok(())
}

#[test]
fn a_client_that_moves_finishes_its_download() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    stage.bed.client.add_address("eth0", OTHER.into(), 24)?;
    let target = SocketAddr::from((vip_v4(1), PORT));
    let identity = Identity::new()?;
    stage
        .apply(&(stage.configuration(&[0, 1, 2]) + &service(&stage)))
        .with_context(|| format!("lbd said:\n{}", stage.ingress.process().output()))?;
    let mut all = Vec::new();
    for (i, worker) in stage.bed.workers.iter().enumerate() {
        let server_id = [0xa0, 0, 0, 0, 0, 0, 0, i as u8];
        let text: String = server_id.iter().map(|byte| format!("{byte:02x}")).collect();
        stage.lbctl.run(&["backend", "set", "quic", &worker.name, "--server-id", &text])?;
        // One in the clear, two encrypted.
        let (config, key) = if i == 0 { (0, None) } else { (1, Some(key())) };
        let ids = Ids { config, server_id, key };
        serve(&worker.namespace, &worker.name, target, ids, &identity)?;
        all.push(ids);
    }
    wait::until("the QUIC service's backends are healthy", Duration::from_secs(15), || {
        stage.bed.workers.iter().all(|worker| {
            let found = stage.lbctl.backends(&worker.name).unwrap_or_default();
            found.iter().any(|backend| backend.service == "quic" && backend.is_healthy && backend.slots > 0)
        })
    })?;
    let addresses = [IpAddr::from(CLIENT_V4), IpAddr::from(OTHER)];
    explains(&stage, target, &all)?;
    let mut workers = BTreeSet::new();
    for i in 0..DOWNLOADS {
        let worker = download(&stage.bed.client, target, addresses, &identity)
            .with_context(|| format!("download {i}\n{}", stage.lbctl.run(&["stats"]).unwrap_or_default()))?;
        workers.insert(worker);
    }
    ensure!(workers.len() == 3, "all workers took part: {workers:?}");
    let stats = stage.lbctl.json(&["stats"])?;
    let routed = stats["reasons"].as_array().context("stats list reasons")?.iter();
    let routed =
        routed.filter(|r| r["reason"] == "quic_routed").filter_map(|r| r["packets"].as_u64()).sum::<u64>();
    ensure!(routed > 1_000, "only {routed} packets were routed by their connection id");
    Ok(())
}
