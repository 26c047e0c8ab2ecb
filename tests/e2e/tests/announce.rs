//! VIPs on ingress hosts: put on while served, taken off when not, announced by BIRD as the shipped configuration has
//! it, and spread over hosts by a router.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::REPLICA;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::{binary, vip_v4, vip_v6},
    check,
    hold::{Held, Holder},
    http::{Load, Running},
    netns,
    regions::{Host, Offer, Plan, Regions},
    replica, wait,
};

const PATIENCE: Duration = Duration::from_secs(15);
const CONNECTIONS: usize = 200;

/// A service whose VIP goes when nothing serves it; `keep` has its own tests.
fn service(name: &str, vip: IpAddr, port: u16, check: u16) -> Offer {
    let text = format!(
        "[[service]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {port}\nprotocol = \"tcp\"\nmode = \"gue\"\n\
         when_all_down = \"withdraw\"\nscheduler = \"p2c\"\n[service.health]\nkind = \"http\"\npath = \"/\"\nport = {check}\ninterval_ms = 300\n\
         timeout_ms = 2000\nrise = 1\nfall = 2\ndamping = false\n"
    );
    Offer { text, only: None }
}

fn start() -> Result<Regions> {
    Regions::start(Plan {
        regions: 1,
        etcd: false,
        replica: REPLICA.to_owned(),
        words: "ready".to_owned(),
        services: vec![
            service("chat", vip_v4(1).into(), replica::PORT, replica::PORT),
            service("lines", vip_v4(1).into(), test_support::stage::LINES, replica::PORT),
            service("chat6", vip_v6(1).into(), replica::PORT, replica::PORT),
        ],
        arguments: Vec::new(),
    })
}

/// The kernel's list of a host's VIPs is this one.
fn wait_vips(host: &Host, wanted: &[IpAddr]) -> Result<Duration> {
    let mut found = Vec::new();
    wait::until(&format!("{} has {wanted:?}", host.name), PATIENCE, || {
        found = host.vips().unwrap_or_default();
        found.sort();
        found == wanted
    })
    .with_context(|| format!("it has {found:?}; lbd said:\n{}", host.lbd.process().output()))
}

fn first_vips() -> [IpAddr; 2] {
    [vip_v4(1).into(), vip_v6(1).into()]
}

fn wait_ways(world: &Regions, ways: usize) -> Result<Duration> {
    let region = &world.regions[0];
    wait::until(&format!("the router has {ways} ways"), PATIENCE, || {
        region.ways(vip_v4(1)).is_ok_and(|found| found == ways)
    })
}

fn broken(held: &[Held]) -> usize {
    held.iter().filter(|held| !held.stays()).count()
}

/// Counts from now on what a host's own stack sends in a VIP's name.
fn count_own_answers(host: &Host) -> Result<()> {
    host.namespace.run("nft", &["add", "table", "inet", "own"])?;
    let chain = "{ type filter hook output priority 0; }";
    host.namespace.run("nft", &["add", "chain", "inet", "own", "out", chain])?;
    for (family, vip) in [("ip", vip_v4(1).to_string()), ("ip6", vip_v6(1).to_string())] {
        host.namespace
            .run("nft", &["add", "rule", "inet", "own", "out", family, "saddr", &vip, "counter"])?;
    }
    Ok(())
}

fn own_answers(host: &Host) -> Result<u64> {
    let rules: serde_json::Value =
        serde_json::from_str(&host.namespace.run("nft", &["-j", "list", "table", "inet", "own"])?)?;
    let text = rules.to_string();
    let counts = text.split("\"packets\":").skip(1).filter_map(|rest| rest.split([',', '}']).next());
    Ok(counts.filter_map(|count| count.parse::<u64>().ok()).sum())
}

