//! A user's own XDP program runs before or after the balancer's on the same NIC, and stays when lbd is
//! restarted.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::INGRESS_V4,
    chained::{Firewall, Place},
    check::{ensure_none_failed, request},
    nginx,
    stage::{LINE, LINES, Plan, Stage, WEB},
};

/// A port of the ingress host where nobody listens.
const CLOSED: u16 = 7777;

/// What a client hears from a port: an answer of whatever kind, or nothing.
fn answers(stage: &Stage, target: SocketAddr) -> Result<bool> {
    let heard =
        stage.bed.client.enter(move || TcpStream::connect_timeout(&target, Duration::from_millis(400)))?;
    Ok(match heard {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    })
}

fn serves(stage: &Stage) -> Result<()> {
    ensure_none_failed(&request(stage, stage.targets(nginx::PORT), 50)?)
}

#[test]
fn others_programs_run_before_and_after_ours() -> Result<()> {
    let plan = Plan { offers: vec![WEB, LINE], arguments: &["--chain"], ..Plan::default() };
    let mut stage = Stage::start(plan)?;
    let lines = stage.targets(LINES)[0];
    let host = SocketAddr::from((INGRESS_V4, CLOSED));
    ensure!(answers(&stage, lines)? && answers(&stage, host)?, "before any firewall");

    let pins = stage.bed.pin_path("ingress");
    let before = Firewall::start(&pins, Place::Before, LINES)?;
    ensure!(!answers(&stage, lines)?, "the firewall before ours drops what is for a VIP");
    ensure!(answers(&stage, host)?, "and nothing else");
    serves(&stage)?;
    let after = Firewall::start(&pins, Place::After, CLOSED)?;
    ensure!(!answers(&stage, host)?, "the firewall after ours drops what is for the host");
    serves(&stage)?;

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        stage.ingress.stop(signal)?;
        ensure!(!answers(&stage, lines)? && !answers(&stage, host)?, "both stay without lbd");
        stage.ingress.start_again(&stage.bed)?;
        ensure!(!answers(&stage, lines)? && !answers(&stage, host)?, "both stay with a new lbd");
        serves(&stage)?;
    }
    before.stop()?;
    ensure!(answers(&stage, lines)? && !answers(&stage, host)?, "one is taken out");
    after.stop()?;
    ensure!(answers(&stage, host)?, "and the other");
    serves(&stage)
}
