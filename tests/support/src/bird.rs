//! BIRD as a process: routers that spread flows over those who announce a VIP, and ingress hosts with the
//! configuration that is shipped (`deploy/bird.conf`).

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{bed::Bed, netns::Namespace, process::Process};

/// The file that operators start from.
const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/bird.conf");
const START: Duration = Duration::from_secs(10);

/// A running daemon.
#[derive(Debug)]
pub struct Bird {
    process: Process,
    socket: PathBuf,
}

/// Another router, as one sees it.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// A name of letters and digits.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Its AS.
    pub number: u32,
    /// Whether it is told the VIPs, rather than telling them.
    pub is_told: bool,
}

/// What an ingress host's file is filled in with.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its address.
    pub own: Ipv4Addr,
    /// Its AS.
    pub number: u32,
    /// The router.
    pub router: Ipv4Addr,
    /// The router.
    pub router_v6: Ipv6Addr,
    /// The router's AS.
    pub router_number: u32,
}

impl Bird {
    /// Starts it on a host, with the shipped configuration.
    pub fn start_host(bed: &Bed, namespace: &Namespace, name: &str, host: &Host) -> Result<Self> {
        let mut text = fs::read_to_string(SHIPPED).with_context(|| format!("cannot read {SHIPPED}"))?;
        for (constant, value) in [
            ("ROUTER_ID", host.own.to_string()),
            ("OWN_AS", host.number.to_string()),
            ("ROUTER", host.router.to_string()),
            ("ROUTER_V6", host.router_v6.to_string()),
            ("ROUTER_AS", host.router_number.to_string()),
        ] {
            let is_its = |line: &str| line.split_whitespace().take(2).eq(["define", constant]);
            ensure!(text.lines().filter(|line| is_its(line)).count() == 1, "{SHIPPED}: define {constant}");
            let replaced = text.lines().map(|line| match is_its(line) {
                true => format!("define {constant} = {value};\n"),
                false => format!("{line}\n"),
            });
            text = replaced.collect();
        }
        Self::start(bed, namespace, name, &text)
    }

    /// Starts it on a router that spreads flows over all who announce a VIP. Interfaces of `slow` lead to other
    /// regions: neighbours there are given up after 500 ms of silence, others after 150 ms.
    pub fn start_router(
        bed: &Bed,
        namespace: &Namespace,
        name: &str,
        id: Ipv4Addr,
        number: u32,
        neighbours: &[Neighbour],
        slow: &[&str],
    ) -> Result<Self> {
        // Connections that a router moves to another region break, so a stall of a busy machine must not look like
        // a cut there; within a region, hosts find each other's flows.
        let between = "min rx interval 100 ms; min tx interval 100 ms; multiplier 5;";
        let slow: String =
            slow.iter().map(|name| format!("interface \"{name}\" {{ {between} }}; ")).collect();
        let mut text = format!(
            "log stderr {{ warning, error, fatal }};\nrouter id {id};\nprotocol device {{ }}\n\
             protocol bfd {{ {slow}interface \"*\" {{ min rx interval 50 ms; min tx interval 50 ms; multiplier 3; }}; }}\n"
        );
        for family in ["ipv4", "ipv6"] {
            writeln!(
                text,
                "protocol kernel {{ {family} {{ import none; export where source = RTS_BGP; }}; merge paths on; }}"
            )?;
        }
        for Neighbour { name, address, number: other, is_told } in neighbours {
            let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
            let channel = match is_told {
                true => "import none; export where source = RTS_BGP; next hop self;",
                false => "import all; export none;",
            };
            writeln!(
                text,
                "protocol bgp {name} {{ local as {number}; neighbor {address} as {other}; bfd on; \
                 connect retry time 2; connect delay time 1; error wait time 1, 2; error forget time 5; \
                 {family} {{ {channel} }}; }}"
            )?;
        }
        Self::start(bed, namespace, name, &text)
    }

    fn start(bed: &Bed, namespace: &Namespace, name: &str, text: &str) -> Result<Self> {
        let (file, socket) = (bed.path(&format!("bird-{name}.conf")), bed.path(&format!("bird-{name}.ctl")));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = namespace.command("bird");
        command.arg("-f").arg("-c").arg(&file).arg("-s").arg(&socket);
        let log = bed.path(&format!("bird-{name}.log"));
        let mut process = Process::spawn(&format!("bird {name}"), command, &log)?;
        process.wait_ready(&format!("bird {name} answers"), START, || {
            birdc(&socket, &["show", "status"]).is_ok()
        })?;
        Ok(Self { process, socket })
    }

    /// `birdc ARGUMENTS`.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        birdc(&self.socket, arguments).with_context(|| format!("bird said:\n{}", self.process.output()))
    }

    /// How many of its BGP sessions are up.
    pub fn sessions(&self) -> usize {
        let shown = self.ask(&["show", "protocols"]).unwrap_or_default();
        shown.lines().filter(|line| line.contains("BGP") && line.contains("Established")).count()
    }
}

fn birdc(socket: &Path, arguments: &[&str]) -> Result<String> {
    crate::netns::run(Command::new("birdc").arg("-s").arg(socket).args(arguments))
}
