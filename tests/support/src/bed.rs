//! The topology: a client, an ingress host, and workers each on a link of their
//! own. Replies go from the worker straight to the client (direct server
//! return), routed by the ingress host's kernel, as a router would.
//!
//! ```text
//! client eth0 ── eth0 ingress w1 ── eth0 worker 1
//!                            w2 ── eth0 worker 2 …
//! ```

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    netns::{self, Namespace},
    nics, program,
};

const PREFIX: &str = "lbt-";
const DIRECTORY: &str = "/run/lb-testbed";

/// The client's addresses.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// The client's addresses.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// The ingress host's addresses towards the client.
pub const INGRESS_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The ingress host's addresses towards the client.
pub const INGRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);

/// What the link between the client and the ingress host is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientLink {
    /// An interface at each end.
    #[default]
    Plain,
    /// A VLAN device above the interface at each end, with the addresses.
    Vlan,
    /// The ingress host's interface is a bond with one port.
    Bond,
}

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// How many workers; at most 200.
    pub workers: u8,
    /// MTU of the client's link.
    pub client_mtu: u32,
    /// MTU of the workers' links; 1,600 leaves room for the encapsulation.
    pub worker_mtu: u32,
    /// Whether the client's end has an XDP program, without which it does not
    /// receive what the ingress host sends by XDP_TX.
    pub client_xdp: bool,
    /// What the client's link is made of.
    pub client_link: ClientLink,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            workers: 3,
            client_mtu: 1500,
            worker_mtu: 1600,
            client_xdp: true,
            client_link: ClientLink::Plain,
        }
    }
}

/// A worker host: its namespace and its addresses on the link to the ingress.
#[derive(Debug)]
pub struct Worker {
    /// `w1`, `w2`, …: also the ingress host's interface towards it.
    pub name: String,
    /// Its network.
    pub namespace: Namespace,
    /// Its own IPv4 address, where encapsulated packets go.
    pub v4: Ipv4Addr,
    /// Its own IPv6 address.
    pub v6: Ipv6Addr,
}

/// The whole network. Dropping it removes everything.
#[derive(Debug)]
pub struct Bed {
    id: String,
    directory: PathBuf,
    /// Where the load comes from.
    pub client: Namespace,
    /// Where the balancer runs; `eth0` faces the client.
    pub ingress: Namespace,
    /// Where the services run.
    pub workers: Vec<Worker>,
    worker_mtu: u32,
    _client_program: Option<OwnedFd>,
    _remains: Remains,
}

/// The `number`th VIP, from 1.
pub fn vip_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, number)
}

/// The `number`th IPv6 VIP, from 1.
pub fn vip_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, u16::from(number))
}

impl Bed {
    /// Builds the network. Remains of earlier runs whose process is gone are
    /// cleared away first; runs that live are left alone.
    pub fn new(layout: Layout) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        clean_stale();
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new(DIRECTORY).join(&id);
        let remains = Remains { id: id.clone() };
        fs::create_dir_all(directory.join("bpf"))
            .with_context(|| format!("cannot create {}", directory.display()))?;
        mount(Some("bpf"), &directory.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("cannot mount a BPF filesystem")?;

        let client = Namespace::create(&format!("{PREFIX}{id}-client"))?;
        let ingress = Namespace::create(&format!("{PREFIX}{id}-ingress"))?;
        make_router(&ingress)?;
        let client_program = join_client(&client, &ingress, &layout)?;

        let mut bed = Self {
            id,
            directory,
            client,
            ingress,
            workers: Vec::new(),
            worker_mtu: layout.worker_mtu,
            _client_program: client_program,
            _remains: remains,
        };
        for _ in 0..layout.workers {
            bed.add_worker()?;
        }
        Ok(bed)
    }