#[test]
fn vips_follow_health_and_the_panic_rule() -> Result<()> {
    let mut world = start()?;
    for host in world.hosts() {
        wait_vips(host, &first_vips())?;
    }
    let shown = world.regions[0].router.ip(&["-6", "route", "show", &vip_v6(1).to_string()])?;
    ensure!(shown.contains("fd00:1:1::2") && shown.contains("fd00:1:2::2"), "IPv6 too: {shown}");

    for host in world.hosts() {
        count_own_answers(host)?;
    }
    // Both hosts serve, and none of their stacks answers for a worker.
    let load = Running::start(&world.bed.client, Load { keeping: 0, ..Load::new(vec![world.target()]) })?;
    wait::until("400 requests have ended", PATIENCE, || load.count() >= 400)?;
    let vip = vip_v4(1).to_string();
    world.bed.client.run("ping", &["-c", "3", "-i", "0.1", "-W", "1", &vip])?;
    check::ensure_none_failed(&load.finish()?)?;
    for host in world.hosts() {
        let list = host.lbctl.json(&["service", "show", "chat"])?;
        let flows = list["service"]["status"]["flows"].as_u64().or(list["status"]["flows"].as_u64());
        ensure!(flows > Some(20), "{} had its share: {list}", host.name);
        let own = own_answers(host)?;
        ensure!(own == 0, "{}'s own stack has sent {own} packets in a VIP's name", host.name);
        ensure!(host.lbctl.run(&["service", "show", "chat"])?.contains("on lo"), "service show says so");
        ensure!(host.lbctl.run(&["status"])?.contains("2 of 2 VIPs on lo"), "status says so");
    }

    // The counter counts: nobody serves this port, so the packet is the host's, and so is the answer.
    let closed = SocketAddr::from((vip_v4(1), 81));
    let refused = world.bed.client.enter(move || std::net::TcpStream::connect(closed).is_err())?;
    let own: u64 = world.hosts().map(own_answers).sum::<Result<u64>>()?;
    ensure!(refused && own > 0, "a port that no service has: {own}");

    // No worker: off, and the router has no way.
    let words = "ready";
    for worker in &mut world.regions[0].workers {
        worker.http = None;
    }
    let killed = Instant::now();
    for host in world.hosts() {
        wait_vips(host, &[])?;
    }
    println!("off on both hosts {} ms after the last worker died", killed.elapsed().as_millis());
    wait_ways(&world, 0)?;
    for host in world.hosts() {
        let shown = host.lbctl.run(&["host", "show"])?;
        ensure!(shown.contains("no backend takes new flows"), "host show says why: {shown}");
    }

    // The panic rule says where packets go that come here; it draws nobody to a host that knows no healthy worker.
    let host = &world.regions[0].hosts[0];
    host.lbctl.run(&["service", "set", "chat", "--panic", "50"])?;
    let panics = || {
        let output = host.lbctl.output(&["status"]);
        output.is_ok_and(|output| {
            String::from_utf8_lossy(&output.stdout).contains("health is ignored in: chat")
        })
    };
    wait::until("the panic rule is in force", PATIENCE, panics)?;
    std::thread::sleep(Duration::from_secs(1));
    wait_vips(host, &[])?;
    host.lbctl.run(&["service", "set", "chat", "--panic", "0"])?;

    let bed = &world.bed;
    for worker in &mut world.regions[0].workers {
        worker.revive(bed, REPLICA, words)?;
    }
    let revived = Instant::now();
    for host in world.hosts() {
        wait_vips(host, &first_vips())?;
    }
    wait_ways(&world, 2)?;
    println!("on and routed {} ms after they were back", revived.elapsed().as_millis());
    Ok(())
}

