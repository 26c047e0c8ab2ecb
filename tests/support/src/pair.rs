//! Two ingress hosts that share a three-member etcd.
//!
//! ```text
//! client eth0 ── eth0 ingress A w1 ── eth0 worker 1 …
//!                             to-b
//!                             │
//! second client eth0 ── eth0 ingress B to-a       etcd members m0 m1 m2, and both hosts: on one switch
//! ```
//!
//! B reaches the workers by way of A's kernel, and so do the replies to its client: both hosts have
//! clients, tables and health checks of their own over the same workers.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    bed::{self, Bed, Layout, vip_v4},
    daemon::{self, Ingress, Lbctl},
    etcd::{Cluster, Place},
    hold::LineWorker,
    netns::{self, Namespace},
    nginx,
    process::Process,
    program,
    stage::LINES,
    wait,
};

/// Members of the cluster.
pub const MEMBERS: usize = 3;
const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// One ingress host.
#[derive(Debug)]
pub struct Host {
    /// The daemon.
    pub ingress: Ingress,
    /// Its command line.
    pub lbctl: Lbctl,
}

/// Everything, running. Dropped, it is gone.
#[derive(Debug)]
pub struct Pair {
    /// Host A, in region `east`.
    pub a: Host,
    /// Host B, in region `west`.
    pub b: Host,
    /// etcd.
    pub cluster: Cluster,
    _http: Vec<Process>,
    _agents: Vec<Process>,
    _lines: Vec<LineWorker>,
    /// The client of B.
    pub second_client: Namespace,
    /// B's network.
    pub second_ingress: Namespace,
    switch: Namespace,
    members: Vec<Namespace>,
    _programs: Vec<OwnedFd>,
    /// A, its client and the workers.
    pub bed: Bed,
}

fn member_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, 1 + number as u8)
}

impl Pair {
    /// Builds and starts it all, with the services `web` (HTTP) and `lines` on the first VIP that both hosts find
    /// healthy.
    pub fn start(extra: &[&str]) -> Result<Self> {
        let bed = Bed::new(Layout::default())?;
        let (second_client, second_ingress, mut programs) = second_host(&bed)?;
        let (switch, members) = switch(&bed, &second_ingress)?;
        let places: Vec<Place<'_>> = members
            .iter()
            .enumerate()
            .map(|(i, namespace)| Place {
                namespace: Some(namespace),
                address: member_address(i).into(),
                client: CLIENT_PORT,
                peer: PEER_PORT,
            })
            .collect();
        let cluster = Cluster::start(&places, bed.directory(), "http", &[])?;
        let vips: [IpAddr; 1] = [vip_v4(1).into()];
        let mut http = Vec::new();
        let mut agents = Vec::new();
        let mut lines = Vec::new();
        for worker in &bed.workers {
            http.push(nginx::start(&worker.namespace, &worker.name, bed.directory())?);
            lines.push(LineWorker::start(&worker.namespace, &worker.name, LINES)?);
            agents.push(daemon::start_worker(&bed, worker, &vips, &[])?);
        }
        let url = cluster.url("lb");
        let arguments =
            |host, region| [&["--store", url.as_str(), "--host", host, "--region", region], extra].concat();
        let a = Ingress::start(&bed, &arguments("a", "east"))?;
        let b = Ingress::start_on(&bed, &second_ingress, "-b", &arguments("b", "west"))?;
        programs.push(program::attach_pass(&bed.ingress, "to-b")?);
        let (a, b) = (Host { lbctl: a.lbctl()?, ingress: a }, Host { lbctl: b.lbctl()?, ingress: b });
        let pair = Self {
            a,
            b,
            cluster,
            _http: http,
            _agents: agents,
            _lines: lines,
            second_client,
            second_ingress,
            switch,
            members,
            _programs: programs,
            bed,
        };
        pair.configure()?;
        Ok(pair)
    }

    /// `web` and `lines`, on all workers, healthy on both hosts.
    fn configure(&self) -> Result<()> {
        let services = [("web", nginx::PORT), ("lines", LINES)];
        let text: String = services.map(|(name, port)| self.service(name, port)).concat();
        let path = self.bed.path("services.toml");
        fs::write(&path, text)?;
        self.a.lbctl.run(&["config", "apply", &path.display().to_string()])?;
        for host in [&self.a, &self.b] {
            wait::until("all workers are healthy on both hosts", Duration::from_secs(20), || {
                self.bed.workers.iter().all(|worker| {
                    host.lbctl.backends(&worker.name).is_ok_and(|found| {
                        found.len() == services.len() && found.iter().all(|b| b.is_healthy && b.slots > 0)
                    })
                })
            })
            .with_context(|| format!("lbd said:\n{}", host.ingress.process().output()))?;
        }
        Ok(())
    }

    fn service(&self, name: &str, port: u16) -> String {
        let mut text = format!(
            "[[service]]\nname = \"{name}\"\nvip = \"{}\"\nport = {port}\nprotocol = \"tcp\"\ndrain_s = 60\n\
             [service.health]\nkind = \"http\"\npath = \"/\"\nport = {}\ninterval_ms = 500\ntimeout_ms = 3000\n\
             rise = 2\nfall = 4\n",
            vip_v4(1),
            nginx::PORT
        );
        for worker in &self.bed.workers {
            text +=
                &format!("[[service.backend]]\nname = \"{}\"\naddress = \"{}\"\n", worker.name, worker.v4);
        }
        text
    }

