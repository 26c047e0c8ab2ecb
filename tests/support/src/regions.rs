//! Regions: in each a router, ingress hosts that announce VIPs by BGP, and workers; between them and the client a
//! core router. A three-member etcd, one member in each region and one beside the core.
//!
//! ```text
//!            client                   m2
//!               └──────── core ───────┘          core: ECMP over what the regions announce
//!                 east │       │ west
//!        e1 e2 ── router       router ── w1 w2   ingress hosts: lbd, BIRD, VIPs on lo
//!        ea eb ──┘  └─ m0   m1 ─┘   └── wa wb    workers: an HTTP worker that reports its state, lines
//! ```
//!
//! Replies go from worker to client by the routers. What is cut is cut silently: both ends believe that the cable
//! is good. Dropped, everything is gone.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    bed::{self, Bed, INGRESS_V4, Layout, Worker, vip_v4, vip_v6},
    bird::{self, Bird, Neighbour},
    daemon::{self, Ingress, Lbctl},
    etcd::{Cluster, Place},
    hold::LineWorker,
    netns::{self, Namespace},
    process::Process,
    program, replica,
    stage::LINES,
    wait,
};

/// Room for the encapsulation everywhere but at the client.
const MTU: u32 = 1_700;
const CORE_AS: u32 = 64_512;
const START: Duration = Duration::from_secs(30);
/// Names of the regions.
pub const NAMES: [&str; 3] = ["east", "west", "north"];

/// What to build.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many regions: 1 to 3.
    pub regions: usize,
    /// Whether hosts share an etcd; otherwise each has a file, and is configured by itself.
    pub etcd: bool,
    /// The ignored test of the running test program that calls [`replica::serve`].
    pub replica: String,
    /// What the workers are told at first.
    pub words: String,
    /// Services.
    pub services: Vec<Offer>,
    /// More arguments for `lbd ingress`.
    pub arguments: Vec<String>,
}

/// A service.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Its `[[service]]` table, without backends.
    pub text: String,
    /// The only region whose workers are its backends; None: all.
    pub only: Option<&'static str>,
}

/// One region.
#[derive(Debug)]
pub struct Region {
    /// One of [`NAMES`].
    pub name: &'static str,
    number: u8,
    /// Its router.
    pub router: Namespace,
    /// The router's BGP.
    pub bird: Bird,
    /// Ingress hosts.
    pub hosts: Vec<Host>,
    /// Workers.
    pub workers: Vec<WorkerHost>,
    /// What stands on the router's and the core's ends of the link between them.
    ends: [OwnedFd; 2],
}

/// An ingress host.
#[derive(Debug)]
pub struct Host {
    /// `e1`, `w2`, …: also the router's interface towards it.
    pub name: String,
    /// Its network; `eth0` is its only link.
    pub namespace: Namespace,
    /// Its address.
    pub v4: Ipv4Addr,
    /// The balancer.
    pub lbd: Ingress,
    /// Its command line.
    pub lbctl: Lbctl,
    /// Its BGP; None while it is stopped.
    pub bird: Option<Bird>,
    speaker: bird::Host,
    /// What stands on the router's end.
    end: OwnedFd,
}

/// A worker.
#[derive(Debug)]
pub struct WorkerHost {
    /// `ea`, `wb`, …: also the router's interface towards it.
    pub worker: Worker,
    /// The HTTP worker; None while it is dead.
    pub http: Option<Process>,
    _agent: Process,
    _lines: LineWorker,
    _end: OwnedFd,
}

/// All of it.
#[derive(Debug)]
pub struct Regions {
    /// By name.
    pub regions: Vec<Region>,
    /// The core's BGP.
    pub bird: Bird,
    /// etcd, if hosts share one.
    pub cluster: Option<Cluster>,
    members: Vec<Namespace>,
    plan: Plan,
    /// Client (`client`) and core router (`ingress`).
    pub bed: Bed,
}

fn address(region: u8, link: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, region, link, host)
}

fn address_v6(region: u8, link: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, region.into(), link.into(), 0, 0, 0, 0, host)
}

