//! Three regions under more load than one of them can serve: 8 slots of 200 ms each, so 40 requests per second and
//! region, 120 in all; all clients enter in the east. What they see is asserted, not what hosts decide.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::REPLICA;
use anyhow::{Result, ensure};
use test_support::{
    bed::vip_v4,
    http::{Account, Arrivals, Running},
    regions::{Offer, Plan, Regions},
    replica,
};

/// Four requests at once on each worker, 200 ms each.
const WORK: &str = "auto-4-200";
const SERVICE_TIME: Duration = Duration::from_millis(200);
/// Far below what the east alone can serve.
const CALM: u32 = 10;
const HOLD: Duration = Duration::from_secs(60);
/// Of each load held: the time in which shares may still move.
const SETTLE: Duration = Duration::from_secs(15);

fn start() -> Result<Regions> {
    let text = format!(
        "[[service]]\nname = \"llm\"\nvip = \"{}\"\nport = {}\nprotocol = \"tcp\"\nmode = \"gue\"\nscheduler = \"p2c\"\n\
         replica = {{ kind = \"stream\", port = {} }}\n",
        vip_v4(1),
        replica::PORT,
        replica::PORT
    );
    Regions::start(Plan {
        regions: 3,
        etcd: true,
        replica: REPLICA.to_owned(),
        words: WORK.to_owned(),
        services: vec![Offer { text, only: None }],
        arguments: Vec::new(),
    })
}

/// Raises the load evenly, and holds it; returns the requests of the time in which it was held, after it had settled.
fn ramp_and_hold(load: &Running, rate: &AtomicU32, to: u32, ramp: Duration) -> Account {
    let from = rate.load(Ordering::Relaxed);
    let began = Instant::now();
    while began.elapsed() < ramp {
        let part = began.elapsed().as_secs_f64() / ramp.as_secs_f64();
        rate.store(from + (f64::from(to - from) * part) as u32, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(100));
    }
    rate.store(to, Ordering::Relaxed);
    thread::sleep(SETTLE);
    load.take();
    let settled = Instant::now();
    thread::sleep(HOLD - SETTLE);
    let mut account = load.take();
    account.requests.retain(|r| r.started >= settled);
    account
}

#[test]
fn overload_spills_and_no_queue_grows() -> Result<()> {
    let world = start()?;
    world.enter_by(0, vip_v4(1))?;
    let rate = Arc::new(AtomicU32::new(CALM));
    let target = SocketAddr::from((vip_v4(1), replica::PORT));
    let load = Arrivals { target, per_second: rate.clone() }.start(&world.bed.client)?;
    thread::sleep(Duration::from_secs(5));
    let calm = load.take();
    ensure!(calm.by_worker().keys().all(|worker| worker.starts_with('e')), "calm: {:?}", calm.by_worker());
    let unloaded = calm.quantile(0.5);
    ensure!(unloaded >= SERVICE_TIME, "a request takes its time: {unloaded:?}");
    println!("{CALM}/s: p50 {unloaded:?}");

    for (to, ramp) in [(70, 20), (100, 5)] {
        let held = ramp_and_hold(&load, &rate, to, Duration::from_secs(ramp));
        let [p50, p99, longest] = [0.5, 0.99, 1.0].map(|q| held.quantile(q));
        println!("{to}/s: p50 {p50:?}, p99 {p99:?}, longest {longest:?}, {:?}", held.by_worker());
        for host in &world.regions[0].hosts {
            println!("{}", host.lbctl.run(&["policy", "explain", "llm"]).unwrap_or_default());
        }
        let wanted = (HOLD - SETTLE).as_secs() as usize * to as usize;
        ensure!(held.failed() == 0, "{to}/s: {:?}", held.failures().next());
        ensure!(held.requests.len() * 10 >= wanted * 9, "{to}/s: only {} were answered", held.requests.len());
        ensure!(p50 <= unloaded * 13 / 10, "{to}/s: p50 {p50:?}, unloaded {unloaded:?}");
        ensure!(p99 <= 10 * SERVICE_TIME, "{to}/s: p99 {p99:?}: a queue grew");
    }
    Ok(())
}
