//! `when_all_down = reset`: without a backend, clients are told at once; established connections go on.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use test_support::{
    bed::{CLIENT_V4, CLIENT_V6},
    check::{ensure_none_failed, request},
    hold::Holder,
    nginx,
    stage::{ECHO, LINES, Plan, Stage},
    wait,
};

/// No client waits that long for an answer on these links.
const AT_ONCE: Duration = Duration::from_secs(2);

/// With the panic rule, workers that all fail their checks get new flows.
const NO_PANIC: &str = "panic_percent = 0";

/// What a new connection gets.
fn connect(stage: &Stage, target: SocketAddr) -> Result<Option<ErrorKind>> {
    stage.bed.client.enter(move || TcpStream::connect_timeout(&target, AT_ONCE).err().map(|e| e.kind()))
}

/// What a connected socket gets for a datagram, within `patience`.
fn ask(stage: &Stage, target: SocketAddr, patience: Duration) -> Result<Result<usize, ErrorKind>> {
    let answer = stage.bed.client.enter(move || -> std::io::Result<usize> {
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        socket.set_read_timeout(Some(patience))?;
        socket.send(b"who")?;
        socket.recv(&mut [0; 64])
    })?;
    Ok(answer.map_err(|e| e.kind()))
}

fn set(stage: &Stage, when: &str) -> Result<()> {
    stage.services().iter().try_for_each(|(service, _)| {
        stage.lbctl.run(&["service", "set", service, "--when-all-down", when]).map(drop)
    })
}

fn is_told(plan: Plan) -> Result<()> {
    let mode = plan.mode;
    let mut stage = Stage::start(plan)?;
    let all: Vec<usize> = (0..stage.hosts.len()).collect();
    set(&stage, "reset")?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 40)?;
    ensure!(holder.exchange()?.iter().all(|held| held.stays()), "{mode}: at first");

    for &index in &all {
        stage.change_backend("drain", index)?;
    }
    for target in [stage.targets(nginx::PORT), stage.targets(LINES)].concat() {
        let began = Instant::now();
        let got = connect(&stage, target)?;
        ensure!(got == Some(ErrorKind::ConnectionRefused), "{mode}: {target}: {got:?}");
        ensure!(began.elapsed() < AT_ONCE, "{mode}: {target}: after {:?}", began.elapsed());
    }
    for target in stage.targets(ECHO) {
        let got = ask(&stage, target, AT_ONCE)?;
        ensure!(got == Err(ErrorKind::ConnectionRefused), "{mode}: {target}: {got:?}");
    }
    let held = holder.exchange()?;
    let broken = held.iter().filter(|held| !held.stays()).count();
    ensure!(held.len() == 40 && broken == 0, "{mode}: {broken} of {} connections broke", held.len());
    for target in stage.targets(LINES) {
        let client =
            SocketAddr::new(if target.is_ipv4() { CLIENT_V4.into() } else { CLIENT_V6.into() }, 5_000);
        let output = stage.lbctl.output(&["explain", &client.to_string(), &target.to_string(), "tcp"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said.contains("TCP reset"), "{mode}: explain says so: {said}");
    }

    set(&stage, "keep")?;
    let got = connect(&stage, stage.targets(LINES)[0])?;
    ensure!(
        got == Some(ErrorKind::TimedOut) || got == Some(ErrorKind::WouldBlock),
        "{mode}: with keep: {got:?}"
    );
    set(&stage, "reset")?;
    for &index in &all {
        stage.change_backend("undrain", index)?;
    }
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 100)?)?;

    // The same when checks find all workers dead.
    stage.hosts.iter_mut().for_each(|host| host.http = None);
    wait::until("new connections are refused", Duration::from_secs(20), || {
        connect(&stage, stage.targets(LINES)[0]).is_ok_and(|got| got == Some(ErrorKind::ConnectionRefused))
    })?;
    for &index in &all {
        stage.revive(index)?;
    }
    stage.wait_healthy(&all)?;
    for target in stage.targets(ECHO) {
        ensure!(ask(&stage, target, AT_ONCE)?.is_ok(), "{mode}: {target} answers again");
    }
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 100)?)
}

#[test]
fn clients_are_told_at_once_when_nothing_is_left() -> Result<()> {
    is_told(Plan { mode: "gue", settings: NO_PANIC, ..Plan::default() })
}

#[test]
fn clients_of_translated_services_are_told_at_once() -> Result<()> {
    is_told(Plan { mode: "nat", settings: NO_PANIC, ..Plan::default() })
}
