//! The balancer under test: `lbd` on the ingress host and on the workers, and
//! `lbctl` as a person would type it.

use std::{
    net::IpAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    bed::{Bed, Worker, binary},
    netns::Namespace,
    process::Process,
};

const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(10);

/// `lbd ingress` in a bed's ingress namespace.
#[derive(Debug)]
pub struct Ingress {
    process: Process,
    arguments: Vec<String>,
    socket: PathBuf,
    log: PathBuf,
}

impl Ingress {
    /// Starts the daemon on `eth0` with `extra` arguments, and returns once it
    /// answers on its socket.
    pub fn start(bed: &Bed, extra: &[&str]) -> Result<Self> {
        Self::start_on(bed, &bed.ingress, "", extra)
    }

    /// The same on another host of the bed, with files whose names end with `suffix`.
    pub fn start_on(bed: &Bed, host: &Namespace, suffix: &str, extra: &[&str]) -> Result<Self> {
        let socket = bed.path(&format!("lbd{suffix}.sock"));
        let mut arguments: Vec<String> = ["ingress", "--iface", "eth0"].map(String::from).to_vec();
        for (flag, path) in [
            ("--pin-path", bed.pin_path(&format!("ingress{suffix}"))),
            ("--state-dir", bed.path(&format!("state{suffix}"))),
            ("--socket", socket.clone()),
        ] {
            arguments.extend([flag.to_owned(), path.display().to_string()]);
        }
        arguments.extend(extra.iter().map(|&argument| argument.to_owned()));
        let log = bed.path(&format!("lbd-ingress{suffix}.log"));
        let process = spawn(host, &binary("lbd")?, &arguments, &socket, &log)?;
        Ok(Self { process, arguments, socket, log })
    }

    /// Ends the daemon by `signal`; the programs stay attached.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let status = self.process.stop(signal, STOP)?;
        if signal == Signal::SIGTERM && !status.success() {
            bail!("lbd ended with {status} after SIGTERM:\n{}", self.process.output());
        }
        Ok(())
    }

    /// Starts a new daemon with the same arguments; it must adopt the pins.
    pub fn start_again(&mut self, bed: &Bed) -> Result<()> {
        self.start_again_on(&bed.ingress)
    }

    /// The same on another host.
    pub fn start_again_on(&mut self, host: &Namespace) -> Result<()> {
        self.process = spawn(host, &binary("lbd")?, &self.arguments, &self.socket, &self.log)?;
        Ok(())
    }

    /// The same with another `lbd`.
    pub fn start_again_as(&mut self, program: &Path, bed: &Bed) -> Result<()> {
        self.process = spawn(&bed.ingress, program, &self.arguments, &self.socket, &self.log)?;
        Ok(())
    }

    /// The same, without waiting for it to be ready.
    pub fn begin_again_as(&mut self, program: &Path, bed: &Bed) -> Result<()> {
        let mut command = bed.ingress.command(program);
        command.args(&self.arguments);
        self.process = Process::spawn("lbd ingress", command, &self.log)?;
        Ok(())
    }

    /// Whether the daemon has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process.ended().is_some()
    }

    /// The command line that it was started with.
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// An `lbctl` that talks to this daemon.
    pub fn lbctl(&self) -> Result<Lbctl> {
        Ok(Lbctl { program: binary("lbctl")?, socket: self.socket.clone() })
    }
}

fn spawn(
    host: &Namespace,
    program: &Path,
    arguments: &[String],
    socket: &Path,
    log: &Path,
) -> Result<Process> {
    let mut command = host.command(program);
    command.args(arguments);
    let mut process = Process::spawn("lbd ingress", command, log)?;
    process.wait_ready("lbd ingress answers", START, || UnixStream::connect(socket).is_ok())?;
    Ok(process)
}

/// Starts `lbd worker` on a worker host: it unpacks what comes to the worker's
/// own addresses and holds `vips` on the loopback interface.
pub fn start_worker(bed: &Bed, worker: &Worker, vips: &[IpAddr], extra: &[&str]) -> Result<Process> {
    let name = format!("lbd worker {}", worker.name);
    let mut command = worker.namespace.command(binary("lbd")?);
    command.args(["worker", "--iface", "eth0"]);
    for address in [IpAddr::from(worker.v4), IpAddr::from(worker.v6)] {
        command.args(["--address", &address.to_string()]);
    }
    for vip in vips {
        command.args(["--vip", &vip.to_string()]);
    }
    command.arg("--pin-path").arg(bed.pin_path(&worker.name)).args(extra);
    let mut process = Process::spawn(&name, command, &bed.path(&format!("lbd-{}.log", worker.name)))?;
    process.wait_ready(&format!("{name} is attached and holds its VIPs"), START, || {
        is_attached(worker) && vips.iter().all(|vip| holds(worker, vip))
    })?;
    Ok(process)
}

fn is_attached(worker: &Worker) -> bool {
    worker
        .namespace
        .ip(&["-json", "link", "show", "dev", "eth0"])
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .is_some_and(|links| links[0]["xdp"].is_object())
}

fn holds(worker: &Worker, vip: &IpAddr) -> bool {
    worker.namespace.ip(&["address", "show", "dev", "lo"]).is_ok_and(|text| text.contains(&format!("{vip}/")))
}

/// The command line, bound to one daemon's socket.
#[derive(Clone, Debug)]
pub struct Lbctl {
    program: PathBuf,
    socket: PathBuf,
}

impl Lbctl {
    /// Runs `lbctl ARGUMENTS` whatever comes of it.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        Command::new(&self.program)
            .arg("--socket")
            .arg(&self.socket)
            .args(arguments)
            .output()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }

    /// Runs `lbctl ARGUMENTS`, which must succeed, and returns what it printed.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        if !output.status.success() {
            bail!(
                "lbctl {}: {}: {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `lbctl ARGUMENTS -o json`, read.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("lbctl {} printed {text:?}", arguments.join(" ")))
    }

    /// The command line of the shell that would do the same.
    pub fn shell(&self, arguments: &[&str]) -> String {
        format!("{} --socket {} {}", self.program.display(), self.socket.display(), arguments.join(" "))
    }
}

/// A backend of one service as `lbctl backend list` shows it.
#[derive(Clone, Debug)]
pub struct BackendStatus {
    /// The service.
    pub service: String,
    /// The probes' verdict.
    pub is_healthy: bool,
    /// Slots of the service's table that are its own.
    pub slots: u64,
    /// Its next hop is known, so that packets need no FIB.
    pub is_resolved: bool,
}

impl Lbctl {
    /// Backend `name` in every service that has it.
    pub fn backends(&self, name: &str) -> Result<Vec<BackendStatus>> {
        let list = self.json(&["backend", "list"])?;
        let backends = list.as_array().with_context(|| format!("lbctl backend list is no list: {list}"))?;
        let read = |backend: &Value| BackendStatus {
            service: backend["service"].as_str().unwrap_or_default().to_owned(),
            is_healthy: backend["status"]["health"] == "healthy",
            slots: backend["status"]["slots"].as_u64().unwrap_or_default(),
            is_resolved: backend["status"]["next_hop"].is_object(),
        };
        Ok(backends.iter().filter(|backend| backend["name"] == name).map(read).collect())
    }
}