fn region_as(region: u8) -> u32 {
    65_000 + u32::from(region)
}

/// Joins a namespace (`.2`, `eth0`) to a router (`.1`, `link`) and gives it its default routes.
fn join(router: &Namespace, link: &str, leaf: &Namespace, region: u8, number: u8) -> Result<()> {
    netns::connect((leaf, "eth0"), (router, link), MTU)?;
    for (namespace, interface, host) in [(leaf, "eth0", 2), (router, link, 1)] {
        namespace.add_address(interface, address(region, number, host).into(), 24)?;
        namespace.add_address(interface, address_v6(region, number, host.into()).into(), 64)?;
    }
    leaf.add_default_route(address(region, number, 1).into())?;
    leaf.add_default_route(address_v6(region, number, 1).into())
}

/// The VIP of both families for the `number`th service.
pub fn vips() -> [IpAddr; 4] {
    [vip_v4(1).into(), vip_v4(2).into(), vip_v6(1).into(), vip_v6(2).into()]
}

impl Regions {
    /// Builds and starts it all; returns when routes to the VIPs are there and every backend is healthy.
    pub fn start(plan: Plan) -> Result<Self> {
        let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
        let core = &bed.ingress;
        core.sysctl("ipv4/fib_multipath_hash_policy", "1")?;
        let mut networks = Vec::new();
        for number in 1..=plan.regions as u8 {
            networks.push(network(&bed, number)?);
        }
        let (members, cluster) = match plan.etcd {
            true => etcd(&bed, &networks)?,
            false => (Vec::new(), None),
        };
        let neighbours: Vec<Neighbour> = (1..=plan.regions as u8)
            .map(|number| Neighbour {
                name: NAMES[usize::from(number) - 1].to_owned(),
                address: address(0, number, 2).into(),
                number: region_as(number),
                is_told: false,
            })
            .collect();
        let bird = Bird::start_router(&bed, core, "core", INGRESS_V4, CORE_AS, &neighbours, &NAMES)?;
        let store = cluster.as_ref().map(|cluster: &Cluster| cluster.url("lb"));
        let mut regions = Vec::new();
        for (index, (router, ends)) in networks.into_iter().enumerate() {
            regions.push(region(&bed, index, router, ends, &plan, store.as_deref())?);
        }
        let all = Self { regions, bird, cluster, members, plan, bed };
        all.configure()?;
        all.wait_usable()?;
        Ok(all)
    }

