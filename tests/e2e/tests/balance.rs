//! New connections and datagrams spread over all workers, in every forwarding
//! mode and over every mix of families.

use std::time::Duration;

use anyhow::{Result, ensure};
use test_support::{
    check::{ensure_none_failed, ensure_shared, request},
    hold::Holder,
    nginx,
    stage::{ECHO, LINE, LINES, Plan, Stage},
    udp::Flows,
    wait,
};

const WORKERS: [&str; 3] = ["w1", "w2", "w3"];

fn balances(plan: Plan) -> Result<()> {
    let stage = Stage::start(plan)?;
    for target in stage.targets(nginx::PORT) {
        let account = request(&stage, vec![target], 600)?;
        ensure_none_failed(&account)?;
        // Half of the requests come on kept connections, which are few.
        ensure_shared(&account, &WORKERS, 0.1)?;
    }
    for target in stage.targets(ECHO) {
        let mut flows = Flows::open(&stage.bed.client, target, 200)?;
        let first = flows.exchange()?;
        ensure!(first.iter().all(Option::is_some), "{target}: datagrams were lost: {first:?}");
        for worker in WORKERS {
            let count = first.iter().flatten().filter(|answer| *answer == worker).count();
            ensure!(count >= 30, "{target}: {worker} answered {count} of 200 flows");
        }
        ensure!(flows.exchange()? == first, "{target}: a UDP flow changed its worker");
    }
    Ok(())
}

#[test]
fn ipip() -> Result<()> {
    balances(Plan::default())
}

#[test]
fn gue() -> Result<()> {
    balances(Plan { mode: "gue", ..Plan::default() })
}

#[test]
fn ipip_v4_service_on_v6_backends() -> Result<()> {
    balances(Plan { v4_over_v6: true, ..Plan::default() })
}

#[test]
fn gue_v4_service_on_v6_backends() -> Result<()> {
    balances(Plan { mode: "gue", v4_over_v6: true, ..Plan::default() })
}

#[test]
fn l2() -> Result<()> {
    balances(Plan { mode: "l2", ..Plan::default() })
}

#[test]
fn nat() -> Result<()> {
    balances(Plan { mode: "nat", ..Plan::default() })
}

/// Replies and health checks pass the program on the workers' side untouched.
#[test]
fn attached_to_several_interfaces() -> Result<()> {
    balances(Plan { arguments: &["--iface", "w1", "--iface", "w2"], ..Plan::default() })
}

/// A client that vanished no longer counts as load once the service's time is over; one that speaks does.
#[test]
fn idle_connections_count_for_the_services_time() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![LINE], ..Plan::default() })?;
    stage.lbctl.run(&["service", "set", LINE.name, "--scheduler", "lc", "--tcp-timeout", "10s"])?;
    let targets = [stage.targets(LINES)[0]];
    let (vanished, speaking) =
        (Holder::open(&stage.bed.client, &targets, 5)?, Holder::open(&stage.bed.client, &targets, 3)?);
    vanished.exchange()?;
    let counted = || Some(stage.lbctl.json(&["flows"]).ok()?["flows"].as_array()?.len());
    wait::until("all connections count", Duration::from_secs(10), || {
        speaking.exchange().is_ok() && counted() == Some(8)
    })?;
    let forgotten = wait::until("those that are idle do not", Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_secs(1));
        speaking.exchange().is_ok() && counted() == Some(3)
    })?;
    ensure!(forgotten > Duration::from_secs(5), "after {forgotten:?}");
    Ok(())
}
