//! etcd as the tests need it: members of one cluster on the loopback interface or in namespaces, each to be
//! stopped, frozen and started again.

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::{netns::Namespace, process::Process, wait};

const START: Duration = Duration::from_secs(30);

/// Where a member runs.
#[derive(Debug)]
pub struct Place<'n> {
    /// In this network, or in the one of the test.
    pub namespace: Option<&'n Namespace>,
    /// At this address.
    pub address: IpAddr,
    /// Port for clients.
    pub client: u16,
    /// Port for other members.
    pub peer: u16,
}

impl Place<'_> {
    /// Free ports of the loopback interface.
    pub fn local() -> Result<Self> {
        let free =
            || -> Result<u16> { Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port()) };
        Ok(Self { namespace: None, address: Ipv4Addr::LOCALHOST.into(), client: free()?, peer: free()? })
    }
}

/// One member.
#[derive(Debug)]
pub struct Member {
    /// `HOST:PORT` for clients.
    pub address: String,
    name: String,
    arguments: Vec<String>,
    log: PathBuf,
    /// None while it is stopped.
    process: Option<Process>,
}

/// A cluster; its members are killed when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// In the order of the places.
    pub members: Vec<Member>,
}

impl Cluster {
    /// Starts a member at each place, with data and logs under `directory`, and `extra` arguments for all;
    /// returns once each of them answers. `scheme` is `http` or `https` (for clients).
    pub fn start(places: &[Place<'_>], directory: &Path, scheme: &str, extra: &[&str]) -> Result<Self> {
        let peer = |place: &Place<'_>| format!("http://{}:{}", place.address, place.peer);
        let all: Vec<String> =
            places.iter().enumerate().map(|(i, place)| format!("m{i}={}", peer(place))).collect();
        let mut members = Vec::new();
        for (i, place) in places.iter().enumerate() {
            let (name, client) = (format!("m{i}"), format!("{scheme}://{}:{}", place.address, place.client));
            let mut arguments: Vec<String> = Vec::new();
            for (flag, value) in [
                ("--name", name.clone()),
                ("--data-dir", directory.join(&name).display().to_string()),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client),
                ("--listen-peer-urls", peer(place)),
                ("--initial-advertise-peer-urls", peer(place)),
                ("--initial-cluster", all.join(",")),
                ("--initial-cluster-token", "lb-test".to_owned()),
            ] {
                arguments.extend([flag.to_owned(), value]);
            }
            arguments.extend(extra.iter().map(|&argument| argument.to_owned()));
            let log = directory.join(format!("{name}.log"));
            let address = format!("{}:{}", place.address, place.client);
            let mut member = Member { address, name, arguments, log, process: None };
            member.launch(place.namespace)?;
            members.push(member);
        }
        let mut cluster = Self { members };
        for (member, place) in cluster.members.iter_mut().zip(places) {
            member.wait_listening(place.namespace)?;
        }
        Ok(cluster)
    }

    /// One member on the loopback interface.
    pub fn single(directory: &Path) -> Result<Self> {
        Self::start(&[Place::local()?], directory, "http", &[])
    }

    /// `etcd://…/PREFIX` with all members.
    pub fn url(&self, prefix: &str) -> String {
        let addresses: Vec<&str> = self.members.iter().map(|member| member.address.as_str()).collect();
        format!("etcd://{}/{prefix}", addresses.join(","))
    }

    /// Runs `etcdctl ARGUMENTS` against the first member, which listens on the loopback interface.
    pub fn etcdctl(&self, arguments: &[&str]) -> Result<String> {
        ensure!(
            self.members[0].address.contains("127.0.0.1"),
            "{} is in a namespace: etcdctl_in",
            self.members[0].address
        );
        self.run_etcdctl(Command::new("etcdctl"), arguments)
    }

    /// Runs `etcdctl ARGUMENTS` against the first member, from a namespace that reaches it.
    pub fn etcdctl_in(&self, namespace: &Namespace, arguments: &[&str]) -> Result<String> {
        self.run_etcdctl(namespace.command("etcdctl"), arguments)
    }

    fn run_etcdctl(&self, mut command: Command, arguments: &[&str]) -> Result<String> {
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.members[0].address]).args(arguments);
        crate::netns::run(&mut command)
    }
}

impl Member {
    /// Kills it.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Stops or continues its process: it holds its connections, and answers nothing.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let process = self.process.as_ref().context("the member does not run")?;
        process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Starts it again with its data, and waits until it listens.
    pub fn start_again(&mut self, namespace: Option<&Namespace>) -> Result<()> {
        ensure!(self.process.is_none(), "{} runs", self.name);
        self.launch(namespace)?;
        self.wait_listening(namespace)
    }

    fn launch(&mut self, namespace: Option<&Namespace>) -> Result<()> {
        let mut command = match namespace {
            Some(namespace) => namespace.command("etcd"),
            None => Command::new("etcd"),
        };
        command.args(&self.arguments);
        self.process = Some(Process::spawn(&format!("etcd {}", self.name), command, &self.log)?);
        Ok(())
    }

    fn wait_listening(&mut self, namespace: Option<&Namespace>) -> Result<()> {
        let address = self.address.clone();
        let process = self.process.as_mut().context("the member does not run")?;
        let listens = move || {
            let address = address.clone();
            let try_it = move || TcpStream::connect(address).is_ok();
            match namespace {
                Some(namespace) => namespace.enter(try_it).unwrap_or(false),
                None => try_it(),
            }
        };
        process.wait_ready(&format!("etcd {} listens", self.name), START, listens).map(drop)
    }
}

/// Waits until the cluster has a leader, as `etcdctl` run by `run` sees it.
pub fn wait_leader(mut run: impl FnMut(&[&str]) -> Result<String>) -> Result<()> {
    wait::until("etcd has a leader", START, || run(&["endpoint", "health"]).is_ok()).map(drop)
}
