//! The whole system, running: a bed, workers that serve HTTP, lines and UDP,
//! `lbd worker` on each of them, and `lbd ingress` configured through `lbctl`.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    bed::{Bed, Layout, vip_v4, vip_v6},
    daemon::{self, BackendStatus, Ingress, Lbctl},
    hold::LineWorker,
    nginx,
    process::Process,
    program,
    udp::EchoWorker,
    wait,
};

/// Port of the line service.
pub const LINES: u16 = 9000;
/// Port of the UDP echo service.
pub const ECHO: u16 = 9001;

/// A service of the stage, for each family once.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Its name; the IPv6 twin has a 6 behind it.
    pub name: &'static str,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Its port on the first VIP.
    pub port: u16,
}

/// HTTP.
pub const WEB: Offer = Offer { name: "web", protocol: "tcp", port: nginx::PORT };
/// Lines that are answered with the worker's name.
pub const LINE: Offer = Offer { name: "lines", protocol: "tcp", port: LINES };
/// UDP echo.
pub const UDP: Offer = Offer { name: "echo", protocol: "udp", port: ECHO };

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The network.
    pub layout: Layout,
    /// `ipip`, `gue`, `l2` or `nat`.
    pub mode: &'static str,
    /// Which services, each on the first VIP of both families.
    pub offers: Vec<Offer>,
    /// IPv4 services reach their backends over IPv6.
    pub v4_over_v6: bool,
    /// More lines for every `[[service]]` of the configuration.
    pub settings: &'static str,
    /// How many of the workers are backends from the start; None: all.
    pub backends: Option<usize>,
    /// More arguments for `lbd ingress`.
    pub arguments: &'static [&'static str],
    /// More arguments for `lbd worker`.
    pub worker_arguments: &'static [&'static str],
    /// Size of the file system that holds lbd's state; None: plenty.
    pub state_bytes: Option<u64>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            layout: Layout::default(),
            mode: "ipip",
            offers: vec![WEB, LINE, UDP],
            v4_over_v6: false,
            settings: "",
            backends: None,
            arguments: &[],
            worker_arguments: &[],
            state_bytes: None,
        }
    }
}

/// A worker host's programs. Killing `http` is how a worker dies.
#[derive(Debug)]
pub struct Host {
    /// nginx; None while it is dead.
    pub http: Option<Process>,
    /// `lbd worker`; none in mode `nat`, whose workers run nothing of ours.
    pub agent: Option<Process>,
    /// Then only this stands on the worker's link, without which a virtual interface takes no redirected frames.
    _pass: Option<OwnedFd>,
    _lines: LineWorker,
    _echo: EchoWorker,
}

/// Everything, running. Dropped, it is gone.
#[derive(Debug)]
pub struct Stage {
    /// By worker.
    pub hosts: Vec<Host>,
    /// The balancer.
    pub ingress: Ingress,
    /// Its command line.
    pub lbctl: Lbctl,
    /// The network.
    pub bed: Bed,
    /// What was asked for.
    pub plan: Plan,
}

impl Stage {
    /// Builds and starts it all, and returns when every backend is healthy.
    pub fn start(plan: Plan) -> Result<Self> {
        let bed = Bed::new(plan.layout)?;
        let hosts =
            (0..bed.workers.len()).map(|index| start_host(&bed, index, &plan)).collect::<Result<_>>()?;
        if let Some(bytes) = plan.state_bytes {
            bed.limit_directory("state", bytes)?;
        }
        let mut arguments = plan.arguments.to_vec();
        if plan.mode == "nat" {
            // Answers come in there.
            arguments.extend(bed.workers.iter().flat_map(|worker| ["--iface", worker.name.as_str()]));
        }
        let ingress = Ingress::start(&bed, &arguments)?;
        let lbctl = ingress.lbctl()?;
        let stage = Self { hosts, ingress, lbctl, bed, plan };
        let backends: Vec<usize> = (0..stage.plan.backends.unwrap_or(stage.hosts.len())).collect();
        stage.apply(&stage.configuration(&backends))?;
        stage.wait_healthy(&backends)?;
        Ok(stage)
    }

    /// Adds a worker host to the network, not yet to any service.
    pub fn add_host(&mut self) -> Result<usize> {
        let index = self.bed.add_worker()?;
        self.hosts.push(start_host(&self.bed, index, &self.plan)?);
        Ok(index)
    }

    /// Starts nginx on worker `index` again.
    pub fn revive(&mut self, index: usize) -> Result<()> {
        let worker = &self.bed.workers[index];
        self.hosts[index].http = Some(nginx::start(&worker.namespace, &worker.name, self.bed.directory())?);
        Ok(())
    }

    /// The VIP of both families at `port`.
    pub fn targets(&self, port: u16) -> Vec<SocketAddr> {
        vec![SocketAddr::from((vip_v4(1), port)), SocketAddr::from((vip_v6(1), port))]
    }

    /// Names of all services with whether they are IPv6.
    pub fn services(&self) -> Vec<(String, bool)> {
        let both = |offer: &Offer| [(offer.name.to_owned(), false), (format!("{}6", offer.name), true)];
        self.plan.offers.iter().flat_map(both).collect()
    }

