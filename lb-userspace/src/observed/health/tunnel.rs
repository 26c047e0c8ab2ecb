//! Sends probes the way that traffic takes: socket marks, and programs on the probes' egress interfaces.
//!
//! Input: a backend's address and forwarding mode. Output: the mark for the probe's socket, once programs and maps are
//! prepared. Called for each probe of a service with `via = "tunnel"`; set up by the daemon.
//!
//! Answers are told apart by the host's port, so such a socket binds a port of its own. No policy rule, route or
//! `accept_local` is needed; a socket connected to the VIP would need all three once the host announces the VIP,
//! because the address is local then. A host that cannot load the programs probes directly and says so: it must not
//! find dead what it cannot look through.

use crate::{
    desired::model::{ForwardingMode, Service, Via},
    observed::neighbour::netlink::Netlink,
};
use lb_common::{
    Be16,
    backend::mode,
    probe::{MARK, MARK_BITS, ProbeTunnel},
};
use std::{collections::BTreeMap, net::IpAddr};
use tokio::sync::{Mutex, OnceCell};

/// How a service's traffic reaches its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Through {
    /// Destination of the inner packet.
    pub vip: IpAddr,
    /// One of `lb_common::backend::mode`.
    pub mode: u8,
    /// Destination port of GUE.
    pub gue_port: u16,
}

impl Through {
    /// The tunnel of a service's probes to a worker; None if they go directly, as they do to a worker of another address
    /// family than the VIP's.
    pub fn of(service: &Service, worker: IpAddr) -> Option<Self> {
        let mode = match service.mode {
            ForwardingMode::Ipip => mode::IPIP,
            ForwardingMode::Gue => mode::GUE,
            ForwardingMode::L2 => mode::L2,
            ForwardingMode::Nat | ForwardingMode::Local => return None,
        };
        let tunnel = service.health.via == Via::Tunnel && worker.is_ipv4() == service.vip.is_ipv4();
        tunnel.then_some(Self { vip: service.vip, mode, gue_port: service.gue_port })
    }
}

/// The packet programs that forward a marked probe like traffic.
pub trait ProbePrograms: Send {
    /// Attaches the programs to an interface, if they are not attached yet.
    ///
    /// # Errors
    /// The interface does not exist, or the kernel cannot attach them.
    fn attach(&mut self, ifindex: u32) -> Result<(), String>;
    /// Sets how probes with a mark are forwarded.
    ///
    /// # Errors
    /// The map is full.
    fn set_tunnel(&mut self, mark: u32, way: ProbeTunnel) -> Result<(), String>;
}

/// Loads the programs.
pub type LoadPrograms = Box<dyn Fn() -> Result<Box<dyn ProbePrograms>, String> + Send + Sync>;

/// Forwards probes like traffic.
pub struct Tunnel {
    load: LoadPrograms,
    /// Interfaces on which traffic arrives: answers to probes may arrive there too.
    attached: Box<dyn Fn() -> Vec<u32> + Send + Sync>,
    /// Loaded programs, or why they cannot be loaded; initialised by the first probe.
    ready: OnceCell<Result<Ready, String>>,
}

struct Ready {
    kernel: Netlink,
    inner: Mutex<Inner>,
}

struct Inner {
    programs: Box<dyn ProbePrograms>,
    marks: BTreeMap<Through, u32>,
}

impl Tunnel {
    /// Creates a tunnel; the first probe loads the programs.
    pub fn new(load: LoadPrograms, attached: impl Fn() -> Vec<u32> + Send + Sync + 'static) -> Self {
        Self { load, attached: Box::new(attached), ready: OnceCell::new() }
    }

    /// Why no probe can take the tunnel, once that is known.
    pub fn problem(&self) -> Option<String> {
        self.ready.get()?.as_ref().err().cloned()
    }

    async fn ready(&self) -> Result<&Ready, String> {
        let ready = self.ready.get_or_init(|| async {
            let load = || -> Result<Ready, String> {
                let mut programs = (self.load)()?;
                for ifindex in (self.attached)() {
                    programs.attach(ifindex)?;
                }
                let (kernel, _) = Netlink::open().map_err(|e| e.to_string())?;
                let inner = Mutex::new(Inner { programs, marks: BTreeMap::new() });
                Ok(Ready { kernel, inner })
            };
            let ready = load();
            if let Err(error) = &ready {
                tracing::error!("tunnel health checks are unavailable ({error}): probing backends directly");
            }
            ready
        });
        ready.await.as_ref().map_err(Clone::clone)
    }

    /// Prepares probes of a backend to be forwarded like traffic; returns the mark of their sockets.
    ///
    /// # Errors
    /// Why this host cannot do that, in words.
    pub async fn prepare(&self, backend: IpAddr, through: Through) -> Result<u32, String> {
        let ready = self.ready().await?;
        // Routes change: look up the egress interface for each probe.
        let route = ready.kernel.route(backend).await?;
        let mut inner = ready.inner.lock().await;
        for ifindex in (self.attached)().into_iter().chain([route.ifindex]) {
            inner.programs.attach(ifindex)?;
        }
        if let Some(mark) = inner.marks.get(&through) {
            return Ok(*mark);
        }
        let way = ProbeTunnel {
            vip: to_address(through.vip),
            gue_port: Be16::new(through.gue_port),
            mode: through.mode,
            pad: 0,
        };
        let number = inner.marks.len() as u32 + 1;
        if number >> MARK_BITS != 0 {
            return Err("more kinds of tunnels than socket marks".to_owned());
        }
        let mark = MARK | number;
        inner.programs.set_tunnel(mark, way)?;
        inner.marks.insert(through, mark);
        Ok(mark)
    }
}

pub(super) fn to_address(ip: IpAddr) -> lb_common::Address {
    match ip {
        IpAddr::V4(v4) => lb_common::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}