    /// Adds one more worker host and returns its index.
    pub fn add_worker(&mut self) -> Result<usize> {
        let index = self.workers.len();
        let number = u8::try_from(index + 1).context("too many workers")?;
        let name = format!("w{number}");
        let namespace = Namespace::create(&format!("{PREFIX}{}-{name}", self.id))?;
        netns::connect((&namespace, "eth0"), (&self.ingress, &name), self.worker_mtu)?;
        let v4 = |host| Ipv4Addr::new(10, 1, number, host);
        let v6 = |host| Ipv6Addr::new(0xfd00, 1, u16::from(number), 0, 0, 0, 0, host);
        self.ingress.add_address(&name, v4(1).into(), 24)?;
        self.ingress.add_address(&name, v6(1).into(), 64)?;
        namespace.add_address("eth0", v4(2).into(), 24)?;
        namespace.add_address("eth0", v6(2).into(), 64)?;
        namespace.add_default_route(v4(1).into())?;
        namespace.add_default_route(v6(1).into())?;
        namespace.disable_tx_offload("eth0")?;
        namespace.sysctl("core/somaxconn", "4096")?;
        self.workers.push(Worker { name, namespace, v4: v4(2), v6: v6(2) });
        Ok(index)
    }

    /// Makes the client's link again after one end of it was deleted: new interfaces with the same names and addresses.
    pub fn join_client_again(&mut self, layout: &Layout) -> Result<()> {
        self._client_program = join_client(&self.client, &self.ingress, layout)?;
        Ok(())
    }

    /// A directory of this bed's own for files, sockets and logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A path inside [`Self::directory`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes directory `name` inside [`Self::directory`] a file system of its own
    /// with no more than `bytes`.
    pub fn limit_directory(&self, name: &str, bytes: u64) -> Result<()> {
        let path = self.path(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let size = format!("size={bytes}");
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .with_context(|| format!("cannot mount a tmpfs on {}", path.display()))
    }

    /// A path for pins in the BPF filesystem of this bed's own.
    pub fn pin_path(&self, name: &str) -> PathBuf {
        self.directory.join("bpf").join(name)
    }

    /// One more network of this bed, removed with it.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::create(&format!("{PREFIX}{}-{name}", self.id))
    }

    /// What [`clean`] takes to remove this bed from elsewhere.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// Makes the client's link with its addresses and routes; returns the program on the client's end.
fn join_client(client: &Namespace, ingress: &Namespace, layout: &Layout) -> Result<Option<OwnedFd>> {
    let device = connect_client(client, ingress, layout)?;
    for (namespace, v4, v6) in [(client, CLIENT_V4, CLIENT_V6), (ingress, INGRESS_V4, INGRESS_V6)] {
        namespace.add_address(device, v4.into(), 24)?;
        namespace.add_address(device, v6.into(), 64)?;
    }
    make_client(client)?;
    layout.client_xdp.then(|| program::attach_pass(client, "eth0")).transpose()
}

/// Makes the client's link, and names the device at both ends that has the addresses.
fn connect_client(client: &Namespace, ingress: &Namespace, layout: &Layout) -> Result<&'static str> {
    let mtu = layout.client_mtu;
    match layout.client_link {
        ClientLink::Plain => netns::connect((client, "eth0"), (ingress, "eth0"), mtu).map(|()| "eth0"),
        ClientLink::Bond => {
            netns::connect((client, "eth0"), (ingress, "port0"), mtu)?;
            ingress.ip(&["link", "add", "eth0", "type", "bond", "mode", "active-backup", "miimon", "50"])?;
            ingress.ip(&["link", "set", "port0", "down"])?;
            ingress.ip(&["link", "set", "port0", "master", "eth0"])?;
            ingress.ip(&["link", "set", "eth0", "mtu", &mtu.to_string(), "up"])?;
            netns::wait_up(ingress, "eth0").map(|()| "eth0")
        }
        ClientLink::Vlan => {
            netns::connect((client, "eth0"), (ingress, "eth0"), mtu)?;
            for namespace in [client, ingress] {
                // A veth end would carry the tag beside the frame, where an XDP program cannot see it.
                if !nics::are_there() {
                    namespace.run("ethtool", &["-K", "eth0", "txvlan", "off"])?;
                }
                let device = ["link", "add", "link", "eth0", "name", "eth0.7", "type", "vlan", "id", "7"];
                namespace.ip(&device)?;
                namespace.ip(&["link", "set", "eth0.7", "up"])?;
                netns::wait_up(namespace, "eth0.7")?;
            }
            Ok("eth0.7")
        }
    }
}