    /// The address at which worker `index` is a backend of an IPv4 or IPv6 service.
    pub fn backend_address(&self, index: usize, is_v6: bool) -> IpAddr {
        let worker = &self.bed.workers[index];
        if is_v6 || self.plan.v4_over_v6 { worker.v6.into() } else { worker.v4.into() }
    }

    /// Runs `lbctl backend VERB SERVICE wN …` for every service; for `add` with
    /// the worker's address.
    pub fn change_backend(&self, verb: &str, index: usize) -> Result<()> {
        self.services().iter().try_for_each(|(service, _)| self.change_backend_of(service, verb, index))
    }

    /// [`Self::change_backend`] for one service.
    pub fn change_backend_of(&self, service: &str, verb: &str, index: usize) -> Result<()> {
        let worker = &self.bed.workers[index].name;
        let address = self.backend_address(index, service.ends_with('6')).to_string();
        let mut arguments = vec!["backend", verb, service, worker];
        if verb == "add" {
            arguments.push(&address);
        }
        self.lbctl.run(&arguments).map(drop)
    }

    /// The configuration with the workers of `backends` behind every service.
    pub fn configuration(&self, backends: &[usize]) -> String {
        let mut text = String::new();
        for offer in &self.plan.offers {
            for is_v6 in [false, true] {
                self.write_service(&mut text, offer, is_v6, backends)
                    .expect("writing to a string cannot fail");
            }
        }
        text
    }

    fn write_service(
        &self,
        text: &mut String,
        offer: &Offer,
        is_v6: bool,
        backends: &[usize],
    ) -> std::fmt::Result {
        let vip: IpAddr = if is_v6 { vip_v6(1).into() } else { vip_v4(1).into() };
        let suffix = if is_v6 { "6" } else { "" };
        let Offer { name, protocol, port } = offer;
        writeln!(text, "[[service]]\nname = \"{name}{suffix}\"\nvip = \"{vip}\"\nport = {port}")?;
        writeln!(text, "protocol = \"{protocol}\"\nmode = \"{}\"\n{}", self.plan.mode, self.plan.settings)?;
        writeln!(text, "[service.health]\nkind = \"http\"\npath = \"/\"\nport = {}", nginx::PORT)?;
        writeln!(text, "interval_ms = 200\ntimeout_ms = 1000\nrise = 2\nfall = 2")?;
        for &index in backends {
            let address = self.backend_address(index, is_v6);
            let name = &self.bed.workers[index].name;
            writeln!(text, "[[service.backend]]\nname = \"{name}\"\naddress = \"{address}\"")?;
        }
        Ok(())
    }

    /// Applies a configuration file with `text`.
    pub fn apply(&self, text: &str) -> Result<()> {
        let path = self.bed.path("services.toml");
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        let applied = self.lbctl.run(&["config", "apply", &path.display().to_string()]);
        applied.with_context(|| format!("lbd said:\n{}", self.ingress.process().output())).map(drop)
    }

    /// Waits until the workers of `backends` are healthy in every service.
    pub fn wait_healthy(&self, backends: &[usize]) -> Result<Duration> {
        let start = Instant::now();
        for &index in backends {
            self.wait_health(index, true)?;
        }
        Ok(start.elapsed())
    }

    /// Waits until every service finds worker `index` healthy, knows its next hop and gives it new
    /// flows, or neither.
    pub fn wait_health(&self, index: usize, healthy: bool) -> Result<Duration> {
        self.wait_backend(index, healthy, |backend| {
            (backend.slots > 0) == healthy && (backend.is_resolved || !healthy)
        })
    }

    /// Waits for the probes' verdict alone, whatever is made of it.
    pub fn wait_verdict(&self, index: usize, healthy: bool) -> Result<Duration> {
        self.wait_backend(index, healthy, |_| true)
    }

    fn wait_backend(
        &self,
        index: usize,
        healthy: bool,
        and: impl Fn(&BackendStatus) -> bool,
    ) -> Result<Duration> {
        let worker = &self.bed.workers[index].name;
        let what = format!("{worker} is {}", if healthy { "healthy" } else { "found dead" });
        let count = self.services().len();
        wait::until(&what, Duration::from_secs(15), || {
            self.lbctl.backends(worker).is_ok_and(|found| {
                found.len() == count
                    && found.iter().all(|backend| backend.is_healthy == healthy && and(backend))
            })
        })
        .with_context(|| format!("lbd said:\n{}", self.ingress.process().output()))
    }
}

fn start_host(bed: &Bed, index: usize, plan: &Plan) -> Result<Host> {
    let worker = &bed.workers[index];
    let vips: [IpAddr; 2] = [vip_v4(1).into(), vip_v6(1).into()];
    let is_plain = plan.mode == "nat";
    let own: [IpAddr; 2] = [worker.v4.into(), worker.v6.into()];
    let served = if is_plain { &own } else { &vips };
    Ok(Host {
        http: Some(nginx::start(&worker.namespace, &worker.name, bed.directory())?),
        agent: if is_plain {
            None
        } else {
            Some(daemon::start_worker(bed, worker, &vips, plan.worker_arguments)?)
        },
        _pass: if is_plain { Some(program::attach_pass(&worker.namespace, "eth0")?) } else { None },
        _lines: LineWorker::start(&worker.namespace, &worker.name, LINES)?,
        _echo: EchoWorker::start(&worker.namespace, &worker.name, served, ECHO)?,
    })
}
