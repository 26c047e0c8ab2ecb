//! Nobody is cut off by a withdrawal: the last hosts keep a VIP that nothing serves, and a host whose siblings serve it
//! withdraws.

use std::time::Duration;

use crate::REPLICA;
use anyhow::{Context, Result, ensure};
use test_support::{
    bed::vip_v4,
    hold::Holder,
    regions::{Host, Offer, Plan, Regions},
    replica,
    stage::LINES,
    wait,
};

const PATIENCE: Duration = Duration::from_secs(20);
const CONNECTIONS: usize = 300;

/// A service that may run in the east only, whose health check is another process than its lines.
fn bound(name: &str, port: u16) -> Offer {
    let vip = vip_v4(1);
    let text = format!(
        "[[service]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {port}\nprotocol = \"tcp\"\nmode = \"gue\"\n\
         scheduler = \"p2c\"\n[service.regions]\nallowed = [\"east\"]\n\
         [service.health]\nkind = \"http\"\npath = \"/\"\nport = {}\ninterval_ms = 300\n\
         timeout_ms = 2000\nrise = 1\nfall = 2\ndamping = false\n",
        replica::PORT
    );
    Offer { text, only: Some("east") }
}

fn decision(host: &Host) -> String {
    let shown = host.lbctl.json(&["host", "show"]).unwrap_or_default();
    shown["announcement"]["vips"][0]["decision"].as_str().unwrap_or("unknown").to_owned()
}

fn wait_decision(host: &Host, wanted: &str) -> Result<Duration> {
    wait::until(&format!("{} decides {wanted}", host.name), PATIENCE, || decision(host) == wanted)
        .with_context(|| format!("it is {}; lbd said:\n{}", decision(host), host.lbd.process().output()))
}

fn ensure_unbroken(holder: &Holder, when: &str) -> Result<()> {
    let held = holder.exchange()?;
    let broken = held.iter().filter(|held| !held.stays()).count();
    ensure!(held.len() == CONNECTIONS, "{} of {CONNECTIONS} are held {when}", held.len());
    ensure!(broken == 0, "{broken} of {CONNECTIONS} connections broke {when}");
    Ok(())
}

/// Every host has the VIP, and the core has a way into both regions.
fn ensure_announced(world: &Regions, when: &str) -> Result<()> {
    for host in world.hosts() {
        ensure!(host.vips()? == [vip_v4(1)], "{} has no VIP {when}", host.name);
    }
    let ways = world.ways(vip_v4(1))?;
    ensure!(ways == ["east", "west"], "ways {when}: {ways:?}");
    Ok(())
}

/// All hosts keep the VIP, and five seconds later nothing is broken.
fn ensure_kept(world: &Regions, holder: &Holder, when: &str) -> Result<()> {
    for host in world.hosts() {
        wait_decision(host, "kept")?;
    }
    std::thread::sleep(Duration::from_secs(5));
    ensure_announced(world, when)?;
    ensure_unbroken(holder, when)
}

