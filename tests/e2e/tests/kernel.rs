//! Everything once, on whatever kernel and NICs run this: each way of forwarding with checked content, UDP in
//! fragments, drain, kill -9, restart and upgrade, with one set of daemons. Each check prints a line of its own,
//! which `cargo xtask test kernels` collects from virtual machines; here it is one test among others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use nix::sys::signal::Signal;
use test_support::{
    bed::{Bed, ClientLink, Layout, binary, vip_v4, vip_v6},
    daemon::{self, Ingress, Lbctl},
    mirror::{self, Mirrored},
    nics,
    process::Process,
    udp::{EchoWorker, Flows},
    wait,
};

/// A TCP service for each family: name, port, and what its configuration says.
const MODES: [(&str, u16, &str); 5] = [
    ("ipip", 8001, "mode = \"ipip\""),
    ("gue", 8002, "mode = \"gue\""),
    ("l2", 8003, "mode = \"l2\""),
    ("nat", 8004, "mode = \"nat\""),
    ("p2c", 8005, "mode = \"gue\"\nscheduler = \"p2c\""),
];
/// UDP echo for each family.
const DATAGRAMS: [(&str, u16, &str); 3] = [
    ("udp-ipip", 9001, "mode = \"ipip\""),
    ("udp-gue", 9002, "mode = \"gue\""),
    ("udp-nat", 9004, "mode = \"nat\""),
];
/// What the verifier may walk for a program: half of the kernel's limit.
const INSTRUCTIONS: u32 = 500_000;
const WORKERS: [&str; 2] = ["w1", "w2"];
/// Connections of a check.
const CONNECTIONS: usize = 16;
const BULK_BYTES: usize = 1 << 20;
/// Bytes of a datagram: three fragments.
const DATAGRAM: usize = 4_000;

/// Results as they come.
#[derive(Default)]
struct Report {
    failed: Vec<String>,
}

impl Report {
    fn check(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        self.measure(name, || work().map(|()| String::new()));
    }

    fn measure(&mut self, name: &str, work: impl FnOnce() -> Result<String>) {
        let started = Instant::now();
        let (result, detail) = match work() {
            Ok(figures) => ("ok", figures),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        // One line, whatever the error says.
        let detail = detail.lines().map(str::trim).collect::<Vec<_>>().join(" | ");
        println!("CHECK\t{name}\t{result}\t{:.1}\t{detail}", started.elapsed().as_secs_f32());
        if result == "FAILED" {
            self.failed.push(name.to_owned());
        }
    }
}

/// The network with everything in it running.
struct Host {
    lbctl: Lbctl,
    ingress: Ingress,
    _workers: Vec<Process>,
    _echo: Vec<EchoWorker>,
    bed: Bed,
}

impl Host {
    fn start(arguments: &[&str]) -> Result<Self> {
        let mtu = |name: &str, usual: u32| match std::env::var(name) {
            Ok(text) => text.parse().with_context(|| format!("{name} is not a number of bytes: {text:?}")),
            Err(_) => Ok(usual),
        };
        let layout = Layout {
            workers: WORKERS.len() as u8,
            client_mtu: mtu("LB_TEST_CLIENT_MTU", 1500)?,
            worker_mtu: mtu("LB_TEST_WORKER_MTU", 1600)?,
            // Only a veth's end needs a program to hear what its peer sends by XDP_TX.
            client_xdp: !nics::are_there(),
            client_link: match std::env::var("LB_TEST_LINK").as_deref() {
                Ok("vlan") => ClientLink::Vlan,
                Ok("bond") => ClientLink::Bond,
                _ => ClientLink::Plain,
            },
        };
        let bed = Bed::new(layout)?;
        let vips: [IpAddr; 2] = [vip_v4(1).into(), vip_v6(1).into()];
        let (mut workers, mut echo) = (Vec::new(), Vec::new());
        for worker in &bed.workers {
            workers.push(daemon::start_worker(&bed, worker, &vips, arguments)?);
            for (_, port, _) in MODES {
                mirror::serve(&worker.namespace, &worker.name, port)?;
            }
            let all = [vips[0], vips[1], worker.v4.into(), worker.v6.into()];
            for (_, port, _) in DATAGRAMS {
                echo.push(EchoWorker::start(&worker.namespace, &worker.name, &all, port)?);
            }
            // The way back is by the kernel's own routers, and IPv6's do not fragment: the workers must.
            let gateway = worker.v6.to_string().replace("::2", "::1");
            let route = ["-6", "route", "replace", "default", "via", &gateway, "dev", "eth0"];
            worker.namespace.ip(&[&route[..], &["mtu", &layout.client_mtu.to_string()]].concat())?;
        }
        let ingress = Ingress::start(&bed, &[&["--iface", "w1", "--iface", "w2"], arguments].concat())?;
        let lbctl = ingress.lbctl()?;
        let mut host = Self { lbctl, ingress, _workers: workers, _echo: echo, bed };
        host.wait_answers()?;
        Ok(host)
    }

