//! The balancers side by side: each in a network of its own, with the same client, the same workers
//! and the same VIPs, so that idle ones cost nothing and none inherits another's state.

use std::{fs, net::Ipv4Addr, os::fd::OwnedFd, path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use aya::programs::loaded_programs;
use test_support::{
    bed::{Bed, Layout, Worker, vip_v4},
    daemon, iperf,
    netns::Namespace,
    nginx,
    process::Process,
    program, wait,
};

use crate::processor::process_time;

/// Who balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Nobody: the ingress host's kernel routes over both workers (ECMP by 5-tuple).
    Direct,
    /// The same with an XDP program that passes everything on the interfaces where ours would be:
    /// over veth, unlike on a network card, running XDP at all makes packets dearer.
    DirectXdp,
    /// HAProxy, mode tcp.
    Haproxy,
    /// nginx, stream module.
    Nginx,
    /// nftables, DNAT by a hash of the client.
    Nftables,
    /// Ours, ipip.
    Ipip,
    /// Ours, gue.
    Gue,
    /// Ours, l2.
    L2,
    /// Ours, nat: workers run nothing of ours, and answers come back through the ingress host.
    Nat,
}

impl Kind {
    /// All, the yardstick first.
    pub const ALL: [Self; 9] = [
        Self::Direct,
        Self::DirectXdp,
        Self::Haproxy,
        Self::Nginx,
        Self::Nftables,
        Self::Ipip,
        Self::Gue,
        Self::L2,
        Self::Nat,
    ];

    /// As in a row's name.
    pub fn label(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectXdp => "direct-xdp",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Nftables => "nftables",
            Self::Ipip => "ours-ipip",
            Self::Gue => "ours-gue",
            Self::L2 => "ours-l2",
            Self::Nat => "ours-nat",
        }
    }

    /// Whether packets are routed to the workers, which must hold the VIPs.
    fn is_routed(self) -> bool {
        matches!(self, Self::Direct | Self::DirectXdp)
    }

    /// Our forwarding mode.
    fn mode(self) -> Option<&'static str> {
        match self {
            Self::Ipip => Some("ipip"),
            Self::Gue => Some("gue"),
            Self::L2 => Some("l2"),
            Self::Nat => Some("nat"),
            _ => None,
        }
    }
}

/// Workers behind the VIP of the web service.
const WORKERS: u8 = 2;
/// Port of the bulk service.
pub const BULK_PORT: u16 = 5201;

/// VIP of the web service, on all workers.
pub fn web_vip() -> Ipv4Addr {
    vip_v4(1)
}

/// VIP of the bulk service, on the first worker: iperf3 opens two connections, which must meet.
pub fn bulk_vip() -> Ipv4Addr {
    vip_v4(2)
}

/// A balancer at work in its network.
pub struct Arrangement {
    /// Which.
    pub kind: Kind,
    balancer: Option<Process>,
    ours: Option<Ours>,
    passing: Vec<OwnedFd>,
    workers: Vec<Process>,
    bed: Bed,
}

/// Our daemons, as an operator would run them; they go when this is dropped.
struct Ours {
    ingress: daemon::Ingress,
    workers: Vec<Process>,
    /// The kernel's numbers of our programs.
    programs: Vec<u32>,
}

impl Arrangement {
    /// Builds it, and makes sure that requests through it reach every worker.
    pub fn build(kind: Kind) -> Result<Self> {
        // Answers that a program sends on arrive over veth only where another one stands.
        let layout = Layout { workers: WORKERS, client_xdp: kind == Kind::Nat, ..Layout::default() };
        let bed = Bed::new(layout)?;
        let mut workers = Vec::new();
        for worker in &bed.workers {
            let (namespace, name) = (&worker.namespace, worker.name.as_str());
            workers.push(nginx::start(namespace, name, bed.directory())?);
            if kind.is_routed() {
                for vip in [web_vip(), bulk_vip()] {
                    namespace.add_address("lo", vip.into(), 32)?;
                }
            }
        }
        let first = bed.workers.first().context("the bed has workers")?;
        workers.push(iperf::start_worker(&first.namespace, &first.name, BULK_PORT, bed.directory())?);
        without_offloads(&bed)?;
        bed.ingress.sysctl("ipv4/ip_local_port_range", "2048 65000")?;
        bed.ingress.sysctl("ipv4/tcp_tw_reuse", "1")?;
        let mut arrangement = Self { kind, balancer: None, ours: None, passing: Vec::new(), workers, bed };
        match kind {
            Kind::Direct => arrangement.route()?,
            Kind::DirectXdp => {
                arrangement.route()?;
                arrangement.pass()?;
            }
            Kind::Haproxy => arrangement.haproxy()?,
            Kind::Nginx => arrangement.nginx()?,
            Kind::Nftables => arrangement.nftables()?,
            Kind::Ipip | Kind::Gue | Kind::L2 | Kind::Nat => arrangement.ours()?,
        }
        arrangement.check()?;
        Ok(arrangement)
    }

