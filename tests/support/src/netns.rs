//! Network namespaces: made, entered, wired and removed.
//!
//! A namespace is entered with `setns` only. `ip netns exec` would remount /sys
//! as well and hide the BPF filesystem.

use std::{
    fs::{self, File},
    future::Future,
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const DIRECTORY: &str = "/run/netns";

/// A named network namespace, removed on drop with every process left in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: OwnedFd,
}

impl Namespace {
    /// Makes the namespace `name` with its loopback up.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?.into();
        let namespace = Self { name: name.to_owned(), file };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// The name, as `nsenter --net=/run/netns/NAME` wants it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the namespace is bound.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// A command that will run inside, spawned by the caller as usual.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.file.as_raw_fd();
        // SAFETY: between fork and exec only setns and sigprocmask are called, which
        // are async-signal-safe; the descriptor is open for as long as `self` lives,
        // and a child forked later merely fails to start.
        unsafe {
            command.pre_exec(move || {
                // Signals that the caller has blocked must reach the child.
                nix::sys::signal::SigSet::empty().thread_set_mask()?;
                match libc::setns(file, libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        command
    }

    /// Runs a program inside to its end and returns what it printed.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        run(self.command(program).args(arguments)).with_context(|| format!("in namespace {}", self.name))
    }

    /// `ip ARGUMENTS` inside.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        self.run("ip", arguments)
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets that it
    /// opens belong to the namespace for good.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>> {
        let file = self.file.try_clone().context("cannot duplicate a namespace descriptor")?;
        let (entered, has_entered) = std::sync::mpsc::sync_channel(1);
        let handle = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                let result = setns(file.as_fd(), CloneFlags::CLONE_NEWNET);
                let failed = result.is_err();
                let _ = entered.send(result);
                // The caller reports the failure and drops the handle.
                if failed {
                    panic!("the namespace could not be entered");
                }
                work()
            })
            .context("cannot start a thread")?;
        has_entered
            .recv()
            .map_err(|_| anyhow!("the thread died"))?
            .with_context(|| format!("cannot enter namespace {}", self.name))?;
        Ok(handle)
    }

    /// Runs `work` inside and waits for its result.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        self.spawn(work)?.join().map_err(|_| anyhow!("work in namespace {} panicked", self.name))
    }

    /// Drives `make()`'s future inside, on a single-threaded runtime, so that
    /// every socket of every task belongs to the namespace.
    pub fn spawn_async<F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Result<JoinHandle<F::Output>>
    where
        F: Future,
        F::Output: Send + 'static,
    {
        self.spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("an epoll instance and a timer can be had")
                .block_on(make())
        })
    }

    /// Sets `/proc/sys/net/NAME` inside.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(name);
        let value = value.to_owned();
        self.enter(move || {
            fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
        })?
    }

    /// Adds `address` (with its prefix) to `interface`. IPv6 addresses skip
    /// duplicate detection: they must work at once.
    pub fn add_address(&self, interface: &str, address: IpAddr, prefix: u8) -> Result<()> {
        let address_text = format!("{address}/{prefix}");
        let mut arguments = vec!["address", "add", &address_text, "dev", interface];
        if address.is_ipv6() {
            arguments.push("nodad");
        }
        self.ip(&arguments).map(drop)
    }

    /// Sets the default route of the gateway's family.
    pub fn add_default_route(&self, gateway: IpAddr) -> Result<()> {
        let family = if gateway.is_ipv4() { "-4" } else { "-6" };
        self.ip(&[family, "route", "add", "default", "via", &gateway.to_string()]).map(drop)
    }

    /// The interface's index inside.
    pub fn index(&self, interface: &str) -> Result<u32> {
        let text = self.sys(interface, "ifindex")?;
        text.parse().with_context(|| format!("{interface}: ifindex is {text:?}"))
    }

    /// The interface's MAC address.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let text = self.sys(interface, "address")?;
        let text = text.trim_matches('"');
        let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
        let bytes = bytes.with_context(|| format!("{interface}: {text:?} is no MAC address"))?;
        bytes.try_into().map_err(|_| anyhow!("{interface}: {text:?} is no MAC address"))
    }

    /// A counter of the interface: `rx_packets`, `tx_dropped`, …
    pub fn counter(&self, interface: &str, name: &str) -> Result<u64> {
        let links: serde_json::Value =
            serde_json::from_str(&self.ip(&["-json", "-statistics", "link", "show", "dev", interface])?)?;
        let (direction, field) = name.split_once('_').context("a counter is named rx_… or tx_…")?;
        links[0]["stats64"][direction][field]
            .as_u64()
            .with_context(|| format!("{interface} has no counter {name}"))
    }

    /// Turns transmit checksum offload off: without it an XDP program sees only
    /// the pseudo-header's sum and a redirected frame arrives broken. NICs complete it.
    pub fn disable_tx_offload(&self, interface: &str) -> Result<()> {
        if crate::nics::are_there() {
            return Ok(());
        }
        self.run("ethtool", &["-K", interface, "tx", "off"]).map(drop)
    }

    fn sys(&self, interface: &str, field: &str) -> Result<String> {
        // /sys shows the namespace of its mount, so netlink is asked instead.
        let links: serde_json::Value =
            serde_json::from_str(&self.ip(&["-json", "link", "show", "dev", interface])?)?;
        Ok(links[0][field].to_string())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("namespace {}: {error:#}", self.name);
        }
    }
}

/// Joins `left` and `right` by a veth pair, or where the machine has some for it by a pair of NICs (see
/// [`crate::nics`]), with both ends up at `mtu`.
pub fn connect(left: (&Namespace, &str), right: (&Namespace, &str), mtu: u32) -> Result<()> {
    let mtu = mtu.to_string();
    if crate::nics::are_there() {
        crate::nics::connect(left, right, &mtu)?;
    } else {
        make_pair(left, right, &mtu)?;
    }
    left.0.ip(&["link", "set", left.1, "up"])?;
    right.0.ip(&["link", "set", right.1, "up"])?;
    [left, right].into_iter().try_for_each(|(namespace, interface)| wait_up(namespace, interface))
}

/// Waits until `interface` has a carrier.
pub fn wait_up(namespace: &Namespace, interface: &str) -> Result<()> {
    crate::wait::until(&format!("{interface} is up"), std::time::Duration::from_secs(5), || {
        namespace.sys(interface, "operstate").is_ok_and(|state| state == "\"UP\"")
    })
    .map(drop)
}

fn make_pair(left: (&Namespace, &str), right: (&Namespace, &str), mtu: &str) -> Result<()> {
    let arguments = ["link", "add", left.1, "mtu", mtu, "netns", left.0.name(), "type", "veth", "peer"];
    let peer = ["name", right.1, "mtu", mtu, "netns", right.0.name()];
    run(Command::new("ip").args(arguments).args(peer)).map(drop)
}

/// Names of all namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// Kills what still runs in namespace `name` (by id), then removes it.
pub fn remove(name: &str) -> Result<()> {
    let path = Path::new(DIRECTORY).join(name);
    if let Ok(metadata) = fs::metadata(&path) {
        for process in processes_in(metadata.ino()) {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
    // EINVAL: no longer mounted there, the bare file is left.
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => bail!("cannot unmount {}: {error}", path.display()),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn processes_in(namespace: u64) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let inode = fs::metadata(entry.path().join("ns/net")).ok()?.ino();
            (inode == namespace && pid != std::process::id().cast_signed()).then(|| Pid::from_raw(pid))
        })
        .collect()
}

/// Runs `command` to its end; an error carries what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