    /// Waits until lbd has loaded its programs, which takes the longer the slower the kernel's verifier runs.
    fn wait_answers(&mut self) -> Result<()> {
        let mut has_ended = false;
        let waited = wait::until("lbd answers", Duration::from_secs(30), || {
            has_ended = self.ingress.has_ended();
            has_ended || self.lbctl.run(&["config", "export"]).is_ok()
        });
        let said = || self.ingress.process().output();
        ensure!(!has_ended, "lbd ended: {}", said());
        waited.with_context(said).map(drop)
    }

    fn configure(&self) -> Result<()> {
        let mut text = String::new();
        for (name, port, settings) in MODES.iter().chain(&DATAGRAMS) {
            for is_v6 in [false, true] {
                let vip: IpAddr = if is_v6 { vip_v6(1).into() } else { vip_v4(1).into() };
                let (suffix, protocol) =
                    (if is_v6 { "6" } else { "" }, if name.starts_with("udp") { "udp" } else { "tcp" });
                text += &format!(
                    "[[service]]\nname = \"{name}{suffix}\"\nvip = \"{vip}\"\nport = {port}\nprotocol = \"{protocol}\"\n\
                     {settings}\ntable_size = 251\n[service.health]\nkind = \"tcp\"\nport = {}\ninterval_ms = {}\ntimeout_ms = {}\n",
                    MODES[0].1,
                    wait::patience(Duration::from_millis(250)).as_millis(),
                    wait::patience(Duration::from_millis(1_000)).as_millis()
                );
                for worker in &self.bed.workers {
                    let address: IpAddr = if is_v6 { worker.v6.into() } else { worker.v4.into() };
                    text += &format!(
                        "[[service.backend]]\nname = \"{}\"\naddress = \"{address}\"\n",
                        worker.name
                    );
                }
            }
        }
        let path = self.bed.path("kernel.toml");
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        let applied = self.lbctl.run(&["config", "apply", &path.display().to_string()]);
        applied.with_context(|| self.ingress.process().output())?;
        self.wait_backends()
    }

    /// Waits until each service has both workers healthy and their next hops known.
    fn wait_backends(&self) -> Result<()> {
        let count = 2 * (MODES.len() + DATAGRAMS.len());
        let all = |worker: &&str| {
            self.lbctl.backends(worker).is_ok_and(|found| {
                found.len() == count && found.iter().all(|b| b.is_healthy && b.slots > 0 && b.is_resolved)
            })
        };
        wait::until("every backend is in service", Duration::from_secs(20), || WORKERS.iter().all(all))
            .with_context(|| self.lbctl.run(&["backend", "list"]).unwrap_or_default())
            .map(drop)
    }

    fn targets(port: u16) -> [SocketAddr; 2] {
        [SocketAddr::from((vip_v4(1), port)), SocketAddr::from((vip_v6(1), port))]
    }

    fn open(&self, target: SocketAddr) -> Result<Vec<Mirrored>> {
        (0..CONNECTIONS).map(|_| Mirrored::open(&self.bed.client, target)).collect()
    }