#[test]
fn nobody_is_cut_off_when_nothing_is_left_and_a_host_with_a_sibling_withdraws() -> Result<()> {
    let mut world = Regions::start(Plan {
        regions: 2,
        etcd: true,
        replica: REPLICA.to_owned(),
        words: "ready".to_owned(),
        services: vec![bound("chat", replica::PORT), bound("lines", LINES)],
        arguments: Vec::new(),
    })?;
    let holder = Holder::open(&world.bed.client, &[world.lines()], CONNECTIONS)?;
    ensure_unbroken(&holder, "at first")?;

    // A drain that leaves the services with nothing needs force, and names them.
    let lbctl = &world.regions[0].hosts[0].lbctl;
    for more in [&[][..], &["--dry-run"]] {
        let output = lbctl.output(&[&["region", "drain", "east"], more].concat())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(4), "{}: {said}", output.status);
        ensure!(said.contains("services chat, lines") && said.contains("--force"), "{said}");
    }
    lbctl.run(&["region", "drain", "east", "--force"])?;
    for host in world.hosts() {
        wait_decision(host, "kept")?;
        let status = host.lbctl.output(&["status"])?;
        let said = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(said.contains("is kept although no backend takes new flows"), "status says so: {said}");
    }
    std::thread::sleep(Duration::from_secs(5));
    ensure_announced(&world, "while the east drains")?;
    ensure_unbroken(&holder, "while the east drains")?;
    world.regions[0].hosts[0].lbctl.run(&["region", "undrain", "east"])?;
    for host in world.hosts() {
        wait_decision(host, "served")?;
    }
    ensure_unbroken(&holder, "after the drain")?;

    // Both health endpoints answer 503, and then are gone, and the data path works.
    for worker in &world.regions[0].workers {
        replica::say(&worker.worker, replica::FAILING)?;
    }
    ensure_kept(&world, &holder, "while the health endpoints answer 503")?;
    for worker in &world.regions[0].workers {
        replica::say(&worker.worker, "ready")?;
    }
    for host in world.hosts() {
        wait_decision(host, "served")?;
    }
    for worker in &mut world.regions[0].workers {
        worker.http = None;
    }
    ensure_kept(&world, &holder, "without health endpoints")?;
    let bed = &world.bed;
    for worker in &mut world.regions[0].workers {
        worker.revive(bed, REPLICA, "ready")?;
    }
    for host in world.hosts() {
        wait_decision(host, "served")?;
    }

    for host in world.hosts() {
        let shown = host.lbctl.json(&["host", "show"])?;
        ensure!(shown["announcement"]["changes"] == 1, "{}'s VIP was never off: {shown}", host.name);
    }
    ensure_announced(&world, "when all is well again")?;
    ensure_unbroken(&holder, "when all is well again")?;

    // One host alone finds no worker: the others serve, so it withdraws, and its connections go over its sibling.
    let cut = &world.regions[0].hosts[0];
    cut.namespace.run("nft", &["add", "table", "inet", "cut"])?;
    let chain = "{ type filter hook output priority 0; }";
    cut.namespace.run("nft", &["add", "chain", "inet", "cut", "out", chain])?;
    let port = replica::PORT.to_string();
    cut.namespace.run("nft", &["add", "rule", "inet", "cut", "out", "tcp", "dport", &port, "drop"])?;
    let took = wait::until("the host that finds no worker withdraws", PATIENCE, || {
        cut.vips().is_ok_and(|vips| vips.is_empty())
    })
    .with_context(|| format!("lbd said:\n{}", cut.lbd.process().output()))?;
    println!("withdrawn {} ms after its probes were cut", took.as_millis());
    for host in world.hosts().filter(|host| host.name != cut.name) {
        ensure!(decision(host) == "served", "{} is {}", host.name, decision(host));
    }
    wait::until("the east's router has one way", PATIENCE, || {
        world.regions[0].ways(vip_v4(1)).is_ok_and(|ways| ways == 1)
    })?;
    ensure_unbroken(&holder, "after one host has withdrawn")
}

#[test]
fn a_service_may_ask_for_the_withdrawal() -> Result<()> {
    let mut offer = bound("chat", replica::PORT);
    offer.text = offer.text.replace("mode =", "when_all_down = \"withdraw\"\nmode =");
    let mut world = Regions::start(Plan {
        regions: 1,
        etcd: false,
        replica: REPLICA.to_owned(),
        words: "ready".to_owned(),
        services: vec![offer],
        arguments: Vec::new(),
    })?;
    for worker in &mut world.regions[0].workers {
        worker.http = None;
    }
    for host in world.hosts() {
        wait_decision(host, "no-backend")?;
        ensure!(host.vips()?.is_empty(), "{} is off", host.name);
    }
    Ok(())
}