/// Lets a host forward what its kernel is asked to, whatever the source.
pub fn make_router(ingress: &Namespace) -> Result<()> {
    ingress.sysctl("ipv4/ip_forward", "1")?;
    ingress.sysctl("ipv6/conf/all/forwarding", "1")?;
    // Replies carry the VIP as their source, to which this host has no route.
    ingress.sysctl("ipv4/conf/all/rp_filter", "0")?;
    ingress.sysctl("ipv4/conf/default/rp_filter", "0")
}

fn make_client(client: &Namespace) -> Result<()> {
    client.add_default_route(IpAddr::V4(INGRESS_V4))?;
    client.add_default_route(IpAddr::V6(INGRESS_V6))?;
    client.disable_tx_offload("eth0")?;
    client.sysctl("ipv4/ip_local_port_range", "2048 65000")?;
    client.sysctl("ipv4/tcp_tw_reuse", "1")
}

/// Clears the bed away when the last of its parts is gone.
#[derive(Debug)]
struct Remains {
    id: String,
}

impl Drop for Remains {
    fn drop(&mut self) {
        clean(&self.id);
    }
}

/// Removes bed `id`: its processes, namespaces, pins and files. Works from any
/// process, and for beds that are half built or half gone.
pub fn clean(id: &str) {
    for name in netns::list(&format!("{PREFIX}{id}-")) {
        if let Err(error) = netns::remove(&name) {
            eprintln!("namespace {name}: {error:#}");
        }
    }
    let directory = Path::new(DIRECTORY).join(id);
    let parts = fs::read_dir(&directory).into_iter().flatten().flatten();
    for mounted in parts.filter(|part| part.path().is_dir()) {
        let _ = umount2(&mounted.path(), MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(&directory);
}

/// Removes the beds of this very process; for its end by a signal.
pub fn clean_own() {
    let own = std::process::id().to_string();
    for id in ids().iter().filter(|id| owner(id) == own) {
        clean(id);
    }
}

/// Removes the beds of processes that are gone.
pub fn clean_stale() {
    let own = std::process::id().to_string();
    for id in ids() {
        if owner(&id) != own && !is_bed_owner(owner(&id)) {
            clean(&id);
        }
    }
}

/// Every bed that has left a trace, whole or not.
fn ids() -> Vec<String> {
    let mut ids: Vec<String> = netns::list(PREFIX)
        .iter()
        .filter_map(|name| Some(name.strip_prefix(PREFIX)?.rsplit_once('-')?.0.to_owned()))
        .collect();
    if let Ok(entries) = fs::read_dir(DIRECTORY) {
        ids.extend(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()));
    }
    ids.sort();
    ids.dedup();
    ids
}

fn owner(id: &str) -> &str {
    id.split('-').next().unwrap_or_default()
}

/// Whether process `pid` lives and is not a stranger that got a reused number:
/// only this repository's test runners and xtask make beds.
fn is_bed_owner(pid: &str) -> bool {
    let Ok(program) = fs::read_link(format!("/proc/{pid}/exe")) else { return false };
    // Of cargo's folders one or the other, wherever they lie; programs by name.
    let ours = ["target", "deps", "xtask", "test-bench"];
    program.components().any(|part| ours.iter().any(|name| part.as_os_str() == *name))
}

/// The directory of the balancer's binaries: `LB_BIN_DIR`, or the one that this
/// very program was built into.
pub fn binary(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("LB_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let own = std::env::current_exe().context("cannot find the running program")?;
            let directory = own.parent().context("the program lies in no directory")?;
            let is_test = directory.ends_with("deps");
            if is_test { directory.parent().unwrap_or(directory) } else { directory }.to_owned()
        }
    };
    let path = directory.join(name);
    anyhow::ensure!(path.is_file(), "{} is not there: run `cargo build --workspace` first", path.display());
    Ok(path)
}

/// A command for one of the balancer's binaries inside `namespace`.
pub fn command_in(namespace: &Namespace, name: &str) -> Result<Command> {
    Ok(namespace.command(binary(name)?))
}