    /// Connections to both workers, with content both ways on each and bulk on one of each worker.
    fn carries(&self, target: SocketAddr) -> Result<()> {
        let result = self.try_carry(target);
        result.with_context(|| self.lbctl.run(&["stats"]).unwrap_or_default())
    }

    fn try_carry(&self, target: SocketAddr) -> Result<()> {
        let mut open = self.open(target)?;
        ensure!(names(&open).len() == WORKERS.len(), "only {:?} answered", names(&open));
        for connection in &mut open {
            connection.exchange(100)?;
        }
        for worker in WORKERS {
            let connection = open.iter_mut().find(|connection| connection.worker == worker);
            connection.context("each has some")?.exchange(BULK_BYTES)?;
        }
        Ok(())
    }

    /// Datagrams whole and in fragments, at the same worker.
    fn carries_datagrams(&self, target: SocketAddr, is_translated: bool) -> Result<()> {
        let mut flows = Flows::open(&self.bed.client, target, CONNECTIONS)?;
        let small = flows.exchange()?;
        let answered: BTreeSet<_> = small.iter().flatten().collect();
        ensure!(small.iter().all(Option::is_some), "datagrams were lost: {small:?}");
        ensure!(answered.len() == WORKERS.len(), "only {answered:?} answered");
        if is_translated {
            // Answers take links that are wider than the way on: workers learn that by ICMP, for which the first are
            // lost. Answers of later datagrams come after that.
            flows.send_sized(DATAGRAM)?;
            flows.exchange()?;
        }
        let big = flows.exchange_sized(DATAGRAM)?;
        ensure!(
            big == small,
            "datagrams of {DATAGRAM} bytes: {big:?} instead of {small:?}\n{}",
            self.lbctl.run(&["stats"])?
        );
        Ok(())
    }

