//! Datagrams too big for a link arrive whole, at the worker that has the flow; VIPs answer pings.

use anyhow::{Context, Result, ensure};
use test_support::{
    bed::{vip_v4, vip_v6},
    stage::{ECHO, Plan, Stage, UDP},
    udp::Flows,
};

const FLOWS: usize = 50;
/// Bytes of a datagram: three fragments.
const SIZE: usize = 4_000;

fn reach_their_worker(mode: &'static str) -> Result<()> {
    let stage = Stage::start(Plan { mode, offers: vec![UDP], ..Plan::default() })?;
    // The way back is by the kernel's own routers, and IPv6's do not fragment: the workers must.
    for worker in &stage.bed.workers {
        let route = worker.namespace.ip(&["-6", "route", "show", "default"])?;
        let words: Vec<&str> = route.lines().next().unwrap_or_default().split_whitespace().take(5).collect();
        worker.namespace.ip(&[&["-6", "route", "replace"], &words[..], &["mtu", "1500"]].concat())?;
    }
    for target in stage.targets(ECHO) {
        let mut flows = Flows::open(&stage.bed.client, target, FLOWS)?;
        let small = flows.exchange()?;
        let names: std::collections::BTreeSet<_> = small.iter().flatten().collect();
        ensure!(names.len() == 3, "all workers take part: {names:?}");
        if mode == "nat" {
            // Answers go to the ingress host by links that are wider than the way on: workers learn that by ICMP.
            let learning = flows.exchange_sized(SIZE)?;
            let lost = learning.iter().filter(|answer| answer.is_none()).count();
            ensure!(lost <= 2 * names.len(), "{lost} answers to {target} were lost: {learning:?}");
        }
        for _ in 0..3 {
            let big = flows.exchange_sized(SIZE)?;
            ensure!(
                big == small,
                "datagrams of {SIZE} bytes to {target}: {big:?} instead of {small:?}\n{}",
                stage.lbctl.run(&["stats"])?
            );
        }
        // A flow whose first datagram comes in parts.
        let mut flows = Flows::open(&stage.bed.client, target, FLOWS)?;
        let big = flows.exchange_sized(SIZE)?;
        ensure!(big.iter().all(Option::is_some), "{big:?}");
        ensure!(flows.exchange()? == big, "small datagrams follow big ones");
    }
    Ok(())
}

#[test]
fn datagrams_of_4000_bytes_reach_their_worker_by_ipip() -> Result<()> {
    reach_their_worker("ipip")
}

#[test]
fn datagrams_of_4000_bytes_reach_their_worker_by_gue() -> Result<()> {
    reach_their_worker("gue")
}

/// Both ways in parts, and under other addresses and ports.
#[test]
fn datagrams_of_4000_bytes_reach_their_worker_by_nat() -> Result<()> {
    reach_their_worker("nat")
}

#[test]
fn vips_answer_pings() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![UDP], ..Plan::default() })?;
    for vip in [vip_v4(1).to_string(), vip_v6(1).to_string()] {
        // The last carries a frame's worth of data.
        for size in ["0", "56", "1400"] {
            let arguments = ["-n", "-c", "20", "-i", "0.01", "-W", "2", "-s", size, &vip];
            let said =
                stage.bed.client.run("ping", &arguments).with_context(|| format!("ping {vip} -s {size}"))?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
        }
    }
    let unknown = stage.bed.client.run("ping", &["-n", "-c", "1", "-W", "1", "10.99.0.99"]);
    ensure!(unknown.is_err(), "an address that is no VIP does not answer");
    Ok(())
}