    /// All ingress hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.regions.iter().flat_map(|region| &region.hosts)
    }

    /// All workers.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerHost> {
        self.regions.iter().flat_map(|region| &region.workers)
    }

    /// Hosts that are told of changes: one of all that share a store, or each.
    fn told(&self) -> Vec<&Host> {
        let count = if self.plan.etcd { 1 } else { usize::MAX };
        self.hosts().take(count).collect()
    }

    fn configure(&self) -> Result<()> {
        let mut text = String::new();
        for service in &self.plan.services {
            text += &service.text;
            for region in self.regions.iter().filter(|r| service.only.is_none_or(|only| only == r.name)) {
                for WorkerHost { worker, .. } in &region.workers {
                    let is_v6 = service.text.contains("fd00:");
                    let address: IpAddr = if is_v6 { worker.v6.into() } else { worker.v4.into() };
                    let place = format!("name = \"{}\"\nregion = \"{}\"", worker.name, region.name);
                    text += &format!("[[service.backend]]\n{place}\naddress = \"{address}\"\n");
                }
            }
        }
        let path = self.path("services.toml");
        fs::write(&path, text)?;
        for host in self.told() {
            host.lbctl.run(&["config", "apply", &path.display().to_string()])?;
        }
        Ok(())
    }

    /// Waits until every host finds every worker healthy, and all announce the first VIP.
    pub fn wait_usable(&self) -> Result<Duration> {
        let began = Instant::now();
        for host in self.hosts() {
            let workers = |service: &Offer| match service.only {
                Some(_) => self.regions[0].workers.len(),
                None => self.workers().count(),
            };
            let count = self.plan.services.iter().map(workers).sum::<usize>();
            wait::until(&format!("{} finds all workers healthy", host.name), START, || {
                let list = host.lbctl.json(&["backend", "list"]).unwrap_or_default();
                let healthy = list
                    .as_array()
                    .map_or(0, |all| all.iter().filter(|b| b["status"]["health"] == "healthy").count());
                healthy == count
            })
            .with_context(|| format!("lbd said:\n{}", host.lbd.process().output()))?;
        }
        for region in &self.regions {
            let all = region.hosts.len();
            wait::until(&format!("{}'s router has a way over each host", region.name), START, || {
                region.ways(vip_v4(1)).is_ok_and(|ways| ways == all)
            })
            .with_context(|| self.told_by_birds())?;
        }
        let all = self.regions.len();
        wait::until("the core has a way into each region", START, || {
            self.ways(vip_v4(1)).is_ok_and(|ways| ways.len() == all)
        })
        .with_context(|| self.told_by_birds())?;
        Ok(began.elapsed())
    }

    fn told_by_birds(&self) -> String {
        let birds = self.regions.iter().map(|region| &region.bird).chain([&self.bird]);
        birds.map(|bird| bird.ask(&["show", "protocols", "all"]).unwrap_or_default()).collect()
    }

    /// Regions that the core sends clients of a VIP to.
    pub fn ways(&self, vip: Ipv4Addr) -> Result<Vec<&'static str>> {
        let gateways = gateways(&self.bed.ingress, vip)?;
        let to = |region: &&Region| gateways.contains(&address(0, region.number, 2).to_string());
        Ok(self.regions.iter().filter(to).map(|region| region.name).collect())
    }

    /// A path of this bed's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.bed.path(name)
    }

    /// Where clients ask for the first service.
    pub fn target(&self) -> SocketAddr {
        SocketAddr::from((vip_v4(1), replica::PORT))
    }

    /// The line service.
    pub fn lines(&self) -> SocketAddr {
        SocketAddr::from((vip_v4(1), LINES))
    }

    /// The network of an etcd member.
    pub fn member(&self, number: usize) -> &Namespace {
        &self.members[number]
    }

    /// Starts a killed etcd member again.
    pub fn restart_member(&mut self, number: usize) -> Result<()> {
        let cluster = self.cluster.as_mut().context("there is a cluster")?;
        cluster.members[number].start_again(Some(&self.members[number]))
    }

    /// Sends all clients of a VIP into one region, whoever else announces it.
    pub fn enter_by(&self, index: usize, vip: Ipv4Addr) -> Result<()> {
        let gateway = address(0, self.regions[index].number, 2).to_string();
        // BIRD's routes have metric 32.
        let route = ["route", "add", &format!("{vip}/32"), "via", &gateway, "metric", "1"];
        self.bed.ingress.ip(&route).map(drop)
    }

    /// Cuts a region off from the core, or ends that.
    pub fn cut_region(&mut self, index: usize, is_cut: bool) -> Result<()> {
        let attach = if is_cut { program::attach_drop } else { program::attach_pass };
        let region = &mut self.regions[index];
        let core = &self.bed.ingress;
        replace(&mut region.ends[0], || attach(&region.router, "core"))?;
        replace(&mut region.ends[1], || attach(core, region.name))
    }
}

/// One program stands on an interface at a time; between two, nothing does.
fn replace(end: &mut OwnedFd, attach: impl FnOnce() -> Result<OwnedFd>) -> Result<()> {
    // Any descriptor takes the place meanwhile.
    *end = fs::File::open("/dev/null")?.into();
    *end = attach()?;
    Ok(())
}

impl Region {
    /// How many ways its router has to a VIP.
    pub fn ways(&self, vip: Ipv4Addr) -> Result<usize> {
        Ok(gateways(&self.router, vip)?.len())
    }

