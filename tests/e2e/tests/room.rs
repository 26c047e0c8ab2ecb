//! Many services that share a worker, at default limits: it dies, and all of them leave it in time, while other
//! changes go on.

use std::{
    fmt::Write as _,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use test_support::{
    nginx,
    stage::{Plan, Stage, WEB},
    wait,
};

const SERVICES: u16 = 300;
const INTERVAL: Duration = Duration::from_secs(1);
const FALL: u32 = 2;
/// Of the machine that builds and tests many things at once, where nothing is optimised.
const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 30 } else { 1 });

fn configuration(stage: &Stage) -> Result<String> {
    let mut text = String::new();
    for service in 0..SERVICES {
        let vip = Ipv4Addr::new(10, 98, (service / 200) as u8, (service % 200) as u8 + 1);
        writeln!(text, "[[service]]\nname = \"s{service}\"\nvip = \"{vip}\"\nport = 80\nprotocol = \"tcp\"")?;
        writeln!(text, "mode = \"gue\"\n[service.health]\nkind = \"tcp\"\nport = {}", nginx::PORT)?;
        writeln!(text, "interval_ms = {}\ntimeout_ms = 900\nrise = 1\nfall = {FALL}", INTERVAL.as_millis())?;
        for worker in &stage.bed.workers {
            writeln!(text, "[[service.backend]]\nname = \"{}\"\naddress = \"{}\"", worker.name, worker.v4)?;
        }
    }
    Ok(text)
}

#[test]
fn three_hundred_services_leave_a_dead_worker_while_others_change() -> Result<()> {
    let mut stage = Stage::start(Plan { mode: "gue", offers: vec![WEB], ..Plan::default() })?;
    stage.apply(&configuration(&stage)?)?;
    let slots = |stage: &Stage, name: &str| -> Result<(usize, usize)> {
        let all = stage.lbctl.backends(name)?;
        Ok((all.len(), all.iter().filter(|b| b.slots > 0).count()))
    };
    wait::until("all services use all workers", Duration::from_secs(60), || {
        ["w1", "w2", "w3"]
            .iter()
            .all(|&w| slots(&stage, w).is_ok_and(|s| s == (SERVICES.into(), SERVICES.into())))
    })?;
    let died = Instant::now();
    stage.hosts[1].http = None;
    wait::until("no service sends new flows to w2", Duration::from_secs(60), || {
        slots(&stage, "w2").is_ok_and(|(_, using)| using == 0)
    })?;
    let took = died.elapsed();
    println!("{SERVICES} services had left the dead worker after {took:?}");
    ensure!(took < INTERVAL * FALL + PATIENCE, "only after {took:?}");
    // Their tables are in transition now; everything else goes on.
    let mut longest = 0;
    for change in 0..50u16 {
        let service = format!("s{}", change / 2 * 37 % SERVICES);
        let verb = if change % 2 == 0 { "drain" } else { "undrain" };
        let applied = stage.lbctl.json(&["backend", verb, &service, "w3"])?;
        let micros = applied["applied"]["took_us"].as_u64();
        longest = longest.max(micros.with_context(|| format!("not applied: {applied}"))?);
    }
    println!("50 changes meanwhile: the longest took {longest} us");
    ensure!(Duration::from_micros(longest) < PATIENCE, "{longest} us");
    let status = stage.lbctl.output(&["status", "-o", "json"])?;
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    ensure!(!status.contains("not_up_to_date"), "{status}");
    Ok(())
}
