//! Connections placed by load, and ingress hosts that have never heard of them: second chance finds their workers.
//!
//! The bed's ingress namespace is the router here. Two ingress hosts stand beside it on a link each; workers answer
//! clients through the router. "Rehashing every flow" is the router's route to the VIPs pointing to the other host.

use std::{net::SocketAddr, os::fd::OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::{Bed, Layout, vip_v4, vip_v6},
    daemon::{self, Ingress, Lbctl},
    hold::{Held, Holder, LineWorker},
    netns::{self, Namespace},
    process::Process,
    program,
    stage::LINES,
};

const WORKERS: u8 = 4;
const CONNECTIONS: usize = 500;

/// An ingress host beside the router.
struct Host {
    name: &'static str,
    /// The router's interface towards it.
    link: &'static str,
    number: u8,
    namespace: Namespace,
    lbd: Ingress,
    lbctl: Lbctl,
}

/// Router, ingress hosts, workers.
struct World {
    hosts: Vec<Host>,
    _workers: Vec<(Process, LineWorker)>,
    _programs: Vec<OwnedFd>,
    bed: Bed,
}

/// Both families' services with all workers.
fn configuration(bed: &Bed, second_chance: bool) -> String {
    let mut text = String::new();
    for (name, vip, is_v6) in
        [("lines", vip_v4(1).to_string(), false), ("lines6", vip_v6(1).to_string(), true)]
    {
        text += &format!(
            "[[service]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {LINES}\nprotocol = \"tcp\"\nmode = \"gue\"\n\
             scheduler = \"p2c\"\nsecond_chance = {second_chance}\n"
        );
        for worker in &bed.workers {
            let address = if is_v6 { worker.v6.to_string() } else { worker.v4.to_string() };
            text += &format!("[[service.backend]]\nname = \"{}\"\naddress = \"{address}\"\n", worker.name);
        }
    }
    text
}

impl World {
    fn start(second_chance: bool) -> Result<Self> {
        let bed = Bed::new(Layout { workers: WORKERS, ..Layout::default() })?;
        let router = &bed.ingress;
        let mut programs = Vec::new();
        let mut workers = Vec::new();
        for worker in &bed.workers {
            // A worker that sends a packet on does so by XDP_TX.
            programs.push(program::attach_pass(router, &worker.name)?);
            let vips = [vip_v4(1).into(), vip_v6(1).into()];
            let agent = daemon::start_worker(&bed, worker, &vips, &[])?;
            workers.push((agent, LineWorker::start(&worker.namespace, &worker.name, LINES)?));
        }
        let mut hosts = Vec::new();
        for (name, link, number) in [("a", "ha", 1), ("b", "hb", 2)] {
            let namespace = Namespace::create(&format!("lbt-{}-{name}", bed.id()))?;
            netns::connect((&namespace, "eth0"), (router, link), 1_700)?;
            for (side, interface, host) in [(&namespace, "eth0", 2), (router, link, 1)] {
                side.add_address(interface, format!("10.2.{number}.{host}").parse()?, 24)?;
                side.add_address(interface, format!("fd00:2:{number}::{host}").parse()?, 64)?;
            }
            namespace.add_default_route(format!("10.2.{number}.1").parse()?)?;
            namespace.add_default_route(format!("fd00:2:{number}::1").parse()?)?;
            programs.push(program::attach_pass(router, link)?);
            let lbd = Ingress::start_on(&bed, &namespace, name, &[])?;
            let lbctl = lbd.lbctl()?;
            let path = bed.path("services.toml");
            std::fs::write(&path, configuration(&bed, second_chance))?;
            lbctl.run(&["config", "apply", &path.display().to_string()])?;
            hosts.push(Host { name, link, number, namespace, lbd, lbctl });
        }
        let world = Self { hosts, _workers: workers, _programs: programs, bed };
        world.route_to(0)?;
        Ok(world)
    }

    /// Makes the router send all that is for the VIPs to this host.
    fn route_to(&self, host: usize) -> Result<()> {
        let Host { number, link, .. } = &self.hosts[host];
        let (v4, v6) = (format!("10.2.{number}.2"), format!("fd00:2:{number}::2"));
        self.bed.ingress.ip(&["route", "replace", &vip_v4(1).to_string(), "via", &v4, "dev", link])?;
        self.bed.ingress.ip(&["-6", "route", "replace", &vip_v6(1).to_string(), "via", &v6, "dev", link])?;
        Ok(())
    }