    /// Silences a host as a power cut would, or ends that.
    pub fn cut_host(&mut self, index: usize, is_cut: bool) -> Result<()> {
        let attach = if is_cut { program::attach_drop } else { program::attach_pass };
        let (router, host) = (&self.router, &mut self.hosts[index]);
        replace(&mut host.end, || attach(router, &host.name))
    }
}

impl Host {
    /// Stops its BGP, or starts it again.
    pub fn speak(&mut self, bed: &Bed, speaks: bool) -> Result<()> {
        self.bird = None;
        if speaks {
            self.bird = Some(Bird::start_host(bed, &self.namespace, &self.name, &self.speaker)?);
        }
        Ok(())
    }

    /// VIPs on its loopback interface.
    pub fn vips(&self) -> Result<Vec<IpAddr>> {
        let shown: Value =
            serde_json::from_str(&self.namespace.ip(&["-json", "address", "show", "dev", "lo"])?)?;
        let all = shown[0]["addr_info"].as_array().context("a list of addresses")?;
        let texts = all.iter().filter_map(|a| a["local"].as_str()?.parse().ok());
        Ok(texts.filter(|ip: &IpAddr| vips().contains(ip)).collect())
    }

    /// Ends its lbd; what it has put on stays.
    pub fn stop_lbd(&mut self, signal: Signal) -> Result<()> {
        self.lbd.stop(signal)
    }

    /// Starts lbd again.
    pub fn start_lbd(&mut self) -> Result<()> {
        self.lbd.start_again_on(&self.namespace)
    }
}

impl WorkerHost {
    /// Starts its HTTP worker again.
    pub fn revive(&mut self, bed: &Bed, test: &str, words: &str) -> Result<()> {
        self.http = Some(replica::start(bed, &self.worker, test)?);
        replica::say(&self.worker, words)
    }
}

/// Gateways of the route to an address.
fn gateways(router: &Namespace, vip: Ipv4Addr) -> Result<Vec<String>> {
    let routes: Value = serde_json::from_str(&router.ip(&["-json", "route", "show", &vip.to_string()])?)?;
    let gateway = |route: &Value| route["gateway"].as_str().map(str::to_owned);
    let mut found = Vec::new();
    for route in routes.as_array().into_iter().flatten() {
        found.extend(gateway(route));
        found.extend(route["nexthops"].as_array().into_iter().flatten().filter_map(gateway));
    }
    Ok(found)
}

/// A region's router, joined to the core.
fn network(bed: &Bed, number: u8) -> Result<(Namespace, [OwnedFd; 2])> {
    let name = NAMES[usize::from(number) - 1];
    let core = &bed.ingress;
    let router = bed.namespace(name)?;
    bed::make_router(&router)?;
    router.sysctl("ipv4/fib_multipath_hash_policy", "1")?;
    netns::connect((&router, "core"), (core, name), MTU)?;
    router.add_address("core", address(0, number, 2).into(), 24)?;
    core.add_address(name, address(0, number, 1).into(), 24)?;
    router.add_default_route(address(0, number, 1).into())?;
    let prefix = format!("{}/16", address(number, 0, 0));
    core.ip(&["route", "add", &prefix, "via", &address(0, number, 2).to_string()])?;
    let ends = [program::attach_pass(&router, "core")?, program::attach_pass(core, name)?];
    Ok((router, ends))
}

/// One member in each region, one beside the core.
fn etcd(bed: &Bed, networks: &[(Namespace, [OwnedFd; 2])]) -> Result<(Vec<Namespace>, Option<Cluster>)> {
    ensure!(networks.len() >= 2, "etcd's members stand in two regions and beside the core");
    let mut members = Vec::new();
    for (number, router) in [(1, &networks[0].0), (2, &networks[1].0), (0, &bed.ingress)] {
        let member = bed.namespace(&format!("m{}", members.len()))?;
        join(router, "etcd", &member, number, 20)?;
        members.push(member);
    }
    let places: Vec<Place<'_>> = members
        .iter()
        .zip([1, 2, 0])
        .map(|(namespace, number)| Place {
            namespace: Some(namespace),
            address: address(number, 20, 2).into(),
            client: 2379,
            peer: 2380,
        })
        .collect();
    let cluster = Cluster::start(&places, bed.directory(), "http", &[])?;
    drop(places);
    Ok((members, Some(cluster)))
}