    /// Where the load comes from.
    pub fn client(&self) -> &Namespace {
        &self.bed.client
    }

    /// Processor time that the balancer's own processes have used, agents on the workers included.
    pub fn process_time(&self) -> Duration {
        let ours = self.ours.iter().flat_map(|ours| ours.workers.iter().chain([ours.ingress.process()]));
        ours.chain(&self.balancer).map(|process| process_time(process.id())).sum()
    }

    /// Processor time that the workers have used.
    pub fn worker_time(&self) -> Duration {
        self.workers.iter().map(|process| process_time(process.id())).sum()
    }

    /// Time that our programs have run since they were loaded, while the kernel counted it.
    pub fn program_time(&self) -> Result<Option<Duration>> {
        let Some(ours) = &self.ours else { return Ok(None) };
        let mut time = Duration::ZERO;
        for info in loaded_programs() {
            let info = info.context("list the kernel's programs")?;
            if ours.programs.contains(&info.id()) {
                time += info.run_time();
            }
        }
        Ok(Some(time))
    }

    /// Plain routing: what the same network does without a balancer.
    fn route(&self) -> Result<()> {
        let ingress = &self.bed.ingress;
        ingress.sysctl("ipv4/fib_multipath_hash_policy", "1")?;
        let web = format!("{}/32", web_vip());
        let mut arguments = vec!["route", "add", &web];
        let vias: Vec<(String, &str)> =
            self.bed.workers.iter().map(|worker| (worker.v4.to_string(), worker.name.as_str())).collect();
        for (via, interface) in &vias {
            arguments.extend(["nexthop", "via", via, "dev", interface, "weight", "1"]);
        }
        ingress.ip(&arguments)?;
        ingress.ip(&["route", "add", &format!("{}/32", bulk_vip()), "via", &vias[0].0])?;
        Ok(())
    }

    /// XDP programs that pass everything.
    fn pass(&mut self) -> Result<()> {
        let workers = self.bed.workers.iter().map(|worker| &worker.namespace);
        for namespace in workers.chain([&self.bed.ingress]) {
            self.passing.push(program::attach_pass(namespace, "eth0")?);
        }
        Ok(())
    }

    fn haproxy(&mut self) -> Result<()> {
        let mut text = String::from(
            "global\n  maxconn 4000\n\
             defaults\n  mode tcp\n  option splice-auto\n  timeout connect 5s\n  timeout client 60s\n  \
             timeout server 60s\n",
        );
        for (name, vip, port, workers) in self.services() {
            text.push_str(&format!("listen {name}\n  bind {vip}:{port}\n  balance roundrobin\n"));
            for worker in workers {
                text.push_str(&format!("  server {} {}:{port}\n", worker.name, worker.v4));
            }
        }
        self.proxy("haproxy", &text, &["-db", "-f"])
    }

    fn nginx(&mut self) -> Result<()> {
        const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
        let load =
            if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
        let pid = self.bed.path("balancer.pid");
        let mut text = format!(
            "{load}daemon off;\nworker_processes auto;\nworker_rlimit_nofile 20000;\npid {};\n\
             events {{ worker_connections 8000; }}\nstream {{\n",
            pid.display()
        );
        for (name, vip, port, workers) in self.services() {
            let addresses: Vec<String> =
                workers.iter().map(|worker| format!("server {}:{port};", worker.v4)).collect();
            text.push_str(&format!(
                "upstream {name} {{ {} }}\nserver {{ listen {vip}:{port} reuseport backlog=4096; \
                 proxy_pass {name}; }}\n",
                addresses.join(" ")
            ));
        }
        text.push_str("}\n");
        let log = self.bed.path("balancer-error.log").display().to_string();
        self.proxy("nginx", &text, &["-e", &log, "-c"])
    }

    /// Starts a proxy on the VIPs, with its configuration's file as last argument.
    fn proxy(&mut self, program: &str, configuration: &str, arguments: &[&str]) -> Result<()> {
        for vip in [web_vip(), bulk_vip()] {
            self.bed.ingress.add_address("lo", vip.into(), 32)?;
        }
        self.bed.ingress.sysctl("core/somaxconn", "4096")?;
        let file = self.bed.path("balancer.conf");
        fs::write(&file, configuration).with_context(|| format!("write {}", file.display()))?;
        let mut command = self.bed.ingress.command(program);
        command.args(arguments).arg(&file);
        let mut process = Process::spawn(program, command, &self.bed.path("balancer.log"))?;
        let client = &self.bed.client;
        process.wait_ready(&format!("{program} listens"), Duration::from_secs(10), || {
            client.enter(|| std::net::TcpStream::connect((web_vip(), nginx::PORT)).is_ok()).unwrap_or(false)
        })?;
        self.balancer = Some(process);
        Ok(())
    }