    fn answers_pings(&self) -> Result<()> {
        for vip in [vip_v4(1).to_string(), vip_v6(1).to_string()] {
            let patience = wait::patience(Duration::from_secs(2)).as_secs().to_string();
            let arguments = ["-n", "-c", "5", "-i", "0.2", "-W", &patience, "-s", "1400", &vip];
            let said = self.bed.client.run("ping", &arguments).with_context(|| format!("ping {vip}"))?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
        }
        Ok(())
    }
}

fn names(open: &[Mirrored]) -> BTreeSet<&str> {
    open.iter().map(|connection| connection.worker.as_str()).collect()
}

/// Every connection that was open still reaches the worker that took it: another's kernel would reset it.
fn ensure_all_stay(open: &mut [Mirrored], when: &str) -> Result<()> {
    open.iter_mut().try_for_each(|connection| connection.exchange(100)).with_context(|| when.to_owned())
}

/// Connections to the services whose flows are kept in different ways.
fn hold(host: &Host) -> Result<Vec<Mirrored>> {
    let mut open = Vec::new();
    for (_, port, _) in MODES {
        for target in Host::targets(port) {
            for _ in 0..4 {
                open.push(Mirrored::open(&host.bed.client, target)?);
            }
        }
    }
    Ok(open)
}

fn drain(host: &Host, open: &mut [Mirrored]) -> Result<()> {
    for suffix in ["", "6"] {
        host.lbctl.run(&["backend", "drain", &format!("gue{suffix}"), "w1"])?;
    }
    for target in Host::targets(MODES[1].1) {
        let new = host.open(target)?;
        ensure!(names(&new) == BTreeSet::from(["w2"]), "new connections went to {:?}", names(&new));
    }
    ensure_all_stay(open, "w1 drains")?;
    for suffix in ["", "6"] {
        host.lbctl.run(&["backend", "undrain", &format!("gue{suffix}"), "w1"])?;
    }
    ensure_all_stay(open, "w1 is back")?;
    host.wait_backends()
}

/// The daemon goes by `signal`; the kernel goes on alone; the daemon comes back.
fn restart(host: &mut Host, open: &mut [Mirrored], signal: Signal) -> Result<()> {
    host.ingress.stop(signal)?;
    ensure_all_stay(open, "lbd is away")?;
    host.carries(Host::targets(MODES[0].1)[0]).context("new connections while lbd is away")?;
    host.ingress.start_again(&host.bed)?;
    host.wait_answers()?;
    host.wait_backends()?;
    ensure_all_stay(open, "lbd is back")?;
    host.carries(Host::targets(MODES[1].1)[1]).context("new connections after lbd is back")
}

/// Another version takes over. The way back is the suite `fault`'s: a start takes an emulated kernel a minute.
fn upgrade(host: &mut Host, open: &mut [Mirrored]) -> Result<()> {
    host.ingress.stop(Signal::SIGTERM)?;
    host.ingress.start_again_as(&binary("lbd-other-abi")?, &host.bed)?;
    host.wait_answers()?;
    host.wait_backends()?;
    ensure_all_stay(open, "the other version runs")?;
    host.carries(Host::targets(MODES[4].1)[0]).context("new connections under the other version")?;
    let said = host.ingress.process().output();
    ensure!(said.contains("taken over from another ABI"), "nothing was taken over: {said}");
    Ok(())
}

/// What the verifier walked for each program that was loaded since `before`; half of what the kernel allows is kept
/// free. Kernels before 5.16 do not count.
fn programs(before: u32) -> Result<String> {
    let mut figures = BTreeMap::new();
    for info in loaded_programs() {
        let info = info.context("the kernel lists its programs")?;
        let name = info.name_as_str().unwrap_or_default().to_owned();
        if info.id() <= before || name == "lb_test" {
            continue;
        }
        let count = info.verified_instruction_count().unwrap_or_default();
        let most = figures.entry(name).or_insert(0);
        *most = count.max(*most);
    }
    ensure!(figures.contains_key("ingress"), "lbd runs without its program: {figures:?}");
    let over: Vec<_> = figures.iter().filter(|(_, count)| **count > INSTRUCTIONS).collect();
    ensure!(over.is_empty(), "over {INSTRUCTIONS} instructions for the verifier: {over:?} of {figures:?}");
    let figures: Vec<String> = figures.iter().map(|(name, count)| format!("{name} {count}")).collect();
    Ok(figures.join(", "))
}

/// Everything, as far as the kernel lets it start.
fn tour(report: &mut Report) {
    let generic = std::env::var_os("LB_TEST_GENERIC").is_some();
    let before = loaded_programs().filter_map(|info| Some(info.ok()?.id())).max().unwrap_or_default();
    let mut host = None;
    report.check("start", || {
        host = Some(Host::start(if generic { &["--allow-generic"] } else { &[] })?);
        Ok(())
    });
    let Some(mut host) = host else { return };
    // Large tables would only take an emulator long to fill.
    report.check("services", || host.configure());
    report.measure("programs", || programs(before));
    for (name, port, _) in MODES {
        for (target, family) in Host::targets(port).into_iter().zip(["v4", "v6"]) {
            report.check(&format!("{name} {family}"), || host.carries(target));
        }
    }
    for (name, port, _) in DATAGRAMS {
        for (target, family) in Host::targets(port).into_iter().zip(["v4", "v6"]) {
            let is_translated = name.ends_with("nat");
            report.check(&format!("{name} {family}"), || host.carries_datagrams(target, is_translated));
        }
    }
    report.check("ping", || host.answers_pings());
    let mut open = Vec::new();
    report.check("hold", || {
        open = hold(&host)?;
        ensure_all_stay(&mut open, "all are new")
    });
    report.check("drain", || drain(&host, &mut open));
    report.check("kill -9", || restart(&mut host, &mut open, Signal::SIGKILL));
    if binary("lbd-other-abi").is_ok() {
        report.check("upgrade", || upgrade(&mut host, &mut open));
    } else {
        report.check("restart", || restart(&mut host, &mut open, Signal::SIGTERM));
    }
}

#[test]
fn everything_once() {
    let mut report = Report::default();
    tour(&mut report);
    assert!(report.failed.is_empty(), "failed: {}", report.failed.join(", "));
}