    fn open(&self) -> Result<Holder> {
        let targets = [SocketAddr::from((vip_v4(1), LINES)), SocketAddr::from((vip_v6(1), LINES))];
        Holder::open(&self.bed.client, &targets, CONNECTIONS)
    }

    /// Flows that a host tracks: those on their slot's second choice.
    fn tracked(&self, host: usize) -> Result<usize> {
        let flows = self.hosts[host].lbctl.json(&["flows", "--limit", "10000"])?;
        let all = flows.as_array().or_else(|| flows["flows"].as_array()).context("a list of flows")?;
        // Noted SYNs of flows on the primary stay in their own table until they age.
        Ok(all.iter().filter(|flow| flow["table"] == "tcp").count())
    }
}

fn broken(held: &[Held]) -> usize {
    held.iter().filter(|held| !held.stays()).count()
}

/// Moves all connections to the host that has never seen them; returns how many broke.
fn rehash(second_chance: bool) -> Result<usize> {
    let world = World::start(second_chance)?;
    let holder = world.open()?;
    ensure!(broken(&holder.exchange()?) == 0, "broken before anything happened");
    let tracked = world.tracked(0)?;
    println!("{tracked} of {CONNECTIONS} connections are on the second choice of their slot");
    ensure!((CONNECTIONS / 5..CONNECTIONS * 4 / 5).contains(&tracked), "placed by load: {tracked} tracked");
    ensure!(world.tracked(1)? == 0, "the other host has an empty flow table");
    world.route_to(1)?;
    let held = holder.exchange()?;
    // And on: data that no handshake's numbers lead.
    let again = holder.exchange()?;
    let lost = broken(&again);
    println!("second chance {second_chance}: {lost} of {CONNECTIONS} broken, {} at once", broken(&held));
    Ok(lost)
}

#[test]
fn a_host_with_an_empty_flow_table_breaks_nothing() -> Result<()> {
    let lost = rehash(true)?;
    ensure!(lost == 0, "{lost} connections broke");
    Ok(())
}

/// What it is for: the same without it.
#[test]
fn without_second_chance_connections_break() -> Result<()> {
    let lost = rehash(false)?;
    ensure!(lost >= CONNECTIONS / 5, "only {lost} connections broke: the test above shows nothing");
    Ok(())
}

#[test]
fn a_killed_host_breaks_nothing() -> Result<()> {
    let mut world = World::start(true)?;
    let holder = world.open()?;
    world.hosts[0].lbd.stop(Signal::SIGKILL)?;
    world.hosts[0].namespace.ip(&["link", "set", "eth0", "down"])?;
    world.route_to(1)?;
    let lost = broken(&holder.exchange()?);
    println!("one host killed: {lost} of {CONNECTIONS} broken");
    ensure!(lost == 0, "{lost} connections broke");
    // New ones go on being placed, and found.
    let more = world.open()?;
    ensure!(broken(&more.exchange()?) + broken(&holder.exchange()?) == 0);
    Ok(())
}

#[test]
fn a_restart_that_loses_the_maps_breaks_nothing() -> Result<()> {
    let mut world = World::start(true)?;
    let holder = world.open()?;
    ensure!(world.tracked(0)? > 0, "there is something to lose");
    // The host is away meanwhile.
    world.route_to(1)?;
    world.hosts[0].lbd.stop(Signal::SIGTERM)?;
    let bed = &world.bed;
    let host = &mut world.hosts[0];
    let pins = bed.pin_path(&format!("ingress{}", host.name)).display().to_string();
    let mut detach = host.namespace.command(test_support::bed::binary("lbd")?);
    netns::run(detach.args(["detach", "--pin-path", &pins]))?;
    host.lbd.start_again_on(&host.namespace)?;
    world.route_to(0)?;
    ensure!(world.tracked(0)? == 0, "the maps are lost");
    let lost = broken(&holder.exchange()?);
    println!("restarted without its maps: {lost} of {CONNECTIONS} broken");
    ensure!(lost == 0, "{lost} connections broke");
    Ok(())
}
