//! Workers and links that come and go.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use test_support::{
    check::{ensure_none_failed, ensure_shared, request},
    hold::Holder,
    nginx,
    stage::{LINES, Plan, Stage},
    wait,
};

#[test]
fn a_flapping_worker_disturbs_no_one_else() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 300)?;
    for _ in 0..4 {
        stage.hosts[2].http = None;
        stage.wait_health(2, false)?;
        stage.revive(2)?;
        stage.wait_health(2, true)?;
        // Its line service lived all the while: not even its own may break.
        let broken = holder.exchange()?.iter().filter(|held| !held.stays()).count();
        ensure!(broken == 0, "{broken} of 300 connections broke");
    }
    let account = request(&stage, stage.targets(nginx::PORT), 300)?;
    ensure_none_failed(&account)?;
    ensure_shared(&account, &["w1", "w2", "w3"], 0.05)
}

#[test]
fn when_all_die_lbd_stays_and_all_come_back() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    for host in &mut stage.hosts {
        host.http = None;
    }
    for index in 0..stage.hosts.len() {
        stage.wait_verdict(index, false)?;
    }
    for index in 0..stage.hosts.len() {
        stage.revive(index)?;
    }
    stage.wait_healthy(&[0, 1, 2])?;
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 300)?)
}

#[test]
fn traffic_resumes_when_the_clients_link_returns() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 50)?;
    stage.bed.client.ip(&["link", "set", "eth0", "down"])?;
    thread::sleep(Duration::from_millis(500));
    stage.bed.client.ip(&["link", "set", "eth0", "up"])?;
    // Taking a link down takes its IPv6 addresses and routes along.
    stage.bed.client.add_address("eth0", test_support::bed::CLIENT_V6.into(), 64)?;
    for gateway in [test_support::bed::INGRESS_V4.into(), test_support::bed::INGRESS_V6.into()] {
        stage.bed.client.add_default_route(gateway)?;
    }
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 200)?)?;
    wait::until("every connection answers again", Duration::from_secs(20), || {
        holder.exchange().is_ok_and(|lines| lines.iter().all(|held| held.stays()))
    })
    .map(drop)
}

/// A worker host that is replaced answers from another MAC address.
#[test]
fn a_worker_with_a_new_mac_address_is_followed() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 100)?)?;
    let worker = &stage.bed.workers[0];
    worker.namespace.ip(&["link", "set", "eth0", "address", "02:00:00:00:77:01"])?;
    stage.bed.ingress.ip(&["neigh", "flush", "dev", &worker.name])?;
    wait::until("all workers answer without a failure", Duration::from_secs(15), || {
        request(&stage, stage.targets(nginx::PORT), 150)
            .is_ok_and(|account| account.failed() == 0 && account.by_worker().len() == 3)
    })
    .map(drop)
}