fn region(
    bed: &Bed,
    index: usize,
    router: Namespace,
    ends: [OwnedFd; 2],
    plan: &Plan,
    store: Option<&str>,
) -> Result<Region> {
    let (number, name) = (index as u8 + 1, NAMES[index]);
    let initial = &name[..1];
    let mut neighbours = vec![Neighbour {
        name: "core".to_owned(),
        address: address(0, number, 1).into(),
        number: CORE_AS,
        is_told: true,
    }];
    for host in 1..=2 {
        for address in [IpAddr::from(address(number, host, 2)), address_v6(number, host, 2).into()] {
            let family = if address.is_ipv4() { "v4" } else { "v6" };
            let name = format!("{initial}{host}_{family}");
            neighbours.push(Neighbour { name, address, number: host_as(number, host), is_told: false });
        }
    }
    let bird = Bird::start_router(
        bed,
        &router,
        name,
        address(0, number, 2),
        region_as(number),
        &neighbours,
        &["core"],
    )?;
    let mut workers = Vec::new();
    for (place, letter) in ["a", "b"].iter().enumerate() {
        workers.push(worker(bed, &router, number, 11 + place as u8, &format!("{initial}{letter}"), plan)?);
    }
    let mut hosts = Vec::new();
    for host in 1..=2 {
        hosts.push(start_host(bed, &router, name, (number, host), plan, store)?);
    }
    Ok(Region { name, number, router, bird, hosts, workers, ends })
}

fn host_as(region: u8, host: u8) -> u32 {
    65_000 + 100 * u32::from(region) + u32::from(host)
}

fn start_host(
    bed: &Bed,
    router: &Namespace,
    region: &str,
    (number, host): (u8, u8),
    plan: &Plan,
    store: Option<&str>,
) -> Result<Host> {
    let name = format!("{}{host}", &region[..1]);
    let namespace = bed.namespace(&name)?;
    join(router, &name, &namespace, number, host)?;
    let end = program::attach_pass(router, &name)?;
    let mut arguments: Vec<&str> = vec!["--announce", "lo", "--host", &name, "--region", region];
    arguments.extend(store.iter().flat_map(|url| ["--store", *url]));
    arguments.extend(plan.arguments.iter().map(String::as_str));
    let lbd = Ingress::start_on(bed, &namespace, &format!("-{name}"), &arguments)?;
    let speaker = bird::Host {
        own: address(number, host, 2),
        number: host_as(number, host),
        router: address(number, host, 1),
        router_v6: address_v6(number, host, 1),
        router_number: region_as(number),
    };
    let bird = Some(Bird::start_host(bed, &namespace, &name, &speaker)?);
    let (v4, lbctl) = (address(number, host, 2), lbd.lbctl()?);
    Ok(Host { name, namespace, v4, lbctl, lbd, bird, speaker, end })
}

fn worker(
    bed: &Bed,
    router: &Namespace,
    region: u8,
    link: u8,
    name: &str,
    plan: &Plan,
) -> Result<WorkerHost> {
    let namespace = bed.namespace(name)?;
    join(router, name, &namespace, region, link)?;
    namespace.disable_tx_offload("eth0")?;
    let end = program::attach_pass(router, name)?;
    let (v4, v6) = (address(region, link, 2), address_v6(region, link, 2));
    let worker = Worker { name: name.to_owned(), namespace, v4, v6 };
    let http = Some(replica::start(bed, &worker, &plan.replica)?);
    replica::say(&worker, &plan.words)?;
    let agent = daemon::start_worker(bed, &worker, &vips(), &[])?;
    let lines = LineWorker::start(&worker.namespace, name, LINES)?;
    Ok(WorkerHost { worker, http, _agent: agent, _lines: lines, _end: end })
}