#[test]
fn a_drained_host_gets_nothing_new_and_breaks_nothing() -> Result<()> {
    let mut world = start()?;
    wait_ways(&world, 2)?;
    let holder = Holder::open(&world.bed.client, &[world.lines()], CONNECTIONS)?;
    let load = Running::start(&world.bed.client, Load { keeping: 0, ..Load::new(vec![world.target()]) })?;
    wait::until("100 requests have ended", PATIENCE, || load.count() >= 100)?;

    let host = &world.regions[0].hosts[0];
    let began = Instant::now();
    let output = host.lbctl.output(&["host", "drain", "--reason", "a test", "--wait", "20s"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("drained and quiet after {} ms:\n{text}", began.elapsed().as_millis());
    wait_vips(host, &[])?;
    wait_ways(&world, 1)?;
    ensure!(broken(&holder.exchange()?) == 0, "connections broke");
    let status = host.lbctl.output(&["status"])?;
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    ensure!(
        status.status.code() == Some(1) && said.contains("this host is draining"),
        "status says so: {said}"
    );

    // A drain outlives lbd; ended, the host is as it was.
    world.regions[0].hosts[0].stop_lbd(Signal::SIGKILL)?;
    world.regions[0].hosts[0].start_lbd()?;
    let host = &world.regions[0].hosts[0];
    let shown = host.lbctl.run(&["host", "show"])?;
    ensure!(shown.contains("a test"), "still drained: {shown}");
    ensure!(host.vips()?.is_empty(), "and without VIPs");
    host.lbctl.run(&["host", "undrain"])?;
    wait_vips(host, &first_vips())?;
    wait_ways(&world, 2)?;
    ensure!(broken(&holder.exchange()?) == 0, "connections broke when it came back");
    check::ensure_none_failed(&load.finish()?)
}

#[test]
fn a_restart_does_not_flap_and_what_is_not_ours_stays() -> Result<()> {
    let mut world = start()?;
    wait_ways(&world, 2)?;
    let other = SocketAddr::from((vip_v4(2), 80)).ip();
    world.regions[0].hosts[0].namespace.add_address("lo", other, 32)?;
    let mut with_other = first_vips().to_vec();
    with_other.insert(1, other);
    wait_vips(&world.regions[0].hosts[0], &with_other)?;

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let host = &mut world.regions[0].hosts[0];
        let monitor = host
            .namespace
            .command("timeout")
            // Only where VIPs are: duplicate address detection on the other interfaces ends when it ends.
            .args(["60", "ip", "monitor", "address", "dev", "lo"])
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        host.stop_lbd(signal)?;
        ensure!(host.vips()?.len() == 3, "{signal}: they stay while lbd is away");
        host.start_lbd()?;
        let ready = || {
            host.lbctl
                .json(&["host", "show"])
                .is_ok_and(|shown| shown["announcement"]["vips"].as_array().is_some_and(|all| all.len() == 2))
        };
        wait::until("lbd announces again", PATIENCE, ready)?;
        let shown = host.lbctl.json(&["host", "show"])?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor.id() as i32), Signal::SIGTERM)?;
        let seen = String::from_utf8(monitor.wait_with_output()?.stdout)?;
        ensure!(seen.trim().is_empty(), "{signal}: the kernel told of changes:\n{seen}");
        ensure!(shown["announcement"]["changes"] == 0, "{signal}: {shown}");
    }

    // A service comes to the address that was there before: it is told of, and left alone.
    let host = &world.regions[0].hosts[0];
    host.lbctl.run(&["service", "add", "other", "--vip", "10.99.0.2:80/tcp"])?;
    let says = || host.lbctl.run(&["host", "show"]).is_ok_and(|text| text.contains("not by lbd"));
    wait::until("host show tells of the other address", PATIENCE, says)?;
    host.lbctl.run(&["service", "remove", "other"])?;
    wait_vips(host, &with_other)?;

    // The end of forwarding takes ours off first.
    world.regions[0].hosts[0].stop_lbd(Signal::SIGTERM)?;
    let host = &world.regions[0].hosts[0];
    let pins = world.bed.pin_path("ingress-e1").display().to_string();
    netns::run(host.namespace.command(binary("lbd")?).args(["detach", "--pin-path", &pins]))?;
    ensure!(host.vips()? == [other], "only the other one is left: {:?}", host.vips()?);
    wait_ways(&world, 1)?;
    Ok(())
}

#[test]
fn lbd_can_take_vips_with_it_and_refuses_what_cannot_work() -> Result<()> {
    let mut world = Regions::start(Plan {
        regions: 1,
        etcd: false,
        replica: REPLICA.to_owned(),
        words: "ready".to_owned(),
        services: vec![service("chat", vip_v4(1).into(), replica::PORT, replica::PORT)],
        arguments: vec!["--announce-on-stop".to_owned(), "withdraw".to_owned()],
    })?;
    let host = &mut world.regions[0].hosts[0];
    wait_vips(host, &first_vips()[..1])?;
    host.stop_lbd(Signal::SIGTERM)?;
    ensure!(host.vips()?.is_empty(), "withdrawn");
    let arguments: Vec<String> =
        host.lbd.arguments().iter().map(|a| if a == "lo" { "eth7".to_owned() } else { a.clone() }).collect();
    let output = host.namespace.command(binary("lbd")?).args(&arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(4) && said.contains("eth7 does not exist"),
        "{}: {said}",
        output.status
    );
    Ok(())
}