    /// Where clients ask.
    pub fn target(&self) -> SocketAddr {
        SocketAddr::from((vip_v4(1), nginx::PORT))
    }

    /// Pulls a member's cable, or plugs it in again.
    pub fn cut(&self, member: usize, is_cut: bool) -> Result<()> {
        self.cut_port(&format!("m{member}"), is_cut)
    }

    /// The same with the cable that joins host `a` or `b` to the members; its others stay.
    pub fn cut_host(&self, host: &str, is_cut: bool) -> Result<()> {
        self.cut_port(&format!("host-{host}"), is_cut)
    }

    fn cut_port(&self, port: &str, is_cut: bool) -> Result<()> {
        let state = if is_cut { "down" } else { "up" };
        self.switch.ip(&["link", "set", port, state]).map(drop)
    }

    /// The network of a member.
    pub fn member(&self, number: usize) -> &Namespace {
        &self.members[number]
    }

    /// Waits until both hosts show the same newest revision and the same tables, by their own account;
    /// returns the revision and how long it took.
    pub fn converge(&self, timeout: Duration) -> Result<(u64, Duration)> {
        let began = Instant::now();
        let mut last = String::new();
        let found = wait::until_some("both hosts have the same tables", timeout, || {
            let mut tables = |host: &Host| -> Option<(u64, String, bool)> {
                let info = host.lbctl.output(&["store", "status", "-o", "json"]).ok()?;
                let info: serde_json::Value = serde_json::from_slice(&info.stdout).ok()?;
                let newest = info["revision"]["number"].as_u64()?;
                let hosts = info["hosts"].as_array()?;
                let hash = |host: &serde_json::Value| host["table_hash"].as_str().map(str::to_owned);
                let hashes: Vec<_> = hosts.iter().map(hash).collect();
                let same = hosts.len() == 2
                    && hashes[0] == hashes[1]
                    && hosts.iter().all(|host| host["revision"].as_u64() == Some(newest));
                last = hosts.iter().map(|h| format!("{h}\n")).collect();
                Some((newest, hashes.first()?.clone()?, same))
            };
            let (a, b) = (tables(&self.a)?, tables(&self.b)?);
            (a == b && a.2).then_some(a.0)
        })
        .with_context(|| format!("the hosts say:\n{last}"))?;
        let (a, b) = (self.a.lbctl.run(&["config", "export"])?, self.b.lbctl.run(&["config", "export"])?);
        ensure!(a == b, "the desired states differ");
        Ok((found, began.elapsed()))
    }
}

/// B with its client: names, addresses, routes.
fn second_host(bed: &Bed) -> Result<(Namespace, Namespace, Vec<OwnedFd>)> {
    let client = bed.namespace("client-b")?;
    let ingress = bed.namespace("ingress-b")?;
    bed::make_router(&ingress)?;
    netns::connect((&client, "eth0"), (&ingress, "eth0"), 1500)?;
    netns::connect((&ingress, "to-a"), (&bed.ingress, "to-b"), 1600)?;
    let v4 = |a, b| IpAddr::from(Ipv4Addr::new(10, a, 0, b));
    client.add_address("eth0", v4(3, 2), 24)?;
    ingress.add_address("eth0", v4(3, 1), 24)?;
    ingress.add_address("to-a", v4(4, 2), 24)?;
    bed.ingress.add_address("to-b", v4(4, 1), 24)?;
    client.add_default_route(v4(3, 1))?;
    ingress.add_default_route(v4(4, 1))?;
    bed.ingress.ip(&["route", "add", "10.3.0.0/24", "via", "10.4.0.2"])?;
    client.disable_tx_offload("eth0")?;
    client.sysctl("ipv4/ip_local_port_range", "2048 65000")?;
    client.sysctl("ipv4/tcp_tw_reuse", "1")?;
    let programs = vec![program::attach_pass(&client, "eth0")?];
    Ok((client, ingress, programs))
}

/// A switch with the members and both hosts.
fn switch(bed: &Bed, second: &Namespace) -> Result<(Namespace, Vec<Namespace>)> {
    let switch = bed.namespace("switch")?;
    switch.ip(&["link", "add", "br0", "type", "bridge"])?;
    switch.ip(&["link", "set", "br0", "up"])?;
    let join = |namespace: &Namespace, port: &str, address: Ipv4Addr| -> Result<()> {
        netns::connect((namespace, "etcd0"), (&switch, port), 1500)?;
        namespace.add_address("etcd0", address.into(), 24)?;
        switch.ip(&["link", "set", port, "master", "br0"]).map(drop)
    };
    let mut members = Vec::new();
    for i in 0..MEMBERS {
        let namespace = bed.namespace(&format!("m{i}"))?;
        join(&namespace, &format!("m{i}"), member_address(i))?;
        members.push(namespace);
    }
    join(&bed.ingress, "host-a", Ipv4Addr::new(10, 9, 0, 101))?;
    join(second, "host-b", Ipv4Addr::new(10, 9, 0, 102))?;
    Ok((switch, members))
}