    fn nftables(&self) -> Result<()> {
        let mut rules = String::new();
        for (_, vip, port, workers) in self.services() {
            let choice = match workers {
                [only] => only.v4.to_string(),
                _ => {
                    let places: Vec<String> = workers
                        .iter()
                        .enumerate()
                        .map(|(i, worker)| format!("{i} : {}", worker.v4))
                        .collect();
                    let count = workers.len();
                    format!("jhash ip saddr . tcp sport mod {count} map {{ {} }}", places.join(", "))
                }
            };
            rules.push_str(&format!("ip daddr {vip} tcp dport {port} dnat to {choice};\n"));
        }
        let file = self.bed.path("balancer.nft");
        let table = format!(
            "table ip balancer {{\nchain prerouting {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n"
        );
        fs::write(&file, table).with_context(|| format!("write {}", file.display()))?;
        self.bed.ingress.run("nft", &["-f", &file.display().to_string()])?;
        // In its favour: closed connections do not fill its table.
        self.bed.ingress.sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")
    }

    fn ours(&mut self) -> Result<()> {
        let mode = self.kind.mode().context("one of our modes")?;
        let mut text = String::new();
        for (name, vip, port, workers) in self.services() {
            text.push_str(&format!(
                "[[service]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {port}\nprotocol = \"tcp\"\n\
                 mode = \"{mode}\"\n"
            ));
            for worker in workers {
                let (name, address) = (&worker.name, worker.v4);
                text.push_str(&format!("[[service.backend]]\nname = \"{name}\"\naddress = \"{address}\"\n"));
            }
        }
        let file = self.bed.path("services.toml");
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        let vips = [web_vip().into(), bulk_vip().into()];
        let (mut workers, mut arguments) = (Vec::new(), Vec::new());
        for worker in &self.bed.workers {
            if self.kind == Kind::Nat {
                // Answers come in there; and a virtual interface takes redirected frames only if a program is on it.
                arguments.extend(["--iface", worker.name.as_str()]);
                self.passing.push(program::attach_pass(&worker.namespace, "eth0")?);
            } else {
                workers.push(daemon::start_worker(&self.bed, worker, &vips, &[])?);
            }
        }
        let ingress = daemon::Ingress::start(&self.bed, &arguments)?;
        ingress.lbctl()?.run(&["config", "apply", &file.display().to_string()])?;
        let namespaces = self.bed.workers.iter().map(|worker| &worker.namespace);
        let theirs = namespaces.filter(|_| self.kind != Kind::Nat);
        let programs = theirs.chain([&self.bed.ingress]).map(program_of).collect::<Result<_>>()?;
        self.ours = Some(Ours { ingress, workers, programs });
        Ok(())
    }

    /// Name, VIP, port and workers of the services.
    fn services(&self) -> [(&'static str, Ipv4Addr, u16, &[Worker]); 2] {
        [
            ("web", web_vip(), nginx::PORT, &self.bed.workers[..]),
            ("bulk", bulk_vip(), BULK_PORT, &self.bed.workers[..1]),
        ]
    }

    /// Requests must be answered, by every worker.
    fn check(&self) -> Result<()> {
        let what = format!("{} answers from every worker", self.kind.label());
        let mut seen = std::collections::BTreeSet::new();
        let waited = wait::until(&what, Duration::from_secs(10), || {
            let answer = self.client().enter(|| super::load::request((web_vip(), nginx::PORT).into()));
            if let Ok(Ok(answer)) = answer {
                seen.extend(answer.lines().last().map(str::to_owned));
            }
            seen.len() == usize::from(WORKERS)
        });
        let Err(error) = waited else { return Ok(()) };
        let said = self.balancer.as_ref().map(Process::output).unwrap_or_default();
        bail!("{error:#} (seen: {seen:?}){}{said}", if said.is_empty() { "" } else { "; it said:\n" })
    }
}

/// The kernel's number of the XDP program on a namespace's `eth0`.
fn program_of(namespace: &Namespace) -> Result<u32> {
    let text = namespace.ip(&["-json", "link", "show", "dev", "eth0"])?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let id = links[0]["xdp"]["prog"]["id"].as_u64().context("no XDP program is attached to eth0")?;
    u32::try_from(id).context("programs are numbered in 32 bits")
}

/// Native XDP turns them off at its peer anyway; so that nobody has an advantage, they are off for all.
fn without_offloads(bed: &Bed) -> Result<()> {
    const OFF: [&str; 8] = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"];
    let mut interfaces = vec![(&bed.client, "eth0"), (&bed.ingress, "eth0")];
    for worker in &bed.workers {
        interfaces.extend([(&bed.ingress, worker.name.as_str()), (&worker.namespace, "eth0")]);
    }
    for (namespace, interface) in interfaces {
        namespace.run("ethtool", &[&["-K", interface][..], &OFF].concat())?;
    }
    Ok(())
}
